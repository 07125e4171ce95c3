//! config.json as a decoder described by data. A family is a reading of that file, not a type: everything below works
//! from the fields of [`ModelConfig`]. Whatever this program would compute wrongly is refused by name.
//!
//! | family | norm | residual | q, k, v | biases | attention | MLP | head |
//! |---|---|---|---|---|---|---|---|
//! | Llama | RMS | sequential | separate | `attention_bias`, `mlp_bias` | full | SwiGLU | |
//! | Mistral | RMS | sequential | separate | | window | SwiGLU | |
//! | Qwen2 | RMS | sequential | separate | q, k, v | full, window from a layer on | SwiGLU | |
//! | Qwen3 | RMS, also of q and k heads | sequential | separate | `attention_bias` | as Qwen2 | SwiGLU | |
//! | Gemma | RMS with 1 + w | sequential | separate | `attention_bias` | full | GeGLU (tanh) | tied; embeddings × √hidden |
//! | Gemma 2 | RMS with 1 + w | norms on both sides | separate | `attention_bias` | window in every other layer, soft-capped | GeGLU (tanh) | as Gemma, soft-capped |
//! | Gemma 3 | RMS with 1 + w, also of q and k heads | norms on both sides | separate | `attention_bias` | window but in every sixth layer; RoPE bases differ | GeGLU (tanh) | as Gemma |
//! | Phi-3 | RMS | sequential | stacked in one tensor | | full or window | SwiGLU, stacked | |
//! | GPT-NeoX | layer norm | parallel | one tensor, head by head | all | full, part of each head turns | GELU | |

mod reader;

use std::fs;
use std::path::Path;

use kernels::{Activation, AttentionPlan};
use serde_json::Value;

use crate::ModelError;
use crate::rotary::RotaryPlan;
pub(crate) use reader::{Bad, number, object};

/// The architecture that config.json names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 1 to 3, SmolLM2, TinyLlama and others that call themselves `llama`.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and 2.5.
    Qwen2,
    /// Qwen3, dense.
    Qwen3,
    /// Gemma 1.
    Gemma,
    /// Gemma 2.
    Gemma2,
    /// The text model of Gemma 3.
    Gemma3,
    /// Phi-3, 3.5 and 4-mini.
    Phi3,
    /// GPT-NeoX and Pythia.
    GptNeox,
}

/// A decoder as data: token embedding, blocks of rotary grouped-query attention and an MLP, norm, log-prob head.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which reading of config.json it came from.
    pub family: Family,
    /// Rows of the embedding; every token id is below it.
    pub vocabulary: usize,
    /// Columns of the residual stream.
    pub hidden: usize,
    /// What norms compute.
    pub norm: NormKind,
    /// ε of the norms.
    pub norm_epsilon: f64,
    /// How attention and MLP join the residual stream.
    pub residual: Residual,
    /// How the weights of queries, keys and values are stored.
    pub projections: Projections,
    /// Which linear maps add a bias.
    pub biases: Biases,
    /// Queries and keys are normalised head by head before they turn.
    pub head_norms: bool,
    /// One attention plan per block, in order; its length is the number of blocks.
    pub attention: Vec<AttentionPlan>,
    /// Rotary frequencies.
    pub rotary: RotaryPlan,
    /// Rotary frequencies of the blocks that have a window, where they differ.
    pub window_rotary: Option<RotaryPlan>,
    /// The MLP of every block.
    pub mlp: MlpPlan,
    /// Factor on embeddings.
    pub embedding_scale: Option<f32>,
    /// Logits l become cap · tanh(l / cap).
    pub logit_cap: Option<f64>,
    /// The log-prob head shares the embedding's weight.
    pub tied: bool,
    /// Positions the model was made for; not enforced here.
    pub positions_max: Option<usize>,
    /// Ids after which generation ends.
    pub eos_ids: Vec<u32>,
    /// Id before a text, if the model has one.
    pub bos_id: Option<u32>,
    /// What config.json asks for and training does otherwise, in words.
    pub notes: Vec<String>,
}

/// What norms compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// w · x / √(mean(x²) + ε).
    Rms,
    /// The same with 1 + w for w.
    RmsPlusOne,
    /// w · (x − mean(x)) / √(variance(x) + ε) + b.
    Layer,
}

/// How attention A and MLP M join the residual stream x.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// m = x + A(norm x); y = m + M(norm m).
    Sequential,
    /// m = x + norm A(norm x); y = m + norm M(norm m).
    Sandwich,
    /// y = x + A(norm x) + M(norm′ x).
    Parallel,
}

/// How the weights of queries, keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projections {
    /// Three tensors.
    Separate,
    /// One tensor: rows of all queries, then keys, then values.
    Stacked,
    /// One tensor: rows of a head's query, key and value, then the next head's.
    HeadByHead,
}

/// Which linear maps add a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// Queries, keys and values.
    pub projections: bool,
    /// Attention's output.
    pub output: bool,
    /// All of the MLP.
    pub mlp: bool,
}

/// An MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MlpPlan {
    /// Its columns.
    pub intermediate: usize,
    /// Its function.
    pub activation: Activation,
    /// Whether and how it is gated.
    pub gate: Gate,
}

/// Whether an MLP is gated, and how its weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// down(f(gate x) · up x), three tensors.
    Separate,
    /// The same with gate and up as one tensor, gate's rows first.
    Stacked,
    /// down(f(up x)).
    None,
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
            .and_then(|config| reader::read(&config))
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
}
