//! Invariant T3 through the real programs: whatever ends a run, the same command goes on to the same bits.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::programs::{Run, SMALL};

/// What a run must end in: the rows of the uninterrupted run and its weights.
struct Expected {
    training: Vec<Value>,
    evaluations: Vec<Value>,
    exported: Vec<u8>,
}

fn expected() -> &'static Expected {
    static EXPECTED: OnceLock<Expected> = OnceLock::new();
    EXPECTED.get_or_init(|| {
        let run = Run::new(SMALL);
        run.complete();
        Expected {
            training: run.training(),
            evaluations: run.rows("eval.jsonl"),
            exported: run.exported(),
        }
    })
}

fn assert_same_bits(run: &Run) {
    let expected = expected();
    assert_eq!(run.training(), expected.training);
    assert_eq!(run.rows("eval.jsonl"), expected.evaluations);
    assert!(run.exported() == expected.exported, "the exports differ");
}

fn signal(pid: &str, name: &str) {
    let status = Command::new("kill").args(["-s", name, "--", pid]).status();
    assert!(status.expect("kill runs").success(), "kill -{name} {pid}");
}

/// Waits until `ready`, within a bound that only a hang exceeds.
fn wait(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(
            start.elapsed() < Duration::from_mins(1),
            "waiting for {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// kill -9 of the coordinator and its workers at once.
fn kill_everything(mut coordinator: Child) {
    signal(&format!("-{}", coordinator.id()), "KILL");
    coordinator.wait().expect("it was started");
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(str::to_owned).collect()
}

/// Steps of the checkpoints that are visible.
fn newest_checkpoint(run: &Run) -> usize {
    let Ok(entries) = fs::read_dir(run.path("checkpoints")) else {
        return 0;
    };
    let steps = entries.filter_map(|entry| {
        let entry = entry.expect("a folder's entry");
        let step = entry
            .file_name()
            .to_str()?
            .strip_prefix("step-")?
            .parse()
            .ok()?;
        entry.path().join("manifest.json").exists().then_some(step)
    });
    steps.max().unwrap_or(0)
}

fn killed_after(rows: usize) {
    let run = Run::new(SMALL);
    let coordinator = run.start();
    wait("rows of metrics", || {
        lines(&run.path("metrics.jsonl")).len() >= rows
    });
    kill_everything(coordinator);
    let (before, kept) = (lines(&run.path("metrics.jsonl")), newest_checkpoint(&run));
    run.complete();
    let after = lines(&run.path("metrics.jsonl"));
    // Rows whose state a checkpoint held stay byte for byte; later ones were computed again.
    let stay = kept.min(before.len());
    assert_eq!(
        after[..stay],
        before[..stay],
        "killed after {rows} rows, at step {kept}"
    );
    assert_eq!(after.len(), 24, "one row a step");
    assert_same_bits(&run);
}

#[test]
fn t3_a_run_killed_before_its_first_step_ends_in_the_same_bits() {
    killed_after(0);
}

#[test]
fn t3_a_run_killed_at_random_moments_ends_in_the_same_bits() {
    // Moments of their own on every run of the test; the step says where to look.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = now.expect("a clock").subsec_nanos();
    for moment in [3 + seed % 5, 8 + seed % 7, 16 + seed % 6] {
        println!("killed after row {moment}");
        killed_after(moment as usize);
    }
}

#[test]
fn t3_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_bits() {
    let run = Run::new(SMALL);
    let mut coordinator = run.start();
    wait("rows of metrics", || run.metrics().len() >= 6);
    signal(&coordinator.id().to_string(), "INT");
    let status = coordinator.wait().expect("it was started");
    assert_eq!(status.code(), Some(130), "{status}");
    let steps = run.metrics().len();
    assert_eq!(newest_checkpoint(&run), steps, "the last step is saved");
    let before = fs::read(run.path("metrics.jsonl")).expect("rows");
    run.complete();
    let after = fs::read(run.path("metrics.jsonl")).expect("rows");
    assert!(
        after.starts_with(&before),
        "earlier rows stay byte for byte"
    );
    assert_same_bits(&run);
}

#[test]
fn a_lost_worker_ends_the_job_with_its_name_and_the_same_command_goes_on_to_the_same_bits() {
    let run = Run::new(SMALL);
    let mut coordinator = run.start();
    wait("rows of metrics", || run.metrics().len() >= 7);
    let children = format!("/proc/{0}/task/{0}/children", coordinator.id());
    let children = fs::read_to_string(children).expect("a process that runs");
    let worker = children.split_whitespace().next().expect("a worker");
    signal(worker, "KILL");
    let status = coordinator.wait().expect("it was started");
    assert_eq!(status.code(), Some(75), "{status}");
    let summary = fs::read_to_string(run.path("summary.json")).expect("a summary");
    assert!(summary.contains("rank "), "{summary}");
    run.complete();
    assert_same_bits(&run);
}

#[test]
fn a_finished_run_is_left_alone_by_the_same_command() {
    let run = Run::new(SMALL).set("train.steps=4");
    run.complete();
    let before = fs::read(run.path("metrics.jsonl")).expect("rows");
    let journal = fs::read(run.path("journal.log")).expect("a journal");
    run.complete();
    assert_eq!(fs::read(run.path("metrics.jsonl")).expect("rows"), before);
    assert_eq!(
        fs::read(run.path("journal.log")).expect("a journal"),
        journal
    );
}

#[test]
fn reference_values_are_computed_once_and_an_interrupted_pass_is_not_lost() {
    let run = Run::new(SMALL).set("train.steps=2");
    run.complete();
    let counts = |run: &Run| {
        let text = fs::read_to_string(run.path("summary.json")).expect("a summary");
        let summary: Value = serde_json::from_str(&text).expect("JSON");
        let count = |name: &str| summary["reference"][name].as_u64().expect("a count");
        (count("reused"), count("computed"))
    };
    let (reused, computed) = counts(&run);
    assert_eq!(reused, 0);
    assert!(computed > 500, "{computed}");

    // Another run on the same model and pairs, with another objective.
    let store = format!("reference.store={}", run.folder().join("store").display());
    let other = Run::new(&SMALL.replace("cal_dpo", "dpo"))
        .set("train.steps=2")
        .set(&store);
    other.complete();
    assert_eq!(counts(&other), (computed, 0));
}
