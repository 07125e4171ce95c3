//! What a run directory keeps, goes on from, and refuses.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, path::Path, time::UNIX_EPOCH};

use coordinator::{
    monitor::Warning,
    run_directory::{Opened, RunDirectory, RunDirectoryError},
};
use protocol::{
    CommitRecord, EarlyStop, Entry, EvaluationRow, Fence, Generation, Incarnation, MetricsRow,
    Note, Phases, Record, RunFacts, Sample, Statistics, Step, StepReport,
};
use serde_json::{Value, json};
use storage::log::Log;
use tempfile::TempDir;

fn identity() -> Value {
    json!({"job": {"seed": 7}, "objective": {"kind": "cal_dpo", "beta": 0.1}, "data": {"train": ["a"]}})
}

fn row(step: u64) -> MetricsRow {
    MetricsRow {
        report: StepReport {
            step,
            finite: true,
            statistics: Statistics {
                loss: 1.0 / 3.0 + step as f64,
                log_ratios_chosen: f64::NAN,
                ..Statistics::default()
            },
            grad_norm: 0.1 + 0.2,
            ..StepReport::default()
        },
        tokens_per_second: 900.0,
        world_size: 2,
        generation: 1,
        seconds: 0.25,
        gpu: protocol::GpuFigures::default(),
        phases: Phases {
            forward: 0.125 * step as f64,
            ..Phases::default()
        },
    }
}

fn evaluation(step: u64) -> EvaluationRow {
    EvaluationRow {
        step,
        pairs: 3,
        ..EvaluationRow::default()
    }
}

fn sample() -> Vec<Sample> {
    vec![Sample {
        prompt: "once".into(),
        text: "upon a time".into(),
    }]
}

fn open(path: &Path) -> Result<Opened, RunDirectoryError> {
    RunDirectory::open(path, &identity(), "# resolved\n")
}

fn commit(directory: &mut RunDirectory, step: u64) {
    let row = row(step);
    let record = Record::Commit(CommitRecord { apply: true, row });
    directory.journal(&record).unwrap();
    directory.record_step(row).unwrap();
}

/// A run of `steps` steps with evaluations at 0, 2, 4, ….
fn run(steps: u64) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut directory = open(folder.path()).unwrap().directory;
    let members = vec![Incarnation(1), Incarnation(2)];
    let generation = Generation(1);
    directory
        .journal(&Record::Generation {
            generation,
            members,
        })
        .unwrap();
    for step in 0..=steps {
        if step > 0 {
            commit(&mut directory, step);
        }
        if step % 2 == 0 {
            directory
                .record_evaluation(evaluation(step), &sample())
                .unwrap();
        }
    }
    folder
}

fn read(folder: &TempDir, name: &str) -> String {
    fs::read_to_string(folder.path().join(name)).unwrap()
}

fn check_refused(opened: Result<Opened, RunDirectoryError>, parts: &[&str]) {
    let error = opened.err().expect("the directory is refused").to_string();
    for part in parts {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
}

#[test]
fn a_new_directory_is_made_with_its_parents() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs/first");
    let opened = open(&path).unwrap();
    assert!(opened.records.is_empty());
    assert_eq!(
        fs::read_to_string(path.join("config.toml")).unwrap(),
        "# resolved\n"
    );
    let run: Value =
        serde_json::from_str(&fs::read_to_string(path.join("run.json")).unwrap()).unwrap();
    assert_eq!(run["identity"], identity());
}

/// The same JSON as it was before rows had phases.
fn without_phases(json: &str) -> String {
    let mut value: Value = serde_json::from_str(json).unwrap();
    let row = if value.get("row").is_some() {
        &mut value["row"]
    } else {
        &mut value
    };
    if let Some(row) = row.as_object_mut() {
        row.retain(|name, _| !name.starts_with("seconds/"));
    }
    value.to_string()
}

