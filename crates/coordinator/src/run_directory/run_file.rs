//! `run.json`: what makes this run this run. Another run's directory is refused by it.

use std::{collections::BTreeMap, path::Path};

use protocol::RunFacts;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use storage::atomic_write;

use super::{RunDirectoryError, error::Difference};

/// Content of `run.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RunFile {
    /// Version of the program that began the run.
    tool_version: String,
    /// Drawn when the run began: tells it from others of the same configuration. Empty where an older version began it.
    #[serde(default)]
    id: String,
    /// The configuration that defines the run.
    identity: Value,
    /// What the workers found: digests of weights, tokenizer and data, and counts. Absent until they have loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    facts: Option<Value>,
}

impl RunFile {
    pub(super) fn new(identity: &Value, id: String) -> Self {
        Self {
            tool_version: env!("CARGO_PKG_VERSION").into(),
            id,
            identity: identity.clone(),
            facts: None,
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The same run under an id, where an older version gave it none.
    pub(super) fn with_id(self, id: String) -> Self {
        Self { id, ..self }
    }

    /// `None` where there is none.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, RunDirectoryError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                let path = path.to_owned();
                return Err(RunDirectoryError::Read { path, source });
            }
        };
        let parsed = serde_json::from_str(&text);
        parsed
            .map(Some)
            .map_err(|error| RunDirectoryError::DamagedRunFile {
                path: path.to_owned(),
                reason: error.to_string(),
            })
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), RunDirectoryError> {
        let mut text = serde_json::to_string_pretty(self).expect("JSON values are JSON");
        text.push('\n');
        Ok(atomic_write(path, text.as_bytes())?)
    }

    /// Keys in which this run and another identity differ.
    pub(super) fn differences(&self, identity: &Value) -> Vec<Difference> {
        differences(&self.identity, identity)
    }

    /// Takes the workers' facts in, or says where they differ from those of an earlier time.
    pub(super) fn agree(&mut self, facts: &RunFacts) -> Result<(), Vec<Difference>> {
        let mut found = serde_json::to_value(facts).expect("facts are JSON");
        // Where the run stands is not what it is.
        if let Some(fields) = found.as_object_mut() {
            fields.remove("committed");
        }
        if let Some(known) = &self.facts {
            let differing = differences(known, &found);
            if !differing.is_empty() {
                return Err(differing);
            }
        }
        self.facts = Some(found);
        Ok(())
    }
}

fn differences(there: &Value, here: &Value) -> Vec<Difference> {
    let (mut old, mut new) = (BTreeMap::new(), BTreeMap::new());
    flatten("", there, &mut old);
    flatten("", here, &mut new);
    let keys: std::collections::BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let shown = |value: Option<&Value>| value.map_or_else(|| "absent".into(), Value::to_string);
    keys.into_iter()
        .filter(|key| old.get(*key) != new.get(*key))
        .map(|key| Difference {
            key: key.clone(),
            there: shown(old.get(key)),
            here: shown(new.get(key)),
        })
        .collect()
}

fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                let key = if prefix.is_empty() {
                    name.clone()
                } else {
                    format!("{prefix}.{name}")
                };
                flatten(&key, field, into);
            }
        }
        leaf => {
            into.insert(prefix.to_owned(), leaf.clone());
        }
    }
}
