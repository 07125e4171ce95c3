//! Which checkpoints stay and which go: the rule as a pure function, what it finds on disk, and the removal. Pins are here,
//! because nothing else asks for them.

use std::path::{Path, PathBuf};

use serde::Serialize;
use storage::{Condition as On, FileError, Folder};

use crate::{
    digest::Watch,
    folder::{self, MANIFEST},
    history::open_as,
    read::CheckpointError,
};

/// Which checkpoints stay. The newest that holds stays in any case, and so do pinned ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention<'a> {
    /// The newest so many, at least one.
    pub keep_last: usize,
    /// Those of steps that are a multiple of this; 0 for none.
    pub keep_every_steps: u64,
    /// Steps, the best first: besides the newest, the first of these that has a checkpoint keeps it.
    pub best_first: &'a [u64],
    /// Nothing of this step or later goes: what `best_first` knows ends there.
    pub since: u64,
    /// Whether nobody is saving: what lies unfinished in or behind the newest goes too then.
    pub idle: bool,
}

/// What is known of a checkpoint's folder without reading its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// Manifest and files are there. Of the newest, every byte was verified before anything goes.
    Whole,
    /// It has a manifest and does not hold.
    Damaged,
    /// A save that was cut short or is going on: there is no manifest.
    Unfinished,
}

/// What happens to a folder, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Stays: the newest that holds.
    Newest,
    /// Stays: one of the last so many.
    Last,
    /// Stays: pinned.
    Pinned,
    /// Stays: the best that is there.
    Best,
    /// Stays: its step is a multiple of `keep_every_steps`.
    Every,
    /// Stays: it may yet be the best.
    Undecided,
    /// Stays: it does not hold, which somebody should look at.
    Damaged,
    /// Stays: it may be a save in progress, or nothing that holds is newer.
    Unfinished,
    /// Goes: nothing keeps it.
    Old,
    /// Goes: what a save that was cut short left.
    Remains,
}

impl Fate {
    /// Whether the folder goes.
    pub fn goes(self) -> bool {
        matches!(self, Self::Old | Self::Remains)
    }
}

/// A folder and what happens to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Planned {
    /// Step that it is named after.
    pub step: u64,
    /// The folder.
    pub path: PathBuf,
    /// Size of its rank files, or of what is there where it is not whole.
    pub bytes: u64,
    /// What is known of it.
    pub condition: Condition,
    /// Whether it is pinned.
    pub pinned: bool,
    /// What happens to it.
    pub fate: Fate,
    /// Files in a folder that stays which an earlier save of the step left there: they go.
    pub leftovers: Vec<String>,
}

/// The marker that makes a checkpoint stay: a file in its folder, with a note for people.
pub const PIN: &str = "pinned";

/// Decides about all checkpoints below `dir`, the newest first, and changes nothing. Reads the newest whole if anything would
/// go because of it; `watch` hears of these bytes.
pub fn plan(
    dir: &Path,
    retention: Retention<'_>,
    watch: Watch<'_>,
) -> Result<Vec<Planned>, FileError> {
    plan_in(&Folder::open(dir)?, retention, watch)
}

/// [`plan`] below a folder of any store.
pub fn plan_in(
    dir: &Folder,
    retention: Retention<'_>,
    watch: Watch<'_>,
) -> Result<Vec<Planned>, FileError> {
    let mut plan = Vec::new();
    for (step, folder) in folder::list(dir)? {
        plan.push(look(step, &folder)?);
    }
    let mut verified = None;
    loop {
        decide(&mut plan, retention);
        let newest = plan.iter().position(|it| it.fate == Fate::Newest);
        let removes = plan
            .iter()
            .any(|it| it.fate.goes() || !it.leftovers.is_empty());
        let Some(newest) = newest.filter(|it| removes && verified != Some(*it)) else {
            return Ok(plan);
        };
        let step = plan[newest].step;
        match open_as(step, &folder::of_step(dir, step)).and_then(|it| it.verify_watched(watch)) {
            Ok(_) => verified = Some(newest),
            Err(_) => plan[newest].condition = Condition::Damaged,
        }
    }
}

/// Removes what `plan` says of the checkpoints below `dir`; returns the removed folders, in its order. One that was pinned meanwhile stays.
pub fn apply(dir: &Path, plan: &[Planned]) -> Result<Vec<PathBuf>, FileError> {
    apply_in(&Folder::open(dir)?, plan)
}

