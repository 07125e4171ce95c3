//! What people are told of an objective: its name, where it comes from, and its equation.

use crate::{Divergence, ObjectiveConfig};

/// A description for model cards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Such as `Cal-DPO`.
    pub name: &'static str,
    /// Number of the paper on arXiv.
    pub arxiv: Option<&'static str>,
    /// Number of the equation there, where it is this one.
    pub number: Option<u32>,
    /// With r_w, r_l, log-probs log π and tokens n.
    pub equation: &'static str,
}

impl ObjectiveConfig {
    /// What to say of it. Optional terms that are off are left out.
    pub fn about(&self) -> About {
        let of = |name, arxiv, number, equation| About {
            name,
            arxiv: Some(arxiv),
            number,
            equation,
        };
        match *self {
            Self::CalDpo {
                score_scale: Some(_),
                ..
            } => of(
                "Cal-DPO with targets from scores",
                "2412.14516",
                None,
                "L = −log σ(r_w − r_l) + λ·[(r_w − (1 − s)·κ·g/β)² + (r_l + s·κ·g/β)²], g = score_w − score_l",
            ),
            Self::CalDpo {
                calibration_shift, ..
            } if calibration_shift != 0.5 => of(
                "Cal-DPO",
                "2412.14516",
                None,
                "L = −log σ(r_w − r_l) + λ·[(r_w − (1 − s)/β)² + (r_l + s/β)²]",
            ),
            Self::CalDpo { .. } => of(
                "Cal-DPO",
                "2412.14516",
                Some(10),
                "L = −log σ(r_w − r_l) + λ·[(r_w − 1/(2β))² + (r_l + 1/(2β))²]",
            ),
            Self::Dpo { divergence, .. } => match divergence {
                Divergence::ReverseKl => of(
                    "DPO",
                    "2305.18290",
                    Some(7),
                    "L = −(1 − ε)·log σ(β·(r_w − r_l)) − ε·log σ(−β·(r_w − r_l))",
                ),
                Divergence::ForwardKl => of(
                    "f-DPO with the forward KL",
                    "2309.16240",
                    None,
                    "L = −(1 − ε)·log σ(x) − ε·log σ(−x), x = β·(e^(−r_l) − e^(−r_w))",
                ),
                Divergence::JsDivergence => of(
                    "f-DPO with the Jensen-Shannon divergence",
                    "2309.16240",
                    None,
                    "L = −(1 − ε)·log σ(x) − ε·log σ(−x), x = β·(log σ(r_w) − log σ(r_l))",
                ),
                Divergence::AlphaDivergence => of(
                    "f-DPO with an α-divergence",
                    "2309.16240",
                    None,
                    "L = −(1 − ε)·log σ(x) − ε·log σ(−x), x = β·(e^((α−1)·r_w) − e^((α−1)·r_l))/(α − 1)",
                ),
            },
            Self::Robust { .. } => of(
                "robust DPO",
                "2403.00409",
                None,
                "L = [−(1 − ε)·log σ(β·(r_w − r_l)) + ε·log σ(−β·(r_w − r_l))]/(1 − 2ε)",
            ),
            Self::ExoPair { .. } => of(
                "EXO on pairs",
                "2402.00856",
                Some(16),
                "L = KL((σ(x), σ(−x)) ‖ (1 − ε, ε)), x = β·(r_w − r_l)",
            ),
            Self::Dpop { .. } => of(
                "DPO-Positive",
                "2402.13228",
                None,
                "L = −log σ(β·(r_w − r_l − λ·max(0, −r_w)))",
            ),
            Self::Slic {
                calibration_weight, ..
            } if calibration_weight > 0.0 => of(
                "calibrated SLiC",
                "2412.14516",
                None,
                "L = max(0, 1 − β·(r_w − r_l)) + λ·[(r_w − 1/(2β))² + (r_l + 1/(2β))²]",
            ),
            Self::Slic { .. } => of("SLiC", "2305.10425", None, "L = max(0, 1 − β·(r_w − r_l))"),
            Self::Ipo {
                calibration_weight,
                length_normalized,
                ..
            } => match (calibration_weight > 0.0, length_normalized) {
                (true, false) => of(
                    "calibrated IPO",
                    "2412.14516",
                    None,
                    "L = (r_w − r_l − 1/(2β))² + λ·[(r_w − 1/(2β))² + (r_l + 1/(2β))²]",
                ),
                (true, true) => of(
                    "calibrated length-normalized IPO",
                    "2412.14516",
                    None,
                    "L = (r_w/n_w − r_l/n_l − 1/(2β))² + λ·[(r_w − 1/(2β))² + (r_l + 1/(2β))²]",
                ),
                (false, false) => of("IPO", "2310.12036", Some(17), "L = (r_w − r_l − 1/(2β))²"),
                (false, true) => of(
                    "length-normalized IPO",
                    "2310.12036",
                    None,
                    "L = (r_w/n_w − r_l/n_l − 1/(2β))²",
                ),
            },
            Self::SigmoidNorm { .. } => of(
                "length-normalized DPO",
                "2411.15124",
                None,
                "L = −log σ(β·(r_w/n_w − r_l/n_l))",
            ),
            Self::SppoHard { .. } => of(
                "SPPO with hard labels",
                "2405.00675",
                None,
                "L = (r_w − 1/(2β))² + (r_l + 1/(2β))²",
            ),
            Self::NcaPair { .. } => of(
                "NCA on pairs",
                "2402.05369",
                None,
                "L = −log σ(β·r_w) − ½·log σ(−β·r_w) − ½·log σ(−β·r_l)",
            ),
            Self::ApoZero { .. } => of(
                "APO-zero",
                "2408.06266",
                Some(7),
                "L = 1 − σ(β·r_w) + σ(β·r_l)",
            ),
            Self::ApoDown { .. } => of(
                "APO-down",
                "2408.06266",
                Some(8),
                "L = σ(β·r_w) + 1 − σ(β·(r_w − r_l))",
            ),
            Self::BcoPair { .. } => of(
                "BCO on pairs",
                "2404.04656",
                None,
                "L = −log σ(β·r_w − δ) − log σ(−(β·r_l − δ)), δ = β·(running mean of r)",
            ),
            Self::Aot { .. } => of(
                "paired AOT",
                "2406.05882",
                None,
                "L = −(1 − ε)·log σ(β·x) − ε·log σ(−β·x), x = sorted(log π_w − log π_l) − sorted(log π_ref,w − log π_ref,l)",
            ),
            Self::AotUnpaired { .. } => of(
                "unpaired AOT",
                "2406.05882",
                None,
                "L = −(1 − ε)·log σ(β·x) − ε·log σ(−β·x), x = sorted(r_w) − sorted(r_l)",
            ),
            Self::Kto { .. } => of(
                "KTO",
                "2402.01306",
                None,
                "L = λ_D·(1 − σ(β·(r_w − z))) or λ_U·(1 − σ(β·(z − r_l))), z = max(0, mean of mismatched r)",
            ),
            Self::Discopop { .. } => of(
                "DiscoPOP",
                "2406.08414",
                Some(5),
                "L = (1 − m)·(−log σ(x)) + m·e^(−x), x = β·(r_w − r_l), m = σ(x/τ)",
            ),
            Self::Cpo { .. } => of(
                "CPO",
                "2401.08417",
                None,
                "L = −log σ(β·(log π_w − log π_l)) − α·log π_w per token",
            ),
            Self::Simpo { .. } => of(
                "SimPO",
                "2405.14734",
                Some(6),
                "L = −log σ(β·(log π_w/n_w − log π_l/n_l) − γ)",
            ),
            Self::Orpo { .. } => of(
                "ORPO",
                "2403.07691",
                Some(6),
                "L = −log π_w per token − β·log σ(log odds_w − log odds_l), odds = p/(1 − p), p = e^(log π/n)",
            ),
            Self::Sft {} => About {
                name: "supervised fine-tuning",
                arxiv: None,
                number: None,
                equation: "L = −log π(completion | prompt)",
            },
            Self::Mix { .. } => About {
                name: "a mix of objectives",
                arxiv: None,
                number: None,
                equation: "L = Σ weight·L of the parts",
            },
        }
    }
}
