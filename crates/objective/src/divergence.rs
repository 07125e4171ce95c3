//! DPO under another divergence than the reverse KL: the sigmoid's argument is a difference of scores u(r) = f′(e^r), which
//! may be astronomical (e^300) where the log-ratios are not.
//!
//! | divergence | u(r) | u′(r) |
//! |---|---|---|
//! | `forward_kl` | −e^(−r) | e^(−r) |
//! | `js_divergence` | log σ(r) | σ(−r) |
//! | `alpha_divergence` | e^((α−1)r)/(α − 1) | e^((α−1)r) |

use crate::{Divergence, curves::log_sigmoid};

/// u(r_w) − u(r_l), and log u′ of both.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Scores {
    difference: f64,
    log_slopes: [f64; 2],
}

/// −(1 − ε)·log σ(x) − ε·log σ(−x) of x = β·(u(r_w) − u(r_l)), with its slopes by r_w and r_l.
///
/// A slope is a product of σ and u′. It is made of their logarithms: where u′ overflows, σ may be 0.
pub(crate) fn smoothed(
    divergence: Divergence,
    alpha: f64,
    beta: f64,
    flipped: f64,
    (chosen, rejected): (f64, f64),
) -> (f64, [f64; 2]) {
    let scores = scores(divergence, alpha, chosen, rejected);
    let x = beta * scores.difference;
    let weighted = |weight: f64, of: f64| if weight == 0.0 { 0.0 } else { weight * of };
    let value = -weighted(1.0 - flipped, log_sigmoid(x)) - weighted(flipped, log_sigmoid(-x));
    let [by_chosen, by_rejected] = scores.log_slopes.map(|log_slope| {
        beta * (weighted(flipped, (log_sigmoid(x) + log_slope).exp())
            - weighted(1.0 - flipped, (log_sigmoid(-x) + log_slope).exp()))
    });
    (value, [by_chosen, -by_rejected])
}

fn scores(divergence: Divergence, alpha: f64, chosen: f64, rejected: f64) -> Scores {
    match divergence {
        Divergence::ReverseKl => powers(0.0, chosen, rejected),
        Divergence::ForwardKl => powers(-1.0, chosen, rejected),
        Divergence::AlphaDivergence => powers(alpha - 1.0, chosen, rejected),
        Divergence::JsDivergence => Scores {
            difference: log_sigmoid(chosen) - log_sigmoid(rejected),
            log_slopes: [log_sigmoid(-chosen), log_sigmoid(-rejected)],
        },
    }
}

/// u(r) = e^(cr)/c, which is r where c is 0. The difference is that of the larger power times e^(c·Δr) − 1: taken apart, two
/// powers beyond f64 would give NaN, and two that are nearly 1 would cancel.
fn powers(c: f64, chosen: f64, rejected: f64) -> Scores {
    let apart = chosen - rejected;
    let difference = if c == 0.0 || apart == 0.0 {
        apart
    } else if c * apart <= 0.0 {
        (c * rejected).exp() * ((c * apart).exp_m1() / c)
    } else {
        -((c * chosen).exp() * ((-c * apart).exp_m1() / c))
    };
    Scores {
        difference,
        log_slopes: [c * chosen, c * rejected],
    }
}
