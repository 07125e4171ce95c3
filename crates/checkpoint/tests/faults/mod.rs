//! A save of step 20 by two ranks, over a checkpoint of step 10 that it replaces, on storage that fails.

use std::{error::Error, path::Path, sync::Arc};

use checkpoint::{Checkpoint, Kind, Retention, commit_in, newest_in, retain_in};
use storage::{
    Folder, Store,
    testing::{Fault, HostileStore},
};
use tempfile::TempDir;

use crate::support::{GENERATION, elements, info, tensors, values, write_in};

/// A directory in memory where there is one: these tests fail on their own, and wait for no disk.
pub fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    directory.unwrap()
}

/// Two ranks write, the coordinator commits and removes what is older.
pub fn save(dir: &Folder, generation: u64, step: u64) -> Result<(), Box<dyn Error>> {
    let ranks = (0..2).map(|rank| write_in(dir, generation, step, 2, rank));
    let ranks = ranks.collect::<Result<Vec<_>, _>>()?;
    commit_in(dir, &ranks, &info())?;
    let retention = Retention {
        keep_every_steps: 0,
        idle: false,
        keep_last: 1,
        best_first: &[],
        since: u64::MAX,
    };
    retain_in(dir, retention)?;
    Ok(())
}

/// The step that a run would resume from, all of whose values were read and are that step's.
pub fn resumes_from(dir: &Folder) -> Option<u64> {
    let (step, _) = newest_in(dir).unwrap().found?;
    let checkpoint = Checkpoint::open_in(&dir.below(&format!("step-{step:08}"))).unwrap();
    for kind in Kind::ALL {
        for (index, spec) in tensors().iter().enumerate() {
            let mut out = vec![0.0; elements(spec)];
            checkpoint.read(&spec.name, kind, 0, &mut out).unwrap();
            assert_eq!(out, values(step, index, kind, out.len()), "{}", spec.name);
        }
    }
    Some(step)
}

/// What must hold after a save of step 20 that ended so, told as `what`: one of the two checkpoints is there and whole, the new
/// one if the save said so; and the next generation's save succeeds over the remains, and leaves nothing but itself.
pub fn holds_and_goes_on(dir: &Folder, saved: bool, what: &str) {
    let found = resumes_from(dir);
    if saved {
        assert_eq!(found, Some(20), "{what}");
    } else {
        assert!([Some(10), Some(20)].contains(&found), "{what}: {found:?}");
    }
    save(dir, GENERATION + 1, 20).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(resumes_from(dir), Some(20), "{what}");
    assert_eq!(dir.list().unwrap(), ["step-00000020"], "{what}");
    assert_eq!(
        dir.below("step-00000020").list().unwrap().len(),
        3,
        "{what}"
    );
}

/// Every fault at every call of a save, each over a store of its own from `fresh`.
pub fn every_fault_at_every_call(fresh: &mut dyn FnMut() -> Arc<dyn Store>) {
    let faults = [
        Fault::Fail,
        Fault::LoseAnswer,
        Fault::Crash,
        Fault::CrashAfter,
        Fault::Tear(1),
        Fault::Full,
        Fault::Refuse,
    ];
    let mut run = |call: usize, fault: Fault| {
        let store = fresh();
        let dir = Folder::of(Arc::clone(&store));
        save(&dir, GENERATION, 10).unwrap();
        let hostile = HostileStore::new(store).with(call, fault);
        let saved = save(&Folder::of(Arc::new(hostile.clone())), GENERATION, 20);
        let calls = hostile.calls();
        let at = calls.get(call).map_or("nothing", String::as_str);
        let told = saved
            .as_ref()
            .map_or_else(ToString::to_string, |()| "saved".into());
        holds_and_goes_on(
            &dir,
            saved.is_ok(),
            &format!("{fault:?} at call {call}, {at}: {told}"),
        );
        (calls.len(), saved.is_ok())
    };
    let (calls, saved) = run(usize::MAX, Fault::Fail);
    assert!(saved && calls > 20, "{calls} calls");
    for fault in faults {
        let saves = (0..calls).filter(|call| run(*call, fault).1).count();
        // What fails only in tidying up does no harm to the save; most calls matter.
        assert!(
            saves < calls / 2 || fault == Fault::Refuse,
            "{fault:?}: {saves} of {calls}"
        );
    }
}
