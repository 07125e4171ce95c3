//! Decoders in variants that no fixture has, against transformers in f64: `variants/make.py` made the golden values.

#![allow(clippy::unwrap_used)]

mod support;

use model::{Device, Layout, Model, ModelConfig, NormKind, Pack, PairTokens, Saving};
use serde_json::Value;

const GOLDEN: &str = include_str!("variants/golden.json");

/// Nats of a token; measured worst 5e-6.
const TOKEN_TOLERANCE: f64 = 3e-5;
/// Of a gradient's norm.
const GRADIENT_TOLERANCE: f64 = 1e-4;

#[test]
fn log_probs_are_those_of_transformers() {
    for variant in variants() {
        let model = variant.model();
        let [tokens] = &model.token_logps(&variant.pack())[..] else {
            panic!("one pair")
        };
        let mut worst = 0f64;
        for (found, expected) in tokens.iter().zip(&variant.token_logps) {
            assert_eq!(found.len(), expected.len(), "{}", variant.name);
            for (found, expected) in found.iter().zip(expected) {
                worst = worst.max((f64::from(*found) - expected).abs());
            }
        }
        println!("{}: {worst:.1e}", variant.name);
        assert!(worst <= TOKEN_TOLERANCE, "{}: {worst}", variant.name);
    }
}

#[test]
fn gradients_are_those_of_torch() {
    for variant in variants() {
        let mut model = variant.model();
        for saving in [Saving::Operands, Saving::BlockInputs] {
            model.set_saving(saving);
            let mut sums = model.zero_gradients();
            let (_, saved) = model.forward_train(&variant.pack());
            model.backward(saved, &[variant.slopes], &mut sums);
            let buckets = sums.take_host();
            let mut worst = 0f64;
            for parameter in &model.layout().parameters {
                let found = &buckets[parameter.bucket][parameter.range()];
                let probe = stream(&format!("{}#", parameter.name));
                let product: f64 = found
                    .iter()
                    .zip(probe)
                    .map(|(g, p)| f64::from(*g) * (p - 0.5))
                    .sum();
                let norm = found
                    .iter()
                    .map(|g| f64::from(*g).powi(2))
                    .sum::<f64>()
                    .sqrt();
                let [expected_norm, expected_product] = variant.gradient(&parameter.name);
                let error = (norm - expected_norm)
                    .abs()
                    .max((product - expected_product).abs())
                    / expected_norm;
                worst = worst.max(error);
                assert!(
                    error <= GRADIENT_TOLERANCE,
                    "{} {}: {norm} and {product} for {expected_norm} and {expected_product}",
                    variant.name,
                    parameter.name
                );
            }
            println!("{} {saving:?}: {worst:.1e}", variant.name);
        }
    }
}

#[test]
fn each_key_of_config_json_is_seen_in_the_log_probs() {
    // Negative control: what a reader might overlook changes the result.
    for (name, key, value) in [
        ("llama, linear", "rope_parameters", "null"),
        ("llama, yarn", "rope_parameters", "null"),
        ("mistral, window 5", "sliding_window", "6"),
        (
            "qwen2, windows from the second layer on",
            "max_window_layers",
            "2",
        ),
        ("gemma", "hidden_act", "\"gelu\""),
        ("gemma2", "final_logit_softcapping", "null"),
        ("gemma2", "attn_logit_softcapping", "null"),
        ("gemma2", "query_pre_attn_scalar", "10"),
        ("gemma3, linear in full layers", "sliding_window", "6"),
        ("gpt_neox", "use_parallel_residual", "false"),
        ("gpt_neox", "hidden_act", "\"gelu_new\""),
        ("gpt_neox", "layer_norm_eps", "1e-3"),
    ] {
        let mut variant = variants()
            .into_iter()
            .find(|variant| variant.name == name)
            .unwrap();
        let logps = |variant: &Variant| variant.model().token_logps(&variant.pack());
        let right = logps(&variant);
        variant.config[key] = serde_json::from_str(value).unwrap();
        let legacy = name == "gemma" && key == "hidden_act";
        // Gemma's legacy name means the same; everything else does not.
        assert_eq!(
            right == logps(&variant),
            legacy,
            "{name} with {key} = {value}"
        );
    }
}

struct Variant {
    name: String,
    config: Value,
    lengths: [usize; 3],
    slopes: [f32; 2],
    token_logps: Vec<Vec<f64>>,
    gradients: Value,
}

fn variants() -> Vec<Variant> {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let lengths = serde_json::from_value(golden["lengths"].clone()).unwrap();
    let slopes = serde_json::from_value(golden["slopes"].clone()).unwrap();
    let variants = golden["variants"].as_object().unwrap().iter();
    let variants = variants.map(|(name, variant)| Variant {
        name: name.clone(),
        config: variant["config"].clone(),
        lengths,
        slopes,
        token_logps: serde_json::from_value(variant["token_logps"].clone()).unwrap(),
        gradients: variant["gradients"].clone(),
    });
    variants.collect()
}

impl Variant {
    fn model(&self) -> Model {
        let config = support::parse(&self.config);
        let weights = weights(&config);
        Model::from_parts(config, weights, &Device::flex()).unwrap()
    }

    fn pack(&self) -> Pack {
        let [prompt, chosen, rejected] = self.lengths;
        let ids: Vec<u32> = stream("ids")
            .map(|value| (value * 37.0) as u32)
            .take(prompt + chosen + rejected)
            .collect();
        Pack::new([PairTokens {
            prompt: &ids[..prompt],
            chosen: &ids[prompt..][..chosen],
            rejected: &ids[prompt + chosen..],
        }])
    }

    fn gradient(&self, name: &str) -> [f64; 2] {
        let gradient = &self.gradients[name];
        serde_json::from_value(gradient.clone())
            .unwrap_or_else(|_| panic!("{}: no {name}", self.name))
    }
}

/// As `weight` in make.py.
fn weights(config: &ModelConfig) -> Vec<Vec<f32>> {
    let layout = Layout::new(config);
    let mut buckets: Vec<Vec<f32>> = layout
        .bucket_lens()
        .iter()
        .map(|&len| vec![0.0; len])
        .collect();
    for parameter in &layout.parameters {
        let near_zero = parameter.name.rsplit('.').next() == Some("bias")
            || config.norm == NormKind::RmsPlusOne;
        let (level, spread) = match parameter.shape.len() {
            2 => (0.0, 0.9),
            _ if near_zero => (0.0, 0.4),
            _ => (1.0, 0.4),
        };
        let values = &mut buckets[parameter.bucket][parameter.range()];
        for (value, random) in values.iter_mut().zip(stream(&parameter.name)) {
            *value = (level + (random - 0.5) * spread) as f32;
        }
    }
    buckets
}

/// As `stream` in make.py.
fn stream(text: &str) -> impl Iterator<Item = f64> + use<> {
    let seed = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (1u64..).map(move |step| {
        let mut mixed = seed.wrapping_add(step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    })
}
