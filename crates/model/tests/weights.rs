//! Weight files: one file or shards, three element types, and every damage named with its file and tensor.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use model::{
    Device, Family, Layout, Lora, Model, ModelConfig, Precision, Targets, random_weights,
    write_safetensors,
};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};
use serde_json::json;
use support::{Pair, pack, tiny, tiny_json};

/// Tensors by name: element type, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(config: &ModelConfig, dtype: Dtype) -> Tensors {
    let layout = Layout::new(config);
    let weights = random_weights(config, 3);
    let entry = |parameter: &model::Parameter| {
        let values = &weights[parameter.bucket][parameter.range()];
        let bytes = match dtype {
            Dtype::F16 => values
                .iter()
                .flat_map(|value| f16::from_f32(*value).to_le_bytes())
                .collect(),
            Dtype::BF16 => values
                .iter()
                .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
                .collect(),
            _ => values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        };
        (
            parameter.name.clone(),
            (dtype, parameter.shape.clone(), bytes),
        )
    };
    layout.parameters.iter().map(entry).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let view = |(name, (dtype, shape, bytes)): (&String, &(Dtype, Vec<usize>, Vec<u8>))| {
        (
            name.clone(),
            TensorView::new(*dtype, shape.clone(), bytes)
                .unwrap()
                .data()
                .to_vec(),
            *dtype,
            shape.clone(),
        )
    };
    let owned: Vec<_> = tensors.iter().map(view).collect();
    let views = owned.iter().map(|(name, bytes, dtype, shape)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

fn write_config(dir: &Path, config: &ModelConfig) {
    let json = tiny_json(config.family, config.tied, config.attention[0].window);
    fs::write(dir.join("config.json"), json.to_string()).unwrap();
}

/// A directory with a config and one weight file.
fn directory(config: &ModelConfig, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), config);
    write(&dir.path().join("model.safetensors"), tensors);
    dir
}

fn load(dir: &Path) -> Result<Vec<Vec<f32>>, String> {
    Model::load(dir, &Device::flex())
        .map(|mut model| model.take_weights())
        .map_err(|error| error.to_string())
}

fn refused(dir: &Path, words: &[&str]) {
    let error = load(dir).unwrap_err();
    for word in words {
        assert!(error.contains(word), "`{error}` lacks `{word}`");
    }
}

fn untied() -> ModelConfig {
    tiny(Family::Llama, false, None)
}

#[test]
fn three_element_types_become_the_f32_they_stand_for() {
    let config = untied();
    let weights = random_weights(&config, 3);
    let check = |dtype, rounded: fn(f32) -> f32| {
        let found = load(directory(&config, &tensors(&config, dtype)).path()).unwrap();
        let expected: Vec<Vec<f32>> = weights
            .iter()
            .map(|bucket| bucket.iter().map(|value| rounded(*value)).collect())
            .collect();
        assert!(found == expected, "{dtype:?}");
    };
    check(Dtype::F32, |value| value);
    check(Dtype::F16, |value| f16::from_f32(value).to_f32());
    check(Dtype::BF16, |value| bf16::from_f32(value).to_f32());
}

#[test]
fn written_weights_are_read_back_to_the_bit() {
    let config = untied();
    let model = Model::random(config.clone(), 3, &Device::flex());
    let layout = Layout::new(&config);
    let weights = random_weights(&config, 3);
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config);
    let mut file = fs::File::create(dir.path().join("model.safetensors")).unwrap();
    write_safetensors(&weights, &layout, &mut file).unwrap();
    let read = Model::load(dir.path(), &Device::flex()).unwrap();
    assert_eq!(read.weights_digest(), model.weights_digest());
    assert_eq!(read.config(), &config);
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    assert!(
        safetensors::SafeTensors::deserialize(&bytes).is_ok(),
        "the library reads it too"
    );
}

