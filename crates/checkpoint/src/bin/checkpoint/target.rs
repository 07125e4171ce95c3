//! Which checkpoint the user means by a path, and whether a run is at work on it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use checkpoint::{CheckpointError, MANIFEST, newest_watched};
use storage::Lock;

use crate::Usage;
use crate::progress::Progress;

/// Whether `dir` is a checkpoint's folder itself, complete or not.
pub fn is_one(dir: &Path) -> bool {
    let name = dir.file_name().and_then(|name| name.to_str());
    dir.join(MANIFEST).exists() || name.is_some_and(|name| name.starts_with("step-"))
}

/// The checkpoint `dir`, or the newest one below it that verifies.
pub fn resolve(dir: &Path) -> Result<PathBuf> {
    check_there(dir)?;
    if is_one(dir) {
        return Ok(dir.to_owned());
    }
    let progress = Progress::new("find the newest that verifies", 0);
    let newest = newest_watched(dir, &|bytes| progress.add(bytes))?;
    drop(progress);
    for (_, reason) in &newest.refused {
        eprintln!("warning: {reason}");
    }
    match newest.found {
        Some((_, path)) => Ok(path),
        None if newest.refused.is_empty() => Err(none_there(dir)),
        None => anyhow::bail!("no checkpoint below {} holds", dir.display()),
    }
}

/// Refuses what is not there at all. Of an object store its own answer tells.
pub fn check_there(dir: &Path) -> Result<()> {
    if storage::is_remote(dir) || dir.exists() {
        return Ok(());
    }
    Err(Usage(format!(
        "{}: there is no such folder; name a checkpoint such as step-00000100, or the folder that a run's checkpoints lie in \
         (checkpoint.path, by default JOB_OUTPUT/checkpoints)",
        dir.display()
    ))
    .into())
}

/// Held by a coordinator beside its directory of checkpoints.
const LOCK: &str = ".lock";

/// Keeps the run away whose checkpoints lie in `dir`, if there is its lock: what it reads and removes by its own rules must
/// not be replaced or removed beside it.
pub fn lock(dir: &Path) -> Result<Option<Lock>> {
    let path = beside(dir).join(LOCK);
    if !path.exists() {
        return Ok(None);
    }
    Ok(Some(Lock::acquire(&path)?))
}

/// The directory that `dir` lies in, whatever way `dir` is named.
pub fn beside(dir: &Path) -> PathBuf {
    let real = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    real.parent().unwrap_or(Path::new("/")).to_owned()
}

pub fn none_there(dir: &Path) -> anyhow::Error {
    let path = dir.to_owned();
    CheckpointError::Incomplete { path }.into()
}
