//! Low-rank adapters: a fresh one changes nothing, only it is trained, its gradients are those of finite differences, and it
//! computes what the merged weights do.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;

use model::{
    Device, Family, Layout, Lora, Model, ModelConfig, Pack, Precision, Saving, Targets,
    load_adapter, write_safetensors,
};
use serde_json::{Value, json};
use support::{Pair, every_family, lively, pack, tiny};

fn lora(targets: &[&str]) -> Lora {
    Lora {
        rank: 3,
        alpha: 6.0,
        rank_stabilized: false,
        targets: match targets {
            [] => Targets::AllLinear,
            names => Targets::Named(names.iter().map(|&name| name.to_owned()).collect()),
        },
    }
}

/// Weights of an adapter that changes something: A as it starts, B no longer zero.
fn trained(config: &ModelConfig, lora: &Lora) -> Vec<Vec<f32>> {
    let mut weights = lora.fresh(config, 5).unwrap();
    for parameter in &lora.layout(config).unwrap().parameters {
        if parameter.name.ends_with("lora_B.weight") {
            let values = &mut weights[parameter.bucket][parameter.range()];
            for (place, value) in values.iter_mut().enumerate() {
                *value = 0.3 * (place as f32 * 0.7).sin();
            }
        }
    }
    weights
}

fn a_pack() -> Pack {
    pack(&[Pair::new(5, 4, 6, 1), Pair::new(3, 7, 2, 2)])
}

#[test]
fn a_fresh_adapter_computes_what_the_model_computes_to_the_bit() {
    for (name, config) in every_family() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut model = lively(config.clone());
            model.set_precision(precision);
            let before = model.forward(&a_pack());
            let lora = lora(&[]);
            model.adapt(&lora, lora.fresh(&config, 1).unwrap()).unwrap();
            assert_eq!(model.precision(), precision);
            let bits = |logps: &[[f32; 2]]| -> Vec<_> {
                logps.iter().map(|sides| sides.map(f32::to_bits)).collect()
            };
            let after = model.forward(&a_pack());
            assert_eq!(bits(&after.logps), bits(&before.logps), "{name}");
            let weights = lora.layout(&config).unwrap();
            model
                .adapt(&lora, trained(&config, &lora))
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_ne!(model.forward(&a_pack()).logps, before.logps, "{name}");
            assert_eq!(model.trained(), &weights);
        }
    }
}

#[test]
fn gradients_of_an_adapter_are_those_of_finite_differences() {
    for (name, config) in every_family() {
        for saving in [Saving::Operands, Saving::BlockInputs] {
            let lora = lora(&[]);
            let mut model = lively(config.clone());
            model.adapt(&lora, trained(&config, &lora)).unwrap();
            model.set_saving(saving);
            let slopes = [[0.8, -0.5], [-0.3, 0.6]];
            let loss = |model: &Model| -> f64 {
                let logps = model.token_logps(&a_pack());
                let sides = logps.iter().zip(slopes).flat_map(|(sides, slopes)| {
                    let sums = sides
                        .iter()
                        .map(|logps| -> f64 { logps.iter().map(|logp| f64::from(*logp)).sum() });
                    sums.zip(slopes).map(|(sum, slope)| sum * f64::from(slope))
                });
                sides.sum()
            };
            let mut gradients = model.zero_gradients();
            let (_, saved) = model.forward_train(&a_pack());
            model.backward(saved, &slopes, &mut gradients);
            let gradients = gradients.take_host();
            // A step along every gradient of one kind changes the loss by its squared length.
            for kind in ["lora_A", "lora_B"] {
                let mut moved = model.take_weights();
                let before = moved.clone();
                let mut squares = 0.0;
                for parameter in &model.trained().parameters {
                    if parameter.name.contains(kind) {
                        let own = &gradients[parameter.bucket][parameter.range()];
                        squares += own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
                    }
                }
                let size = 7e-4 / squares.sqrt();
                let step = |sign: f64, moved: &mut Vec<Vec<f32>>, layout: &Layout| {
                    for parameter in &layout.parameters {
                        if parameter.name.contains(kind) {
                            let range = parameter.range();
                            let own = &gradients[parameter.bucket][range.clone()];
                            let base = &before[parameter.bucket][range.clone()];
                            let values = &mut moved[parameter.bucket][range];
                            for ((value, base), g) in values.iter_mut().zip(base).zip(own) {
                                *value = (f64::from(*base) + sign * size * f64::from(*g)) as f32;
                            }
                        }
                    }
                };
                let layout = model.trained().clone();
                step(1.0, &mut moved, &layout);
                model.put_weights(moved);
                let up = loss(&model);
                let mut moved = model.take_weights();
                step(-1.0, &mut moved, &layout);
                model.put_weights(moved);
                let slope = (up - loss(&model)) / (2.0 * size);
                model.take_weights();
                model.put_weights(before);
                assert!(
                    (slope / squares - 1.0).abs() < 1e-2,
                    "{name} {saving:?} {kind}: {slope} for {squares}"
                );
            }
        }
    }
}