#[test]
fn weights_that_are_never_trained_compute_what_whole_ones_do_and_have_their_digest() {
    let pack = pack(&[Pair::new(5, 4, 6, 1), Pair::new(3, 7, 2, 2)]);
    for tied in [true, false] {
        let config = tiny(Family::Qwen2, tied, None);
        let dir = directory(&config, &tensors(&config, Dtype::F32));
        for precision in [Precision::F32, Precision::Bf16] {
            let mut whole = Model::load(dir.path(), &Device::flex()).unwrap();
            whole.set_precision(precision);
            let mut frozen = Model::load_frozen(dir.path(), &Device::flex(), precision).unwrap();
            assert_eq!(frozen.precision(), precision);
            assert_eq!(frozen.weights_digest(), whole.weights_digest());
            assert_eq!(frozen.forward(&pack), whole.forward(&pack));
            assert_eq!(
                frozen.trace(&[1, 2, 3]).logits.into_vec(),
                whole.trace(&[1, 2, 3]).logits.into_vec()
            );
            // Under an adapter that changes something.
            let lora = Lora {
                rank: 2,
                alpha: 4.0,
                rank_stabilized: false,
                targets: Targets::AllLinear,
            };
            let gradients = [&mut whole, &mut frozen].map(|model| {
                let mut weights = lora.fresh(&config, 5).unwrap();
                weights
                    .iter_mut()
                    .flatten()
                    .for_each(|value| *value += 0.01);
                model.adapt(&lora, weights).unwrap();
                let (logps, saved) = model.forward_train(&pack);
                let mut gradients = model.zero_gradients();
                model.backward(saved, &[[0.5, -0.5], [1.0, 0.25]], &mut gradients);
                (logps, gradients.take_host())
            });
            assert!(gradients[0] == gradients[1]);
            assert!(gradients[0].1.iter().flatten().any(|value| *value != 0.0));
            assert_eq!(frozen.weights_digest(), whole.weights_digest());
        }
    }
}

#[test]
#[should_panic(expected = "weights that were loaded frozen")]
fn weights_that_were_loaded_frozen_cannot_be_taken_for_training() {
    let config = untied();
    let dir = directory(&config, &tensors(&config, Dtype::F32));
    let mut model = Model::load_frozen(dir.path(), &Device::flex(), Precision::Bf16).unwrap();
    drop(model.take_weights());
}

/// The tensors in two shards with an index.
fn sharded(config: &ModelConfig) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), config);
    let all = tensors(config, Dtype::F32);
    let mut shards = [Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in all.into_iter().enumerate() {
        map.insert(
            name.clone(),
            json!(format!("shard-{}.safetensors", index % 2)),
        );
        shards[index % 2].insert(name, tensor);
    }
    for (index, shard) in shards.iter().enumerate() {
        write(
            &dir.path().join(format!("shard-{index}.safetensors")),
            shard,
        );
    }
    write_index(dir.path(), &map);
    dir
}

