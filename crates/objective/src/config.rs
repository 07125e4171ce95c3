//! Which objective a job trains, and the parameters that belong to it.
//!
//! An enum whose variants own their fields, so that a parameter of another objective is refused.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, SeqAccess, Visitor},
};

/// An objective and its parameters, as `[objective]` in a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[schemars(transform = complete_parts)]
pub enum ObjectiveConfig {
    /// L = −log σ(D) + λ·[(r_w − (1−s)/β)² + (r_l + s/β)²] (Xiao et al. 2024, arXiv 2412.14516, Eq. 10, where s is ½). β sets
    /// the targets, which are ±t for s = ½, and is not inside the sigmoid. With κ the targets are a pair's own, of its scores.
    CalDpo {
        /// β of the targets. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// λ; 1 in the paper, 0.5 in the authors' released Zephyr code. Default 1.
        #[serde(default = "one")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        calibration_weight: f64,
        /// s, which moves both targets down by (s − ½)/β and keeps their distance 1/β. Default 0.5.
        #[serde(default = "half")]
        #[schemars(range(min = 0, max = 1))]
        calibration_shift: f64,
        /// κ: both targets are multiplied by κ·(score_chosen − score_rejected), so that a gap of 1/κ has the fixed ones. Of
        /// scores only the gap enters: log-ratios know rewards up to a constant of the prompt (log Z in the paper). Needs
        /// scores in the data. Left out by default: fixed targets.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        score_scale: Option<f64>,
    },
    /// L = −(1 − ε)·log σ(βD) − ε·log σ(−βD) (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; ε > 0 is cDPO). With a divergence
    /// D is of scores f′(e^r) in place of r (Wang et al. 2023, arXiv 2309.16240).
    Dpo {
        /// β of the sigmoid. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// ε, the assumed share of flipped labels, in [0, 0.5). Default 0.
        #[serde(default)]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 0.5))]
        label_smoothing: f64,
        /// What holds the policy to the reference. Default `reverse_kl`.
        #[serde(default)]
        divergence: Divergence,
        /// α of `alpha_divergence`, in [0, 1]: 0 is `forward_kl`, 1 `reverse_kl`. Refused with the others. Default 0.5.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 0, max = 1))]
        alpha: Option<f64>,
    },
    /// L = [−(1 − ε)·log σ(βD) + ε·log σ(−βD)] / (1 − 2ε): DPO's loss without bias where a share ε of labels is flipped
    /// (Chowdhury et al. 2024, arXiv 2403.00409). It may fall below 0.
    Robust {
        /// β of the sigmoid. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// ε, the share of flipped labels, in [0, 0.5). Default 0.1.
        #[serde(default = "default_flipped")]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 0.5))]
        label_smoothing: f64,
    },
    /// L = KL(q ‖ p) with q = (σ(βD), σ(−βD)) and p = (1 − ε, ε) (Ji et al. 2024, arXiv 2402.00856, Eq. 16).
    ExoPair {
        /// β of the sigmoid. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// ε, the rejected completion's share of p, in (0, 0.5). Default 0.001.
        #[serde(default = "default_exo")]
        #[schemars(extend("exclusiveMinimum" = 0), extend("exclusiveMaximum" = 0.5))]
        label_smoothing: f64,
    },
    /// L = −log σ(β·(D − λ·max(0, −r_w))): DPO that pays for chosen below the reference (Pal et al. 2024, arXiv 2402.13228).
    Dpop {
        /// β of the sigmoid. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// λ of the penalty. Default 50.
        #[serde(default = "default_penalty")]
        #[schemars(range(min = 0))]
        penalty_weight: f64,
    },
    /// L = max(0, 1 − βD) + λ·calibration: a hinge (Zhao et al. 2023, arXiv 2305.10425, on log-ratios as in TRL); with λ > 0 its
    /// calibrated form (arXiv 2412.14516).
    Slic {
        /// β of the hinge and of the targets ±1/(2β). Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// λ of the same calibration term as in `cal_dpo`, (r_w − t)² + (r_l + t)²; 0 leaves it out. Default 0.
        #[serde(default)]
        #[schemars(range(min = 0))]
        calibration_weight: f64,
    },
    /// L = (D − t)² + λ·calibration (Azar et al. 2023, arXiv 2310.12036, Eq. 17); with λ > 0 its calibrated form (arXiv
    /// 2412.14516).
    Ipo {
        /// β of t = 1/(2β), τ in the paper. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// Take D of log-ratios per token, as TRL does. The calibration term keeps the sums. Default false.
        #[serde(default)]
        length_normalized: bool,
        /// λ of the same calibration term as in `cal_dpo`, (r_w − t)² + (r_l + t)²; 0 leaves it out. Default 0.
        #[serde(default)]
        #[schemars(range(min = 0))]
        calibration_weight: f64,
    },
    /// L = −log σ(β·(r_w/n_w − r_l/n_l)): DPO on log-ratios per token (Lambert et al. 2024, arXiv 2411.15124).
    SigmoidNorm {
        /// β of the sigmoid. Per token it has to be larger than DPO's. Default 5.
        #[serde(default = "default_beta_per_token")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
    },
    /// L = (r_w − t)² + (r_l + t)²: the calibration term alone (Wu et al. 2024, arXiv 2405.00675, with hard labels).
    SppoHard {
        /// β of the targets ±1/(2β). Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
    },
    /// L = −log σ(βr_w) − ½·log σ(−βr_w) − ½·log σ(−βr_l) (Chen et al. 2024, arXiv 2402.05369).
    NcaPair {
        /// β of the sigmoids. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
    },
    /// L = 1 − σ(βr_w) + σ(βr_l): chosen up and rejected down (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7).
    ApoZero {
        /// β of the sigmoids. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
    },
    /// L = σ(βr_w) + 1 − σ(βD): both down, rejected more (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8).
    ApoDown {
        /// β of the sigmoids. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
    },
    /// L = −log σ(βr_w − δ) − log σ(−(βr_l − δ)), δ = β·(mean r of both sides, averaged over the batches so far and this one),
    /// through which no gradient flows (Jung et al. 2024, arXiv 2404.04656; on pairs as in TRL 0.24, while TRL 1.16 has no δ).
    BcoPair {
        /// β of the sigmoids. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
    },
    /// L = −(1 − ε)·log σ(βx) − ε·log σ(−βx), x = sorted(log π_w − log π_l) − sorted(log π_ref,w − log π_ref,l) over the global
    /// batch: the policy's margins as a whole are to exceed the reference's (Melnyk et al. 2024, arXiv 2406.05882, paired).
    Aot {
        /// β of the sigmoid. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// ε, the assumed share of flipped labels, in [0, 0.5). Default 0.
        #[serde(default)]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 0.5))]
        label_smoothing: f64,
    },
    /// L = −(1 − ε)·log σ(βx) − ε·log σ(−βx), x = sorted(r_w) − sorted(r_l) over the global batch: chosen as a whole are to exceed
    /// rejected, whoever was paired with whom (Melnyk et al. 2024, arXiv 2406.05882, unpaired). Rows have both all the same.
    AotUnpaired {
        /// β of the sigmoid. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// ε, the assumed share of flipped labels, in [0, 0.5). Default 0.
        #[serde(default)]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 0.5))]
        label_smoothing: f64,
    },
    /// L = λ_D·(1 − σ(β(r_w − z))) for a desirable completion, λ_U·(1 − σ(β(z − r_l))) for an undesirable one (Ethayarajh et
    /// al. 2024, arXiv 2402.01306), a mean over the global batch's completions. z = max(0, mean r of completions after
    /// prompts of other rows), without gradient. Rows may have one side only.
    Kto {
        /// β of the sigmoids. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// λ_D, of desirable completions. Default 1.
        #[serde(default = "one")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        desirable_weight: f64,
        /// λ_U, of undesirable completions. Default 1.
        #[serde(default = "one")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        undesirable_weight: f64,
    },
    /// L = (1 − m)·(−log σ(βD)) + m·e^(−βD) with m = σ(βD/τ) (Lu et al. 2024, arXiv 2406.08414, Eq. 5).
    Discopop {
        /// β inside all of them. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// τ, how sharply the two losses change over. Default 0.05.
        #[serde(default = "default_tau")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        tau: f64,
    },
    /// L = −log σ(β·(log π_w − log π_l)) + α·NLL of chosen (Xu et al. 2024, arXiv 2401.08417). The NLL is a mean over the global
    /// batch's tokens. No reference.
    Cpo {
        /// β of the sigmoid. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// α; 0 leaves the NLL out. Default 1.
        #[serde(default = "one")]
        #[schemars(range(min = 0))]
        nll_weight: f64,
    },
    /// L = −log σ(β·(log π_w/n_w − log π_l/n_l) − γ) (Meng et al. 2024, arXiv 2405.14734, Eq. 6). No reference.
    Simpo {
        /// β of the sigmoid. Default 2.
        #[serde(default = "default_beta_simpo")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// γ, the margin that β times the difference is to exceed. Default 0.5.
        #[serde(default = "half")]
        #[schemars(range(min = 0))]
        target_margin: f64,
    },
    /// L = NLL of chosen − β·log σ(log odds_w − log odds_l) with odds = p/(1 − p), p = e^(log π/n) (Hong et al. 2024, arXiv
    /// 2403.07691, Eq. 6; β is λ there). The NLL is a mean over the global batch's tokens. No reference.
    Orpo {
        /// Weight of the odds-ratio term. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
    },
    /// Cross entropy of the chosen completions, a mean over the global batch's tokens. No reference, no rejected side.
    Sft {},
    /// Σ weight·L of other kinds, such as RPO: `parts = [{ kind = "dpo" }, { kind = "sft" }]` (arXiv 2404.19733).
    Mix {
        /// What is added up: objectives with their parameters and weights. At least one; a mix is no part of a mix.
        #[serde(deserialize_with = "parts")]
        #[schemars(schema_with = "parts_schema")]
        parts: Vec<Part>,
    },
}

