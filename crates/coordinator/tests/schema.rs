//! The JSON Schema of configuration files: what it accepts and refuses, and that it names the keys that loading knows.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{collections::BTreeSet, fs, path::Path};

use coordinator::config::{Config, Sources, schema};
use jsonschema::Validator;
use serde_json::Value;
use toml::Table;

/// The least that a job needs, as `--set` says it.
const LEAST: [&str; 2] = ["model.path=m", "data.train=[\"t.jsonl\"]"];

fn validator() -> Validator {
    jsonschema::draft202012::new(&schema()).unwrap()
}

fn json(text: &str) -> Value {
    let table: Table = text.parse().unwrap();
    serde_json::to_value(table).unwrap()
}

/// What the schema has against `text`, each with the place.
fn complaints(validator: &Validator, text: &str) -> Vec<String> {
    let instance = json(text);
    let errors = validator.iter_errors(&instance);
    errors
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect()
}

fn load(set: &[&str]) -> Result<String, String> {
    let sources = Sources {
        set: LEAST.iter().chain(set).map(|text| (*text).into()).collect(),
        ..Sources::default()
    };
    Config::load(&sources)
        .map(|config| config.to_toml())
        .map_err(|error| error.to_string())
}

/// Dotted paths of all values below `value`.
fn leaves(path: &str, value: &toml::Value, into: &mut BTreeSet<String>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                leaves(&join(path, key), value, into);
            }
        }
        _ => drop(into.insert(path.to_owned())),
    }
}

fn printed(text: &str) -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    leaves("", &toml::Value::Table(text.parse().unwrap()), &mut keys);
    keys
}

/// A key of the schema: its path, its schema, and the kind of objective or adapter that has it, if only one has.
struct Key {
    path: String,
    schema: Value,
    kind: Option<String>,
}

fn keys(path: &str, schema: &Value, kind: Option<&str>, into: &mut Vec<Key>) {
    let kinds = schema["oneOf"].as_array().into_iter().flatten();
    let objects: Vec<_> = kinds.filter(|it| it.get("properties").is_some()).collect();
    for object in &objects {
        let kind = object["properties"]["kind"]["const"].as_str();
        keys(path, object, kind, into);
    }
    if let Some(properties) = schema["properties"].as_object() {
        for (key, schema) in properties {
            keys(&join(path, key), schema, kind, into);
        }
    } else if objects.is_empty() {
        into.push(Key {
            path: path.to_owned(),
            schema: schema.clone(),
            kind: kind.map(str::to_owned),
        });
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// Some value that the key takes: its default, the first of its choices, or the least of its type.
fn sample(schema: &Value) -> String {
    let choice = &schema["oneOf"][0]["const"];
    if let Some(value) = schema
        .get("default")
        .or(schema.get("const"))
        .or(Some(choice).filter(|choice| choice.is_string()))
    {
        return value.to_string();
    }
    if let Some(choice) = schema["enum"].get(0) {
        return choice.to_string();
    }
    match schema["type"].as_str() {
        Some("integer") => schema["minimum"].as_u64().unwrap_or(1).max(1).to_string(),
        Some("number") => "0.5".into(),
        Some("string") => "\"some\"".into(),
        Some("array") if schema["items"]["enum"].is_array() => {
            format!("[{}]", sample(&schema["items"]))
        }
        Some("array") => "[\"some\"]".into(),
        Some("boolean") => "true".into(),
        other => panic!("no sample of type {other:?}"),
    }
}

#[test]
fn the_schema_is_one_by_its_own_draft_and_describes_every_key() {
    let schema = schema();
    jsonschema::draft202012::meta::validate(&schema).unwrap();
    let mut found = Vec::new();
    keys("", &schema, None, &mut found);
    assert!(found.len() > 40, "{} keys", found.len());
    for Key { path, schema, .. } in found {
        let described = schema["description"]
            .as_str()
            .is_some_and(|it| it.len() > 3);
        assert!(
            described || ["objective.kind", "adapter.kind"].contains(&path.as_str()),
            "{path}: no description"
        );
    }
}

#[test]
fn every_configuration_of_this_repository_is_accepted() {
    let validator = validator();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            let found = complaints(&validator, &fs::read_to_string(&path).unwrap());
            assert!(found.is_empty(), "{}: {found:?}", path.display());
            seen += 1;
        }
    }
    assert!(seen >= 7, "{seen} configurations");
}

#[test]
fn what_loading_prints_is_accepted() {
    let validator = validator();
    for set in [
        &["objective.kind=dpo", "train.steps=3"][..],
        &[
            "objective.kind=sft",
            "train.epochs=2",
            "schedule.warmup_steps=0",
        ],
        &[SOME_PARTS, "objective.kind=mix"],
        &[
            "objective.kind=dpo",
            "objective.divergence=alpha_divergence",
            "objective.alpha=0.25",
        ],
        &["objective.kind=simpo"],
        &[
            "cluster.threads=1",
            "evaluate.every_steps=1",
            "schedule.warmup_ratio=1",
        ],
        &["optimizer.kind=rmsprop"],
        &["adapter.kind=lora", "adapter.targets=[\"q_proj\"]"],
        &["adapter.kind=peft", "adapter.path=some"],
        &["objective.kind=kto", "model.dtype=bf16"],
    ] {
        let found = complaints(&validator, &load(set).unwrap());
        assert!(found.is_empty(), "{set:?}: {found:?}");
    }
}

