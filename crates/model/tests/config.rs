//! Reading config.json: both spellings, both families, and every refusal by name.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use model::{Family, Layout, ModelConfig, RotaryPlan, RotaryScaling};
use serde_json::{Value, json};
use support::tiny;

/// A Llama config with keys replaced; a replacement by the string "absent" removes the key.
fn config(changes: &[(&str, Value)]) -> Result<ModelConfig, String> {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 10000.0, "tie_word_embeddings": false, "eos_token_id": 2, "bos_token_id": 1
    });
    for (key, value) in changes {
        if value == "absent" {
            config.as_object_mut().unwrap().remove(*key);
        } else {
            config[*key] = value.clone();
        }
    }
    ModelConfig::parse(&config.to_string(), Path::new("dir/config.json"))
        .map_err(|error| error.to_string())
}

#[test]
fn both_spellings_of_rotary_parameters_mean_the_same() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192
    });
    let old = config(&[
        ("rope_theta", json!(500000.0)),
        ("rope_scaling", llama3.clone()),
    ])
    .unwrap();
    let mut inside = llama3;
    inside["rope_theta"] = json!(500000.0);
    let new = config(&[("rope_theta", json!("absent")), ("rope_parameters", inside)]).unwrap();
    assert_eq!(old, new);
    assert_eq!(old.rotary.theta, 500000.0);
    let linear = config(&[("rope_scaling", json!({ "type": "linear", "factor": 2.0 }))]).unwrap();
    assert_eq!(linear.rotary.scaling, RotaryScaling::Linear { factor: 2.0 });
    let none = config(&[("rope_scaling", Value::Null)]).unwrap();
    assert_eq!(
        none.rotary,
        RotaryPlan {
            theta: 10000.0,
            part: 1.0,
            scaling: RotaryScaling::Default
        }
    );
}

#[test]
fn absent_keys_take_the_defaults_of_transformers() {
    let llama = config(&[
        ("num_key_value_heads", json!("absent")),
        ("rms_norm_eps", json!("absent")),
    ])
    .unwrap();
    assert_eq!((llama.attention[0].kv_heads, llama.norm_epsilon), (4, 1e-6));
    assert_eq!((llama.head_dim(), llama.attention[0].window), (16, None));
    let mistral = [("model_type", json!("mistral"))];
    assert_eq!(config(&mistral).unwrap().attention[1].window, Some(4096));
    let mistral = [
        ("model_type", json!("mistral")),
        ("sliding_window", Value::Null),
    ];
    assert_eq!(config(&mistral).unwrap().attention[1].window, None);
    assert_eq!(
        config(&[("eos_token_id", json!([2, 7]))]).unwrap().eos_ids,
        [2, 7]
    );
}

