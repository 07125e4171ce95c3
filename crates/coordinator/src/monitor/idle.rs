//! Workers without a pair. A step shares its pairs out, and a pair is not cut: whoever gets none waits for the others, and only
//! keeps its share of the optimizer's state.

use crate::numbers::{counted, grouped};

/// Workers of a job, and the pairs of its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shares {
    /// `cluster.workers`.
    pub workers: u32,
    /// `cluster.max_workers`.
    pub workers_max: u32,
    /// `train.batch_pairs`.
    pub batch_pairs: u64,
}

impl Shares {
    /// What there is to say before the first step.
    pub(super) fn start(self) -> Option<String> {
        let pairs = self.batch_pairs;
        let (key, workers) = [
            ("cluster.workers", self.workers),
            ("cluster.max_workers", self.workers_max),
        ]
        .into_iter()
        .find(|(_, workers)| u64::from(*workers) > pairs)?;
        Some(format!(
            "a step has {} (train.batch_pairs) for {} workers ({key}): of so many {} have nothing to compute in any step and wait for \
             the others; set {key} to at most {}, or raise train.batch_pairs",
            counted(pairs, "pair"),
            grouped(u64::from(workers)),
            grouped(u64::from(workers) - pairs),
            grouped(pairs),
        ))
    }
}
