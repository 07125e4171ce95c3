//! Inverse frequencies of rotary embeddings: the rope types of transformers' `modeling_rope_utils`, read from either
//! spelling of config.json. The turning itself is `kernels::rotary`.

use std::f64::consts::PI;

use serde_json::{Map, Value};

use crate::config::{Bad, number, object};

/// Rope types that can be computed here.
const ROPE_TYPES: [&str; 5] = ["default", "linear", "llama3", "yarn", "longrope"];
/// θ where config.json names none, in transformers.
pub(crate) const THETA: f64 = 10_000.0;

/// How angles grow with positions.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryPlan {
    /// Base of the frequencies.
    pub theta: f64,
    /// Share of a head's columns that turn, counted from the first.
    pub part: f64,
    /// What stretches the waves.
    pub scaling: RotaryScaling,
}

/// The rope types.
#[derive(Clone, Debug, PartialEq)]
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
    /// YaRN (Peng et al. 2023, arXiv 2309.00071): as Llama 3.1 with the ramp over dimensions, and scaled cos and sin.
    Yarn {
        /// The divisor of long waves.
        factor: f64,
        /// Dimensions at which the ramp begins and ends.
        ramp: [f64; 2],
        /// Factor on cos and sin.
        attention: f64,
    },
    /// LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor per frequency, of two sets by the sequence's length.
    LongRope {
        /// Divisors up to `original_positions`.
        short: Vec<f64>,
        /// Divisors of longer sequences.
        long: Vec<f64>,
        /// Context length of pre-training.
        original_positions: f64,
        /// Factor on cos and sin.
        attention: f64,
    },
}

/// What a plan comes to for heads of one size: the turning of every row is looked up here.
#[derive(Clone, Debug)]
pub(crate) struct Frequencies {
    /// `[turned columns / 2]`.
    usual: Vec<f32>,
    /// For sequences of more than so many tokens.
    long: Option<(usize, Vec<f32>)>,
    /// Factor on cos and sin.
    pub attention: f32,
}

impl Frequencies {
    pub fn len(&self) -> usize {
        self.usual.len()
    }

    fn is_finite(&self) -> bool {
        let long = self.long.iter().flat_map(|(_, long)| long);
        let all = self.usual.iter().chain(long).chain([&self.attention]);
        all.copied().all(f32::is_finite)
    }

    /// Those of a sequence of `tokens`.
    pub fn of(&self, tokens: usize) -> &[f32] {
        match &self.long {
            Some((most, long)) if tokens > *most => long,
            _ => &self.usual,
        }
    }
}

impl RotaryPlan {
    /// Columns of a head of `head_dim` that turn.
    pub fn columns(&self, head_dim: usize) -> usize {
        (head_dim as f64 * self.part) as usize
    }

    /// The inverse frequencies for heads of `head_dim` columns, for sequences within the context of pre-training; computed
    /// in f64, rounded once, hence within an f32 rounding or two of transformers, which computes in f32.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        self.frequencies(head_dim).usual
    }

    pub(crate) fn frequencies(&self, head_dim: usize) -> Frequencies {
        let columns = self.columns(head_dim);
        let all = |scale: &dyn Fn(usize, f64) -> f64| -> Vec<f32> {
            (0..columns / 2)
                .map(|i| scale(i, self.theta.powf(-((2 * i) as f64) / columns as f64)) as f32)
                .collect()
        };
        let (usual, long, attention) = match &self.scaling {
            RotaryScaling::Default => (all(&|_, f| f), None, 1.0),
            RotaryScaling::Linear { factor } => (all(&|_, f| f / factor), None, 1.0),
            RotaryScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_positions: original,
            } => {
                let scale = |_: usize, frequency: f64| {
                    let wavelength = 2.0 * PI / frequency;
                    if wavelength > original / low {
                        frequency / factor
                    } else if wavelength < original / high {
                        frequency
                    } else {
                        let kept = (original / wavelength - low) / (high - low);
                        (1.0 - kept) * frequency / factor + kept * frequency
                    }
                };
                (all(&scale), None, 1.0)
            }
            RotaryScaling::Yarn {
                factor,
                ramp: [low, high],
                attention,
            } => {
                let scale = |i: usize, frequency: f64| {
                    let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    frequency / factor * stretched + frequency * (1.0 - stretched)
                };
                (all(&scale), None, *attention)
            }
            RotaryScaling::LongRope {
                short,
                long,
                original_positions,
                attention,
            } => (
                all(&|i, f| f / short[i]),
                Some((*original_positions as usize, all(&|i, f| f / long[i]))),
                *attention,
            ),
        };
        Frequencies {
            usual,
            long,
            attention: attention as f32,
        }
    }
}

