//! Workers that are killed, stopped and cut off in the middle of a run: the others go on, whoever lives or is started again
//! comes back, and no committed step is lost or made twice (invariants M3, M4).

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tests::programs::{Run, Running, SMALL, signal};
use tests::replay::replay;
use tests::workspace_root;

/// Long enough for faults to find it anywhere, at some 20 ms a step.
const STEPS: u64 = 400;

/// Between two looks at the rows.
const PAUSE: Duration = Duration::from_millis(5);

/// A run on two workers; silence of a second counts.
fn run() -> Run {
    Run::new(SMALL)
        .set(&format!("train.steps={STEPS}"))
        .set("evaluate.every_steps=100")
        .set("checkpoint.every_steps=50")
        .set("cluster.heartbeat_timeout_seconds=1")
        .set("cluster.threads=1")
}

/// Rows of the same run when nothing happens to it.
fn without_faults() -> Vec<Value> {
    let run = run();
    run.complete();
    run.metrics()
}

fn number(row: &Value, name: &str) -> f64 {
    row[name]
        .as_f64()
        .unwrap_or_else(|| panic!("{name}: {row}"))
}

fn wait_for_step(run: &Run, running: &mut Running, step: u64) {
    running.wait_until(&format!("step {step}"), || {
        std::thread::sleep(PAUSE);
        run.metrics().len() as u64 >= step
    });
}

/// The generation of the last commit.
fn generation(run: &Run) -> u64 {
    let rows = run.metrics();
    let last = rows.last().map(|row| row["generation"].as_u64());
    last.map_or(0, |it| it.expect("a generation"))
}

/// Waits until a generation after `before` of `world` members has committed steps.
fn wait_for_world(run: &Run, running: &mut Running, world: u64, before: u64) {
    running.wait_until(&format!("a world of {world}"), || {
        std::thread::sleep(PAUSE);
        let rows = run.metrics();
        let last = rows.last().filter(|row| row["world_size"] == world);
        last.is_some_and(|row| row["generation"].as_u64() > Some(before))
    });
}

/// One row a step with the data of the fault-free run, generations that rise, and losses that differ from that run's by no more
/// than other worlds add up otherwise (invariants M3, T2).
fn audit(run: &Run, whole: &[Value]) {
    let rows = run.metrics();
    assert_eq!(rows.len() as u64, STEPS);
    for (index, (row, expected)) in rows.iter().zip(whole).enumerate() {
        assert_eq!(row["step"], index as u64 + 1);
        for data in ["epoch", "tokens", "pairs", "learning_rate"] {
            assert_eq!(row[data], expected[data], "{data} of {row}");
        }
        let (found, wanted) = (number(row, "loss"), number(expected, "loss"));
        // Rounding grows from step to step; the bits of all of them are another test's.
        assert!(
            index > 60 || (found - wanted).abs() <= 1e-3 * wanted.abs(),
            "loss {found} instead of {wanted} in step {}",
            index + 1
        );
    }
    let generations: Vec<u64> = rows
        .iter()
        .map(|row| row["generation"].as_u64().expect("a generation"))
        .collect();
    assert!(generations.is_sorted(), "{generations:?}");
}

fn events(run: &Run, kind: &str) -> Vec<Value> {
    let mut events = run.rows("events.jsonl");
    events.retain(|event| event["kind"] == kind);
    events
}

const DAY_MS: u64 = 86_400_000;

/// The time of day of an event.
fn milliseconds(event: &Value) -> u64 {
    let time = event["time"].as_str().expect("a time");
    let (_, clock) = time.trim_end_matches('Z').split_once('T').expect("a time");
    let parts: Vec<f64> = clock
        .split(':')
        .map(|part| part.parse().expect("a number"))
        .collect();
    ((parts[0] * 3600.0 + parts[1] * 60.0 + parts[2]) * 1000.0) as u64
}

/// From every loss to the next generation's first step.
fn recoveries_ms(run: &Run) -> Vec<u64> {
    let events = run.rows("events.jsonl");
    let lost = events
        .iter()
        .enumerate()
        .filter(|it| it.1["kind"] == "lost");
    lost.map(|(index, lost)| {
        let next = events[index..].iter().find(|it| it["kind"] == "go");
        let next = milliseconds(next.expect("a next generation"));
        (next + DAY_MS - milliseconds(lost)) % DAY_MS
    })
    .collect()
}

#[test]
fn m4_killed_workers_are_left_behind_at_once_and_replaced() {
    let whole = without_faults();
    let run = run();
    let mut running = run.start();
    wait_for_step(&run, &mut running, 20);
    for _ in 0..3 {
        let victim = *running.workers().first().expect("a worker");
        let before = generation(&run);
        signal(&victim.to_string(), "KILL");
        // The launcher starts another, which takes weights and its shard from the one that is left.
        wait_for_world(&run, &mut running, 2, before);
    }
    let status = running.wait();
    assert!(status.success(), "{status}: {}", running.said());
    audit(&run, &whole);
    assert!(events(&run, "rewind").is_empty(), "a step was lost");
    let took = recoveries_ms(&run);
    assert!(took.len() >= 3, "{took:?}");
    assert!(took.iter().all(|it| *it <= 3000), "{took:?} ms");
}

/// Wakes a stopped worker, whose process trains again, and waits for the end of the run.
fn wake(run: &Run, mut running: Running, sleeper: u32) {
    let before = generation(run);
    signal(&sleeper.to_string(), "CONT");
    wait_for_world(run, &mut running, 2, before);
    assert!(running.workers().contains(&sleeper));
    let status = running.wait();
    assert!(status.success(), "{status}: {}", running.said());
}

