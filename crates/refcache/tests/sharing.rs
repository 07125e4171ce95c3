//! Entries that one machine stored are found by another through a folder that both reach: a disk, an object store, and one that
//! fails, forgets, lists late, refuses conditions and flips bits. Never a wrong value, and no failure but costs entries that
//! are computed anew.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{path::Path, sync::Arc, time::SystemTime};

use refcache::{Action, Cleaning, Store, clean};
use storage::{Folder, testing::Fault};
use support::{
    append, append_sorted, entries, expect_entries,
    machines::{Machines, scratch},
    open, other_scope, report, segments,
};

fn merge(dir: &Path) -> Action {
    let cleaning = Cleaning {
        unused_for: None,
        now: SystemTime::now(),
        dry_run: false,
    };
    clean(dir, &cleaning).unwrap().scopes[0].action
}

/// All that `store` has of the first 200 entries has its value; how many there are.
fn found(store: &Store) -> usize {
    let known = entries(0..200).into_iter();
    let found = known.filter(|(key, value)| {
        let found = store.get(key).unwrap();
        assert!(found.is_none_or(|it| it.to_bits() == value.to_bits()));
        found.is_some()
    });
    found.count()
}

fn check_sharing(shared: &Folder, [a, b]: [&Path; 2]) {
    append_sorted(a, 0..150);
    append_sorted(a, 100..160);
    // At work, or dead: not sent.
    append(a, 160..170);
    let pushed = open(a).push(shared).unwrap();
    assert_eq!(pushed.segments, 2);
    assert_eq!(open(a).push(shared).unwrap().segments, 0);
    let mut store = open(b);
    let pulled = store.pull(shared).unwrap();
    assert_eq!((pulled.segments, pulled.bytes), (2, pushed.bytes));
    assert_eq!((found(&store), pulled.refused.len()), (160, 0));
    assert_eq!(store.pull(shared).unwrap().segments, 0);
    drop(store);
    // The other way, and on: nothing that was fetched is sent back.
    append_sorted(b, 160..200);
    assert_eq!(open(b).push(shared).unwrap().segments, 1);
    assert_eq!(open(a).pull(shared).unwrap().segments, 1);
    expect_entries(a, 0..200);
    expect_entries(b, 0..200);
    // Of another scope there is nothing.
    let (mut other, _) = Store::open(b, &other_scope()).unwrap();
    assert_eq!(other.pull(shared).unwrap().segments, 0);
}

#[test]
fn what_one_machine_stored_another_finds() {
    let machines = Machines::new();
    let [a, b] = ["a", "b"].map(|name| machines.machine(name));
    check_sharing(&machines.shared, [&a, &b]);
}

#[cfg(feature = "object-store")]
#[test]
fn what_one_machine_stored_another_finds_through_an_object_store() {
    let directory = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
    let shared = Folder::open(Path::new("memory://refcache-sharing/reference")).unwrap();
    check_sharing(&shared, [&a, &b]);
}

#[test]
fn a_clean_up_merges_what_is_not_shared_and_leaves_the_rest() {
    let machines = Machines::new();
    let a = machines.machine("a");
    append_sorted(&a, 0..100);
    open(&a).push(&machines.shared).unwrap();
    assert_eq!(merge(&a), Action::Kept);
    append(&a, 90..120);
    append_sorted(&a, 110..150);
    assert_eq!(merge(&a), Action::Merged);
    assert_eq!(segments(&report(&a).folder).len(), 2);
    expect_entries(&a, 0..150);
    assert_eq!(open(&a).push(&machines.shared).unwrap().segments, 1);
    assert_eq!(machines.objects(), 2);
    let mut store = open(&a);
    assert_eq!(store.pull(&machines.shared).unwrap().segments, 0);
}

