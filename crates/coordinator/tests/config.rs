//! Layers, refusals and the resolved text of a configuration.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::PathBuf;

use coordinator::config::{Config, ConfigError, Sources, TrackerKind};
use tempfile::TempDir;
use toml::{Table, Value};

/// The least that a job needs. Files lose against it, so that it goes where they have nothing to say.
const LEAST: [(&str, &str); 3] = [
    ("CALDPO__MODEL__PATH", "models/m"),
    ("CALDPO__DATA__TRAIN", "[\"train.jsonl\"]"),
    ("CALDPO__OBJECTIVE__KIND", "cal_dpo"),
];

struct Case {
    folder: TempDir,
    sources: Sources,
}

fn case(files: &[&str], environment: &[(&str, &str)], set: &[&str]) -> Case {
    let folder = tempfile::tempdir().unwrap();
    let mut paths = Vec::new();
    for (index, text) in files.iter().enumerate() {
        let path = folder.path().join(format!("file-{index}.toml"));
        std::fs::write(&path, text).unwrap();
        paths.push(path);
    }
    let pairs = LEAST.iter().chain(environment);
    Case {
        folder,
        sources: Sources {
            texts: Vec::new(),
            files: paths,
            environment: pairs.map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            set: set.iter().map(|text| (*text).into()).collect(),
        },
    }
}

fn load(files: &[&str], environment: &[(&str, &str)], set: &[&str]) -> Result<Config, ConfigError> {
    let case = case(files, environment, set);
    let loaded = Config::load(&case.sources);
    drop(case.folder);
    loaded
}

