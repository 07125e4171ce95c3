//! Inverse frequencies of rotary embeddings: the rules `default`, `linear` and `llama3` of transformers'
//! `modeling_rope_utils`, read from either spelling of config.json. The turning itself is `kernels::rotary`.

use std::f64::consts::PI;

use serde_json::{Map, Value, json};

use crate::config::{Bad, number};

/// Rope types that can be computed here.
pub(crate) const ROPE_TYPES: [&str; 3] = ["default", "linear", "llama3"];

/// How angles grow with positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RotaryPlan {
    /// Base of the frequencies.
    pub theta: f64,
    /// What stretches them.
    pub scaling: RotaryScaling,
}

/// The rope types.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RotaryScaling {
    /// θ^(−2i/d).
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long waves divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// The divisor of long waves.
        factor: f64,
        /// Waves longer than `original_positions / low_frequency_factor` are long.
        low_frequency_factor: f64,
        /// Waves shorter than `original_positions / high_frequency_factor` are short.
        high_frequency_factor: f64,
        /// Context length of pre-training.
        original_positions: f64,
    },
}

impl RotaryPlan {
    /// The inverse frequencies for heads of `head_dim` columns, `[head_dim / 2]`; computed in f64, rounded once, hence
    /// within an f32 rounding or two of transformers, which computes in f32.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| self.scale(self.theta.powf(-((2 * i) as f64) / head_dim as f64)) as f32)
            .collect()
    }

    fn scale(&self, frequency: f64) -> f64 {
        match self.scaling {
            RotaryScaling::Default => frequency,
            RotaryScaling::Linear { factor } => frequency / factor,
            RotaryScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_positions: original,
            } => {
                let wavelength = 2.0 * PI / frequency;
                if wavelength > original / low {
                    frequency / factor
                } else if wavelength < original / high {
                    frequency
                } else {
                    let kept = (original / wavelength - low) / (high - low);
                    (1.0 - kept) * frequency / factor + kept * frequency
                }
            }
        }
    }

    /// Reads `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta` (4). Both libraries take θ = 10000 when
    /// none is given.
    pub(crate) fn parse(config: &Map<String, Value>) -> Result<Self, Bad> {
        let section = |name: &'static str| match config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(object)) => Ok(Some((name, object))),
            Some(other) => Err(Bad::new(
                name,
                format!("an object is needed, found {other}"),
            )),
        };
        let outer_theta = number(config, "rope_theta")?;
        let found = match section("rope_parameters")? {
            Some(found) => Some(found),
            None => section("rope_scaling")?,
        };
        let Some((name, object)) = found else {
            return Self {
                theta: outer_theta.unwrap_or(10_000.0),
                scaling: RotaryScaling::Default,
            }
            .check("rope_theta");
        };
        let key = |inner: &str| format!("{name}.{inner}");
        let inner = |inner: &'static str| number(object, inner).map_err(|bad| bad.inside(name));
        let needed =
            |field: &'static str| inner(field)?.ok_or_else(|| Bad::new(&key(field), "missing"));
        if let Some(kind) = object.keys().find(|&kind| kind.ends_with("_attention")) {
            return Err(Bad::new(
                &key(kind),
                "rotary parameters per layer type are not supported for this family",
            ));
        }
        let kind = match object.get("rope_type").or_else(|| object.get("type")) {
            None => "default",
            Some(Value::String(kind)) => kind,
            Some(other) => {
                return Err(Bad::new(
                    &key("rope_type"),
                    format!("a string is needed, found {other}"),
                ));
            }
        };
        let theta = inner("rope_theta")?.or(outer_theta).unwrap_or(10_000.0);
        let scaling = match kind {
            "default" => RotaryScaling::Default,
            "linear" => RotaryScaling::Linear {
                factor: needed("factor")?,
            },
            "llama3" => RotaryScaling::Llama3 {
                factor: needed("factor")?,
                low_frequency_factor: needed("low_freq_factor")?,
                high_frequency_factor: needed("high_freq_factor")?,
                original_positions: needed("original_max_position_embeddings")?,
            },
            other => {
                let reason = format!(
                    "`{other}` is not supported; supported: {}",
                    ROPE_TYPES.join(", ")
                );
                return Err(Bad::new(&key("rope_type"), reason));
            }
        };
        if let Some(part) = number(object, "partial_rotary_factor")?.filter(|&part| part != 1.0) {
            return Err(Bad::new(
                &key("partial_rotary_factor"),
                format!("{part} is not supported; heads turn whole here"),
            ));
        }
        Self { theta, scaling }.check(name)
    }

    /// Angles must be finite and the ramp must not divide by zero.
    fn check(self, name: &str) -> Result<Self, Bad> {
        let positive = |field: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                return Ok(());
            }
            Err(Bad::new(
                &format!("{name}.{field}"),
                format!("{value} is not a positive number"),
            ))
        };
        positive("rope_theta", self.theta)?;
        match self.scaling {
            RotaryScaling::Default => {}
            RotaryScaling::Linear { factor } => positive("factor", factor)?,
            RotaryScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_positions,
            } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low)?;
                positive("original_max_position_embeddings", original_positions)?;
                if high.partial_cmp(&low) != Some(std::cmp::Ordering::Greater) {
                    let reason = format!("{high} must be above low_freq_factor = {low}");
                    return Err(Bad::new(&format!("{name}.high_freq_factor"), reason));
                }
            }
        }
        Ok(self)
    }

    /// The plan as config.json spells it in transformers 5.
    pub(crate) fn to_json(self) -> Value {
        match self.scaling {
            RotaryScaling::Default => json!({ "rope_type": "default", "rope_theta": self.theta }),
            RotaryScaling::Linear { factor } => {
                json!({ "rope_type": "linear", "rope_theta": self.theta, "factor": factor })
            }
            RotaryScaling::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_positions,
            } => json!({
                "rope_type": "llama3",
                "rope_theta": self.theta,
                "factor": factor,
                "low_freq_factor": low_frequency_factor,
                "high_freq_factor": high_frequency_factor,
                "original_max_position_embeddings": original_positions as u64,
            }),
        }
    }
}
