//! The sections that training reads, with their defaults and ranges.

use std::path::PathBuf;

use data::DataConfig;
use objective::ObjectiveConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adapter::AdapterSection;
use crate::metric::{self, Metric};
use crate::optimizer::OptimizerSection;
use crate::schedule::{Schedule, ScheduleSection};

/// Everything that decides what a run computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Seed of the data order. Default 42.
    #[serde(default = "default_seed")]
    #[schemars(skip)]
    pub seed: u64,
    /// `[model]`: what is trained.
    pub model: ModelSection,
    /// `[adapter]`: what is trained in place of the model's own weights. Default nothing: these are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AdapterSection")]
    pub adapter: Option<AdapterSection>,
    /// `[data]`: the pairs and how to read them.
    pub data: DataConfig,
    /// `[objective]`: what is minimised. Default Cal-DPO with β = 0.1 and λ = 1.
    #[serde(default = "default_objective")]
    pub objective: ObjectiveConfig,
    /// `[reference]`: log-probs of the frozen model, computed once.
    #[serde(default)]
    pub reference: ReferenceSection,
    /// `[optimizer]`: the update rule and the clipping before it.
    #[serde(default)]
    pub optimizer: OptimizerSection,
    /// `[schedule]`: the learning rate over the run.
    #[serde(default)]
    pub schedule: ScheduleSection,
    /// `[train]`: how long, and how much at once.
    #[serde(default)]
    pub train: TrainSection,
    /// `[evaluate]`: the held-out pairs.
    #[serde(default)]
    pub evaluate: EvaluateSection,
}

/// `[model]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// Hugging Face directory of the starting weights.
    pub path: PathBuf,
    /// Hugging Face directory of the reference weights. Default the starting weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<PathBuf>,
    /// Arithmetic of forward and backward. Default `f32`.
    #[serde(default)]
    pub dtype: Dtype,
    /// Keep only the inputs of blocks and compute the rest again in the backward: a third more time for much less memory.
    /// Default false.
    #[serde(default)]
    pub gradient_checkpointing: bool,
}

/// Arithmetic of forward and backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// 32 bits throughout.
    #[default]
    F32,
    /// Matrix products of bfloat16 operands; weights that are trained, sums, norms, softmax and gradients stay f32.
    Bf16,
}

impl Dtype {
    /// Its name in configurations and reference scopes.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// `[reference]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReferenceSection {
    /// Folder of stored reference log-probs; runs may share it. Default `runs/reference-store`.
    #[schemars(length(min = 1))]
    pub store: PathBuf,
    /// Every rank computes so many of the values that it found in the store again and refuses the store if a bit differs.
    /// Default 4.
    pub verify_samples: usize,
    /// Folder, or URL of an object store as in `checkpoint.path`, through which machines share values: what is there is fetched
    /// before any is computed, and what is computed is sent there. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub shared: Option<PathBuf>,
}

impl Default for ReferenceSection {
    fn default() -> Self {
        Self {
            store: "runs/reference-store".into(),
            verify_samples: 4,
            shared: None,
        }
    }
}

/// `[train]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("not" = { "required": ["epochs", "steps"] }))]
pub struct TrainSection {
    /// Passes over the training pairs. Default 1 when `steps` is absent too.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub epochs: Option<u64>,
    /// Optimizer steps instead of epochs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub steps: Option<u64>,
    /// Pairs of one optimizer step, over all ranks. Default 64.
    #[schemars(range(min = 1))]
    pub batch_pairs: usize,
    /// Most tokens that a worker has on their way through the model at once (a longer pair goes alone): what memory depends on. On
    /// the CPU packs are cut to a quarter of it and go side by side, one a thread. Default 2048.
    #[schemars(range(min = 1))]
    pub micro_batch_tokens: usize,
    /// Compare the workers' weights and optimizer shards to the bit every so many steps; a difference stops the job and is
    /// named. 0 never does. Default 100.
    pub compare_every_steps: u64,
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            epochs: None,
            steps: None,
            batch_pairs: 64,
            micro_batch_tokens: 2048,
            compare_every_steps: 100,
        }
    }
}

