//! Object stores: in memory, and S3 over HTTP on loopback.
#![allow(missing_docs, clippy::unwrap_used)]

mod s3;
mod suite;

use std::{env, io::ErrorKind, path::Path, process::Command, sync::Arc, time::Duration};

use object_store::{BackoffConfig, ObjectStore, RetryConfig, aws::AmazonS3Builder};
use s3::{BUCKET, Server};
use storage::{
    Condition, Folder, Put, RemoteStore,
    testing::{Fault, HostileStore},
};

const SECRET: &str = "wJalrXUtnFEMIsecret";

/// A client of the server.
fn client(server: &Server) -> AmazonS3Builder {
    drop(rustls::crypto::ring::default_provider().install_default());
    AmazonS3Builder::new()
        .with_endpoint(format!("http://{}", server.address))
        .with_allow_http(true)
        .with_bucket_name(BUCKET)
        .with_access_key_id("AKIDEXAMPLE")
        .with_secret_access_key(SECRET)
}

/// The folder `prefix` of the server's bucket, through a client that loses patience soon.
fn folder(server: &Server, prefix: &str) -> Folder {
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(1),
            max_backoff: Duration::from_millis(4),
            base: 2.0,
        },
        max_retries: 3,
        retry_timeout: Duration::from_secs(10),
    };
    let client = client(server).with_retry(retry).build().unwrap();
    let client: Arc<dyn ObjectStore> = Arc::new(client);
    let url = format!("s3://{BUCKET}/{prefix}");
    Folder::of(Arc::new(RemoteStore::new(client, &url, prefix)))
}

#[test]
fn memory_keeps_what_every_store_promises() {
    suite::check(&Folder::open(Path::new("memory://suite/some/prefix")).unwrap());
    suite::check(&Folder::open(Path::new("memory://suite-without-prefix")).unwrap());
}

/// Of another implementation of the service than this crate's tests have.
#[test]
#[ignore = "needs a server: tests/s3.py starts one and names a folder in STORAGE_TEST_URL"]
fn a_server_of_the_environment_keeps_what_every_store_promises() {
    let url = env::var_os("STORAGE_TEST_URL").expect("STORAGE_TEST_URL names a folder");
    suite::check(&Folder::open(Path::new(&url)).unwrap());
}

#[test]
fn a_hostile_store_without_faults_is_the_store_behind_it() {
    let inner = storage::open(Path::new("memory://hostile")).unwrap();
    suite::check(&Folder::of(Arc::new(HostileStore::new(inner))));
}

#[test]
fn s3_keeps_what_every_store_promises() {
    let server = Server::start();
    let folder = folder(&server, "runs/1");
    // Another prefix that begins alike is nobody's to list or remove.
    let beside = self::folder(&server, "runs/10");
    assert_eq!(
        beside.put("stays", b"1", Condition::Always).unwrap(),
        Put::Done
    );
    suite::check(&folder);
    assert_eq!(beside.list().unwrap(), ["stays"]);
    let state = server.state();
    assert_eq!(
        state.uploads.len(),
        0,
        "an upload that is given up leaves no parts"
    );
    let parts = state
        .requests
        .iter()
        .filter(|it| it.contains("partNumber="));
    assert!(parts.count() >= 3, "a large object travels in parts");
}

#[test]
fn one_memory_is_one_place_for_the_whole_process() {
    let open = || Folder::open(Path::new("memory://shared/x")).unwrap();
    assert_eq!(
        open().put("object", b"1", Condition::Always).unwrap(),
        Put::Done
    );
    assert_eq!(open().read("object").unwrap().unwrap(), b"1");
    assert_eq!(
        open().below("object").path(),
        Path::new("memory://shared/x/object")
    );
}

#[test]
fn a_busy_service_is_asked_again_and_in_the_end_the_error_says_how_often() {
    let server = Server::start();
    let folder = folder(&server, "x");
    server.state().busy = 2;
    assert_eq!(
        folder.put("object", b"1", Condition::Always).unwrap(),
        Put::Done
    );
    assert_eq!(server.state().requests.len(), 3);

    server.state().busy = usize::MAX;
    let error = folder.read("object").unwrap_err().to_string();
    for word in ["s3://bucket/x/object", "503", "3 retries"] {
        assert!(error.contains(word), "{error}");
    }
    assert!(!error.contains(SECRET), "{error}");
    assert_eq!(server.state().requests.len(), 7);
}

