//! What two sets of weights differ by, whoever wrote them.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{fs, path::Path};

use checkpoint::{Checkpoint, Diff, ExportDtype, Kind, Side, TensorSpec, diff, export, reshard};
use serde_json::json;
use support::{elements, save, tensors, values};

fn compare(a: &Path, b: &Path, kinds: &[Kind]) -> Diff {
    let (a, b) = (Side::open(a).unwrap(), Side::open(b).unwrap());
    diff(&a, &b, kinds, &|_| ()).unwrap()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

#[test]
fn norms_are_right_across_world_sizes() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = save(one.path(), 20, 3).path;
    let b = save(other.path(), 30, 2).path;
    let found = compare(&a, &b, &Kind::ALL);
    assert!(!found.identical);
    assert_eq!(found.tensors.len(), 3 * tensors().len());
    for (place, compared) in found.tensors.iter().enumerate() {
        let index = place % tensors().len();
        let spec: &TensorSpec = &tensors()[index];
        assert_eq!(
            (&compared.tensor, compared.kind),
            (&spec.name, Kind::ALL[place / tensors().len()])
        );
        let of = |step| {
            values(step, index, compared.kind, elements(spec))
                .into_iter()
                .map(f64::from)
        };
        let (a, b) = (norm(of(20)), norm(of(30)));
        let between = norm(of(20).zip(of(30)).map(|(a, b)| a - b));
        let found = compared.difference;
        let close = |found: f64, expected: f64| (found / expected - 1.0).abs() < 1e-12;
        assert!(
            close(found.norm_a, a) && close(found.norm_b, b),
            "{found:?}"
        );
        assert!(close(found.norm_difference, between), "{found:?}");
        assert!(close(found.relative, between / a), "{found:?}");
        // Ten steps, each 100,000 from the next, to a quarter: that of f32.
        assert!((found.max_abs - 1e6).abs() < 0.5, "{found:?}");
        assert_eq!(found.different, elements(spec) as u64);
    }
    let total = &found.totals[2];
    assert_eq!(
        (total.kind, total.difference.elements),
        (Kind::SecondMoment, 45)
    );
    assert!((total.difference.norm_difference / 1e6 - 45f64.sqrt()).abs() < 1e-6);
}

#[test]
fn a_checkpoint_cut_anew_is_the_same() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = save(one.path(), 20, 3).path;
    let b = reshard(&Checkpoint::open(&a).unwrap(), other.path(), 5, &|_| ())
        .unwrap()
        .path;
    let found = compare(&a, &b, &Kind::ALL);
    assert!(found.identical);
    assert!(found.tensors.iter().all(|it| it.difference.relative == 0.0));
}

#[test]
fn a_checkpoint_is_compared_with_a_model_directory() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    let path = save(&directory.path().join("checkpoints"), 20, 2).path;
    for (dtype, shard) in [
        (ExportDtype::F32, u64::MAX),
        (ExportDtype::F32, 100),
        (ExportDtype::Bf16, 100),
    ] {
        export(&path, &model, &out, dtype, shard).unwrap();
        for [a, b] in [[&path, &out], [&out, &path]] {
            let found = compare(a, b, &[Kind::Weight]);
            assert_eq!(found.identical, dtype == ExportDtype::F32, "{dtype:?}");
            for compared in found.tensors {
                // Half of the last of bf16's eight bits.
                assert!(compared.difference.relative < 1.0 / 256.0, "{compared:?}");
            }
        }
    }
    // A model has no moments.
    let found = compare(&path, &out, &Kind::ALL);
    assert_eq!(
        found.only_a,
        [
            "first moment of all tensors",
            "second moment of all tensors"
        ]
    );
    assert!(!found.identical);
}

#[test]
fn tensors_of_one_side_and_of_two_shapes_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), 20, 2).path;
    let model = tempfile::tempdir().unwrap();
    let header = json!({
        "lm_head.weight": { "dtype": "F32", "shape": [4, 5], "data_offsets": [0, 80] },
        "scale": { "dtype": "F32", "shape": [], "data_offsets": [80, 84] },
        "other": { "dtype": "F32", "shape": [1], "data_offsets": [84, 88] },
    });
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    let bytes = [&length[..], header.as_bytes(), &[0; 88]].concat();
    fs::write(model.path().join("model.safetensors"), bytes).unwrap();
    let found = compare(&path, model.path(), &[Kind::Weight]);
    assert_eq!(
        found.only_a,
        ["model.embed_tokens.weight", "model.norm.weight"]
    );
    assert_eq!(found.only_b, ["other"]);
    assert_eq!(found.shapes.len(), 1);
    assert_eq!(
        (&found.shapes[0].a[..], &found.shapes[0].b[..]),
        (&[5, 4][..], &[4, 5][..])
    );
    assert_eq!(found.tensors.len(), 1);
    assert_eq!(found.tensors[0].difference.norm_b, 0.0);
}

#[test]
fn damage_is_an_error_and_no_difference() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (a, b) = (save(one.path(), 20, 2).path, save(other.path(), 20, 2).path);
    let file = b.join("rank-00001-of-00002.generation-4.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let (a, b) = (Side::open(&a).unwrap(), Side::open(&b).unwrap());
    let error = diff(&a, &b, &Kind::ALL, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("second/scale@0"), "{error}");
}