/// Loads, expects a refusal, and checks that it says all of `parts`.
fn check_refused(files: &[&str], environment: &[(&str, &str)], set: &[&str], parts: &[&str]) {
    let error = load(files, environment, set)
        .expect_err("the configuration is refused")
        .to_string();
    for part in parts {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
}

#[test]
fn what_workers_cannot_share_out_or_move_to_the_host_is_refused_with_its_reason() {
    check_refused(
        &[],
        &[],
        &["cluster.zero=3"],
        &["cluster.zero", "must be 1", "or 2", "got 3"],
    );
    let moved = "cluster.offload=true";
    let bf16 = "model.dtype=bf16";
    check_refused(
        &[],
        &[],
        &[moved],
        &["cluster.offload", "model.dtype = \"bf16\""],
    );
    let adapter = "adapter.kind=lora";
    check_refused(
        &[],
        &[],
        &[moved, bf16, adapter],
        &["cluster.offload", "adapter"],
    );
    let cpu = "cluster.backend=cpu";
    check_refused(
        &[],
        &[],
        &[moved, bf16, cpu],
        &["cluster.offload", "cluster.backend is cpu"],
    );
    let config = load(&[], &[], &[moved, bf16, "cluster.zero=2"]).unwrap();
    let elastic = config.policy().elastic;
    assert!(elastic.offload && elastic.shard_gradients && elastic.mirror);
    let elastic = load(&[], &[], &[]).unwrap().policy().elastic;
    assert!(!elastic.offload && !elastic.shard_gradients);
}

#[test]
fn defaults_alone_are_a_configuration() {
    let config = load(&[], &[], &[]).unwrap();
    assert_eq!(config.job.name, "run");
    assert_eq!(config.job.output, PathBuf::from("runs/run"));
    assert_eq!(
        config.checkpoint.path,
        PathBuf::from("runs/run/checkpoints")
    );
    assert_eq!(config.cluster.workers, 2);
    assert_eq!(config.cluster.threads, None);
    assert_eq!(config.skipped_steps_max, 3);
    assert!(config.cluster.listen.ip().is_loopback());
}

#[test]
fn what_the_queue_is_told_of_a_job_makes_no_other_run() {
    let plain = load(&[], &[], &[]).unwrap();
    let job = &plain.job;
    assert_eq!((job.priority, job.max_attempts), (0, 5));
    assert_eq!(job.run_ms_max(), None);
    assert!(!plain.to_toml().contains("max_hours"));
    let set = ["job.priority=-100", "job.max_hours=2", "job.max_attempts=1"];
    let config = load(&[], &[], &set).unwrap();
    let job = &config.job;
    assert_eq!((job.priority, job.max_attempts), (-100, 1));
    assert_eq!(job.run_ms_max(), Some(7_200_000));
    assert_eq!(config.identity, plain.identity);
    assert_eq!(config.training, plain.training);
    let again = load(&[&config.to_toml()], &[], &[]).unwrap();
    assert_eq!(again.job, config.job);
    let least = load(&[], &[], &["job.max_hours=1e-9"]).unwrap();
    assert_eq!(least.job.run_ms_max(), Some(1), "0 would be no time at all");
}

#[test]
fn each_layer_wins_over_the_one_before() {
    let files = ["[objective]\nbeta = 0.2\n", "[objective]\nbeta = 0.3\n"];
    let beta = |environment: &[(&str, &str)], set: &[&str], files: &[&str]| {
        let config = load(files, environment, set).unwrap();
        config.training["objective"]["beta"].as_float().unwrap()
    };
    let variable = [("CALDPO__OBJECTIVE__BETA", "0.4")];
    assert_eq!(beta(&[], &[], &files[..1]), 0.2);
    assert_eq!(beta(&[], &[], &files), 0.3);
    assert_eq!(beta(&variable, &[], &files), 0.4);
    assert_eq!(beta(&variable, &["objective.beta=0.5"], &files), 0.5);
    let twice = ["objective.beta=0.5", "objective.beta=6e-1"];
    assert_eq!(beta(&variable, &twice, &files), 0.6);
}

#[test]
fn a_layer_changes_only_the_keys_it_names() {
    let config = load(
        &["[cluster]\nworkers = 3\n"],
        &[],
        &["cluster.step_timeout_seconds=90"],
    )
    .unwrap();
    assert_eq!(config.cluster.workers, 3);
    assert_eq!(config.cluster.step_timeout_seconds, 90.0);
    assert_eq!(config.cluster.heartbeat_timeout_seconds, 10.0);
}

#[test]
fn text_that_is_not_toml_is_a_string() {
    let set = [
        "model.path=models/a b",
        "job.name=\"2024\"",
        "job.output=elsewhere/x",
    ];
    let config = load(&[], &[("OTHER__X", "?")], &set).unwrap();
    assert_eq!(
        config.training["model"]["path"].as_str(),
        Some("models/a b")
    );
    assert_eq!(config.job.name, "2024");
    assert_eq!(config.job.output, PathBuf::from("elsewhere/x"));
}

#[test]
fn the_run_is_named_after_its_file() {
    let config = load(&["[model]\npath = \"m\"\n"], &[], &[]).unwrap();
    assert_eq!(config.job.name, "file-0");
    assert_eq!(config.job.output, PathBuf::from("runs/file-0"));
}

#[test]
fn workers_are_given_the_training_sections_and_the_seed_and_nothing_else() {
    let config = load(
        &["[job]\nseed = 7\n[train]\nsteps = 5\nskipped_steps_max = 2\n"],
        &[],
        &[],
    )
    .unwrap();
    assert_eq!(config.skipped_steps_max, 2);
    let handed: Table = config.training_toml().parse().unwrap();
    assert_eq!(
        handed["job"],
        Value::Table(Table::from_iter([("seed".into(), 7.into())]))
    );
    assert_eq!(handed["train"]["steps"], 5.into());
    assert!(handed["train"].get("skipped_steps_max").is_none());
    assert!(!handed.contains_key("cluster"));
    assert_eq!(config.identity["seed"], 7);
    assert_eq!(config.identity["objective"]["beta"], 0.1);
}

#[test]
fn the_resolved_text_loads_as_the_same_configuration() {
    let first = load(
        &["[job]\nname = \"a\"\n[cluster]\nthreads = 1\n[train]\nsteps = 5\n"],
        &[],
        &["objective.beta=0.05", "evaluate.every_steps=10"],
    )
    .unwrap();
    let text = first.to_toml();
    let second = load(&[&text], &[], &[]).unwrap();
    assert_eq!(second.to_toml(), text);
    assert_eq!(second.identity, first.identity);
    assert_eq!(second.policy(), first.policy());
    for part in [
        "[job]",
        "[objective]",
        "kind = \"cal_dpo\"",
        "skipped_steps_max = 3",
        "threads = 1",
    ] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
}

#[test]
fn the_policy_follows_the_sections() {
    let policy = load(
        &["[evaluate]\nevery_steps = 20\n[checkpoint]\nevery_steps = 0\n[cluster]\nheartbeat_timeout_seconds = 0.5\n"],
        &[],
        &[],
    )
    .unwrap()
    .policy();
    assert_eq!(
        (policy.world, policy.save_every, policy.evaluate_every),
        (2, None, Some(20))
    );
    assert_eq!(
        (policy.heartbeat_timeout_ms, policy.step_timeout_ms),
        (500, 1_800_000)
    );
}

#[test]
fn only_calibrated_objectives_have_targets() {
    assert_eq!(
        load(&[], &[], &["objective.beta=0.05"]).unwrap().targets(),
        Some(spec::Targets {
            chosen: 10.0,
            rejected: -10.0
        })
    );
    assert_eq!(
        load(&[], &[], &["objective.kind=dpo"]).unwrap().targets(),
        None
    );
}

#[test]
fn unknown_names_are_refused_with_place_and_nearest_name() {
    check_refused(
        &["[cluster]\nwokers = 3\n"],
        &[],
        &[],
        &["cluster.wokers", "file-0.toml:2", "did you mean `workers`?"],
    );
    check_refused(
        &["\n[clutser]\nworkers = 3\n"],
        &[],
        &[],
        &["clutser", "file-0.toml:3", "did you mean `cluster`?"],
    );
    check_refused(
        &["beta = 1\n"],
        &[],
        &[],
        &["beta (from", "no such key outside a section"],
    );
    check_refused(
        &[],
        &[("CALDPO__CHECKPOINT__EVERY", "5")],
        &[],
        &[
            "checkpoint.every (from CALDPO__CHECKPOINT__EVERY)",
            "did you mean `every_steps`?",
        ],
    );
    check_refused(
        &[],
        &[],
        &["telemetry.port=1"],
        &[
            "telemetry.port (from --set telemetry.port)",
            "known are",
            "trackers",
        ],
    );
    check_refused(
        &[],
        &[],
        &["job.zzz=1"],
        &[
            "job.zzz",
            "known are max_attempts, max_hours, name, output, preset, priority, seed",
        ],
    );
}

#[test]
fn what_training_refuses_is_told_with_its_place() {
    check_refused(
        &["[objective]\nbeta = 0.1\n"],
        &[],
        &["objective.gamma=2"],
        &["objective.gamma (from --set objective.gamma): unknown key"],
    );
    check_refused(
        &["[train]\nsteps = 1\nbatchpairs = 3\n"],
        &[],
        &[],
        &["train.batchpairs (from", "file-0.toml:3)"],
    );
}

#[test]
fn wrong_types_are_refused() {
    check_refused(
        &["[cluster]\nworkers = \"two\"\n"],
        &[],
        &[],
        &[
            "cluster.workers",
            "file-0.toml:2",
            "\"two\"",
            "expected u32",
        ],
    );
    check_refused(
        &[],
        &[],
        &["cluster.workers=-1"],
        &["cluster.workers", "-1"],
    );
    check_refused(
        &[],
        &[],
        &["job.name=2024"],
        &["job.name", "expected a string", "write '\"2024\"'"],
    );
    check_refused(
        &[],
        &[],
        &["cluster.listen=here"],
        &["cluster.listen", "socket address"],
    );
    check_refused(
        &[],
        &[("CALDPO__MODEL", "x")],
        &[],
        &["model (from CALDPO__MODEL)", "expected a section [model]"],
    );
    check_refused(
        &[],
        &[],
        &["cluster.backend=gpu"],
        &["cluster.backend", "`cuda`"],
    );
    check_refused(&[], &[], &["job.seed=1.5"], &["job.seed", "1.5"]);
}

#[test]
fn impossible_values_are_refused() {
    let refused = |set: &str, parts: &[&str]| check_refused(&[], &[], &[set], parts);
    refused("cluster.workers=0", &["cluster.workers", "at least 1"]);
    for priority in ["101", "-101"] {
        let set = format!("job.priority={priority}");
        refused(&set, &["job.priority", "between -100 and 100", priority]);
    }
    refused("job.priority=1.5", &["job.priority", "1.5"]);
    for hours in ["0", "-1", "nan", "inf", "1e9"] {
        let set = format!("job.max_hours={hours}");
        refused(&set, &["job.max_hours", "above 0", "leave it out"]);
    }
    refused("job.max_attempts=0", &["job.max_attempts", "at least 1"]);
    refused("cluster.threads=0", &["cluster.threads", "at least 1"]);
    refused(
        "cluster.listen=0.0.0.0:7070",
        &["cluster.listen", "not loopback"],
    );
    refused(
        "cluster.step_timeout_seconds=5",
        &[
            "cluster.step_timeout_seconds",
            "longer than cluster.heartbeat_timeout_seconds, which is 10",
        ],
    );
    refused(
        "cluster.heartbeat_timeout_seconds=0",
        &["cluster.heartbeat_timeout_seconds", "between 0.001"],
    );
    refused(
        "cluster.save_timeout_seconds=nan",
        &["cluster.save_timeout_seconds", "between"],
    );
    refused(
        "checkpoint.failures_max=0",
        &["checkpoint.failures_max", "at least 1"],
    );
    refused(
        "checkpoint.keep_last=0",
        &["checkpoint.keep_last", "at least 1"],
    );
    refused(
        "checkpoint.path=\"ftp://host/x\"",
        &["checkpoint.path", "`ftp`", "s3://bucket/prefix"],
    );
    refused(
        "checkpoint.path=\"s3://KEY:SECRET@bucket/x\"",
        &[
            "checkpoint.path",
            "credentials and options come from the environment",
        ],
    );
    refused(
        "job.output=\"s3://bucket/x\"",
        &["job.output", "a URL", "checkpoint.path"],
    );
    refused(
        "train.skipped_steps_max=0",
        &["train.skipped_steps_max", "at least 1"],
    );
    refused("job.name=a/b", &["job.name", "a/b"]);
    refused("job.output=\"\"", &["job.output", "empty"]);
    refused("job.seed=-1", &["job.seed", "-1"]);
}

#[test]
fn cores_are_shared_out_evenly_unless_threads_are_named() {
    let cluster = |set: &[&str]| load(&[], &[], set).unwrap().cluster;
    assert_eq!(cluster(&["cluster.workers=2"]).threads_per_worker(9), 4);
    assert_eq!(cluster(&["cluster.workers=4"]).threads_per_worker(2), 1);
    assert_eq!(cluster(&["cluster.threads=3"]).threads_per_worker(2), 3);
}

#[test]
fn malformed_sources_are_refused() {
    check_refused(&["[job\n"], &[], &[], &["file-0.toml", "TOML", "line 1"]);
    check_refused(
        &[],
        &[],
        &["seed=1"],
        &["--set seed=1", "section.key=value"],
    );
    check_refused(
        &[],
        &[],
        &["job.seed"],
        &["--set job.seed", "section.key=value"],
    );
    check_refused(
        &[],
        &[("CALDPO__JOB____SEED", "1")],
        &[],
        &["CALDPO__JOB____SEED", "CALDPO__SECTION__KEY"],
    );
    let missing = Sources {
        files: vec!["/does/not/exist.toml".into()],
        ..Sources::default()
    };
    let error = Config::load(&missing).unwrap_err().to_string();
    assert!(error.contains("/does/not/exist.toml"), "{error}");
}

#[test]
fn a_file_that_is_not_utf_8_is_refused_with_its_first_wrong_byte_and_a_cure() {
    let folder = tempfile::tempdir().unwrap();
    let check = |name: &str, bytes: &[u8], byte: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let sources = Sources {
            files: vec![path.clone()],
            ..Sources::default()
        };
        let error = Config::load(&sources).unwrap_err().to_string();
        let path = path.display().to_string();
        for part in [path.as_str(), byte, "save the file as UTF-8"] {
            assert!(error.contains(part), "`{part}` is missing in: {error}");
        }
    };
    check(
        "latin-1.toml",
        b"[job]\nname = \"caf\xe9\"\n",
        "byte 17 is 0xe9",
    );
    check("utf-16.toml", b"\xff\xfe[\0j\0o\0b\0]\0", "byte 0 is 0xff");
    check("cut.toml", b"# \xc3", "byte 2 is 0xc3");
}

