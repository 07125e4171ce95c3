//! config.json as a decoder described by data. A family is a reading of that file, not a type: everything below works
//! from the fields of [`ModelConfig`]. Whatever this program would compute wrongly is refused by name.

use std::fs;
use std::path::Path;

use kernels::AttentionPlan;
use serde_json::{Map, Value, json};

use crate::ModelError;
use crate::rotary::RotaryPlan;

/// Values of `model_type` that can be read.
const FAMILIES: [(&str, Family); 2] = [("llama", Family::Llama), ("mistral", Family::Mistral)];

/// The architecture that config.json names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 1 to 3, SmolLM2, TinyLlama and others that call themselves `llama`.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
}

/// A decoder as data: RMS norm before attention and MLP, rotary grouped-query attention, SwiGLU.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which reading of config.json it came from.
    pub family: Family,
    /// Rows of the embedding; every token id is below it.
    pub vocabulary: usize,
    /// Columns of the residual stream.
    pub hidden: usize,
    /// Columns of the MLP.
    pub intermediate: usize,
    /// ε of the norms.
    pub norm_epsilon: f64,
    /// One attention plan per block, in order; its length is the number of blocks.
    pub attention: Vec<AttentionPlan>,
    /// Rotary frequencies, the same in all blocks.
    pub rotary: RotaryPlan,
    /// The log-prob head shares the embedding's weight.
    pub tied: bool,
    /// Positions the model was made for; not enforced here.
    pub positions_max: Option<usize>,
    /// Ids after which generation ends.
    pub eos_ids: Vec<u32>,
    /// Id before a text, if the model has one.
    pub bos_id: Option<u32>,
}

impl ModelConfig {
    /// Reads `dir`/config.json.
    pub fn load(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let text = fs::read_to_string(&path).map_err(|source| ModelError::Read {
            path: path.clone(),
            source,
        })?;
        Self::parse(&text, &path)
    }

    /// Reads the text of a config.json; `path` is only named in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ModelError> {
        let config = match serde_json::from_str(text) {
            Ok(Value::Object(config)) => Ok(config),
            Ok(_) => Err(Bad::new("config.json", "an object is needed")),
            Err(error) => Err(Bad::new("config.json", format!("not JSON: {error}"))),
        };
        config
            .and_then(|config| read(&config))
            .map_err(|Bad { key, reason }| ModelError::Config {
                path: path.to_owned(),
                key,
                reason,
            })
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.attention.len()
    }

    /// Columns of one attention head.
    pub fn head_dim(&self) -> usize {
        self.attention[0].head_dim
    }

    /// A config.json that transformers and [`ModelConfig::load`] read back as this decoder with f32 weights.
    pub fn to_json(&self) -> String {
        let plan = self.attention[0];
        let (kind, class) = match self.family {
            Family::Llama => ("llama", "LlamaForCausalLM"),
            Family::Mistral => ("mistral", "MistralForCausalLM"),
        };
        let mut config = json!({
            "architectures": [class],
            "model_type": kind,
            "dtype": "float32",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "hidden_act": "silu",
            "num_hidden_layers": self.blocks(),
            "num_attention_heads": plan.heads,
            "num_key_value_heads": plan.kv_heads,
            "head_dim": plan.head_dim,
            "rms_norm_eps": self.norm_epsilon,
            "rope_parameters": self.rotary.to_json(),
            "tie_word_embeddings": self.tied,
        });
        if let Some(positions) = self.positions_max {
            config["max_position_embeddings"] = json!(positions);
        }
        if self.family == Family::Mistral {
            config["sliding_window"] = json!(plan.window);
        }
        if let Some(bos) = self.bos_id {
            config["bos_token_id"] = json!(bos);
        }
        match self.eos_ids[..] {
            [] => {}
            [eos] => config["eos_token_id"] = json!(eos),
            _ => config["eos_token_id"] = json!(self.eos_ids),
        }
        serde_json::to_string_pretty(&config).expect("a JSON value has a text")
    }
}

/// A key of config.json and what is wrong with it.
pub(crate) struct Bad {
    key: String,
    reason: String,
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
}

fn read(config: &Map<String, Value>) -> Result<ModelConfig, Bad> {
    let family = family(config)?;
    refuse_what_is_computed_differently(config)?;
    let (hidden, heads) = (
        needed(config, "hidden_size")?,
        needed(config, "num_attention_heads")?,
    );
    // Absent keys mean the defaults of transformers' configuration classes.
    let kv_heads = count(config, "num_key_value_heads")?.unwrap_or(match family {
        Family::Llama => heads,
        Family::Mistral => 8,
    });
    if !heads.is_multiple_of(kv_heads) {
        let reason = format!(
            "{kv_heads} key heads cannot be shared evenly by num_attention_heads = {heads}"
        );
        return Err(Bad::new("num_key_value_heads", reason));
    }
    let head_dim = match count(config, "head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(Bad::new(
                "hidden_size",
                format!("{hidden} is no multiple of num_attention_heads = {heads}"),
            ));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(Bad::new(
            "head_dim",
            format!("{head_dim} is odd; rotary embedding turns pairs of columns"),
        ));
    }
    let window = match family {
        Family::Llama => None,
        Family::Mistral if config.contains_key("sliding_window") => {
            count(config, "sliding_window")?
        }
        Family::Mistral => Some(4096),
    };
    let plan = AttentionPlan {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f64).sqrt(),
        window,
    };
    let norm_epsilon = number(config, "rms_norm_eps")?.unwrap_or(1e-6);
    if !(norm_epsilon.is_finite() && norm_epsilon > 0.0) {
        return Err(Bad::new(
            "rms_norm_eps",
            format!("{norm_epsilon} is not a positive number"),
        ));
    }
    Ok(ModelConfig {
        family,
        vocabulary: needed(config, "vocab_size")?,
        hidden,
        intermediate: needed(config, "intermediate_size")?,
        norm_epsilon,
        attention: vec![plan; needed(config, "num_hidden_layers")?],
        rotary: RotaryPlan::parse(config)?,
        tied: flag(config, "tie_word_embeddings")?,
        positions_max: count(config, "max_position_embeddings")?,
        eos_ids: ids(config, "eos_token_id")?,
        bos_id: ids(config, "bos_token_id")?.first().copied(),
    })
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

fn refuse_what_is_computed_differently(config: &Map<String, Value>) -> Result<(), Bad> {
    match config.get("hidden_act") {
        None | Some(Value::Null) => {}
        Some(Value::String(name)) if name == "silu" || name == "swish" => {}
        Some(other) => {
            return Err(Bad::new(
                "hidden_act",
                format!("{other} is not supported; supported: silu"),
            ));
        }
    }
    for key in ["attention_bias", "mlp_bias"] {
        if flag(config, key)? {
            return Err(Bad::new(key, "true is not supported; supported: false"));
        }
    }
    if config
        .get("quantization_config")
        .is_some_and(|value| !value.is_null())
    {
        return Err(Bad::new(
            "quantization_config",
            "quantized weights are not supported; use the f32, f16 or bf16 model",
        ));
    }
    if let Some(part) = number(config, "partial_rotary_factor")?.filter(|&part| part != 1.0) {
        return Err(Bad::new(
            "partial_rotary_factor",
            format!("{part} is not supported; supported: 1.0"),
        ));
    }
    Ok(())
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

fn needed(config: &Map<String, Value>, key: &str) -> Result<usize, Bad> {
    count(config, key)?.ok_or_else(|| Bad::new(key, "missing"))
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