#[test]
fn a_run_from_before_rows_had_phases_goes_on_and_its_rows_stay_byte_for_byte() {
    let folder = run(2);
    let journal = folder.path().join("journal.log");
    let records = Log::open(&journal).unwrap().records;
    fs::remove_file(&journal).unwrap();
    let mut log = Log::open(&journal).unwrap().log;
    for record in records {
        let old = without_phases(std::str::from_utf8(&record).unwrap());
        log.append(old.as_bytes()).unwrap();
    }
    drop(log);
    let rows = read(&folder, "metrics.jsonl");
    let old: Vec<_> = rows.lines().map(without_phases).collect();
    let old = old.join("\n") + "\n";
    assert!(rows.contains("seconds/forward") && !old.contains("seconds/"));
    fs::write(folder.path().join("metrics.jsonl"), &old).unwrap();

    let mut directory = open(folder.path()).unwrap().directory;
    assert_eq!(directory.metrics()[1].phases, Phases::default());
    assert_eq!(read(&folder, "metrics.jsonl"), old);
    commit(&mut directory, 3);
    let now = read(&folder, "metrics.jsonl");
    let last = now.strip_prefix(&old).unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["seconds/forward"], 0.375);
    assert_eq!(last["seconds/wait"], 0.0);
}

#[test]
fn a_row_has_its_metric_names_and_its_floats_round_trip() {
    let folder = run(1);
    let line: Value =
        serde_json::from_str(read(&folder, "metrics.jsonl").lines().next().unwrap()).unwrap();
    assert_eq!(line["loss"].as_f64(), Some(1.0 / 3.0 + 1.0));
    assert_eq!(line["grad_norm"].as_f64(), Some(0.1 + 0.2));
    assert_eq!(line["log_ratios/chosen"], Value::Null);
    assert_eq!(line["step"], 1);
}

#[test]
fn the_same_run_goes_on_where_it_was() {
    let folder = run(3);
    let before = read(&folder, "metrics.jsonl");
    let mut opened = open(folder.path()).unwrap();
    assert_eq!(opened.records.len(), 4);
    assert_eq!(opened.directory.metrics().len(), 3);
    assert_eq!(opened.directory.evaluations().len(), 2);
    assert_eq!(opened.directory.samples()[0].samples, sample());
    commit(&mut opened.directory, 4);
    let after = read(&folder, "metrics.jsonl");
    assert!(after.starts_with(&before));
    assert_eq!(after.lines().count(), 4);
}

#[test]
fn two_coordinators_cannot_hold_one_directory() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path()).unwrap();
    check_refused(
        open(folder.path()),
        &["held by process", &std::process::id().to_string()],
    );
    drop(first);
    open(folder.path()).unwrap();
}

#[test]
fn a_run_that_committed_no_step_gives_its_place_to_another_and_one_that_did_never_again() {
    let folder = run(0);
    let path = folder.path();
    let mut opened = open(path).unwrap();
    let id = opened.directory.id().to_owned();
    assert_eq!(id.len(), 32);
    let facts = RunFacts::default();
    opened.directory.agree(&facts).unwrap();
    opened.directory.journal(&Record::Facts { facts }).unwrap();
    let note = Note {
        kind: "done",
        text: "failed: no such file".into(),
    };
    opened.directory.event(UNIX_EPOCH, &note).unwrap();
    fs::write(path.join("trackers.json"), "{}").unwrap();
    fs::create_dir(path.join("tensorboard")).unwrap();
    fs::write(path.join("tensorboard/events.out"), "of another id").unwrap();
    drop(opened);

    let other = json!({"job": {"seed": 7}, "objective": {"kind": "cal_dpo", "beta": 0.2}, "data": {"train": ["b"]}});
    let open_other = || RunDirectory::open(path, &other, "# other\n");
    let mut opened = open_other().unwrap();
    assert_eq!(opened.replaced.len(), 2, "{:?}", opened.replaced);
    assert_eq!(opened.records.last(), Some(&Record::Anew));
    assert_eq!(opened.directory.id(), id, "its claims stay its own");
    assert!(opened.directory.evaluations().is_empty() && opened.directory.samples().is_empty());
    assert_eq!(read(&folder, "events.jsonl"), "");
    for gone in ["trackers.json", "tensorboard"] {
        assert!(!path.join(gone).exists(), "{gone}");
    }
    assert_eq!(read(&folder, "config.toml"), "# other\n");
    let run: Value = serde_json::from_str(&read(&folder, "run.json")).unwrap();
    assert_eq!((&run["identity"], &run["facts"]), (&other, &Value::Null));

    commit(&mut opened.directory, 1);
    drop(opened);
    check_refused(open(path), &["objective.beta is 0.2 there, 0.1 here"]);
    // Nor when the step was rewound: there may be checkpoints and plots of it.
    let mut opened = open_other().unwrap();
    assert_eq!(opened.replaced, []);
    let rewind = Record::Rewind {
        to: Step(0),
        reason: "why".into(),
    };
    opened.directory.journal(&rewind).unwrap();
    drop(opened);
    check_refused(open(path), &["data.train"]);
}

