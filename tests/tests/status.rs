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
        status["committed_step"].as_u64() > Some(0)
    });
    let person = text(&ask(port, &[]));
    drop(coordinator);
    let gone = ask(port, &[]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone).contains(&port.to_string()), "{}", text(&gone));

    assert!(person.contains("small  training  step "), "{person}");
    assert_eq!(status["job"], "small");
    assert_eq!(status["state"], "training");
    assert_eq!(status["steps_total"], 2000);
    assert_eq!(status["workers"].as_array().expect("workers").len(), 2);
    let waiting = status["waiting"].as_str().expect("a sentence");
    assert!(waiting.starts_with("waiting for"), "{waiting}");
}
