//! Which checkpoints stay: the newest, the best that is there, every so many, pinned ones; and what goes of a cut-short save.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;

use checkpoint::{
    Checkpoint, CheckpointError, Condition, Fate, Retention, apply, newest, pin, pinned, plan,
    retain, unpin, visible,
};
use support::{GENERATION, save, write};

const LAST: Retention<'static> = Retention {
    keep_last: 1,
    keep_every_steps: 0,
    best_first: &[],
    since: u64::MAX,
    idle: false,
};

/// Steps of the checkpoints that stay of 10, 20, …, 60.
fn stay(retention: Retention<'_>) -> Vec<u64> {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let steps = [10, 20, 30, 40, 50, 60];
    for step in steps {
        save(dir, step, 1);
    }
    // The second has lost a file: it cannot be the best.
    let rank = fs::read_dir(dir.join("step-00000020"))
        .unwrap()
        .find_map(|entry| {
            let path = entry.unwrap().path();
            path.extension()
                .is_some_and(|it| it == "safetensors")
                .then_some(path)
        });
    fs::remove_file(rank.unwrap()).unwrap();
    let removed = retain(dir, retention).unwrap();
    let left = steps
        .into_iter()
        .filter(|step| visible(dir, *step).is_some());
    let left: Vec<u64> = left.collect();
    assert_eq!(removed.len() + left.len(), steps.len());
    left
}

#[test]
fn the_best_stays_besides_the_newest() {
    let keep = |keep_last, best_first| Retention {
        keep_last,
        best_first,
        ..LAST
    };
    // 20 is damaged, which neither counts nor goes.
    assert_eq!(stay(keep(2, &[])), [20, 50, 60]);
    assert_eq!(stay(keep(2, &[10, 30])), [10, 20, 50, 60]);
    assert_eq!(
        stay(keep(2, &[60, 10])),
        [20, 50, 60],
        "it is among the newest"
    );
    assert_eq!(
        stay(keep(1, &[20, 35, 30, 10])),
        [20, 30, 60],
        "the best that is there"
    );
}

#[test]
fn what_may_yet_be_the_best_stays() {
    let retention = Retention {
        best_first: &[10],
        since: 40,
        ..LAST
    };
    assert_eq!(stay(retention), [10, 20, 40, 50, 60]);
}

#[test]
fn every_so_many_steps_one_stays() {
    let every = |keep_every_steps| Retention {
        keep_every_steps,
        ..LAST
    };
    assert_eq!(stay(every(30)), [20, 30, 60]);
    assert_eq!(stay(every(10)), [10, 20, 30, 40, 50, 60]);
    assert_eq!(stay(every(7)), [20, 60]);
}

#[test]
fn a_pinned_checkpoint_stays_until_it_is_unpinned() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let [first, second, _] = [10, 20, 30].map(|step| save(dir, step, 2).path);
    pin(&first, "the paper's table 2").unwrap();
    assert_eq!(
        pinned(&first).unwrap().as_deref(),
        Some("the paper's table 2")
    );
    // The pin is nothing that was left behind, and saving the step again keeps it.
    let verified = Checkpoint::open(&first).unwrap().verify().unwrap();
    assert_eq!(verified.unlisted, Vec::<String>::new());
    save(dir, 10, 2);
    assert!(pinned(&first).unwrap().is_some());
    assert_eq!(retain(dir, LAST).unwrap(), [second]);
    assert!(unpin(&first).unwrap());
    assert!(!unpin(&first).unwrap());
    assert_eq!(retain(dir, LAST).unwrap(), [first]);
    // What is no checkpoint cannot be pinned.
    write(dir, GENERATION, 40, 2, 0);
    let refused = pin(&dir.join("step-00000040"), "");
    assert!(matches!(refused, Err(CheckpointError::Incomplete { .. })));
}

#[test]
fn a_plan_changes_nothing_and_is_what_happens() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    for step in [10, 20, 30] {
        save(dir, step, 1);
    }
    write(dir, GENERATION, 15, 2, 0);
    write(dir, GENERATION, 40, 2, 0);
    // Saved again by the next generation, which did not come to its end.
    let leftover = write(dir, GENERATION + 1, 20, 1, 0).file.name;
    let newest = write(dir, GENERATION + 1, 30, 1, 0).file.name;
    let two = Retention {
        keep_last: 2,
        ..LAST
    };
    let planned = plan(dir, two, &|_| ()).unwrap();
    let fates: Vec<(u64, Fate)> = planned.iter().map(|it| (it.step, it.fate)).collect();
    let expected = [
        (40, Fate::Unfinished),
        (30, Fate::Newest),
        (20, Fate::Last),
        (15, Fate::Remains),
        (10, Fate::Old),
    ];
    assert_eq!(fates, expected);
    assert_eq!(planned[2].leftovers, [leftover.as_str()]);
    // It may be the next checkpoint of this step that is being saved.
    assert_eq!(planned[1].leftovers, Vec::<String>::new());
    assert!(planned.iter().all(|it| it.bytes > 0));
    assert!(planned.iter().all(|it| it.path.exists()), "nothing went");
    assert_eq!(planned, plan(dir, two, &|_| ()).unwrap());
    // Pinned between plan and deed.
    pin(&dir.join("step-00000010"), "").unwrap();
    assert_eq!(apply(dir, &planned).unwrap(), [dir.join("step-00000015")]);
    assert!(!dir.join("step-00000020").join(leftover).exists());
    assert!(dir.join("step-00000030").join(&newest).exists());
    let idle = Retention { idle: true, ..two };
    assert_eq!(retain(dir, idle).unwrap(), [dir.join("step-00000040")]);
    assert!(!dir.join("step-00000030").join(&newest).exists());
    for step in [10, 20, 30] {
        let path = visible(dir, step).unwrap();
        Checkpoint::open(&path).unwrap().verify().unwrap();
    }
}

#[test]
fn the_newest_is_read_whole_before_anything_goes_and_not_otherwise() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    for step in [10, 20, 30] {
        save(dir, step, 1);
    }
    let read = std::sync::atomic::AtomicU64::new(0);
    let count = |bytes| {
        read.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    };
    let all = Retention {
        keep_last: 3,
        ..LAST
    };
    plan(dir, all, &count).unwrap();
    assert_eq!(read.swap(0, std::sync::atomic::Ordering::Relaxed), 0);
    // A byte of the newest's values: its size and manifest are as they were.
    let newest = Checkpoint::open(&visible(dir, 30).unwrap()).unwrap();
    let file = newest.path().join(&newest.manifest().files[0].name);
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let planned = plan(dir, LAST, &count).unwrap();
    assert!(read.into_inner() > newest.bytes());
    assert_eq!(planned[0].condition, Condition::Damaged);
    assert_eq!(planned[1].fate, Fate::Newest);
    assert_eq!(apply(dir, &planned).unwrap(), [dir.join("step-00000010")]);
}

#[test]
fn a_removal_cut_short_anywhere_is_ended_by_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    for done in 0..=4 {
        let old = save(dir, 10, 3).path;
        save(dir, 20, 3);
        // The manifest goes first, then the files in any order, then the folder.
        let mut names: Vec<_> = fs::read_dir(&old)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        names.sort();
        assert!(names[0].ends_with("manifest.json"));
        for path in &names[..done] {
            fs::remove_file(path).unwrap();
        }
        assert_eq!(visible(dir, 10).is_some(), done == 0);
        assert_eq!(newest(dir).unwrap().refused, []);
        assert_eq!(retain(dir, LAST).unwrap(), [old], "after {done} files");
        assert_eq!(newest(dir).unwrap().found.unwrap().0, 20);
    }
}
