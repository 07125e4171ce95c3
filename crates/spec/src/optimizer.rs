//! `[optimizer]`: what turns a gradient into an update, and the clipping before it.
//!
//! One flat table in a file, since a key means the same under every kind that has it; here each kind owns its parameters.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use crate::sections::{SpecError, refuse};

const BETAS: [f64; 2] = [0.9, 0.999];
const ALPHA: f64 = 0.99;
const EPS: f64 = 1e-8;

/// `[optimizer]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Keys", into = "Keys")]
pub struct OptimizerSection {
    /// The update rule.
    pub kind: OptimizerKind,
    /// Peak rate.
    pub learning_rate: f64,
    /// The global gradient is scaled down to this norm; 0 switches clipping off.
    pub max_grad_norm: f64,
}

/// An update rule with its parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerKind {
    /// Loshchilov & Hutter 2019, arXiv 1711.05101, Algorithm 2.
    AdamW {
        /// Decay rates of the moments.
        betas: [f64; 2],
        /// Added to the root of the second moment.
        eps: f64,
        /// Decoupled decay; norms and biases are exempt.
        weight_decay: f64,
    },
    /// torch.optim.RMSprop without momentum, the optimizer of the DPO authors' code:
    /// v ← α·v + (1 − α)·g², w ← w − lr·g/(√v + ε), from v = 0 and without bias correction.
    RmsProp {
        /// Decay rate of the mean square.
        alpha: f64,
        /// Added to the root of the mean square.
        eps: f64,
    },
}

/// The keys of the section as they stand in a file: those of all kinds.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// The update rule. Default `adamw`.
    kind: Name,
    /// Peak rate. Default 5e-7, the paper's.
    #[schemars(extend("exclusiveMinimum" = 0))]
    learning_rate: f64,
    /// Of `adamw`: decay rates of the moments. Default [0.9, 0.999].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("items" = { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }, "default" = BETAS))]
    betas: Option<[f64; 2]>,
    /// Of `rmsprop`: decay rate of the mean square. Default 0.99.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    alpha: Option<f64>,
    /// Added to the root of the second moment or mean square. Default 1e-8.
    #[schemars(extend("exclusiveMinimum" = 0))]
    eps: f64,
    /// Of `adamw`: decoupled decay; norms and biases are exempt. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("default" = 0.0))]
    weight_decay: Option<f64>,
    /// The global gradient is scaled down to this norm; 0 switches clipping off. Default 1.
    #[schemars(range(min = 0))]
    max_grad_norm: f64,
}

#[derive(Clone, Copy, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Name {
    /// AdamW.
    #[default]
    Adamw,
    /// RMSprop without momentum, as in the DPO authors' code.
    Rmsprop,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            kind: Name::default(),
            learning_rate: 5e-7,
            betas: None,
            alpha: None,
            eps: EPS,
            weight_decay: None,
            max_grad_norm: 1.0,
        }
    }
}

impl TryFrom<Keys> for OptimizerSection {
    /// `KEY: REASON`.
    type Error = String;

    fn try_from(keys: Keys) -> Result<Self, String> {
        let eps = keys.eps;
        let kind = match keys.kind {
            Name::Adamw => {
                if keys.alpha.is_some() {
                    return Err(
                        "alpha: belongs to optimizer.kind = \"rmsprop\", and the kind is \"adamw\"; leave it out, or change the kind".into(),
                    );
                }
                OptimizerKind::AdamW {
                    betas: keys.betas.unwrap_or(BETAS),
                    eps,
                    weight_decay: keys.weight_decay.unwrap_or(0.0),
                }
            }
            Name::Rmsprop => {
                if keys.betas.is_some() {
                    return Err(
                        "betas: belongs to optimizer.kind = \"adamw\", and the kind is \"rmsprop\"; leave it out (alpha is the decay \
                         rate of rmsprop), or change the kind"
                            .into(),
                    );
                }
                if let Some(decay) = keys.weight_decay.filter(|&decay| decay != 0.0) {
                    return Err(format!(
                        "weight_decay: rmsprop has none, got {decay}; leave it out, or set optimizer.kind = \"adamw\""
                    ));
                }
                OptimizerKind::RmsProp {
                    alpha: keys.alpha.unwrap_or(ALPHA),
                    eps,
                }
            }
        };
        Ok(Self {
            kind,
            learning_rate: keys.learning_rate,
            max_grad_norm: keys.max_grad_norm,
        })
    }
}

impl From<OptimizerSection> for Keys {
    fn from(section: OptimizerSection) -> Self {
        let common = Self {
            learning_rate: section.learning_rate,
            max_grad_norm: section.max_grad_norm,
            ..Self::default()
        };
        match section.kind {
            OptimizerKind::AdamW {
                betas,
                eps,
                weight_decay,
            } => Self {
                kind: Name::Adamw,
                betas: Some(betas),
                eps,
                weight_decay: Some(weight_decay),
                ..common
            },
            OptimizerKind::RmsProp { alpha, eps } => Self {
                kind: Name::Rmsprop,
                alpha: Some(alpha),
                eps,
                ..common
            },
        }
    }
}

impl JsonSchema for OptimizerSection {
    fn schema_name() -> Cow<'static, str> {
        "OptimizerSection".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Keys::json_schema(generator)
    }
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self::try_from(Keys::default()).expect("the defaults belong to their kind")
    }
}

impl OptimizerKind {
    /// Its name as people write it.
    pub fn label(&self) -> &'static str {
        match self {
            Self::AdamW { .. } => "AdamW",
            Self::RmsProp { .. } => "RMSprop",
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
        let rate = |key: &str, value: f64| {
            if (0.0..1.0).contains(&value) {
                return Ok(());
            }
            refuse(key, &format!("must be at least 0 and below 1, got {value}"))
        };
        finite("optimizer.learning_rate", self.learning_rate, true)?;
        finite("optimizer.max_grad_norm", self.max_grad_norm, false)?;
        match self.kind {
            OptimizerKind::AdamW {
                betas: [first, second],
                eps,
                weight_decay,
            } => {
                finite("optimizer.eps", eps, true)?;
                finite("optimizer.weight_decay", weight_decay, false)?;
                rate("optimizer.betas", first)?;
                rate("optimizer.betas", second)
            }
            OptimizerKind::RmsProp { alpha, eps } => {
                finite("optimizer.eps", eps, true)?;
                rate("optimizer.alpha", alpha)
            }
        }
    }
}
