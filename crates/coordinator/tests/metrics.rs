//! `/metrics`: names, values, several jobs, jobs that ended, and who may read.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use coordinator::metrics::{KEPT_AFTER_END, Metrics, listen, serve};
use protocol::{
    EvaluationRow, Generation, GpuFigures, MetricsRow, Note, Phases, Record, RunFacts, Statistics,
    Step, StepReport,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};
use wire::{Guard, Token};

fn phases(step: u64) -> Phases {
    Phases::from_values(std::array::from_fn(|phase| (step + phase as u64) as f64))
}

fn row(step: u64) -> MetricsRow {
    MetricsRow {
        report: StepReport {
            step,
            finite: step != 2,
            statistics: Statistics {
                loss: 0.5 * step as f64,
                log_ratios_chosen: f64::NAN,
                ..Statistics::default()
            },
            pairs: 32,
            tokens: 900,
            learning_rate: 1e-6,
            ..StepReport::default()
        },
        tokens_per_second: 3600.0,
        world_size: 2,
        generation: 3,
        seconds: 0.25,
        gpu: GpuFigures {
            memory_gib: Some(1.5),
            power_watts: Some(400.0),
            ..GpuFigures::default()
        },
        phases: phases(step),
    }
}

/// Value by series, `name{labels}`.
fn series(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let series = lines.map(|line| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    });
    series.collect()
}

fn note(kind: &'static str) -> Note {
    Note {
        kind,
        text: String::new(),
    }
}

#[test]
fn a_jobs_steps_evaluations_and_events_are_told_under_its_name() {
    let metrics = Metrics::new();
    let now = Instant::now();
    let job = metrics.job(now, "letters", None, None);
    let before = series(&metrics.text(now));
    assert_eq!(before["caldpo_step{job=\"letters\"}"], 0.0);
    assert!(
        !before.contains_key("caldpo_loss{job=\"letters\"}"),
        "{before:?}"
    );

    let facts = RunFacts {
        steps_total: 40,
        ..RunFacts::default()
    };
    job.record(&Record::Facts { facts });
    for step in 1..=3 {
        job.step(SystemTime::now(), &row(step));
    }
    let evaluation = EvaluationRow {
        step: 2,
        pairs: 7,
        statistics: Statistics {
            rewards_accuracies: 0.75,
            ..Statistics::default()
        },
    };
    job.evaluation(&evaluation);
    job.record(&Record::Checkpoint { step: Step(2) });
    let generation = Generation(3);
    let members = Vec::new();
    job.record(&Record::Generation {
        generation,
        members,
    });
    for kind in ["lost", "unsaved", "checkpoint", "go"] {
        job.note(&note(kind));
    }

    let text = metrics.text(now);
    let found = series(&text);
    for (name, value) in [
        ("job_running", 1.0),
        ("steps_planned", 40.0),
        ("step", 3.0),
        ("loss", 1.5),
        ("learning_rate", 1e-6),
        ("tokens_per_second", 3600.0),
        ("pairs_per_second", 128.0),
        ("generation", 3.0),
        ("world_size", 2.0),
        ("checkpoint_step", 2.0),
        ("eval_step", 2.0),
        ("eval_pairs", 7.0),
        ("eval_rewards_accuracies", 0.75),
        ("steps_total", 3.0),
        ("steps_skipped_total", 1.0),
        ("pairs_total", 96.0),
        ("tokens_total", 2700.0),
        ("evaluations_total", 1.0),
        ("checkpoints_total", 1.0),
        ("checkpoint_failures_total", 1.0),
        ("workers_lost_total", 1.0),
        ("rewinds_total", 0.0),
        ("step_duration_seconds_count", 3.0),
        ("step_duration_seconds_sum", 0.75),
        ("gpu_memory_bytes", 1.5 * f64::from(1 << 30)),
        ("gpu_power_watts", 400.0),
    ] {
        let name = format!("caldpo_{name}{{job=\"letters\"}}");
        assert_eq!(found.get(&name), Some(&value), "{name} in {text}");
    }
    for (phase, value) in phases(3).values() {
        let name = format!("caldpo_step_phase_seconds{{job=\"letters\",phase=\"{phase}\"}}");
        assert_eq!(found.get(&name), Some(&value), "{name} in {text}");
        assert!(!before.contains_key(&name), "{before:?}");
    }
    assert!(!text.contains("caldpo_gpu_mfu{"), "nobody told it: {text}");
    assert!(found["caldpo_log_ratios_chosen{job=\"letters\"}"].is_nan());
    assert!(found["caldpo_last_commit_timestamp_seconds{job=\"letters\"}"] > 1.6e9);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        found[&format!("caldpo_build_info{{version=\"{version}\"}}")],
        1.0
    );
    let quarter = "caldpo_step_duration_seconds_bucket{job=\"letters\",le=\"0.32\"}";
    assert_eq!(found.get(quarter), Some(&3.0), "{text}");
}

