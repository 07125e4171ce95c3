//! Trackers as projections of the committed rows: whole runs, resumed ones, rewinds, and files torn at any byte end alike.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod readers;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use coordinator::{
    config::{Config, Sources},
    trackers::{Entry, Past, Trackers},
};
use protocol::{EvaluationRow, MetricsRow, Outcome, Phases, Sample, Statistics, Step, StepReport};
use readers::Seen;
use tempfile::TempDir;

const ALL: &str = r#"["tensorboard", "wandb", "mlflow"]"#;

/// A configuration whose run directory is `run` in `folder`.
fn config(folder: &Path, trackers: &str, set: &[&str]) -> Config {
    let sections = "[job]\nname = \"letters\"\n[model]\npath = \"m\"\n[objective]\nkind = \"cal_dpo\"\nbeta = 0.1\n[data]\ntrain = [\"a b.jsonl\"]\n";
    let file = folder.join("letters.toml");
    fs::write(&file, sections).unwrap();
    let mut all = vec![
        format!("job.output={}", folder.join("run").display()),
        format!("telemetry.trackers={trackers}"),
    ];
    all.extend(set.iter().map(|text| (*text).to_owned()));
    let sources = Sources {
        files: vec![file],
        set: all,
        ..Sources::default()
    };
    fs::create_dir_all(folder.join("run")).unwrap();
    Config::load(&sources).unwrap()
}

/// A row whose numbers tell its step and its `life`: the same step computed again is another one.
fn step(step: u64, life: u64) -> Entry {
    let value = step as f64 + life as f64 / 8.0;
    Entry::Step(Box::new(MetricsRow {
        report: StepReport {
            step,
            epoch: step / 4,
            finite: step != 3,
            statistics: Statistics {
                loss: value,
                rewards_chosen: 1e-7 * value,
                logps_chosen: if step == 3 { f64::NAN } else { -value },
                ..Statistics::default()
            },
            grad_norm: 0.1 + 0.2,
            pairs: 32,
            ..StepReport::default()
        },
        tokens_per_second: 1000.5,
        world_size: 2,
        generation: life,
        seconds: 0.5,
        gpu: protocol::GpuFigures::default(),
        phases: Phases::from_values(std::array::from_fn(|phase| value + phase as f64)),
    }))
}

fn evaluation(step: u64, life: u64) -> Entry {
    let samples = [0, 8].contains(&step).then(|| Sample {
        prompt: "1 < 2 & <b>".into(),
        text: format!("step {step}, life {life}\n\nend"),
    });
    Entry::Evaluation {
        row: EvaluationRow {
            step,
            pairs: 7,
            statistics: Statistics {
                loss: 100.0 * step as f64 + life as f64,
                ..Statistics::default()
            },
        },
        samples: samples.into_iter().collect(),
    }
}

/// Steps `first` to `last` of a life, with evaluations after steps 0, 4, 8, ….
fn entries(first: u64, last: u64, life: u64) -> Vec<Entry> {
    let mut entries = Vec::new();
    for number in first..=last {
        if number > 0 {
            entries.push(step(number, life));
        }
        if number % 4 == 0 {
            entries.push(evaluation(number, life));
        }
    }
    entries
}

fn time(second: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_795_555_000 + second)
}

fn past(entries: &[Entry]) -> Past {
    entries
        .iter()
        .map(|entry| (time(1), entry.clone()))
        .collect()
}

/// One start of a run: it goes on from `committed`, which `before` leads to, and is told `live`.
fn start(config: &Config, before: &[Entry], committed: u64, live: &[Entry], outcome: &Outcome) {
    let mut trackers = Trackers::start(config, past(before), committed).unwrap();
    for entry in live {
        trackers.record(time(2), entry.clone());
    }
    trackers.finish(time(3), outcome);
}