fn apply_in(dir: &Folder, plan: &[Planned]) -> Result<Vec<PathBuf>, FileError> {
    let mut removed = Vec::new();
    for planned in plan {
        let folder = folder::of_step(dir, planned.step);
        if planned.fate.goes() && pinned_in(&folder)?.is_none() {
            // Its manifest first: a crash on the way leaves no checkpoint with files missing.
            folder.remove(MANIFEST)?;
            folder.remove_all()?;
            removed.push(planned.path.clone());
        }
        for name in &planned.leftovers {
            folder.remove(name)?;
        }
    }
    Ok(removed)
}

/// Removes the checkpoints below `dir` that `retention` does not name, and the remains of saves that were not completed before
/// the newest. Returns the removed folders, the newest first.
///
/// Nothing is removed before the newest has been read back whole; ones that do not hold neither count nor go.
pub fn retain(dir: &Path, retention: Retention<'_>) -> Result<Vec<PathBuf>, FileError> {
    retain_in(&Folder::open(dir)?, retention)
}

/// [`retain`] below a folder of any store.
pub fn retain_in(dir: &Folder, retention: Retention<'_>) -> Result<Vec<PathBuf>, FileError> {
    apply_in(dir, &plan_in(dir, retention, &|_| ())?)
}

/// Keeps the checkpoint at `path` until [`unpin`], whatever the retention says. A pin that is there gets the new note.
///
/// # Errors
/// There is no complete checkpoint.
pub fn pin(path: &Path, note: &str) -> Result<(), CheckpointError> {
    crate::Checkpoint::open(path)?;
    let _ = Folder::open(path)?.put(PIN, note.as_bytes(), On::Always)?;
    Ok(())
}

/// Lets the retention decide about the checkpoint at `path` again; whether it was pinned.
pub fn unpin(path: &Path) -> Result<bool, FileError> {
    let folder = Folder::open(path)?;
    let was = pinned_in(&folder)?.is_some();
    folder.remove(PIN)?;
    Ok(was)
}

/// The note of the pin, if the checkpoint at `path` is pinned.
pub fn pinned(path: &Path) -> Result<Option<String>, FileError> {
    pinned_in(&Folder::open(path)?)
}

fn pinned_in(folder: &Folder) -> Result<Option<String>, FileError> {
    let note = folder.read(PIN)?;
    Ok(note.map(|note| String::from_utf8_lossy(&note).into_owned()))
}

/// The rule.
fn decide(folders: &mut [Planned], retention: Retention<'_>) {
    let whole = |it: &&Planned| it.condition == Condition::Whole;
    let newest = folders.iter().find(whole).map(|it| it.step);
    let has = |step: &&u64| folders.iter().filter(whole).any(|it| it.step == **step);
    let best = retention.best_first.iter().find(has).copied();
    let every = retention.keep_every_steps;
    let mut count = 0;
    for folder in folders {
        let step = folder.step;
        let older = newest.is_some_and(|newest| step < newest);
        count += usize::from(folder.condition == Condition::Whole);
        folder.fate = match folder.condition {
            Condition::Whole if newest == Some(step) => Fate::Newest,
            Condition::Whole if count <= retention.keep_last => Fate::Last,
            _ if folder.pinned => Fate::Pinned,
            Condition::Damaged => Fate::Damaged,
            Condition::Unfinished if older => Fate::Remains,
            // Behind the newest, which must be there.
            Condition::Unfinished if newest.is_some() && retention.idle => Fate::Remains,
            Condition::Unfinished => Fate::Unfinished,
            Condition::Whole if best == Some(step) => Fate::Best,
            Condition::Whole if every > 0 && step.is_multiple_of(every) => Fate::Every,
            Condition::Whole if step >= retention.since => Fate::Undecided,
            Condition::Whole => Fate::Old,
        };
        let settled = older || retention.idle && newest == Some(step);
        if !settled || folder.condition != Condition::Whole || folder.fate.goes() {
            folder.leftovers.clear();
        }
    }
}

