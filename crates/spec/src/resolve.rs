//! A job's configuration as a worker reads it: the sections that define training, from resolved TOML to [`Spec`] and back.
//!
//! The coordinator keeps its own sections (`[checkpoint]`, `[cluster]`, …) to itself and hands the rest here, once to check
//! a job before anything starts and once in every worker.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use toml::Table;

use crate::sections::Spec;

/// Sections of a job that training reads, in the order in which they are written out.
pub const SECTIONS: [&str; 9] = [
    "model",
    "adapter",
    "data",
    "objective",
    "reference",
    "optimizer",
    "schedule",
    "train",
    "evaluate",
];

/// Sections whose change makes another run; with the seed they are a run's identity.
const IDENTITY: [&str; 7] = [
    "model",
    "adapter",
    "data",
    "objective",
    "optimizer",
    "schedule",
    "train",
];

/// A checked job.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// What the trainer takes.
    pub spec: Spec,
    /// The same as TOML sections with all defaults filled in.
    pub resolved: Table,
    /// What makes this run another run if it changes.
    pub identity: Value,
}

/// A key that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct JobError {
    /// Dotted path of the key.
    pub key: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct JobSection {
    #[serde(default)]
    seed: u64,
}

/// Checks `[job] seed` and the sections that define training, and fills in defaults.
///
/// # Errors
/// The first key that is unknown, of a wrong type, or impossible.
pub fn resolve(sections: &Table) -> Result<Resolved, JobError> {
    let mut table = sections.clone();
    let job = table.remove("job").unwrap_or_else(|| Table::new().into());
    let job: JobSection = deserialize("job", job)?;
    let seed = i64::try_from(job.seed).map_err(|_| JobError {
        key: "job.seed".into(),
        reason: format!("must be below 2^63, got {}", job.seed),
    })?;
    for (name, value) in &table {
        if !SECTIONS.contains(&name.as_str()) {
            return Err(JobError {
                key: name.clone(),
                reason: format!("unknown section{}", nearest(name, &SECTIONS)),
            });
        }
        if !value.is_table() {
            return Err(JobError {
                key: name.clone(),
                reason: format!("must be a section, got {}", value.type_str()),
            });
        }
    }
    table.insert("seed".into(), seed.into());
    let spec: Spec = deserialize("", table.into())?;
    spec.validate().map_err(|error| JobError {
        key: error.key,
        reason: error.reason,
    })?;

    let mut resolved = Table::try_from(&spec).map_err(|error| JobError {
        key: "job".into(),
        reason: error.to_string(),
    })?;
    resolved.remove("seed");
    resolved.insert(
        "job".into(),
        Table::from_iter([("seed".into(), seed.into())]).into(),
    );
    let mut identity = serde_json::Map::new();
    for name in IDENTITY {
        // A section that is optional and absent is no difference to runs from before it was known.
        let section = resolved.get(name).map(serde_json::to_value);
        if let Some(mut section) = section.and_then(Result::ok) {
            if let Some(keys) = section.as_object_mut() {
                // Where tokens are kept, and how often ranks are compared, has no part in what is computed.
                match name {
                    "data" => drop(keys.remove("cache")),
                    "train" => drop(keys.remove("compare_every_steps")),
                    _ => {}
                }
            }
            identity.insert(name.into(), section);
        }
    }
    // AdamW was once the only one, and the runs of that time are still the same runs.
    if let Some(Value::Object(optimizer)) = identity.get_mut("optimizer")
        && optimizer.get("kind").is_some_and(|kind| kind == "adamw")
    {
        optimizer.remove("kind");
    }
    identity.insert("seed".into(), job.seed.into());
    Ok(Resolved {
        spec,
        resolved,
        identity: identity.into(),
    })
}

/// The spec of a job's resolved configuration text, as the coordinator sends it.
///
/// # Errors
/// Text that is not TOML; what [`resolve`] refuses.
pub fn parse(text: &str) -> Result<Spec, JobError> {
    let table = text.parse::<Table>().map_err(|error| JobError {
        key: "configuration".into(),
        reason: error.to_string(),
    })?;
    resolve(&table).map(|resolved| resolved.spec)
}

fn deserialize<T: for<'de> Deserialize<'de>>(
    section: &str,
    value: toml::Value,
) -> Result<T, JobError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let key = [section, &path]
            .into_iter()
            .filter(|part| !part.is_empty() && *part != ".")
            .collect::<Vec<_>>()
            .join(".");
        explain(key, &error.into_inner().to_string())
    })
}

