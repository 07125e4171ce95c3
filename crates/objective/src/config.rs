//! Which objective a job trains, and the parameters that belong to it.
//!
//! An enum whose variants own their fields, so that a parameter of another objective is refused.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An objective and its parameters, as `[objective]` in a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ObjectiveConfig {
    /// L = −log σ(D) + λ·[(r_w − t)² + (r_l + t)²] (Xiao et al. 2024, arXiv 2412.14516, Eq. 10). β sets the targets ±t
    /// and is not inside the sigmoid.
    CalDpo {
        /// β of the targets ±1/(2β). Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// λ; 1 in the paper, 0.5 in the authors' released Zephyr code. Default 1.
        #[serde(default = "default_calibration_weight")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        calibration_weight: f64,
    },
    /// L = −(1 − ε)·log σ(βD) − ε·log σ(−βD) (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; ε > 0 is cDPO).
    Dpo {
        /// β of the sigmoid. Default 0.1.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// ε, the assumed share of flipped labels, in [0, 0.5). Default 0.
        #[serde(default)]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 0.5))]
        label_smoothing: f64,
    },
    /// Cross entropy of the chosen completions, a mean over the global batch's tokens.
    Sft {},
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

impl ObjectiveConfig {
    /// Checks every parameter's range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match *self {
            Self::CalDpo {
                beta,
                calibration_weight,
            } => {
                positive("objective.beta", beta)?;
                positive("objective.calibration_weight", calibration_weight)
            }
            Self::Dpo {
                beta,
                label_smoothing,
            } => {
                positive("objective.beta", beta)?;
                if (0.0..0.5).contains(&label_smoothing) {
                    return Ok(());
                }
                Err(ConfigError {
                    key: "objective.label_smoothing".into(),
                    reason: format!("must be at least 0 and below 0.5, got {label_smoothing}"),
                })
            }
            Self::Sft {} => Ok(()),
        }
    }

    /// The β that scales reported rewards; 1 where the objective has none.
    pub fn beta(&self) -> f64 {
        match *self {
            Self::CalDpo { beta, .. } | Self::Dpo { beta, .. } => beta,
            Self::Sft {} => 1.0,
        }
    }

    /// t = 1/(2β) in nats, where the objective calibrates r_w to t and r_l to −t.
    pub fn target(&self) -> Option<f64> {
        match *self {
            Self::CalDpo { beta, .. } => Some(0.5 / beta),
            Self::Dpo { .. } | Self::Sft {} => None,
        }
    }

    /// Whether the loss reads reference log-probs.
    pub fn needs_reference(&self) -> bool {
        !matches!(self, Self::Sft {})
    }

    /// Whether rows need a rejected completion.
    pub fn needs_rejected(&self) -> bool {
        !matches!(self, Self::Sft {})
    }
}

fn positive(key: &str, value: f64) -> Result<(), ConfigError> {
    if value > 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(ConfigError {
        key: key.into(),
        reason: format!("must be a finite number above 0, got {value}"),
    })
}

fn default_beta() -> f64 {
    0.1
}

fn default_calibration_weight() -> f64 {
    1.0
}
