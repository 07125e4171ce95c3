//! The coordinator's own sections: types, and how they are taken out of the merged values.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    layers::Merged,
    presets,
    refusal::{ConfigError, unknown},
};

/// A year; longer waits are typing mistakes and would overflow milliseconds further on.
const TIMEOUT_SECONDS_MAX: f64 = 31_536_000.0;

/// `[job]`: the run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct JobSection {
    /// The run's name. Default: the stem of the last configuration file, else `run`.
    #[schemars(regex(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$"))]
    pub name: String,
    /// Seed of data order.
    pub seed: u64,
    /// Run directory. Default `runs/<name>`.
    #[schemars(length(min = 1))]
    pub output: PathBuf,
    /// A published run whose values hold where nothing else is given: `cal-dpo-zephyr` (Zephyr-7B on UltraFeedback, the released
    /// code), `cal-dpo-hh` (Pythia-2.8B on HH dialogues), `cal-dpo-tldr` (Pythia-2.8B on TL;DR summaries). The resolved
    /// configuration has these values and not the name. Default none.
    #[serde(skip_serializing)]
    #[schemars(extend("enum" = presets::NAMES))]
    pub preset: Option<String>,
}

/// `[checkpoint]`: saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct CheckpointSection {
    /// Where checkpoints go: a folder that the coordinator and all workers see, or the URL of an object store,
    /// `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`, in programs that are built with the feature
    /// `object-store`; credentials and options come from their environment (`AWS_*`, `GOOGLE_*`, `AZURE_*`). Default
    /// `<output>/checkpoints`.
    pub path: PathBuf,
    /// Steps between checkpoints; 0 saves only at the end and when stopped.
    pub every_steps: u64,
    /// How many verified checkpoints are kept.
    #[schemars(range(min = 1))]
    pub keep_last: usize,
    /// Checkpoints of steps that are a multiple of this are kept besides; 0 for none.
    pub keep_every_steps: u64,
    /// Whether every evaluated step is saved, and the best one's checkpoint kept beside the last ones. Default: whether
    /// training may stop early.
    pub keep_best: bool,
}

/// `[cluster]`: the processes that train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterSection {
    /// Where workers and clients connect; port 0 for any free one. The service's to say where there is one.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Worker processes.
    #[schemars(range(min = 1))]
    pub workers: u32,
    /// Threads of each worker. Default: the cores shared out evenly.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub threads: Option<usize>,
    /// What workers compute on.
    pub backend: Backend,
    /// Silence after which a worker counts as lost.
    #[schemars(range(min = 0.001, max = TIMEOUT_SECONDS_MAX))]
    pub heartbeat_timeout_seconds: f64,
    /// How long workers may take to join.
    #[schemars(range(min = 0.001, max = TIMEOUT_SECONDS_MAX))]
    pub join_timeout_seconds: f64,
    /// How long loading and the reference pass may go without progress.
    #[schemars(range(min = 0.001, max = TIMEOUT_SECONDS_MAX))]
    pub form_timeout_seconds: f64,
    /// How long one step may take, an evaluation before it included.
    #[schemars(range(min = 0.001, max = TIMEOUT_SECONDS_MAX))]
    pub step_timeout_seconds: f64,
    /// How long the last checkpoint may take to become durable.
    #[schemars(range(min = 0.001, max = TIMEOUT_SECONDS_MAX))]
    pub save_timeout_seconds: f64,
}

/// What workers compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// CUDA where a GPU and a program built for it are there, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA, or nothing.
    Cuda,
}

impl Backend {
    /// As in the configuration and on a worker's command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// Takes keys out of one section and refuses what nobody asked for.
pub(super) struct Section<'a> {
    name: &'static str,
    values: toml::Table,
    asked: BTreeSet<&'static str>,
    merged: &'a Merged,
}

impl<'a> Section<'a> {
    pub(super) fn take(
        all: &mut toml::Table,
        name: &'static str,
        merged: &'a Merged,
    ) -> Result<Self, ConfigError> {
        let values = match all.remove(name) {
            None => toml::Table::new(),
            Some(toml::Value::Table(values)) => values,
            Some(other) => {
                let reason = format!("expected a section [{name}], got {}", other.type_str());
                return Err(refuse(merged, name, reason));
            }
        };
        Ok(Self {
            name,
            values,
            asked: BTreeSet::new(),
            merged,
        })
    }

