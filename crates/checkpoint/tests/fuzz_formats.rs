//! Manifests, rank files, what ranks tell of them, and model files of any bytes: refused, or read as what they are. Never a
//! panic, never a wrong load, never much more memory than the files have bytes.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../storage/tests/fuzz/mod.rs"]
mod fuzz;
#[allow(dead_code, reason = "other tests use the rest")]
mod support;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use checkpoint::{
    Checkpoint, CheckpointError, Kind, MANIFEST, RankFile, Side, commit, diff, exported,
};
use fuzz::{Counting, edited, edits, fuzz, peak};
use proptest::{prelude::*, test_runner::TestCaseError};
use serde_json::json;
use support::{GENERATION, elements, info, tensors, values, write};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const STEP: u64 = 20;
/// What a look costs beside a multiple of what the files hold: buffers, threads.
const FIXED: usize = 256 << 10;

/// A checkpoint of two ranks, what they told of it, and the bytes of its files.
struct Saved {
    directory: tempfile::TempDir,
    folder: PathBuf,
    told: Vec<RankFile>,
    /// The manifest first.
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Saved {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let told: Vec<RankFile> = (0..2)
            .map(|rank| write(directory.path(), GENERATION, STEP, 2, rank))
            .collect();
        let folder = commit(directory.path(), &told, &info()).unwrap().path;
        let paths = fs::read_dir(&folder).unwrap().map(|it| it.unwrap().path());
        let mut files: Vec<_> = paths
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect();
        files.sort();
        assert!(files[0].0.ends_with(MANIFEST) && files.len() == 3);
        Self {
            directory,
            folder,
            told,
            files,
        }
    }

    /// Loads and verifies what is there, and compares it with what was saved.
    fn loads(&self) -> Result<(), CheckpointError> {
        let checkpoint = Checkpoint::open(&self.folder)?;
        for kind in Kind::ALL {
            for (index, spec) in tensors().iter().enumerate() {
                let mut out = vec![0.0; elements(spec)];
                checkpoint.read(&spec.name, kind, 0, &mut out)?;
                assert_eq!(out, values(STEP, index, kind, out.len()), "a wrong load");
            }
        }
        checkpoint.verify().map(drop)
    }

    /// Puts `bytes` in place of a file while `work` looks, which may take memory in proportion to them.
    fn with<R>(&self, file: usize, bytes: &[u8], work: impl Fn() -> R) -> Result<R, TestCaseError> {
        let (path, whole) = &self.files[file];
        fs::write(path, bytes).unwrap();
        let (taken, result) = peak(work);
        fs::write(path, whole).unwrap();
        let most = 64 * bytes.len() + FIXED;
        prop_assert!(taken <= most, "{taken} bytes for {}", bytes.len());
        Ok(result)
    }
}

/// A manifest's bytes with a checksum that holds.
fn sealed(manifest: &[u8]) -> Vec<u8> {
    let content = manifest.get(89..manifest.len().saturating_sub(3));
    let content = content.unwrap_or_default();
    let digest = blake3::hash(content).to_hex();
    let opening = format!("{{\"blake3\":\"{digest}\",\"manifest\":\n");
    [opening.as_bytes(), content, b"\n}\n"].concat()
}

/// Reads all that a manifest promises into memory that is there.
fn look(folder: &Path, memory: &mut [f32]) -> Result<(), CheckpointError> {
    let checkpoint = Checkpoint::open(folder)?;
    for spec in &checkpoint.manifest().tensors {
        for kind in Kind::ALL.into_iter().filter(|&kind| checkpoint.has(kind)) {
            let len = spec.elements().unwrap_or(0).min(memory.len());
            checkpoint.read(&spec.name, kind, 0, &mut memory[..len])?;
        }
    }
    checkpoint.verify().map(drop)
}

/// Compares a model with itself and asks what run exported it.
fn compare(directory: &Path) {
    if let Ok(side) = Side::open(directory) {
        drop(diff(&side, &side, &Kind::ALL, &|_| ()));
    }
    drop(exported(directory));
}

