//! One pair's share of the loss and its derivatives by the policy's log-probs.
//!
//! A share depends on its pair and on the global counts alone, so that a rank can run the backward of a pack before it
//! knows the other ranks' log-probs, and the sum over all pairs is the mean over the global batch however it was packed.

use crate::ObjectiveConfig;

/// What the loss reads of one pair: log-probs summed over completion tokens, in nats, and the token counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairLogps {
    /// log π(chosen | prompt).
    pub chosen: f64,
    /// log π(rejected | prompt); 0 for rows without a rejected completion.
    pub rejected: f64,
    /// log π_ref(chosen | prompt); ignored by objectives that need no reference.
    pub reference_chosen: f64,
    /// log π_ref(rejected | prompt); ignored by objectives that need no reference.
    pub reference_rejected: f64,
    /// Scored tokens of the chosen completion.
    pub chosen_tokens: u32,
    /// Scored tokens of the rejected completion.
    pub rejected_tokens: u32,
}

impl PairLogps {
    /// (r_w, r_l), the log-ratios against the reference.
    pub fn log_ratios(&self) -> (f64, f64) {
        (
            self.chosen - self.reference_chosen,
            self.rejected - self.reference_rejected,
        )
    }
}

/// Sizes of the global batch, over all ranks and packs of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlobalCounts {
    /// Pairs.
    pub pairs: u64,
    /// Scored tokens of the chosen completions.
    pub chosen_tokens: u64,
}

/// One pair's share of the global mean: shares of all pairs add up to the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairLoss {
    /// Preference (or cross-entropy) term.
    pub pairwise: f64,
    /// Calibration term, λ included; 0 where the objective has none.
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
}

/// The share of `pair` in the mean over `counts`.
///
/// # Panics
/// If the global batch is empty: a caller that scores a pair has counted it.
pub fn pair_loss(config: &ObjectiveConfig, pair: &PairLogps, counts: GlobalCounts) -> PairLoss {
    assert!(
        counts.pairs > 0,
        "a pair was scored in a global batch of 0 pairs"
    );
    let (chosen, rejected) = pair.log_ratios();
    let margin = chosen - rejected;
    let share = 1.0 / counts.pairs as f64;
    match *config {
        ObjectiveConfig::CalDpo {
            beta,
            calibration_weight,
        } => {
            let target = 0.5 / beta;
            let (above, below) = (chosen - target, rejected + target);
            let slope = sigmoid(-margin);
            PairLoss {
                pairwise: -share * log_sigmoid(margin),
                calibration: share * calibration_weight * (above * above + below * below),
                d_chosen: share * (2.0 * calibration_weight * above - slope),
                d_rejected: share * (2.0 * calibration_weight * below + slope),
            }
        }
        ObjectiveConfig::Dpo {
            beta,
            label_smoothing,
        } => {
            let scaled = beta * margin;
            let kept = 1.0 - label_smoothing;
            let slope = beta * (label_smoothing * sigmoid(scaled) - kept * sigmoid(-scaled));
            PairLoss {
                pairwise: -share
                    * (kept * log_sigmoid(scaled) + label_smoothing * log_sigmoid(-scaled)),
                calibration: 0.0,
                d_chosen: share * slope,
                d_rejected: -share * slope,
            }
        }
        ObjectiveConfig::Sft {} => {
            assert!(
                counts.chosen_tokens > 0,
                "a pair was scored in a global batch of 0 tokens"
            );
            let share = 1.0 / counts.chosen_tokens as f64;
            PairLoss {
                pairwise: -share * pair.chosen,
                calibration: 0.0,
                d_chosen: -share,
                d_rejected: 0.0,
            }
        }
    }
}

/// σ(x) without overflow.
fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// log σ(x) without overflow or cancellation.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}
