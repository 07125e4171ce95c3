//! What a run reports of its rewards, under TRL's names where TRL has one.

use crate::{ObjectiveConfig, PairLogps};

/// Means over a batch of pairs. `rewards_*` are β-scaled as in TRL, `log_ratios_*` and `logps_*` are raw nats. An objective
/// that pairs without a reference has β·log π for a reward (`cpo`), or β·log π/n (`simpo`, `orpo`).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RewardStatistics {
    /// Mean reward of chosen, β·r_w.
    pub rewards_chosen: f64,
    /// Mean reward of rejected, β·r_l.
    pub rewards_rejected: f64,
    /// Mean difference of the two, β·(r_w − r_l).
    pub rewards_margins: f64,
    /// Share of pairs whose chosen reward is the higher; a tie counts one half.
    pub rewards_accuracies: f64,
    /// Mean r_w.
    pub log_ratios_chosen: f64,
    /// Mean r_l.
    pub log_ratios_rejected: f64,
    /// Mean log π(chosen).
    pub logps_chosen: f64,
    /// Mean log π(rejected).
    pub logps_rejected: f64,
}

/// Statistics of `pairs`, added in their order so that the same batch gives the same bits; `None` for no pairs.
pub fn reward_statistics(
    config: &ObjectiveConfig,
    pairs: &[PairLogps],
) -> Option<RewardStatistics> {
    if pairs.is_empty() {
        return None;
    }
    let mut sums = RewardStatistics::default();
    for pair in pairs {
        let (chosen, rejected) = pair.log_ratios();
        sums.log_ratios_chosen += chosen;
        sums.log_ratios_rejected += rejected;
        sums.logps_chosen += pair.chosen;
        sums.logps_rejected += pair.rejected;
        let (chosen, rejected) = unscaled_rewards(config, pair);
        sums.rewards_chosen += chosen;
        sums.rewards_rejected += rejected;
        sums.rewards_accuracies += if chosen > rejected {
            1.0
        } else if chosen == rejected {
            0.5
        } else {
            0.0
        };
    }
    let (count, beta) = (pairs.len() as f64, config.beta());
    let chosen = sums.rewards_chosen / count;
    let rejected = sums.rewards_rejected / count;
    Some(RewardStatistics {
        rewards_chosen: beta * chosen,
        rewards_rejected: beta * rejected,
        rewards_margins: beta * (chosen - rejected),
        rewards_accuracies: sums.rewards_accuracies / count,
        log_ratios_chosen: sums.log_ratios_chosen / count,
        log_ratios_rejected: sums.log_ratios_rejected / count,
        logps_chosen: sums.logps_chosen / count,
        logps_rejected: sums.logps_rejected / count,
    })
}

/// What the objective orders the completions by, before β.
fn unscaled_rewards(config: &ObjectiveConfig, pair: &PairLogps) -> (f64, f64) {
    match config.leading() {
        ObjectiveConfig::Cpo { .. } => (pair.chosen, pair.rejected),
        ObjectiveConfig::Simpo { .. } | ObjectiveConfig::Orpo { .. } => {
            let (chosen, rejected) = pair.per_token();
            (chosen.value, rejected.value)
        }
        _ => pair.log_ratios(),
    }
}
