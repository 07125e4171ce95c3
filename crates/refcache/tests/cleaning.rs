//! Looking into stores and cleaning them up: nothing in use goes, no crash loses an entry, damage is named.

// A list of one range is meant where a store has one segment.
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]

mod support;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use refcache::{Action, Cleaned, Cleaning, Store, StoreError, clean, inspect};
use support::{
    append_sorted, entries, expect_entries, files, filled, open, other_scope, report, scope,
    segments,
};

const DAY: Duration = Duration::from_hours(24);

/// Cleans up as `days` from now.
fn clean_in(dir: &Path, days: u32, unused_for: Option<Duration>, dry_run: bool) -> Cleaned {
    let now = SystemTime::now() + days * DAY;
    let cleaning = Cleaning {
        unused_for,
        now,
        dry_run,
    };
    clean(dir, &cleaning).unwrap()
}

fn merge(dir: &Path) -> Cleaned {
    clean_in(dir, 0, None, false)
}

fn actions(cleaned: &Cleaned) -> Vec<Action> {
    cleaned.scopes.iter().map(|scope| scope.action).collect()
}

#[test]
fn a_report_tells_scope_entries_segments_and_bytes() {
    let (dir, folder) = filled(&[0..10, 5..12]);
    let report = report(dir.path());
    assert_eq!(report.scope, Some(scope()));
    assert_eq!(report.digest, folder.file_name().unwrap().to_str().unwrap());
    assert_eq!((report.entries, report.segments), (12, 2));
    let bytes: usize = segments(&folder).values().map(Vec::len).sum();
    assert_eq!(report.bytes, bytes as u64);
    assert!(report.damages.is_empty() && report.torn.is_empty());
    assert!(report.used <= SystemTime::now() + DAY);
}

#[test]
fn every_damaged_file_is_named_with_its_offset_and_the_others_are_still_read() {
    let (dir, folder) = filled(&[0..10, 10..20, 20..30]);
    let paths: Vec<_> = segments(&folder).into_keys().collect();
    for (path, byte) in [(&paths[0], 17), (&paths[2], 141)] {
        let mut bytes = fs::read(path).unwrap();
        bytes[byte] ^= 1;
        fs::write(path, bytes).unwrap();
    }
    let report = report(dir.path());
    assert_eq!(report.entries, 10);
    let places: Vec<_> = report.damages.iter().map(|error| error.place()).collect();
    assert_eq!(
        places,
        [Some((&*paths[0], 16)), Some((&*paths[2], 100))],
        "{:?}",
        report.damages
    );
}

#[test]
fn duplicates_that_disagree_are_named() {
    let (dir, folder) = filled(&[0..10]);
    let (key, value) = entries(4..5)[0];
    let changed = [(key, f32::from_bits(value.to_bits() + 1))];
    let store = open(dir.path());
    store.writer().unwrap().append(&changed).unwrap();
    drop(store);
    let report = report(dir.path());
    let [StoreError::Contradiction { path, offset, .. }] = &report.damages[..] else {
        panic!("{:?}", report.damages);
    };
    // Whichever is read later.
    assert_eq!(*path, segments(&folder).into_keys().max().unwrap());
    assert_eq!(*offset, 100);
    let before = segments(&folder);
    assert_eq!(actions(&merge(dir.path())), [Action::Damaged]);
    assert_eq!(segments(&folder), before);
}

