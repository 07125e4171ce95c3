//! C1 and C2 in an object store, and what only an object store can do to a checkpoint.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "faults/mod.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod faults;
#[allow(dead_code, reason = "other tests use the rest")]
mod support;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use checkpoint::{
    Checkpoint, CommitError, Kind, Newest, Retention, commit, commit_in, newest, newest_in, retain,
    visible,
};
use faults::{every_fault_at_every_call, resumes_from, save};
use storage::{
    Condition, FileError, Folder, Object, Put, Store, Upload,
    testing::{Fault, HostileStore},
};
use support::{GENERATION, elements, info, tensors, values, write, write_in};

/// A store in memory with nothing in it.
fn memory() -> Arc<dyn Store> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let url = format!(
        "memory://checkpoints-{}/run",
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    storage::open(Path::new(&url)).unwrap()
}

#[test]
fn c1_any_fault_at_any_call_leaves_a_whole_checkpoint() {
    every_fault_at_every_call(&mut memory);
}

#[test]
fn a_url_serves_wherever_a_path_does() {
    let dir = Path::new("memory://everywhere/runs/1/checkpoints");
    assert_eq!(newest(dir).unwrap(), Newest::default());
    for step in [10, 20, 30] {
        let ranks = [0, 1].map(|rank| write(dir, GENERATION, step, 2, rank));
        assert_eq!(visible(dir, step), None);
        let committed = commit(dir, &ranks, &info()).unwrap();
        assert_eq!(committed.path, dir.join(format!("step-{step:08}")));
        assert_eq!(visible(dir, step), Some(committed.path));
    }
    let newest = newest(dir).unwrap();
    assert_eq!(newest.found, Some((30, dir.join("step-00000030"))));
    let checkpoint = Checkpoint::open(&dir.join("step-00000030")).unwrap();
    assert_eq!(checkpoint.verify().unwrap().files, 2);
    let spec = &tensors()[2];
    let mut out = vec![0.0; elements(spec) - 3];
    checkpoint
        .read(&spec.name, Kind::FirstMoment, 3, &mut out)
        .unwrap();
    assert_eq!(out, values(30, 2, Kind::FirstMoment, elements(spec))[3..]);
    let retention = Retention {
        keep_every_steps: 0,
        idle: false,
        keep_last: 1,
        best_first: &[10],
        since: u64::MAX,
    };
    assert_eq!(retain(dir, retention).unwrap(), [dir.join("step-00000020")]);
    assert_eq!(visible(dir, 20), None);
}

#[test]
fn c2_a_bit_that_is_read_wrongly_is_found_before_use() {
    let inner = memory();
    let dir = Folder::of(Arc::clone(&inner));
    save(&dir, GENERATION, 10).unwrap();
    let folder = dir.below("step-00000010");
    for name in folder.list().unwrap() {
        let bits = 8 * folder.object(&name).unwrap().unwrap().bytes();
        for bit in (0..bits).step_by(101) {
            let hostile = HostileStore::new(Arc::clone(&inner));
            hostile.flip(&name, bit);
            let newest = newest_in(&Folder::of(Arc::new(hostile))).unwrap();
            assert_eq!(newest.found, None, "bit {bit} of {name}");
            assert!(newest.refused[0].1.contains(&name), "{newest:?}");
        }
    }
    assert_eq!(resumes_from(&dir), Some(10));
}

#[test]
fn a_store_that_cannot_be_read_for_a_moment_has_no_older_newest_checkpoint() {
    let inner = memory();
    let dir = Folder::of(Arc::clone(&inner));
    for step in [10, 20] {
        let rank = write_in(&dir, GENERATION, step, 1, 0).unwrap();
        commit_in(&dir, &[rank], &info()).unwrap();
    }
    let hostile = HostileStore::new(Arc::clone(&inner));
    newest_in(&Folder::of(Arc::new(hostile.clone()))).unwrap();
    let calls = hostile.calls().len();
    assert!(calls > 2, "{calls}");
    for call in 0..calls {
        let hostile = HostileStore::new(Arc::clone(&inner)).with(call, Fault::Fail);
        let newest = newest_in(&Folder::of(Arc::new(hostile)));
        assert!(newest.is_err(), "call {call}: {newest:?}");
    }
}

