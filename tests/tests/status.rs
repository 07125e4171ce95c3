//! A running job answers questions about itself.

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::programs::{Run, SMALL, program};

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
    let start = Instant::now();
    let status = loop {
        assert!(
            start.elapsed() < Duration::from_mins(1),
            "no status with a committed step"
        );
        let output = Command::new(program("coordinator"))
            .args(["status", "--json", &format!("http://127.0.0.1:{port}")])
            .output()
            .expect("it starts");
        let status: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        if let Some(status) = status.filter(|status| status["committed_step"].as_u64() > Some(0)) {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    coordinator.kill().expect("kill");
    coordinator.wait().expect("it was started");
    assert_eq!(status["job"], "small");
    assert_eq!(status["state"], "training");
    assert_eq!(status["steps_total"], 2000);
    assert_eq!(status["workers"].as_array().expect("workers").len(), 2);
    let waiting = status["waiting"].as_str().expect("a sentence");
    assert!(waiting.starts_with("waiting for"), "{waiting}");
}
