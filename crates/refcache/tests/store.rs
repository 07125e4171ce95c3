//! The store as its users meet it: scopes apart, writers together, every kind of damage named.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use refcache::{AppendError, Scope, Store, StoreError};
use support::{entries, key, open, scope};
use tempfile::TempDir;

/// A store with one segment of two appends: entries 0..10 and 10..12.
fn filled() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = open(dir.path()).writer().unwrap();
    writer.append(&entries(0..10)).unwrap();
    writer.append(&entries(10..12)).unwrap();
    let segments = files(dir.path(), "segment");
    assert_eq!(segments.len(), 1);
    (dir, segments[0].clone())
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let scope = fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
    fs::read_dir(scope)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect()
}

fn refusal(dir: &Path) -> StoreError {
    Store::open(dir, &scope()).expect_err("the damage is seen")
}

#[test]
fn values_come_back_to_the_bit_after_reopening() {
    let (dir, _) = filled();
    let store = open(dir.path());
    assert_eq!(store.count().unwrap(), 12);
    for (key, value) in entries(0..12) {
        assert_eq!(
            store.get(&key).unwrap().map(f32::to_bits),
            Some(value.to_bits())
        );
    }
    assert_eq!(store.get(&key(12)).unwrap(), None);
}

#[test]
fn looking_finds_what_is_there_and_makes_nothing() {
    let (dir, _) = filled();
    let store = Store::open_existing(dir.path(), &scope()).unwrap();
    assert_eq!(store.map(|store| store.count().unwrap()), Some(12));
    let other = Scope {
        weights: [8; 32],
        ..scope()
    };
    let store = Store::open_existing(dir.path(), &other).unwrap();
    assert!(store.is_none());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "folders");
}

#[test]
fn r1_a_scope_that_differs_in_any_field_finds_nothing() {
    let (dir, _) = filled();
    let changes: [fn(&mut Scope); 7] = [
        |scope| scope.weights[31] ^= 1,
        |scope| scope.truncation = "keep_start 511".into(),
        |scope| scope.dtype = "bf16".into(),
        |scope| scope.backend = "cuda".into(),
        |scope| scope.device_class = "x86-64-v4".into(),
        |scope| scope.kernels = "2".into(),
        // The same letters over two fields, cut elsewhere.
        |scope| (scope.backend, scope.device_class) = ("fle".into(), "xx86-64-v3".into()),
    ];
    for change in changes {
        let mut other = scope();
        change(&mut other);
        let (store, _) = Store::open(dir.path(), &other).unwrap();
        assert_eq!(
            store.count().unwrap(),
            0,
            "{other:?} sees entries of {:?}",
            scope()
        );
    }
    assert_eq!(open(dir.path()).count().unwrap(), 12);
}

#[test]
fn r1_a_segment_brought_from_another_scope_is_refused() {
    let (dir, segment) = filled();
    let mut other = scope();
    other.dtype = "bf16".into();
    let elsewhere = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(elsewhere.path(), &other).unwrap();
    store.writer().unwrap().append(&entries(0..1)).unwrap();
    fs::copy(&files(elsewhere.path(), "segment")[0], &segment).unwrap();
    let error = refusal(dir.path());
    assert!(
        matches!(&error, StoreError::Damaged { path, .. } if *path == segment),
        "{error}"
    );
    assert!(error.to_string().contains("another scope"), "{error}");
}

#[test]
fn a_segment_cut_anywhere_keeps_its_whole_appends_and_reports_the_rest() {
    let (dir, segment) = filled();
    let whole = fs::read(&segment).unwrap();
    // Sizes after the header, the head record and the two appends.
    let ends = [
        (16, 0),
        (16 + 40 + 44, 0),
        (100 + 40 + 360, 10),
        (whole.len(), 12),
    ];
    assert_eq!(whole.len(), 500 + 40 + 72);
    for size in 16..=whole.len() {
        fs::write(&segment, &whole[..size]).unwrap();
        let (store, torn) = Store::open(dir.path(), &scope()).unwrap();
        let &(end, count) = ends.iter().rfind(|(end, _)| *end <= size).unwrap();
        assert_eq!(store.count().unwrap(), count, "cut at {size}");
        if size == end {
            assert_eq!(torn, [], "cut at {size}");
        } else {
            assert_eq!(torn.len(), 1, "cut at {size}");
            assert_eq!(torn[0].offset, end as u64);
            assert_eq!(torn[0].bytes, (size - end) as u64);
            assert!(torn[0].to_string().contains("unfinished record"));
        }
        // The tail may be another process's append under way: it stays as it is.
        assert_eq!(fs::read(&segment).unwrap().len(), size);
    }
}

#[test]
fn any_flipped_bit_is_refused_with_the_file_and_the_record() {
    let (dir, segment) = filled();
    let whole = fs::read(&segment).unwrap();
    let records = [0, 16, 100, 500];
    for index in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[index] ^= 1 << (index % 8);
        fs::write(&segment, &bytes).unwrap();
        let StoreError::Damaged { path, offset, .. } = refusal(dir.path()) else {
            panic!("byte {index}: not reported as damage");
        };
        assert_eq!(path, segment, "byte {index}");
        let record = records.iter().rfind(|record| **record <= index).unwrap();
        assert_eq!(offset as usize, *record, "byte {index}");
    }
}