#[test]
fn a_run_without_an_id_is_given_one_that_stays() {
    let folder = run(1);
    let path = folder.path().join("run.json");
    let mut run: Value = serde_json::from_str(&read(&folder, "run.json")).unwrap();
    run.as_object_mut().unwrap().remove("id").unwrap();
    fs::write(&path, run.to_string()).unwrap();
    let id = open(folder.path()).unwrap().directory.id().to_owned();
    assert_eq!(id.len(), 32);
    assert_eq!(open(folder.path()).unwrap().directory.id(), id);
}

#[test]
fn another_run_is_refused_with_the_keys_that_differ() {
    let folder = run(1);
    let other = json!({"job": {"seed": 8}, "objective": {"kind": "cal_dpo", "beta": 0.05}, "data": {"train": ["a"]}, "train": {"steps": 3}});
    let config = read(&folder, "config.toml");
    let refused = RunDirectory::open(folder.path(), &other, "# other\n");
    check_refused(
        refused,
        &[
            "job.seed is 7 there, 8 here",
            "objective.beta is 0.1 there, 0.05 here",
            "train.steps is absent there, 3 here",
            "job.output",
        ],
    );
    assert_eq!(read(&folder, "config.toml"), config);
    let refused = RunDirectory::open(folder.path(), &other, "").err().unwrap();
    assert!(!refused.to_string().contains("data.train"));
}

#[test]
fn files_of_somebody_else_are_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.toml"), "mine").unwrap();
    check_refused(open(folder.path()), &["config.toml", "no run.json"]);
    assert_eq!(read(&folder, "config.toml"), "mine");
}

#[test]
fn other_files_in_the_directory_do_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("console.log"), "…").unwrap();
    open(folder.path()).unwrap();
}

#[test]
fn a_start_that_died_before_its_journal_is_begun_again() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()).unwrap());
    for name in ["config.toml", "journal.log", "metrics.jsonl", "eval.jsonl"] {
        fs::remove_file(folder.path().join(name)).unwrap();
    }
    assert!(open(folder.path()).unwrap().records.is_empty());
}

#[test]
fn a_row_that_died_with_the_process_comes_back_from_the_journal() {
    let folder = run(3);
    let whole = read(&folder, "metrics.jsonl");
    for cut in [whole.len() - 1, whole.len() / 2, 5, 0] {
        fs::write(folder.path().join("metrics.jsonl"), &whole[..cut]).unwrap();
        drop(open(folder.path()).unwrap());
        assert_eq!(read(&folder, "metrics.jsonl"), whole, "cut at {cut}");
    }
}