fn write_index(dir: &Path, map: &serde_json::Map<String, serde_json::Value>) {
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn read_index(dir: &Path) -> serde_json::Map<String, serde_json::Value> {
    let text = fs::read_to_string(dir.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&text).unwrap();
    index["weight_map"].as_object().unwrap().clone()
}

#[test]
fn shards_hold_the_same_model_as_one_file() {
    let config = untied();
    let whole = load(directory(&config, &tensors(&config, Dtype::F32)).path()).unwrap();
    assert!(load(sharded(&config).path()).unwrap() == whole);
}

#[test]
fn damaged_shard_sets_are_refused() {
    let config = untied();
    let dir = sharded(&config);
    fs::remove_file(dir.path().join("shard-1.safetensors")).unwrap();
    refused(dir.path(), &["shard-1.safetensors", "read"]);

    let dir = sharded(&config);
    let mut map = read_index(dir.path());
    map.insert(
        "model.norm.weight".into(),
        json!("../elsewhere.safetensors"),
    );
    write_index(dir.path(), &map);
    refused(dir.path(), &["model.norm.weight", "plain file name"]);

    let dir = sharded(&config);
    let mut map = read_index(dir.path());
    map.remove("model.norm.weight");
    write_index(dir.path(), &map);
    refused(dir.path(), &["model.norm.weight", "index places elsewhere"]);

    let dir = sharded(&config);
    let mut map = read_index(dir.path());
    map.insert(
        "model.layers.9.mlp.up_proj.weight".into(),
        json!("shard-0.safetensors"),
    );
    write_index(dir.path(), &map);
    refused(
        dir.path(),
        &[
            "shard-0.safetensors",
            "model.layers.9.mlp.up_proj.weight",
            "missing",
        ],
    );

    let dir = sharded(&config);
    fs::write(dir.path().join("model.safetensors.index.json"), "[]").unwrap();
    refused(
        dir.path(),
        &["model.safetensors.index.json", "not a safetensors index"],
    );
}

#[test]
fn missing_extra_and_misshapen_tensors_are_named() {
    let config = untied();
    let name = "model.layers.1.mlp.up_proj.weight";
    let check = |change: &dyn Fn(&mut Tensors), words: &[&str]| {
        let mut tensors = tensors(&config, Dtype::F32);
        change(&mut tensors);
        let dir = directory(&config, &tensors);
        refused(dir.path(), &[&["model.safetensors"], words].concat());
    };
    check(&|tensors| drop(tensors.remove(name)), &[name, "missing"]);
    check(
        &|tensors| {
            let bias = (Dtype::F32, vec![2], vec![0; 8]);
            tensors.insert("model.layers.1.self_attn.q_proj.bias".into(), bias);
        },
        &["model.layers.1.self_attn.q_proj.bias", "belongs to no part"],
    );
    check(
        &|tensors| tensors.get_mut(name).unwrap().1.reverse(),
        &[name, "[20, 28]", "[28, 20]"],
    );
    check(
        &|tensors| tensors.get_mut(name).unwrap().0 = Dtype::I32,
        &[name, "I32", "BF16"],
    );
}

#[test]
fn every_truncation_is_noticed() {
    let config = untied();
    let dir = directory(&config, &tensors(&config, Dtype::F32));
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for (len, words) in [
        (0, vec!["too few"]),
        (7, vec!["too few"]),
        (8, vec!["announces a header"]),
        (header - 1, vec!["announces a header"]),
        (header, vec!["truncated", "tensor `"]),
        (header + 5000, vec!["truncated", "tensor `"]),
        (whole.len() - 1, vec!["truncated", "tensor `"]),
    ] {
        fs::write(&path, &whole[..len]).unwrap();
        refused(dir.path(), &[&["model.safetensors"], &words[..]].concat());
    }
    fs::write(&path, [whole.clone(), vec![0]].concat()).unwrap();
    refused(dir.path(), &["1 bytes follow the last tensor"]);
    let mut broken = whole.clone();
    broken[8] = b'}';
    fs::write(&path, broken).unwrap();
    refused(dir.path(), &["not a safetensors file"]);
    let mut huge = whole;
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, huge).unwrap();
    refused(dir.path(), &["announces a header"]);
}

#[test]
fn a_directory_without_weights_or_config_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    refused(dir.path(), &["read", "config.json"]);
    write_config(dir.path(), &untied());
    refused(
        dir.path(),
        &["model.safetensors.index.json", "save_pretrained"],
    );
}

#[test]
fn a_head_stored_beside_a_tied_embedding_must_be_its_copy() {
    let config = tiny(Family::Llama, true, None);
    let mut tensors = tensors(&config, Dtype::F32);
    let alone = load(directory(&config, &tensors).path()).unwrap();
    let embedding = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".into(), embedding);
    // Old files also store the rotary frequencies.
    tensors.insert(
        "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
        (Dtype::F32, vec![3], vec![0; 12]),
    );
    assert!(load(directory(&config, &tensors).path()).unwrap() == alone);
    tensors.get_mut("lm_head.weight").unwrap().2[0] ^= 1;
    refused(
        directory(&config, &tensors).path(),
        &["lm_head.weight", "tie_word_embeddings"],
    );
}

#[test]
fn weights_of_another_layout_are_refused() {
    let error = Model::from_parts(untied(), vec![vec![0.0; 5]], &Device::flex())
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("[5]"), "{error}");
}

#[test]
fn the_digest_depends_on_weights_and_names_and_nothing_else() {
    let digest =
        |config: ModelConfig, seed| Model::random(config, seed, &Device::flex()).weights_digest();
    assert_eq!(digest(untied(), 3), digest(untied(), 3));
    assert_ne!(digest(untied(), 3), digest(untied(), 4));
    assert_ne!(
        digest(untied(), 3),
        digest(tiny(Family::Llama, true, None), 3)
    );
}
