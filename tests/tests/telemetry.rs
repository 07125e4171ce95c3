//! What others see of a run: `/metrics` while it runs, and trackers after kills, as the programs themselves read them.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tests::programs::{Run, SMALL, text};
use tests::workspace_root;

const TRACKERS: &str = r#"telemetry.trackers=["tensorboard", "wandb", "mlflow"]"#;

/// Names a Python that has what `tests/readers/trackers.py` needs.
const PYTHON: &str = "CALDPO_TRACKERS_PYTHON";

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// Values by series; none while nobody listens.
fn scrape(port: u16) -> BTreeMap<String, f64> {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
        return BTreeMap::new();
    };
    let request = "GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    let lines = body.lines().filter(|line| line.starts_with("caldpo_"));
    let series = lines.map(|line| {
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        (name.to_owned(), value.parse().expect("a number"))
    });
    series.collect()
}

#[test]
fn a_running_job_is_scraped_with_the_values_of_its_rows() {
    let port = free_port();
    let run = Run::new(SMALL)
        .set("train.steps=2000")
        .set(&format!("telemetry.metrics_listen=127.0.0.1:{port}"));
    let mut coordinator = run.start();
    let mut found = BTreeMap::new();
    let of = |found: &BTreeMap<String, f64>, name: &str| {
        found
            .get(&format!("caldpo_{name}{{job=\"small\"}}"))
            .copied()
    };
    coordinator.wait_until("an evaluation and a checkpoint among the metrics", || {
        found = scrape(port);
        of(&found, "evaluations_total") >= Some(2.0) && of(&found, "checkpoints_total") >= Some(1.0)
    });
    let step = of(&found, "step").expect("a step");
    // The row may be on its way into the file.
    coordinator.wait_until("the row of that step", || {
        run.metrics().len() >= step as usize
    });
    let row = &run.metrics()[step as usize - 1];
    for (name, key) in [
        ("loss", "loss"),
        ("rewards_chosen", "rewards/chosen"),
        ("log_ratios_rejected", "log_ratios/rejected"),
        ("grad_norm", "grad_norm"),
        ("learning_rate", "learning_rate"),
        ("tokens_per_second", "tokens_per_second"),
        ("world_size", "world_size"),
        ("generation", "generation"),
    ] {
        assert_eq!(of(&found, name), row[key].as_f64(), "{name}");
    }
    assert_eq!(of(&found, "steps_total"), Some(step));
    assert_eq!(of(&found, "steps_planned"), Some(2000.0));
    assert_eq!(of(&found, "pairs_total"), Some(24.0 * step));
    assert_eq!(of(&found, "step_duration_seconds_count"), Some(step));
    assert_eq!(of(&found, "job_running"), Some(1.0));
    assert_eq!(of(&found, "workers_lost_total"), Some(0.0));
    let said = coordinator.said();
    assert!(
        said.contains(&format!("metrics on http://127.0.0.1:{port}/metrics")),
        "{said}"
    );
    drop(coordinator);
    assert!(scrape(port).is_empty());
}

#[test]
fn a_port_for_metrics_that_is_taken_is_refused_before_anything_is_trained() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address").to_string();
    let run = Run::new(SMALL).set(&format!("telemetry.metrics_listen={address}"));
    let output = run.output();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in [
        &address,
        "telemetry.metrics_listen",
        "another port",
        "in use",
    ] {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
    assert!(run.metrics().is_empty());
    assert!(!run.path("logs").exists(), "workers were started");
}

#[test]
fn a_tracker_that_cannot_write_is_one_warning_with_its_place() {
    let run = Run::new(SMALL).set("train.steps=6");
    let place = run.folder().join("config.toml");
    let run = run
        .set(TRACKERS)
        .set(&format!("telemetry.wandb_folder={}", place.display()));
    let said = text(&run.complete());
    let warning = format!("wandb gets no more rows: read {}", place.display());
    assert_eq!(said.matches(&warning).count(), 1, "{said}");
    assert_eq!(said.matches("gets no more rows").count(), 1, "{said}");
    assert_eq!(run.metrics().len(), 6);
    assert_eq!(
        mlflow_curve(&run, "loss"),
        rows_of(&run, "metrics.jsonl", "loss")
    );
}

#[test]
fn trackers_of_a_run_that_was_killed_and_rewound_show_one_value_a_step() {
    let run = Run::new(SMALL).set(TRACKERS);
    for rows in [7, 13] {
        let mut coordinator = run.start();
        coordinator.wait_until("rows", || run.metrics().len() >= rows);
        coordinator.kill_everything();
    }
    run.complete();
    let rewinds = run.rows("events.jsonl");
    let rewinds = rewinds.iter().filter(|event| event["kind"] == "rewind");
    assert!(
        rewinds.count() > 0,
        "the kills met no step behind a checkpoint"
    );
    compare(&run);

    // Nothing is added to a run that is complete.
    let names = ["tensorboard", "wandb", "mlruns"];
    let before = names.map(|name| files(&run.path(name)));
    run.complete();
    assert!(names.map(|name| files(&run.path(name))) == before);
}