/// Prometheus' conventions: one prefix, a type and a help for every name, and only counters end with `_total`.
#[test]
fn names_follow_the_conventions() {
    let metrics = Metrics::new();
    let job = metrics.job(
        Instant::now(),
        "a",
        Some(&row(1)),
        Some(&EvaluationRow::default()),
    );
    job.step(SystemTime::now(), &row(2));
    job.record(&Record::Checkpoint { step: Step(2) });
    let text = metrics.text(Instant::now());
    let declared = |word: &str| -> BTreeMap<&str, &str> {
        let lines = text
            .lines()
            .filter_map(|line| line.strip_prefix(word)?.split_once(' '));
        lines.collect()
    };
    let (types, helps) = (declared("# TYPE "), declared("# HELP "));
    assert_eq!(
        types.keys().collect::<Vec<_>>(),
        helps.keys().collect::<Vec<_>>()
    );
    for (name, kind) in &types {
        assert!(name.starts_with("caldpo_"), "{name}");
        assert_eq!(
            name.ends_with("_total"),
            *kind == "counter",
            "{name} is a {kind}"
        );
    }
    let named: BTreeSet<String> = series(&text)
        .keys()
        .map(|series| {
            let name = series.split('{').next().unwrap();
            let parts = ["_bucket", "_sum", "_count"].iter();
            let mut whole = parts.filter_map(|part| name.strip_suffix(part));
            whole.next().unwrap_or(name).to_owned()
        })
        .collect();
    assert_eq!(named, types.keys().map(ToString::to_string).collect());
    // The bound that the module states.
    assert!(series(&text).len() < 80, "{}", series(&text).len());
}

#[test]
fn jobs_stand_beside_each_other_and_go_some_time_after_their_end() {
    let metrics = Metrics::new();
    let now = Instant::now();
    let first = metrics.job(now, "first", Some(&row(7)), None);
    let second = metrics.job(now, "second", None, None);
    second.step(SystemTime::now(), &row(1));
    let found = series(&metrics.text(now));
    assert_eq!(found["caldpo_step{job=\"first\"}"], 7.0);
    assert_eq!(
        found["caldpo_steps_total{job=\"first\"}"], 0.0,
        "this process saw none of them"
    );
    assert_eq!(found["caldpo_step{job=\"second\"}"], 1.0);

    drop(first);
    let ended = Instant::now();
    let found = series(&metrics.text(ended));
    assert_eq!(found["caldpo_job_running{job=\"first\"}"], 0.0);
    assert_eq!(found["caldpo_step{job=\"first\"}"], 7.0);
    let text = metrics.text(ended + KEPT_AFTER_END);
    assert!(!text.contains("first"), "{text}");
    assert!(text.contains("caldpo_step{job=\"second\"} 1"), "{text}");

    // A job of the same name takes the place; the old one's end does not end it.
    let again = metrics.job(ended, "second", None, None);
    drop(second);
    again.step(SystemTime::now(), &row(4));
    let found = series(&metrics.text(ended + Duration::from_hours(1)));
    assert_eq!(found["caldpo_job_running{job=\"second\"}"], 1.0);
    assert_eq!(found["caldpo_step{job=\"second\"}"], 4.0);
    assert_eq!(found["caldpo_steps_total{job=\"second\"}"], 1.0);
}