/// What a family expects of config.json about rotary embeddings.
#[derive(Clone, Copy)]
pub(crate) struct Expected {
    pub head_dim: usize,
    /// θ where none is given.
    pub theta: f64,
    /// Keys beside the section, under the names of transformers 4.
    pub theta_key: &'static str,
    pub part_key: &'static str,
    /// Share of columns that turn where none is given.
    pub part: f64,
    /// Phi-3's older files call longrope `su` or `yarn`.
    pub yarn_is_longrope: bool,
    /// Context of pre-training where none is given; otherwise `max_position_embeddings`.
    pub original_positions: Option<f64>,
}

/// Reads `rope_parameters` (transformers 5) or `rope_scaling` + θ beside it (4).
pub(crate) fn parse(config: &Map<String, Value>, expected: &Expected) -> Result<RotaryPlan, Bad> {
    let found = match object(config, "rope_parameters")? {
        Some(section) => Some(("rope_parameters", section)),
        None => object(config, "rope_scaling")?.map(|section| ("rope_scaling", section)),
    };
    let Some((name, section)) = found else {
        return read(config, expected, "", &Map::new());
    };
    if let Some(kind) = section.keys().find(|kind| kind.ends_with("_attention")) {
        return Err(Bad::new(
            kind,
            "rotary parameters per layer type are not supported for this family",
        )
        .inside(name));
    }
    read(config, expected, name, section)
}

/// Reads the plan from its own `section`, called `name`, and from the keys beside it.
pub(crate) fn read(
    config: &Map<String, Value>,
    expected: &Expected,
    name: &str,
    section: &Map<String, Value>,
) -> Result<RotaryPlan, Bad> {
    let inside = |bad: Bad| {
        if name.is_empty() {
            bad
        } else {
            bad.inside(name)
        }
    };
    let theta = match number(section, "rope_theta").map_err(inside)? {
        Some(theta) => theta,
        None => number(config, expected.theta_key)?.unwrap_or(expected.theta),
    };
    let part = match number(section, "partial_rotary_factor").map_err(inside)? {
        Some(part) => part,
        None => number(config, expected.part_key)?.unwrap_or(expected.part),
    };
    let place = |key: &str| {
        if name.is_empty() {
            Bad::new(key, "")
        } else {
            Bad::new(key, "").inside(name)
        }
    };
    positive(theta, || place("rope_theta"))?;
    if !(part > 0.0 && part <= 1.0) {
        return Err(
            place("partial_rotary_factor").because(format!("{part} is not above 0 and at most 1"))
        );
    }
    let columns = (expected.head_dim as f64 * part) as usize;
    if columns == 0 || !columns.is_multiple_of(2) {
        let reason = format!(
            "{columns} of a head's {} columns would turn; rotary embedding turns pairs of columns",
            expected.head_dim
        );
        let key = if part == 1.0 {
            Bad::new("head_dim", "")
        } else {
            place("partial_rotary_factor")
        };
        return Err(key.because(reason));
    }
    let scaling = Scaling {
        config,
        expected,
        section,
        columns,
        theta,
    };
    let scaling = scaling.read().map_err(inside)?;
    let plan = RotaryPlan {
        theta,
        part,
        scaling,
    };
    if plan.frequencies(expected.head_dim).is_finite() {
        return Ok(plan);
    }
    let reason = format!("{theta} with this scaling gives frequencies beyond f32");
    Err(place("rope_theta").because(reason))
}

/// Reading what stretches the waves; errors name keys of the section.
struct Scaling<'a> {
    config: &'a Map<String, Value>,
    expected: &'a Expected,
    section: &'a Map<String, Value>,
    /// Columns of a head that turn.
    columns: usize,
    theta: f64,
}