#[test]
fn only_the_targets_are_trained() {
    let config = tiny(Family::Llama, false, None);
    let lora = lora(&["q_proj", "down_proj"]);
    let mut model = lively(config.clone());
    let elements = model.layout().elements();
    model.adapt(&lora, lora.fresh(&config, 3).unwrap()).unwrap();
    let names: Vec<&str> = model
        .trained()
        .parameters
        .iter()
        .map(|parameter| parameter.name.as_str())
        .take(4)
        .collect();
    assert_eq!(
        names,
        [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
            "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
            "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight",
        ]
    );
    // 24 = 4 heads of 6; 20 columns, 28 of the MLP.
    let per_block = 3 * (20 + 24) + 3 * (28 + 20);
    assert_eq!(model.trained().elements(), 3 * per_block);
    assert_eq!(model.layout().elements(), elements);
    let lens: Vec<usize> = model
        .zero_gradients()
        .take_host()
        .iter()
        .map(Vec::len)
        .collect();
    assert_eq!(lens.iter().sum::<usize>(), 3 * per_block);
    let digest = model.weights_digest();
    let mut weights = model.take_weights();
    weights[0][0] += 1.0;
    model.put_weights(weights);
    assert_eq!(model.weights_digest(), digest, "the model's own weights");
}

#[test]
fn an_adapter_on_disk_is_that_of_peft_and_is_read_back() {
    for (name, config) in every_family() {
        let some = match config.family {
            Family::GptNeox => ["dense"],
            _ => ["down_proj"],
        };
        for targets in [&[][..], &some] {
            let lora = lora(targets);
            let dir = tempfile::tempdir().unwrap();
            let peft = lora.to_peft(&config, "base").unwrap();
            let (layout, weights) = (lora.layout(&config).unwrap(), trained(&config, &lora));
            write_peft(dir.path(), &peft, &layout, &weights);
            let (read, found) = load_adapter(dir.path(), &config).unwrap();
            assert_eq!(found, weights, "{name}");
            assert_eq!((read.rank, read.scale()), (lora.rank, lora.scale()));
            assert_eq!(read.layout(&config).unwrap(), layout, "{name}");
        }
    }
}

#[test]
fn an_adapter_that_is_not_plain_lora_is_refused_by_its_key() {
    let config = tiny(Family::Llama, false, None);
    let lora = lora(&["q_proj"]);
    let peft = lora.to_peft(&config, "base").unwrap();
    let (layout, weights) = (lora.layout(&config).unwrap(), trained(&config, &lora));
    for (key, value, says) in [
        ("peft_type", json!("IA3"), "only \"LORA\""),
        ("r", json!(0), "must be from 1"),
        ("lora_alpha", json!("x"), "must be a number"),
        ("use_dora", json!(true), "not supported"),
        ("bias", json!("all"), "not supported"),
        ("modules_to_save", json!(["lm_head"]), "not supported"),
        ("rank_pattern", json!({"q_proj": 4}), "not supported"),
        ("layers_to_transform", json!([1]), "not supported"),
        ("target_modules", json!("q_proj|v_proj"), "must be"),
        ("target_modules", json!(["w_pack"]), "no linear map"),
        ("target_modules", json!(["lm_head"]), "no linear map"),
        ("init_lora_weights", json!("pissa"), "changes the model"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut changed = peft.clone();
        changed[key] = value;
        write_peft(dir.path(), &changed, &layout, &weights);
        let error = load_adapter(dir.path(), &config).unwrap_err().to_string();
        assert!(error.contains(says), "{key}: {error}");
        if !says.contains("linear map") {
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
    }
    // Another rank than the tensors have.
    let dir = tempfile::tempdir().unwrap();
    let mut changed = peft;
    changed["r"] = json!(4);
    write_peft(dir.path(), &changed, &layout, &weights);
    let error = load_adapter(dir.path(), &config).unwrap_err().to_string();
    assert!(error.contains("q_proj.lora_A.weight"), "{error}");
}

#[test]
fn scales_are_those_of_peft() {
    let mut lora = lora(&[]);
    (lora.rank, lora.alpha) = (16, 32.0);
    assert!((lora.scale() - 2.0).abs() < 1e-12);
    lora.rank_stabilized = true;
    assert!((lora.scale() - 8.0).abs() < 1e-12);
}

#[test]
fn another_layouts_weights_are_refused() {
    let config = tiny(Family::Llama, false, None);
    let mut model = Model::random(config.clone(), 1, &Device::flex());
    let weights = lora(&["q_proj"]).fresh(&config, 1).unwrap();
    assert!(model.adapt(&lora(&["v_proj"]), weights).is_err());
    let unknown = lora(&["q_proj", "c_attn"]);
    let error = unknown.layout(&config).unwrap_err().to_string();
    assert!(
        error.contains("`c_attn`") && error.contains("q_proj, k_proj"),
        "{error}"
    );
}

fn write_peft(dir: &Path, config: &Value, layout: &Layout, weights: &[Vec<f32>]) {
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let mut bytes = Vec::new();
    write_safetensors(weights, layout, &mut bytes).unwrap();
    fs::write(dir.join("adapter_model.safetensors"), bytes).unwrap();
}
