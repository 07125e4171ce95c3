//! Reading config.json, family by family. Absent keys mean the defaults of transformers' configuration classes.

use kernels::{Activation, AttentionPlan};
use serde_json::{Map, Value};

use super::{Biases, Family, Gate, MlpPlan, ModelConfig, NormKind, Projections, Residual};
use crate::rotary::{self, RotaryPlan};

/// Values of `model_type` that can be read.
const FAMILIES: [(&str, Family); 9] = [
    ("llama", Family::Llama),
    ("mistral", Family::Mistral),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("gemma", Family::Gemma),
    ("gemma2", Family::Gemma2),
    ("gemma3_text", Family::Gemma3),
    ("phi3", Family::Phi3),
    ("gpt_neox", Family::GptNeox),
];

/// Most blocks of a decoder, far above any that exists: what is kept of each must not be a file's to choose.
const BLOCKS_MAX: usize = 10_000;

/// A key of config.json and what is wrong with it.
pub(crate) struct Bad {
    pub(super) key: String,
    pub(super) reason: String,
}

impl Bad {
    pub(crate) fn new(key: &str, reason: impl Into<String>) -> Self {
        Self {
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn inside(self, section: &str) -> Self {
        Self {
            key: format!("{section}.{}", self.key),
            ..self
        }
    }

    pub(crate) fn because(self, reason: String) -> Self {
        Self { reason, ..self }
    }
}

/// The decoder that an object of config.json describes.
pub(super) fn read(config: &Map<String, Value>) -> Result<ModelConfig, Bad> {
    let family = family(config)?;
    Reader { config, family }.read()
}

/// config.json and the family that it names.
struct Reader<'a> {
    config: &'a Map<String, Value>,
    family: Family,
}

impl Reader<'_> {
    fn is_gemma(&self) -> bool {
        matches!(self.family, Family::Gemma | Family::Gemma2 | Family::Gemma3)
    }

    fn read(&self) -> Result<ModelConfig, Bad> {
        self.refuse_what_is_computed_differently()?;
        let hidden = self.needed("hidden_size")?;
        let attention = self.attention(hidden)?;
        let head_dim = attention[0].head_dim;
        let (rotary, window_rotary) = self.rotary(head_dim)?;
        let norm = match self.family {
            Family::GptNeox => NormKind::Layer,
            _ if self.is_gemma() => NormKind::RmsPlusOne,
            _ => NormKind::Rms,
        };
        let residual = match self.family {
            Family::Gemma2 | Family::Gemma3 => Residual::Sandwich,
            Family::GptNeox if self.flag_or("use_parallel_residual", true)? => Residual::Parallel,
            _ => Residual::Sequential,
        };
        let projections = match self.family {
            Family::Phi3 => Projections::Stacked,
            Family::GptNeox => Projections::HeadByHead,
            _ => Projections::Separate,
        };
        Ok(ModelConfig {
            family: self.family,
            vocabulary: self.needed("vocab_size")?,
            hidden,
            norm,
            norm_epsilon: self.norm_epsilon()?,
            residual,
            projections,
            biases: self.biases()?,
            head_norms: matches!(self.family, Family::Qwen3 | Family::Gemma3),
            attention,
            rotary,
            window_rotary,
            mlp: MlpPlan {
                intermediate: self.needed("intermediate_size")?,
                activation: self.activation()?,
                gate: match self.family {
                    Family::Phi3 => Gate::Stacked,
                    Family::GptNeox => Gate::None,
                    _ => Gate::Separate,
                },
            },
            embedding_scale: self.is_gemma().then(|| (hidden as f64).sqrt() as f32),
            logit_cap: self.cap("final_logit_softcapping", 30.0)?,
            tied: self.flag_or("tie_word_embeddings", self.is_gemma())?,
            positions_max: count(self.config, "max_position_embeddings")?,
            eos_ids: ids(self.config, "eos_token_id")?,
            bos_id: ids(self.config, "bos_token_id")?.first().copied(),
            notes: self.notes()?,
        })
    }