#[test]
fn what_loading_refuses_is_refused_with_its_place() {
    let validator = validator();
    for (text, set, place) in [
        (
            "[objective]\nkind = \"cal_dpo\"\nbetta = 0.1",
            "",
            "/objective",
        ),
        ("[cluster]\nwokers = 2", "cluster.wokers=2", "/cluster"),
        ("[optimiser]\neps = 1e-8", "optimiser.eps=1e-8", ""),
        (
            "[data.columns]\nchoosen = \"a\"",
            "data.columns.choosen=a",
            "/data",
        ),
        (
            "[train]\nsteps = \"many\"",
            "train.steps=many",
            "/train/steps",
        ),
        (
            "[model]\npath = \"m\"\ndtype = \"fp16\"",
            "model.dtype=fp16",
            "/model/dtype",
        ),
        (
            "[objective]\nkind = \"caldpo\"",
            "objective.kind=caldpo",
            "/objective",
        ),
        (
            "[objective]\nkind = \"cal_dpo\"\nbeta = 0",
            "",
            "/objective",
        ),
        ("[objective]\nkind = \"dpo\"\nbeta = -0.1", "", "/objective"),
        (
            "[objective]\nkind = \"dpo\"\nlabel_smoothing = 0.5",
            "",
            "/objective",
        ),
        ("[objective]\nkind = \"sft\"\nbeta = 0.1", "", "/objective"),
        (
            "[objective]\nkind = \"exo_pair\"\nlabel_smoothing = 0",
            "",
            "/objective",
        ),
        (
            "[objective]\nkind = \"dpo\"\ndivergence = \"kl\"",
            "",
            "/objective",
        ),
        ("[objective]\nkind = \"mix\"\nparts = []", "", "/objective"),
        (
            "[objective]\nkind = \"mix\"\nparts = [{ kind = \"dpo\", betta = 1 }]",
            "",
            "/objective",
        ),
        (
            "[objective]\nkind = \"mix\"\nparts = [{ kind = \"mix\", parts = [] }]",
            "",
            "/objective",
        ),
        (
            "[optimizer]\nlearning_rate = 0",
            "optimizer.learning_rate=0",
            "/optimizer",
        ),
        (
            "[optimizer]\nbetas = [0.9, 1.0]",
            "optimizer.betas=[0.9, 1.0]",
            "/optimizer",
        ),
        (
            "[optimizer]\nbetas = [0.9]",
            "optimizer.betas=[0.9]",
            "/optimizer",
        ),
        (
            "[optimizer]\nmax_grad_norm = -1",
            "optimizer.max_grad_norm=-1",
            "/optimizer",
        ),
        (
            "[schedule]\nwarmup_ratio = 1.5",
            "schedule.warmup_ratio=1.5",
            "/schedule",
        ),
        ("[train]\nsteps = 1\nepochs = 1", "", "/train"),
        ("[train]\nbatch_pairs = 0", "train.batch_pairs=0", "/train"),
        (
            "[train]\nskipped_steps_max = 0",
            "train.skipped_steps_max=0",
            "/train",
        ),
        (
            "[evaluate]\nevery_steps = 0",
            "evaluate.every_steps=0",
            "/evaluate",
        ),
        (
            "[checkpoint]\nkeep_last = 0",
            "checkpoint.keep_last=0",
            "/checkpoint",
        ),
        (
            "[cluster]\nworkers = 0",
            "cluster.workers=0",
            "/cluster/workers",
        ),
        (
            "[cluster]\nstep_timeout_seconds = 0",
            "cluster.step_timeout_seconds=0",
            "/cluster",
        ),
        ("[job]\nname = \"a/b\"", "job.name=a/b", "/job/name"),
        (
            "[job]\npreset = \"cal-dpo\"",
            "job.preset=cal-dpo",
            "/job/preset",
        ),
        (
            "[optimizer]\nkind = \"adam\"",
            "optimizer.kind=adam",
            "/optimizer/kind",
        ),
        (
            "[optimizer]\nkind = \"rmsprop\"\nalpha = 1.0",
            "",
            "/optimizer/alpha",
        ),
        ("[job]\nname = \".a\"", "job.name=.a", "/job/name"),
        ("[job]\npriority = 101", "job.priority=101", "/job/priority"),
        ("[job]\nmax_hours = 0", "job.max_hours=0", "/job/max_hours"),
        (
            "[job]\nmax_attempts = 0",
            "job.max_attempts=0",
            "/job/max_attempts",
        ),
        ("[data]\ntrain = []", "data.train=[]", "/data"),
        (
            "[data]\ntrain = [\"t\"]\nmax_length = 1",
            "data.max_length=1",
            "/data/max_length",
        ),
        (
            "[reference]\nstore = \"\"",
            "reference.store=\"\"",
            "/reference",
        ),
    ] {
        let found = complaints(&validator, text);
        let placed = found
            .iter()
            .any(|it| it.starts_with(&format!("{place}/")) || it.starts_with(&format!("{place}:")));
        assert!(placed, "{text}: {found:?}");
        if !set.is_empty() {
            assert!(load(&[set]).is_err(), "{set} loads");
        }
    }
}