#[test]
fn a_removed_or_doubled_record_is_refused() {
    let (dir, segment) = filled();
    let whole = fs::read(&segment).unwrap();
    let removed = [&whole[..100], &whole[500..]].concat();
    let doubled = [&whole[..500], &whole[100..]].concat();
    for (bytes, expected) in [(removed, 100), (doubled, 500)] {
        fs::write(&segment, bytes).unwrap();
        let error = refusal(dir.path());
        assert!(
            matches!(error, StoreError::Damaged { offset, .. } if offset == expected),
            "{error}"
        );
    }
}

#[test]
fn a_changed_scope_file_is_refused() {
    let (dir, segment) = filled();
    let path = segment.with_file_name("scope.json");
    let text = fs::read_to_string(&path).unwrap();
    for changed in [text.replace("flex", "cuda"), text[1..].to_owned()] {
        fs::write(&path, changed).unwrap();
        let error = refusal(dir.path());
        assert!(error.to_string().contains("scope.json"), "{error}");
    }
}

#[test]
fn a_reload_shows_what_others_have_appended() {
    let dir = tempfile::tempdir().unwrap();
    let mut reader = open(dir.path());
    let mut first = open(dir.path()).writer().unwrap();
    let mut second = open(dir.path()).writer().unwrap();
    first.append(&entries(0..3)).unwrap();
    second.append(&entries(3..5)).unwrap();
    first.append(&entries(5..6)).unwrap();
    assert_eq!(reader.count().unwrap(), 0);
    // Both writers are still open.
    assert_eq!(reader.reload().unwrap(), []);
    assert_eq!(reader.count().unwrap(), 6);
    assert_eq!(files(dir.path(), "segment").len(), 2);
}

#[test]
fn many_writers_at_once_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    thread::scope(|threads| {
        for writer in 0..4 {
            let store = &store;
            threads.spawn(move || {
                let mut segment = store.writer().unwrap();
                for batch in 0..8 {
                    let start = writer * 100 + batch * 10;
                    segment.append(&entries(start..start + 10)).unwrap();
                }
                // Half of them end properly, which puts another file under the segment's name.
                if writer % 2 == 0 {
                    segment.finish().unwrap();
                }
            });
        }
        // Reading beside them sees whole appends only, and no damage.
        for _ in 0..20 {
            let (seen, _) = Store::open(dir.path(), &scope()).unwrap();
            assert_eq!(seen.count().unwrap() % 10, 0);
        }
    });
    assert_eq!(store.reload().unwrap(), []);
    assert_eq!(store.count().unwrap(), 4 * 80);
}

#[test]
fn an_entry_stored_twice_with_equal_bits_is_one_entry() {
    let (dir, _) = filled();
    open(dir.path())
        .writer()
        .unwrap()
        .append(&entries(5..15))
        .unwrap();
    assert_eq!(open(dir.path()).count().unwrap(), 15);
}

#[test]
fn an_entry_stored_twice_with_different_bits_is_refused_by_its_key() {
    let (dir, _) = filled();
    let mut writer = open(dir.path()).writer().unwrap();
    let (key, value) = entries(4..5)[0];
    writer
        .append(&[(key, f32::from_bits(value.to_bits() + 1))])
        .unwrap();
    let store = open(dir.path());
    for error in [store.get(&key).unwrap_err(), store.count().unwrap_err()] {
        assert!(matches!(error, StoreError::Contradiction { .. }), "{error}");
        assert!(error.to_string().contains(&key.to_string()), "{error}");
    }
    // The others are as good as ever.
    let (key, value) = entries(5..6)[0];
    assert_eq!(store.get(&key).unwrap(), Some(value));
}

#[test]
fn plus_and_minus_zero_are_different_bits() {
    let dir = tempfile::tempdir().unwrap();
    for value in [0.0, -0.0] {
        let mut writer = Store::open(dir.path(), &scope())
            .unwrap()
            .0
            .writer()
            .unwrap();
        writer.append(&[(key(0), value)]).unwrap();
    }
    assert!(matches!(
        open(dir.path()).get(&key(0)),
        Err(StoreError::Contradiction { .. })
    ));
}

#[test]
fn a_value_that_is_not_finite_is_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = open(dir.path()).writer().unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = writer.append(&[(key(0), -1.0), (key(1), bad)]).unwrap_err();
        assert!(matches!(error, AppendError::NotFinite { .. }), "{error}");
        assert!(error.to_string().contains(&key(1).to_string()), "{error}");
    }
    assert_eq!(open(dir.path()).count().unwrap(), 0);
}

#[test]
fn more_entries_than_one_record_holds_are_stored_in_one_call() {
    let dir = tempfile::tempdir().unwrap();
    let count = (1 << 16) + 3;
    open(dir.path())
        .writer()
        .unwrap()
        .append(&entries(0..count))
        .unwrap();
    assert_eq!(open(dir.path()).count().unwrap(), count as usize);
}

#[test]
fn leftovers_of_an_interrupted_write_are_not_read() {
    let (dir, segment) = filled();
    let leftover = segment.with_file_name("00.segment.123-0.tmp");
    fs::write(leftover, b"half").unwrap();
    assert_eq!(open(dir.path()).count().unwrap(), 12);
}