#[test]
fn trackers_write_into_the_run_directory_unless_told_otherwise() {
    let config = load(&[], &[], &["job.output=out"]).unwrap().telemetry;
    assert_eq!(config.trackers, []);
    assert_eq!(config.metrics_listen, None);
    assert_eq!(config.tensorboard_folder, PathBuf::from("out/tensorboard"));
    assert_eq!(config.wandb_folder, PathBuf::from("out/wandb"));
    assert_eq!(config.mlflow_folder, PathBuf::from("out/mlruns"));
    let set = [
        "telemetry.trackers=[\"mlflow\", \"tensorboard\"]",
        "telemetry.mlflow_folder=mlruns",
        "telemetry.metrics_listen=127.0.0.1:0",
    ];
    let config = load(&[], &[], &set).unwrap();
    let telemetry = &config.telemetry;
    let (mlflow, tensorboard) = (TrackerKind::Mlflow, TrackerKind::TensorBoard);
    assert_eq!(telemetry.trackers, [mlflow, tensorboard]);
    assert_eq!(telemetry.mlflow_folder, PathBuf::from("mlruns"));
    assert_eq!(telemetry.metrics_listen, "127.0.0.1:0".parse().ok());
    let again = load(&[&config.to_toml()], &[], &[]).unwrap();
    assert_eq!(again.telemetry, config.telemetry);
    // One name alone, as TRL's report_to takes it.
    let one = load(&[], &[("CALDPO__TELEMETRY__TRACKERS", "wandb")], &[]).unwrap();
    assert_eq!(one.telemetry.trackers, [TrackerKind::Wandb]);
}