impl Scaling<'_> {
    fn read(&self) -> Result<RotaryScaling, Bad> {
        let kind = match self
            .section
            .get("rope_type")
            .or_else(|| self.section.get("type"))
        {
            None | Some(Value::Null) => "default",
            Some(Value::String(kind)) => kind,
            Some(other) => {
                return Err(Bad::new(
                    "rope_type",
                    format!("a string is needed, found {other}"),
                ));
            }
        };
        match kind {
            "su" | "yarn" if self.expected.yarn_is_longrope => self.longrope(),
            "default" => Ok(RotaryScaling::Default),
            "linear" => Ok(RotaryScaling::Linear {
                factor: self.needed("factor")?,
            }),
            "llama3" => self.llama3(),
            "yarn" => self.yarn(),
            "longrope" => self.longrope(),
            other => {
                let reason = format!(
                    "`{other}` is not supported; supported: {}",
                    ROPE_TYPES.join(", ")
                );
                Err(Bad::new("rope_type", reason))
            }
        }
    }

    fn llama3(&self) -> Result<RotaryScaling, Bad> {
        let (low, high) = (
            self.needed("low_freq_factor")?,
            self.needed("high_freq_factor")?,
        );
        if high <= low {
            let reason = format!("{high} must be above low_freq_factor = {low}");
            return Err(Bad::new("high_freq_factor", reason));
        }
        Ok(RotaryScaling::Llama3 {
            factor: self.needed("factor")?,
            low_frequency_factor: low,
            high_frequency_factor: high,
            original_positions: self.original_positions()?,
        })
    }

    fn yarn(&self) -> Result<RotaryScaling, Bad> {
        let original = self.original_positions()?;
        let factor = self.factor(original)?;
        let scale = |weight: f64| {
            if factor <= 1.0 {
                1.0
            } else {
                0.1 * weight * factor.ln() + 1.0
            }
        };
        let attention = match self.optional("attention_factor")? {
            Some(attention) => attention,
            None => match (self.number("mscale")?, self.number("mscale_all_dim")?) {
                (Some(one), Some(all)) if one != 0.0 && all != 0.0 => scale(one) / scale(all),
                _ => scale(1.0),
            },
        };
        let fast = self.optional("beta_fast")?.unwrap_or(32.0);
        let slow = self.optional("beta_slow")?.unwrap_or(1.0);
        // The dimension whose wave turns so often within the context of pre-training.
        let dimension = |turns: f64| {
            self.columns as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (dimension(fast), dimension(slow));
        match self.section.get("truncate") {
            None | Some(Value::Null | Value::Bool(true)) => {
                (low, high) = (low.floor(), high.ceil());
            }
            Some(Value::Bool(false)) => {}
            Some(other) => {
                let reason = format!("true or false is needed, found {other}");
                return Err(Bad::new("truncate", reason));
            }
        }
        let (low, mut high) = (low.max(0.0), high.min(self.columns as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        if !(low.is_finite() && high.is_finite()) {
            let reason = format!("{} leaves no ramp with rope_theta = {}", fast, self.theta);
            return Err(Bad::new("beta_fast", reason));
        }
        Ok(RotaryScaling::Yarn {
            factor,
            ramp: [low, high],
            attention,
        })
    }

    fn longrope(&self) -> Result<RotaryScaling, Bad> {
        let original = self.original_positions()?;
        let factor = self.factor(original)?;
        let attention = match self.optional("attention_factor")? {
            Some(attention) => attention,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        Ok(RotaryScaling::LongRope {
            short: self.divisors("short_factor")?,
            long: self.divisors("long_factor")?,
            original_positions: original,
            attention,
        })
    }

    /// One divisor per frequency.
    fn divisors(&self, key: &str) -> Result<Vec<f64>, Bad> {
        let needed = self.columns / 2;
        let Some(Value::Array(values)) = self.section.get(key) else {
            return Err(Bad::new(
                key,
                format!("a list of {needed} numbers is needed"),
            ));
        };
        if values.len() != needed {
            let reason = format!(
                "{} numbers, {needed} are needed: one per frequency",
                values.len()
            );
            return Err(Bad::new(key, reason));
        }
        let numbers = values.iter().map(|value| match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(number),
            _ => Err(Bad::new(key, format!("{value} is not a positive number"))),
        });
        numbers.collect()
    }

    /// How far the context was stretched: said, or from the two lengths.
    fn factor(&self, original: f64) -> Result<f64, Bad> {
        match self.optional("factor")? {
            Some(factor) => Ok(factor),
            None => match number(self.config, "max_position_embeddings")? {
                Some(positions) => Ok(positions / original),
                None => Err(Bad::new("factor", "missing")),
            },
        }
    }

    /// As transformers looks for it: beside the section, in it, else the whole context.
    fn original_positions(&self) -> Result<f64, Bad> {
        const KEY: &str = "original_max_position_embeddings";
        let found = match number(self.config, KEY)? {
            Some(positions) => Some(positions),
            None => match (self.expected.original_positions, self.number(KEY)?) {
                (Some(positions), _) | (None, Some(positions)) => Some(positions),
                (None, None) => number(self.config, "max_position_embeddings")?,
            },
        };
        let positions = found.ok_or_else(|| Bad::new(KEY, "missing"))?;
        positive(positions, || Bad::new(KEY, "")).map(|()| positions)
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Bad> {
        number(self.section, key)
    }

    fn optional(&self, key: &str) -> Result<Option<f64>, Bad> {
        let found = self.number(key)?;
        if let Some(value) = found {
            positive(value, || Bad::new(key, ""))?;
        }
        Ok(found)
    }

    fn needed(&self, key: &str) -> Result<f64, Bad> {
        self.optional(key)?.ok_or_else(|| Bad::new(key, "missing"))
    }
}

fn positive(value: f64, place: impl Fn() -> Bad) -> Result<(), Bad> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(place().because(format!("{value} is not a positive number")))
}
