//! Files from anywhere: whatever the bytes, an error or a model, never a panic.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;

use model::{
    Device, Family, Layout, Lora, Model, ModelConfig, Targets, load_adapter, random_weights,
    write_safetensors,
};
use proptest::prelude::*;
use serde_json::Value;
use support::{tiny, tiny_json};

const FAMILIES: [Family; 9] = [
    Family::Llama,
    Family::Mistral,
    Family::Qwen2,
    Family::Qwen3,
    Family::Gemma,
    Family::Gemma2,
    Family::Gemma3,
    Family::Phi3,
    Family::GptNeox,
];

/// Values that a key might hold by mistake.
fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0u64..40).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        Just(serde_json::json!([1, "x", null])),
        Just(serde_json::json!({ "rope_type": "yarn", "factor": 1e300, "beta_fast": 1e-300 })),
        Just(serde_json::json!({ "rope_type": "longrope", "short_factor": [], "long_factor": 1 })),
        Just(serde_json::json!({ "full_attention": null, "sliding_attention": 3 })),
        Just(serde_json::json!({ "type": "llama3", "factor": 0.0 })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_a_config_or_an_error(text in ".{0,200}") {
        drop(ModelConfig::parse(&text, Path::new("config.json")));
    }

    #[test]
    fn any_value_under_any_key_is_a_config_or_an_error(
        family in 0usize..FAMILIES.len(),
        key in prop::sample::select(vec![
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "rope_theta", "rope_scaling",
            "rope_parameters", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "rope_local_base_freq",
            "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern",
            "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "hidden_act",
            "hidden_activation", "attention_bias", "mlp_bias", "tie_word_embeddings", "eos_token_id", "bos_token_id",
            "max_position_embeddings", "original_max_position_embeddings", "attention_dropout", "quantization_config",
            "use_parallel_residual", "model_type",
        ]),
        value in value(),
    ) {
        let mut config = tiny_json(FAMILIES[family], true, Some(5));
        config[key] = value;
        if let Ok(config) = ModelConfig::parse(&config.to_string(), Path::new("config.json"))
        {
            let frequencies = config.rotary.inverse_frequencies(config.head_dim());
            prop_assert!(frequencies.iter().all(|frequency| frequency.is_finite()), "{config:?}");
        }
    }

    #[test]
    fn a_weight_file_with_changed_bytes_is_read_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        length in any::<prop::sample::Index>(),
        cut in any::<bool>(),
        header_only in any::<bool>(),
    ) {
        let (dir, mut bytes) = directory();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (place, byte) in changes {
            let place = place.index(if header_only { header } else { bytes.len() });
            bytes[place] = byte;
        }
        if cut {
            bytes.truncate(length.index(bytes.len()));
        }
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        drop(Model::load(dir.path(), &Device::flex()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_value_under_any_key_of_an_adapter_is_read_or_refused(
        key in prop::sample::select(vec![
            "peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "bias", "modules_to_save",
            "rank_pattern", "init_lora_weights", "layers_to_transform",
        ]),
        value in value(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let config = tiny(Family::Llama, true, None);
        let lora = Lora { rank: 2, alpha: 4.0, rank_stabilized: false, targets: Targets::AllLinear };
        let mut peft = lora.to_peft(&config, "base").unwrap();
        peft[key] = value;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("adapter_config.json"), peft.to_string()).unwrap();
        let mut bytes = Vec::new();
        let weights = lora.fresh(&config, 3).unwrap();
        write_safetensors(&weights, &lora.layout(&config).unwrap(), &mut bytes).unwrap();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        fs::write(dir.path().join("adapter_model.safetensors"), bytes).unwrap();
        drop(load_adapter(dir.path(), &config));
    }
}

fn directory() -> (tempfile::TempDir, Vec<u8>) {
    let config = tiny(Family::Llama, true, None);
    let dir = tempfile::tempdir().unwrap();
    let json = tiny_json(Family::Llama, true, None);
    fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    let mut bytes = Vec::new();
    let weights = random_weights(&config, 3);
    write_safetensors(&weights, &Layout::new(&config), &mut bytes).unwrap();
    (dir, bytes)
}
