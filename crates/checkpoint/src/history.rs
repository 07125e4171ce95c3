//! The checkpoints of a run over time: the newest that holds. Not here: which old ones go (`retention`).

use std::path::{Path, PathBuf};

use storage::{FileError, Folder};

use crate::{
    digest::Watch,
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

/// Looks below `dir`, a path or a URL as [`Folder::open`] takes them, for the newest checkpoint that verifies. Folders without
/// a manifest are saves that were not completed and do not count; neither does a `dir` that is not there.
///
/// # Errors
/// `dir` cannot be listed, or a file cannot be read: an older checkpoint must not be taken for the newest because a store was
/// out of reach for a moment. One whose bytes are not what was written is refused, with the reason.
pub fn newest(dir: &Path) -> Result<Newest, FileError> {
    newest_watched(dir, &|_| ())
}

/// [`newest`]; `watch` hears of every byte that is read.
pub fn newest_watched(dir: &Path, watch: Watch<'_>) -> Result<Newest, FileError> {
    look(&Folder::open(dir)?, watch)
}

/// [`newest`] below a folder of any store.
pub fn newest_in(dir: &Folder) -> Result<Newest, FileError> {
    look(dir, &|_| ())
}

fn look(dir: &Folder, watch: Watch<'_>) -> Result<Newest, FileError> {
    let mut newest = Newest::default();
    for (step, folder) in folder::list(dir)? {
        match open_as(step, &folder).and_then(|checkpoint| checkpoint.verify_watched(watch)) {
            Ok(_) => {
                newest.found = Some((step, folder.path()));
                break;
            }
            Err(CheckpointError::Incomplete { .. }) => {}
            // One that is being removed is not the newest either.
            Err(CheckpointError::File(error)) if !storage::was_replaced(&error) => {
                return Err(error);
            }
            Err(error) => newest.refused.push((folder.path(), error.to_string())),
        }
    }
    Ok(newest)
}

/// The folder of the checkpoint of `step` below `dir`, if it is visible. Its content is not verified.
pub fn visible(dir: &Path, step: u64) -> Option<PathBuf> {
    visible_in(&Folder::open(dir).ok()?, step).ok()?
}

/// [`visible`] below a folder of any store.
///
/// # Errors
/// The store cannot be asked.
pub fn visible_in(dir: &Folder, step: u64) -> Result<Option<PathBuf>, FileError> {
    let folder = folder::of_step(dir, step);
    Ok(folder.object(MANIFEST)?.map(|_| folder.path()))
}

/// Opens a folder found under the name of `step`.
pub(crate) fn open_as(step: u64, folder: &Folder) -> Result<Checkpoint, CheckpointError> {
    let checkpoint = Checkpoint::open_in(folder)?;
    let inside = checkpoint.manifest().state.step;
    if inside != step {
        return Err(CheckpointError::Step {
            path: folder.path(),
            step: inside,
        });
    }
    Ok(checkpoint)
}
