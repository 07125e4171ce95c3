//! One pair's share of the loss and its derivatives by the policy's log-probs.
//!
//! A share depends on its pair, on the global counts and, for the objectives that read them, on statistics of the whole batch.
//! For all others a rank can run the backward of a pack before it knows the other ranks' log-probs. The sum over all pairs is
//! the mean over the global batch however it was packed.

use crate::{
    BatchStatistics, Divergence, ObjectiveConfig,
    config::Targets,
    curves::{
        Curve, blended, hinge, kl_from, log_odds, logistic, smoothed, square, step, unbiased,
    },
    divergence,
};

/// What the loss reads of one pair: log-probs summed over completion tokens, in nats, and the token counts. A row may lack a
/// completion where the objective [takes unpaired rows](ObjectiveConfig::sides): that side has no tokens then, and
/// log-probs of 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairLogps {
    /// log π(chosen | prompt).
    pub chosen: f64,
    /// log π(rejected | prompt).
    pub rejected: f64,
    /// log π_ref(chosen | prompt); ignored by objectives that need no reference.
    pub reference_chosen: f64,
    /// log π_ref(rejected | prompt); ignored by objectives that need no reference.
    pub reference_rejected: f64,
    /// Scored tokens of the chosen completion; 0 if the row has none.
    pub chosen_tokens: u32,
    /// Scored tokens of the rejected completion; 0 if the row has none.
    pub rejected_tokens: u32,
    /// Scores of the chosen and the rejected completion, for objectives that [need them](ObjectiveConfig::needs_scores).
    pub scores: Option<[f64; 2]>,
}

/// A completion's mean log-prob (or log-ratio) per token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PerToken {
    pub value: f64,
    /// Its slope by the sum, 1/n.
    pub slope: f64,
}

impl PerToken {
    /// Without a token there is nothing to train: value and slope are 0.
    fn new(sum: f64, tokens: u32) -> Self {
        if tokens == 0 {
            return Self {
                value: 0.0,
                slope: 0.0,
            };
        }
        let count = f64::from(tokens);
        Self {
            value: sum / count,
            slope: 1.0 / count,
        }
    }
}

impl PairLogps {
    /// (r_w, r_l), the log-ratios against the reference.
    pub fn log_ratios(&self) -> (f64, f64) {
        (
            self.chosen - self.reference_chosen,
            self.rejected - self.reference_rejected,
        )
    }

    /// log π_w − log π_l, and the same of the reference.
    pub(crate) fn margins(&self) -> (f64, f64) {
        (
            self.chosen - self.rejected,
            self.reference_chosen - self.reference_rejected,
        )
    }

    pub(crate) fn has_chosen(&self) -> bool {
        self.chosen_tokens > 0
    }

    pub(crate) fn has_rejected(&self) -> bool {
        self.rejected_tokens > 0
    }

    /// Log-probs by token, chosen and rejected.
    pub(crate) fn per_token(&self) -> (PerToken, PerToken) {
        self.by_tokens((self.chosen, self.rejected))
    }

    fn by_tokens(&self, (chosen, rejected): (f64, f64)) -> (PerToken, PerToken) {
        (
            PerToken::new(chosen, self.chosen_tokens),
            PerToken::new(rejected, self.rejected_tokens),
        )
    }
}

/// Sizes of the global batch, over all ranks and packs of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlobalCounts {
    /// Pairs, and rows that lack a completion.
    pub pairs: u64,
    /// Completions that are there: two of a pair.
    pub completions: u64,
    /// Scored tokens of the chosen completions.
    pub chosen_tokens: u64,
}

/// One pair's share of the global mean: shares of all pairs add up to the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairLoss {
    /// Preference (or cross-entropy) term.
    pub pairwise: f64,
    /// Calibration term, λ included; 0 where the objective has none. It is all that `sppo_hard` has.
    pub calibration: f64,
    /// ∂L/∂ log π(chosen).
    pub d_chosen: f64,
    /// ∂L/∂ log π(rejected).
    pub d_rejected: f64,
}

