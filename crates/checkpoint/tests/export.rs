//! An export is a Hugging Face model directory with the checkpoint's weights, whole or absent.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
};

use checkpoint::{
    ExportDtype, ExportError, ExportSummary, Kind, Piece, SHARD_BYTES_MAX, SOURCE, TensorSpec,
    WeightDtype, commit, export_adapter, exported, is_adapter, keep_adapter, keep_source,
    write_rank,
};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use support::{GENERATION, elements, info, save, state, tensors, values};

/// An export with shards of the usual size.
fn export(
    checkpoint: &Path,
    model: &Path,
    out: &Path,
    dtype: ExportDtype,
) -> Result<ExportSummary, ExportError> {
    checkpoint::export(checkpoint, model, out, dtype, SHARD_BYTES_MAX)
}

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
fn weights_file(path: &Path, tensor: impl Fn(usize) -> Option<(Dtype, Vec<usize>)>) {
    let zeros = [0; 8 * 64];
    let specs = tensors();
    let views = specs.iter().enumerate().filter_map(|(index, spec)| {
        let (dtype, shape) = tensor(index)?;
        let bytes = &zeros[..dtype.bitsize() / 8 * shape.iter().product::<usize>()];
        let view = safetensors::tensor::TensorView::new(dtype, shape, bytes).unwrap();
        Some((spec.name.clone(), view))
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A model directory whose weights have these types, in two shards.
fn source_of(dir: &Path, config: &Value, dtypes: [Dtype; 4]) {
    source(dir, config);
    let mut weight_map = serde_json::Map::new();
    for (file, half) in [
        ("model-00001-of-00002.safetensors", 0..2),
        ("model-00002-of-00002.safetensors", 2..4),
    ] {
        for index in half.clone() {
            weight_map.insert(tensors()[index].name.clone(), file.into());
        }
        weights_file(&dir.join(file), |index| {
            half.contains(&index)
                .then(|| (dtypes[index], tensors()[index].shape.clone()))
        });
    }
    let index = json!({ "metadata": {}, "weight_map": weight_map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// A tensor's values.
fn numbers(dtype: Dtype, data: &[u8]) -> Vec<f32> {
    let halves = || data.as_chunks::<2>().0.iter();
    match dtype {
        Dtype::BF16 => halves()
            .map(|it| bf16::from_le_bytes(*it).to_f32())
            .collect(),
        Dtype::F16 => halves()
            .map(|it| f16::from_le_bytes(*it).to_f32())
            .collect(),
        Dtype::F32 => {
            let words = data.as_chunks().0.iter();
            words.map(|it| f32::from_le_bytes(*it)).collect()
        }
        _ => panic!("{dtype:?}"),
    }
}

/// Types of an export's tensors in the checkpoint's order, after comparing their values with those of `step`.
fn check_weights(dir: &Path, files: &[&str], step: u64) -> Vec<Dtype> {
    let bytes: Vec<Vec<u8>> = files
        .iter()
        .map(|name| fs::read(dir.join(name)).unwrap())
        .collect();
    let files: Vec<SafeTensors> = bytes
        .iter()
        .map(|bytes| SafeTensors::deserialize(bytes).unwrap())
        .collect();
    let check = |(index, spec): (usize, &checkpoint::TensorSpec)| {
        let mut holders = files.iter().filter_map(|file| file.tensor(&spec.name).ok());
        let view = holders.next().unwrap();
        assert!(holders.next().is_none(), "{} twice", spec.name);
        assert_eq!(view.shape(), spec.shape);
        let expected = values(step, index, Kind::Weight, elements(spec));
        let found = numbers(view.dtype(), view.data());
        assert_eq!(found.len(), expected.len(), "{}", spec.name);
        for (found, expected) in found.into_iter().zip(expected) {
            // A neighbour: weights that had 16 bits are dithered.
            let step = match view.dtype() {
                Dtype::BF16 => expected.abs() / 128.0,
                Dtype::F16 => expected.abs() / 1024.0,
                _ => 0.0,
            };
            let near = found == expected || (found - expected).abs() < step;
            assert!(near, "{}: {found} of {expected}", spec.name);
        }
        view.dtype()
    };
    tensors().iter().enumerate().map(check).collect()
}

fn config_of(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
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
    assert_eq!(header.tensors().len(), 4);
    assert_eq!(
        check_weights(&out, &["model.safetensors"], 20),
        [Dtype::F32; 4]
    );
    assert_eq!(
        config_of(&out),
        json!({ "model_type": "llama", "torch_dtype": "float32" })
    );
    assert_eq!(names(&directory.path().join("new")), ["out"]);
}

/// A checkpoint of one tensor `w`.
fn save_values(dir: &Path, shape: &[usize], values: &[f32]) -> PathBuf {
    let spec = checkpoint::TensorSpec {
        name: "w".into(),
        shape: shape.to_vec(),
    };
    let pieces = Kind::ALL.map(|kind| Piece {
        tensor: "w",
        kind,
        start: 0,
        values,
    });
    let dir = dir.join("checkpoints");
    let rank = write_rank(&dir, GENERATION, 0, 1, state(1), &[spec], pieces).unwrap();
    commit(&dir, &[rank], &info()).unwrap().path
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
        (f32::INFINITY, f32::INFINITY),
        // Smaller than the smallest normal number.
        (f32::from_bits(0x0001_1000), f32::from_bits(0x0001_0000)),
    ];
    let given: Vec<f32> = cases.iter().map(|(given, _)| *given).collect();
    let path = save_values(directory.path(), &[2, 4], &given);
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
fn what_was_trained_of_weights_that_had_16_bits_is_kept_in_the_mean() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    source(&model, &json!({ "dtype": "float32" }));
    let len = 100_000;
    let export_as = |source: Dtype, dtype, values: &[f32]| -> Vec<f32> {
        let zeros = vec![0; source.bitsize() / 8 * len];
        let shape = vec![100, 1000];
        let view = safetensors::tensor::TensorView::new(source, shape.clone(), &zeros).unwrap();
        let file = safetensors::serialize([("w", view)], None).unwrap();
        fs::write(model.join("model.safetensors"), file).unwrap();
        let path = save_values(directory.path(), &shape, values);
        export(&path, &model, &out, dtype).unwrap();
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("w").unwrap();
        numbers(view.dtype(), view.data())
    };
    let mean = |values: &[f32]| values.iter().map(|it| f64::from(*it)).sum::<f64>() / len as f64;
    for (source, dtype, step) in [
        (Dtype::BF16, ExportDtype::Bf16, 1.0 / 128.0),
        (Dtype::F16, ExportDtype::F16, 1.0 / 1024.0),
    ] {
        let begun: Vec<f32> = (0..len).map(|it| 1.0 + step * (it % 50) as f32).collect();
        let moved: Vec<f32> = begun.iter().map(|it| it + 0.2 * step).collect();
        let dithered = export_as(source, ExportDtype::Source, &moved);
        let seen = (mean(&dithered) - mean(&begun)) / f64::from(0.2 * step);
        assert!(
            (seen - 1.0).abs() < 0.03,
            "{source:?}: {seen} of what was trained"
        );
        for (found, (from, to)) in dithered.iter().zip(begun.iter().zip(&moved)) {
            let away = from + step;
            assert!(*found == *from || *found == away, "{found} of {to}");
        }
        // Always the same, under the type's name too; what was not trained stays.
        assert_eq!(export_as(source, dtype, &moved), dithered);
        assert_eq!(export_as(source, ExportDtype::Source, &begun), begun);
        // Weights that lay anywhere are rounded to the nearest.
        assert_eq!(export_as(Dtype::F32, dtype, &moved), begun);
        // The largest numbers stay numbers, and all else what it is.
        let largest = match source {
            Dtype::BF16 => f32::from_bits(0x7f7f_7fff),
            _ => 65_519.0,
        };
        let kinds = [largest, -largest, f32::INFINITY, 0.0, -0.0, 1e-30];
        let kinds: Vec<f32> = kinds.into_iter().cycle().take(len).collect();
        let found = export_as(source, dtype, &kinds);
        for (found, given) in found.iter().zip(&kinds) {
            assert_eq!(found.is_infinite(), given.is_infinite(), "{given}");
            assert_eq!(found.is_sign_negative(), given.is_sign_negative());
            assert!((found / given - 1.0).abs() < 0.01 || given.abs() < 1e-20 || *found == *given);
        }
    }
}

#[test]
fn a_weight_that_16_bits_cannot_hold_is_refused_with_its_tensor() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    source(&model, &json!({}));
    let bf16_max = bf16::MAX.to_f32();
    for (dtype, fits, beyond) in [
        (ExportDtype::F16, 65519.996, -65520.0),
        (ExportDtype::Bf16, -bf16_max, f32::MAX),
        // Halfway to the next, which would be even.
        (
            ExportDtype::Bf16,
            bf16_max,
            f32::from_bits(bf16_max.to_bits() + 0x8000),
        ),
    ] {
        let path = save_values(directory.path(), &[2], &[1.0, beyond]);
        let text = export(&path, &model, &out, dtype).unwrap_err().to_string();
        for part in ["tensor `w`", &format!("{beyond:e}"), "--dtype f32"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(names(directory.path()), ["checkpoints", "model"]);
        let path = save_values(directory.path(), &[2], &[fits, f32::INFINITY]);
        export(&path, &model, &out, dtype).unwrap();
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn every_tensor_keeps_the_type_that_it_has_in_the_source() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    let mixed = [Dtype::BF16, Dtype::F32, Dtype::BF16, Dtype::F32];
    let config = json!({ "torch_dtype": "float32" });
    source_of(&model, &config, mixed);
    let checkpoints = directory.path().join("checkpoints");
    let path = save(&checkpoints, 20, 2).path;
    let summary = export(&path, &model, &out, ExportDtype::Source).unwrap();
    assert_eq!(summary.dtype, WeightDtype::Bf16);
    let files = ["model.safetensors"];
    assert_eq!(check_weights(&out, &files, 20), mixed);
    assert_eq!(config_of(&out), json!({ "torch_dtype": "bfloat16" }));
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let (length, header) = SafeTensors::read_metadata(&bytes).unwrap();
    for (name, tensor) in header.tensors() {
        let start = 8 + length + tensor.data_offsets.0;
        assert_eq!(
            start % (tensor.dtype.bitsize() / 8),
            0,
            "{name} is not aligned"
        );
    }

    // A chat template that the run used in place of the model's is in its exports, whichever model they are made from.
    let template = || fs::read_to_string(out.join("chat_template.jinja")).unwrap();
    fs::write(model.join("chat_template.jinja"), "the model's").unwrap();
    export(&path, &model, &out, ExportDtype::Source).unwrap();
    assert_eq!(template(), "the model's");
    let given = directory.path().join("given.jinja");
    fs::write(&given, "the run's").unwrap();
    keep_source(&model, Some(&given), &checkpoints).unwrap();
    export(&path, &model, &out, ExportDtype::Source).unwrap();
    assert_eq!(template(), "the run's");
    // A run without one that takes the folder over does not inherit it.
    fs::remove_file(model.join("chat_template.jinja")).unwrap();
    keep_source(&model, None, &checkpoints).unwrap();
    export(&path, &model, &out, ExportDtype::Source).unwrap();
    assert!(!out.join("chat_template.jinja").exists());

    // The same from what is kept of it, and another type on demand.
    keep_source(&model, None, &checkpoints).unwrap();
    fs::remove_dir_all(&model).unwrap();
    let kept = checkpoints.join(SOURCE);
    export(&path, &kept, &out, ExportDtype::Source).unwrap();
    assert_eq!(check_weights(&out, &files, 20), mixed);
    assert!(!out.join("tensors.json").exists());
    export(&path, &kept, &out, ExportDtype::F32).unwrap();
    assert_eq!(check_weights(&out, &files, 20), [Dtype::F32; 4]);

    // Kept by an earlier version, which did not know.
    fs::remove_file(kept.join("tensors.json")).unwrap();
    export(&path, &kept, &out, ExportDtype::Source).unwrap();
    assert_eq!(check_weights(&out, &files, 20), [Dtype::F32; 4]);

    source_of(
        &model,
        &config,
        [Dtype::F32, Dtype::F64, Dtype::F32, Dtype::F32],
    );
    let text = export(&path, &model, &out, ExportDtype::Source)
        .unwrap_err()
        .to_string();
    assert!(text.contains("`model.norm.weight` is F64"), "{text}");
    assert!(text.contains("--dtype f32"), "{text}");
}

#[test]
fn what_exceeds_a_shard_is_split_and_an_earlier_export_is_replaced_whole() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    source(&model, &json!({}));
    let old = save(&directory.path().join("checkpoints"), 20, 1).path;
    let new = save(&directory.path().join("checkpoints"), 30, 2).path;
    // 80, 16, 80 and 4 bytes.
    let sharded = |path: &Path| checkpoint::export(path, &model, &out, ExportDtype::F32, 96);
    let summary = sharded(&old).unwrap();
    let files = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    assert_eq!(summary.weights, files);
    let size = |name: &&str| fs::metadata(out.join(name)).unwrap().len();
    assert_eq!(summary.bytes, files.iter().map(size).sum::<u64>());
    assert_eq!(check_weights(&out, &files, 20), [Dtype::F32; 4]);
    let index = fs::read(out.join("model.safetensors.index.json")).unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&index).unwrap(),
        json!({
            "metadata": { "total_parameters": 45, "total_size": 180 },
            "weight_map": {
                "model.embed_tokens.weight": files[0],
                "model.norm.weight": files[0],
                "lm_head.weight": files[1],
                "scale": files[1],
            },
        })
    );
    assert_eq!(exported(&out).unwrap().step, 20);

    export(&new, &model, &out, ExportDtype::F32).unwrap();
    assert!(
        !names(&out)
            .iter()
            .any(|name| name.contains("-of-") || name.contains("index"))
    );
    assert_eq!(
        check_weights(&out, &["model.safetensors"], 30),
        [Dtype::F32; 4]
    );
    sharded(&new).unwrap();
    assert!(!out.join("model.safetensors").exists());
    assert_eq!(check_weights(&out, &files, 30), [Dtype::F32; 4]);

    // A shard of another run, or none at all, makes it somebody else's.
    let shard = out.join(files[1]);
    let before = fs::read(&shard).unwrap();
    let run = "r".repeat(64);
    let at = before
        .windows(64)
        .position(|it| it == run.as_bytes())
        .unwrap();
    let mut other = before.clone();
    other[at] = b'q';
    fs::write(&shard, &other).unwrap();
    for _ in 0..2 {
        let error = sharded(&new).unwrap_err();
        assert!(matches!(error, ExportError::Occupied { .. }), "{error}");
        assert_eq!(exported(&out), None);
        drop(fs::remove_file(&shard));
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
        assert_eq!(config_of(&out), expected);
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
        Some((Dtype::F32, tensors()[index].shape.clone()))
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
    let weights = model.join("model.safetensors");
    weights_file(&weights, |index| {
        (index != 2).then(|| (Dtype::F32, tensors()[index].shape.clone()))
    });
    let text = export(&path, &model, &out, ExportDtype::F32)
        .unwrap_err()
        .to_string();
    assert!(text.contains("`lm_head.weight` is not there"), "{text}");
    weights_file(&weights, |index| {
        let shape = match index {
            0 => vec![6, 4],
            _ => tensors()[index].shape.clone(),
        };
        Some((Dtype::F32, shape))
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
    // The first value behind the header.
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    bytes[8 + header as usize] ^= 1;
    fs::write(path.join(&name), bytes).unwrap();
    let text = export(&path, &model, &out, ExportDtype::F32)
        .unwrap_err()
        .to_string();
    let tensor = "model/model.embed_tokens.weight@0";
    assert!(text.contains(&name) && text.contains(tensor), "{text}");
    assert_eq!(names(directory.path()), ["model", "step-00000020"]);
}

/// A checkpoint of an adapter of rank 2 on `proj`, `[3, 4]`, beside which its configuration is kept; and its A and B.
fn adapter(dir: &Path) -> (PathBuf, Vec<f32>, Vec<f32>) {
    let module = "base_model.model.model.layers.0.self_attn.proj";
    let [a, b] = ["lora_A", "lora_B"].map(|side| format!("{module}.{side}.weight"));
    let tensors = [(&a, vec![2, 4]), (&b, vec![3, 2])].map(|(name, shape)| TensorSpec {
        name: name.clone(),
        shape,
    });
    let (a_values, b_values): (Vec<f32>, Vec<f32>) = (
        (0..8).map(|it| it as f32 / 7.0 - 0.4).collect(),
        (0..6).map(|it| 0.3 - it as f32 / 5.0).collect(),
    );
    let mut pieces = Vec::new();
    for kind in Kind::ALL {
        pieces.push(Piece {
            tensor: &a,
            kind,
            start: 0,
            values: &a_values,
        });
        pieces.push(Piece {
            tensor: &b,
            kind,
            start: 0,
            values: &b_values,
        });
    }
    let file = write_rank(dir, GENERATION, 0, 1, state(5), &tensors, pieces).unwrap();
    let path = commit(dir, &[file], &info()).unwrap().path;
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 5.0, "target_modules": ["proj"]}"#;
    keep_adapter(config, dir).unwrap();
    (path, a_values, b_values)
}

/// A model of `proj` and an embedding, of one type each.
fn base(dir: &Path, dtype: Dtype) -> [Vec<f32>; 2] {
    source(dir, &json!({ "dtype": "float32" }));
    let values = [12, 10].map(|len| (0..len).map(|it| (it as f32).sin()).collect::<Vec<f32>>());
    let encode = |values: &Vec<f32>| -> Vec<u8> {
        match dtype {
            Dtype::BF16 => {
                let values = values.iter().map(|it| bf16::from_f32(*it).to_le_bytes());
                values.flatten().collect()
            }
            _ => values.iter().flat_map(|it| it.to_le_bytes()).collect(),
        }
    };
    let bytes = values.each_ref().map(encode);
    let view = |bytes, shape: [usize; 2]| {
        safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).unwrap()
    };
    let tensors = [
        (
            "model.layers.0.self_attn.proj.weight",
            view(&bytes[0], [3, 4]),
        ),
        ("model.embed_tokens.weight", view(&bytes[1], [5, 2])),
    ];
    let file = safetensors::serialize(tensors, None).unwrap();
    fs::write(dir.join("model.safetensors"), file).unwrap();
    values
}

#[test]
fn an_adapter_is_merged_into_the_models_weights() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, a, b) = adapter(&dir.path().join("checkpoints"));
    assert!(is_adapter(&checkpoint).unwrap());
    let model = dir.path().join("model");
    let [proj, embedding] = base(&model, Dtype::F32);
    let out = dir.path().join("out");
    let summary = export(&checkpoint, &model, &out, ExportDtype::Source).unwrap();
    assert_eq!((summary.tensors, summary.parameters), (2, 22));
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap().data();
        let elements = data.as_chunks().0.iter();
        elements.map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    assert_eq!(read("model.embed_tokens.weight"), embedding);
    let merged = read("model.layers.0.self_attn.proj.weight");
    for row in 0..3 {
        for column in 0..4 {
            let product = b[2 * row] * a[column] + b[2 * row + 1] * a[4 + column];
            // s = 5/2.
            let expected = proj[4 * row + column] + 2.5 * product;
            let found = merged[4 * row + column];
            assert!(
                (found - expected).abs() < 1e-6,
                "{row} {column}: {found} {expected}"
            );
        }
    }
    assert_eq!(exported(&out).unwrap().step, 5);
    // The model's own types stay.
    let bf16_model = dir.path().join("bf16");
    base(&bf16_model, Dtype::BF16);
    let summary = export(&checkpoint, &bf16_model, &out, ExportDtype::Source).unwrap();
    assert_eq!(summary.dtype, WeightDtype::Bf16);
    let read = |dir: &Path, tensor: &str| {
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.tensor(tensor).unwrap().data().to_vec()
    };
    let kept = "model.embed_tokens.weight";
    assert_eq!(
        read(&out, kept),
        read(&bf16_model, kept),
        "no adapter there"
    );
}

#[test]
fn an_adapter_by_itself_is_that_of_peft() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, a, _) = adapter(&dir.path().join("checkpoints"));
    let out = dir.path().join("adapter");
    for _ in 0..2 {
        let summary = export_adapter(&checkpoint, &out).unwrap();
        assert_eq!((summary.step, summary.parameters), (5, 14));
    }
    assert_eq!(
        names(&out),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
    let bytes = fs::read(out.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("base_model.model.model.layers.0.self_attn.proj.lora_A.weight");
    let expected: Vec<u8> = a.iter().flat_map(|it| it.to_le_bytes()).collect();
    assert_eq!(view.unwrap().data(), expected);
    assert_eq!(exported(&out).unwrap().step, 5);
    let config: Value =
        serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["r"], 2);
}

#[test]
fn an_adapter_without_its_model_or_for_another_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, _, _) = adapter(&dir.path().join("checkpoints"));
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    source(&model, &json!({}));
    let refused = |model: &Path| {
        let error = export(&checkpoint, model, &out, ExportDtype::Source).unwrap_err();
        assert!(!out.exists());
        error.to_string()
    };
    assert!(refused(&model).contains("has no weights"));
    let other = dir.path().join("other");
    source_of(&other, &json!({}), [Dtype::F32; 4]);
    assert!(refused(&other).contains("proj.weight` is not there"));
    // A checkpoint of a whole model is no adapter.
    let whole = save(&dir.path().join("whole"), 3, 1).path;
    assert!(!is_adapter(&whole).unwrap());
    let error = export_adapter(&whole, &out).unwrap_err().to_string();
    assert!(error.contains("no adapter"), "{error}");
}