fn fuzz_manifest(saved: &Saved) {
    let whole = &saved.files[0].1;
    let cases = (edits(), any::<bool>());
    fuzz("manifest", 600, &cases, |(edits, reseal)| {
        let bytes = edited(whole, &edits);
        if !reseal {
            let loaded = saved.with(0, &bytes, || saved.loads())?;
            prop_assert_eq!(loaded.is_ok(), bytes == *whole);
            return Ok(());
        }
        // A checksum that holds is no proof of sense: only panics and memory count.
        let looked = saved.with(0, &sealed(&bytes), || look(&saved.folder, &mut [0.0; 64]))?;
        prop_assert!(looked.is_ok() || bytes != *whole);
        Ok(())
    });
}

fn fuzz_rank_files(saved: &Saved) {
    fuzz("rank file", 400, &(1..3usize, edits()), |(file, edits)| {
        let whole = &saved.files[file].1;
        let bytes = edited(whole, &edits);
        let loaded = saved.with(file, &bytes, || saved.loads())?;
        prop_assert_eq!(loaded.is_ok(), bytes == *whole);
        Ok(())
    });
}

/// What a rank tells comes over the network; the coordinator commits what it says.
fn fuzz_told(saved: &Saved) {
    let whole = serde_json::to_vec(&saved.told[1]).unwrap();
    fuzz("what a rank tells", 400, &edits(), |edits| {
        let bytes = edited(&whole, &edits);
        let (taken, committed) = peak(|| {
            let told = serde_json::from_slice::<RankFile>(&bytes).ok()?;
            let ranks = [saved.told[0].clone(), told];
            commit(saved.directory.path(), &ranks, &info()).ok()
        });
        let most = 64 * (bytes.len() + whole.len()) + FIXED;
        prop_assert!(taken <= most, "{taken} bytes for {}", bytes.len());
        // What is committed can be read, whatever was told.
        let looked = look(&saved.folder, &mut [0.0; 64]);
        prop_assert!(looked.is_ok(), "{looked:?} after {committed:?}");
        Ok(())
    });
    commit(saved.directory.path(), &saved.told, &info()).unwrap();
    saved.loads().unwrap();
}

fn fuzz_models() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let tensor = |from: usize, rows: usize| {
        let offsets = [from, from + rows * 12];
        json!({ "dtype": "F32", "shape": [rows, 3], "data_offsets": offsets })
    };
    let header =
        json!({ "__metadata__": { "format": "pt" }, "w": tensor(0, 2), "v": tensor(24, 4) });
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    let whole = [&length[..], header.as_bytes(), &[1; 72]].concat();
    let cases = (edits(), prop::option::of(0..100usize));
    fuzz("model file", 2000, &cases, |(edits, reseal)| {
        let mut bytes = edited(&whole, &edits);
        if let (Some(beyond), true) = (reseal, bytes.len() >= 8) {
            // The header's length, or one near it.
            let end = bytes.len().saturating_sub(72 + 8 + beyond % 8) as u64;
            bytes[..8].copy_from_slice(&end.to_le_bytes());
        }
        fs::write(&path, &bytes).unwrap();
        let (taken, ()) = peak(|| compare(directory.path()));
        // Blocks of values of either side, however few there are.
        let most = 64 * bytes.len() + (4 << 20);
        prop_assert!(taken <= most, "{taken} bytes for {}", bytes.len());
        Ok(())
    });
}

/// One test: the counts of memory are the process's.
#[test]
fn files_of_any_bytes_are_refused_or_read_as_what_they_are_in_bounded_memory() {
    let saved = Saved::new();
    saved.loads().unwrap();
    fuzz_manifest(&saved);
    fuzz_rank_files(&saved);
    fuzz_told(&saved);
    fuzz_models();
    // Files that claim to be large, with a hole for content.
    for (file, whole) in &saved.files {
        File::options()
            .write(true)
            .open(file)
            .unwrap()
            .set_len(1 << 40)
            .unwrap();
        let (taken, loaded) = peak(|| saved.loads());
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(taken < FIXED, "{taken} bytes for {name}");
        let error = loaded.unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        fs::write(file, whole).unwrap();
    }
}