async fn get(address: &str, path: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn only_who_bears_the_token_reads_them_until_the_server_is_told_to_stop() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (stop, stopped) = oneshot::channel::<()>();
    let metrics = Metrics::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "secret\n").unwrap();
    let token = Token::read(file.path()).unwrap();
    let shutdown = async { drop(stopped.await) };
    let server = tokio::spawn(serve(
        listener,
        metrics.clone(),
        Guard::new(Some(&token)),
        shutdown,
    ));
    for headers in [
        "",
        "authorization: Bearer secre\r\n",
        "authorization: secret\r\n",
    ] {
        let answer = get(&address, "/metrics", headers).await;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{headers}: {answer}");
        assert!(answer.contains("security.token_file"), "{answer}");
        assert!(!answer.contains("caldpo_"), "{answer}");
    }
    let answer = get(&address, "/metrics", "authorization: bearer secret\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(
        answer.contains("content-type: text/plain; version=0.0.4"),
        "{answer}"
    );
    assert!(answer.contains("caldpo_build_info"), "{answer}");
    assert!(get(&address, "/", "").await.starts_with("HTTP/1.1 404 "));
    drop(stop);
    server.await.unwrap().unwrap();
    assert!(TcpStream::connect(&address).await.is_err());
}

#[tokio::test]
async fn a_port_in_use_is_refused_with_the_key_and_the_cure() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let refused = listen(Some(address), Guard::new(None)).await.err().unwrap();
    let text = format!("{refused:#}");
    for word in [
        &address.to_string(),
        "telemetry.metrics_listen",
        "another port",
        "in use",
    ] {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
    assert!(listen(None, Guard::new(None)).await.unwrap().is_none());
    let any = "127.0.0.1:0".parse().ok();
    let listening = listen(any, Guard::new(None)).await.unwrap().unwrap();
    let address = listening.url.strip_prefix("http://").unwrap();
    let (address, path) = address.split_once('/').unwrap();
    let answer = get(address, &format!("/{path}"), "").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

/// Labels by name of every series of a job that has all there is.
fn exported() -> BTreeMap<String, BTreeSet<String>> {
    let metrics = Metrics::new();
    let now = Instant::now();
    let job = metrics.job(now, "letters", None, Some(&EvaluationRow::default()));
    let mut row = row(1);
    row.gpu = GpuFigures {
        mfu: Some(0.4),
        memory_gib: Some(1.5),
        utilization: Some(0.9),
        temperature_celsius: Some(60.0),
        power_watts: Some(400.0),
        sm_clock_mhz: Some(1980.0),
    };
    job.step(SystemTime::now(), &row);
    job.record(&Record::Checkpoint { step: Step(1) });
    let mut labels: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for series in series(&metrics.text(now)).into_keys() {
        let (name, inside) = series.split_once('{').unwrap();
        let inside = inside.trim_end_matches('}').split(',');
        let names = inside.map(|label| label.split_once('=').unwrap().0.to_owned());
        labels.entry(name.to_owned()).or_default().extend(names);
    }
    labels
}

/// Values of `key`, and the objects that they are in, anywhere in `value`.
fn with_key<'a>(value: &'a Value, key: &str, found: &mut Vec<(&'a str, &'a Value)>) {
    match value {
        Value::Object(object) => {
            found.extend(
                object
                    .get(key)
                    .and_then(Value::as_str)
                    .map(|it| (it, value)),
            );
            object.values().for_each(|it| with_key(it, key, found));
        }
        Value::Array(list) => list.iter().for_each(|it| with_key(it, key, found)),
        _ => {}
    }
}

/// Every metric in an expression with the labels that it is selected by.
fn selections(expression: &str) -> Vec<(&str, Vec<&str>)> {
    let starts = expression.match_indices("caldpo_").map(|(start, _)| start);
    let selections = starts.map(|start| {
        let rest = &expression[start..];
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let (name, rest) = rest.split_at(end.unwrap_or(rest.len()));
        let inside = rest
            .strip_prefix('{')
            .and_then(|it| it.split_once('}'))
            .map_or("", |(inside, _)| inside);
        let labels = inside
            .split(',')
            .filter_map(|it| it.split(['=', '!']).next());
        let labels = labels.map(str::trim).filter(|it| !it.is_empty());
        (name, labels.collect())
    });
    selections.collect()
}

