//! What members say about a step and an evaluation, and the row that a run keeps of it.
//!
//! Names in JSON follow TRL where it has one. A number that is not finite is written as null and read back as NaN.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{GpuFigures, Phases};

/// Loss terms and reward means over the global batch. `rewards_*` are β-scaled, the others in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is its metric's name")]
pub struct Statistics {
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    #[serde(rename = "loss/pairwise", deserialize_with = "null_is_nan")]
    pub loss_pairwise: f64,
    #[serde(rename = "loss/calibration", deserialize_with = "null_is_nan")]
    pub loss_calibration: f64,
    #[serde(rename = "rewards/chosen", deserialize_with = "null_is_nan")]
    pub rewards_chosen: f64,
    #[serde(rename = "rewards/rejected", deserialize_with = "null_is_nan")]
    pub rewards_rejected: f64,
    #[serde(rename = "rewards/margins", deserialize_with = "null_is_nan")]
    pub rewards_margins: f64,
    #[serde(rename = "rewards/accuracies", deserialize_with = "null_is_nan")]
    pub rewards_accuracies: f64,
    #[serde(rename = "log_ratios/chosen", deserialize_with = "null_is_nan")]
    pub log_ratios_chosen: f64,
    #[serde(rename = "log_ratios/rejected", deserialize_with = "null_is_nan")]
    pub log_ratios_rejected: f64,
    #[serde(rename = "logps/chosen", deserialize_with = "null_is_nan")]
    pub logps_chosen: f64,
    #[serde(rename = "logps/rejected", deserialize_with = "null_is_nan")]
    pub logps_rejected: f64,
}

impl Statistics {
    /// Every value with its metric name, in a fixed order.
    pub fn values(&self) -> [(&'static str, f64); 11] {
        [
            ("loss", self.loss),
            ("loss/pairwise", self.loss_pairwise),
            ("loss/calibration", self.loss_calibration),
            ("rewards/chosen", self.rewards_chosen),
            ("rewards/rejected", self.rewards_rejected),
            ("rewards/margins", self.rewards_margins),
            ("rewards/accuracies", self.rewards_accuracies),
            ("log_ratios/chosen", self.log_ratios_chosen),
            ("log_ratios/rejected", self.log_ratios_rejected),
            ("logps/chosen", self.logps_chosen),
            ("logps/rejected", self.logps_rejected),
        ]
    }

    /// The reverse of [`Statistics::values`].
    pub fn from_values(values: [f64; 11]) -> Self {
        let [
            loss,
            loss_pairwise,
            loss_calibration,
            rewards_chosen,
            rewards_rejected,
            rewards_margins,
            rewards_accuracies,
            log_ratios_chosen,
            log_ratios_rejected,
            logps_chosen,
            logps_rejected,
        ] = values;
        Self {
            loss,
            loss_pairwise,
            loss_calibration,
            rewards_chosen,
            rewards_rejected,
            rewards_margins,
            rewards_accuracies,
            log_ratios_chosen,
            log_ratios_rejected,
            logps_chosen,
            logps_rejected,
        }
    }
}

/// A member's vote on a step: everything in it was reduced over the ranks, so all members have the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step, from 1.
    pub step: u64,
    /// The epoch it belongs to, from 0.
    pub epoch: u64,
    /// Whether every rank's gradient was finite (invariant T6).
    pub finite: bool,
    /// Loss and rewards.
    #[serde(flatten)]
    pub statistics: Statistics,
    /// Global gradient norm before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Tokens of the batch, unpadded, the prompt counted for both completions.
    pub tokens: u64,
    /// Pairs of the batch.
    pub pairs: u64,
}

impl StepReport {
    /// Name and both values of the first field whose bits differ.
    pub fn first_difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let mut pairs = self.fields().zip(other.fields());
        pairs
            .find(|((_, mine), (_, theirs))| mine.bits() != theirs.bits())
            .map(|((name, mine), (_, theirs))| (name, mine.to_string(), theirs.to_string()))
    }

    /// Every field with its name.
    fn fields(&self) -> impl Iterator<Item = (&'static str, Field)> + use<> {
        let own = [
            ("step", Field::Count(self.step)),
            ("epoch", Field::Count(self.epoch)),
            ("finite", Field::Flag(self.finite)),
            ("grad_norm", Field::Float(self.grad_norm)),
            ("learning_rate", Field::Float(self.learning_rate)),
            ("tokens", Field::Count(self.tokens)),
            ("pairs", Field::Count(self.pairs)),
        ];
        let statistics = self.statistics.values();
        own.into_iter()
            .chain(statistics.map(|(name, value)| (name, Field::Float(value))))
    }
}

/// A field of a report, whose text is made only where it is read: thousands of votes are compared.
#[derive(Clone, Copy)]
enum Field {
    Count(u64),
    Flag(bool),
    Float(f64),
}

impl Field {
    fn bits(self) -> u64 {
        match self {
            Self::Count(value) => value,
            Self::Flag(value) => u64::from(value),
            Self::Float(value) => value.to_bits(),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(value) => value.fmt(f),
            Self::Flag(value) => value.fmt(f),
            // `{:?}` writes the shortest text that reads back as the same float; only NaNs need their bits.
            Self::Float(value) if value.is_nan() => {
                write!(f, "NaN with bits {:#018x}", value.to_bits())
            }
            Self::Float(value) => write!(f, "{value:?}"),
        }
    }
}

/// One line of `metrics.jsonl`: a committed step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricsRow {
    /// What the members reported.
    #[serde(flatten)]
    pub report: StepReport,
    /// Tokens divided by `seconds`.
    pub tokens_per_second: f64,
    /// Members of the generation that computed it.
    pub world_size: u32,
    /// The generation that committed it.
    pub generation: u64,
    /// From the commit before (or Go) to this one.
    pub seconds: f64,
    /// Where the members' time went from their votes before this one to those on this one, the mean over the ranks.
    #[serde(flatten)]
    pub phases: Phases,
    /// How the members' GPUs fared.
    #[serde(flatten)]
    pub gpu: GpuFigures,
}

/// One line of `eval.jsonl`: means over the held-out pairs with the weights after `step`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRow {
    /// Committed step whose weights were evaluated; 0 before training.
    pub step: u64,
    /// Held-out pairs.
    pub pairs: u64,
    /// Loss and rewards.
    #[serde(flatten)]
    pub statistics: Statistics,
}

/// A greedy continuation, shown before and after training.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The prompt's text.
    pub prompt: String,
    /// What the model wrote.
    pub text: String,
}

pub(crate) fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