/// Turns serde's words into key and reason; an unknown field becomes part of the key, with the nearest valid name.
fn explain(key: String, message: &str) -> JobError {
    // toml adds lines that repeat the place.
    let message = message.trim().lines().next().unwrap_or_default();
    // What is read behind serde's back, whose path ends at the section then, says its place itself: a mix's parts, and keys
    // that belong to another kind of optimizer.
    let has_place = message.starts_with("parts[")
        || (key == "optimizer" && !message.starts_with("unknown field"));
    if has_place && let Some((place, message)) = message.split_once(": ") {
        return explain(format!("{key}.{place}"), message);
    }
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let Some((field, valid)) = quoted.split_first() else {
        return JobError {
            key,
            reason: message.into(),
        };
    };
    if message.starts_with("unknown field") {
        // serde's path already ends in the field for structs, but not for tagged enums.
        let key = if key.ends_with(*field) {
            key
        } else if key.is_empty() {
            (*field).to_owned()
        } else {
            format!("{key}.{field}")
        };
        return JobError {
            key,
            reason: format!("unknown key{}", nearest(field, valid)),
        };
    }
    if message.starts_with("unknown variant") {
        return JobError {
            key,
            reason: format!("`{field}` is not a choice{}", nearest(field, valid)),
        };
    }
    if message.starts_with("missing field") {
        return JobError {
            key: if key.is_empty() {
                (*field).to_owned()
            } else {
                format!("{key}.{field}")
            },
            reason: "is required and missing".into(),
        };
    }
    JobError {
        key,
        reason: message.into(),
    }
}

