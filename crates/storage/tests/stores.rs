//! Stores on a local disk, what a URL may be, and stores that misbehave.
#![allow(missing_docs, clippy::unwrap_used)]

mod suite;

use std::{fs, io::ErrorKind, path::Path, sync::Arc};

use storage::{
    Condition, Folder, LocalStore, Put, is_remote,
    testing::{Fault, HostileStore, disk},
};

#[test]
fn a_disk_keeps_what_every_store_promises() {
    let directory = tempfile::tempdir().unwrap();
    suite::check(&Folder::open(&directory.path().join("made/by/put")).unwrap());
    let url = format!("file://{}/other", directory.path().display());
    suite::check(&Folder::open(Path::new(&url)).unwrap());
}

#[test]
fn a_hostile_store_without_faults_is_the_store_behind_it() {
    let directory = tempfile::tempdir().unwrap();
    let hostile = HostileStore::new(Arc::new(LocalStore::new(directory.path())));
    suite::check(&Folder::of(Arc::new(hostile)));
}

#[test]
fn a_refused_put_leaves_no_temporary_file() {
    let directory = tempfile::tempdir().unwrap();
    let folder = Folder::open(directory.path()).unwrap();
    assert_eq!(
        folder.put("object", b"1", Condition::Absent).unwrap(),
        Put::Done
    );
    let old = folder.object("object").unwrap().unwrap();
    assert_eq!(
        folder.put("object", b"2", Condition::Always).unwrap(),
        Put::Done
    );
    for condition in [Condition::Absent, Condition::Unchanged(old.version())] {
        assert_eq!(folder.put("object", b"3", condition).unwrap(), Put::Refused);
    }
    assert_eq!(folder.list().unwrap(), ["object"]);
}

#[test]
fn a_url_that_cannot_be_used_is_refused_with_the_reason() {
    let check = |url: &str, words: &[&str]| {
        let error = Folder::open(Path::new(url)).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{url}: {error}");
        }
        error
    };
    check("ftp://host/x", &["`ftp`", "s3", "ftp://host/x"]);
    check("https://bucket.s3.amazonaws.com/x", &["`https`", "s3"]);
    check("file://host/x", &["three slashes"]);
    check("file:///a%20b", &["percent"]);
    check("s3://", &["no bucket", "s3://bucket/prefix"]);
    check("gs:///prefix", &["no bucket"]);
    check("s3://bucket/a//b", &["empty"]);
    check("az://container/../x", &["`..`"]);
    for url in [
        "s3://KEY:SECRET@bucket/x",
        "az://container/x?sig=SECRET",
        "s3://bucket/x#SECRET",
    ] {
        let error = check(url, &["environment"]);
        assert!(!error.contains("SECRET"), "{error}");
    }
    assert!(is_remote(Path::new("s3://bucket/x")) && is_remote(Path::new("gs://bucket")));
    for path in ["/srv/x", "runs/x", "file:///srv/x", "s3:/x", ""] {
        assert!(!is_remote(Path::new(path)), "{path}");
    }
}

#[cfg(not(feature = "object-store"))]
#[test]
fn an_object_store_that_was_not_built_in_is_refused() {
    for url in [
        "s3://bucket/x",
        "gs://bucket/x",
        "az://container/x",
        "memory://x",
    ] {
        let error = Folder::open(Path::new(url)).unwrap_err();
        assert_eq!(error.source.kind(), ErrorKind::Unsupported);
        assert!(
            error.to_string().contains("feature `object-store`"),
            "{error}"
        );
        assert!(error.to_string().contains(url), "{error}");
    }
}

/// A hostile store over a folder that has `old` = `old`.
fn hostile(directory: &Path, call: usize, fault: Fault) -> (HostileStore, Folder) {
    let inner = LocalStore::new(directory);
    let folder = Folder::of(Arc::new(inner.clone()));
    assert_eq!(
        folder.put("old", b"old", Condition::Always).unwrap(),
        Put::Done
    );
    let hostile = HostileStore::new(Arc::new(inner)).with(call, fault);
    (hostile.clone(), Folder::of(Arc::new(hostile)))
}