#[test]
fn a_put_whose_answer_was_lost_counts_as_done() {
    let server = Server::start();
    let folder = folder(&server, "x");
    server.state().lost_answers = 1;
    assert_eq!(
        folder.put("object", b"1", Condition::Absent).unwrap(),
        Put::Done
    );
    assert_eq!(
        folder.put("object", b"2", Condition::Absent).unwrap(),
        Put::Refused
    );
    let object = folder.object("object").unwrap().unwrap();
    server.state().lost_answers = 1;
    let unchanged = Condition::Unchanged(object.version());
    assert_eq!(folder.put("object", b"3", unchanged).unwrap(), Put::Done);
    assert_eq!(folder.read("object").unwrap().unwrap(), b"3");
}

#[test]
fn an_upload_whose_parts_cannot_be_sent_fails_and_leaves_the_old_object() {
    let server = Server::start();
    let folder = folder(&server, "x");
    assert_eq!(
        folder.put("object", b"old", Condition::Always).unwrap(),
        Put::Done
    );
    let mut upload = folder.create("object", 40 << 20).unwrap();
    upload.append(&vec![1; 17 << 20]).unwrap();
    server.state().busy = 1000;
    let sent = upload
        .append(&vec![1; 100 << 20])
        .and_then(|()| upload.commit());
    assert!(sent.unwrap_err().to_string().contains("503"));
    server.state().busy = 0;
    assert_eq!(folder.read("object").unwrap().unwrap(), b"old");
}

#[test]
fn calls_from_within_a_runtime_block_and_do_not_panic() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let folder = Folder::open(Path::new("memory://inside")).unwrap();
        assert_eq!(
            folder.put("object", b"1", Condition::Always).unwrap(),
            Put::Done
        );
        assert_eq!(folder.read("object").unwrap().unwrap(), b"1");
    });
}

#[test]
fn a_bucket_that_is_not_there_is_an_error_and_no_refusal() {
    let server = Server::start();
    let client = client(&server).with_bucket_name("other").build().unwrap();
    let store = RemoteStore::new(Arc::new(client), "s3://other", "");
    let folder = Folder::of(Arc::new(store));
    for condition in [Condition::Always, Condition::Absent] {
        let error = folder.put("object", b"1", condition).unwrap_err();
        assert_eq!(error.source.kind(), ErrorKind::NotFound, "{error}");
        assert!(error.to_string().contains("NoSuchBucket"), "{error}");
    }
    let error = folder.list().unwrap_err().to_string();
    assert!(error.contains("NoSuchBucket"), "{error}");
}

#[test]
fn without_permission_the_error_says_so() {
    let server = Server::start();
    let client = client(&server).with_skip_signature(true).build().unwrap();
    let store = RemoteStore::new(Arc::new(client), "s3://bucket/x", "x");
    let error = Folder::of(Arc::new(store)).read("object").unwrap_err();
    assert_eq!(error.source.kind(), ErrorKind::PermissionDenied, "{error}");
}

/// A URL and the environment are all that a program has. The environment of a process is its own, so another one is asked.
#[test]
fn a_url_and_the_environment_lead_to_the_bucket() {
    let server = Server::start();
    let output = Command::new(env::current_exe().unwrap())
        .args([
            "--exact",
            "in_a_process_with_credentials",
            "--ignored",
            "--nocapture",
        ])
        .env("AWS_ENDPOINT", format!("http://{}", server.address))
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        .env("AWS_SECRET_ACCESS_KEY", SECRET)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && told.contains("1 passed"),
        "{told}"
    );
    assert!(!told.contains(SECRET));
    assert_eq!(server.state().objects["some/run/object"].0, b"1");
}

#[test]
#[ignore = "run by a_url_and_the_environment_lead_to_the_bucket"]
fn in_a_process_with_credentials() {
    let folder = Folder::open(Path::new("s3://bucket/some/run/")).unwrap();
    assert_eq!(folder.path(), Path::new("s3://bucket/some/run"));
    println!("{folder:?}");
    suite::check(&folder);
    assert_eq!(
        folder.put("object", b"1", Condition::Absent).unwrap(),
        Put::Done
    );
}

#[test]
fn a_fault_in_the_last_step_of_an_upload_leaves_the_old_object() {
    let inner = storage::open(Path::new("memory://faults")).unwrap();
    let hostile = HostileStore::new(inner).with(3, Fault::Crash);
    let folder = Folder::of(Arc::new(hostile.clone()));
    assert_eq!(
        folder.put("object", b"old", Condition::Always).unwrap(),
        Put::Done
    );
    let mut upload = folder.create("object", 3).unwrap();
    upload.append(b"new").unwrap();
    upload.commit().unwrap_err();
    hostile.heal();
    assert_eq!(folder.read("object").unwrap().unwrap(), b"old");
}