#[test]
fn what_cannot_be_computed_is_refused_by_name() {
    for (changes, words) in [
        (
            vec![("model_type", json!("gpt2"))],
            vec!["`model_type`", "`gpt2`", "llama, mistral"],
        ),
        (
            vec![("model_type", json!("absent"))],
            vec!["`model_type`", "missing", "llama, mistral"],
        ),
        (
            vec![("hidden_act", json!("relu2"))],
            vec!["`hidden_act`", "relu2", "silu"],
        ),
        (
            vec![
                ("model_type", json!("qwen2")),
                ("attention_bias", json!(true)),
            ],
            vec!["`attention_bias`", "false"],
        ),
        (
            vec![("model_type", json!("phi3")), ("mlp_bias", json!(true))],
            vec!["`mlp_bias`"],
        ),
        (
            vec![("use_bidirectional_attention", json!(true))],
            vec!["`use_bidirectional_attention`"],
        ),
        (
            vec![("attn_logit_softcapping", json!(50.0))],
            vec!["`attn_logit_softcapping`", "not supported for this family"],
        ),
        (
            vec![(
                "layer_types",
                json!(["full_attention", "sliding_attention"]),
            )],
            vec!["`layer_types`", "mix"],
        ),
        (
            vec![("layer_types", json!(["full_attention"]))],
            vec!["`layer_types`", "1 entries for num_hidden_layers = 2"],
        ),
        (
            vec![
                ("model_type", json!("qwen3")),
                (
                    "layer_types",
                    json!(["full_attention", "sliding_attention"]),
                ),
            ],
            vec!["`sliding_window`", "missing"],
        ),
        (
            vec![
                ("model_type", json!("gemma2")),
                ("query_pre_attn_scalar", json!(0)),
            ],
            vec!["`query_pre_attn_scalar`", "positive"],
        ),
        (
            vec![
                ("model_type", json!("gemma3_text")),
                ("rope_parameters", json!({ "chunked_attention": {} })),
            ],
            vec!["`rope_parameters.chunked_attention`", "full_attention"],
        ),
        (
            vec![
                ("model_type", json!("phi3")),
                (
                    "rope_scaling",
                    json!({ "type": "longrope", "short_factor": [1.0], "long_factor": [1.0] }),
                ),
                ("max_position_embeddings", json!(8192)),
            ],
            vec!["`rope_scaling.short_factor`", "8 are needed"],
        ),
        (
            vec![("model_type", json!("gpt_neox")), ("head_dim", json!(8))],
            vec!["`head_dim`", "hidden_size / num_attention_heads"],
        ),
        (
            vec![("quantization_config", json!({ "bits": 4 }))],
            vec!["`quantization_config`", "bf16"],
        ),
        (
            vec![("partial_rotary_factor", json!(1.5))],
            vec!["`partial_rotary_factor`", "1.5"],
        ),
        (
            vec![("partial_rotary_factor", json!(0.2))],
            vec!["`partial_rotary_factor`", "pairs of columns"],
        ),
        (
            vec![(
                "rope_scaling",
                json!({ "rope_type": "yarn", "factor": 2.0 }),
            )],
            vec!["rope_scaling.original_max_position_embeddings", "missing"],
        ),
        (
            vec![(
                "rope_scaling",
                json!({ "rope_type": "dynamic", "factor": 2.0 }),
            )],
            vec![
                "rope_scaling.rope_type",
                "dynamic",
                "default, linear, llama3, yarn, longrope",
            ],
        ),
        (
            vec![("rope_parameters", json!({ "rope_type": "longrope" }))],
            vec![
                "rope_parameters.original_max_position_embeddings",
                "missing",
            ],
        ),
        (
            vec![("rope_parameters", json!({ "rope_type": "linear" }))],
            vec!["rope_parameters.factor", "missing"],
        ),
        (
            vec![(
                "rope_parameters",
                json!({ "rope_type": "linear", "factor": 0 }),
            )],
            vec!["rope_parameters.factor", "positive"],
        ),
        (
            vec![("rope_parameters", json!({ "full_attention": {} }))],
            vec!["rope_parameters.full_attention"],
        ),
        (
            vec![("rope_parameters", json!(3))],
            vec!["`rope_parameters`", "object"],
        ),
        (
            vec![("rope_theta", json!("big"))],
            vec!["`rope_theta`", "number"],
        ),
        (
            vec![("num_key_value_heads", json!(3))],
            vec!["`num_key_value_heads`", "num_attention_heads = 4"],
        ),
        (
            vec![("hidden_size", json!(66))],
            vec!["`hidden_size`", "66"],
        ),
        (vec![("head_dim", json!(15))], vec!["`head_dim`", "odd"]),
        (
            vec![("vocab_size", json!("absent"))],
            vec!["`vocab_size`", "missing"],
        ),
        (vec![("vocab_size", json!(-5))], vec!["`vocab_size`", "-5"]),
        (
            vec![("num_hidden_layers", json!(0))],
            vec!["`num_hidden_layers`"],
        ),
        (vec![("rms_norm_eps", json!(0))], vec!["`rms_norm_eps`"]),
        (
            vec![("tie_word_embeddings", json!("yes"))],
            vec!["`tie_word_embeddings`", "true or false"],
        ),
        (
            vec![("eos_token_id", json!("</s>"))],
            vec!["`eos_token_id`", "token id"],
        ),
    ] {
        let error = config(&changes).unwrap_err();
        assert!(error.contains("dir/config.json"), "{error}");
        for word in words {
            assert!(error.contains(word), "{error} lacks {word}");
        }
    }
    let error = ModelConfig::parse("{", Path::new("x"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("not JSON"), "{error}");
}

#[test]
fn dropout_is_switched_off_and_said() {
    assert_eq!(
        config(&[("attention_dropout", json!(0.0))]).unwrap().notes,
        [""; 0]
    );
    let notes = config(&[("attention_dropout", json!(0.1))]).unwrap().notes;
    assert_eq!(notes.len(), 1);
    assert!(
        notes[0].contains("attention_dropout = 0.1 of config.json is switched off"),
        "{notes:?}"
    );
    let phi = [
        ("model_type", json!("phi3")),
        ("resid_pdrop", json!(0.2)),
        ("embd_pdrop", json!(0.3)),
    ];
    assert_eq!(config(&phi).unwrap().notes.len(), 2);
}

#[test]
fn inverse_frequencies_are_those_of_transformers() {
    // transformers 5.23, LlamaRotaryEmbedding, head_dim 64: entries 0, 1, 14, 15, 16, 17, 18, 31.
    let places = [0, 1, 14, 15, 16, 17, 18, 31];
    let llama3 = RotaryScaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_positions: 8192.0,
    };
    for (theta, scaling, expected) in [
        (
            500000.0,
            llama3,
            [
                1.0,
                0.663601279258728,
                0.0032114461064338684,
                0.0013718936825171113,
                0.0005248460220173001,
                0.0001785077911335975,
                7.784655463183299e-05,
                3.76732259610435e-07,
            ],
        ),
        (
            10000.0,
            RotaryScaling::Default,
            [
                1.0,
                0.7498942017555237,
                0.017782794311642647,
                0.01333521492779255,
                0.009999999776482582,
                0.007498942315578461,
                0.005623413249850273,
                0.0001333521504420787,
            ],
        ),
        (
            10000.0,
            RotaryScaling::Linear { factor: 4.0 },
            [
                0.25,
                0.18747355043888092,
                0.004445698577910662,
                0.0033338037319481373,
                0.0024999999441206455,
                0.0018747355788946152,
                0.0014058533124625683,
                3.333803761051968e-05,
            ],
        ),
    ] {
        let found = RotaryPlan {
            theta,
            part: 1.0,
            scaling: scaling.clone(),
        }
        .inverse_frequencies(64);
        assert_eq!(found.len(), 32);
        for (place, expected) in places.into_iter().zip(expected) {
            let error = (f64::from(found[place]) / expected - 1.0).abs();
            assert!(
                error < 3e-7,
                "{scaling:?} [{place}]: {} for {expected}",
                found[place]
            );
        }
    }
}