/// What is on disk of the checkpoint of `step`; its fate is not decided yet.
fn look(step: u64, folder: &Folder) -> Result<Planned, FileError> {
    let mut leftovers = Vec::new();
    let mut bytes = 0;
    let condition = match open_as(step, folder) {
        Ok(checkpoint) if checkpoint.has_files()? => {
            bytes = checkpoint.bytes();
            leftovers = checkpoint.unlisted()?;
            leftovers.retain(|name| folder::is_remains(name, u64::MAX));
            Condition::Whole
        }
        Err(CheckpointError::Incomplete { .. }) => Condition::Unfinished,
        Ok(_) | Err(_) => Condition::Damaged,
    };
    if condition != Condition::Whole {
        for name in folder.list()? {
            // A temporary file of a save in progress may have got its name meanwhile.
            bytes += folder.object(&name)?.map_or(0, |object| object.bytes());
        }
    }
    Ok(Planned {
        step,
        bytes,
        condition,
        pinned: pinned_in(folder)?.is_some(),
        fate: Fate::Unfinished,
        leftovers,
        path: folder.path(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use Condition::{Damaged, Unfinished, Whole};

    const ALL: Retention<'static> = Retention {
        keep_last: 1,
        keep_every_steps: 0,
        best_first: &[],
        since: u64::MAX,
        idle: false,
    };

    /// The fates of folders, the newest first; steps with a pin are negative.
    fn check(folders: &[(i64, Condition)], retention: Retention<'_>, expected: &[Fate]) {
        let look = |&(step, condition): &(i64, Condition)| Planned {
            step: step.unsigned_abs(),
            path: PathBuf::new(),
            bytes: 0,
            condition,
            pinned: step < 0,
            fate: Fate::Unfinished,
            leftovers: Vec::new(),
        };
        let mut planned: Vec<Planned> = folders.iter().map(look).collect();
        decide(&mut planned, retention);
        let found: Vec<Fate> = planned.iter().map(|it| it.fate).collect();
        assert_eq!(found, expected, "{folders:?} under {retention:?}");
    }

    #[test]
    fn every_rule_keeps_its_own() {
        use Fate::{Best, Every, Last, Newest, Old, Pinned, Undecided};
        let steps = [60, 50, 40, 30, 20, 10].map(|step| (step, Whole));
        check(&steps, ALL, &[Newest, Old, Old, Old, Old, Old]);
        let last = Retention {
            keep_last: 3,
            ..ALL
        };
        check(&steps, last, &[Newest, Last, Last, Old, Old, Old]);
        let every = Retention {
            keep_every_steps: 20,
            ..ALL
        };
        check(&steps, every, &[Newest, Old, Every, Old, Every, Old]);
        let best = Retention {
            best_first: &[25, 20, 10],
            ..ALL
        };
        check(&steps, best, &[Newest, Old, Old, Old, Best, Old]);
        let since = Retention { since: 40, ..ALL };
        check(
            &steps,
            since,
            &[Newest, Undecided, Undecided, Old, Old, Old],
        );
        let pinned = [
            (60, Whole),
            (-50, Whole),
            (-40, Damaged),
            (-30, Unfinished),
            (20, Whole),
        ];
        check(&pinned, ALL, &[Newest, Pinned, Pinned, Pinned, Old]);
        let none = Retention {
            keep_last: 0,
            ..ALL
        };
        check(&steps, none, &[Newest, Old, Old, Old, Old, Old]);
    }

    #[test]
    fn what_does_not_hold_neither_counts_nor_goes_and_remains_go_behind_a_newer_one() {
        use Fate::{Last, Newest, Old, Remains};
        let folders = [
            (50, Unfinished),
            (40, Damaged),
            (30, Whole),
            (20, Unfinished),
            (10, Whole),
        ];
        let (damaged, unfinished) = (Fate::Damaged, Fate::Unfinished);
        check(&folders, ALL, &[unfinished, damaged, Newest, Remains, Old]);
        let two = Retention {
            keep_last: 2,
            ..ALL
        };
        check(&folders, two, &[unfinished, damaged, Newest, Remains, Last]);
        let idle = Retention { idle: true, ..two };
        check(&folders, idle, &[Remains, damaged, Newest, Remains, Last]);
        // Without one that holds nothing goes.
        let none = [(50, Unfinished), (40, Damaged), (20, Unfinished)];
        check(
            &none,
            Retention { idle: true, ..ALL },
            &[unfinished, damaged, unfinished],
        );
    }
}
