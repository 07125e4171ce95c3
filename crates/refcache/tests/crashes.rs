//! A crash at every write, sync, rename and removal: what was stored when a call returned is there afterwards, with its
//! values, and the next clean-up leaves no trace of the crash. The same for a disk that fails or is full at every step.
// A list of one range is meant where one call stores something.
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::Path,
    time::{Duration, SystemTime},
};

use refcache::{Action, Cleaned, Cleaning, Compaction, EntryKey, Extent, Store, Writer, clean};
use storage::testing::disk::{DiskFault, record};
use support::{append, append_sorted, entries, open, report, scope, segments, value};

/// All that a test stores is below.
const COUNT: u32 = 400;
/// Ways in which a crash after one and the same step leaves the disk.
const CHOICES: u64 = 6;

/// What a process does, call by call; an error is its last.
type Calls = Vec<Box<dyn Fn(&Path, &mut Option<Writer>) -> Result<(), String>>>;

fn call(act: impl Fn(&Path, &mut Option<Writer>) -> Result<(), String> + 'static) -> Calls {
    vec![Box::new(act)]
}

fn start() -> Calls {
    call(|dir, writer| {
        let (store, _) = Store::open(dir, &scope()).map_err(|error| error.to_string())?;
        *writer = Some(store.writer().map_err(|error| error.to_string())?);
        Ok(())
    })
}

fn stores(indices: Range<u32>) -> Calls {
    call(move |_, writer| {
        let appended = writer.as_mut().unwrap().append(&entries(indices.clone()));
        appended.map_err(|error| error.to_string())
    })
}

fn finishes() -> Calls {
    call(|_, writer| {
        writer
            .take()
            .unwrap()
            .finish()
            .map_err(|error| error.to_string())
    })
}

fn cleans_up(unused_for: Option<Duration>) -> Calls {
    call(move |dir, writer| {
        *writer = None;
        clean_up(dir, unused_for).map(drop)
    })
}

fn clean_up(dir: &Path, unused_for: Option<Duration>) -> Result<Cleaned, String> {
    let cleaning = Cleaning {
        unused_for,
        now: SystemTime::now() + Duration::from_hours(24),
        dry_run: false,
    };
    clean(dir, &cleaning).map_err(|error| error.to_string())
}

/// Gives the number of calls that returned without an error.
fn perform(dir: &Path, calls: &Calls) -> usize {
    let mut writer = None;
    calls
        .iter()
        .take_while(|call| call(dir, &mut writer).is_ok())
        .count()
}

/// The entries of the store, each with its value.
fn found(dir: &Path) -> BTreeMap<EntryKey, u32> {
    let (store, _) = Store::open(dir, &scope()).unwrap();
    let mut found = BTreeMap::new();
    for (index, (key, _)) in (0..).zip(entries(0..COUNT)) {
        if let Some(stored) = store.get(&key).unwrap() {
            assert_eq!(stored.to_bits(), value(index).to_bits());
            found.insert(key, index);
        }
    }
    assert_eq!(store.count().unwrap(), found.len());
    found
}

/// The store is whole and has at least the `promised` entries; so it is after a clean-up, which leaves one segment.
#[track_caller]
fn check(dir: &Path, promised: &[Range<u32>], what: &str) {
    let before = found(dir);
    for (key, _) in promised.iter().cloned().flat_map(entries) {
        assert!(before.contains_key(&key), "{what}: an entry is lost");
    }
    let cleaned = clean_up(dir, None).unwrap();
    assert!(
        cleaned
            .scopes
            .iter()
            .all(|scope| scope.action != Action::Damaged),
        "{what}: {cleaned:?}"
    );
    assert_eq!(found(dir), before, "{what}");
    let folder = report(dir).folder;
    assert!(segments(&folder).len() <= 1, "{what}");
    let files = fs::read_dir(&folder).unwrap().count();
    assert_eq!(
        files,
        segments(&folder).len() + 2,
        "{what}: scope.json, lock and nothing else"
    );
    assert_eq!(fs::read_dir(dir).unwrap().count(), 1, "{what}");
}

