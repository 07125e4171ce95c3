//! Bytes that nobody wrote, in every place that is parsed: an error or, at most, values; never a panic (C2).
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use checkpoint::{
    Checkpoint, CheckpointError, Kind, MANIFEST, Side, TensorSpec, diff, exported, newest,
};
use proptest::{collection::vec, prelude::*, test_runner::Config};
use serde_json::{Value, json};
use support::{elements, save, tensors, values};

const NO_VALUES: usize = 1 << 20;

/// A manifest's bytes with `content` in it and the checksum that goes with it.
fn sealed(content: &[u8]) -> Vec<u8> {
    let digest = blake3::hash(content).to_hex();
    let opening = format!("{{\"blake3\":\"{digest}\",\"manifest\":\n");
    [opening.as_bytes(), content, b"\n}\n"].concat()
}

/// The content of a manifest.
fn content(manifest: &[u8]) -> Vec<u8> {
    manifest[89..manifest.len() - 3].to_vec()
}

/// Opens, verifies and reads whatever is there.
fn look(folder: &Path) -> Result<(), CheckpointError> {
    let checkpoint = Checkpoint::open(folder)?;
    for spec in &checkpoint.manifest().tensors {
        for kind in Kind::ALL.into_iter().filter(|&kind| checkpoint.has(kind)) {
            let len = spec.elements().filter(|&len| len < NO_VALUES);
            let mut out = vec![0.0; len.unwrap_or(0)];
            checkpoint.read(&spec.name, kind, 0, &mut out)?;
        }
    }
    checkpoint.verify()?;
    Ok(())
}

/// Whether a checkpoint's values are those that were saved.
fn holds(folder: &Path) -> Result<(), CheckpointError> {
    let checkpoint = Checkpoint::open(folder)?;
    checkpoint.verify()?;
    for kind in Kind::ALL {
        for (index, spec) in tensors().iter().enumerate() {
            let mut out = vec![0.0; elements(spec)];
            checkpoint.read(&spec.name, kind, 0, &mut out)?;
            assert_eq!(out, values(20, index, kind, out.len()), "a wrong load");
        }
    }
    Ok(())
}

/// A checkpoint, its files and their bytes.
fn saved(world: u32) -> (tempfile::TempDir, PathBuf, Vec<(PathBuf, Vec<u8>)>) {
    let directory = tempfile::tempdir().unwrap();
    let folder = save(directory.path(), 20, world).path;
    let mut files: Vec<(PathBuf, Vec<u8>)> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    (directory, folder, files)
}

#[test]
fn c2_every_file_cut_at_every_length_is_found_and_named() {
    let (_directory, folder, files) = saved(2);
    assert_eq!(files.len(), 3);
    for (path, bytes) in &files {
        let name = path.file_name().unwrap().to_str().unwrap();
        let file = File::options().write(true).open(path).unwrap();
        for len in (0..bytes.len()).rev() {
            file.set_len(len as u64).unwrap();
            let error = holds(&folder).expect_err("found").to_string();
            assert!(error.contains(name), "{name} of {len} bytes: {error}");
        }
        file.write_all_at(bytes, 0).unwrap();
        // And longer than it was.
        for more in 1..9 {
            file.write_all_at(&vec![b' '; more], bytes.len() as u64)
                .unwrap();
            let error = holds(&folder).expect_err("found").to_string();
            assert!(
                error.contains(name),
                "{name} with {more} bytes more: {error}"
            );
        }
        file.set_len(bytes.len() as u64).unwrap();
        holds(&folder).unwrap();
    }
}

#[test]
fn c2_every_bit_of_a_manifest_counts() {
    let (_directory, folder, files) = saved(2);
    let (path, bytes) = files
        .iter()
        .find(|(path, _)| path.ends_with(MANIFEST))
        .unwrap();
    let file = File::options().write(true).open(path).unwrap();
    for byte in 0..bytes.len() {
        for bit in 0..8 {
            file.write_all_at(&[bytes[byte] ^ (1 << bit)], byte as u64)
                .unwrap();
            let error = Checkpoint::open(&folder).expect_err("found");
            assert!(
                matches!(error, CheckpointError::Manifest { .. }),
                "{byte}.{bit}: {error}"
            );
        }
        file.write_all_at(&bytes[byte..=byte], byte as u64).unwrap();
    }
    holds(&folder).unwrap();
}

/// Values that a field of a manifest should not have.
fn strange() -> Vec<Value> {
    vec![
        Value::Null,
        json!(0),
        json!(1),
        json!(3),
        json!(-1),
        json!(u64::MAX),
        json!(u64::MAX - 3),
        json!(u64::MAX / 4),
        json!(i64::MAX),
        json!(u32::MAX),
        json!(0.5),
        json!(1e300),
        json!(""),
        json!("../../rank-00000-of-00002.generation-4.safetensors"),
        json!("second_moment"),
        json!([]),
        json!([u64::MAX, u64::MAX]),
        json!([0]),
        json!({}),
        json!({ "mean": 0.0, "count": 1 }),
    ]
}

/// The pointers of all values in `value`.
fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                pointers(item, &format!("{at}/{index}"), all);
            }
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                pointers(field, &format!("{at}/{name}"), all);
            }
        }
        _ => {}
    }
}

