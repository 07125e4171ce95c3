//! An export is a Hugging Face model directory with the checkpoint's weights, whole or absent.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{fs, path::Path};

use checkpoint::{ExportDtype, ExportError, Kind, Piece, commit, export, write_rank};
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use support::{GENERATION, elements, info, save, state, tensors, values};

/// A model directory without weights.
fn source(dir: &Path, config: &Value) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "README.md",
        "optimizer.bin",
    ] {
        fs::write(dir.join(name), format!("content of {name}")).unwrap();
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The checkpoint's tensors as a model's safetensors file of zeros.
fn weights_file(path: &Path, change: impl Fn(usize) -> Option<Vec<usize>>) {
    let zeros = [0; 4 * 64];
    let specs = tensors();
    let views = specs.iter().enumerate().filter_map(|(index, spec)| {
        let shape = change(index)?;
        let bytes = &zeros[..4 * shape.iter().product::<usize>()];
        let view = safetensors::tensor::TensorView::new(Dtype::F32, shape, bytes).unwrap();
        Some((spec.name.clone(), view))
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn an_export_in_f32_holds_the_bits_of_the_checkpoint_and_the_files_of_the_source() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (
        directory.path().join("model"),
        directory.path().join("new/out"),
    );
    source(
        &model,
        &json!({ "model_type": "llama", "torch_dtype": "bfloat16" }),
    );
    let checkpoint = save(&directory.path().join("checkpoints"), 20, 3).path;
    let summary = export(&checkpoint, &model, &out, ExportDtype::F32).unwrap();
    assert_eq!(
        (summary.step, summary.tensors, summary.parameters),
        (20, 4, 45)
    );
    assert_eq!(
        names(&out),
        [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    for name in &summary.copied {
        let content = fs::read_to_string(out.join(name)).unwrap();
        assert_eq!(content, format!("content of {name}"));
    }
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    assert_eq!(bytes.len() as u64, summary.bytes);
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.names().len(), 4);
    for (index, spec) in tensors().iter().enumerate() {
        let view = file.tensor(&spec.name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (Dtype::F32, &spec.shape[..]));
        let expected: Vec<u8> = values(20, index, Kind::Weight, elements(spec))
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        assert_eq!(view.data(), expected, "{}", spec.name);
    }
    let config: Value =
        serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(
        config,
        json!({ "model_type": "llama", "torch_dtype": "float32" })
    );
    assert_eq!(names(&directory.path().join("new")), ["out"]);
}

#[test]
fn an_export_in_bf16_rounds_to_the_nearest_and_ties_to_even() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    source(&model, &json!({ "dtype": "float32" }));
    // Above 1, bf16 counts in steps of 2^-7.
    let step = 1.0 / 128.0;
    let cases = [
        (1.0, 1.0),
        (1.0 + step / 2.0, 1.0),
        (1.0 + step * 1.5, 1.0 + 2.0 * step),
        (1.0 + step * 0.5 + f32::EPSILON, 1.0 + step),
        (1.0 + step * 0.49, 1.0),
        (-1.0 - step * 1.5, -1.0 - 2.0 * step),
        (f32::MAX, f32::INFINITY),
        // Smaller than the smallest normal number.
        (f32::from_bits(0x0001_1000), f32::from_bits(0x0001_0000)),
    ];
    let given: Vec<f32> = cases.iter().map(|(given, _)| *given).collect();
    let spec = checkpoint::TensorSpec {
        name: "w".into(),
        shape: vec![2, 4],
    };
    let pieces = Kind::ALL.map(|kind| Piece {
        tensor: "w",
        kind,
        start: 0,
        values: &given,
    });
    let dir = directory.path().join("checkpoints");
    let rank = write_rank(&dir, GENERATION, 0, 1, state(1), &[spec], &pieces).unwrap();
    let path = commit(&dir, &[rank], &info()).unwrap().path;
    export(&path, &model, &out, ExportDtype::Bf16).unwrap();
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("w").unwrap();
    assert_eq!((view.dtype(), view.shape()), (Dtype::BF16, &[2, 4][..]));
    for (bytes, (given, expected)) in view.data().chunks(2).zip(cases) {
        let found = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        assert_eq!(found, expected, "{given}");
    }
}

#[test]
fn the_dtype_of_a_config_is_set_wherever_it_stands() {
    for (given, expected) in [
        (
            json!({ "a": 1 }),
            json!({ "a": 1, "torch_dtype": "bfloat16" }),
        ),
        (
            json!({ "dtype": "float32" }),
            json!({ "dtype": "bfloat16" }),
        ),
        (
            json!({ "torch_dtype": "float16", "text_config": { "dtype": "float16", "n": 2 } }),
            json!({ "torch_dtype": "bfloat16", "text_config": { "dtype": "bfloat16", "n": 2 } }),
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let (model, out) = (directory.path().join("model"), directory.path().join("out"));
        source(&model, &given);
        let path = save(directory.path(), 20, 1).path;
        export(&path, &model, &out, ExportDtype::Bf16).unwrap();
        let config = fs::read(out.join("config.json")).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&config).unwrap(), expected);
    }
}

#[test]
fn an_earlier_export_of_the_run_is_replaced_and_nothing_else_is() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    source(&model, &json!({}));
    let old = save(directory.path(), 20, 1).path;
    let new = save(directory.path(), 30, 2).path;
    export(&old, &model, &out, ExportDtype::F32).unwrap();
    export(&new, &model, &out, ExportDtype::F32).unwrap();
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let scale = values(30, 3, Kind::Weight, 1)[0].to_le_bytes();
    assert_eq!(file.tensor("scale").unwrap().data(), scale);

    // Somebody's model, and an export of another run.
    weights_file(&model.join("model.safetensors"), |index| {
        Some(tensors()[index].shape.clone())
    });
    let before = names(&model);
    let error = export(&new, &model, &model, ExportDtype::F32).unwrap_err();
    assert!(matches!(error, ExportError::Occupied { .. }), "{error}");
    assert_eq!(names(&model), before);
    let other = directory.path().join("other");
    let rank = support::write(&other, GENERATION, 40, 1, 0);
    let mut info = info();
    info.run_digest = "another".into();
    let other = commit(&other, &[rank], &info).unwrap().path;
    let error = export(&other, &model, &out, ExportDtype::F32).unwrap_err();
    assert!(matches!(error, ExportError::Occupied { .. }), "{error}");
    assert_eq!(
        names(directory.path()),
        ["model", "other", "out", "step-00000020", "step-00000030"]
    );
}

#[test]
fn a_source_that_is_another_model_is_refused_with_the_tensor() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    let path = save(directory.path(), 20, 1).path;
    let error = export(&path, &model, &out, ExportDtype::F32).unwrap_err();
    assert!(matches!(error, ExportError::NoModel { .. }), "{error}");
    source(&model, &json!({}));
    let weights = model.join("model-00001-of-00001.safetensors");
    weights_file(&weights, |index| {
        (index != 2).then(|| tensors()[index].shape.clone())
    });
    let text = export(&path, &model, &out, ExportDtype::F32)
        .unwrap_err()
        .to_string();
    assert!(text.contains("`lm_head.weight` is not there"), "{text}");
    weights_file(&weights, |index| {
        Some(if index == 0 {
            vec![6, 4]
        } else {
            tensors()[index].shape.clone()
        })
    });
    let text = export(&path, &model, &out, ExportDtype::F32)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("`model.embed_tokens.weight` is [6, 4]"),
        "{text}"
    );
    assert!(!out.exists());
}

#[test]
fn an_export_of_a_damaged_checkpoint_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    source(&model, &json!({}));
    let path = save(directory.path(), 20, 1).path;
    let name = format!("rank-00000-of-00001.generation-{GENERATION}.safetensors");
    let mut bytes = fs::read(path.join(&name)).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(path.join(&name), bytes).unwrap();
    let text = export(&path, &model, &out, ExportDtype::F32)
        .unwrap_err()
        .to_string();
    assert!(text.contains(&name) && text.contains("second/"), "{text}");
    assert_eq!(names(directory.path()), ["model", "step-00000020"]);
}