/// What holds the policy to the reference in `dpo`: which function of r is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// r: DPO.
    #[default]
    ReverseKl,
    /// −e^(−r).
    ForwardKl,
    /// log σ(r).
    JsDivergence,
    /// e^((α−1)·r)/(α − 1).
    AlphaDivergence,
}

impl Divergence {
    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::ReverseKl => "reverse_kl",
            Self::ForwardKl => "forward_kl",
            Self::JsDivergence => "js_divergence",
            Self::AlphaDivergence => "alpha_divergence",
        }
    }
}

/// A part of a mix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Factor of its loss. Default 1.
    #[serde(default = "one")]
    pub weight: f64,
    /// Any kind but a mix.
    #[serde(flatten)]
    pub objective: ObjectiveConfig,
}

/// A parameter outside its range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct ConfigError {
    /// Dotted path of the key.
    pub key: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

/// Where an objective pulls the log-ratios, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Targets {
    /// Of r_w.
    pub chosen: f64,
    /// Of r_l.
    pub rejected: f64,
}

/// Which completions an objective reads of a row, from the fewest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sides {
    /// The chosen one alone.
    Chosen,
    /// Whichever are there: a row may lack one.
    Either,
    /// Both, and every row has them.
    Both,
}

/// A number of an objective.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parameter {
    /// Its key.
    pub key: &'static str,
    /// Its letter in the equations.
    pub symbol: &'static str,
    /// Its value.
    pub value: f64,
    /// Its default; `None` for one that is off by default.
    pub usual: Option<f64>,
    range: Range,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Range {
    Positive,
    AtLeastZero,
    UpToOne,
    BelowHalf,
    InsideHalf,
}