#[test]
fn trackers_and_listeners_that_cannot_be_are_refused_with_the_cure() {
    let rows: [(&str, &[&str]); 9] = [
        (
            "telemetry.trackers=[\"tensorbord\"]",
            &["telemetry.trackers (from", "did you mean `tensorboard`?"],
        ),
        (
            "telemetry.trackers=[\"comet\"]",
            &["\"comet\"", "known are tensorboard, wandb, mlflow"],
        ),
        (
            "telemetry.trackers=[\"wandb\", \"wandb\"]",
            &["\"wandb\" is named twice"],
        ),
        (
            "telemetry.trackers=true",
            &["a list of names, such as [\"tensorboard\"]"],
        ),
        (
            "telemetry.wandb_project=a/b",
            &["telemetry.wandb_project", "none of them", "\"a/b\""],
        ),
        (
            "telemetry.mlflow_experiment=\"\"",
            &["telemetry.mlflow_experiment", "1 to 128 characters"],
        ),
        (
            "telemetry.tensorboard_folder=\"\"",
            &["telemetry.tensorboard_folder", "leave the key out"],
        ),
        (
            "telemetry.metrics_listen=0.0.0.0:9464",
            &[
                "telemetry.metrics_listen",
                "not loopback",
                "security.token_file",
            ],
        ),
        (
            "telemetry.metrics_listen=9464",
            &["telemetry.metrics_listen (from"],
        ),
    ];
    for (set, words) in rows {
        check_refused(&[], &[], &[set], words);
    }
}