    pub(super) fn optional<T: DeserializeOwned>(
        &mut self,
        key: &'static str,
    ) -> Result<Option<T>, ConfigError> {
        self.asked.insert(key);
        let Some(value) = self.values.remove(key) else {
            return Ok(None);
        };
        let shown = value.to_string();
        let is_text = value.is_str();
        value.try_into::<T>().map(Some).map_err(|error| {
            let mut reason = error.message().trim().to_owned();
            // `--set job.name=7` is a number by the rule that values are TOML; say how to mean the text.
            let typed = self.origin(key).is_some_and(|from| !from.contains(':'));
            if typed && !is_text && reason.ends_with("expected a string") {
                reason = format!("{reason}; write '\"{shown}\"' for the text {shown}");
            }
            self.refuse(key, reason)
        })
    }

    pub(super) fn required<T: DeserializeOwned>(
        &mut self,
        key: &'static str,
    ) -> Result<T, ConfigError> {
        let value = self.optional(key)?;
        value.ok_or_else(|| self.refuse(key, "is missing"))
    }

    /// What nobody asked for, for a section that another crate reads too.
    pub(super) fn rest(self) -> toml::Table {
        self.values
    }

    pub(super) fn finish(self) -> Result<(), ConfigError> {
        let Some(key) = self.values.keys().next() else {
            return Ok(());
        };
        let known: Vec<&str> = self.asked.iter().copied().collect();
        let reason = unknown(&format!("key in [{}]", self.name), key, &known);
        Err(self.refuse(key, reason))
    }

    fn origin(&self, key: &str) -> Option<String> {
        self.merged.origin(&format!("{}.{key}", self.name))
    }

    pub(super) fn refuse(&self, key: &str, reason: impl Into<String>) -> ConfigError {
        refuse(self.merged, &format!("{}.{key}", self.name), reason)
    }
}

/// A refusal with the origin of the key's value.
pub(super) fn refuse(merged: &Merged, key: &str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Refused {
        key: key.to_owned(),
        origin: merged.origin(key),
        reason: reason.into(),
    }
}

impl ClusterSection {
    pub(super) fn parse(mut section: Section) -> Result<Self, ConfigError> {
        let merged = section.merged;
        let parsed = Self {
            listen: section.required("listen")?,
            workers: section.required("workers")?,
            threads: section.optional("threads")?,
            backend: section.required("backend")?,
            heartbeat_timeout_seconds: section.required("heartbeat_timeout_seconds")?,
            join_timeout_seconds: section.required("join_timeout_seconds")?,
            form_timeout_seconds: section.required("form_timeout_seconds")?,
            step_timeout_seconds: section.required("step_timeout_seconds")?,
            save_timeout_seconds: section.required("save_timeout_seconds")?,
        };
        section.finish()?;
        parsed
            .validate()
            .map_err(|(key, reason)| refuse(merged, key, reason))?;
        Ok(parsed)
    }

    /// Compute threads of each worker on a machine of `cores` cores.
    pub fn threads_per_worker(&self, cores: usize) -> usize {
        self.threads
            .unwrap_or_else(|| (cores / self.workers as usize).max(1))
    }

    fn validate(&self) -> Result<(), (&'static str, String)> {
        if self.workers == 0 {
            return Err(("cluster.workers", "must be at least 1".into()));
        }
        if self.threads == Some(0) {
            let reason = "must be at least 1; leave it out to share the cores evenly";
            return Err(("cluster.threads", reason.into()));
        }
        let heartbeat = self.heartbeat_timeout_seconds;
        check_timeout(("cluster.heartbeat_timeout_seconds", heartbeat))?;
        for (key, seconds) in [
            ("cluster.join_timeout_seconds", self.join_timeout_seconds),
            ("cluster.form_timeout_seconds", self.form_timeout_seconds),
            ("cluster.step_timeout_seconds", self.step_timeout_seconds),
            ("cluster.save_timeout_seconds", self.save_timeout_seconds),
        ] {
            check_timeout((key, seconds))?;
            // A shorter wait would end before a silent worker can be told from a slow one.
            if seconds <= heartbeat {
                let reason = format!(
                    "must be longer than cluster.heartbeat_timeout_seconds, which is {heartbeat}, got {seconds}"
                );
                return Err((key, reason));
            }
        }
        Ok(())
    }
}

fn check_timeout((key, seconds): (&'static str, f64)) -> Result<(), (&'static str, String)> {
    // Below a millisecond it would round to no wait at all.
    if (0.001..=TIMEOUT_SECONDS_MAX).contains(&seconds) {
        return Ok(());
    }
    let reason = format!("must be between 0.001 and {TIMEOUT_SECONDS_MAX} seconds, got {seconds}");
    Err((key, reason))
}