#[test]
fn every_flipped_bit_of_an_object_is_refused_by_name_and_its_entries_are_left_out() {
    let machines = Machines::new();
    let a = machines.machine("a");
    append_sorted(&a, 0..3);
    let pushed = open(&a).push(&machines.shared).unwrap();
    for bit in 0..pushed.bytes * 8 {
        machines.hostile.flip(".segment", bit);
        let directory = scratch();
        let mut store = open(directory.path());
        let pulled = store.pull(&machines.shared).unwrap();
        assert_eq!((pulled.segments, pulled.refused.len()), (0, 1), "bit {bit}");
        let error = pulled.refused[0].to_string();
        assert!(
            error.contains("shared") && error.contains(".segment"),
            "{error}"
        );
        assert_eq!(found(&store), 0);
        drop(store);
        let folder = report(directory.path()).folder;
        assert_eq!(
            std::fs::read_dir(folder).unwrap().count(),
            2,
            "scope.json and lock"
        );
        machines.hostile.heal();
        // The good one is fetched afterwards, once.
        if bit % 512 == 0 {
            assert_eq!(
                open(directory.path())
                    .pull(&machines.shared)
                    .unwrap()
                    .segments,
                1
            );
            expect_entries(directory.path(), 0..3);
        }
    }
}

#[test]
fn a_segment_under_another_ones_name_is_refused() {
    let machines = Machines::new();
    let a = machines.machine("a");
    append_sorted(&a, 0..10);
    append_sorted(&a, 10..20);
    open(&a).push(&machines.shared).unwrap();
    let folder = machines.whole().below(&report(&a).digest);
    let names: Vec<String> = folder.list().unwrap();
    let [one, other] = [0, 1].map(|index| folder.path().join(&names[index]));
    std::fs::copy(one, other).unwrap();
    let mut store = open(&machines.machine("b"));
    let pulled = store.pull(&machines.shared).unwrap();
    assert_eq!((pulled.segments, pulled.refused.len()), (1, 1));
    assert_eq!(found(&store), 10);
}

#[test]
fn lists_that_are_late_and_conditions_that_are_refused_cost_entries_and_nothing_else() {
    let machines = Machines::new();
    let [a, b] = ["a", "b"].map(|name| machines.machine(name));
    append_sorted(&a, 0..50);
    open(&a).push(&machines.shared).unwrap();
    machines.hostile.make_lists_stale();
    let mut store = open(&b);
    let late = store.pull(&machines.shared).unwrap();
    assert!(late.refused.is_empty());
    machines.hostile.heal();
    store.pull(&machines.shared).unwrap();
    assert_eq!(found(&store), 50);
    append_sorted(&a, 50..80);
    // From the next call on.
    let calls = machines.hostile.calls().len();
    let refusing = machines.hostile.clone().with(calls, Fault::Refuse);
    let shared = Folder::of(Arc::new(refusing));
    assert_eq!(open(&a).push(&shared).unwrap().segments, 1);
    machines.hostile.heal();
    store.pull(&machines.shared).unwrap();
    assert_eq!(found(&store), 80);
}

#[test]
fn every_fault_at_every_call_loses_nothing_and_the_next_try_goes_on() {
    let faults = [
        Fault::Fail,
        Fault::LoseAnswer,
        Fault::Crash,
        Fault::CrashAfter,
        Fault::Tear(100),
        Fault::Full,
    ];
    for fault in faults {
        for call in 0.. {
            let machines = Machines::new();
            let [a, b] = ["a", "b"].map(|name| machines.machine(name));
            append_sorted(&a, 0..150);
            append_sorted(&b, 100..200);
            let hostile = machines.hostile.clone().with(call, fault);
            let shared = Folder::of(Arc::new(hostile.clone()));
            let failed = [&a, &b].map(|machine| {
                let mut store = open(machine);
                let pushed = store.push(&shared).is_err();
                let pulled = store.pull(&shared);
                // What a process that dies leaves is the whole object or none.
                assert!(pulled.as_ref().is_ok_and(|it| it.refused.is_empty()) || pulled.is_err());
                pushed || pulled.is_err()
            });
            let whole = machines.whole();
            for machine in [&a, &b, &a] {
                let mut store = open(machine);
                store.push(&whole).unwrap();
                assert!(store.pull(&whole).unwrap().refused.is_empty());
            }
            expect_entries(&a, 0..200);
            expect_entries(&b, 0..200);
            assert_eq!(machines.objects(), 2, "{fault:?} at call {call}");
            if hostile.calls().len() <= call {
                assert!(call > 8 && failed == [false; 2]);
                break;
            }
        }
    }
}