/// Labels between `before` and `after`, separated by commas, each time.
fn between<'a>(text: &'a str, before: &str, after: &str) -> Vec<&'a str> {
    let parts = text.split(before).skip(1);
    let lists = parts.filter_map(|part| part.split_once(after));
    let labels = lists.flat_map(|(labels, _)| labels.split(','));
    labels.map(str::trim).collect()
}

#[test]
fn the_dashboard_asks_for_what_is_exported_and_nothing_else() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/grafana/dashboard.json");
    let board: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let exported = exported();
    let known = |name: &str, label: &str, place: &str| {
        let labels = exported.get(name);
        let labels = labels.unwrap_or_else(|| panic!("nobody exports {name}: {place}"));
        assert!(labels.contains(label), "{name} has no {label}: {place}");
    };

    let mut asked = Vec::new();
    with_key(&board, "expr", &mut asked);
    assert!(asked.len() > 40, "{}", asked.len());
    let mut shown = BTreeSet::new();
    for (expression, target) in asked {
        let selections = selections(expression);
        assert!(!selections.is_empty(), "no metric: {expression}");
        for (name, labels) in selections {
            shown.insert(name);
            assert_eq!(labels, ["job"], "of all jobs: {expression}");
            let legend = target.get("legendFormat").or(target.get("titleFormat"));
            let legend = between(legend.and_then(Value::as_str).unwrap(), "{{", "}}");
            assert!(legend.contains(&"job"), "whose? {target}");
            let grouped = between(expression, " by (", ")");
            for label in labels.into_iter().chain(legend).chain(grouped) {
                // What makes a quantile of buckets has no `le` any more, and sums and counts beside them never had.
                if label != "le" || name.ends_with("_bucket") {
                    known(name, label, expression);
                }
            }
        }
    }
    let mut asked = Vec::new();
    with_key(&board, "definition", &mut asked);
    assert_eq!(asked.len(), 1, "variables");
    let values = between(asked[0].0, "label_values(", ")");
    known(values[0], values[1], asked[0].0);

    // What is exported and not shown is so on purpose.
    let hidden = exported.keys().filter(|it| !shown.contains(it.as_str()));
    let hidden: Vec<&str> = hidden
        .map(|it| it.strip_prefix("caldpo_").unwrap())
        .collect();
    let expected = [
        "build_info",
        "epoch",
        "eval_logps_chosen",
        "eval_logps_rejected",
        "eval_loss_calibration",
        "eval_loss_pairwise",
        "eval_pairs",
        "eval_rewards_chosen",
        "eval_rewards_rejected",
        "eval_step",
        "logps_chosen",
        "logps_rejected",
        "pairs_total",
        "steps_total",
        "tokens_total",
    ];
    assert_eq!(hidden, expected);
}

/// What Grafana needs to open it without asking, from its UI and from a file.
#[test]
fn the_dashboard_can_be_imported_and_provisioned() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/grafana/dashboard.json");
    let board: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(board["id"], Value::Null, "a number belongs to one Grafana");
    assert!(board.get("__inputs").is_none(), "a file cannot be asked");
    assert!(board["schemaVersion"].as_u64().unwrap() >= 39);
    let variables = board["templating"]["list"].as_array().unwrap();
    let kinds = variables.iter().map(|it| (&it["name"], &it["type"]));
    let kinds: Vec<String> = kinds.map(|(name, kind)| format!("{name} {kind}")).collect();
    assert_eq!(kinds, [r#""datasource" "datasource""#, r#""job" "query""#]);
    let mut sources = Vec::new();
    with_key(&board, "uid", &mut sources);
    for (uid, source) in sources
        .into_iter()
        .filter(|it| it.1["type"] == "prometheus")
    {
        assert_eq!(uid, "${datasource}", "{source}");
    }
    let panels = board["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{}", panel["id"]);
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|it| panel["gridPos"][it].as_u64().unwrap());
        assert!(x + w <= 24, "{}", panel["title"]);
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(taken.insert(cell), "{} lies on another", panel["title"]);
        }
        let row = panel["type"] == "row";
        assert_eq!(row, panel.get("targets").is_none(), "{}", panel["title"]);
    }
}
