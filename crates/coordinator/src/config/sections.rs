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

/// How long a job waits for workers, where a step takes less than half of it.
const JOIN_SECONDS: f64 = 3600.0;

/// How long a worker waits for the others, where a step has twice the time.
const COLLECTIVE_SECONDS: f64 = 300.0;

/// Priorities go so far up, and so far down.
const PRIORITY_MAX: i32 = 100;

/// Ten years; longer runs are typing mistakes.
const HOURS_MAX: f64 = 87_600.0;

/// `[job]`: the run.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
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
    /// Its place in the queue of `coordinator --cluster`: the higher goes first, among equals the older. A job with a higher one
    /// takes workers from running jobs with a lower one, which save, and go on after it.
    #[schemars(range(min = -PRIORITY_MAX, max = PRIORITY_MAX))]
    pub priority: i32,
    /// Hours that its attempts on `coordinator --cluster` may run together; then it saves, and ends as failed. Default: as long as
    /// it needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = HOURS_MAX))]
    pub max_hours: Option<f64>,
    /// Attempts in a row that lose workers and come no further before `coordinator --cluster` gives it up.
    #[schemars(range(min = 1))]
    pub max_attempts: u32,
}

impl JobSection {
    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        let priority = self.priority;
        if !(-PRIORITY_MAX..=PRIORITY_MAX).contains(&priority) {
            let reason =
                format!("must be between -{PRIORITY_MAX} and {PRIORITY_MAX}, got {priority}");
            return Err(("job.priority", reason));
        }
        if let Some(hours) = self.max_hours
            && !(hours > 0.0 && hours <= HOURS_MAX)
        {
            let reason = format!(
                "must be above 0 and at most {HOURS_MAX}, got {hours}; leave it out to let the job run as long as it needs"
            );
            return Err(("job.max_hours", reason));
        }
        if self.max_attempts == 0 {
            let reason =
                "must be at least 1: the number of attempts without progress that ends the job";
            return Err(("job.max_attempts", reason.into()));
        }
        Ok(())
    }

    /// `max_hours` in milliseconds, at least one.
    pub fn run_ms_max(&self) -> Option<u64> {
        self.max_hours
            .map(|hours| (hours * 3_600_000.0).ceil() as u64)
    }
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
    /// Checkpoints in a row that cannot be written and end the job; until then it warns, and tries again at the next one.
    #[schemars(range(min = 1))]
    pub failures_max: u32,
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
    /// Workers that the job begins with.
    #[schemars(range(min = 1))]
    pub workers: u32,
    /// Fewest workers that train. When others are lost the job goes on with these, and with the same pairs a step; with fewer it
    /// waits for one to come.
    #[schemars(range(min = 1))]
    pub min_workers: u32,
    /// Most workers that train; when more are free, so many are taken in. Default: `workers`.
    #[schemars(range(min = 1))]
    pub max_workers: u32,
    /// Whether each worker keeps the optimizer shard of the one before it, too, so that no committed step is lost with any one
    /// of them. Without it a loss takes the run back to its last checkpoint, and each worker has 12 bytes × parameters / workers
    /// of memory more.
    pub mirror: bool,
    /// ZeRO's stage: 1 shares out the optimizer's state and, where products are of bf16, the f32 weights; 2 gradients too, which
    /// then travel once a pack and not once a step. A worker alone shares nothing.
    #[schemars(range(min = 1, max = 2))]
    pub zero: u32,
    /// Whether workers with GPUs keep the optimizer's state and the f32 weights in the host's memory, where they are updated: more
    /// room on the GPU for a slower update. Needs `model.dtype = "bf16"`. On the CPU everything is there anyway.
    pub offload: bool,
    /// Threads of each worker. Default: the cores shared out evenly.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub threads: Option<usize>,
    /// What workers compute on.
    pub backend: Backend,
    /// What workers reduce their gradients over.
    pub collective: Reduction,
    /// Number of the GPU of each worker that is started here; a GPU may stand there more than once. Default: 0, 1, 2 …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpus: Option<Vec<u32>>,
    /// Silence after which a worker counts as lost.
    #[schemars(range(min = 0.001, max = TIMEOUT_SECONDS_MAX))]
    pub heartbeat_timeout_seconds: f64,
    /// How long a worker may take to leave the others when one of them is lost. Default: twice the heartbeat timeout.
    #[schemars(range(min = 0.001, max = TIMEOUT_SECONDS_MAX))]
    pub abort_timeout_seconds: f64,
    /// How long a worker waits for the others before it says so. Default: 300, or less where a step has less time.
    #[schemars(range(min = 0.001, max = TIMEOUT_SECONDS_MAX))]
    pub collective_timeout_seconds: f64,
    /// How long a job waits for workers when there are too few. Default: an hour, or twice the step's time.
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
    /// How long a job may go without a committed step before its attempt ends. Default: four times the join timeout.
    #[schemars(range(min = 0.001, max = TIMEOUT_SECONDS_MAX))]
    pub job_timeout_seconds: f64,
    /// A worker whose work stands still for so many usual step times hangs, and the others go on without it.
    #[schemars(extend("exclusiveMinimum" = 1))]
    pub hang_factor: f64,
    /// A worker that computes so many times as long as the others is reported as slow.
    #[schemars(extend("exclusiveMinimum" = 1))]
    pub slow_factor: f64,
    /// A step that loses a worker so many times in a row for the same reason ends the attempt.
    #[schemars(range(min = 1))]
    pub failures_max: u32,
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