impl PairLoss {
    /// Both terms together.
    pub fn loss(&self) -> f64 {
        self.pairwise + self.calibration
    }

    /// A preference term with its slopes by r_w and r_l, which are those by the log-probs.
    fn pairwise(value: f64, d_chosen: f64, d_rejected: f64) -> Self {
        Self {
            pairwise: value,
            calibration: 0.0,
            d_chosen,
            d_rejected,
        }
    }

    /// A curve at β·(chosen − rejected).
    fn contrast(beta: f64, curve: Curve) -> Self {
        let slope = beta * curve.slope;
        Self::pairwise(curve.value, slope, -slope)
    }

    /// A curve at β·(chosen/n_w − rejected/n_l).
    fn contrast_per_token(
        beta: f64,
        curve: Curve,
        (chosen, rejected): (PerToken, PerToken),
    ) -> Self {
        let slope = beta * curve.slope;
        Self::pairwise(curve.value, slope * chosen.slope, -slope * rejected.slope)
    }

    fn plus(self, other: Self) -> Self {
        Self {
            pairwise: self.pairwise + other.pairwise,
            calibration: self.calibration + other.calibration,
            d_chosen: self.d_chosen + other.d_chosen,
            d_rejected: self.d_rejected + other.d_rejected,
        }
    }

    fn times(self, factor: f64) -> Self {
        Self {
            pairwise: factor * self.pairwise,
            calibration: factor * self.calibration,
            d_chosen: factor * self.d_chosen,
            d_rejected: factor * self.d_rejected,
        }
    }
}

/// The share of `pair`, which is in `slot` of the global batch, in the mean over `counts`. `statistics` are that batch's.
///
/// # Panics
/// If the global batch is empty: a caller that scores a pair has counted it, its completions and its tokens. If the objective
/// reads statistics, or scores, that are not there.
pub fn pair_loss(
    config: &ObjectiveConfig,
    slot: usize,
    pair: &PairLogps,
    counts: GlobalCounts,
    statistics: &BatchStatistics,
) -> PairLoss {
    assert!(
        counts.pairs > 0,
        "a pair was scored in a global batch of 0 pairs"
    );
    let over_pairs = || of_pair(config, slot, pair, statistics).times(1.0 / counts.pairs as f64);
    match *config {
        ObjectiveConfig::Sft {} => negative_log_likelihood(pair, counts),
        ObjectiveConfig::Kto {
            beta,
            desirable_weight,
            undesirable_weight,
        } => {
            let weights = [desirable_weight, undesirable_weight];
            of_completions(beta, weights, pair, counts, statistics.baseline())
        }
        ObjectiveConfig::Cpo { nll_weight, .. } if nll_weight > 0.0 => {
            over_pairs().plus(negative_log_likelihood(pair, counts).times(nll_weight))
        }
        ObjectiveConfig::Orpo { .. } => over_pairs().plus(negative_log_likelihood(pair, counts)),
        ObjectiveConfig::Mix { ref parts } => {
            let parts = parts.iter().map(|part| {
                let share = pair_loss(&part.objective, slot, pair, counts, statistics);
                share.times(part.weight)
            });
            parts.fold(PairLoss::default(), PairLoss::plus)
        }
        _ => over_pairs(),
    }
}

