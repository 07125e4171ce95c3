//! Faults that leave processes alive: a clock that jumps, a full disk, a slow link. Nobody may be lost for them, and no bit.

use std::time::Duration;

use serde_json::Value;
use tests::cluster::{Cluster, job};
use tests::faults::{Faults, SlowLink};
use tests::programs::{Run, Running, SMALL, assert_same_rows};

/// A run of two workers that must both be there.
fn run() -> Run {
    Run::new(SMALL)
        .set("train.steps=120")
        .set("evaluate.every_steps=60")
        .set("cluster.threads=1")
        .set("cluster.min_workers=2")
        .set("cluster.heartbeat_timeout_seconds=2")
}

fn kinds(run: &Run) -> Vec<String> {
    let events = run.rows("events.jsonl");
    let kinds = events
        .iter()
        .map(|it| it["kind"].as_str().map(str::to_owned));
    kinds.flatten().collect()
}

/// It ends as a run without faults, and nobody was lost on the way.
fn completes_like(plain: &Run, run: &Run, running: &mut Running) {
    let status = running.wait();
    assert!(status.success(), "{status}: {}", running.said());
    assert_same_rows("metrics.jsonl", &run.training(), &plain.training());
    assert!(run.exported() == plain.exported(), "the exports differ");
    let kinds = kinds(run);
    assert!(!kinds.iter().any(|it| it == "lost"), "{kinds:?}");
}

fn with(mut run: Run, faults: &Faults) -> Run {
    for (name, value) in faults.variables() {
        run = run.variable(name, &value);
    }
    run
}

#[test]
fn a_clock_of_the_day_that_jumps_forth_and_back_costs_nothing() {
    const JUMPS: [i64; 5] = [3_600, -7_200, 86_400, 1, -86_400 * 365];
    let plain = run();
    plain.complete();

    let run = run();
    let faults = Faults::new(run.folder(), "");
    let run = with(run, &faults);
    let mut running = run.start();
    for (index, jump) in (1..).zip(JUMPS) {
        running.wait_until("more steps", || run.metrics().len() >= 20 * index);
        faults.shift_clock(jump);
    }
    completes_like(&plain, &run, &mut running);
    for kind in ["rewind", "late"] {
        assert!(
            !kinds(&run).iter().any(|it| it == kind),
            "{kind}: {:?}",
            run.rows("events.jsonl")
        );
    }
    let times: Vec<Value> = run
        .rows("events.jsonl")
        .iter()
        .map(|it| it["time"].clone())
        .collect();
    let last = times.last().and_then(Value::as_str).expect("a time");
    let first = times[0].as_str().expect("a time");
    assert!(last < first, "the clock did jump: {times:?}");
}

#[test]
fn a_disk_that_is_full_at_the_end_costs_time_and_nothing_else() {
    let only_last = || {
        run()
            .set("train.steps=12")
            .set("checkpoint.every_steps=1000")
    };
    let plain = only_last();
    plain.complete();

    let run = only_last();
    let faults = Faults::new(run.folder(), "/checkpoints/step-");
    let run = with(run, &faults);
    let mut running = run.start();
    faults.fill_disk(true);
    running.wait_until("a failed save", || {
        kinds(&run).iter().any(|it| it == "unsaved")
    });
    faults.fill_disk(false);
    completes_like(&plain, &run, &mut running);
    assert_eq!(run.checkpoints(), [12]);
}

#[test]
fn a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else() {
    let plain = run();
    plain.complete();

    let run = run();
    let faults = Faults::new(run.folder(), "/checkpoints/");
    let run = with(run, &faults).set("checkpoint.failures_max=100");
    let mut running = run.start();
    running.wait_until("a checkpoint", || run.checkpoints().contains(&15));
    faults.fill_disk(true);
    running.wait_until("more steps", || run.metrics().len() >= 60);
    let newest = run.checkpoints().last().copied().expect("a checkpoint");
    assert!(newest < 40, "step {newest} was saved on a full disk");
    let verified = run.verify(newest);
    assert!(
        verified.status.success(),
        "what was there is whole: {verified:?}"
    );
    faults.fill_disk(false);
    completes_like(&plain, &run, &mut running);
    assert!(faults.failed_writes() > 0);
    let failures = run.rows("events.jsonl");
    let failures: Vec<_> = failures
        .iter()
        .filter(|it| it["kind"] == "unsaved")
        .collect();
    let text = failures.first().expect("a failed save")["text"].to_string();
    assert!(text.contains("No space left on device"), "{text}");
    assert!(text.contains("make room there"), "{text}");
    assert_eq!(run.checkpoints().last(), Some(&120));
}

#[test]
fn a_disk_that_stays_full_ends_the_job_at_its_limit_and_what_was_saved_goes_on() {
    let run = run();
    let faults = Faults::new(run.folder(), "/checkpoints/");
    let run = with(run, &faults).set("checkpoint.failures_max=3");
    let mut running = run.start();
    running.wait_until("a checkpoint", || run.checkpoints().contains(&15));
    faults.fill_disk(true);
    let status = running.wait();
    assert_eq!(status.code(), Some(1), "{}", running.said());
    assert!(
        running.said().contains("3 checkpoints in a row"),
        "{}",
        running.said()
    );
    assert!(
        running.said().contains("checkpoint.failures_max"),
        "{}",
        running.said()
    );
    let newest = run.checkpoints().last().copied().expect("a checkpoint");
    assert!(run.verify(newest).status.success());
    faults.fill_disk(false);
    run.complete();
    assert_eq!(run.metrics().len(), 120);
}

#[test]
fn a_worker_behind_a_slow_link_is_late_and_not_lost() {
    let mut cluster = Cluster::start();
    let more = "[train]\nsteps = 8\n[cluster]\nheartbeat_timeout_seconds = 2\nmin_workers = 2";
    let config = job("slow", cluster.folder(), more);
    cluster.worker("near");
    let target = cluster.url().trim_start_matches("http://").to_owned();
    // 0.6 s there and back, and less than a modem's rate.
    let link = SlowLink::to(&target, Duration::from_millis(300), 20_000);
    cluster.worker_at("far", &format!("http://{}", link.address()));
    let output = cluster.ask(&["submit", "--watch"], &config);
    assert!(output.status.success(), "{output:?}\n{}", cluster.said());
    let folder = cluster.folder().join("slow");
    let rows = std::fs::read_to_string(folder.join("metrics.jsonl")).expect("rows");
    let rows: Vec<Value> = rows
        .lines()
        .map(|it| serde_json::from_str(it).expect("JSON"))
        .collect();
    assert_eq!(rows.len(), 8);
    for row in &rows {
        assert_eq!(
            (&row["world_size"], &row["generation"]),
            (&rows[0]["world_size"], &rows[0]["generation"])
        );
        assert!(
            row["seconds"].as_f64() >= Some(0.5),
            "the link is not slow: {row}"
        );
    }
    let events = std::fs::read_to_string(folder.join("events.jsonl")).expect("events");
    assert!(!events.contains("\"kind\":\"lost\""), "{events}");
}
