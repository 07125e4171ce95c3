//! Where a member's time went. Each has its own clock: unlike a report's, these values differ between ranks, and no vote
//! compares them.

use serde::{Deserialize, Serialize};

use crate::report::null_is_nan;

/// Seconds that a member spent by phase since its vote before this one, or since it began; in a row the mean over the ranks.
///
/// All are 0 where nobody measured: in records that are older than these fields, and of workers that do not tell. What belongs
/// to no phase is in none. A row's `seconds` begin and end with commits, these with votes: the sums are near, not equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Phases {
    /// Order and packing.
    #[serde(rename = "seconds/data", deserialize_with = "null_is_nan")]
    pub data: f64,
    /// Forward through the blocks.
    #[serde(rename = "seconds/forward", deserialize_with = "null_is_nan")]
    pub forward: f64,
    /// The log-prob head, both ways.
    #[serde(rename = "seconds/head", deserialize_with = "null_is_nan")]
    pub head: f64,
    /// Backward through the blocks.
    #[serde(rename = "seconds/backward", deserialize_with = "null_is_nan")]
    pub backward: f64,
    /// Log-probs and gradients over the ranks, as far as the backward does not hide it.
    #[serde(rename = "seconds/reduce", deserialize_with = "null_is_nan")]
    pub reduce: f64,
    /// Optimizer and weights over the ranks, of the step before.
    #[serde(rename = "seconds/update", deserialize_with = "null_is_nan")]
    pub update: f64,
    /// Held-out pairs and samples.
    #[serde(rename = "seconds/evaluate", deserialize_with = "null_is_nan")]
    pub evaluate: f64,
    /// What training waited for a snapshot.
    #[serde(rename = "seconds/checkpoint", deserialize_with = "null_is_nan")]
    pub checkpoint: f64,
    /// For the coordinator's answers.
    #[serde(rename = "seconds/wait", deserialize_with = "null_is_nan")]
    pub wait: f64,
}

impl Phases {
    /// Every phase with its name, in the order of a step.
    pub fn values(&self) -> [(&'static str, f64); 9] {
        [
            ("data", self.data),
            ("forward", self.forward),
            ("head", self.head),
            ("backward", self.backward),
            ("reduce", self.reduce),
            ("update", self.update),
            ("evaluate", self.evaluate),
            ("checkpoint", self.checkpoint),
            ("wait", self.wait),
        ]
    }

    /// The reverse of [`Phases::values`].
    pub fn from_values(values: [f64; 9]) -> Self {
        let [
            data,
            forward,
            head,
            backward,
            reduce,
            update,
            evaluate,
            checkpoint,
            wait,
        ] = values;
        Self {
            data,
            forward,
            head,
            backward,
            reduce,
            update,
            evaluate,
            checkpoint,
            wait,
        }
    }

    /// Phase by phase the sum of both.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let mut values = self.values().map(|(_, value)| value);
        for (sum, (_, value)) in values.iter_mut().zip(other.values()) {
            *sum += value;
        }
        Self::from_values(values)
    }

    /// Phase by phase the mean; all 0 of none.
    pub fn mean<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let (mut sum, mut count) = (Self::default(), 0u32);
        for it in all {
            sum = sum.plus(it);
            count += 1;
        }
        let count = f64::from(count.max(1));
        Self::from_values(sum.values().map(|(_, value)| value / count))
    }

    /// Seconds of all phases.
    pub fn total(&self) -> f64 {
        self.values().iter().map(|(_, value)| value).sum()
    }
}
