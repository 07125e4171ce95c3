//! Loss and rewards of a batch from the log-probs of all its pairs. Every rank computes them from the same bits in the same
//! order, in f64, so all ranks get the same bits and none is asked for its part.

use data::Pair;
use objective::{
    BatchStatistics, GlobalCounts, ObjectiveConfig, PairLogps, RewardStatistics, pair_loss,
    reward_statistics,
};

/// Means over a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Measures {
    pub loss: f64,
    pub loss_pairwise: f64,
    pub loss_calibration: f64,
    pub rewards: RewardStatistics,
}

/// What the loss reads of `pair`. Without a reference the log-ratios are 0: raw log-probs are no rewards.
pub(crate) fn pair_logps(pair: &Pair, logps: [f64; 2], reference: Option<[f64; 2]>) -> PairLogps {
    let [chosen, rejected] = logps;
    let [reference_chosen, reference_rejected] = reference.unwrap_or(logps);
    PairLogps {
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        chosen_tokens: pair.chosen.len() as u32,
        rejected_tokens: pair.rejected.len() as u32,
        scores: pair.scores,
    }
}

/// Measures of a whole batch.
///
/// # Panics
/// If there are no pairs.
pub(crate) fn measure(
    objective: &ObjectiveConfig,
    pairs: &[PairLogps],
    counts: GlobalCounts,
    statistics: &BatchStatistics,
) -> Measures {
    let mut measures = Measures::default();
    for (slot, pair) in pairs.iter().enumerate() {
        let share = pair_loss(objective, slot, pair, counts, statistics);
        measures.loss_pairwise += share.pairwise;
        measures.loss_calibration += share.calibration;
    }
    measures.loss = measures.loss_pairwise + measures.loss_calibration;
    measures.rewards = reward_statistics(objective, pairs).expect("a batch has pairs");
    measures
}