    fn attention(&self, hidden: usize) -> Result<Vec<AttentionPlan>, Bad> {
        let heads = self.needed("num_attention_heads")?;
        let kv_heads = self.kv_heads(heads)?;
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!(
                "{kv_heads} key heads cannot be shared evenly by num_attention_heads = {heads}"
            );
            return Err(Bad::new("num_key_value_heads", reason));
        }
        let head_dim = self.head_dim(hidden, heads)?;
        let squared_scale = match self.family {
            Family::Gemma2 | Family::Gemma3 => {
                let scalar = number(self.config, "query_pre_attn_scalar")?.unwrap_or(256.0);
                positive("query_pre_attn_scalar", scalar)?
            }
            _ => head_dim as f64,
        };
        let plan = AttentionPlan {
            heads,
            kv_heads,
            head_dim,
            scale: 1.0 / squared_scale.sqrt(),
            window: None,
            soft_cap: self.cap("attn_logit_softcapping", 50.0)?,
        };
        let blocks = self.needed("num_hidden_layers")?;
        if blocks > BLOCKS_MAX {
            let reason = format!("{blocks} is more than {BLOCKS_MAX}");
            return Err(Bad::new("num_hidden_layers", reason));
        }
        let windows = self.windows(blocks)?.into_iter();
        Ok(windows
            .map(|window| AttentionPlan { window, ..plan })
            .collect())
    }

    fn kv_heads(&self, heads: usize) -> Result<usize, Bad> {
        const KEY: &str = "num_key_value_heads";
        if self.family == Family::GptNeox {
            return Ok(heads);
        }
        let absent = match self.family {
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 if !self.config.contains_key(KEY) => 32,
            Family::Gemma => 16,
            Family::Gemma2 | Family::Gemma3 => 4,
            _ => heads,
        };
        Ok(count(self.config, KEY)?.unwrap_or(absent))
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, Bad> {
        let head_dim = match (count(self.config, "head_dim")?, self.family) {
            (Some(head_dim), Family::GptNeox) if head_dim * heads != hidden => {
                let reason = format!(
                    "{head_dim} is not supported; supported: hidden_size / num_attention_heads"
                );
                return Err(Bad::new("head_dim", reason));
            }
            (Some(head_dim), _) => head_dim,
            (None, Family::Qwen3) if !self.config.contains_key("head_dim") => 128,
            (None, _) if self.is_gemma() => 256,
            (None, _) if hidden.is_multiple_of(heads) => hidden / heads,
            (None, _) => {
                return Err(Bad::new(
                    "hidden_size",
                    format!("{hidden} is no multiple of num_attention_heads = {heads}"),
                ));
            }
        };
        if head_dim.is_multiple_of(2) {
            return Ok(head_dim);
        }
        Err(Bad::new(
            "head_dim",
            format!("{head_dim} is odd; rotary embedding turns pairs of columns"),
        ))
    }

    /// The window of every block.
    fn windows(&self, blocks: usize) -> Result<Vec<Option<usize>>, Bad> {
        const KEY: &str = "sliding_window";
        let size = match self.family {
            Family::Llama | Family::Gemma | Family::GptNeox => None,
            Family::Qwen2 | Family::Qwen3 if !flag(self.config, "use_sliding_window")? => None,
            Family::Phi3 => count(self.config, KEY)?,
            _ if self.config.contains_key(KEY) => count(self.config, KEY)?,
            _ => Some(4096),
        };
        let usual = |block: usize| -> Result<bool, Bad> {
            Ok(match self.family {
                Family::Llama | Family::Gemma | Family::GptNeox => false,
                Family::Mistral | Family::Phi3 => size.is_some(),
                Family::Qwen2 | Family::Qwen3 => {
                    let full = number(self.config, "max_window_layers")?.unwrap_or(28.0);
                    size.is_some() && block as f64 >= full
                }
                Family::Gemma2 => block.is_multiple_of(2),
                Family::Gemma3 => {
                    let pattern = match count(self.config, "sliding_window_pattern")? {
                        Some(pattern) => pattern,
                        None => count(self.config, "_sliding_window_pattern")?.unwrap_or(6),
                    };
                    !(block + 1).is_multiple_of(pattern)
                }
            })
        };
        let patterned = matches!(
            self.family,
            Family::Qwen2 | Family::Qwen3 | Family::Gemma2 | Family::Gemma3
        );
        let named = self.layer_types(blocks)?;
        let mut windows = Vec::with_capacity(blocks);
        for block in 0..blocks {
            let sliding = match &named {
                Some(named) if patterned => named[block],
                Some(named) if named[block] != usual(block)? => {
                    let reason =
                        "a mix of window and full attention is not supported for this family";
                    return Err(Bad::new("layer_types", reason));
                }
                _ => usual(block)?,
            };
            if sliding && size.is_none() {
                let reason = "missing, but layers of sliding attention need it";
                return Err(Bad::new(KEY, reason));
            }
            windows.push(if sliding { size } else { None });
        }
        Ok(windows)
    }

    /// Which blocks have a window, where config.json says so block by block.
    fn layer_types(&self, blocks: usize) -> Result<Option<Vec<bool>>, Bad> {
        const KEY: &str = "layer_types";
        let types = match self.config.get(KEY) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Array(types)) if types.len() == blocks => types,
            Some(Value::Array(types)) => {
                let reason = format!("{} entries for num_hidden_layers = {blocks}", types.len());
                return Err(Bad::new(KEY, reason));
            }
            Some(other) => {
                return Err(Bad::new(KEY, format!("a list is needed, found {other}")));
            }
        };
        let kinds = types.iter().map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(Bad::new(
                KEY,
                format!("{kind} is not supported; supported: full_attention, sliding_attention"),
            )),
        });
        kinds.collect::<Result<_, _>>().map(Some)
    }

    /// Rotary frequencies, and those of blocks with a window where they differ.
    fn rotary(&self, head_dim: usize) -> Result<(RotaryPlan, Option<RotaryPlan>), Bad> {
        let mut expected = rotary::Expected {
            head_dim,
            theta: rotary::THETA,
            theta_key: "rope_theta",
            part_key: "partial_rotary_factor",
            part: 1.0,
            yarn_is_longrope: false,
            original_positions: None,
        };
        match self.family {
            Family::GptNeox => {
                expected.theta_key = "rotary_emb_base";
                expected.part_key = "rotary_pct";
                expected.part = 0.25;
            }
            Family::Phi3 => {
                expected.yarn_is_longrope = true;
                expected.original_positions = Some(4096.0);
            }
            Family::Gemma3 => return self.two_rotaries(expected),
            _ => {}
        }
        Ok((rotary::parse(self.config, &expected)?, None))
    }

    /// Gemma 3: a section for each kind of layer, or θ and scaling of full attention with a base for the windows beside it.
    fn two_rotaries(
        &self,
        expected: rotary::Expected,
    ) -> Result<(RotaryPlan, Option<RotaryPlan>), Bad> {
        const FULL: &str = "full_attention";
        const WINDOW: &str = "sliding_attention";
        let full = rotary::Expected {
            theta: 1_000_000.0,
            ..expected
        };
        let window = rotary::Expected {
            theta_key: "rope_local_base_freq",
            ..expected
        };
        let empty = Map::new();
        let (name, sections) = match object(self.config, "rope_parameters")? {
            Some(sections) => {
                if let Some(key) = sections.keys().find(|&key| key != FULL && key != WINDOW) {
                    let reason = format!("is not a kind of layer; expected {FULL} and {WINDOW}");
                    return Err(Bad::new(key, reason).inside("rope_parameters"));
                }
                ("rope_parameters", sections)
            }
            None => ("rope_scaling", &empty),
        };
        let inside = |bad: Bad| bad.inside(name);
        let of_full = match object(sections, FULL).map_err(inside)? {
            Some(section) => (format!("{name}.{FULL}"), section),
            None => match object(self.config, "rope_scaling")? {
                Some(section) => ("rope_scaling".to_owned(), section),
                None => (String::new(), &empty),
            },
        };
        let of_window = match object(sections, WINDOW).map_err(inside)? {
            Some(section) => (format!("{name}.{WINDOW}"), section),
            None => (String::new(), &empty),
        };
        let full = rotary::read(self.config, &full, &of_full.0, of_full.1)?;
        let window = rotary::read(self.config, &window, &of_window.0, of_window.1)?;
        Ok((full, Some(window)))
    }

    fn norm_epsilon(&self) -> Result<f64, Bad> {
        let (key, absent) = match self.family {
            Family::GptNeox => ("layer_norm_eps", 1e-5),
            Family::Phi3 => ("rms_norm_eps", 1e-5),
            _ => ("rms_norm_eps", 1e-6),
        };
        positive(key, number(self.config, key)?.unwrap_or(absent))
    }

    fn biases(&self) -> Result<Biases, Bad> {
        let attention = match self.family {
            Family::GptNeox => self.flag_or("attention_bias", true)?,
            Family::Mistral | Family::Phi3 | Family::Qwen2 => {
                self.refuse_flag("attention_bias")?;
                false
            }
            _ => flag(self.config, "attention_bias")?,
        };
        let mlp = match self.family {
            Family::GptNeox => true,
            Family::Llama => flag(self.config, "mlp_bias")?,
            _ => {
                self.refuse_flag("mlp_bias")?;
                false
            }
        };
        Ok(Biases {
            projections: attention || self.family == Family::Qwen2,
            output: attention,
            mlp,
        })
    }

    fn activation(&self) -> Result<Activation, Bad> {
        let (key, absent) = match self.family {
            Family::Gemma2 | Family::Gemma3 => ("hidden_activation", "gelu_pytorch_tanh"),
            Family::Gemma
                if self
                    .config
                    .get("hidden_activation")
                    .is_some_and(Value::is_string) =>
            {
                ("hidden_activation", "gelu_pytorch_tanh")
            }
            Family::Gemma => ("hidden_act", "gelu_pytorch_tanh"),
            Family::GptNeox => ("hidden_act", "gelu"),
            _ => ("hidden_act", "silu"),
        };
        let name = match self.config.get(key) {
            None | Some(Value::Null) => absent,
            Some(Value::String(name)) => name,
            Some(other) => {
                return Err(Bad::new(key, format!("a string is needed, found {other}")));
            }
        };
        match name {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
            // The first Gemma files say `gelu` and mean the tanh form.
            "gelu" if self.family == Family::Gemma => Ok(Activation::GeluTanh),
            "gelu" => Ok(Activation::Gelu),
            other => Err(Bad::new(
                key,
                format!("`{other}` is not supported; supported: silu, gelu, gelu_pytorch_tanh"),
            )),
        }
    }

    /// A soft cap, which only Gemma 2 and 3 have; `absent` is Gemma 2's.
    fn cap(&self, key: &str, absent: f64) -> Result<Option<f64>, Bad> {
        let cap = match self.family {
            Family::Gemma2 if !self.config.contains_key(key) => Some(absent),
            _ => number(self.config, key)?,
        };
        match (cap, self.family) {
            (None, _) => Ok(None),
            (Some(cap), Family::Gemma2 | Family::Gemma3) => positive(key, cap).map(Some),
            (Some(_), _) => Err(Bad::new(key, "is not supported for this family")),
        }
    }

    /// What is switched off in training, because a reward is the difference of two passes over the same tokens.
    fn notes(&self) -> Result<Vec<String>, Bad> {
        let mut keys = vec!["attention_dropout"];
        match self.family {
            Family::GptNeox => keys.push("hidden_dropout"),
            Family::Phi3 => keys.extend(["resid_pdrop", "embd_pdrop"]),
            _ => {}
        }
        let mut notes = Vec::new();
        for key in keys {
            if let Some(share) = number(self.config, key)?.filter(|&share| share != 0.0) {
                notes.push(format!(
                    "{key} = {share} of config.json is switched off: policy and reference are compared on the same function"
                ));
            }
        }
        Ok(notes)
    }

    fn refuse_what_is_computed_differently(&self) -> Result<(), Bad> {
        if self
            .config
            .get("quantization_config")
            .is_some_and(|value| !value.is_null())
        {
            return Err(Bad::new(
                "quantization_config",
                "quantized weights are not supported; use the f32, f16 or bf16 model",
            ));
        }
        self.refuse_flag("use_bidirectional_attention")
    }

    fn refuse_flag(&self, key: &str) -> Result<(), Bad> {
        if flag(self.config, key)? {
            let reason = "true is not supported for this family; supported: false";
            return Err(Bad::new(key, reason));
        }
        Ok(())
    }

    fn needed(&self, key: &str) -> Result<usize, Bad> {
        count(self.config, key)?.ok_or_else(|| Bad::new(key, "missing"))
    }

    fn flag_or(&self, key: &str, absent: bool) -> Result<bool, Bad> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(absent),
            Some(_) => flag(self.config, key),
        }
    }
}

