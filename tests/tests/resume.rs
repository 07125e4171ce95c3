//! Invariant T3 through the real programs: whatever ends a run, the same command goes on to the same bits.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::programs::{Run, Running, SMALL, assert_same_rows, signal};
use tests::workspace_root;

/// Steps of [`SMALL`].
const STEPS: usize = 24;

/// What a run must end in: the rows of the uninterrupted run and its weights.
struct Expected {
    training: Vec<Value>,
    evaluations: Vec<Value>,
    samples: Vec<Value>,
    exported: Vec<u8>,
}

impl Expected {
    fn of(run: &Run) -> Self {
        run.complete();
        Self {
            training: run.training(),
            evaluations: run.rows("eval.jsonl"),
            samples: run.rows("samples.jsonl"),
            exported: run.exported(),
        }
    }

    fn check(&self, run: &Run) {
        // The step is part of a row: each is there exactly once.
        assert_same_rows("metrics.jsonl", &run.training(), &self.training);
        assert_same_rows("eval.jsonl", &run.rows("eval.jsonl"), &self.evaluations);
        assert_same_rows("samples.jsonl", &run.rows("samples.jsonl"), &self.samples);
        assert!(run.exported() == self.exported, "the exports differ");
    }
}

fn expected() -> &'static Expected {
    static EXPECTED: OnceLock<Expected> = OnceLock::new();
    EXPECTED.get_or_init(|| {
        let expected = Expected::of(&Run::new(SMALL));
        assert_eq!(expected.training.len(), STEPS);
        expected
    })
}

/// Whole lines of a file.
fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(str::to_owned).collect()
}

fn rows(run: &Run) -> Vec<String> {
    lines(&run.path("metrics.jsonl"))
}

/// Rows that the next start must keep byte for byte: their state is in a checkpoint. Later steps are computed again, which
/// takes another time.
fn rows_to_keep(run: &Run) -> Vec<String> {
    let mut rows = rows(run);
    rows.truncate(run.checkpoints().last().copied().unwrap_or(0));
    rows
}

/// Starts `run`, waits until `ready`, kills everything and runs it again to its end.
fn killed(what: &str, mut ready: impl FnMut(&Run) -> bool) {
    let run = Run::new(SMALL);
    let mut coordinator = run.start();
    coordinator.wait_until(what, || ready(&run));
    coordinator.kill_everything();
    let kept = rows_to_keep(&run);
    run.complete();
    assert_eq!(
        rows(&run)[..kept.len()],
        kept,
        "{what}: rows that were kept"
    );
    expected().check(&run);
}

#[test]
fn t3_a_run_killed_again_and_again_at_random_moments_ends_in_the_same_bits() {
    // Moments of their own on every run of the test; CALDPO_TEST_SEED repeats those of a seed.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let clock = now.expect("a clock").subsec_nanos();
    let given = std::env::var("CALDPO_TEST_SEED").ok();
    let seed = given.map_or(clock, |seed| seed.parse().expect("CALDPO_TEST_SEED"));
    println!("seed {seed}");
    let run = Run::new(SMALL);
    for first in [1, 8, 15] {
        let row = (first + seed % 7) as usize;
        let later = Duration::from_micros(u64::from(seed / 7 % 30_000));
        let mut coordinator = run.start();
        coordinator.wait_until("rows of metrics", || rows(&run).len() >= row);
        // Anywhere in a step, not only after its row.
        std::thread::sleep(later);
        coordinator.kill_everything();
        let kept = rows_to_keep(&run);
        println!(
            "killed {later:?} after row {row}, {} rows are kept",
            kept.len()
        );
        let mut again = run.start();
        again.wait_until("the rows after the kill", || rows(&run).len() > kept.len());
        again.kill_everything();
        assert_eq!(rows(&run)[..kept.len()], kept, "rows that were kept");
    }
    run.complete();
    expected().check(&run);
}