/// `; did you mean X?` when a name is near, and the list of what is valid.
fn nearest(name: &str, valid: &[&str]) -> String {
    let near = valid
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .filter(|(distance, _)| *distance <= 3)
        .min();
    let hint = near.map_or(String::new(), |(_, name)| {
        format!("; did you mean `{name}`?")
    });
    if valid.is_empty() {
        return hint;
    }
    format!("{hint} (valid: {})", valid.join(", "))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{Table, resolve};

    const SMALL: &str = r#"
        [job]
        seed = 7
        [model]
        path = "model"
        [data]
        train = ["train.jsonl"]
        [objective]
        kind = "cal_dpo"
        [reference]
        store = "cache"
        [train]
        steps = 3
    "#;

    fn table(text: &str) -> Table {
        text.parse().unwrap()
    }

    fn refused(text: &str) -> String {
        resolve(&table(text)).unwrap_err().to_string()
    }

    #[test]
    fn a_resolved_job_resolves_to_itself() {
        let first = resolve(&table(SMALL)).unwrap();
        let again = resolve(&first.resolved).unwrap();
        assert_eq!(first.resolved, again.resolved);
        assert_eq!(first.identity, again.identity);
        assert_eq!(first.spec.seed, 7);
    }

    #[test]
    fn what_only_watches_makes_no_other_run() {
        let first = resolve(&table(SMALL)).unwrap();
        let watched = SMALL.replace("steps = 3", "steps = 3\ncompare_every_steps = 1");
        let watched = resolve(&table(&watched)).unwrap();
        assert_eq!(watched.spec.train.compare_every_steps, 1);
        assert_eq!(watched.identity, first.identity);
        let other = resolve(&table(&SMALL.replace("steps = 3", "steps = 4"))).unwrap();
        assert_ne!(other.identity, first.identity);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_path_and_the_nearest_valid_one() {
        let text = SMALL.replace("kind = \"cal_dpo\"", "kind = \"cal_dpo\"\nbetta = 0.1");
        let error = refused(&text);
        assert!(error.contains("objective.betta"), "{error}");
        assert!(error.contains("did you mean `beta`"), "{error}");
        let error = refused(&SMALL.replace("steps = 3", "stebs = 3"));
        assert!(error.contains("train.stebs"), "{error}");
        assert!(error.ends_with("compare_every_steps)"), "{error}");
        assert!(error.contains("did you mean `steps`"), "{error}");
        let error = refused(&format!("{SMALL}\n[optimiser]\nlearning_rate = 1e-4"));
        assert!(error.contains("did you mean `optimizer`"), "{error}");
    }

    #[test]
    fn wrong_types_and_impossible_values_are_named() {
        let error = refused(&SMALL.replace("steps = 3", "steps = \"three\""));
        assert!(error.starts_with("train.steps: "), "{error}");
        let error = refused(&SMALL.replace("kind = \"cal_dpo\"", "kind = \"cal_dpo\"\nbeta = 0.0"));
        assert!(error.starts_with("objective.beta: "), "{error}");
        let error = refused(&SMALL.replace("cal_dpo", "caldpo"));
        assert!(error.contains("did you mean `cal_dpo`"), "{error}");
    }

    #[test]
    fn a_key_of_another_optimizer_is_refused_with_its_path() {
        let with = |keys: &str| format!("{SMALL}\n[optimizer]\n{keys}");
        for (keys, says) in [
            (
                "kind = \"rmsprop\"\nbetas = [0.9, 0.99]",
                "optimizer.betas: belongs to optimizer.kind = \"adamw\"",
            ),
            (
                "kind = \"rmsprop\"\nweight_decay = 0.1",
                "optimizer.weight_decay: rmsprop has none, got 0.1",
            ),
            (
                "alpha = 0.9",
                "optimizer.alpha: belongs to optimizer.kind = \"rmsprop\"",
            ),
            (
                "kind = \"rmsprop\"\nalpha = 1.0",
                "optimizer.alpha: must be at least 0 and below 1",
            ),
            (
                "kind = \"rmsprob\"",
                "optimizer.kind: `rmsprob` is not a choice; did you mean `rmsprop`",
            ),
            (
                "epps = 1",
                "optimizer.epps: unknown key; did you mean `eps`",
            ),
            ("betas = [0.9]", "optimizer.betas: invalid length 1"),
            ("eps = \"small\"", "optimizer.eps: invalid type: string"),
        ] {
            let error = refused(&with(keys));
            assert!(error.starts_with(says), "{error}");
        }
    }

    #[test]
    fn an_optimizer_resolves_to_the_keys_of_its_kind() {
        for (keys, resolved) in [
            (
                "",
                "betas eps kind learning_rate max_grad_norm weight_decay",
            ),
            (
                "[optimizer]\nkind = \"rmsprop\"\nweight_decay = 0\nalpha = 0.5",
                "alpha eps kind learning_rate max_grad_norm",
            ),
        ] {
            let first = resolve(&table(&format!("{SMALL}\n{keys}"))).unwrap();
            let section = first.resolved["optimizer"].as_table().unwrap();
            let mut found: Vec<&str> = section.keys().map(String::as_str).collect();
            found.sort_unstable();
            assert_eq!(found.join(" "), resolved);
            let again = resolve(&first.resolved).unwrap();
            assert_eq!(again.spec, first.spec);
            assert_eq!(again.identity, first.identity);
        }
    }

    #[test]
    fn a_run_with_adamw_is_the_run_that_it_was_when_there_was_no_other_kind() {
        let identity = |keys: &str| resolve(&table(&format!("{SMALL}{keys}"))).unwrap().identity;
        let adamw = serde_json::json!({
            "learning_rate": 5e-7, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0,
        });
        assert_eq!(identity("")["optimizer"], adamw);
        let rmsprop = identity("\n[optimizer]\nkind = \"rmsprop\"");
        assert_eq!(rmsprop["optimizer"]["kind"], "rmsprop");
    }

    #[test]
    fn a_mix_resolves_to_itself_and_a_wrong_part_is_named() {
        let mixed =
            |parts: &str| SMALL.replace("\"cal_dpo\"", &format!("\"mix\"\nparts = [{parts}]"));
        let text = mixed("{ kind = \"dpo\", beta = 0.3 }, { kind = \"sft\", weight = 0.5 }");
        let first = resolve(&table(&text)).unwrap();
        let again = resolve(&first.resolved).unwrap();
        assert_eq!(first.resolved, again.resolved);
        assert_eq!(first.identity["objective"]["parts"][1]["weight"], 0.5);
        for (parts, says) in [
            (
                "{ kind = \"sft\" }, { kind = \"dpo\", betta = 1 }",
                "objective.parts[1].betta: unknown key; did you mean `beta`",
            ),
            (
                "{ kind = \"dpoo\" }",
                "objective.parts[0]: `dpoo` is not a choice; did you mean `dpo`",
            ),
            ("{ beta = 1 }", "objective.parts[0].kind: is required"),
            (
                "{ kind = \"dpo\", beta = 0 }",
                "objective.parts[0].beta: must be",
            ),
            (
                "{ kind = \"dpo\", weight = -1 }",
                "objective.parts[0].weight: must be",
            ),
            (
                "{ kind = \"mix\", parts = [] }",
                "objective.parts[0].kind: a mix is no part",
            ),
            ("", "objective.parts: is empty"),
        ] {
            let error = refused(&mixed(parts));
            assert!(error.starts_with(says), "{error}");
        }
    }
}