#[test]
fn a_list_of_yesterday_costs_no_checkpoint() {
    let inner = memory();
    let hostile = HostileStore::new(Arc::clone(&inner));
    let (dir, stale) = (Folder::of(inner), Folder::of(Arc::new(hostile.clone())));
    save(&stale, GENERATION, 10).unwrap();
    assert_eq!(resumes_from(&stale), Some(10));
    hostile.make_lists_stale();
    // The list does not show the new one, so the old one is the newest, and is kept.
    save(&stale, GENERATION, 20).unwrap();
    assert_eq!(resumes_from(&stale), Some(10));
    assert_eq!(resumes_from(&dir), Some(20));
    // The list shows one that is gone.
    hostile.heal();
    assert_eq!(stale.list().unwrap().len(), 2);
    hostile.make_lists_stale();
    save(&dir, GENERATION, 20).unwrap();
    assert_eq!(dir.list().unwrap(), ["step-00000020"]);
    assert_eq!(resumes_from(&stale), Some(20));
}

/// Lets somebody else act between a look and the put that follows from it.
struct Interrupted {
    inner: Arc<dyn Store>,
    before_put: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl std::fmt::Debug for Interrupted {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(formatter)
    }
}

impl Store for Interrupted {
    fn path(&self, key: &str) -> PathBuf {
        self.inner.path(key)
    }

    fn put(&self, key: &str, bytes: &[u8], condition: Condition<'_>) -> Result<Put, FileError> {
        let act = self.before_put.lock().unwrap().pop();
        if let Some(act) = act {
            act();
        }
        self.inner.put(key, bytes, condition)
    }

    fn create(&self, key: &str, bytes: u64) -> Result<Box<dyn Upload>, FileError> {
        self.inner.create(key, bytes)
    }

    fn open(&self, key: &str) -> Result<Option<Box<dyn Object>>, FileError> {
        self.inner.open(key)
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, FileError> {
        self.inner.list(folder)
    }

    fn remove(&self, key: &str) -> Result<(), FileError> {
        self.inner.remove(key)
    }

    fn remove_all(&self, folder: &str) -> Result<(), FileError> {
        self.inner.remove_all(folder)
    }
}

/// Commits step 20 by `generation` while `others` commit it, one between each look and put.
fn interrupted(generation: u64, others: &[u64]) -> (Folder, Result<(), CommitError>) {
    let inner = memory();
    let dir = Folder::of(Arc::clone(&inner));
    let before_put = others
        .iter()
        .rev()
        .map(|&other| -> Box<dyn FnOnce() + Send> {
            let dir = dir.clone();
            Box::new(move || {
                let ranks = [0, 1].map(|rank| write_in(&dir, other, 20, 2, rank).unwrap());
                commit_in(&dir, &ranks, &info()).unwrap();
            })
        });
    let store = Interrupted {
        before_put: Mutex::new(before_put.collect()),
        inner,
    };
    let ranks = [0, 1].map(|rank| write_in(&dir, generation, 20, 2, rank).unwrap());
    let committed = commit_in(&Folder::of(Arc::new(store)), &ranks, &info());
    (dir, committed.map(drop))
}

fn generation_of(dir: &Folder) -> u64 {
    let checkpoint = Checkpoint::open_in(&dir.below("step-00000020")).unwrap();
    checkpoint.manifest().generation
}

#[test]
fn a_dead_generation_cannot_replace_what_a_later_one_commits_at_the_same_moment() {
    let (dir, committed) = interrupted(GENERATION, &[GENERATION + 1]);
    let error = committed.unwrap_err();
    assert!(
        matches!(error, CommitError::Stale { committed, .. } if committed == GENERATION + 1),
        "{error}"
    );
    assert_eq!(resumes_from(&dir), Some(20));
    assert_eq!(generation_of(&dir), GENERATION + 1);
}

#[test]
fn a_later_generation_goes_over_what_a_dead_one_commits_at_the_same_moment() {
    let (dir, committed) = interrupted(GENERATION, &[GENERATION - 2, GENERATION - 1]);
    committed.unwrap();
    // Nor do they take this generation's files for remains.
    assert_eq!(resumes_from(&dir), Some(20));
    assert_eq!(generation_of(&dir), GENERATION);
}