/// Takes minutes: `cargo test --release --workspace --test resume -- --ignored --nocapture two_hundred`. CALDPO_TEST_KILLS takes another
/// number.
#[test]
#[ignore = "takes minutes"]
fn t3_two_hundred_kills_at_any_moment_of_runs_that_save_every_step_end_in_the_same_bits() {
    let kills = std::env::var("CALDPO_TEST_KILLS").map_or(200, |it| it.parse().expect("a number"));
    let new = || {
        let run = Run::new(SMALL).set("train.steps=300");
        run.set("checkpoint.every_steps=1")
            .set("evaluate.every_steps=100")
    };
    let expected = Expected::of(&new());
    let (mut state, mut killed, mut saved, mut runs) = (0x5eed_u64, 0, 0, 0);
    while killed < kills {
        let run = new();
        runs += 1;
        let mut ended = false;
        while killed < kills && !ended {
            // A moment between the start of the programs and some dozens of steps.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let moment = Instant::now() + Duration::from_micros((state >> 33) % 2_500_000);
            let mut coordinator = run.start();
            while Instant::now() < moment && !ended {
                std::thread::sleep(Duration::from_micros(500));
                ended = coordinator.ended().is_some();
            }
            if ended {
                break;
            }
            coordinator.kill_everything();
            killed += 1;
            let kept = run.checkpoints().last().copied().unwrap_or(0);
            saved += usize::from(kept > 0);
            assert!(rows(&run).len() >= kept, "a checkpoint without its row");
        }
        run.complete();
        expected.check(&run);
    }
    println!("{killed} kills, {saved} of them with a checkpoint, in {runs} runs");
}

#[test]
fn t3_a_run_killed_while_a_checkpoint_is_written_ends_in_the_same_bits() {
    killed("a checkpoint being written", |run| {
        run.checkpoint(10).exists()
    });
}

#[test]
fn t3_a_run_killed_right_after_a_checkpoint_ends_in_the_same_bits() {
    killed("a second checkpoint", |run| run.checkpoints().contains(&10));
}

#[test]
fn t3_a_run_killed_after_its_last_step_still_ends_in_the_same_bits() {
    killed("the last row", |run| rows(run).len() == STEPS);
}

/// As many pairs as make a reference pass long enough to be hit: chosen and rejected letters of different prompts.
fn many_pairs() -> String {
    let source = workspace_root().join("configs/quickstart/train.jsonl");
    let text = fs::read_to_string(source).expect("pairs");
    let pairs: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let mut many = String::new();
    for shift in 0..4 {
        for (index, pair) in pairs.iter().enumerate() {
            let other = &pairs[(index + shift) % pairs.len()];
            let pair = json!({
                "prompt": pair["prompt"], "chosen": other["chosen"], "rejected": other["rejected"],
            });
            writeln!(many, "{pair}").expect("writing into a String does not fail");
        }
    }
    many
}

/// Reused and computed reference values of the last start.
fn reference_counts(run: &Run) -> [u64; 2] {
    let summary = run.summary();
    ["reused", "computed"].map(|name| summary["reference"][name].as_u64().expect("a count"))
}

#[test]
fn t3_an_interrupted_reference_pass_goes_on_where_it_was_and_ends_in_the_same_bits() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("pairs.jsonl");
    fs::write(&data, many_pairs()).expect("write pairs");
    let config = SMALL.replace(
        "configs/quickstart/train.jsonl",
        &data.display().to_string(),
    );
    let whole = Run::new(&config).set("train.steps=2");
    let expected = Expected::of(&whole);
    let [reused, total] = reference_counts(&whole);
    assert_eq!(reused, 0);

    let run = Run::new(&config).set("train.steps=2");
    let mut coordinator = run.start();
    coordinator.wait_until("stored reference values", || stored_bytes(&run) > 9000);
    coordinator.kill_everything();
    assert!(rows(&run).is_empty(), "training had begun");
    run.complete();
    let [reused, computed] = reference_counts(&run);
    println!("{reused} values were kept, {computed} computed");
    assert!(reused >= 250, "{reused} values were kept");
    assert!(computed > 0, "the pass was over when it was killed");
    assert_eq!(reused + computed, total);
    expected.check(&run);
}

/// Bytes of reference values that are on disk.
fn stored_bytes(run: &Run) -> u64 {
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let segments = entries(&run.folder().join("store")).flat_map(|scope| entries(&scope.path()));
    segments
        .filter(|file| file.path().extension().is_some_and(|it| it == "segment"))
        .map(|file| file.metadata().map_or(0, |it| it.len()))
        .sum()
}

#[test]
fn r1_another_run_on_the_same_model_and_pairs_computes_no_reference_value_again() {
    let run = Run::new(SMALL).set("train.steps=2");
    run.complete();
    let [reused, computed] = reference_counts(&run);
    assert_eq!(reused, 0);
    assert!(computed > 1000, "{computed}");
    let store = format!("reference.store={}", run.folder().join("store").display());
    let other = Run::new(&SMALL.replace("cal_dpo", "dpo"))
        .set("train.steps=2")
        .set(&store);
    other.complete();
    assert_eq!(reference_counts(&other), [computed, 0]);
    // Another truncation is another value, even where it cuts nothing.
    let longer = Run::new(&SMALL.replace("max_length = 128", "max_length = 127"))
        .set("train.steps=2")
        .set(&store);
    longer.complete();
    assert_eq!(reference_counts(&longer), [0, computed]);
}

