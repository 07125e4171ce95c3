//! Journals of any records in frames that hold: refused by file and record, or read as a run that holds together. Never a panic.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../storage/tests/fuzz/mod.rs"]
mod fuzz;

use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
};

use coordinator::{
    config::{Config, Sources},
    monitor::Monitor,
    plots::{RewardPlot, draw},
    run_directory::{Opened, RunDirectory, RunDirectoryError},
};
use fuzz::{Edit, edited, edits, fuzz};
use proptest::{collection::vec, prelude::*, sample::Index, test_runner::TestCaseError};
use protocol::{
    Best, CommitRecord, EarlyStop, Elastic, Entry, EvaluationRow, Event, Fence, Generation,
    Incarnation, Job, JobId, JobPolicy, JobSpec, MetricsRow, Phases, Record, Recovery,
    RecoveryError, RunFacts, Statistics, Step, StepReport, recover, recover_living,
};
use serde_json::json;
use storage::log::Log;

fn open(path: &Path) -> Result<Opened, RunDirectoryError> {
    RunDirectory::open(path, &json!({"job": {"seed": 7}}), "# resolved\n")
}

fn commit(step: u64, generation: u64) -> Record {
    let row = MetricsRow {
        report: StepReport {
            step,
            finite: step != 2,
            statistics: Statistics {
                loss: f64::NAN,
                log_ratios_chosen: 0.5 * step as f64,
                log_ratios_rejected: -0.25,
                ..Statistics::default()
            },
            grad_norm: 1.5,
            pairs: 8,
            ..StepReport::default()
        },
        tokens_per_second: 900.0,
        world_size: 2,
        generation,
        seconds: 0.25,
        phases: Phases::default(),
        gpu: protocol::GpuFigures::default(),
    };
    Record::Commit(CommitRecord {
        apply: step != 2,
        row,
    })
}

fn formed(generation: u64, members: &[u64]) -> Record {
    Record::Generation {
        generation: Generation(generation),
        members: members.iter().map(|it| Incarnation(*it)).collect(),
    }
}

fn evaluated(step: u64, stop: Option<EarlyStop>) -> Record {
    let row = EvaluationRow {
        step,
        pairs: 3,
        ..EvaluationRow::default()
    };
    Record::Evaluation { row, stop }
}

/// A journal in which everything happens that can.
fn whole() -> Vec<Vec<u8>> {
    let stop = EarlyStop {
        step: 4,
        metric: "eval/loss".into(),
        higher_is_better: false,
        value: 0.5,
        improved: Some(Best {
            step: 2,
            value: 0.25,
        }),
        evaluations: 1,
        min_delta: 0.0,
    };
    let facts = RunFacts {
        steps_total: 9,
        pairs: 100,
        model_digest: "aa".into(),
        ..RunFacts::default()
    };
    let rewind = Record::Rewind {
        to: Step(2),
        reason: "a shard had no living copy".into(),
    };
    let lives: [(u64, Vec<Record>); 2] = [
        (
            1,
            vec![
                Record::Opened,
                Record::Anew,
                formed(1, &[11, 12]),
                Record::Facts { facts },
                evaluated(0, None),
                commit(1, 1),
                commit(2, 1),
                evaluated(2, None),
                Record::Checkpoint { step: Step(2) },
                commit(3, 1),
            ],
        ),
        (
            2,
            vec![
                Record::Opened,
                rewind,
                formed(3, &[12, 13]),
                commit(3, 3),
                commit(4, 3),
                evaluated(4, Some(stop)),
                commit(5, 3),
                Record::Checkpoint { step: Step(5) },
                Record::Completed { step: Step(5) },
            ],
        ),
    ];
    let entries = lives.into_iter().flat_map(|(fence, records)| {
        let entry = move |record| Entry {
            fence: Fence(fence),
            record,
        };
        records.into_iter().map(entry)
    });
    entries.map(|it| serde_json::to_vec(&it).unwrap()).collect()
}

/// A change to a journal.
#[derive(Clone, Debug)]
enum Change {
    /// A record says something else.
    Edit(Index, Vec<Edit>),
    Remove(Index),
    /// A record comes again elsewhere.
    Repeat(Index, Index),
    Swap(Index, Index),
    Cut(Index),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let place = any::<Index>;
    let change = prop_oneof![
        6 => (place(), edits()).prop_map(|(at, edits)| Change::Edit(at, edits)),
        1 => place().prop_map(Change::Remove),
        1 => (place(), place()).prop_map(|(from, to)| Change::Repeat(from, to)),
        1 => (place(), place()).prop_map(|(a, b)| Change::Swap(a, b)),
        1 => place().prop_map(Change::Cut),
    ];
    vec(change, 1..5)
}