#[test]
fn a_row_that_the_journal_does_not_know_is_removed() {
    let folder = run(2);
    let whole = read(&folder, "metrics.jsonl");
    let extra = serde_json::to_string(&row(3)).unwrap();
    fs::write(
        folder.path().join("metrics.jsonl"),
        format!("{whole}{extra}\n"),
    )
    .unwrap();
    let late = serde_json::to_string(&evaluation(3)).unwrap();
    let evaluations = read(&folder, "eval.jsonl");
    fs::write(
        folder.path().join("eval.jsonl"),
        format!("{evaluations}{late}\n"),
    )
    .unwrap();
    drop(open(folder.path()).unwrap());
    assert_eq!(read(&folder, "metrics.jsonl"), whole);
    assert_eq!(read(&folder, "eval.jsonl"), evaluations);
}

#[test]
fn earlier_rows_stay_byte_for_byte() {
    let folder = run(3);
    // The same values, written by a program that spaces its JSON otherwise.
    let spaced = read(&folder, "metrics.jsonl").replacen("\"step\":1", "\"step\": 1", 1);
    fs::write(folder.path().join("metrics.jsonl"), &spaced).unwrap();
    let mut opened = open(folder.path()).unwrap();
    commit(&mut opened.directory, 4);
    assert!(read(&folder, "metrics.jsonl").starts_with(&spaced));
    let to = Step(1);
    let reason = String::new();
    opened
        .directory
        .journal(&Record::Rewind { to, reason })
        .unwrap();
    assert_eq!(
        read(&folder, "metrics.jsonl"),
        format!("{}\n", spaced.lines().next().unwrap())
    );
}

#[test]
fn a_rewind_removes_later_rows_now_and_at_the_next_start() {
    let folder = run(5);
    let mut opened = open(folder.path()).unwrap();
    let to = Step(2);
    let reason = "the newest checkpoint holds step 2".into();
    opened
        .directory
        .journal(&Record::Rewind { to, reason })
        .unwrap();
    assert_eq!(opened.directory.metrics().len(), 2);
    assert_eq!(read(&folder, "metrics.jsonl").lines().count(), 2);
    assert_eq!(read(&folder, "eval.jsonl").lines().count(), 2);
    assert_eq!(read(&folder, "samples.jsonl").lines().count(), 2);
    commit(&mut opened.directory, 3);
    drop(opened);
    let opened = open(folder.path()).unwrap();
    let steps: Vec<_> = opened
        .directory
        .metrics()
        .iter()
        .map(|row| row.report.step)
        .collect();
    assert_eq!(steps, [1, 2, 3]);
}

#[test]
fn an_evaluation_that_is_repeated_keeps_its_first_row() {
    let folder = run(2);
    let mut opened = open(folder.path()).unwrap();
    let repeated = EvaluationRow {
        pairs: 99,
        ..evaluation(2)
    };
    opened
        .directory
        .record_evaluation(repeated, &sample())
        .unwrap();
    assert_eq!(opened.directory.evaluations().last().unwrap().pairs, 3);
    assert_eq!(read(&folder, "samples.jsonl").lines().count(), 2);
}

#[test]
fn damage_is_named_and_nothing_is_changed() {
    let folder = run(2);
    let good = read(&folder, "eval.jsonl");
    fs::write(
        folder.path().join("eval.jsonl"),
        good.replacen("\"pairs\":3", "\"pairs\":x", 1),
    )
    .unwrap();
    check_refused(open(folder.path()), &["eval.jsonl:1", "not a row"]);
    fs::write(folder.path().join("eval.jsonl"), good).unwrap();

    let run_json = read(&folder, "run.json");
    fs::write(folder.path().join("run.json"), &run_json[..10]).unwrap();
    check_refused(open(folder.path()), &["run.json", "restore it"]);
    fs::write(folder.path().join("run.json"), run_json).unwrap();

    let path = folder.path().join("journal.log");
    let mut journal = fs::read(&path).unwrap();
    journal[100] ^= 1;
    fs::write(&path, journal).unwrap();
    check_refused(open(folder.path()), &["journal.log", "damaged"]);
}

