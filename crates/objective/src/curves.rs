//! Losses of one number x with their slopes, in forms that neither overflow nor cancel.

/// A loss at some x.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Curve {
    /// L(x).
    pub value: f64,
    /// dL/dx.
    pub slope: f64,
}

/// −log σ(x).
pub(crate) fn logistic(x: f64) -> Curve {
    Curve {
        value: -log_sigmoid(x),
        slope: -sigmoid(-x),
    }
}

/// −(1 − ε)·log σ(x) − ε·log σ(−x).
pub(crate) fn smoothed(x: f64, flipped: f64) -> Curve {
    let kept = 1.0 - flipped;
    Curve {
        value: -(kept * log_sigmoid(x) + flipped * log_sigmoid(-x)),
        slope: flipped * sigmoid(x) - kept * sigmoid(-x),
    }
}

/// [−(1 − ε)·log σ(x) + ε·log σ(−x)] / (1 − 2ε).
pub(crate) fn unbiased(x: f64, flipped: f64) -> Curve {
    let kept = 1.0 - flipped;
    let scale = 1.0 / (1.0 - 2.0 * flipped);
    Curve {
        value: scale * (flipped * log_sigmoid(-x) - kept * log_sigmoid(x)),
        slope: -scale * (kept * sigmoid(-x) + flipped * sigmoid(x)),
    }
}

/// max(0, 1 − x); its slope at 1 is 0.
pub(crate) fn hinge(x: f64) -> Curve {
    let below = 1.0 - x;
    Curve {
        value: below.max(0.0),
        slope: if below > 0.0 { -1.0 } else { 0.0 },
    }
}

/// (x − t)².
pub(crate) fn square(x: f64, target: f64) -> Curve {
    let above = x - target;
    Curve {
        value: above * above,
        slope: 2.0 * above,
    }
}

/// σ(x).
pub(crate) fn step(x: f64) -> Curve {
    Curve {
        value: sigmoid(x),
        slope: sigmoid(x) * sigmoid(-x),
    }
}

/// KL of (σ(x), σ(−x)) from (1 − ε, ε). Its slope is σ(x)·σ(−x)·(x − log((1 − ε)/ε)), since log σ(x) − log σ(−x) = x.
pub(crate) fn kl_from(x: f64, rejected: f64) -> Curve {
    let (q_w, q_l) = (sigmoid(x), sigmoid(-x));
    let (log_p_w, log_p_l) = ((-rejected).ln_1p(), rejected.ln());
    Curve {
        value: q_w * (log_sigmoid(x) - log_p_w) + q_l * (log_sigmoid(-x) - log_p_l),
        slope: q_w * q_l * (x - (log_p_w - log_p_l)),
    }
}

/// (1 − m)·(−log σ(x)) + m·e^(−x), m = σ(x/τ). Products with e^(−x) are made of sums of logarithms: where that overflows, m
/// is 0 and the product is NaN.
pub(crate) fn blended(x: f64, tau: f64) -> Curve {
    let (log_m, log_rest) = (log_sigmoid(x / tau), log_sigmoid(-x / tau));
    let (m, rest) = (sigmoid(x / tau), sigmoid(-x / tau));
    let exponential = (log_m - x).exp();
    let exponential_moved = (log_m + log_rest - x).exp() / tau;
    let Curve { value, slope } = logistic(x);
    Curve {
        value: rest * value + exponential,
        slope: rest * slope - value * (m * rest / tau) - exponential + exponential_moved,
    }
}

/// The largest mean log-prob whose odds are told apart from certainty: one f32 step below a probability of 1. The log-probs
/// come from f32, where a completion that the policy is sure of has exactly 0, and the odds of that are infinite.
const SURE: f64 = -5.960_464_477_539_063e-8;

/// log(p/(1 − p)) of p = e^ℓ for ℓ ≤ 0, by ℓ; from [`SURE`] on as there.
pub(crate) fn log_odds(log_prob: f64) -> Curve {
    let log_prob = log_prob.min(SURE);
    let rest = -log_prob.exp_m1();
    let log_rest = if log_prob > -std::f64::consts::LN_2 {
        rest.ln()
    } else {
        (-log_prob.exp()).ln_1p()
    };
    Curve {
        value: log_prob - log_rest,
        slope: 1.0 / rest,
    }
}

/// σ(x) without overflow.
pub(crate) fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// log σ(x) without overflow or cancellation.
pub(crate) fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}
