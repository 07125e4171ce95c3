//! Segments of a shared folder become few, while others read it, write it and merge it too, and whatever fails: every entry can
//! be fetched at every moment.
#![allow(clippy::unwrap_used)]

mod support;

use std::{
    fs,
    ops::Range,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use refcache::{
    Action, Cleaning, Compaction, Extent, SHARED_SEGMENTS_MAX, Store, StoreError, clean, compact,
};
use storage::{
    Condition, Folder, LocalStore,
    testing::{Fault, disk::record},
};
use support::{
    append_sorted, entries, expect_entries,
    machines::{Machines, scratch},
    open, report,
};

/// What each of four segments has: some have the same.
const RANGES: [Range<u32>; 4] = [0..150, 100..160, 160..161, 0..40];
const ALL: Range<u32> = 0..161;

fn push(machine: &Path, shared: &Folder, range: Range<u32>) {
    append_sorted(machine, range);
    let pushed = open(machine).push(shared).unwrap();
    assert_eq!(pushed.segments, 1);
    assert!(matches!(pushed.compaction, Some(Ok(_))), "{pushed:?}");
}

/// A shared folder with a segment for each of [`RANGES`], all of machine `a`.
fn filled() -> Machines {
    let machines = Machines::new();
    for range in RANGES {
        push(&machines.machine("a"), &machines.whole(), range);
    }
    assert_eq!(machines.objects(), RANGES.len());
    machines
}

fn whole(machine: &Path, shared: &Folder) -> Result<Compaction, StoreError> {
    let (compaction, refused) = open(machine).compact(shared, Extent::Whole, SystemTime::now())?;
    assert!(refused.is_empty(), "{refused:?}");
    Ok(compaction)
}

/// A machine that has nothing finds everything.
fn expect_all(shared: &Folder) {
    let directory = scratch();
    let mut store = open(directory.path());
    let pulled = store.pull(shared).unwrap();
    assert!(pulled.refused.is_empty(), "{:?}", pulled.refused);
    for (key, value) in entries(ALL) {
        let found = store.get(&key).unwrap();
        assert_eq!(found.map(f32::to_bits), Some(value.to_bits()));
    }
}

/// As after `CLAIM`.
fn later() -> SystemTime {
    SystemTime::now() + Duration::from_hours(2)
}

/// The folder can be compacted, and was not harmed.
fn expect_whole_after_another(machines: &Machines) {
    let directory = scratch();
    let mut store = open(directory.path());
    let (compaction, refused) = store
        .compact(&machines.whole(), Extent::Whole, later())
        .unwrap();
    assert_ne!(compaction, Compaction::Claimed);
    assert!(refused.is_empty());
    drop(store);
    assert_eq!(machines.objects(), 1);
    expect_all(&machines.whole());
}

fn merge_local(machine: &Path) -> Action {
    let cleaning = Cleaning {
        unused_for: None,
        now: SystemTime::now(),
        dry_run: false,
    };
    let cleaned = clean(machine, &cleaning).unwrap();
    let scope = &cleaned.scopes[0];
    let after = report(machine);
    assert_eq!((scope.segments, scope.bytes), (after.segments, after.bytes));
    scope.action
}

fn check_whole(shared: &Folder, [a, b]: [&Path; 2]) {
    for range in RANGES {
        push(a, shared, range);
    }
    push(b, shared, 90..120);
    let (before, one) = (5 * 156, 156 + 36 * 161 + 40);
    let compaction = whole(b, shared).unwrap();
    let Compaction::Merged {
        segments,
        bytes_before,
        bytes: Some(bytes),
    } = compaction
    else {
        panic!("{compaction:?}");
    };
    assert_eq!(segments, 5);
    assert!(bytes_before > before && bytes <= one, "{compaction:?}");
    assert_eq!(whole(b, shared).unwrap(), Compaction::Unneeded);
    let directory = scratch();
    let pulled = open(directory.path()).pull(shared).unwrap();
    assert_eq!((pulled.segments, pulled.bytes), (1, bytes));
    expect_entries(directory.path(), ALL);
    // Whoever has the sources fetches the one, pushes nothing again, and keeps only it.
    for (machine, count) in [(a, 1), (b, 0)] {
        assert_eq!(open(machine).pull(shared).unwrap().segments, count);
        assert_eq!(open(machine).push(shared).unwrap().segments, 0);
        assert_eq!(merge_local(machine), Action::Merged);
        assert_eq!(merge_local(machine), Action::Kept);
        assert_eq!(report(machine).segments, 1);
        expect_entries(machine, ALL);
    }
}

#[test]
fn all_segments_become_one_and_machines_keep_only_that() {
    let machines = Machines::new();
    let [a, b] = ["a", "b"].map(|name| machines.machine(name));
    check_whole(&machines.shared, [&a, &b]);
}

#[cfg(feature = "object-store")]
#[test]
fn all_segments_become_one_in_an_object_store() {
    let directory = scratch();
    let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
    let shared = Folder::open(Path::new("memory://refcache-compacting/reference")).unwrap();
    check_whole(&shared, [&a, &b]);
}

#[cfg(feature = "object-store")]
#[test]
#[ignore = "needs a server: tests/s3.py starts one and names a folder in REFCACHE_TEST_URL"]
fn all_segments_become_one_on_a_server_of_the_environment() {
    let directory = scratch();
    let [a, b, c] = ["a", "b", "c"].map(|name| directory.path().join(name));
    let url = std::env::var_os("REFCACHE_TEST_URL").expect("REFCACHE_TEST_URL names a folder");
    let shared = Folder::open(Path::new(&url)).unwrap();
    check_whole(&shared.below("whole"), [&a, &b]);
    // What `coordinator cache gc` is tried on.
    for range in RANGES {
        push(&c, &shared, range);
    }
}

#[test]
fn pushes_keep_the_folder_small_and_a_fresh_machine_opens_few_objects() {
    let machines = Machines::new();
    let pushes = SHARED_SEGMENTS_MAX as u32 * 3;
    for index in 0..pushes {
        // Two machines in turn, and every value twice.
        let machine = machines.machine(["a", "b"][index as usize % 2]);
        push(&machine, &machines.shared, index..index + 2);
        assert!(machines.objects() <= SHARED_SEGMENTS_MAX);
    }
    let directory = scratch();
    let pulled = open(directory.path()).pull(&machines.shared).unwrap();
    assert!(pulled.segments <= SHARED_SEGMENTS_MAX);
    expect_entries(directory.path(), 0..pushes + 1);
    // Each push was 156 bytes and two entries of 36.
    assert!(
        pulled.bytes < u64::from(pushes) * 228 / 2,
        "{} bytes",
        pulled.bytes
    );
}

#[test]
fn every_fault_at_every_call_of_a_compaction_loses_nothing_and_the_next_one_goes_on() {
    let faults = [
        Fault::Fail,
        Fault::LoseAnswer,
        Fault::Crash,
        Fault::CrashAfter,
        Fault::Tear(100),
        Fault::Full,
        Fault::Refuse,
        Fault::NoConditions,
    ];
    for fault in faults {
        for call in 0.. {
            let machines = filled();
            let hostile = machines.hostile.clone().with(call, fault);
            let b = machines.machine("b");
            let compacted = whole(&b, &Folder::of(Arc::new(hostile.clone())));
            expect_all(&machines.whole());
            expect_whole_after_another(&machines);
            // What the failed one left here is no trap, and no half of a segment.
            let mut files = fs::read_dir(report(&b).folder).unwrap();
            assert!(files.all(|it| {
                it.unwrap()
                    .path()
                    .extension()
                    .is_none_or(|it| it != "merging")
            }));
            open(&b).push(&machines.whole()).unwrap();
            open(&b).pull(&machines.whole()).unwrap();
            expect_entries(&b, ALL);
            if hostile.calls().len() <= call {
                assert!(call > 20, "{call}");
                assert!(matches!(compacted, Ok(Compaction::Merged { .. })));
                break;
            }
        }
    }
}

/// What others do right before every call of a compaction; afterwards all is there.
fn at_every_call_of_a_compaction(others: fn(&Path)) {
    for call in 0.. {
        let machines = filled();
        let directory = machines.directory.path().to_owned();
        let meanwhile = move || others(&directory);
        let hostile = machines.hostile.clone().meanwhile(call, meanwhile);
        let shared = Folder::of(Arc::new(hostile.clone()));
        let compacted = whole(&machines.machine("b"), &shared);
        compacted.unwrap();
        expect_all(&machines.whole());
        expect_whole_after_another(&machines);
        if hostile.calls().len() <= call {
            assert!(call > 20, "{call}");
            break;
        }
    }
}

fn shared_in(directory: &Path) -> Folder {
    Folder::of(Arc::new(LocalStore::new(directory.join("shared"))))
}

#[test]
fn whoever_pulls_at_any_call_of_a_compaction_finds_everything() {
    at_every_call_of_a_compaction(|directory| expect_all(&shared_in(directory)));
}

#[test]
fn another_compaction_at_any_call_loses_nothing() {
    at_every_call_of_a_compaction(|directory| {
        // The claim has expired for it.
        let mut other = open(&directory.join("c"));
        let compacted = other.compact(&shared_in(directory), Extent::Whole, later());
        assert_ne!(compacted.unwrap().0, Compaction::Claimed);
    });
}

#[test]
fn another_compaction_with_more_entries_at_any_call_loses_nothing() {
    at_every_call_of_a_compaction(|directory| {
        // So that its result is another one.
        let (shared, c) = (shared_in(directory), directory.join("c"));
        push(&c, &shared, 50..170);
        let mut other = open(&c);
        let compacted = other.compact(&shared, Extent::Whole, later()).unwrap();
        assert_ne!(compacted.0, Compaction::Claimed);
    });
}

#[test]
fn a_push_at_any_call_of_a_compaction_keeps_its_entries() {
    at_every_call_of_a_compaction(|directory| {
        // Of a segment that is merged right now, too.
        let (shared, c) = (shared_in(directory), directory.join("c"));
        push(&c, &shared, RANGES[1].clone());
        push(&c, &shared, 30..40);
    });
}

#[test]
fn compactions_at_any_call_of_a_pull_cost_it_no_entry() {
    for call in 0.. {
        let machines = filled();
        let directory = machines.directory.path().to_owned();
        let meanwhile = move || {
            let compacted = whole(&directory.join("c"), &shared_in(&directory)).unwrap();
            assert!(matches!(compacted, Compaction::Merged { .. }));
        };
        let hostile = machines.hostile.clone().meanwhile(call, meanwhile);
        expect_all(&Folder::of(Arc::new(hostile.clone())));
        if hostile.calls().len() <= call {
            assert!(call > 8, "{call}");
            break;
        }
    }
}

#[test]
fn a_list_that_is_late_costs_a_compaction_and_a_pull_nothing_but_work() {
    let machines = filled();
    let [b, c] = ["b", "c"].map(|name| machines.machine(name));
    // Both have listed the sources.
    for machine in [&b, &c] {
        open(machine).pull(&machines.shared).unwrap();
    }
    push(&machines.machine("a"), &machines.whole(), 0..2);
    whole(&machines.machine("a"), &machines.whole()).unwrap();
    machines.hostile.make_lists_stale();
    // Of what is gone; and it has no segment that it does not know.
    let directory = scratch();
    assert_eq!(
        open(directory.path())
            .pull(&machines.shared)
            .unwrap()
            .segments,
        0
    );
    assert!(matches!(
        whole(&b, &machines.shared),
        Ok(Compaction::Merged { .. })
    ));
    machines.hostile.heal();
    expect_all(&machines.whole());
    expect_whole_after_another(&machines);
}

#[test]
fn refused_conditions_leave_a_folder_as_it_is_and_a_store_without_any_is_compacted() {
    for (fault, expected) in [(Fault::Refuse, 4), (Fault::NoConditions, 1)] {
        let machines = filled();
        let hostile = machines.hostile.clone().with(0, fault);
        let compacted = whole(&machines.machine("b"), &Folder::of(Arc::new(hostile)));
        assert_eq!(compacted.unwrap() == Compaction::Claimed, expected == 4);
        assert_eq!(machines.objects(), expected);
        expect_all(&machines.whole());
    }
}

#[test]
fn a_claim_holds_for_an_hour_and_neither_longer_nor_when_it_is_none() {
    let machines = filled();
    let scope = machines.scope();
    let claim = |text: &str| {
        let _ = scope
            .put("compacting.json", text.as_bytes(), Condition::Always)
            .unwrap();
    };
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let try_at = |seconds| {
        let directory = scratch();
        let mut store = open(directory.path());
        let compacted = store.compact(&machines.whole(), Extent::Whole, at(seconds));
        compacted.unwrap().0
    };
    claim(r#"{"by": "x", "until": 10000}"#);
    for claimed in [10000, 8000, 6400] {
        assert_eq!(try_at(claimed), Compaction::Claimed);
    }
    for (text, now) in [
        (r#"{"by": "x", "until": 10000}"#, 10001),
        (r#"{"by": "x", "until": 10000}"#, 6399),
        (r#"{"by": "x", "until": "#, 8000),
        ("", 8000),
    ] {
        let again = filled();
        let _ = again
            .scope()
            .put("compacting.json", text.as_bytes(), Condition::Always)
            .unwrap();
        let mut store = open(&again.machine("b"));
        let compacted = store.compact(&again.whole(), Extent::Whole, at(now));
        assert!(
            matches!(compacted.unwrap().0, Compaction::Merged { .. }),
            "{text}"
        );
        assert!(again.scope().read("compacting.json").unwrap().is_none());
    }
    assert_eq!(machines.objects(), 4);
}

#[test]
fn what_is_damaged_or_contradicts_is_told_and_stays() {
    let machines = filled();
    let names = machines.scope().list().unwrap();
    let damaged = names
        .iter()
        .find(|name| name.ends_with(".segment"))
        .unwrap();
    let path = machines.scope().path().join(damaged);
    let mut bytes = fs::read(&path).unwrap();
    bytes[100] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let directory = scratch();
    let scopes = compact(&machines.whole(), directory.path(), later(), false).unwrap();
    assert_eq!((scopes.len(), scopes[0].segments), (1, 4));
    assert!(matches!(
        scopes[0].compaction,
        Compaction::Merged { segments: 3, .. }
    ));
    let [damage] = &scopes[0].damages[..] else {
        panic!("{scopes:?}");
    };
    assert!(damage.to_string().contains(damaged), "{damage}");
    assert_eq!(machines.objects(), 2);
    assert_eq!(fs::read(&path).unwrap(), bytes);

    let machines = filled();
    let (key, value) = entries(4..5)[0];
    let other = open(&machines.machine("b"));
    let mut writer = other.writer().unwrap();
    let changed = f32::from_bits(value.to_bits() + 1);
    writer.append(&[(key, changed)]).unwrap();
    writer.finish().unwrap();
    drop(other);
    open(&machines.machine("b"))
        .push(&machines.whole())
        .unwrap();
    let scopes = compact(&machines.whole(), directory.path(), later(), false).unwrap();
    assert!(matches!(
        scopes[0].damages[..],
        [StoreError::Contradiction { .. }]
    ));
    assert_eq!(machines.objects(), 5);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_dry_run_tells_and_changes_nothing_and_scopes_are_taken_one_by_one() {
    let machines = filled();
    let (mut other, _) = Store::open(&machines.machine("a"), &support::other_scope()).unwrap();
    let mut writer = other.writer().unwrap();
    writer.append(&entries(0..3)).unwrap();
    writer.finish().unwrap();
    other.push(&machines.whole()).unwrap();
    drop(other);
    let directory = scratch();
    let run = |dry_run| {
        let scopes = compact(&machines.whole(), directory.path(), later(), dry_run).unwrap();
        let mut found: Vec<_> = scopes
            .iter()
            .map(|it| (it.segments, it.compaction))
            .collect();
        found.sort_by_key(|(segments, _)| *segments);
        found
    };
    let before = run(true);
    assert_eq!(before, run(true));
    let [
        (1, Compaction::Unneeded),
        (
            4,
            Compaction::Merged {
                segments: 4,
                bytes_before,
                bytes: None,
            },
        ),
    ] = before[..]
    else {
        panic!("{before:?}");
    };
    let after = run(false);
    let (
        _,
        Compaction::Merged {
            bytes_before: same,
            bytes: Some(bytes),
            ..
        },
    ) = after[1]
    else {
        panic!("{after:?}");
    };
    assert_eq!(bytes_before, same);
    assert!(bytes < bytes_before);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    assert_eq!(run(false), [(1, Compaction::Unneeded); 2]);
    expect_all(&machines.whole());
}

#[test]
fn a_folder_that_gives_other_bytes_back_keeps_its_sources() {
    let machines = filled();
    let b = machines.machine("b");
    open(&b).pull(&machines.whole()).unwrap();
    // Of what is read from now on, the result alone.
    machines.hostile.flip(".segment", 1000);
    let error = whole(&b, &machines.shared).unwrap_err();
    assert!(
        error.to_string().contains("reads back differently"),
        "{error}"
    );
    assert_eq!(error.place().unwrap().1, 125);
    machines.hostile.heal();
    assert_eq!(machines.objects(), 5);
    expect_all(&machines.whole());
}

/// In earnest, each with a store of its own.
#[test]
fn several_that_push_compact_and_pull_at_once_lose_nothing() {
    let machines = Machines::new();
    let directory = machines.directory.path();
    let push_all = |name: &str, first: u32| {
        // So far apart that nobody respects another's claim.
        let clock = SystemTime::now() + first * Duration::from_hours(3);
        let shared = shared_in(directory);
        for index in (first..ALL.end).step_by(3) {
            append_sorted(&directory.join(name), index..index + 1);
            open(&directory.join(name)).push(&shared).unwrap();
            let mut store = open(&directory.join(name));
            store.compact(&shared, Extent::Whole, clock).unwrap();
        }
    };
    std::thread::scope(|scope| {
        for (name, first) in [("a", 0), ("b", 1), ("c", 2)] {
            scope.spawn(move || push_all(name, first));
        }
    });
    expect_all(&machines.whole());
}

/// Of the disk under the shared folder and of that of the machine.
#[test]
fn a_power_cut_at_any_step_of_a_compaction_loses_nothing() {
    let parent = scratch();
    let dir = parent.path().join("recorded");
    fs::create_dir(&dir).unwrap();
    for range in RANGES {
        push(&dir.join("a"), &shared_in(&dir), range);
    }
    let compacting = || whole(&dir.join("b"), &shared_in(&dir)).unwrap();
    let (_, recording) = record(&dir, None, compacting).unwrap();
    assert!(recording.steps() > 20, "{}", recording.steps());
    for steps in 0..=recording.steps() {
        for choice in 0..6 {
            let target = parent.path().join("crashed");
            recording.crash(steps, choice, &target).unwrap();
            expect_all(&shared_in(&target));
            let fresh = scratch();
            let mut store = open(fresh.path());
            let again = store.compact(&shared_in(&target), Extent::Whole, later());
            assert!(again.unwrap().1.is_empty());
            expect_all(&shared_in(&target));
            fs::remove_dir_all(&target).unwrap();
        }
    }
}