#[test]
fn the_best_checkpoint_is_kept_where_it_is_asked_for_or_training_may_stop_early() {
    let metric = [
        "data.eval=['test.jsonl']",
        "evaluate.metric=loss",
        "evaluate.every_steps=10",
    ];
    let with = |more: &[&str]| load(&[], &[], &[&metric[..], more].concat()).unwrap();
    assert!(!with(&[]).checkpoint.keep_best);
    assert!(with(&["checkpoint.keep_best=true"]).checkpoint.keep_best);
    let stopping = with(&[
        "evaluate.early_stopping_patience=3",
        "evaluate.early_stopping_min_delta=1",
    ]);
    assert!(stopping.checkpoint.keep_best);
    let selection = stopping.policy().selection.unwrap();
    assert_eq!(selection.metric.name(), "loss");
    assert!(!selection.higher_is_better && selection.keep_best);
    assert_eq!((selection.patience, selection.min_delta), (Some(3), 1.0));
    let not_kept = with(&[
        "evaluate.early_stopping_patience=3",
        "checkpoint.keep_best=false",
    ]);
    assert!(!not_kept.checkpoint.keep_best);
    // Its resolved text says what was decided.
    let again = load(&[&stopping.to_toml()], &[], &[]).unwrap();
    assert_eq!(again.checkpoint, stopping.checkpoint);
    assert_eq!(again.policy(), stopping.policy());
    assert_eq!(load(&[], &[], &[]).unwrap().policy().selection, None);
}

