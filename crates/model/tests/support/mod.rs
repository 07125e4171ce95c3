//! Small models and packs for the tests.

#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use model::{Device, Family, Model, ModelConfig, NormKind, Pack, PairTokens};
use serde_json::{Value, json};

/// A Hugging Face fixture of the shared folder, or `None` with a word about it.
pub fn fixture(name: &str) -> Option<PathBuf> {
    let shared = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"));
    if !shared.exists() {
        println!("skipped: ../shared is absent");
        return None;
    }
    Some(shared.join("fixtures/hf").join(name))
}

/// config.json of three blocks, two query heads on each of two key heads; tied or not, with or without a window.
pub fn tiny_json(family: Family, tied: bool, window: Option<usize>) -> Value {
    let (kind, class) = match family {
        Family::Llama => ("llama", "LlamaForCausalLM"),
        Family::Mistral => ("mistral", "MistralForCausalLM"),
        Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
        Family::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
        Family::Gemma => ("gemma", "GemmaForCausalLM"),
        Family::Gemma2 => ("gemma2", "Gemma2ForCausalLM"),
        Family::Gemma3 => ("gemma3_text", "Gemma3ForCausalLM"),
        Family::Phi3 => ("phi3", "Phi3ForCausalLM"),
        Family::GptNeox => ("gpt_neox", "GPTNeoXForCausalLM"),
    };
    let mut config = json!({
        "architectures": [class], "model_type": kind, "dtype": "float32", "vocab_size": 37, "hidden_size": 20,
        "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": tied,
        "sliding_window": window, "eos_token_id": 2, "bos_token_id": 1, "head_dim": 6,
    });
    if family == Family::GptNeox {
        // Heads have an even number of columns, and hidden / heads of them.
        config["hidden_size"] = json!(24);
        config["rotary_pct"] = json!(0.4);
    }
    if matches!(family, Family::Gemma2 | Family::Gemma3) {
        config["query_pre_attn_scalar"] = json!(5);
        config["attn_logit_softcapping"] = json!(3.0);
        config["final_logit_softcapping"] = json!(4.0);
    }
    config
}

/// What [`tiny_json`] describes.
pub fn tiny(family: Family, tied: bool, window: Option<usize>) -> ModelConfig {
    parse(&tiny_json(family, tied, window))
}

pub fn parse(config: &Value) -> ModelConfig {
    ModelConfig::parse(&config.to_string(), Path::new("config.json")).unwrap()
}

/// A tiny model of every family, and of variants that the families allow.
pub fn every_family() -> Vec<(String, ModelConfig)> {
    let mut all = Vec::new();
    let mut add = |name: &str, family, tied, window, changes: Value| {
        let mut config = tiny_json(family, tied, window);
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        all.push((name.to_owned(), parse(&config)));
    };
    add("llama", Family::Llama, false, None, json!({}));
    add("llama, tied", Family::Llama, true, None, json!({}));
    let biases = json!({ "attention_bias": true, "mlp_bias": true, "num_key_value_heads": 1 });
    add(
        "llama, biases, one key head",
        Family::Llama,
        true,
        None,
        biases,
    );
    let yarn = json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 } });
    add("llama, yarn", Family::Llama, true, None, yarn);
    add("mistral", Family::Mistral, false, Some(5), json!({}));
    let late = json!({ "use_sliding_window": true, "max_window_layers": 1 });
    add("qwen2", Family::Qwen2, true, Some(5), late);
    add("qwen3", Family::Qwen3, false, None, json!({}));
    add(
        "gemma",
        Family::Gemma,
        true,
        None,
        json!({ "num_key_value_heads": 4 }),
    );
    add("gemma2", Family::Gemma2, true, Some(5), json!({}));
    add(
        "gemma3",
        Family::Gemma3,
        true,
        Some(5),
        json!({ "sliding_window_pattern": 2 }),
    );
    let longrope = json!({ "original_max_position_embeddings": 2, "rope_scaling": { "type": "longrope",
        "short_factor": [1.0, 1.1], "long_factor": [1.5, 3.0] }, "partial_rotary_factor": 0.7 });
    add("phi3, longrope", Family::Phi3, false, Some(30), longrope);
    add("gpt_neox", Family::GptNeox, false, None, json!({}));
    add(
        "gpt_neox, sequential",
        Family::GptNeox,
        false,
        None,
        json!({ "use_parallel_residual": false }),
    );
    all
}

/// A tiny model whose weights are large enough that attention is not nearly uniform.
pub fn lively(config: ModelConfig) -> Model {
    let mut model = Model::random(config, 7, &Device::flex());
    let mut weights = model.take_weights();
    for (index, parameter) in model.layout().parameters.iter().enumerate() {
        let values = &mut weights[parameter.bucket][parameter.range()];
        if parameter.decay {
            for weight in values {
                *weight *= 20.0;
            }
        } else if parameter.name.rsplit('.').next() == Some("bias")
            || model.config().norm == NormKind::RmsPlusOne
        {
            for (place, value) in values.iter_mut().enumerate() {
                *value = 0.1 * ((place + index) as f32).sin();
            }
        }
    }
    model.put_weights(weights);
    model
}

/// `count` token ids, different for every seed.
pub fn ids(count: usize, seed: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % 37
    };
    (0..count).map(next).collect()
}

/// A pair that owns its tokens.
#[derive(Clone, Debug)]
pub struct Pair {
    pub prompt: Vec<u32>,
    pub chosen: Vec<u32>,
    pub rejected: Vec<u32>,
}

impl Pair {
    pub fn new(prompt: usize, chosen: usize, rejected: usize, seed: u32) -> Self {
        Self {
            prompt: ids(prompt, 3 * seed),
            chosen: ids(chosen, 3 * seed + 1),
            rejected: ids(rejected, 3 * seed + 2),
        }
    }

    pub fn tokens(&self) -> PairTokens<'_> {
        PairTokens {
            prompt: &self.prompt,
            chosen: &self.chosen,
            rejected: &self.rejected,
        }
    }
}

pub fn pack(pairs: &[Pair]) -> Pack {
    Pack::new(pairs.iter().map(Pair::tokens))
}