#[test]
fn a_torn_journal_loses_its_last_commit_everywhere() {
    let folder = run(4);
    let path = folder.path().join("journal.log");
    let journal = fs::read(&path).unwrap();
    fs::write(&path, &journal[..journal.len() - 3]).unwrap();
    let opened = open(folder.path()).unwrap();
    assert!(opened.torn_bytes > 0);
    assert_eq!(opened.directory.metrics().len(), 3);
    assert_eq!(opened.directory.evaluations().last().unwrap().step, 2);
}

#[test]
fn facts_are_kept_and_other_inputs_are_refused() {
    let folder = run(1);
    let facts = RunFacts {
        steps_total: 10,
        data_digest: "aa".into(),
        committed: 0,
        ..RunFacts::default()
    };
    open(folder.path())
        .unwrap()
        .directory
        .agree(&facts)
        .unwrap();
    let run: Value = serde_json::from_str(&read(&folder, "run.json")).unwrap();
    assert_eq!(run["facts"]["data_digest"], "aa");
    let mut opened = open(folder.path()).unwrap();
    let later = RunFacts {
        committed: 5,
        ..facts.clone()
    };
    opened.directory.agree(&later).unwrap();
    let other = RunFacts {
        data_digest: "bb".into(),
        ..facts
    };
    let error = opened.directory.agree(&other).unwrap_err().to_string();
    assert!(
        error.contains("data_digest is \"aa\" there, \"bb\" here"),
        "{error}"
    );
}

#[test]
fn events_have_a_time_a_kind_and_a_text() {
    let folder = run(0);
    let mut opened = open(folder.path()).unwrap();
    let text = "two \"lines\"\nof text".to_owned();
    opened
        .directory
        .event(UNIX_EPOCH, &Note { kind: "join", text })
        .unwrap();
    let line: Value = serde_json::from_str(read(&folder, "events.jsonl").trim_end()).unwrap();
    assert_eq!(line["time"], "1970-01-01T00:00:00.000Z");
    assert_eq!(line["kind"], "join");
    assert_eq!(line["text"], "two \"lines\"\nof text");
}

fn warning(step: u64, text: &str) -> Warning {
    Warning {
        kind: "many-ties".into(),
        step,
        text: text.into(),
    }
}

#[test]
fn a_warning_is_written_once_over_all_starts_of_a_run() {
    let folder = run(2);
    let mut directory = open(folder.path()).unwrap().directory;
    assert!(
        directory
            .warning(UNIX_EPOCH, &warning(40, "12 of 40"))
            .unwrap()
    );
    assert!(
        !directory
            .warning(UNIX_EPOCH, &warning(40, "12 of 40"))
            .unwrap()
    );
    directory
        .event(
            UNIX_EPOCH,
            &Note {
                kind: "go",
                text: "a line of another kind".into(),
            },
        )
        .unwrap();
    drop(directory);
    let line: Value =
        serde_json::from_str(read(&folder, "events.jsonl").lines().next().unwrap()).unwrap();
    let expected = json!({
        "time": "1970-01-01T00:00:00.000Z", "kind": "warning", "warning": "many-ties", "step": 40, "text": "12 of 40",
    });
    assert_eq!(line, expected);
    // A line that somebody wrote is no warning and no obstacle.
    let path = folder.path().join("events.jsonl");
    let edited = read(&folder, "events.jsonl") + "a remark\n{\"kind\": \"warning\"}\n";
    fs::write(&path, edited).unwrap();
    let mut directory = open(folder.path()).unwrap().directory;
    assert_eq!(directory.warnings(), [warning(40, "12 of 40")]);
    assert!(
        !directory
            .warning(UNIX_EPOCH, &warning(40, "12 of 40"))
            .unwrap()
    );
    assert!(
        directory
            .warning(UNIX_EPOCH, &warning(80, "30 of 40"))
            .unwrap()
    );
    assert_eq!(directory.warnings().len(), 2);
}

