//! `coordinator cache` through the program: words, JSON and exit codes.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use refcache::{EntryKey, Scope, Store};
use serde_json::Value;
use tempfile::TempDir;

fn open(store: &Path) -> Store {
    let scope = Scope {
        weights: [7; 32],
        truncation: "keep_start 512".into(),
        dtype: "f32".into(),
        backend: "flex".into(),
        device_class: "x86-64-v3".into(),
        kernels: "1".into(),
    };
    Store::open(store, &scope).unwrap().0
}

/// A store of one scope: two segments, three entries, one of them twice.
fn filled() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for indices in [0..2, 1..3] {
        let entries: Vec<_> = indices
            .map(|index| (EntryKey::new(&[index], &[]), -1.5))
            .collect();
        let mut writer = open(dir.path()).writer().unwrap();
        writer.append(&entries).unwrap();
    }
    dir
}

fn segments(store: &Path) -> Vec<PathBuf> {
    let scope = fs::read_dir(store).unwrap().next().unwrap().unwrap().path();
    let paths = fs::read_dir(scope)
        .unwrap()
        .map(|file| file.unwrap().path());
    let mut paths: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|ending| ending == "segment"))
        .collect();
    paths.sort();
    paths
}

/// Runs the program; gives back exit code, standard output and standard error.
fn run(command: &str, store: &Path, options: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_coordinator"))
        .args(["cache", command])
        .arg(store)
        .args(options)
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn json(command: &str, store: &Path, options: &[&str]) -> (i32, Value) {
    let options = [&["--json"], options].concat();
    let (code, out, _) = run(command, store, &options);
    (code, serde_json::from_str(&out).unwrap())
}

fn check(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn inspect_lists_scopes_in_words_and_as_json() {
    let store = filled();
    let (code, out, _) = run("inspect", store.path(), &[]);
    assert_eq!(code, 0);
    check(
        &out,
        &[
            "weights       0707",
            "truncation    keep_start 512",
            "device class  x86-64-v3",
            "entries       3 in 2 segments, 424 bytes",
            "last used     20",
            "1 scope, 3 entries, 424 bytes",
        ],
    );
    let (code, all) = json("inspect", store.path(), &[]);
    let scope = &all["scopes"][0];
    assert_eq!(code, 0);
    assert_eq!(scope["scope"]["kernels"], "1");
    assert_eq!(
        (&scope["entries"], &scope["segments"]),
        (&3.into(), &2.into())
    );
}

#[test]
fn verify_names_file_and_offset_of_damage() {
    let store = filled();
    let (code, out, err) = run("verify", store.path(), &[]);
    assert_eq!((code, err.as_str()), (0, ""));
    check(&out, &["every byte verified"]);
    let damaged = &segments(store.path())[1];
    let mut bytes = fs::read(damaged).unwrap();
    bytes[150] ^= 1;
    fs::write(damaged, bytes).unwrap();
    let place = format!("error: {} is damaged at byte 100", damaged.display());
    let (code, out, err) = run("verify", store.path(), &[]);
    assert_eq!(code, 1);
    check(&err, &[&place]);
    assert!(!out.contains("verified"), "{out}");
    let (code, all) = json("verify", store.path(), &[]);
    assert_eq!((code, &all["ok"]), (1, &false.into()));
    let damage = &all["scopes"][0]["damages"][0];
    assert_eq!(damage["path"].as_str(), damaged.to_str());
    assert_eq!(damage["offset"], 100);
    let (code, out, err) = run("gc", store.path(), &[]);
    assert_eq!(code, 1);
    check(&err, &[&place]);
    check(&out, &["left alone", "freed 0 bytes"]);
    assert_eq!(segments(store.path()).len(), 2);
}

#[test]
fn gc_merges_then_removes_and_tells_both() {
    let store = filled();
    let (code, out, _) = run("gc", store.path(), &["--dry-run"]);
    assert_eq!((code, segments(store.path()).len()), (0, 2));
    check(&out, &["would merge", "would free 160 bytes"]);
    let (code, out, _) = run("gc", store.path(), &["--older-than", "1"]);
    assert_eq!((code, segments(store.path()).len()), (0, 1));
    check(
        &out,
        &["2 segments into one of 3 entries, 424 bytes to 264"],
    );
    let (code, all) = json("gc", store.path(), &["--older-than", "0"]);
    assert_eq!(code, 0);
    assert_eq!(all["scopes"][0]["action"], "removed");
    assert_eq!(all["bytes_freed"], 264);
    let (code, out, _) = run("inspect", store.path(), &[]);
    assert_eq!(code, 0);
    check(&out, &["0 scopes, 0 entries"]);
}

#[test]
fn gc_leaves_a_scope_in_use_alone_and_says_to_try_again() {
    let store = filled();
    let writer = open(store.path()).writer().unwrap();
    let (code, _, err) = run("gc", store.path(), &["--older-than", "0"]);
    assert_eq!(code, 75);
    check(&err, &["is in use", "wait until they end"]);
    assert_eq!(segments(store.path()).len(), 3);
    drop(writer);
    assert_eq!(run("gc", store.path(), &[]).0, 0);
    assert_eq!(segments(store.path()).len(), 1);
}

#[test]
fn a_store_that_is_not_there_is_bad_usage() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("absent");
    for command in ["inspect", "verify", "gc"] {
        let (code, _, err) = run(command, &absent, &[]);
        assert_eq!(code, 2);
        check(&err, &["there is no store at", "absent"]);
    }
    assert!(!absent.exists());
}

#[test]
fn gc_merges_what_machines_share_and_tells_before_and_after() {
    let (store, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = storage::Folder::open(shared.path()).unwrap();
    for indices in [0..3, 1..4, 2..5] {
        let entries: Vec<_> = indices
            .map(|index| (EntryKey::new(&[index], &[]), -1.5))
            .collect();
        let mut store = open(store.path());
        let mut writer = store.writer().unwrap();
        writer.append(&entries).unwrap();
        writer.finish().unwrap();
        store.push(&folder).unwrap();
    }
    let objects = || segments(shared.path()).len();
    assert_eq!(objects(), 3);
    let (code, out, _) = run("gc", shared.path(), &["--shared", "--dry-run"]);
    assert_eq!((code, objects()), (0, 3));
    check(
        &out,
        &[
            "would merge",
            "3 segments of 792 bytes into one",
            "nothing was changed",
        ],
    );
    let (code, out, _) = run("gc", shared.path(), &["--shared"]);
    assert_eq!((code, objects()), (0, 1));
    check(
        &out,
        &[
            "merged",
            "3 segments into one, 792 bytes to 336",
            "freed 456 bytes",
        ],
    );
    let (code, all) = json("gc", shared.path(), &["--shared"]);
    let scope = &all["scopes"][0];
    assert_eq!(
        (code, &scope["action"], &scope["segments"]),
        (0, &"kept".into(), &1.into())
    );
    let damaged = &segments(shared.path())[0];
    fs::copy(
        damaged,
        damaged.with_file_name(format!("{}.segment", "0".repeat(64))),
    )
    .unwrap();
    let (code, out, err) = run("gc", shared.path(), &["--shared"]);
    assert_eq!((code, objects()), (1, 2));
    check(
        &err,
        &[&"0".repeat(64), "not the segment that it is named after"],
    );
    check(&out, &["left alone"]);
}

#[test]
fn what_is_not_of_shared_folders_is_refused_with_the_reason() {
    let store = filled();
    let (code, _, err) = run("gc", store.path(), &["--shared", "--older-than", "3"]);
    assert_eq!(code, 2);
    check(&err, &["--older-than is not of what machines share"]);
    for command in ["inspect", "verify"] {
        let (code, _, err) = run(command, Path::new("s3://bucket/reference"), &[]);
        assert_eq!(code, 2);
        check(&err, &["s3://bucket/reference is what machines share"]);
    }
}