/// What is a mean over pairs. Means over tokens or completions and sums of objectives are [`pair_loss`]'s.
fn of_pair(
    config: &ObjectiveConfig,
    slot: usize,
    pair: &PairLogps,
    statistics: &BatchStatistics,
) -> PairLoss {
    let ratios = pair.log_ratios();
    let (chosen, rejected) = ratios;
    let margin = chosen - rejected;
    match *config {
        ObjectiveConfig::CalDpo {
            beta,
            calibration_weight,
            calibration_shift,
            score_scale,
        } => {
            let fixed = Targets::new(beta, calibration_shift);
            let targets = score_scale.map_or(fixed, |scale| fixed.times(scale * score_gap(pair)));
            PairLoss::contrast(1.0, logistic(margin))
                .plus(calibration(targets, ratios).times(calibration_weight))
        }
        ObjectiveConfig::Dpo {
            beta,
            label_smoothing,
            divergence: Divergence::ReverseKl,
            ..
        } => PairLoss::contrast(beta, smoothed(beta * margin, label_smoothing)),
        ObjectiveConfig::Dpo {
            beta,
            label_smoothing,
            divergence,
            alpha,
        } => {
            let alpha = alpha.unwrap_or(0.5);
            let (value, [by_chosen, by_rejected]) =
                divergence::smoothed(divergence, alpha, beta, label_smoothing, ratios);
            PairLoss::pairwise(value, by_chosen, by_rejected)
        }
        ObjectiveConfig::Robust {
            beta,
            label_smoothing,
        } => PairLoss::contrast(beta, unbiased(beta * margin, label_smoothing)),
        ObjectiveConfig::ExoPair {
            beta,
            label_smoothing,
        } => PairLoss::contrast(beta, kl_from(beta * margin, label_smoothing)),
        ObjectiveConfig::Dpop {
            beta,
            penalty_weight,
        } => {
            let below = (-chosen).max(0.0);
            let Curve { value, slope } = logistic(beta * (margin - penalty_weight * below));
            let steeper = if below > 0.0 { penalty_weight } else { 0.0 };
            let slope = beta * slope;
            PairLoss::pairwise(value, slope * (1.0 + steeper), -slope)
        }
        ObjectiveConfig::Slic {
            beta,
            calibration_weight,
        } => PairLoss::contrast(beta, hinge(beta * margin))
            .plus(symmetric_calibration(beta, ratios).times(calibration_weight)),
        ObjectiveConfig::Ipo {
            beta,
            length_normalized,
            calibration_weight,
        } => {
            let target = 0.5 / beta;
            let contrast = if length_normalized {
                let per_token = pair.by_tokens(ratios);
                let margin = per_token.0.value - per_token.1.value;
                PairLoss::contrast_per_token(1.0, square(margin, target), per_token)
            } else {
                PairLoss::contrast(1.0, square(margin, target))
            };
            contrast.plus(symmetric_calibration(beta, ratios).times(calibration_weight))
        }
        ObjectiveConfig::SigmoidNorm { beta } => {
            let per_token = pair.by_tokens(ratios);
            let margin = per_token.0.value - per_token.1.value;
            PairLoss::contrast_per_token(beta, logistic(beta * margin), per_token)
        }
        ObjectiveConfig::SppoHard { beta } => symmetric_calibration(beta, ratios),
        ObjectiveConfig::NcaPair { beta } => {
            let [up, down, low] = [chosen, -chosen, -rejected].map(|ratio| logistic(beta * ratio));
            PairLoss::pairwise(
                up.value + 0.5 * down.value + 0.5 * low.value,
                beta * (up.slope - 0.5 * down.slope),
                -0.5 * beta * low.slope,
            )
        }
        ObjectiveConfig::ApoZero { beta } => {
            let (lost, low) = (step(-beta * chosen), step(beta * rejected));
            PairLoss::pairwise(lost.value + low.value, -beta * lost.slope, beta * low.slope)
        }
        ObjectiveConfig::ApoDown { beta } => {
            let (low, lost) = (step(beta * chosen), step(-beta * margin));
            PairLoss::pairwise(
                low.value + lost.value,
                beta * (low.slope - lost.slope),
                beta * lost.slope,
            )
        }
        ObjectiveConfig::BcoPair { beta } => {
            let shift = statistics.shift();
            let up = logistic(beta * (chosen - shift));
            let down = logistic(beta * (shift - rejected));
            PairLoss::pairwise(up.value + down.value, beta * up.slope, -beta * down.slope)
        }
        ObjectiveConfig::Aot {
            beta,
            label_smoothing,
        } => {
            let above = pair.margins().0 - statistics.reference_margin(slot);
            PairLoss::contrast(beta, smoothed(beta * above, label_smoothing))
        }
        // The pair's completions are in two terms of the sum, each with its opposite of the same rank. A term's value is in the
        // share of its chosen completion.
        ObjectiveConfig::AotUnpaired {
            beta,
            label_smoothing,
        } => {
            let [below, above] = statistics.opposites(slot);
            let of_chosen = smoothed(beta * (chosen - below), label_smoothing);
            let of_rejected = smoothed(beta * (above - rejected), label_smoothing);
            let (up, down) = (beta * of_chosen.slope, -beta * of_rejected.slope);
            PairLoss::pairwise(of_chosen.value, up, down)
        }
        ObjectiveConfig::Discopop { beta, tau } => {
            PairLoss::contrast(beta, blended(beta * margin, tau))
        }
        ObjectiveConfig::Cpo { beta, .. } => {
            PairLoss::contrast(beta, logistic(beta * (pair.chosen - pair.rejected)))
        }
        ObjectiveConfig::Simpo {
            beta,
            target_margin,
        } => {
            let per_token = pair.per_token();
            let margin = beta * (per_token.0.value - per_token.1.value) - target_margin;
            PairLoss::contrast_per_token(beta, logistic(margin), per_token)
        }
        ObjectiveConfig::Orpo { beta } => {
            let (chosen, rejected) = pair.per_token();
            let (likely, unlikely) = (log_odds(chosen.value), log_odds(rejected.value));
            let Curve { value, slope } = logistic(likely.value - unlikely.value);
            PairLoss::pairwise(
                beta * value,
                beta * slope * likely.slope * chosen.slope,
                -beta * slope * unlikely.slope * rejected.slope,
            )
        }
        ObjectiveConfig::Sft {} | ObjectiveConfig::Kto { .. } | ObjectiveConfig::Mix { .. } => {
            unreachable!("{} is no mean over pairs", config.kind())
        }
    }
}

