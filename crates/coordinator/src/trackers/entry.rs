//! What a tracker is told: committed steps and evaluations, in one order.

use protocol::{EvaluationRow, MetricsRow, Sample};
use serde::Serialize;
use serde_json::Value;

/// A committed step or an evaluation.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// A row of `metrics.jsonl`.
    Step(Box<MetricsRow>),
    /// A row of `eval.jsonl`, and its line of `samples.jsonl`.
    Evaluation {
        /// The means.
        row: EvaluationRow,
        /// Greedy continuations with the same weights.
        samples: Vec<Sample>,
    },
}

/// An entry's place: by step, an evaluation behind the step whose weights it saw. The default is before all entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The step, from 1; 0 is before training.
    pub step: u64,
    /// Whether it is the evaluation.
    pub evaluated: bool,
}

impl Position {
    /// Behind all entries of `step`.
    pub fn last_of(step: u64) -> Self {
        Self {
            step,
            evaluated: true,
        }
    }
}

impl Entry {
    /// Its place.
    pub fn position(&self) -> Position {
        match self {
            Self::Step(row) => Position {
                step: row.report.step,
                evaluated: false,
            },
            Self::Evaluation { row, .. } => Position::last_of(row.step),
        }
    }

    /// Greedy continuations, where it has any.
    pub(super) fn samples(&self) -> &[Sample] {
        match self {
            Self::Step(_) => &[],
            Self::Evaluation { samples, .. } => samples,
        }
    }

    /// Every number of its row but the step, by name; for held-out pairs with `eval/` before the name. A flag is 0 or 1.
    pub(super) fn metrics(&self) -> Vec<(String, f64)> {
        match self {
            Self::Step(row) => numbers("", row),
            Self::Evaluation { row, .. } => numbers(EVALUATION_PREFIX, row),
        }
    }
}

/// Before the names of held-out metrics.
pub(super) const EVALUATION_PREFIX: &str = "eval/";

fn numbers(prefix: &str, row: &impl Serialize) -> Vec<(String, f64)> {
    let Ok(Value::Object(fields)) = serde_json::to_value(row) else {
        unreachable!("a row is a JSON object");
    };
    let numbers = fields
        .into_iter()
        .filter(|(name, _)| name != "step")
        .map(|(name, value)| {
            let number = match value {
                Value::Bool(flag) => f64::from(u8::from(flag)),
                // What is not finite is null in JSON.
                other => other.as_f64().unwrap_or(f64::NAN),
            };
            (format!("{prefix}{name}"), number)
        });
    numbers.collect()
}
