//! The sorted form: the same entries as before, found at once; every byte of it checked before it is used (C2).
// A list of one range is meant where a store has one segment.
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]

mod support;

use std::{
    fs,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use refcache::{Action, Cleaning, EntryKey, Store, StoreError, clean};
use support::{
    append, append_sorted, entries, expect_entries, key, open, report, scope, segments, value,
};
use tempfile::TempDir;

/// Two whole blocks and a part of one.
const COUNT: u32 = 260;
const HEAD: usize = 84;
const BLOCK: usize = 128 * 36;
const FENCES: usize = HEAD + COUNT as usize * 36;
const SIZE: usize = FENCES + 3 * (8 + 32) + 32;

/// A store of one sorted segment, its path and bytes.
fn sorted() -> (TempDir, PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    append_sorted(dir.path(), 0..COUNT);
    let (path, bytes) = segments(&report(dir.path()).folder).pop_first().unwrap();
    assert_eq!(bytes.len(), SIZE);
    (dir, path, bytes)
}

/// First byte of the part of the file that a byte belongs to: what is named when it is damaged.
fn part(byte: usize) -> usize {
    match byte {
        0..HEAD => 0,
        HEAD..FENCES => byte - (byte - HEAD) % BLOCK,
        _ => FENCES,
    }
}

/// The first damage in the file that opening the store and looking up all entries meets. What is read must be right.
fn damage(dir: &Path) -> Option<StoreError> {
    let store = match Store::open_existing(dir, &scope()) {
        Ok(store) => store.unwrap(),
        Err(error) => return Some(error),
    };
    let mut errors = Vec::new();
    for (key, value) in entries(0..COUNT) {
        match store.get(&key) {
            Ok(found) => assert_eq!(found.map(f32::to_bits), Some(value.to_bits())),
            Err(error) => errors.push(error),
        }
    }
    errors
        .into_iter()
        .min_by_key(|error| error.place().map(|(_, offset)| offset))
}

#[track_caller]
fn expect_damage(dir: &Path, path: &Path, offset: usize) {
    let damages = [damage(dir), report(dir).damages.pop()];
    for error in damages {
        let error = error.expect("the damage is seen");
        assert_eq!(error.place(), Some((path, offset as u64)), "{error}");
    }
}

#[test]
fn a_finished_segment_gives_the_same_values_under_the_same_name_in_less_space() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = open(dir.path()).writer().unwrap();
    for start in (0..COUNT).step_by(10) {
        writer.append(&entries(start..start + 10)).unwrap();
    }
    let mut before = open(dir.path());
    let folder = report(dir.path()).folder;
    let (name, log) = segments(&folder).pop_first().unwrap();
    writer.finish().unwrap();
    let after = segments(&folder);
    assert_eq!(after.keys().collect::<Vec<_>>(), [&name]);
    assert!(after[&name].len() < log.len());
    // Who had the log open still has it, and then the sorted form.
    for _ in 0..2 {
        for index in 0..COUNT {
            assert_eq!(before.get(&key(index)).unwrap(), Some(value(index)));
        }
        assert_eq!(before.get(&key(COUNT)).unwrap(), None);
        assert_eq!(before.reload().unwrap(), []);
    }
    expect_entries(dir.path(), 0..COUNT);
}

#[test]
fn sorted_and_appended_segments_are_looked_up_together() {
    let dir = tempfile::tempdir().unwrap();
    append_sorted(dir.path(), 0..200);
    append_sorted(dir.path(), 150..300);
    append(dir.path(), 290..310);
    expect_entries(dir.path(), 0..310);
    let mut writer = open(dir.path()).writer().unwrap();
    writer.append(&[(key(7), -1.0), (key(500), -2.0)]).unwrap();
    writer.finish().unwrap();
    let store = open(dir.path());
    assert!(matches!(
        store.get(&key(7)),
        Err(StoreError::Contradiction { .. })
    ));
    assert_eq!(store.get(&key(500)).unwrap(), Some(-2.0));
    let damages = report(dir.path()).damages;
    assert!(
        matches!(damages[..], [StoreError::Contradiction { .. }]),
        "{damages:?}"
    );
}

#[test]
fn a_segment_of_nothing_is_finished_too() {
    let dir = tempfile::tempdir().unwrap();
    append_sorted(dir.path(), 0..0);
    expect_entries(dir.path(), 0..0);
}

#[test]
fn c2_a_flipped_bit_in_any_byte_is_found_before_use_and_its_block_named() {
    let (dir, path, whole) = sorted();
    let file = fs::File::options().write(true).open(&path).unwrap();
    for byte in 0..whole.len() {
        let flipped = [whole[byte] ^ (1 << (byte % 8))];
        file.write_all_at(&flipped, byte as u64).unwrap();
        expect_damage(dir.path(), &path, part(byte));
        file.write_all_at(&whole[byte..=byte], byte as u64).unwrap();
    }
    expect_entries(dir.path(), 0..COUNT);
}

#[test]
fn c2_blocks_beside_a_damaged_one_still_give_their_values() {
    let (dir, path, mut bytes) = sorted();
    bytes[HEAD + BLOCK] ^= 1;
    fs::write(&path, bytes).unwrap();
    let store = open(dir.path());
    let found = entries(0..COUNT)
        .into_iter()
        .filter(|(key, _)| store.get(key).is_ok());
    assert_eq!(found.count(), COUNT as usize - 128);
}