fn changed(mut records: Vec<Vec<u8>>, changes: &[Change]) -> Vec<Vec<u8>> {
    for change in changes {
        let count = records.len();
        if count == 0 {
            break;
        }
        match change {
            Change::Edit(at, edits) => {
                let record = &mut records[at.index(count)];
                *record = edited(record, edits);
            }
            Change::Remove(at) => drop(records.remove(at.index(count))),
            Change::Repeat(from, to) => {
                let record = records[from.index(count)].clone();
                records.insert(to.index(count + 1), record);
            }
            Change::Swap(a, b) => records.swap(a.index(count), b.index(count)),
            Change::Cut(at) => records.truncate(at.index(count)),
        }
    }
    records
}

fn write(path: &Path, records: &[Vec<u8>]) {
    for name in ["journal.log", "metrics.jsonl", "eval.jsonl", "events.jsonl"] {
        let _ = fs::remove_file(path.join(name));
    }
    let mut log = Log::open(&path.join("journal.log")).unwrap().log;
    for record in records {
        log.append(record).unwrap();
    }
}

fn policy() -> JobPolicy {
    JobPolicy {
        world: 2,
        save_every: None,
        evaluate_every: None,
        selection: None,
        heartbeat_timeout_ms: 5_000,
        join_timeout_ms: 60_000,
        form_timeout_ms: 30_000,
        step_timeout_ms: 40_000,
        save_timeout_ms: 50_000,
        skipped_steps_max: 3,
        failed_saves_max: 3,
        elastic: Elastic {
            workers_min: 1,
            workers_max: 3,
            abort_timeout_ms: 8_000,
            collective_timeout_ms: 10_000,
            job_timeout_ms: 300_000,
            hang_factor: 5.0,
            slow_factor: 2.0,
            mirror: true,
            shard_gradients: false,
            offload: false,
            failures_max: u32::MAX,
        },
    }
}

/// What a coordinator goes on from holds together, and a job begins with it.
fn check_recovery(recovery: Recovery, committed: u64, fence: Fence) -> Result<(), TestCaseError> {
    prop_assert!(recovery.committed.0 <= committed);
    prop_assert!(recovery.checkpoint <= recovery.highest_committed);
    prop_assert!(recovery.highest_committed.0 >= committed);
    prop_assert!(recovery.skipped <= recovery.committed.0);
    let steps: Vec<u64> = recovery.evaluations.iter().map(|row| row.step).collect();
    prop_assert!(steps.is_sorted_by(|a, b| a < b), "{steps:?}");
    prop_assert!(steps.iter().all(|step| *step <= recovery.committed.0));
    if let Some(stop) = &recovery.early_stop {
        prop_assert!(stop.step <= recovery.committed.0);
    }
    if let Some(Record::Rewind { to, .. }) = &recovery.rewind {
        prop_assert_eq!(*to, recovery.committed);
    }
    let (highest, completed) = (recovery.generation, recovery.completed);
    prop_assert!(recovery.spoke.values().all(|spoken| *spoken <= highest));
    let spec = JobSpec {
        id: JobId("run".into()),
        policy: policy(),
        build: "build".into(),
        config_toml: "[job]".into(),
        checkpoint_dir: "checkpoints".into(),
        probe: ".probe".into(),
        secret: [7; 32],
        fence,
        resume: None,
        recovery,
    };
    let (mut job, _) = Job::new(spec, 0);
    prop_assert!(job.generation() > highest);
    prop_assert_eq!(job.outcome().is_some(), completed);
    job.handle(60_001, Event::Tick);
    Ok(())
}

/// Every record that is at fault is named, or else its step.
fn names(error: &RunDirectoryError, journal: &Path) -> bool {
    let text = error.to_string();
    text.contains(&*journal.to_string_lossy()) && text.contains("record ")
}

struct Fuzzed {
    path: PathBuf,
    monitor: Config,
    drawn: Cell<u32>,
    sound: Cell<u32>,
}