#[test]
fn a_best_checkpoint_without_a_metric_is_refused_with_the_cure() {
    let parts = [
        "checkpoint.keep_best",
        "--set checkpoint.keep_best",
        "evaluate.metric = \"rewards/accuracies\"",
    ];
    check_refused(&[], &[], &["checkpoint.keep_best=true"], &parts);
    let every = ["checkpoint.keep_best=true", "evaluate.every_steps=10"];
    check_refused(&[], &[], &every, &parts);
}

/// The same without the environment of [`LEAST`], which says the objective's kind.
fn load_preset(
    file: &str,
    environment: &[(&str, &str)],
    set: &[&str],
) -> Result<Config, ConfigError> {
    let mut case = case(&[file], &[], set);
    let environment = environment.iter().chain(&LEAST[..2]);
    case.sources.environment = environment
        .map(|(k, v)| ((*k).into(), (*v).into()))
        .collect();
    let loaded = Config::load(&case.sources);
    drop(case.folder);
    loaded
}

#[test]
fn a_preset_has_the_numbers_of_the_run_that_it_is_named_after() {
    // β, λ, kind, rate, clip, schedule, warmup, batch, length.
    for (name, expected) in [
        (
            "cal-dpo-zephyr",
            "0.002 0.5 adamw 5e-7 1.0 cosine 0.1 128 1024",
        ),
        (
            "cal-dpo-hh",
            "0.1 1.0 rmsprop 5e-7 10.0 constant 150 64 512",
        ),
        (
            "cal-dpo-tldr",
            "0.001 1.0 rmsprop 5e-7 10.0 constant 150 64 512",
        ),
    ] {
        let config = load_preset("", &[], &[&format!("job.preset={name}")]).unwrap();
        let value = |section, key| config.training_value(section, key).cloned();
        let warmup = value("schedule", "warmup_ratio").or(value("schedule", "warmup_steps"));
        let found = [
            value("objective", "beta"),
            value("objective", "calibration_weight"),
            value("optimizer", "kind"),
            value("optimizer", "learning_rate"),
            value("optimizer", "max_grad_norm"),
            value("schedule", "kind"),
            warmup,
            value("train", "batch_pairs"),
            value("data", "max_length"),
        ];
        let found = found.map(|value| match value.unwrap() {
            Value::String(text) => text,
            Value::Float(number) => format!("{number:?}"),
            other => other.to_string(),
        });
        assert_eq!(found.join(" "), expected, "{name}");
        assert_eq!(config.objective(), "cal_dpo");
        assert_eq!(config.training_value("train", "epochs"), Some(&1.into()));
    }
}

