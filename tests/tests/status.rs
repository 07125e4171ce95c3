//! A running job answers questions about itself.

use std::net::TcpListener;
use std::process::{Command, Output};

use serde_json::Value;
use tests::programs::{Run, SMALL, program, text};

fn ask(port: u16, more: &[&str]) -> Output {
    let mut command = Command::new(program("coordinator"));
    command
        .args(["status", &format!("http://127.0.0.1:{port}")])
        .args(more);
    command.output().expect("it starts")
}

#[test]
fn a_running_job_tells_its_step_its_workers_and_what_it_waits_for() {
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port();
    let run = Run::new(SMALL)
        .set("train.steps=2000")
        .set(&format!("cluster.listen=127.0.0.1:{port}"));
    let mut coordinator = run.start();
    let mut status = Value::Null;
    coordinator.wait_until("status with a committed step", || {
        let output = ask(port, &["--json"]);
        status = serde_json::from_slice(&output.stdout).unwrap_or_default();
        status["jobs"][0]["committed_step"].as_u64() > Some(0)
    });
    let person = text(&ask(port, &[]));
    drop(coordinator);
    let gone = ask(port, &[]);
    assert_eq!(gone.status.code(), Some(75));
    assert!(text(&gone).contains(&port.to_string()), "{}", text(&gone));

    assert!(person.contains("small  training  step "), "{person}");
    assert_eq!(status["cluster"], false);
    let job = &status["jobs"][0];
    assert_eq!(job["job"], "small");
    assert_eq!(job["state"], "training");
    assert_eq!(job["steps_total"], 2000);
    assert_eq!(job["workers"].as_array().expect("workers").len(), 2);
    let waiting = job["waiting"].as_str().expect("a sentence");
    assert!(waiting.starts_with("waiting for"), "{waiting}");
}

#[test]
fn a_run_says_at_its_start_how_it_is_asked() {
    let run = Run::new(SMALL).set("train.steps=2000");
    let mut coordinator = run.start();
    // Its port is any free one.
    let line = |said: &str| {
        let mut lines = said.lines();
        let line = lines.find(|line| line.starts_with("  status       coordinator status "))?;
        Some(
            line.trim_start_matches("  status       coordinator ")
                .to_owned(),
        )
    };
    let mut told = None;
    let said = run.folder().join("said.txt");
    coordinator.wait_until("line that tells how to ask", || {
        told = line(&std::fs::read_to_string(&said).unwrap_or_default());
        told.is_some()
    });
    let told = told.expect("it was waited for");
    let answer = Command::new(program("coordinator"))
        .args(told.split_whitespace())
        .output()
        .expect("it starts");
    assert!(text(&answer).contains("small  "), "{}", text(&answer));
    drop(coordinator);
    // What has ended cannot be asked.
    let run = Run::new(SMALL).set("train.steps=2");
    assert!(line(&text(&run.complete())).is_some());
    assert_eq!(line(&text(&run.complete())), None);
}

#[test]
fn a_watch_follows_a_job_on_one_machine_to_its_end_and_has_no_queue_to_submit_to() {
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port();
    let url = format!("http://127.0.0.1:{port}");
    let run = Run::new(SMALL).set(&format!("cluster.listen=127.0.0.1:{port}"));
    let mut coordinator = run.start();
    coordinator.wait_until("an answer", || ask(port, &[]).status.success());
    let submitted = Command::new(program("coordinator"))
        .args(["submit", "configs/quickstart.toml", "--coordinator", &url])
        .current_dir(tests::workspace_root())
        .output()
        .expect("it starts");
    assert_eq!(submitted.status.code(), Some(2));
    assert!(
        text(&submitted).contains("coordinator --cluster"),
        "{}",
        text(&submitted)
    );
    let watched = Command::new(program("coordinator"))
        .args(["watch", "--coordinator", &url])
        .output()
        .expect("it starts");
    assert_eq!(watched.status.code(), Some(0), "{}", text(&watched));
    assert!(
        text(&watched).contains("job small completed"),
        "{}",
        text(&watched)
    );
    assert_eq!(coordinator.wait().code(), Some(0));
    // The watch ends when all is written.
    assert!(run.path("export/model.safetensors").exists());
}
