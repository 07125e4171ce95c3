//! The checkpoints of a run over time: the newest that holds, and the removal of old ones.

use std::path::{Path, PathBuf};

use storage::FileError;

use crate::{
    folder::{self, MANIFEST},
    read::{Checkpoint, CheckpointError},
};

/// What [`newest`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Newest {
    /// Step and folder of the newest checkpoint of which every byte was verified.
    pub found: Option<(u64, PathBuf)>,
    /// Newer ones that did not hold, and why.
    pub refused: Vec<(PathBuf, String)>,
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention<'a> {
    /// The newest so many, at least one.
    pub keep_last: usize,
    /// Steps, the best first: besides the newest, the first of these that has a checkpoint keeps it.
    pub best_first: &'a [u64],
    /// Nothing of this step or later goes: what `best_first` knows ends there.
    pub since: u64,
}

/// Looks below `dir` for the newest checkpoint that verifies. Folders without a manifest are saves that were not completed
/// and do not count; neither does a `dir` that is not there.
///
/// # Errors
/// Only if `dir` cannot be listed; a checkpoint that cannot be read is refused, with the reason.
pub fn newest(dir: &Path) -> Result<Newest, FileError> {
    let mut newest = Newest::default();
    for (step, path) in folder::list(dir)? {
        match open_as(step, &path).and_then(|checkpoint| checkpoint.verify()) {
            Ok(_) => {
                newest.found = Some((step, path));
                break;
            }
            Err(CheckpointError::Incomplete { .. }) => {}
            Err(error) => newest.refused.push((path, error.to_string())),
        }
    }
    Ok(newest)
}

/// The folder of the checkpoint of `step` below `dir`, if it is visible. Its content is not verified.
pub fn visible(dir: &Path, step: u64) -> Option<PathBuf> {
    let path = folder::path(dir, step);
    path.join(MANIFEST).is_file().then_some(path)
}

/// Removes the checkpoints below `dir` that `retention` does not name, and the remains of saves that were not completed before
/// the newest. Returns the removed folders, the newest first.
///
/// Nothing is removed before the newest has been read back whole; ones that do not hold neither count nor go.
pub fn retain(dir: &Path, retention: Retention<'_>) -> Result<Vec<PathBuf>, FileError> {
    let keep_last = retention.keep_last.max(1);
    let folders = folder::list(dir)?;
    let mut kept = 0;
    let mut removed = Vec::new();
    // Most calls find nothing to do; they should not read a checkpoint to learn it.
    if folders.len() <= keep_last {
        return Ok(removed);
    }
    let best = best(dir, retention.best_first)?;
    for (step, path) in folders {
        let checkpoint = match open_as(step, &path) {
            Ok(checkpoint) => checkpoint,
            Err(CheckpointError::Incomplete { .. }) if kept > 0 => {
                storage::remove_directory(&path)?;
                removed.push(path);
                continue;
            }
            Err(_) => continue,
        };
        let holds = if kept == 0 {
            checkpoint.verify().is_ok()
        } else {
            checkpoint.has_files()?
        };
        if holds && kept < keep_last {
            kept += 1;
        } else if holds && step < retention.since && best != Some(step) {
            // Its manifest first: a crash on the way leaves no checkpoint with files missing.
            storage::remove_file(&path.join(MANIFEST))?;
            storage::remove_directory(&path)?;
            removed.push(path);
        }
    }
    Ok(removed)
}

/// The first of `steps` that has all its files.
fn best(dir: &Path, steps: &[u64]) -> Result<Option<u64>, FileError> {
    for &step in steps {
        if let Ok(checkpoint) = open_as(step, &folder::path(dir, step))
            && checkpoint.has_files()?
        {
            return Ok(Some(step));
        }
    }
    Ok(None)
}

/// Opens a folder found under the name of `step`.
fn open_as(step: u64, path: &Path) -> Result<Checkpoint, CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    let inside = checkpoint.manifest().state.step;
    if inside != step {
        return Err(CheckpointError::Step {
            path: path.to_owned(),
            step: inside,
        });
    }
    Ok(checkpoint)
}