fn family(config: &Map<String, Value>) -> Result<Family, Bad> {
    let known = || FAMILIES.map(|(name, _)| name).join(", ");
    match config.get("model_type") {
        Some(Value::String(name)) => FAMILIES
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, family)| *family)
            .ok_or_else(|| {
                Bad::new(
                    "model_type",
                    format!("`{name}` is not supported; supported: {}", known()),
                )
            }),
        Some(other) => Err(Bad::new(
            "model_type",
            format!("a string is needed, found {other}"),
        )),
        None => Err(Bad::new(
            "model_type",
            format!("missing; supported: {}", known()),
        )),
    }
}

fn positive(key: &str, value: f64) -> Result<f64, Bad> {
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(Bad::new(key, format!("{value} is not a positive number")))
}

/// A number, or `None` when the key is absent or null.
pub(crate) fn number(config: &Map<String, Value>, key: &str) -> Result<Option<f64>, Bad> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(Bad::new(key, format!("a number is needed, found {value}"))),
        },
    }
}

/// An object, or `None` when the key is absent or null.
pub(crate) fn object<'a>(
    config: &'a Map<String, Value>,
    key: &str,
) -> Result<Option<&'a Map<String, Value>>, Bad> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(other) => Err(Bad::new(key, format!("an object is needed, found {other}"))),
    }
}

/// A size of at least 1 that leaves room for products of sizes.
fn count(config: &Map<String, Value>, key: &str) -> Result<Option<usize>, Bad> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(count @ 1..=0x7fff_ffff) => Ok(Some(count as usize)),
            _ => Err(Bad::new(
                key,
                format!("a whole number above 0 is needed, found {value}"),
            )),
        },
    }
}

fn flag(config: &Map<String, Value>, key: &str) -> Result<bool, Bad> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(Bad::new(
            key,
            format!("true or false is needed, found {other}"),
        )),
    }
}

/// One id or a list of ids.
fn ids(config: &Map<String, Value>, key: &str) -> Result<Vec<u32>, Bad> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| Bad::new(key, format!("a token id is needed, found {value}")))
    };
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}