impl ObjectiveConfig {
    /// Checks every parameter's range.
    ///
    /// # Errors
    /// The first parameter outside its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_at("objective")
    }

    fn validate_at(&self, path: &str) -> Result<(), ConfigError> {
        let refuse = |key: &str, reason: String| {
            let key = format!("{path}.{key}");
            Err(ConfigError { key, reason })
        };
        for Parameter {
            key, value, range, ..
        } in self.parameters()
        {
            if !range.contains(value) {
                return refuse(key, format!("must be {}, got {value}", range.words()));
            }
        }
        match self {
            Self::Dpo {
                divergence,
                alpha: Some(_),
                ..
            } if *divergence != Divergence::AlphaDivergence => refuse(
                "alpha",
                format!(
                    "belongs to divergence = \"alpha_divergence\", not to \"{}\"",
                    divergence.name()
                ),
            ),
            Self::Mix { parts } if parts.is_empty() => refuse(
                "parts",
                "is empty; name at least one, such as { kind = \"dpo\" }".into(),
            ),
            Self::Mix { parts } => {
                for (index, part) in parts.iter().enumerate() {
                    part.validate_at(&format!("{path}.parts[{index}]"))?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Its name in configurations.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::CalDpo { .. } => "cal_dpo",
            Self::Dpo { .. } => "dpo",
            Self::Robust { .. } => "robust",
            Self::ExoPair { .. } => "exo_pair",
            Self::Dpop { .. } => "dpop",
            Self::Slic { .. } => "slic",
            Self::Ipo { .. } => "ipo",
            Self::SigmoidNorm { .. } => "sigmoid_norm",
            Self::SppoHard { .. } => "sppo_hard",
            Self::NcaPair { .. } => "nca_pair",
            Self::ApoZero { .. } => "apo_zero",
            Self::ApoDown { .. } => "apo_down",
            Self::BcoPair { .. } => "bco_pair",
            Self::Aot { .. } => "aot",
            Self::AotUnpaired { .. } => "aot_unpaired",
            Self::Kto { .. } => "kto",
            Self::Discopop { .. } => "discopop",
            Self::Cpo { .. } => "cpo",
            Self::Simpo { .. } => "simpo",
            Self::Orpo { .. } => "orpo",
            Self::Sft {} => "sft",
            Self::Mix { .. } => "mix",
        }
    }

    /// Its numbers, β first; none for a mix, whose parts have them.
    pub fn parameters(&self) -> Vec<Parameter> {
        use Range::{AtLeastZero, BelowHalf, InsideHalf, Positive, UpToOne};
        let parameter = |key, symbol, value, usual, range| Parameter {
            key,
            symbol,
            value,
            usual: Some(usual),
            range,
        };
        let beta = |value, usual| parameter("beta", "β", value, usual, Positive);
        let usual_beta = |value| beta(value, default_beta());
        let smoothing =
            |value, usual, range| parameter("label_smoothing", "ε", value, usual, range);
        let weight =
            |value, usual, range| parameter("calibration_weight", "λ", value, usual, range);
        match *self {
            Self::CalDpo {
                beta,
                calibration_weight,
                calibration_shift: shift,
                score_scale,
            } => {
                let mut all = vec![
                    usual_beta(beta),
                    weight(calibration_weight, one(), Positive),
                    parameter("calibration_shift", "s", shift, half(), UpToOne),
                ];
                all.extend(score_scale.map(|value| Parameter {
                    key: "score_scale",
                    symbol: "κ",
                    value,
                    usual: None,
                    range: Positive,
                }));
                all
            }
            Self::Kto {
                beta,
                desirable_weight: desirable,
                undesirable_weight: undesirable,
            } => vec![
                usual_beta(beta),
                parameter("desirable_weight", "λ_D", desirable, one(), Positive),
                parameter("undesirable_weight", "λ_U", undesirable, one(), Positive),
            ],
            Self::Aot {
                beta,
                label_smoothing,
            }
            | Self::AotUnpaired {
                beta,
                label_smoothing,
            } => vec![usual_beta(beta), smoothing(label_smoothing, 0.0, BelowHalf)],
            Self::Dpo {
                beta,
                label_smoothing,
                alpha,
                ..
            } => {
                let mut all = vec![usual_beta(beta), smoothing(label_smoothing, 0.0, BelowHalf)];
                all.extend(alpha.map(|alpha| parameter("alpha", "α", alpha, half(), UpToOne)));
                all
            }
            Self::Robust {
                beta,
                label_smoothing,
            } => vec![
                usual_beta(beta),
                smoothing(label_smoothing, default_flipped(), BelowHalf),
            ],
            Self::ExoPair {
                beta,
                label_smoothing,
            } => vec![
                usual_beta(beta),
                smoothing(label_smoothing, default_exo(), InsideHalf),
            ],
            Self::Dpop {
                beta,
                penalty_weight: penalty,
            } => vec![
                usual_beta(beta),
                parameter(
                    "penalty_weight",
                    "λ",
                    penalty,
                    default_penalty(),
                    AtLeastZero,
                ),
            ],
            Self::Slic {
                beta,
                calibration_weight,
            }
            | Self::Ipo {
                beta,
                calibration_weight,
                ..
            } => vec![
                usual_beta(beta),
                weight(calibration_weight, 0.0, AtLeastZero),
            ],
            Self::SppoHard { beta }
            | Self::NcaPair { beta }
            | Self::ApoZero { beta }
            | Self::ApoDown { beta }
            | Self::BcoPair { beta }
            | Self::Orpo { beta } => vec![usual_beta(beta)],
            Self::SigmoidNorm { beta: value } => vec![beta(value, default_beta_per_token())],
            Self::Discopop { beta, tau } => vec![
                usual_beta(beta),
                parameter("tau", "τ", tau, default_tau(), Positive),
            ],
            Self::Cpo { beta, nll_weight } => vec![
                usual_beta(beta),
                parameter("nll_weight", "α", nll_weight, one(), AtLeastZero),
            ],
            Self::Simpo {
                beta: value,
                target_margin,
            } => vec![
                beta(value, default_beta_simpo()),
                parameter("target_margin", "γ", target_margin, half(), AtLeastZero),
            ],
            Self::Sft {} | Self::Mix { .. } => Vec::new(),
        }
    }

    /// The β that scales reported rewards; 1 where the objective has none. A mix reports as its leading part does.
    pub fn beta(&self) -> f64 {
        let parameters = self.leading().parameters();
        let mut betas = parameters.iter().filter(|it| it.key == "beta");
        betas.next().map_or(1.0, |beta| beta.value)
    }

    /// Where the objective calibrates r_w and r_l to. `None` without a calibration term, where the targets are each pair's own
    /// (`score_scale`), and for a mix whose parts disagree.
    pub fn targets(&self) -> Option<Targets> {
        match *self {
            Self::CalDpo {
                beta,
                calibration_shift,
                score_scale: None,
                ..
            } => Some(Targets::new(beta, calibration_shift)),
            Self::SppoHard { beta } => Some(Targets::new(beta, half())),
            Self::Slic {
                beta,
                calibration_weight,
            }
            | Self::Ipo {
                beta,
                calibration_weight,
                ..
            } => (calibration_weight > 0.0).then(|| Targets::new(beta, half())),
            Self::Mix { ref parts } => {
                let objectives = parts.iter().map(|part| &part.objective);
                let mut all = objectives.filter(|it| it.calibrates()).map(Self::targets);
                let first = all.next()??;
                all.all(|other| other == Some(first)).then_some(first)
            }
            _ => None,
        }
    }

    /// Whether the loss has a calibration term.
    pub fn calibrates(&self) -> bool {
        self.any(|it| it.targets().is_some() || it.needs_scores())
    }

    /// Whether the loss reads reference log-probs.
    pub fn needs_reference(&self) -> bool {
        self.any(|it| {
            !matches!(
                it,
                Self::Cpo { .. } | Self::Simpo { .. } | Self::Orpo { .. } | Self::Sft {}
            )
        })
    }

    /// Whether rows need a score of each completion.
    pub fn needs_scores(&self) -> bool {
        self.any(|it| {
            matches!(
                it,
                Self::CalDpo {
                    score_scale: Some(_),
                    ..
                }
            )
        })
    }

    /// Whether the log-probs of all pairs have to be known before any derivative.
    pub fn reads_batch(&self) -> bool {
        self.any(|it| {
            matches!(
                it,
                Self::BcoPair { .. } | Self::Aot { .. } | Self::AotUnpaired { .. }
            )
        })
    }

    /// Whether log-ratios of completions after prompts of other rows have to be known before any derivative.
    pub fn reads_mismatched(&self) -> bool {
        self.any(|it| matches!(it, Self::Kto { .. }))
    }

    /// Which completions it reads. A mix reads what the most demanding part does.
    pub fn sides(&self) -> Sides {
        match self {
            Self::Sft {} => Sides::Chosen,
            Self::Kto { .. } => Sides::Either,
            Self::Mix { parts } => {
                let sides = parts.iter().map(|part| part.objective.sides());
                sides.max().unwrap_or(Sides::Both)
            }
            _ => Sides::Both,
        }
    }

    /// Whether it reads rejected completions, be it only of the rows that have one.
    pub fn needs_rejected(&self) -> bool {
        self.sides() != Sides::Chosen
    }

    /// Whether `is` holds for it or, of a mix, for a part.
    pub(crate) fn any(&self, is: fn(&Self) -> bool) -> bool {
        match self {
            Self::Mix { parts } => parts.iter().any(|part| part.objective.any(is)),
            _ => is(self),
        }
    }

    /// Itself; of a mix the part whose rewards are reported: the first with a reference, else the first that reads pairs,
    /// else the first.
    pub(crate) fn leading(&self) -> &Self {
        let Self::Mix { parts } = self else {
            return self;
        };
        let mut objectives = parts.iter().map(|part| &part.objective);
        objectives
            .clone()
            .find(|it| it.needs_reference())
            .or_else(|| objectives.clone().find(|it| it.needs_rejected()))
            .or_else(|| objectives.next())
            .unwrap_or(self)
    }
}

impl Part {
    fn validate_at(&self, path: &str) -> Result<(), ConfigError> {
        let refuse = |key: &str, reason: String| {
            let key = format!("{path}.{key}");
            Err(ConfigError { key, reason })
        };
        if !Range::Positive.contains(self.weight) {
            let words = Range::Positive.words();
            return refuse("weight", format!("must be {words}, got {}", self.weight));
        }
        if matches!(self.objective, ObjectiveConfig::Mix { .. }) {
            let reason = "a mix is no part of a mix; name its parts here, their weights multiplied";
            return refuse("kind", reason.into());
        }
        self.objective.validate_at(path)
    }
}

impl Targets {
    /// (1 − s)/β and −s/β; ±1/(2β) for s = ½.
    pub(crate) fn new(beta: f64, shift: f64) -> Self {
        Self {
            chosen: (1.0 - shift) / beta,
            rejected: -shift / beta,
        }
    }

    pub(crate) fn times(self, factor: f64) -> Self {
        Self {
            chosen: factor * self.chosen,
            rejected: factor * self.rejected,
        }
    }
}

impl Range {
    fn contains(self, value: f64) -> bool {
        value.is_finite()
            && match self {
                Self::Positive => value > 0.0,
                Self::AtLeastZero => value >= 0.0,
                Self::UpToOne => (0.0..=1.0).contains(&value),
                Self::BelowHalf => (0.0..0.5).contains(&value),
                Self::InsideHalf => value > 0.0 && value < 0.5,
            }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Positive => "a finite number above 0",
            Self::AtLeastZero => "a finite number, 0 or above",
            Self::UpToOne => "between 0 and 1",
            Self::BelowHalf => "at least 0 and below 0.5",
            Self::InsideHalf => "above 0 and below 0.5",
        }
    }
}

