//! C1 on a local disk that fails at any call, at any system call, or loses its power after any of them.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "faults/mod.rs"]
mod faults;
#[allow(dead_code, reason = "other tests use the rest")]
mod support;

use std::{fs, sync::Arc};

use faults::{every_fault_at_every_call, holds_and_goes_on, resumes_from, save, scratch};
use storage::{
    Folder, LocalStore, Store,
    testing::disk::{self, DiskFault},
};
use support::GENERATION;

/// What a crash may leave, by choice: nothing unsynced, everything, and what seeds say.
const CHOICES: u64 = 12;

#[test]
fn c1_any_fault_at_any_call_leaves_a_whole_checkpoint() {
    let mut directories = Vec::new();
    every_fault_at_every_call(&mut || -> Arc<dyn Store> {
        directories.clear();
        directories.push(scratch());
        Arc::new(LocalStore::new(directories[0].path()))
    });
}

#[test]
fn c1_a_power_cut_after_any_step_leaves_a_whole_checkpoint_and_keeps_what_was_acknowledged() {
    let directory = scratch();
    let dir = Folder::open(directory.path()).unwrap();
    save(&dir, GENERATION, 10).unwrap();
    let (saved, recording) = disk::record(directory.path(), None, || {
        save(&dir, GENERATION, 20).map_err(|error| error.to_string())
    })
    .unwrap();
    saved.unwrap();
    assert!(recording.steps() > 20, "{} steps", recording.steps());
    let target = scratch();
    let mut found = [0; 2];
    for steps in 0..=recording.steps() {
        for choice in 0..CHOICES {
            let at = target.path().join("state");
            recording.crash(steps, choice, &at).unwrap();
            let dir = Folder::open(&at).unwrap();
            let what = format!(
                "power cut after {steps} of {} steps, choice {choice}",
                recording.steps()
            );
            let step = resumes_from(&dir);
            match step {
                Some(10) if steps < recording.steps() => found[0] += 1,
                Some(20) => found[1] += 1,
                _ => panic!("{what}: {step:?}"),
            }
            if choice < 3 {
                holds_and_goes_on(&dir, false, &what);
            }
            fs::remove_dir_all(&at).unwrap();
        }
    }
    assert!(found[0] > 0 && found[1] > 0, "{found:?}");
}

#[test]
fn c1_a_disk_that_fails_or_fills_up_at_any_step_leaves_a_whole_checkpoint() {
    for fault in [DiskFault::Fail, DiskFault::Full] {
        let mut failed = 0;
        let mut step = 0;
        loop {
            let directory = scratch();
            let dir = Folder::open(directory.path()).unwrap();
            save(&dir, GENERATION, 10).unwrap();
            let act = || save(&dir, GENERATION, 20).map_err(|error| error.to_string());
            let (saved, recording) =
                disk::record(directory.path(), Some((step, fault)), act).unwrap();
            let told = saved
                .as_ref()
                .map_or_else(Clone::clone, |()| "saved".into());
            holds_and_goes_on(
                &dir,
                saved.is_ok(),
                &format!("{fault:?} at step {step}: {told}"),
            );
            failed += usize::from(saved.is_err());
            if step > recording.steps() {
                break;
            }
            step += 1;
        }
        assert!(failed > step / 4, "{fault:?}: {failed} of {step}");
    }
}