impl Fuzzed {
    fn check(&self, records: &[Vec<u8>]) -> Result<(), TestCaseError> {
        let journal = self.path.join("journal.log");
        write(&self.path, records);
        let before = fs::read(&journal).unwrap();
        let opened = match open(&self.path) {
            Ok(opened) => opened,
            Err(error) => {
                prop_assert!(names(&error, &journal), "{error}");
                prop_assert_eq!(fs::read(&journal).unwrap(), before, "it was changed");
                return Ok(());
            }
        };
        self.sound.set(self.sound.get() + 1);
        let Opened {
            mut directory,
            records: found,
            ..
        } = opened;
        let steps: Vec<u64> = directory
            .metrics()
            .iter()
            .map(|it| it.report.step)
            .collect();
        let committed = steps.len() as u64;
        prop_assert_eq!(&steps, &(1..=committed).collect::<Vec<_>>());
        self.look(&directory, committed);
        let fence = directory.take_over().unwrap();
        for checkpoint in [None, Some(Step(committed / 2)), Some(Step(committed))] {
            for recover in [recover, recover_living] {
                check_recovery(recover(&found, checkpoint).unwrap(), committed, fence)?;
            }
        }
        let ahead = recover(&found, Some(Step(committed + 1)));
        let is_ahead = matches!(ahead, Err(RecoveryError::CheckpointAhead { .. }));
        prop_assert!(is_ahead, "{ahead:?}");
        // It is gone on with, and read again.
        let generation = formed(1 << 40, &[1]);
        directory.journal(&generation).unwrap();
        drop(directory);
        let mut again = open(&self.path).unwrap();
        prop_assert_eq!(
            format!("{:?}", again.records.last()),
            format!("{:?}", Some(&generation))
        );
        prop_assert_eq!(again.records.len(), found.len() + 1);
        prop_assert!(again.directory.take_over().unwrap() > fence);
        Ok(())
    }

    /// Who shows the rows to people.
    fn look(&self, directory: &RunDirectory, committed: u64) {
        let (metrics, evaluations) = (directory.metrics(), directory.evaluations());
        let said = Monitor::new(&self.monitor).replay(metrics, evaluations, committed);
        // Drawing takes longer than all the rest.
        self.drawn.set(self.drawn.get() + 1);
        if self.drawn.get().is_multiple_of(100) {
            let plot = RewardPlot {
                title: &format!("{} warnings", said.len()),
                metrics,
                evaluations,
                targets: None,
            };
            draw(&plot).unwrap();
        }
    }
}

#[test]
fn a_journal_of_any_records_is_refused_by_name_or_read_as_a_run_that_holds_together() {
    let directory = tempfile::tempdir_in(scratch()).unwrap();
    let sources = Sources {
        set: ["model.path=m", "data.train=['train.jsonl']"]
            .map(Into::into)
            .to_vec(),
        ..Sources::default()
    };
    let fuzzed = Fuzzed {
        path: directory.path().join("run"),
        monitor: Config::load(&sources).unwrap(),
        drawn: Cell::new(0),
        sound: Cell::new(0),
    };
    drop(open(&fuzzed.path).unwrap());
    let whole = whole();
    fuzzed.check(&whole).unwrap();
    assert_eq!(fuzzed.sound.get(), 1);
    // Numbers at the ends of their types, one at a time, in every record and place.
    for index in 0..whole.len() {
        for record in with_other_numbers(&whole[index]) {
            let mut records = whole.clone();
            records[index] = record;
            fuzzed.check(&records).unwrap();
        }
    }
    fuzz("journal", 3000, &changes(), |changes| {
        fuzzed.check(&changed(whole.clone(), &changes))
    });
    let sound = fuzzed.sound.get();
    assert!(sound > 300, "only {sound} were read");
}

/// The record with each of its numbers replaced by ones that it should not be.
fn with_other_numbers(record: &[u8]) -> Vec<Vec<u8>> {
    let text = std::str::from_utf8(record).unwrap();
    let digit = |at: usize| record.get(at).is_some_and(u8::is_ascii_digit);
    let mut all = Vec::new();
    for start in (0..record.len()).filter(|at| digit(*at) && !digit(at.wrapping_sub(1))) {
        let end = (start..=record.len()).find(|at| !digit(*at)).unwrap();
        for number in [
            "0",
            "10",
            "9223372036854775807",
            "9223372036854775808",
            "18446744073709551615",
            "1e300",
            "-1",
        ] {
            let (before, after) = (&text[..start], &text[end..]);
            all.push(format!("{before}{number}{after}").into_bytes());
        }
    }
    all
}

/// A directory in memory where there is one: this test waits for no disk.
fn scratch() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        return memory.to_owned();
    }
    std::env::temp_dir()
}
