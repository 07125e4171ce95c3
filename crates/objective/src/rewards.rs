//! What a run reports of its rewards, under TRL's names where TRL has one.

use crate::{ObjectiveConfig, PairLogps};

/// Means over a batch of pairs. `rewards_*` are β-scaled as in TRL, `log_ratios_*` and `logps_*` are raw nats. An objective
/// that pairs without a reference has β·log π for a reward (`cpo`), or β·log π/n (`simpo`, `orpo`).
///
/// Where rows lack a completion, a side's means are over the rows that have it, and 0 where no row has it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RewardStatistics {
    /// Mean reward of chosen, β·r_w.
    pub rewards_chosen: f64,
    /// Mean reward of rejected, β·r_l.
    pub rewards_rejected: f64,
    /// Mean difference of the two, β·(r_w − r_l), over the rows that have both; without such a row, the difference of the means.
    pub rewards_margins: f64,
    /// Share of rows in the right order: the chosen reward is the higher, or the only one is above 0 if chosen and below 0 if
    /// rejected. A tie counts one half.
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
    let with_chosen = pairs.iter().filter(|pair| pair.has_chosen());
    let with_rejected = pairs.iter().filter(|pair| pair.has_rejected());
    let with_both = with_chosen.clone().filter(|pair| pair.has_rejected());
    let reward = |pair| unscaled_rewards(config, pair);

    let [accuracy] = means(pairs.iter().map(|it| [share_right(it, reward(it))]))?;
    let chosen = with_chosen.map(|it| [reward(it).0, it.log_ratios().0, it.chosen]);
    let [reward_chosen, log_ratio_chosen, logp_chosen] = means(chosen).unwrap_or_default();
    let rejected = with_rejected.map(|it| [reward(it).1, it.log_ratios().1, it.rejected]);
    let [reward_rejected, log_ratio_rejected, logp_rejected] = means(rejected).unwrap_or_default();
    let [higher, lower] =
        means(with_both.map(|it| reward(it).into())).unwrap_or([reward_chosen, reward_rejected]);

    let beta = config.beta();
    Some(RewardStatistics {
        rewards_chosen: beta * reward_chosen,
        rewards_rejected: beta * reward_rejected,
        rewards_margins: beta * (higher - lower),
        rewards_accuracies: accuracy,
        log_ratios_chosen: log_ratio_chosen,
        log_ratios_rejected: log_ratio_rejected,
        logps_chosen: logp_chosen,
        logps_rejected: logp_rejected,
    })
}

/// Means by column; `None` without a row.
fn means<const N: usize>(rows: impl Iterator<Item = [f64; N]>) -> Option<[f64; N]> {
    let (mut sums, mut count) = ([0.0; N], 0.0);
    for row in rows {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += value;
        }
        count += 1.0;
    }
    (count > 0.0).then(|| sums.map(|sum| sum / count))
}

/// 1 where the rewards are in the right order, ½ for a tie. A completion that is not there is held to have a reward of 0.
fn share_right(pair: &PairLogps, (chosen, rejected): (f64, f64)) -> f64 {
    let chosen = if pair.has_chosen() { chosen } else { 0.0 };
    let rejected = if pair.has_rejected() { rejected } else { 0.0 };
    if chosen > rejected {
        1.0
    } else if chosen == rejected {
        0.5
    } else {
        0.0
    }
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