#[test]
fn r1_a_run_with_a_store_of_its_own_finds_the_values_that_another_has_shared() {
    let folder = tempfile::tempdir().expect("a folder");
    let shared = format!("reference.shared={}", folder.path().display());
    let run = Run::new(SMALL).set("train.steps=2").set(&shared);
    run.complete();
    let [reused, computed] = reference_counts(&run);
    assert_eq!(reused, 0);
    let other = Run::new(SMALL).set("train.steps=2").set(&shared);
    other.complete();
    assert_eq!(reference_counts(&other), [computed, 0]);
    assert_same_rows("metrics.jsonl", &other.training(), &run.training());

    // What is shared is a help and not a need: damage is found, told and computed anew.
    let segments = fs::read_dir(folder.path()).expect("scopes").flatten();
    let segments =
        segments.flat_map(|scope| fs::read_dir(scope.path()).into_iter().flatten().flatten());
    let segments: Vec<_> = segments
        .map(|it| it.path())
        .filter(|path| path.extension().is_some_and(|it| it == "segment"))
        .collect();
    assert!(!segments.is_empty(), "nothing was sent");
    for path in &segments {
        let mut bytes = fs::read(path).expect("a segment");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(path, bytes).expect("a segment");
    }
    let third = Run::new(SMALL).set("train.steps=2").set(&shared);
    third.complete();
    assert_eq!(reference_counts(&third), [0, computed]);
    let logs = fs::read_dir(third.path("logs")).expect("logs").flatten();
    let said: String = logs
        .map(|it| fs::read_to_string(it.path()).unwrap_or_default())
        .collect();
    assert!(said.contains("reference.shared: "), "{said}");
    assert!(said.contains("remove it there"), "{said}");
}

/// Asks a run to stop after `steps` rows; it must leave with `code`, its last step saved, and go on to the same bits.
fn stopped(name: &str, code: i32) {
    let run = Run::new(SMALL);
    let mut coordinator = run.start();
    coordinator.wait_until("rows of metrics", || rows(&run).len() >= 6);
    coordinator.signal(name);
    let status = coordinator.wait();
    assert_eq!(status.code(), Some(code), "{}", coordinator.said());
    let before = rows(&run);
    assert!(before.len() < STEPS, "it was over when it was stopped");
    assert_eq!(
        run.checkpoints().last(),
        Some(&before.len()),
        "all is saved"
    );
    assert!(!run.path("export").exists(), "nothing is exported");
    run.complete();
    assert_eq!(rows(&run)[..before.len()], before, "earlier rows stay");
    expected().check(&run);
}

#[test]
fn t3_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_bits() {
    stopped("INT", 130);
}

#[test]
fn t3_sigterm_saves_and_the_same_command_goes_on_to_the_same_bits() {
    stopped("TERM", 143);
}

/// As supervisors and schedulers stop a job, and `pkill`.
#[test]
fn sigterm_to_the_coordinator_and_its_workers_at_once_loses_no_step() {
    let run = Run::new(SMALL).set("checkpoint.every_steps=0");
    let mut coordinator = run.start();
    coordinator.wait_until("rows of metrics", || rows(&run).len() >= 6);
    signal(&format!("-{}", coordinator.id()), "TERM");
    let status = coordinator.wait();
    assert_eq!(status.code(), Some(143), "{}", coordinator.said());
    let before = rows(&run);
    assert!((6..STEPS).contains(&before.len()), "{}", before.len());
    assert_eq!(run.checkpoints(), [before.len()], "{}", coordinator.said());
    run.complete();
    // Which step was under way when a worker left is another time another one, and so is the world that computes it.
    assert_eq!(rows(&run)[..before.len()], before, "earlier rows stay");
    assert_eq!(rows(&run).len(), STEPS);
}

/// Nothing is there to save, so that nobody is waited for: neither one that hangs nor one that has yet to join.
#[test]
fn sigterm_before_the_first_step_ends_a_run_within_seconds_whatever_its_workers_do() {
    let run = Run::new(SMALL);
    let mut coordinator = run.start();
    while coordinator.workers().len() < 2 {
        assert!(coordinator.ended().is_none(), "{}", coordinator.said());
        std::thread::sleep(Duration::from_millis(1));
    }
    let workers = coordinator.workers();
    for worker in &workers {
        signal(&worker.to_string(), "STOP");
    }
    let start = Instant::now();
    coordinator.signal("TERM");
    let status = coordinator.wait();
    assert_eq!(status.code(), Some(143), "{}", coordinator.said());
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}: {}",
        start.elapsed(),
        coordinator.said()
    );
    wait_for_the_end_of(&coordinator, &workers);
    run.complete();
    assert_eq!(rows(&run).len(), STEPS);
}