/// Reads the parts one by one, so that a refusal says which.
fn parts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Part>, D::Error> {
    struct Parts;

    impl<'de> Visitor<'de> for Parts {
        type Value = Vec<Part>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of objectives")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Part>, A::Error> {
            let mut parts = Vec::new();
            loop {
                let next = seq.next_element();
                let next = next.map_err(|error| {
                    A::Error::custom(format_args!("parts[{}]: {error}", parts.len()))
                })?;
                match next {
                    Some(part) => parts.push(part),
                    None => return Ok(parts),
                }
            }
        }
    }

    deserializer.deserialize_seq(Parts)
}

/// What [`complete_parts`] completes: the kinds are not known while the enum's schema is being made.
fn parts_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "array", "minItems": 1, "items": {}})
}

/// Gives `parts` of a mix the schemas of all other kinds, each with a weight. A reference would be shorter; this schema is
/// made without them.
fn complete_parts(schema: &mut Schema) {
    let is_mix = |kind: &serde_json::Value| kind["properties"]["kind"]["const"] == "mix";
    let Some(kinds) = schema.get_mut("oneOf").and_then(|it| it.as_array_mut()) else {
        return;
    };
    let mut others: Vec<_> = kinds.iter().filter(|it| !is_mix(it)).cloned().collect();
    for kind in &mut others {
        kind["properties"]["weight"] = serde_json::json!({
            "description": "Factor of its loss. Default 1.",
            "type": "number",
            "exclusiveMinimum": 0,
            "default": 1.0,
        });
    }
    for kind in kinds.iter_mut().filter(|it| is_mix(it)) {
        kind["properties"]["parts"]["items"] = serde_json::json!({"oneOf": others});
    }
}

fn one() -> f64 {
    1.0
}

fn half() -> f64 {
    0.5
}

fn default_beta() -> f64 {
    0.1
}

/// TRL's default of 0.1 is a sum's; Tülu 3 (arXiv 2411.15124) trains with 5.
fn default_beta_per_token() -> f64 {
    5.0
}

/// As in the authors' code.
fn default_beta_simpo() -> f64 {
    2.0
}

fn default_flipped() -> f64 {
    0.1
}

fn default_exo() -> f64 {
    1e-3
}

fn default_penalty() -> f64 {
    50.0
}

fn default_tau() -> f64 {
    0.05
}