/// Removes what a pointer points to.
fn remove(value: &mut Value, pointer: &str) {
    let (parent, last) = pointer.rsplit_once('/').unwrap();
    match value.pointer_mut(parent).unwrap() {
        Value::Array(items) => drop(items.remove(last.parse().unwrap())),
        Value::Object(fields) => drop(fields.shift_remove(last)),
        _ => panic!("{parent} holds nothing"),
    }
}

/// A checksum that holds is no proof of sense: another program, or another version, may have written it.
#[test]
fn c2_every_field_of_a_sealed_manifest_may_be_anything() {
    let (_directory, folder, files) = saved(2);
    let whole: Value = serde_json::from_slice(&content(&files[0].1)).unwrap();
    let mut all = Vec::new();
    pointers(&whole, "", &mut all);
    assert!(all.len() >= 200, "{}", all.len());
    let mut opened = 0;
    for pointer in &all {
        let mut changed = Vec::new();
        for value in strange() {
            let mut manifest = whole.clone();
            *manifest.pointer_mut(pointer).unwrap() = value;
            changed.push(manifest);
        }
        if !pointer.is_empty() {
            let mut manifest = whole.clone();
            remove(&mut manifest, pointer);
            changed.push(manifest);
        }
        for manifest in changed {
            let same = manifest == whole;
            fs::write(&files[0].0, sealed(manifest.to_string().as_bytes())).unwrap();
            let looked = look(&folder);
            opened += usize::from(looked.is_ok());
            assert!(looked.is_ok() || !same, "{pointer}: {looked:?}");
        }
    }
    // Step, epoch, digests and the like may be anything; a manifest that is refused for all of it would prove nothing.
    assert!(opened > 50, "{opened}");
    fs::write(&files[0].0, &files[0].1).unwrap();
    holds(&folder).unwrap();
}

fn config(cases: u32) -> Config {
    Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    }
}

/// Changes to bytes: at a place, in this or that way.
fn edited(bytes: &[u8], edits: &[(prop::sample::Index, u8, u8)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (place, what, byte) in edits {
        if bytes.is_empty() {
            break;
        }
        let place = place.index(bytes.len());
        match what % 4 {
            0 => bytes[place] = *byte,
            1 => bytes.insert(place, *byte),
            2 => drop(bytes.remove(place)),
            _ => bytes.truncate(place),
        }
    }
    bytes
}

/// A model directory with such a file of weights.
fn model(weights: &[u8]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("model.safetensors"), weights).unwrap();
    directory
}

fn compare(directory: &Path) {
    if let Ok(side) = Side::open(directory) {
        drop(diff(&side, &side, &Kind::ALL, &|_| ()));
    }
    drop(exported(directory));
}

proptest! {
    #![proptest_config(config(600))]

    #[test]
    fn c2_a_manifest_of_any_bytes_is_refused(bytes in vec(any::<u8>(), 0..300)) {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("step-00000020");
        fs::create_dir(&folder).unwrap();
        for bytes in [sealed(&bytes), bytes] {
            fs::write(folder.join(MANIFEST), bytes).unwrap();
            let refused = matches!(look(&folder), Err(CheckpointError::Manifest { .. }));
            prop_assert!(refused);
            prop_assert_eq!(newest(directory.path()).unwrap().found, None);
        }
    }

    #[test]
    fn a_model_file_of_any_bytes_is_no_panic(bytes in vec(any::<u8>(), 0..300), length in 0..400u64) {
        compare(model(&bytes).path());
        compare(model(&[&length.to_le_bytes(), &bytes[..]].concat()).path());
    }
}

proptest! {
    #![proptest_config(config(4))]

    #[test]
    fn c2_an_edited_manifest_is_refused_and_an_edited_sealed_one_no_panic(
        edits in vec(vec((any::<prop::sample::Index>(), any::<u8>(), any::<u8>()), 1..4), 300)
    ) {
        let (_directory, folder, files) = saved(2);
        let (path, whole) = &files[0];
        let inside = content(whole);
        for edits in edits {
            let bytes = edited(whole, &edits);
            fs::write(path, &bytes).unwrap();
            prop_assert!(bytes == *whole || holds(&folder).is_err());
            fs::write(path, sealed(&edited(&inside, &edits))).unwrap();
            drop(look(&folder));
        }
    }

    #[test]
    fn c2_edited_rank_files_are_refused(
        edits in vec((vec((any::<prop::sample::Index>(), any::<u8>(), any::<u8>()), 1..4), any::<bool>()), 300)
    ) {
        let (_directory, folder, files) = saved(2);
        for (edits, second) in edits {
            let (path, whole) = &files[1 + usize::from(second)];
            let bytes = edited(whole, &edits);
            fs::write(path, &bytes).unwrap();
            prop_assert!(bytes == *whole || holds(&folder).is_err());
            fs::write(path, whole).unwrap();
        }
        holds(&folder).unwrap();
    }

    #[test]
    fn an_edited_model_file_is_no_panic(
        edits in vec(vec((any::<prop::sample::Index>(), any::<u8>(), any::<u8>()), 1..4), 300)
    ) {
        let spec = TensorSpec { name: "w".into(), shape: vec![2, 3] };
        let len = elements(&spec) * 4;
        let header = json!({ "w": { "dtype": "F32", "shape": spec.shape, "data_offsets": [0, len] } }).to_string();
        let length = (header.len() as u64).to_le_bytes();
        let whole = [&length[..], header.as_bytes(), &vec![1; len]].concat();
        for edits in edits {
            compare(model(&edited(&whole, &edits)).path());
        }
    }
}
