//! `[optimizer]`: AdamW and the clipping before it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::sections::{SpecError, refuse};

/// `[optimizer]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSection {
    /// Peak rate. Default 5e-7, the paper's.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate: f64,
    /// Decay rates of the moments. Default [0.9, 0.999].
    #[schemars(extend("items" = { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }))]
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub eps: f64,
    /// Decoupled decay; norms and biases are exempt. Default 0.
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// The global gradient is scaled down to this norm; 0 switches clipping off. Default 1.
    #[schemars(range(min = 0))]
    pub max_grad_norm: f64,
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self {
            learning_rate: 5e-7,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        }
    }
}

impl OptimizerSection {
    pub(crate) fn validate(&self) -> Result<(), SpecError> {
        let finite = |key: &str, value: f64, above: bool| {
            if value.is_finite() && (value > 0.0 || (value == 0.0 && !above)) {
                return Ok(());
            }
            let bound = if above { "above 0" } else { "of at least 0" };
            refuse(
                key,
                &format!("must be a finite number {bound}, got {value}"),
            )
        };
        finite("optimizer.learning_rate", self.learning_rate, true)?;
        finite("optimizer.eps", self.eps, true)?;
        finite("optimizer.weight_decay", self.weight_decay, false)?;
        finite("optimizer.max_grad_norm", self.max_grad_norm, false)?;
        match self.betas.iter().find(|beta| !(0.0..1.0).contains(*beta)) {
            Some(beta) => refuse(
                "optimizer.betas",
                &format!("must be at least 0 and below 1, got {beta}"),
            ),
            None => Ok(()),
        }
    }
}