/// Crashes at every step of `calls` on a store that `prepare` made and that holds `held` until the call `kept` returns.
/// `promises` is what each call that returned has stored.
fn crash_everywhere(
    prepare: impl Fn(&Path),
    held: &[Range<u32>],
    calls: &Calls,
    promises: &[Range<u32>],
) {
    let parent = tempfile::tempdir().unwrap();
    let fresh = |name: &str| {
        let dir = parent.path().join(name);
        fs::create_dir(&dir).unwrap();
        prepare(&dir);
        dir
    };
    let promised = |done: usize| [held, &promises[..done.min(promises.len())]].concat();
    // How many steps the first calls take. Names are random, steps are not.
    let ends: Vec<usize> = (0..=calls.len())
        .map(|count| {
            let dir = fresh(&format!("count-{count}"));
            let mut writer = None;
            let act = || {
                calls[..count]
                    .iter()
                    .for_each(|call| call(&dir, &mut writer).unwrap());
            };
            record(&dir, None, act).unwrap().1.steps()
        })
        .collect();
    let dir = fresh("recorded");
    let (done, recording) = record(&dir, None, || perform(&dir, calls)).unwrap();
    assert_eq!((done, recording.steps()), (calls.len(), ends[calls.len()]));
    for steps in 0..=recording.steps() {
        let done = ends.iter().rposition(|end| *end <= steps).unwrap();
        for choice in 0..CHOICES {
            let target = parent.path().join("crashed");
            recording.crash(steps, choice, &target).unwrap();
            check(
                &target,
                &promised(done),
                &format!("crash after {steps} steps, choice {choice}"),
            );
            fs::remove_dir_all(&target).unwrap();
        }
    }
    for fault in [DiskFault::Fail, DiskFault::Full] {
        for step in 0..recording.steps() {
            let dir = fresh(&format!("{fault:?}-{step}"));
            let (done, _) = record(&dir, Some((step, fault)), || perform(&dir, calls)).unwrap();
            check(&dir, &promised(done), &format!("{fault:?} at step {step}"));
        }
    }
}

#[test]
fn a_writer_that_crashes_keeps_what_its_appends_returned_for_and_what_others_stored() {
    let prepare = |dir: &Path| append_sorted(dir, 0..10);
    let calls: Calls = [start(), stores(10..30), stores(30..31), finishes()]
        .into_iter()
        .flatten()
        .collect();
    // Starting promises nothing.
    crash_everywhere(prepare, &[0..10], &calls, &[0..0, 10..30, 30..31]);
}

#[test]
fn the_first_writer_of_a_store_may_crash_anywhere() {
    let calls: Calls = [start(), stores(0..300), finishes()]
        .into_iter()
        .flatten()
        .collect();
    crash_everywhere(|_| (), &[], &calls, &[0..0, 0..300]);
}

#[test]
fn a_clean_up_that_crashes_loses_nothing() {
    let prepare = |dir: &Path| {
        append(dir, 0..10);
        append_sorted(dir, 5..200);
        append_sorted(dir, 190..COUNT);
    };
    crash_everywhere(prepare, &[0..COUNT], &cleans_up(None), &[]);
}

#[test]
fn a_removal_that_crashes_leaves_a_store_in_order() {
    let prepare = |dir: &Path| {
        append(dir, 0..10);
        append_sorted(dir, 5..200);
    };
    crash_everywhere(prepare, &[], &cleans_up(Some(Duration::ZERO)), &[]);
}

#[test]
fn a_clean_up_that_crashes_between_what_was_shared_and_merged_loses_nothing() {
    let prepare = |dir: &Path| {
        let directory = tempfile::tempdir().unwrap();
        let shared = storage::Folder::open(directory.path()).unwrap();
        append_sorted(dir, 0..200);
        append_sorted(dir, 190..COUNT);
        let mut store = open(dir);
        store.push(&shared).unwrap();
        let (compaction, _) = store
            .compact(&shared, Extent::Whole, SystemTime::now())
            .unwrap();
        assert!(matches!(compaction, Compaction::Merged { .. }));
        drop(store);
        assert_eq!(report(dir).segments, 3);
    };
    crash_everywhere(prepare, &[0..COUNT], &cleans_up(None), &[]);
}