#[test]
fn c2_a_segment_cut_anywhere_or_extended_is_refused() {
    let (dir, path, whole) = sorted();
    let file = fs::File::options().write(true).open(&path).unwrap();
    for size in (0..whole.len()).rev() {
        file.set_len(size as u64).unwrap();
        // Within the head nothing tells how long it should be.
        expect_damage(dir.path(), &path, if size < HEAD { 0 } else { size });
    }
    for more in [1, 36, whole.len()] {
        fs::write(&path, [&whole[..], &whole[..more]].concat()).unwrap();
        expect_damage(dir.path(), &path, SIZE);
    }
}

#[test]
fn c2_swapped_blocks_and_parts_of_other_segments_are_refused() {
    let (dir, path, whole) = sorted();
    let blocks = [HEAD..HEAD + BLOCK, HEAD + BLOCK..HEAD + 2 * BLOCK];
    let digests: [Range<usize>; 2] = [0, 1].map(|block| {
        let start = FENCES + 3 * 8 + block * 32;
        start..start + 32
    });
    let swapped = |[a, b]: &[Range<usize>; 2], bytes: &[u8]| {
        [
            &bytes[..a.start],
            &bytes[b.clone()],
            &bytes[a.end..b.start],
            &bytes[a.clone()],
            &bytes[b.end..],
        ]
        .concat()
    };
    fs::write(&path, swapped(&blocks, &whole)).unwrap();
    expect_damage(dir.path(), &path, HEAD);
    // With their digests: then it is those that are wrong.
    fs::write(&path, swapped(&digests, &swapped(&blocks, &whole))).unwrap();
    expect_damage(dir.path(), &path, FENCES);
    // A head of as many other entries.
    let elsewhere = tempfile::tempdir().unwrap();
    append_sorted(elsewhere.path(), 1000..1000 + COUNT);
    let other = segments(&report(elsewhere.path()).folder)
        .pop_first()
        .unwrap()
        .1;
    fs::write(&path, [&whole[..FENCES], &other[FENCES..]].concat()).unwrap();
    expect_damage(dir.path(), &path, HEAD);
}

#[test]
fn r1_a_sorted_segment_brought_from_another_scope_is_refused() {
    let (dir, path, _) = sorted();
    let elsewhere = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(elsewhere.path(), &support::other_scope()).unwrap();
    let mut writer = store.writer().unwrap();
    writer.append(&entries(0..COUNT)).unwrap();
    writer.finish().unwrap();
    let other = segments(&report(elsewhere.path()).folder)
        .pop_first()
        .unwrap()
        .1;
    fs::write(&path, other).unwrap();
    let error = damage(dir.path()).unwrap();
    assert_eq!(error.place(), Some((&*path, 0)));
    assert!(error.to_string().contains("another scope"), "{error}");
}

#[test]
fn segments_of_format_version_1_are_read_and_become_version_2_byte_by_byte() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let folder = report(dir.path()).folder;
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let old = folder.join("00112233445566778899aabbccddeeff.segment");
    fs::copy(golden.join("version-1.segment"), &old).unwrap();
    expect_entries(dir.path(), 0..150);
    let cleaning = Cleaning {
        unused_for: None,
        now: std::time::SystemTime::now(),
        dry_run: false,
    };
    let cleaned = clean(dir.path(), &cleaning).unwrap();
    assert_eq!(cleaned.scopes[0].action, Action::Merged);
    let (path, bytes) = segments(&folder).pop_first().unwrap();
    assert_ne!(path, old);
    assert!(
        bytes == fs::read(golden.join("version-2.segment")).unwrap(),
        "{} is not as version 2 is written down",
        path.display()
    );
    expect_entries(dir.path(), 0..150);
}

#[test]
fn an_absent_key_is_absent_wherever_it_would_be() {
    let (dir, _, _) = sorted();
    let store = open(dir.path());
    for index in 0..5000 {
        let absent = EntryKey::new(&[index], &[]);
        assert_eq!(store.get(&absent).unwrap(), None);
    }
}

#[test]
fn a_finish_cut_short_anywhere_loses_nothing_and_the_next_clean_up_leaves_no_trace() {
    let (dir, folder) = support::filled(&[0..COUNT]);
    append_sorted(dir.path(), 100..300);
    let before = segments(&folder);
    let (log, _) = before
        .iter()
        .find(|(_, bytes)| bytes.starts_with(b"CALDPLOG"))
        .unwrap();
    let (_elsewhere, _, whole) = sorted();
    let unfinished = log.with_extension("merging");
    let temporary = log.with_extension("merging.123-0.tmp");
    let mut crashes = Vec::new();
    for size in (0..=whole.len()).step_by(61) {
        crashes.extend([(&temporary, &whole[..size]), (&unfinished, &whole[..size])]);
    }
    crashes.push((log, &whole[..]));
    for (path, bytes) in crashes {
        let what = format!("{} with {} bytes", path.display(), bytes.len());
        for path in segments(&folder).into_keys() {
            fs::remove_file(path).unwrap();
        }
        for (path, bytes) in &before {
            fs::write(path, bytes).unwrap();
        }
        fs::write(path, bytes).unwrap();
        expect_entries(dir.path(), 0..300);
        let cleaning = Cleaning {
            unused_for: None,
            now: std::time::SystemTime::now(),
            dry_run: false,
        };
        let cleaned = clean(dir.path(), &cleaning).unwrap();
        assert_eq!(cleaned.leftovers.len(), usize::from(path != log), "{what}");
        assert_eq!(support::files(&folder).len(), 3, "{what}");
        expect_entries(dir.path(), 0..300);
    }
}
