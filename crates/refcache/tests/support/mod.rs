//! What the tests share: a scope, entries with known values, and stores of them.
#![allow(dead_code, clippy::unwrap_used)]

pub mod machines;

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use refcache::{EntryKey, Scope, ScopeReport, Store, inspect};
use tempfile::TempDir;

pub fn scope() -> Scope {
    Scope {
        weights: [7; 32],
        truncation: "keep_start 512".into(),
        dtype: "f32".into(),
        backend: "flex".into(),
        device_class: "x86-64-v3".into(),
        kernels: "1".into(),
    }
}

/// The same but for the version of the kernels.
pub fn other_scope() -> Scope {
    Scope {
        kernels: "2".into(),
        ..scope()
    }
}

pub fn key(index: u32) -> EntryKey {
    EntryKey::new(&[index], &[index + 1, index + 2])
}

pub fn value(index: u32) -> f32 {
    -0.1 - index as f32
}

pub fn entries(indices: Range<u32>) -> Vec<(EntryKey, f32)> {
    indices.map(|index| (key(index), value(index))).collect()
}

/// Opens the scope, in which no append is unfinished.
pub fn open(dir: &Path) -> Store {
    let (store, torn) = Store::open(dir, &scope()).unwrap();
    assert_eq!(torn, []);
    store
}

/// Stores entries in an appended segment.
pub fn append(dir: &Path, indices: Range<u32>) {
    let mut writer = open(dir).writer().unwrap();
    writer.append(&entries(indices)).unwrap();
}

/// Stores entries in a sorted segment.
pub fn append_sorted(dir: &Path, indices: Range<u32>) {
    let mut writer = open(dir).writer().unwrap();
    writer.append(&entries(indices)).unwrap();
    writer.finish().unwrap();
}

/// The store has these entries with their values, and no others.
pub fn expect_entries(dir: &Path, indices: Range<u32>) {
    let store = open(dir);
    assert_eq!(store.count().unwrap(), indices.len());
    for (key, value) in entries(indices) {
        let found = store.get(&key).unwrap();
        assert_eq!(found.map(f32::to_bits), Some(value.to_bits()));
    }
}

/// A store of one scope with a segment for each range, and the scope's folder.
pub fn filled(ranges: &[Range<u32>]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    for range in ranges {
        append(dir.path(), range.clone());
    }
    let folder = report(dir.path()).folder;
    (dir, folder)
}

/// What is to be told of the only scope.
pub fn report(dir: &Path) -> ScopeReport {
    let mut reports = inspect(dir, &mut |_| ()).unwrap();
    assert_eq!(reports.len(), 1);
    reports.remove(0)
}

/// Files of a folder with their bytes.
pub fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    paths
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

/// Segments of a folder with their bytes.
pub fn segments(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    files(folder)
        .into_iter()
        .filter(|(path, _)| path.extension().is_some_and(|ending| ending == "segment"))
        .collect()
}