/// Compares what the trackers hold with the run's own rows.
fn compare(run: &Run) {
    for (file, prefix, name) in [
        ("metrics.jsonl", "", "rewards/chosen"),
        ("metrics.jsonl", "", "tokens_per_second"),
        ("eval.jsonl", "eval/", "loss"),
    ] {
        let curve = mlflow_curve(run, &format!("{prefix}{name}"));
        assert_eq!(curve, rows_of(run, file, name), "{prefix}{name}");
    }
    let Some(python) = std::env::var_os(PYTHON) else {
        return eprintln!(
            "skipped: {PYTHON} names no Python with tensorboard, mlflow-skinny and wandb 0.22.3"
        );
    };
    let output = Command::new(python)
        .arg(workspace_root().join("tests/readers/trackers.py"))
        .arg(run.path(""))
        .output()
        .expect("Python starts");
    assert!(output.status.success(), "{}", text(&output));
    let seen: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    for (program, separator) in [("tensorboard", "/"), ("wandb", "/"), ("mlflow", ".")] {
        let metrics = seen[program]["metrics"].as_object().expect("metrics");
        let mut count = 0;
        for (file, prefix) in [("metrics.jsonl", ""), ("eval.jsonl", "eval/")] {
            let first = &run.rows(file)[0];
            for name in first
                .as_object()
                .expect("a row")
                .keys()
                .filter(|name| *name != "step")
            {
                let shown = format!(
                    "{prefix}{}",
                    name.replacen("loss/", &format!("loss{separator}"), 1)
                        .replacen("seconds/", &format!("seconds{separator}"), 1)
                );
                let curve = metrics
                    .get(&shown)
                    .unwrap_or_else(|| panic!("{program}: no {shown}"));
                let curve = curve.as_array().expect("a curve").iter().map(|point| {
                    (
                        point[0].as_u64().expect("a step"),
                        point[1].as_f64().expect("a value"),
                    )
                });
                let curve: Vec<(u64, f64)> = curve.collect();
                let expected = rows_of(run, file, name);
                if program == "tensorboard" {
                    let single = |curve: Vec<(u64, f64)>| -> Vec<(u64, f32)> {
                        curve
                            .into_iter()
                            .map(|(step, value)| (step, value as f32))
                            .collect()
                    };
                    assert_eq!(single(curve), single(expected), "{program}: {shown}");
                } else {
                    assert_eq!(curve, expected, "{program}: {shown}");
                }
                count += 1;
            }
        }
        assert_eq!(
            metrics.len(),
            count,
            "{program}: metrics besides the rows' own"
        );
    }
    assert_eq!(seen["mlflow"]["status"], "FINISHED");
    assert_eq!(seen["mlflow"]["config"]["objective.beta"], "0.1");
    assert_eq!(seen["tensorboard"]["config"]["objective.beta"], 0.1);
    assert_eq!(seen["wandb"]["config"]["objective"]["beta"], 0.1);
    assert_eq!(seen["wandb"]["exit_code"], 0);
    let last = run.metrics().len() as u64;
    let steps: Vec<u64> = (0..=last).collect();
    assert_eq!(seen["wandb"]["steps"], serde_json::json!(steps));
}

/// A metric of the rows in a file, by step.
fn rows_of(run: &Run, file: &str, name: &str) -> Vec<(u64, f64)> {
    let rows = run.rows(file);
    assert!(!rows.is_empty(), "{file} has no rows");
    let values = rows.iter().map(|row| {
        let value = match row[name].as_bool() {
            Some(flag) => f64::from(u8::from(flag)),
            None => row[name].as_f64().expect("a number"),
        };
        (row["step"].as_u64().expect("a step"), value)
    });
    values.collect()
}

/// A metric in MLflow's files, by step.
fn mlflow_curve(run: &Run, name: &str) -> Vec<(u64, f64)> {
    let wanted = format!("/metrics/{name}");
    let files = files(&run.path("mlruns"));
    let mut found = files
        .iter()
        .filter(|(path, _)| path.display().to_string().ends_with(&wanted));
    let (_, bytes) = found.next().unwrap_or_else(|| panic!("no {wanted}"));
    let lines = String::from_utf8_lossy(bytes).into_owned();
    let curve = lines.lines().map(|line| {
        let words: Vec<_> = line.split(' ').collect();
        (
            words[2].parse().expect("a step"),
            words[1].parse().expect("a value"),
        )
    });
    curve.collect()
}

/// All files below a folder with their content.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            let bytes = fs::read(&path).expect("a file");
            all.insert(path, bytes);
        }
    }
    all
}