const SOME_PARTS: &str = "objective.parts=[{kind = \"dpo\"}, {kind = \"sft\", weight = 0.5}]";

/// What must be said for a key to have a meaning.
fn context(path: &str) -> Vec<&'static str> {
    let evaluated = ["data.eval=['e.jsonl']", "evaluate.every_steps=1"];
    let more: &[&str] = match path {
        "evaluate.metric" => &[],
        "checkpoint.keep_best" | "evaluate.early_stopping_patience" => &["evaluate.metric=loss"],
        "evaluate.early_stopping_min_delta" => {
            &["evaluate.metric=loss", "evaluate.early_stopping_patience=1"]
        }
        "evaluate.higher_is_better" => &["evaluate.metric=logps/rejected"],
        "cluster.max_workers" => return vec!["cluster.workers=1"],
        // A sample is half a second, which has its place on a ladder of short timeouts.
        "cluster.abort_timeout_seconds" | "cluster.collective_timeout_seconds" => {
            return vec!["cluster.heartbeat_timeout_seconds=0.1"];
        }
        "cluster.join_timeout_seconds" => {
            return vec![
                "cluster.heartbeat_timeout_seconds=0.1",
                "cluster.step_timeout_seconds=0.4",
            ];
        }
        "cluster.job_timeout_seconds" => {
            return vec![
                "cluster.heartbeat_timeout_seconds=0.1",
                "cluster.step_timeout_seconds=0.3",
                "cluster.join_timeout_seconds=0.4",
            ];
        }
        "cluster.offload" => return vec!["model.dtype=bf16"],
        "objective.alpha" => return vec!["objective.divergence=alpha_divergence"],
        "optimizer.alpha" => return vec!["optimizer.kind=rmsprop"],
        _ => return Vec::new(),
    };
    evaluated.iter().chain(more).copied().collect()
}

#[test]
fn every_key_that_loading_prints_is_in_the_schema_and_every_key_of_the_schema_loads() {
    let mut found = Vec::new();
    keys("", &schema(), None, &mut found);
    let named: BTreeSet<String> = found.iter().map(|key| key.path.clone()).collect();
    for key in printed(&load(&[]).unwrap()) {
        assert!(
            named.contains(&key),
            "{key} is printed and not in the schema"
        );
    }
    for Key { path, schema, kind } in found {
        if path == "cluster.state" {
            continue; // the one key that only `--cluster` takes
        }
        let mixes = kind.as_deref() == Some("mix");
        let value = match path.as_str() {
            "objective.parts" => SOME_PARTS.trim_start_matches("objective.parts=").into(),
            "telemetry.metrics_listen" => "127.0.0.1:0".into(),
            // One for each of the two workers.
            "cluster.gpus" => "[0, 1]".into(),
            _ => sample(&schema),
        };
        let key = format!("{path}={value}");
        let kind = kind.map(|kind| {
            let section = path.split('.').next().unwrap_or_default();
            format!("{section}.kind={kind}")
        });
        // The one kind that needs another key.
        let peft = kind.as_deref() == Some("adapter.kind=peft");
        let set: Vec<&str> = kind
            .iter()
            .map(String::as_str)
            .chain(mixes.then_some(&SOME_PARTS).copied())
            .chain(peft.then_some("adapter.path=some"))
            .chain(context(&path))
            .chain([key.as_str()])
            .collect();
        let text = load(&set).unwrap_or_else(|error| panic!("{key}: {error}"));
        if path == "job.preset" {
            continue; // its values are printed in its place
        }
        assert!(printed(&text).contains(&path), "{key} is not printed");
    }
}

#[test]
fn a_default_of_the_schema_is_what_loading_fills_in() {
    let mut found = Vec::new();
    keys("", &schema(), None, &mut found);
    let loaded = json(&load(&[]).unwrap());
    for Key { path, schema, kind } in found {
        if kind.is_some_and(|kind| kind != "cal_dpo") {
            continue;
        }
        if let Some(default) = schema.get("default") {
            let pointer = format!("/{}", path.replace('.', "/"));
            let got = loaded.pointer(&pointer).cloned().unwrap_or_default();
            let same = match (got.as_f64(), default.as_f64()) {
                (Some(got), Some(default)) => got == default,
                _ => got == *default,
            };
            assert!(same, "{path}: {got}, the schema says {default}");
        }
    }
}