/// Every number of every row by name, but for the step.
fn curves(entries: &[Entry]) -> BTreeMap<String, Vec<(u64, f64)>> {
    let mut curves: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for entry in entries {
        let (prefix, row) = match entry {
            Entry::Step(row) => ("", serde_json::to_value(row)),
            Entry::Evaluation { row, .. } => ("eval/", serde_json::to_value(row)),
        };
        let row = row.unwrap();
        let step = row["step"].as_u64().unwrap();
        for (name, value) in row.as_object().unwrap() {
            let number = match value.as_bool() {
                Some(flag) => f64::from(u8::from(flag)),
                None => value.as_f64().unwrap_or(f64::NAN),
            };
            if name != "step" {
                curves
                    .entry(format!("{prefix}{name}"))
                    .or_default()
                    .push((step, number));
            }
        }
    }
    curves
}

fn see(folder: &Path) -> [(&'static str, Seen); 3] {
    let run = folder.join("run");
    [
        (
            "tensorboard",
            readers::tensorboard(&run.join("tensorboard")),
        ),
        ("wandb", readers::wandb(&run.join("wandb"))),
        ("mlflow", readers::mlflow(&run.join("mlruns"))),
    ]
}

/// That all three programs see exactly these rows, one value a step.
fn check(what: &str, folder: &Path, expected: &[Entry]) {
    for (program, seen) in see(folder) {
        check_curves(&format!("{what}: {program}"), &seen, expected);
    }
}

fn check_curves(what: &str, seen: &Seen, expected: &[Entry]) {
    // As text, so that NaN equals NaN. TensorBoard has f32.
    let shown = |curves: BTreeMap<String, Vec<(u64, f64)>>| -> Vec<String> {
        let single = what.ends_with("tensorboard");
        let curves = curves.into_iter().map(|(name, curve)| {
            let values = curve.into_iter().map(|(step, value)| {
                let value = if single {
                    f64::from(value as f32)
                } else {
                    value
                };
                format!("{step}: {value:?}")
            });
            format!("{name} {}", values.collect::<Vec<_>>().join(", "))
        });
        curves.collect()
    };
    let (found, expected) = (shown(seen.curves.clone()), shown(curves(expected)));
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected, "{what}");
    }
    assert_eq!(found.len(), expected.len(), "{what}");
}

/// Content of every file below a folder.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(content(&path));
        } else {
            all.insert(path.clone(), fs::read(path).unwrap());
        }
    }
    all
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn all_three_programs_see_every_number_of_every_row() {
    let folder = folder();
    let config = config(folder.path(), ALL, &[]);
    let rows = entries(0, 60, 1);
    start(&config, &[], 0, &rows, &Outcome::Completed);
    check("a run", folder.path(), &rows);
    for (program, seen) in see(folder.path()) {
        assert_eq!(seen.texts.keys().collect::<Vec<_>>(), [&0, &8], "{program}");
        let text = &seen.texts[&8];
        assert!(text.contains("step 8, life 1"), "{program}: {text}");
        let prompt = if program == "wandb" {
            "1 &lt; 2 &amp; &lt;b&gt;"
        } else {
            "1 < 2 & <b>"
        };
        assert!(text.contains(prompt), "{program}: {text}");
        for word in ["beta", "0.1", "cal_dpo", "a b.jsonl", "keep_last"] {
            assert!(
                seen.config.contains(word),
                "{program}: no `{word}` in {}",
                seen.config
            );
        }
        assert!(!seen.config.contains("wandb"), "{program}: {}", seen.config);
        let end = match program {
            "wandb" => "exit 0",
            "mlflow" => "status: 3",
            _ => "",
        };
        assert_eq!(seen.end, end, "{program}");
    }
}