/// (r_w − t_w)² + (r_l − t_l)².
fn calibration(targets: Targets, (chosen, rejected): (f64, f64)) -> PairLoss {
    let chosen = square(chosen, targets.chosen);
    let rejected = square(rejected, targets.rejected);
    PairLoss {
        pairwise: 0.0,
        calibration: chosen.value + rejected.value,
        d_chosen: chosen.slope,
        d_rejected: rejected.slope,
    }
}

fn symmetric_calibration(beta: f64, ratios: (f64, f64)) -> PairLoss {
    calibration(Targets::new(beta, 0.5), ratios)
}

fn score_gap(pair: &PairLogps) -> f64 {
    let [chosen, rejected] = pair
        .scores
        .expect("a pair without scores was given to an objective whose targets are of scores");
    chosen - rejected
}

/// λ_D·σ(−β(r_w − z)) + λ_U·σ(β(r_l − z)) of the completions that are there, as a share of the mean over the global batch's.
fn of_completions(
    beta: f64,
    [desirable, undesirable]: [f64; 2],
    pair: &PairLogps,
    counts: GlobalCounts,
    baseline: f64,
) -> PairLoss {
    if !pair.has_chosen() && !pair.has_rejected() {
        return PairLoss::default();
    }
    assert!(
        counts.completions > 0,
        "a completion was scored in a global batch of 0 completions"
    );
    let share = 1.0 / counts.completions as f64;
    let of_side = |weight: f64, is_there: bool| if is_there { share * weight } else { 0.0 };
    let desirable = of_side(desirable, pair.has_chosen());
    let undesirable = of_side(undesirable, pair.has_rejected());
    let (chosen, rejected) = pair.log_ratios();
    let lost = step(beta * (baseline - chosen));
    let low = step(beta * (rejected - baseline));
    PairLoss::pairwise(
        desirable * lost.value + undesirable * low.value,
        -desirable * beta * lost.slope,
        undesirable * beta * low.slope,
    )
}

/// −log π(chosen) as a share of the mean over the global batch's chosen tokens.
fn negative_log_likelihood(pair: &PairLogps, counts: GlobalCounts) -> PairLoss {
    if !pair.has_chosen() {
        return PairLoss::default();
    }
    assert!(
        counts.chosen_tokens > 0,
        "a pair was scored in a global batch of 0 tokens"
    );
    let share = 1.0 / counts.chosen_tokens as f64;
    PairLoss::pairwise(-share * pair.chosen, -share, 0.0)
}