#[test]
fn each_fault_does_what_its_name_says() {
    let put = |folder: &Folder, name: &str| folder.put(name, b"bytes", Condition::Absent);
    let there = |directory: &Path, name: &str| fs::read(directory.join(name)).ok();
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();

    let (_, folder) = hostile(at, 0, Fault::Fail);
    assert!(
        put(&folder, "a")
            .unwrap_err()
            .to_string()
            .contains("call 0")
    );
    assert_eq!(there(at, "a"), None);
    assert_eq!(put(&folder, "a").unwrap(), Put::Done);

    let (_, folder) = hostile(at, 0, Fault::LoseAnswer);
    put(&folder, "b").unwrap_err();
    assert_eq!(there(at, "b").unwrap(), b"bytes");

    let (store, folder) = hostile(at, 1, Fault::Crash);
    let mut upload = folder.create("c", 5).unwrap();
    upload.append(b"bytes").unwrap_err();
    drop(upload);
    put(&folder, "c").unwrap_err();
    let left = fs::read_dir(at).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().ends_with(".tmp")
    });
    assert_eq!(left.count(), 1, "a dead process tidies nothing up");
    assert_eq!(store.calls(), ["create c", "append c", "put c"]);
    store.heal();
    assert_eq!(put(&folder, "c").unwrap(), Put::Done);

    let (_, folder) = hostile(at, 0, Fault::CrashAfter);
    put(&folder, "d").unwrap_err();
    assert_eq!(there(at, "d").unwrap(), b"bytes");
    folder.read("d").unwrap_err();

    let (_, folder) = hostile(at, 0, Fault::Tear(2));
    put(&folder, "e").unwrap_err();
    assert_eq!(there(at, "e").unwrap(), b"by");

    let (store, folder) = hostile(at, 1, Fault::Full);
    assert_eq!(folder.read("old").unwrap().unwrap(), b"old");
    for _ in 0..2 {
        let error = put(&folder, "f").unwrap_err();
        assert_eq!(error.source.kind(), ErrorKind::StorageFull);
    }
    folder.remove("e").unwrap();
    store.heal();
    assert_eq!(put(&folder, "f").unwrap(), Put::Done);

    let (_, folder) = hostile(at, 0, Fault::Refuse);
    assert_eq!(put(&folder, "g").unwrap(), Put::Refused);
    assert_eq!(
        folder.put("g", b"bytes", Condition::Always).unwrap(),
        Put::Done
    );

    let (store, folder) = hostile(at, usize::MAX, Fault::Fail);
    store.flip("ol", 9);
    assert_eq!(folder.read("old").unwrap().unwrap(), [b'o', b'l' ^ 2, b'd']);
    assert_eq!(folder.read("g").unwrap().unwrap(), b"bytes");
    let before = folder.list().unwrap();
    store.make_lists_stale();
    folder.remove("g").unwrap();
    assert_eq!(folder.list().unwrap(), before);
    assert_eq!(folder.below("never listed").list().unwrap(), [""; 0]);
    store.heal();
    assert!(!folder.list().unwrap().contains(&"g".to_owned()));
}

/// Ways of a crash to choose among what is possible.
const CHOICES: usize = 64;

/// States that a crash may leave of what `act` does, as the files' names and contents.
fn crashes(act: impl Fn(&Path)) -> Vec<Vec<(String, Vec<u8>)>> {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("object"), "old").unwrap();
    let ((), recording) = disk::record(directory.path(), None, || act(directory.path())).unwrap();
    let target = tempfile::tempdir().unwrap();
    let mut states = Vec::new();
    for steps in 0..=recording.steps() {
        for choice in 0..CHOICES as u64 {
            let at = target.path().join(format!("{steps}-{choice}"));
            recording.crash(steps, choice, &at).unwrap();
            let mut state: Vec<(String, Vec<u8>)> = fs::read_dir(&at)
                .unwrap()
                .map(|entry| {
                    let path = entry.unwrap().path();
                    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                    (name, fs::read(path).unwrap())
                })
                .collect();
            state.sort();
            states.push(state);
        }
    }
    states
}

#[test]
fn a_crash_anywhere_in_an_atomic_write_leaves_the_old_bytes_or_the_new() {
    let states = crashes(|at| storage::atomic_write(&at.join("object"), b"new").unwrap());
    for state in &states {
        let object = state.iter().find(|(name, _)| name == "object").unwrap();
        assert!(
            ["old", "new"].map(str::as_bytes).contains(&&object.1[..]),
            "{state:?}"
        );
    }
    // What has returned stays, whatever the crash does with the rest.
    for state in &states[states.len() - CHOICES..] {
        assert_eq!(state[..], [("object".to_owned(), b"new".to_vec())]);
    }
}

#[test]
fn a_crash_shows_what_a_write_without_syncs_risks() {
    let states = crashes(|at| {
        let folder = Folder::open(at).unwrap();
        let mut upload = folder.create("object", 3).unwrap();
        upload.append(b"new").unwrap();
        // Never committed: none of it may show under the name, but the temporary file may be there, torn.
        std::mem::forget(upload);
    });
    let torn = |(name, bytes): &(String, Vec<u8>)| name != "object" && bytes == b"";
    assert!(states.iter().any(|state| state.iter().any(torn)));
    assert!(states.iter().any(|state| state.len() == 1));
    assert!(
        states
            .iter()
            .any(|state| state.iter().any(|(_, bytes)| bytes == b"new"))
    );
    assert!(
        states
            .iter()
            .any(|state| state.iter().any(|(_, bytes)| bytes == &[0; 3]))
    );
    for state in &states {
        assert!(
            state.contains(&("object".to_owned(), b"old".to_vec())),
            "{state:?}"
        );
    }
}