#[test]
fn the_layout_has_whole_parameters_in_module_order() {
    let config = tiny(Family::Llama, false, None);
    let layout = Layout::with_bucket_elements(&config, 1000);
    let names: Vec<&str> = layout
        .parameters
        .iter()
        .map(|parameter| parameter.name.as_str())
        .collect();
    assert_eq!(names.len(), 2 + 9 * 3 + 1);
    assert_eq!(
        names[..3],
        [
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.k_proj.weight"
        ]
    );
    assert_eq!(
        names[names.len() - 2..],
        ["model.norm.weight", "lm_head.weight"]
    );
    for (index, bucket) in layout.buckets.iter().enumerate() {
        let own = &layout.parameters[bucket.parameters.clone()];
        assert_eq!(
            own.iter().map(model::Parameter::elements).sum::<usize>(),
            bucket.len
        );
        assert!(bucket.len <= 1000 || own.len() == 1);
        let mut offset = 0;
        for parameter in own {
            assert_eq!(
                (parameter.bucket, parameter.offset),
                (index, offset),
                "{}",
                parameter.name
            );
            assert_eq!(
                parameter.decay,
                !parameter.name.contains("norm"),
                "{}",
                parameter.name
            );
            offset += parameter.elements();
        }
    }
    let tied = Layout::new(&tiny(Family::Llama, true, None));
    assert!(tied.find("lm_head.weight").is_none());
    assert_eq!(tied.elements() + 37 * 20, Layout::new(&config).elements());
}