/// Also where log lines go to the terminal that is gone.
#[test]
fn a_closed_terminal_saves_and_loses_no_step() {
    for log in ["text", "json"] {
        let run = Run::new(SMALL).set("checkpoint.every_steps=0");
        let mut command = run.command();
        command.args(["--log", log]);
        let mut coordinator = run.start_on_pipes(command);
        coordinator.wait_until("rows of metrics", || rows(&run).len() >= 6);
        coordinator.hang_up();
        let status = coordinator.wait();
        assert_eq!(status.code(), Some(129), "--log {log}: {status}");
        let before = rows(&run);
        assert!((6..STEPS).contains(&before.len()), "{}", before.len());
        assert_eq!(run.checkpoints(), [before.len()], "--log {log}");
        assert_eq!(run.summary()["outcome"], "interrupted");
        run.complete();
        assert_eq!(rows(&run)[..before.len()], before, "earlier rows stay");
        expected().check(&run);
    }
}

#[test]
fn under_nohup_a_closed_terminal_changes_nothing() {
    let run = Run::new(SMALL);
    let command = run.command();
    let mut nohup = Command::new("nohup");
    nohup
        .arg(command.get_program())
        .args(command.get_args())
        .current_dir(workspace_root())
        .stdin(Stdio::null());
    let mut coordinator = run.start_as(nohup);
    coordinator.wait_until("rows of metrics", || rows(&run).len() >= 6);
    coordinator.hang_up();
    let status = coordinator.wait();
    assert_eq!(status.code(), Some(0), "{}", coordinator.said());
    expected().check(&run);
    let events = fs::read_to_string(run.path("events.jsonl")).expect("events");
    assert!(!events.contains("SIGHUP"), "{events}");
    assert!(!events.contains("\"lost\""), "{events}");
}

#[test]
fn t3_a_lost_worker_ends_the_job_with_its_rank_and_the_same_command_goes_on_to_the_same_bits() {
    for which in [0, 1] {
        // One loss is too much; by default it takes three of one step.
        let run = Run::new(SMALL).set("cluster.failures_max=1");
        let mut coordinator = run.start();
        coordinator.wait_until("rows of metrics", || rows(&run).len() >= 7);
        let workers = coordinator.workers();
        assert_eq!(workers.len(), 2);
        signal(&workers[which].to_string(), "KILL");
        let status = coordinator.wait();
        let said = coordinator.said();
        assert_eq!(status.code(), Some(75), "{said}");
        let reason = run.summary()["reason"]
            .as_str()
            .expect("a reason")
            .to_owned();
        assert!(
            reason.contains("rank 0") || reason.contains("rank 1"),
            "{reason}"
        );
        assert!(said.contains(&reason), "no `{reason}` in: {said}");
        wait_for_the_end_of(&coordinator, &workers);
        let kept = rows_to_keep(&run);
        run.complete();
        assert_eq!(rows(&run)[..kept.len()], kept, "rows that were kept");
        expected().check(&run);
    }
}

#[test]
fn t3_workers_follow_a_killed_coordinator_and_the_same_command_goes_on_at_once_to_the_same_bits() {
    let run = Run::new(SMALL);
    let mut coordinator = run.start();
    // In the middle of a checkpoint, so that what the old workers still write meets the new ones.
    coordinator.wait_until("a checkpoint being written", || run.checkpoint(10).exists());
    let workers = coordinator.workers();
    coordinator.signal("KILL");
    coordinator.wait();
    let kept = rows_to_keep(&run);
    run.complete();
    assert_eq!(rows(&run)[..kept.len()], kept, "rows that were kept");
    expected().check(&run);
    wait_for_the_end_of(&coordinator, &workers);
}

/// No worker outlives its coordinator.
fn wait_for_the_end_of(coordinator: &Running, workers: &[u32]) {
    let start = Instant::now();
    for worker in workers {
        // A process that nobody has waited for yet is over, too.
        let runs = || {
            let stat = fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
            let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
            state.is_some_and(|state| state != Some('Z'))
        };
        while runs() {
            let said = || coordinator.said();
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{worker} runs on: {}",
                said()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_finished_run_is_left_alone_by_the_same_command() {
    let run = Run::new(SMALL).set("train.steps=4");
    run.complete();
    let files = ["metrics.jsonl", "eval.jsonl", "events.jsonl", "journal.log"];
    let read = || files.map(|name| fs::read(run.path(name)).expect("a file of the run"));
    let (before, exported) = (read(), run.exported());
    run.complete();
    for ((name, before), after) in files.iter().zip(&before).zip(&read()) {
        assert!(before == after, "{name} changed");
    }
    assert!(run.exported() == exported, "the export changed");
}
