//! Segments of any bytes in both forms: refused, or read as what they are. Never a panic, never a value that was not stored,
//! never much more memory than the file has bytes.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../storage/tests/fuzz/mod.rs"]
mod fuzz;
mod support;

use std::{collections::BTreeMap, fs, ops::Range, path::Path, time::SystemTime};

use fuzz::{Counting, edited, edits, fuzz, peak, sealed_log};
use proptest::{prelude::*, test_runner::TestCaseError};
use refcache::{Action, Cleaning, EntryKey, Store, clean};
use support::{append, append_sorted, entries, open, report, scope, segments};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// More than a block.
const COUNT: u32 = 150;
const HEAD: usize = 84;
const COUNT_AT: Range<usize> = 44..52;

/// A sorted segment's bytes with digests that hold, as far as its count leads.
fn sealed_sorted(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.len() < HEAD {
        return bytes;
    }
    let digest = blake3::hash(&bytes[..COUNT_AT.end]);
    bytes[COUNT_AT.end..HEAD].copy_from_slice(digest.as_bytes());
    let count = u64::from_le_bytes(bytes[COUNT_AT].try_into().unwrap());
    let blocks = count.div_ceil(128);
    let end = count as u128 * 36 + blocks as u128 * 40 + (HEAD + 32) as u128;
    if end != bytes.len() as u128 {
        return bytes;
    }
    let fences = HEAD + count as usize * 36;
    let (content, rest) = bytes.split_at_mut(fences);
    let (index, root) = rest.split_at_mut(blocks as usize * 40);
    let (fences, digests) = index.split_at_mut(blocks as usize * 8);
    for (block, entries) in content[HEAD..].chunks(128 * 36).enumerate() {
        fences[8 * block..][..8].copy_from_slice(&entries[..8]);
        digests[32 * block..][..32].copy_from_slice(blake3::hash(entries).as_bytes());
    }
    let mut hasher = blake3::Hasher::new();
    let digest = hasher.update(&content[..HEAD]).update(index).finalize();
    root.copy_from_slice(digest.as_bytes());
    bytes
}

/// Values of the known keys that the store gives, where it gives any answer.
fn values(store: &Store, known: &BTreeMap<EntryKey, f32>) -> Result<Vec<Option<u32>>, String> {
    let found = known.keys().map(|key| store.get(key));
    let bits = found.map(|found| found.map(|value| value.map(f32::to_bits)));
    bits.collect::<Result<_, _>>().map_err(|it| it.to_string())
}

/// Reads a store of this one segment in all ways.
fn check(dir: &Path, file: &Path, bytes: &[u8], resealed: bool) -> Result<(), TestCaseError> {
    fs::write(file, bytes).unwrap();
    let known: BTreeMap<_, _> = entries(0..COUNT).into_iter().collect();
    let (taken, opened) = peak(|| Store::open_existing(dir, &scope()));
    let most = 12 * bytes.len() + (64 << 10);
    prop_assert!(
        taken <= most,
        "{taken} bytes for {} of segment",
        bytes.len()
    );
    let before = opened.map(|store| {
        let store = store.unwrap();
        let count = store.count();
        (values(&store, &known), count.map_err(|it| it.to_string()))
    });
    if let Ok((found, count)) = &before {
        if let (Ok(found), false) = (found, resealed) {
            for (value, found) in known.values().zip(found) {
                prop_assert!(
                    found.is_none_or(|found| found == value.to_bits()),
                    "a wrong value"
                );
            }
        }
        if let Ok(count) = count {
            prop_assert!(36 * count <= bytes.len());
            prop_assert!(resealed || *count <= known.len());
        }
    }
    // What a clean-up makes of it holds the same.
    let cleaning = Cleaning {
        unused_for: None,
        now: SystemTime::now(),
        dry_run: false,
    };
    let (taken, cleaned) = peak(|| clean(dir, &cleaning).unwrap());
    prop_assert!(
        taken <= most + (4 << 20),
        "{taken} bytes to clean {} up",
        bytes.len()
    );
    let damaged = cleaned.scopes[0].action == Action::Damaged;
    let sound = matches!(&before, Ok((Ok(_), Ok(_))));
    prop_assert_eq!(sound, !damaged, "{:?}", cleaned.scopes[0].before.damages);
    if let (Ok((found, count)), true) = (before, sound) {
        let store = open(dir);
        prop_assert_eq!(values(&store, &known), found);
        prop_assert_eq!(store.count().map_err(|it| it.to_string()), count);
    }
    for path in segments(&cleaned.scopes[0].before.folder).keys() {
        fs::remove_file(path).unwrap();
    }
    Ok(())
}

#[test]
fn a_segment_of_any_bytes_is_refused_or_read_as_what_it_is_in_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let whole = [append, append_sorted].map(|store| {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path(), 0..COUNT);
        segments(&report(dir.path()).folder).pop_first().unwrap().1
    });
    drop(open(dir.path()));
    let folder = report(dir.path()).folder;
    let file = folder.join("00112233445566778899aabbccddeeff.segment");
    // Counts that lie under a digest that holds.
    for count in [0, 1 << 20, 1 << 33, u64::MAX / 36, u64::MAX] {
        let mut bytes = whole[1].clone();
        bytes[COUNT_AT].copy_from_slice(&count.to_le_bytes());
        check(dir.path(), &file, &sealed_sorted(bytes), true).unwrap();
    }
    let reseal = prop_oneof![1 => Just(false), 3 => Just(true)];
    let cases = &(0..2usize, edits(), reseal);
    fuzz("segment", 800, cases, |(form, edits, reseal)| {
        let mut bytes = edited(&whole[form], &edits);
        if reseal {
            bytes = [sealed_log, sealed_sorted][form](bytes);
        }
        check(dir.path(), &file, &bytes, reseal)
    });
}