#[test]
fn the_same_command_on_a_finished_run_adds_nothing_and_a_tracker_added_then_gets_every_row() {
    let folder = folder();
    let rows = entries(0, 10, 1);
    let two = config(folder.path(), r#"["tensorboard", "mlflow"]"#, &[]);
    start(&two, &[], 0, &rows, &Outcome::Completed);
    let before = content(folder.path());
    start(&two, &rows, 10, &[], &Outcome::Completed);
    assert!(content(folder.path()) == before);
    // Rows of an evaluation that is repeated after a resume are passed over.
    start(
        &two,
        &rows,
        10,
        &[evaluation(8, 2), step(10, 2)],
        &Outcome::Completed,
    );
    assert!(content(folder.path()) == before);

    let all = config(folder.path(), ALL, &[]);
    start(&all, &rows, 10, &[], &Outcome::Completed);
    check("added after the end", folder.path(), &rows);
    let before = content(folder.path());
    start(&all, &rows, 10, &[], &Outcome::Completed);
    assert!(content(folder.path()) == before);
}

/// The file with which `wandb sync` marks a run as done.
fn synced_marker(folder: &Path) -> PathBuf {
    let paths = content(&folder.join("run/wandb")).into_keys();
    let mut files = paths.filter(|path| path.extension().is_some_and(|it| it == "wandb"));
    files.next().unwrap().with_extension("wandb.synced")
}

#[test]
fn a_run_that_is_stopped_and_goes_on_is_one_run() {
    let folder = folder();
    let config = config(folder.path(), ALL, &[]);
    let rows = entries(0, 20, 1);
    let mut synced = folder.path().join("none yet");
    // Stopped at every step, also between a step and its evaluation.
    for end in 1..rows.len() {
        let from = end.saturating_sub(1);
        let committed = rows[..=from]
            .iter()
            .map(|row| row.position().step)
            .max()
            .unwrap();
        let outcome = Outcome::Interrupted {
            committed: Step(committed),
        };
        start(
            &config,
            &rows[..from],
            committed,
            &rows[from..end],
            &outcome,
        );
        // What was synced before it went on is to be synced anew.
        assert!(!synced.exists(), "{}", synced.display());
        synced = synced_marker(folder.path());
        fs::write(&synced, "").unwrap();
        check(&format!("after {end} entries"), folder.path(), &rows[..end]);
        let ends: Vec<_> = see(folder.path()).map(|(_, seen)| seen.end).into();
        assert_eq!(ends, ["", "exit 255", "status: 5"]);
    }
    start(
        &config,
        &rows[..rows.len() - 1],
        20,
        &rows[rows.len() - 1..],
        &Outcome::Completed,
    );
    check("the end", folder.path(), &rows);
    let ends: Vec<_> = see(folder.path()).map(|(_, seen)| seen.end).into();
    assert_eq!(ends, ["", "exit 0", "status: 3"]);
}

#[test]
fn a_rewind_leaves_one_value_a_step() {
    for to in [0, 3, 4, 8, 9] {
        let what = format!("back to step {to}");
        let again = [entries(0, to, 1), entries(to + 1, 12, 2)].concat();

        // While it runs.
        let running = folder();
        let config_of = |folder: &TempDir| config(folder.path(), ALL, &[]);
        let mut trackers = Trackers::start(&config_of(&running), Past::new(), 0).unwrap();
        for entry in entries(0, 10, 1) {
            trackers.record(time(2), entry);
        }
        trackers.rewind(time(3), to);
        for entry in entries(to + 1, 12, 2) {
            trackers.record(time(4), entry);
        }
        trackers.finish(time(5), &Outcome::Completed);
        check(&what, running.path(), &again);

        // From one start to the next, where the rewind itself never reached the trackers.
        let between = folder();
        let config = config_of(&between);
        let interrupted = Outcome::Interrupted {
            committed: Step(10),
        };
        start(&config, &[], 0, &entries(0, 10, 1), &interrupted);
        start(&config, &entries(0, to, 1), to, &[], &interrupted);
        check(
            &format!("{what}, nothing after it"),
            between.path(),
            &entries(0, to, 1),
        );
        start(
            &config,
            &entries(0, to, 1),
            to,
            &entries(to + 1, 12, 2),
            &Outcome::Completed,
        );
        check(&format!("{what}, next start"), between.path(), &again);
        let texts = see(between.path()).map(|(_, seen)| seen.texts);
        for text in texts.iter().filter_map(|texts| texts.get(&8)) {
            let life = if to < 8 { "life 2" } else { "life 1" };
            assert!(text.contains(life), "{what}: {text}");
        }
    }
}

#[test]
fn files_torn_at_any_byte_are_whole_after_the_next_start() {
    let rows = entries(0, 9, 1);
    let folder = folder();
    let config = config(folder.path(), ALL, &[]);
    start(&config, &[], 0, &rows, &Outcome::Completed);
    let whole = content(folder.path());
    let mend = |what: &str| {
        start(&config, &rows, 9, &[], &Outcome::Completed);
        check(what, folder.path(), &rows);
        for path in content(folder.path()).keys() {
            fs::remove_file(path).unwrap();
        }
        for (path, bytes) in &whole {
            fs::write(path, bytes).unwrap();
        }
    };
    for (path, bytes) in &whole {
        let name = path.display().to_string();
        if !["tfevents", ".wandb", "metrics/"]
            .iter()
            .any(|part| name.contains(part))
        {
            continue;
        }
        // Enough to meet every part of a frame, a line and a record.
        let stride = if bytes.len() > 1000 { 83 } else { 97 };
        for cut in (0..bytes.len()).step_by(stride) {
            fs::write(path, &bytes[..cut]).unwrap();
            mend(&format!("{name} cut at {cut}"));
        }
        fs::remove_file(path).unwrap();
        mend(&format!("without {name}"));
    }
}

#[test]
fn a_tracker_that_cannot_write_leaves_the_others_and_the_run_alone() {
    for broken in ["tensorboard", "wandb", "mlruns"] {
        let folder = folder();
        let config = config(folder.path(), ALL, &[]);
        let rows = entries(0, 5, 1);
        let place = folder.path().join("run").join(broken);
        fs::write(&place, "a file where a folder should be").unwrap();
        start(&config, &[], 0, &rows, &Outcome::Completed);
        fs::remove_file(&place).unwrap();
        for (program, seen) in see(folder.path()) {
            let expected = if broken.starts_with(&program[..2]) {
                &[]
            } else {
                &rows[..]
            };
            check_curves(&format!("{broken} broken: {program}"), &seen, expected);
        }
        // The next start catches up.
        start(&config, &rows, 5, &[], &Outcome::Completed);
        check(&format!("{broken} mended"), folder.path(), &rows);
    }
}

#[test]
fn runs_share_the_folders_of_wandb_and_mlflow_but_not_that_of_tensorboard() {
    let shared = folder();
    let set: Vec<String> = [("tensorboard", "tb"), ("wandb", "wb"), ("mlflow", "ml")]
        .map(|(name, folder)| {
            format!(
                "telemetry.{name}_folder={}",
                shared.path().join(folder).display()
            )
        })
        .into();
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let (first, second) = (folder(), folder());
    let rows = entries(0, 5, 1);
    start(
        &config(first.path(), ALL, &set),
        &[],
        0,
        &rows,
        &Outcome::Completed,
    );
    let other = entries(0, 5, 2);
    start(
        &config(second.path(), ALL, &set),
        &[],
        0,
        &other,
        &Outcome::Completed,
    );
    let inside = |folder: &str| fs::read_dir(shared.path().join(folder)).unwrap().count();
    assert_eq!(inside("wb"), 2);
    assert_eq!(inside("ml"), 1, "one experiment");
    // TensorBoard would have shown both as one run; the second one's warning says so.
    assert_eq!(inside("tb"), 1);
    let seen = readers::tensorboard(&shared.path().join("tb"));
    check_curves("the first run's tensorboard", &seen, &rows);
}

#[test]
fn a_disk_that_hangs_holds_up_neither_the_run_nor_its_end_for_long() {
    let folder = folder();
    let config = config(folder.path(), ALL, &[]);
    // Whoever opens it for reading waits for somebody who writes, as on a network file system whose server is gone.
    let pipe = folder.path().join("run/trackers.json");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let begin = Instant::now();
    let mut trackers = Trackers::start(&config, Past::new(), 0).unwrap();
    // More than wait in the queue.
    for entry in entries(0, 5000, 1) {
        trackers.record(time(2), entry);
    }
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    trackers.finish(time(3), &Outcome::Completed);
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
    fs::remove_file(&pipe).unwrap();
    let rows = entries(0, 20, 1);
    start(&config, &rows, 20, &[], &Outcome::Completed);
    check("the next start", folder.path(), &rows);
}
