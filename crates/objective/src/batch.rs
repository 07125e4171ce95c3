//! What objectives read of the whole global batch beside a pair's own log-probs: constants of the step, in which nothing is
//! differentiated. A pair's derivatives are still its own, so that packs stay independent once these are known.

use serde::{Deserialize, Serialize};

use crate::{ObjectiveConfig, PairLogps};

/// The mean of the batches' means so far, as `RunningMoments` of TRL 0.24 has it: every batch counts as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunningMean {
    /// The mean; 0 before the first batch.
    pub mean: f64,
    /// Batches in it.
    pub count: u64,
}

impl RunningMean {
    /// Takes one more value in. A value that is not finite is left out: the step is lost, and the mean must not be.
    fn push(&mut self, value: f64) {
        if value.is_finite() {
            self.count += 1;
            self.mean += (value - self.mean) / self.count as f64;
        }
    }
}

/// Statistics of a global batch for [`pair_loss`](crate::pair_loss). The default is for objectives that read none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchStatistics {
    /// z of `kto`.
    baseline: Option<f64>,
    /// δ/β of `bco_pair`.
    shift: Option<f64>,
    /// By slot, for `aot`: the reference's log π_w − log π_l that has the rank of the policy's.
    reference_margins: Vec<f64>,
    /// By slot, for `aot_unpaired`: the r_l that has the rank of the slot's r_w, and the r_w that has the rank of its r_l.
    opposites: Vec<[f64; 2]>,
}

impl BatchStatistics {
    /// What `config` reads of a batch, added up in the order given so that the same batch gives the same bits.
    ///
    /// `pairs` are all pairs of the global batch in the order of their slots; they are read if
    /// [`reads_batch`](ObjectiveConfig::reads_batch). `mismatched` are log-ratios r of completions after prompts of other rows;
    /// they are read if [`reads_mismatched`](ObjectiveConfig::reads_mismatched), and without any the mean is 0. `shift` takes
    /// this batch in if there is a `bco_pair`: the statistics of a step are made once, and an evaluation passes a copy.
    pub fn new(
        config: &ObjectiveConfig,
        pairs: &[PairLogps],
        mismatched: &[f64],
        shift: &mut RunningMean,
    ) -> Self {
        use ObjectiveConfig::{Aot, AotUnpaired, BcoPair};

        let (chosen, rejected): (Vec<f64>, Vec<f64>) =
            pairs.iter().map(PairLogps::log_ratios).unzip();
        let mut statistics = Self::default();
        if config.reads_mismatched() {
            let mean = mean(mismatched);
            // Not `max`, which would make 0 of NaN and hide a broken model.
            statistics.baseline = Some(if mean < 0.0 { 0.0 } else { mean });
        }
        if config.any(|it| matches!(it, BcoPair { .. })) {
            shift.push(f64::midpoint(mean(&chosen), mean(&rejected)));
            statistics.shift = Some(shift.mean);
        }
        if config.any(|it| matches!(it, Aot { .. })) {
            let (policy, reference): (Vec<f64>, Vec<f64>) =
                pairs.iter().map(PairLogps::margins).unzip();
            statistics.reference_margins = of_same_rank(&policy, &reference);
        }
        if config.any(|it| matches!(it, AotUnpaired { .. })) {
            let below = of_same_rank(&chosen, &rejected);
            let above = of_same_rank(&rejected, &chosen);
            let opposites = below.into_iter().zip(above);
            statistics.opposites = opposites.map(|(below, above)| [below, above]).collect();
        }
        statistics
    }

    pub(crate) fn baseline(&self) -> f64 {
        known(self.baseline, "a mean over mismatched completions")
    }

    pub(crate) fn shift(&self) -> f64 {
        known(self.shift, "a running mean")
    }

    pub(crate) fn reference_margin(&self, slot: usize) -> f64 {
        known(self.reference_margins.get(slot).copied(), "the slot's rank")
    }

    pub(crate) fn opposites(&self, slot: usize) -> [f64; 2] {
        known(self.opposites.get(slot).copied(), "the slot's ranks")
    }
}

fn known<T>(statistic: Option<T>, what: &str) -> T {
    statistic.unwrap_or_else(|| panic!("the objective reads {what}: its batch statistics lack it"))
}

fn mean(values: &[f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    values.iter().sum::<f64>() / values.len() as f64
}

/// For each slot of `values` the one of `others` that has its rank.
fn of_same_rank(values: &[f64], others: &[f64]) -> Vec<f64> {
    let mut same = vec![0.0; values.len()];
    for (slot, other) in rising(values).into_iter().zip(rising(others)) {
        same[slot] = others[other];
    }
    same
}

/// Slots by their values; equal values keep the order of their slots, since the sort is stable.
fn rising(values: &[f64]) -> Vec<usize> {
    let mut slots: Vec<usize> = (0..values.len()).collect();
    slots.sort_by(|&one, &other| values[one].total_cmp(&values[other]));
    slots
}