#[test]
fn an_early_stop_is_known_while_its_step_is_the_last() {
    let folder = run(3);
    let stop = EarlyStop {
        step: 4,
        metric: "loss".into(),
        higher_is_better: false,
        value: 2.0,
        improved: None,
        evaluations: 1,
        min_delta: 0.0,
    };
    let mut directory = open(folder.path()).unwrap().directory;
    commit(&mut directory, 4);
    let record = Record::Evaluation {
        row: evaluation(4),
        stop: Some(stop.clone()),
    };
    directory.journal(&record).unwrap();
    assert_eq!(
        directory.early_stop(),
        None,
        "the last step is still to come"
    );
    commit(&mut directory, 5);
    assert_eq!(directory.early_stop(), Some(&stop));
    drop(directory);
    let mut directory = open(folder.path()).unwrap().directory;
    assert_eq!(directory.early_stop(), Some(&stop));
    commit(&mut directory, 6);
    assert_eq!(directory.early_stop(), None, "a later start went on");
    let to = Step(3);
    let reason = "why".into();
    directory.journal(&Record::Rewind { to, reason }).unwrap();
    commit(&mut directory, 4);
    commit(&mut directory, 5);
    assert_eq!(directory.early_stop(), None, "it was taken back");
    drop(directory);
    assert_eq!(open(folder.path()).unwrap().directory.early_stop(), None);
}

#[test]
fn m2_a_coordinator_whose_journal_another_opened_writes_no_more() {
    let folder = run(2);
    let mut old = open(folder.path()).unwrap().directory;
    let fence = old.take_over().unwrap();
    commit(&mut old, 3);
    // The lock file is gone with a folder that was moved and made anew, or its file system forgot it.
    fs::remove_file(folder.path().join(".lock")).unwrap();
    let mut new = open(folder.path()).unwrap().directory;
    old.check_journal().unwrap();
    assert_eq!(new.take_over().unwrap(), Fence(fence.0 + 1));
    let row = row(4);
    let record = Record::Commit(CommitRecord { apply: true, row });
    for _ in 0..2 {
        let refused = old.journal(&record).unwrap_err();
        assert!(matches!(refused, RunDirectoryError::Replaced { .. }));
        assert!(
            refused
                .to_string()
                .contains("another one has taken the run over")
        );
    }
    old.check_journal().unwrap_err();
    commit(&mut new, 4);
    drop((old, new));
    let opened = open(folder.path()).unwrap();
    assert_eq!(opened.directory.metrics().len(), 4);
}

#[test]
fn of_two_that_have_opened_the_journal_the_first_to_take_over_has_it() {
    let folder = run(1);
    let mut slow = open(folder.path()).unwrap().directory;
    fs::remove_file(folder.path().join(".lock")).unwrap();
    let mut quick = open(folder.path()).unwrap().directory;
    quick.take_over().unwrap();
    slow.take_over().unwrap_err();
    commit(&mut quick, 2);
}

#[test]
fn m2_a_journal_with_a_record_of_a_replaced_coordinator_is_refused() {
    let folder = run(1);
    open(folder.path()).unwrap().directory.take_over().unwrap();
    let path = folder.path().join("journal.log");
    let late = Entry {
        fence: Fence(1),
        record: Record::Checkpoint { step: Step(1) },
    };
    let mut log = Log::open(&path).unwrap().log;
    log.append(&serde_json::to_vec(&late).unwrap()).unwrap();
    drop(log);
    let parts = ["journal.log", "fence 1", "under 2", "restore the journal"];
    check_refused(open(folder.path()), &parts);
}

#[test]
fn who_only_looks_at_a_run_changes_nothing_of_its_journal() {
    let folder = run(1);
    let read = || fs::read(folder.path().join("journal.log")).unwrap();
    let before = read();
    drop(open(folder.path()).unwrap());
    assert!(before == read());
}