/// What workers reduce their gradients over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// NCCL where every worker has a GPU of its own and the library, else TCP.
    Auto,
    /// TCP, through the host's memory.
    Tcp,
    /// NCCL, or an error that says what is missing.
    Nccl,
}

impl Reduction {
    /// As in the configuration and on a worker's command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::Nccl => "nccl",
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
        let workers = section.required("workers")?;
        let heartbeat_timeout_seconds: f64 = section.required("heartbeat_timeout_seconds")?;
        let form_timeout_seconds: f64 = section.required("form_timeout_seconds")?;
        let step_timeout_seconds: f64 = section.required("step_timeout_seconds")?;
        // What is not given has its place on the ladder.
        let abort = section.optional("abort_timeout_seconds")?;
        let abort_timeout_seconds: f64 = abort.unwrap_or(2.0 * heartbeat_timeout_seconds);
        let collective = section.optional("collective_timeout_seconds")?;
        let between =
            abort_timeout_seconds.midpoint(step_timeout_seconds.min(form_timeout_seconds));
        let join = section.optional("join_timeout_seconds")?;
        let join_timeout_seconds = join.unwrap_or((2.0 * step_timeout_seconds).max(JOIN_SECONDS));
        let job = section.optional("job_timeout_seconds")?;
        let parsed = Self {
            listen: section.required("listen")?,
            workers,
            min_workers: section.required("min_workers")?,
            max_workers: section.optional("max_workers")?.unwrap_or(workers),
            mirror: section.required("mirror")?,
            zero: section.required("zero")?,
            offload: section.required("offload")?,
            threads: section.optional("threads")?,
            backend: section.required("backend")?,
            collective: section.required("collective")?,
            gpus: section.optional("gpus")?,
            heartbeat_timeout_seconds,
            abort_timeout_seconds,
            collective_timeout_seconds: collective.unwrap_or(between.min(COLLECTIVE_SECONDS)),
            join_timeout_seconds,
            form_timeout_seconds,
            step_timeout_seconds,
            save_timeout_seconds: section.required("save_timeout_seconds")?,
            job_timeout_seconds: job.unwrap_or(4.0 * join_timeout_seconds),
            hang_factor: section.required("hang_factor")?,
            slow_factor: section.required("slow_factor")?,
            failures_max: section.required("failures_max")?,
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
        if let Some(gpus) = &self.gpus
            && gpus.len() != self.workers as usize
        {
            let reason = format!(
                "must name one GPU for each of cluster.workers, which is {}, got {}",
                self.workers,
                gpus.len()
            );
            return Err(("cluster.gpus", reason));
        }
        if !(1..=2).contains(&self.zero) {
            let reason = format!(
                "must be 1 (optimizer state and f32 weights in shards) or 2 (gradients too), got {}; what a forward reads is \
                 whole on every worker",
                self.zero
            );
            return Err(("cluster.zero", reason));
        }
        if self.offload && self.backend == Backend::Cpu {
            let reason = "moves memory from GPUs to the host, and cluster.backend is cpu; leave it out, or train on GPUs";
            return Err(("cluster.offload", reason.into()));
        }
        let (min, most) = (self.min_workers, self.max_workers);
        if min == 0 || min > self.workers {
            let reason = format!(
                "must be between 1 and cluster.workers, which is {}, got {min}",
                self.workers
            );
            return Err(("cluster.min_workers", reason));
        }
        if most < self.workers {
            let reason = format!(
                "must be at least cluster.workers, which is {}, got {most}",
                self.workers
            );
            return Err(("cluster.max_workers", reason));
        }
        if self.failures_max == 0 {
            let reason = "must be at least 1: the number of losses in a row that ends the attempt";
            return Err(("cluster.failures_max", reason.into()));
        }
        for (key, factor) in [
            ("cluster.hang_factor", self.hang_factor),
            ("cluster.slow_factor", self.slow_factor),
        ] {
            if !factor.is_finite() || factor <= 1.0 {
                return Err((key, format!("must be a number above 1, got {factor}")));
            }
        }
        let heartbeat = self.heartbeat_timeout_seconds;
        check_timeout(("cluster.heartbeat_timeout_seconds", heartbeat))?;
        let abort = ("cluster.abort_timeout_seconds", self.abort_timeout_seconds);
        let collective = (
            "cluster.collective_timeout_seconds",
            self.collective_timeout_seconds,
        );
        let form = ("cluster.form_timeout_seconds", self.form_timeout_seconds);
        let step = ("cluster.step_timeout_seconds", self.step_timeout_seconds);
        let save = ("cluster.save_timeout_seconds", self.save_timeout_seconds);
        let join = ("cluster.join_timeout_seconds", self.join_timeout_seconds);
        let job = ("cluster.job_timeout_seconds", self.job_timeout_seconds);
        for timeout in [abort, collective, form, step, save, join, job] {
            check_timeout(timeout)?;
        }
        // What waits for another must wait longer, or it ends before the other can. First what a user sets, by what most know.
        let heartbeat = ("cluster.heartbeat_timeout_seconds", heartbeat);
        let ladder = [
            (heartbeat, join),
            (heartbeat, form),
            (heartbeat, step),
            (heartbeat, save),
            (heartbeat, abort),
            (abort, collective),
            (abort, save),
            (collective, step),
            (collective, form),
            (step, join),
            (join, job),
        ];
        for ((shorter, less), (key, seconds)) in ladder {
            if seconds <= less {
                let reason =
                    format!("must be longer than {shorter}, which is {less}, got {seconds}");
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