#[test]
fn a_preset_wins_over_defaults_and_all_that_is_given_wins_over_it() {
    let preset = "[job]\npreset = \"cal-dpo-hh\"\n";
    let file = format!("{preset}[optimizer]\nmax_grad_norm = 2.0\n");
    let variable = [("CALDPO__OPTIMIZER__MAX_GRAD_NORM", "3.0")];
    let norm = |file: &str, environment: &[(&str, &str)], set: &[&str]| {
        let config = load_preset(file, environment, set).unwrap();
        config.optimizer.max_grad_norm
    };
    assert_eq!(norm("", &[], &[]), 1.0);
    assert_eq!(norm(preset, &[], &[]), 10.0);
    assert_eq!(norm(&file, &[], &[]), 2.0);
    assert_eq!(norm(&file, &variable, &[]), 3.0);
    assert_eq!(norm(&file, &variable, &["optimizer.max_grad_norm=4"]), 4.0);
    // The preset itself comes from any layer, the strongest one.
    let named = [("CALDPO__JOB__PRESET", "cal-dpo-zephyr")];
    assert_eq!(norm("", &named, &["job.preset=cal-dpo-tldr"]), 10.0);
    assert_eq!(norm(preset, &named, &[]), 1.0);
}

#[test]
fn a_preset_makes_way_for_what_excludes_its_values() {
    let preset = "[job]\npreset = \"cal-dpo-zephyr\"\n";
    let with = |set: &[&str]| load_preset(preset, &[], set).unwrap();
    let config = with(&["train.steps=20", "schedule.warmup_steps=3"]);
    assert_eq!(config.training_value("train", "epochs"), None);
    assert_eq!(config.training_value("schedule", "warmup_ratio"), None);
    // Another objective has other parameters, or means another thing by the same name.
    let config = with(&["objective.kind=dpo"]);
    assert_eq!(
        config.training_value("objective", "beta"),
        Some(&0.1.into())
    );
    assert_eq!(
        config.training_value("train", "batch_pairs"),
        Some(&128.into())
    );
    let config = with(&["objective.kind=cal_dpo", "objective.beta=0.05"]);
    let weight = config.training_value("objective", "calibration_weight");
    assert_eq!(weight, Some(&0.5.into()));
    let config = load_preset(
        preset,
        &[],
        &["job.preset=cal-dpo-hh", "optimizer.kind=adamw"],
    );
    let optimizer = config.unwrap().optimizer;
    assert_eq!(optimizer.kind.label(), "AdamW");
    assert_eq!(optimizer.max_grad_norm, 10.0);
}

#[test]
fn a_resolved_text_has_the_values_of_a_preset_and_not_its_name() {
    let first = load_preset("", &[], &["job.preset=cal-dpo-hh", "train.steps=5"]).unwrap();
    for text in [first.to_toml(), first.to_job_toml()] {
        assert!(text.contains("defaults, preset cal-dpo-hh, conf"), "{text}");
        let values: Table = text.parse().unwrap();
        assert_eq!(values["job"].get("preset"), None);
        let second = load_preset(&text, &[], &[]).unwrap();
        assert_eq!(second.training, first.training);
        assert_eq!(second.run_digest(), first.run_digest());
    }
}

#[test]
fn an_unknown_preset_is_refused_with_the_nearest_name() {
    check_refused(
        &["[job]\npreset = \"cal-dpo-zefyr\"\n"],
        &[],
        &[],
        &[
            "job.preset (from",
            "file-0.toml:2",
            "no such preset",
            "did you mean `cal-dpo-zephyr`? (known: cal-dpo-zephyr, cal-dpo-hh, cal-dpo-tldr)",
        ],
    );
    check_refused(&[], &[], &["job.preset=1"], &["job.preset", "cal-dpo-hh"]);
    check_refused(
        &[],
        &[],
        &[
            "job.preset=cal-dpo-zephyr",
            "optimizer.kind=rmsprop",
            "optimizer.betas=[0.9, 0.99]",
        ],
        &["optimizer.betas (from --set optimizer.betas): belongs to optimizer.kind = \"adamw\""],
    );
}