#[test]
fn m4_a_worker_that_slept_past_the_limit_is_left_behind_and_comes_back() {
    let whole = without_faults();
    let run = run();
    let mut running = run.start();
    wait_for_step(&run, &mut running, 20);
    let sleeper = *running.workers().first().expect("a worker");
    let before = generation(&run);
    signal(&sleeper.to_string(), "STOP");
    wait_for_world(&run, &mut running, 1, before);
    wake(&run, running, sleeper);
    audit(&run, &whole);
    assert!(events(&run, "rewind").is_empty(), "a step was lost");
}

/// Put out while it loads, it comes back as one that has nothing, and loads before it is taken in.
#[test]
fn m4_so_does_one_that_slept_before_it_had_loaded() {
    let run = run();
    let mut running = run.start();
    running.wait_until("a generation", || {
        std::thread::sleep(Duration::from_millis(1));
        !events(&run, "form").is_empty()
    });
    let sleeper = *running.workers().first().expect("a worker");
    signal(&sleeper.to_string(), "STOP");
    wait_for_world(&run, &mut running, 1, 0);
    wake(&run, running, sleeper);
    assert_eq!(run.metrics().len() as u64, STEPS);
}

#[test]
fn m4_with_all_workers_killed_at_once_the_run_goes_back_to_its_last_checkpoint() {
    let whole = without_faults();
    let run = run();
    let mut running = run.start();
    wait_for_step(&run, &mut running, 60);
    for worker in running.workers() {
        signal(&worker.to_string(), "KILL");
    }
    let status = running.wait();
    assert!(status.success(), "{status}: {}", running.said());
    audit(&run, &whole);
    let rewinds = events(&run, "rewind");
    assert_eq!(rewinds.len(), 1, "{rewinds:?}");
    let text = rewinds[0]["text"].as_str().expect("a sentence");
    assert!(text.contains("no worker is left that holds"), "{text}");
}

/// Without mirrors a shard is lost with its worker: the run goes back to the checkpoint, without anybody's help.
#[test]
fn without_mirrors_a_lost_worker_takes_the_run_back_to_its_last_checkpoint() {
    let run = run().set("cluster.mirror=false");
    let mut running = run.start();
    wait_for_step(&run, &mut running, 70);
    let victim = *running.workers().first().expect("a worker");
    signal(&victim.to_string(), "KILL");
    let status = running.wait();
    assert!(status.success(), "{status}: {}", running.said());
    assert_eq!(events(&run, "rewind").len(), 1);
    assert_eq!(run.metrics().len() as u64, STEPS);
}

/// Before there is a checkpoint that is the beginning, whose weights those who are left do not have any more.
#[test]
fn without_mirrors_and_checkpoints_a_lost_worker_takes_the_run_back_to_its_beginning() {
    let run = run()
        .set("cluster.mirror=false")
        .set("checkpoint.every_steps=0");
    let mut running = run.start();
    wait_for_step(&run, &mut running, 20);
    let victim = *running.workers().first().expect("a worker");
    signal(&victim.to_string(), "KILL");
    let status = running.wait();
    assert!(status.success(), "{status}: {}", running.said());
    assert_eq!(events(&run, "rewind").len(), 1);
    std::env::set_current_dir(workspace_root()).expect("a folder");
    replay(&run.path("")).unwrap_or_else(|error| panic!("{error}"));
}

/// What dies at the same step for the same reason again and again is not started for ever.
#[test]
fn a_worker_that_dies_again_and_again_ends_the_attempt_and_is_told_of() {
    let run = run().set("cluster.workers=1").set("train.steps=100000");
    let mut running = run.start();
    // Nobody else has its state: the run goes back to this, and no further.
    running.wait_until("a checkpoint", || run.checkpoints().contains(&50));
    // As soon as one is there it is killed, so that no step commits in between.
    let start = std::time::Instant::now();
    let mut killed = 0;
    let status = loop {
        for worker in running.workers() {
            // It may be gone already.
            let mut kill = Command::new("kill");
            let kill = kill.args(["-s", "KILL", &worker.to_string()]).output();
            killed += u32::from(kill.expect("kill runs").status.success());
        }
        if let Some(status) = running.ended() {
            break status;
        }
        assert!(
            start.elapsed() < Duration::from_mins(1),
            "it goes on for ever"
        );
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(status.code(), Some(75), "{}", running.said());
    assert!(killed >= 3, "{killed} were killed");
    assert!(running.said().contains("its log is"), "{}", running.said());
    assert!(run.metrics().len() >= 50, "rows are gone");
}

/// A run's rows tell its schedule of worlds, and that its bits.
#[test]
fn t4_a_run_that_lost_workers_is_bit_for_bit_a_run_of_its_schedule() {
    is_a_run_of_its_schedule(&run(), 2);
}

#[test]
fn t4_so_is_one_whose_workers_share_out_masters_and_gradients() {
    let run = run().set("model.dtype=bf16").set("cluster.zero=2");
    is_a_run_of_its_schedule(&run.set("cluster.workers=3"), 3);
}

fn is_a_run_of_its_schedule(run: &Run, workers: u64) {
    let mut running = run.start();
    wait_for_step(run, &mut running, 20);
    for _ in 0..2 {
        let victim = *running.workers().last().expect("a worker");
        let before = generation(run);
        signal(&victim.to_string(), "KILL");
        wait_for_world(run, &mut running, workers, before);
    }
    assert!(running.wait().success(), "{}", running.said());
    // Paths of the configuration are the run's.
    std::env::set_current_dir(workspace_root()).expect("a folder");
    let stretches = replay(&run.path("")).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(stretches.last().map(|it| it.last), Some(STEPS));
    assert!(generation(run) >= 3);
}