#[test]
fn a_scope_file_of_another_scope_is_damage_and_a_missing_one_is_not() {
    let (dir, folder) = filled(&[0..10]);
    let path = folder.join("scope.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("flex", "cuda")).unwrap();
    let damaged = report(dir.path());
    assert_eq!(damaged.damages[0].place(), Some((&*path, 0)));
    assert_eq!((damaged.scope, damaged.entries), (None, 10));
    fs::remove_file(&path).unwrap();
    let missing = report(dir.path());
    assert!(missing.damages.is_empty());
    assert_eq!((missing.scope, missing.entries), (None, 10));
}

#[test]
fn looking_changes_neither_content_nor_dates() {
    let (dir, folder) = filled(&[0..10, 5..12]);
    let dates = || -> Vec<_> {
        let modified = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
        files(&folder).keys().map(modified).collect()
    };
    let before = (files(&folder), dates());
    report(dir.path());
    assert_eq!(before, (files(&folder), dates()));
}

#[test]
fn segments_become_one_with_the_same_entries_and_a_second_clean_up_does_nothing() {
    let (dir, folder) = filled(&[0..10, 5..12, 12..13]);
    let cleaned = merge(dir.path());
    assert_eq!(actions(&cleaned), [Action::Merged]);
    let scope = &cleaned.scopes[0];
    assert_eq!((scope.before.segments, scope.before.entries), (3, 13));
    let after = segments(&folder);
    assert_eq!(after.len(), 1);
    assert_eq!(scope.bytes, after.values().next().unwrap().len() as u64);
    assert_eq!(files(&folder).len(), 3, "a segment, scope.json, lock");
    assert_eq!(actions(&merge(dir.path())), [Action::Kept]);
    assert_eq!(segments(&folder), after);
    expect_entries(dir.path(), 0..13);
}

#[test]
fn one_segment_that_its_writer_did_not_finish_is_sorted() {
    let (dir, folder) = filled(&[0..300]);
    let log = segments(&folder);
    assert_eq!(actions(&merge(dir.path())), [Action::Merged]);
    let sorted = segments(&folder);
    assert_eq!(sorted.len(), 1);
    assert_ne!(sorted.keys().next(), log.keys().next());
    assert_eq!(actions(&merge(dir.path())), [Action::Kept]);
    expect_entries(dir.path(), 0..300);
}

#[test]
fn sorted_segments_are_merged_and_damage_in_any_leaves_all_alone() {
    let (dir, folder) = filled(&[290..310]);
    append_sorted(dir.path(), 0..200);
    append_sorted(dir.path(), 150..300);
    let whole = segments(&folder);
    for (path, bytes) in &whole {
        let mut damaged = bytes.clone();
        damaged[200] ^= 1;
        fs::write(path, damaged).unwrap();
        let before = segments(&folder);
        assert_eq!(actions(&merge(dir.path())), [Action::Damaged]);
        assert_eq!(segments(&folder), before);
        fs::write(path, bytes).unwrap();
    }
    assert_eq!(actions(&merge(dir.path())), [Action::Merged]);
    assert_eq!(segments(&folder).len(), 1);
    expect_entries(dir.path(), 0..310);
}

#[test]
fn more_entries_than_one_record_holds_are_merged_to_the_announced_size() {
    let count = (1 << 16) + 3;
    let (dir, folder) = filled(&[0..count, 0..2]);
    let [announced, done] = [true, false].map(|dry_run| clean_in(dir.path(), 0, None, dry_run));
    assert_eq!(announced.scopes[0].bytes, done.scopes[0].bytes);
    let merged = segments(&folder).into_values().next().unwrap();
    assert_eq!(done.scopes[0].bytes, merged.len() as u64);
    expect_entries(dir.path(), 0..count);
}

#[test]
fn a_merge_drops_appends_that_did_not_finish() {
    let (dir, folder) = filled(&[0..10]);
    let (path, bytes) = segments(&folder).into_iter().next().unwrap();
    fs::write(&path, [&bytes[..], b"half a record"].concat()).unwrap();
    let cleaned = merge(dir.path());
    assert_eq!(actions(&cleaned), [Action::Merged]);
    assert_eq!(cleaned.scopes[0].before.torn[0].bytes, 13);
    expect_entries(dir.path(), 0..10);
}

#[test]
fn a_merge_cut_short_anywhere_loses_nothing_and_is_finished_by_the_next() {
    let (dir, folder) = filled(&[0..10, 8..20, 20..25]);
    let old = segments(&folder);
    merge(dir.path());
    let (merged, whole) = segments(&folder).into_iter().next().unwrap();
    let unfinished = merged.with_extension("merging");
    // The file being written, cut here and there: all old segments are still there.
    let mut crashes: Vec<BTreeMap<PathBuf, Vec<u8>>> = (0..=whole.len())
        .step_by(7)
        .map(|size| {
            let mut state = old.clone();
            state.insert(unfinished.clone(), whole[..size].to_vec());
            state
        })
        .collect();
    // Renamed, and the old ones removed one by one.
    for removed in 0..=old.len() {
        let mut state: BTreeMap<_, _> = old.clone().into_iter().skip(removed).collect();
        state.insert(merged.clone(), whole.clone());
        crashes.push(state);
    }
    for state in crashes {
        let names: Vec<_> = state.keys().collect();
        for path in files(&folder).into_keys() {
            if !path.ends_with("scope.json") {
                fs::remove_file(path).unwrap();
            }
        }
        for (path, bytes) in &state {
            fs::write(path, bytes).unwrap();
        }
        expect_entries(dir.path(), 0..25);
        let cleaned = merge(dir.path());
        let left = usize::from(state.contains_key(&unfinished));
        assert_eq!(cleaned.leftovers.len(), left, "{names:?}");
        // Sorted entries: whoever finishes it, the bytes are the same.
        let bytes: Vec<_> = segments(&folder).into_values().collect();
        assert_eq!(bytes, std::slice::from_ref(&whole), "{names:?}");
        assert_eq!(files(&folder).len(), 3, "{names:?}");
        expect_entries(dir.path(), 0..25);
    }
}

#[test]
fn a_removal_cut_short_is_finished_by_the_next_and_hinders_nobody() {
    let (dir, folder) = filled(&[0..10]);
    let removed = folder.with_extension("removed");
    fs::rename(&folder, &removed).unwrap();
    fs::remove_file(removed.join("scope.json")).unwrap();
    assert!(inspect(dir.path(), &mut |_| ()).unwrap().is_empty());
    // A run has filled the scope anew meanwhile.
    let store = open(dir.path());
    assert_eq!(store.count().unwrap(), 0);
    store.writer().unwrap().append(&entries(0..3)).unwrap();
    drop(store);
    let cleaned = merge(dir.path());
    assert_eq!(cleaned.leftovers, [&*removed]);
    assert!(!removed.exists());
    expect_entries(dir.path(), 0..3);
}

#[test]
fn a_scope_with_a_writer_or_a_reader_is_left_alone_and_named() {
    let (dir, folder) = filled(&[0..10, 10..12]);
    let store = open(dir.path());
    // A writer outlives its store.
    let mut writer = store.writer().unwrap();
    let (other, _) = Store::open(dir.path(), &other_scope()).unwrap();
    drop(store);
    let before = segments(&folder);
    let cleaned = clean_in(dir.path(), 100, Some(DAY), false);
    assert!(cleaned.scopes.is_empty());
    assert_eq!(cleaned.in_use.len(), 2);
    for error in &cleaned.in_use {
        let text = error.to_string();
        assert!(text.contains("is in use: "), "{text}");
        assert!(text.contains("wait until they end"), "{text}");
    }
    assert_eq!(segments(&folder), before);
    writer.append(&entries(12..15)).unwrap();
    expect_entries(dir.path(), 0..15);
    drop(writer);
    let cleaned = merge(dir.path());
    assert_eq!(actions(&cleaned), [Action::Merged]);
    assert_eq!(cleaned.in_use.len(), 1);
    drop(other);
    expect_entries(dir.path(), 0..15);
}

#[test]
fn only_scopes_unused_for_long_enough_are_removed() {
    let (dir, folder) = filled(&[0..10]);
    merge(dir.path());
    let young = other_scope();
    drop(Store::open(dir.path(), &young).unwrap());
    let old = SystemTime::now() - 40 * DAY;
    for path in files(&folder).into_keys() {
        File::open(path).unwrap().set_modified(old).unwrap();
    }
    let clean = |days| clean_in(dir.path(), 0, Some(days * DAY), false);
    assert_eq!(actions(&clean(41)), [Action::Kept; 2]);
    let cleaned = clean(39);
    assert_eq!(cleaned.scopes.len(), 2);
    for scope in cleaned.scopes {
        let removed = scope.before.folder == folder;
        assert_eq!(scope.action == Action::Removed, removed);
        assert_eq!(scope.before.folder.exists(), !removed);
    }
    assert_eq!(report(dir.path()).scope, Some(young));
}

#[test]
fn opening_a_scope_counts_as_use_and_cleaning_up_does_not() {
    let (dir, folder) = filled(&[0..10, 10..12]);
    let age = || {
        let old = SystemTime::now() - 40 * DAY;
        for path in files(&folder).into_keys() {
            File::open(path).unwrap().set_modified(old).unwrap();
        }
    };
    let clean = || clean_in(dir.path(), 0, Some(39 * DAY), false);
    age();
    open(dir.path());
    assert_eq!(actions(&clean()), [Action::Merged]);
    let mut writer = open(dir.path()).writer().unwrap();
    writer.append(&entries(12..13)).unwrap();
    drop(writer);
    age();
    assert_eq!(actions(&merge(dir.path())), [Action::Merged]);
    assert_eq!(actions(&clean()), [Action::Removed]);
}

#[test]
fn a_dry_run_tells_the_same_and_changes_nothing() {
    let (dir, folder) = filled(&[0..10, 10..12]);
    fs::write(folder.join("00.merging"), b"half").unwrap();
    let without_lock = || {
        let mut files = files(&folder);
        files.remove(&folder.join("lock"));
        files
    };
    let before = without_lock();
    for (unused_for, expected) in [(None, Action::Merged), (Some(DAY), Action::Removed)] {
        let dry = clean_in(dir.path(), 2, unused_for, true);
        assert_eq!(actions(&dry), [expected]);
        assert_eq!(dry.leftovers, [folder.join("00.merging")]);
        assert_eq!(without_lock(), before);
    }
    let done = clean_in(dir.path(), 2, Some(DAY), false);
    assert_eq!(actions(&done), [Action::Removed]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn runs_that_open_scopes_while_they_are_cleaned_up_find_everything_or_an_empty_scope() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|threads| {
        let runs: Vec<_> = (0..2)
            .map(|run| {
                let dir = dir.path();
                threads.spawn(move || {
                    for round in 0..50 {
                        let (mut store, torn) = Store::open(dir, &scope()).unwrap();
                        // The other run may be within an append.
                        assert!(torn.len() <= 1);
                        let added = entries(run * 1000 + round..run * 1000 + round + 3);
                        let mut writer = store.writer().unwrap();
                        writer.append(&added).unwrap();
                        if round % 2 == 0 {
                            writer.finish().unwrap();
                        }
                        store.reload().unwrap();
                        for (key, value) in added {
                            assert_eq!(store.get(&key).unwrap(), Some(value));
                        }
                    }
                })
            })
            .collect();
        // Ends with runs that fail, too; their panic is the scope's.
        for removing in [false, true].into_iter().cycle() {
            if runs.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                break;
            }
            // Another thread's store is no error, just a scope that is in use.
            clean_in(dir.path(), 2, removing.then_some(DAY), false);
        }
    });
}