impl TrainSection {
    /// Optimizer steps of the whole run over `pairs` training pairs.
    pub fn steps_total(&self, pairs: usize) -> u64 {
        let epochs = self.epochs.unwrap_or(1);
        self.steps.unwrap_or_else(|| {
            epochs.saturating_mul(data::steps_per_epoch(pairs, self.batch_pairs))
        })
    }
}

/// `[evaluate]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateSection {
    /// Score the held-out pairs every so many steps, besides before the first and after the last. Default only those two.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub every_steps: Option<u64>,
    /// Score only the first so many held-out pairs. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub batch_pairs: Option<usize>,
    /// What makes one evaluation better than another, by its name in `eval.jsonl`. Default none is compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,
    /// Whether more of the metric is better, for metrics of which that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub higher_is_better: Option<bool>,
    /// So many evaluations in a row without an improvement end training. Default never.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub early_stopping_patience: Option<u64>,
    /// An improvement is a gain of more than this over the last one. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub early_stopping_min_delta: Option<f64>,
    /// Held-out prompts to continue at every evaluation, with the likeliest tokens. Default 3.
    pub samples: usize,
    /// Most tokens of a continuation. Default 64.
    pub sample_tokens: usize,
}

impl Default for EvaluateSection {
    fn default() -> Self {
        Self {
            every_steps: None,
            batch_pairs: None,
            metric: None,
            higher_is_better: None,
            early_stopping_patience: None,
            early_stopping_min_delta: None,
            samples: 3,
            sample_tokens: 64,
        }
    }
}

/// A value that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct SpecError {
    /// Dotted path of the key.
    pub key: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl Spec {
    /// Checks what can be checked without opening a file.
    ///
    /// # Errors
    /// The first value that cannot work.
    pub fn validate(&self) -> Result<(), SpecError> {
        self.data.validate().map_err(|error| SpecError {
            key: error.key,
            reason: error.reason,
        })?;
        self.objective.validate().map_err(|error| SpecError {
            key: error.key,
            reason: error.reason,
        })?;
        if let Some(adapter) = &self.adapter {
            adapter.validate()?;
        }
        if self.reference.store.as_os_str().is_empty() {
            return refuse("reference.store", "is empty; name a folder");
        }
        self.optimizer.validate()?;
        self.schedule.validate()?;
        self.train.validate()?;
        self.evaluate.validate()?;
        metric::validate(self)
    }

    /// The learning rates of a run of `steps` steps.
    pub fn learning_rates(&self, steps: u64) -> Schedule {
        Schedule {
            kind: self.schedule.kind,
            peak: self.optimizer.learning_rate,
            warmup_steps: self.schedule.warmup(steps),
            steps,
        }
    }
}

impl TrainSection {
    fn validate(&self) -> Result<(), SpecError> {
        if self.epochs.is_some() && self.steps.is_some() {
            return refuse(
                "train.epochs",
                "given together with train.steps; keep one of them",
            );
        }
        positive("train.epochs", self.epochs.unwrap_or(1))?;
        positive("train.steps", self.steps.unwrap_or(1))?;
        positive("train.batch_pairs", self.batch_pairs as u64)?;
        positive("train.micro_batch_tokens", self.micro_batch_tokens as u64)
    }
}

impl EvaluateSection {
    fn validate(&self) -> Result<(), SpecError> {
        positive("evaluate.every_steps", self.every_steps.unwrap_or(1))?;
        positive("evaluate.batch_pairs", self.batch_pairs.unwrap_or(1) as u64)
    }
}

fn positive(key: &str, value: u64) -> Result<(), SpecError> {
    if value > 0 {
        return Ok(());
    }
    refuse(key, "must be at least 1, got 0")
}

pub(crate) fn refuse(key: &str, reason: &str) -> Result<(), SpecError> {
    Err(SpecError {
        key: key.into(),
        reason: reason.into(),
    })
}

fn default_seed() -> u64 {
    42
}

fn default_objective() -> ObjectiveConfig {
    ObjectiveConfig::CalDpo {
        beta: 0.1,
        calibration_weight: 1.0,
        calibration_shift: 0.5,
        score_scale: None,
    }
}
