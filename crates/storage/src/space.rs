//! How much room a file system has, for looking before writing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::files::{FileError, at};

/// A file system as seen from a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// The folder asked about, or the nearest one above it that exists.
    pub folder: PathBuf,
    /// Number of the file system: equal for paths that share their room.
    pub device: u64,
    /// Bytes that this user may still write.
    pub free_bytes: u64,
}

/// The room for files at `path`, which need not exist.
///
/// # Errors
/// A folder that cannot be looked at.
pub fn space(path: &Path) -> Result<Space, FileError> {
    let there = path.ancestors().find(|folder| folder.is_dir());
    // Above a relative path lies the working directory.
    let folder = there
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let metadata = fs::metadata(folder).map_err(at("look at", folder))?;
    let system = rustix::fs::statvfs(folder)
        .map_err(|error| at("ask for the free space of", folder)(error.into()))?;
    Ok(Space {
        folder: folder.to_owned(),
        device: metadata.dev(),
        free_bytes: system.f_bavail.saturating_mul(system.f_frsize),
    })
}
