//! What trackers are told of a run besides its rows: names, the resolved configuration, and an id that no other run has.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use storage::atomic_write;
use toml::{Table, Value};

use super::{TrackerError, files};
use crate::config::{Config, TelemetrySection};
use crate::random;

/// Letters of an id, and of its beginning where a short one is usual.
const ID: usize = 32;
const SHORT: usize = 8;

/// A run as trackers see it.
#[derive(Clone, Debug)]
pub struct Description {
    /// `job.name`.
    pub name: String,
    /// 32 hexadecimal letters.
    pub id: String,
    /// Digest of what defines the run.
    pub run_digest: String,
    /// The run directory, absolute.
    pub output: PathBuf,
    /// Where trackers write, absolute, and under which names.
    pub telemetry: TelemetrySection,
    /// The resolved configuration, but for `[telemetry]`.
    pub sections: Table,
}

/// `trackers.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Identity {
    /// This run's id in all trackers.
    id: String,
}

impl Description {
    /// Describes `config`'s run; `trackers.json` in its directory keeps the id.
    ///
    /// # Errors
    /// That file cannot be read or written.
    pub(super) fn of(config: &Config) -> Result<Self, TrackerError> {
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|source| TrackerError::Read {
                path: path.to_owned(),
                source,
            })
        };
        let output = absolute(&config.job.output)?;
        let mut telemetry = config.telemetry.clone();
        for folder in [
            &mut telemetry.tensorboard_folder,
            &mut telemetry.wandb_folder,
            &mut telemetry.mlflow_folder,
        ] {
            *folder = absolute(folder)?;
        }
        let text = config.to_toml();
        let mut sections: Table = toml::from_str(&text).expect("a resolved configuration is TOML");
        sections.remove("telemetry");
        Ok(Self {
            name: config.job.name.clone(),
            id: id(&output.join("trackers.json"))?,
            run_digest: config.run_digest(),
            output,
            telemetry,
            sections,
        })
    }

    /// The id where a short one is usual.
    pub(super) fn short_id(&self) -> &str {
        &self.id[..SHORT]
    }

    /// Every value of the configuration by its dotted path.
    pub(super) fn parameters(&self) -> Vec<(String, &Value)> {
        let mut parameters = Vec::new();
        flatten("", &self.sections, &mut parameters);
        parameters
    }
}

/// A value as people type it; texts without quotes.
pub(super) fn plain_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn flatten<'a>(prefix: &str, table: &'a Table, into: &mut Vec<(String, &'a Value)>) {
    for (name, value) in table {
        let path = format!("{prefix}{name}");
        match value {
            Value::Table(table) => flatten(&format!("{path}."), table, into),
            leaf => into.push((path, leaf)),
        }
    }
}

/// Reads the id in the file at `path`, or draws one and writes it there.
fn id(path: &Path) -> Result<String, TrackerError> {
    let Some(text) = files::text(path)? else {
        let id = random::hexadecimal::<{ ID / 2 }>().map_err(|source| TrackerError::Read {
            path: "random bytes".into(),
            source,
        })?;
        let text = serde_json::json!({"id": id});
        atomic_write(path, format!("{text}\n").as_bytes())?;
        return Ok(id);
    };
    let hexadecimal = |id: &str| id.len() == ID && id.bytes().all(|it| it.is_ascii_hexdigit());
    match serde_json::from_str::<Identity>(&text) {
        Ok(Identity { id }) if hexadecimal(&id) => Ok(id),
        _ => Err(TrackerError::Content {
            path: path.to_owned(),
            reason: "holds no id; restore it, or remove it to begin a new run in the trackers"
                .into(),
        }),
    }
}
