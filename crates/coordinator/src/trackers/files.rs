//! Reading what trackers left, and times as they write them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::TrackerError;

/// Paths of what is in `folder`, sorted; nothing where it is absent.
pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>, TrackerError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(at(folder))?,
    };
    let paths: Result<Vec<_>, _> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(at(folder))?;
    paths.sort();
    Ok(paths)
}

/// The file at `path`; `None` where it is absent.
pub(super) fn bytes(path: &Path) -> Result<Option<Vec<u8>>, TrackerError> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some).map_err(at(path)),
    }
}

/// The text at `path`; `None` where it is absent.
pub(super) fn text(path: &Path) -> Result<Option<String>, TrackerError> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some).map_err(at(path)),
    }
}

/// A path's last name, for people and comparisons.
pub(super) fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Since 1970; a clock before that reads as 1970.
pub(super) fn since_1970(at: SystemTime) -> Duration {
    at.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> TrackerError + '_ {
    move |source| TrackerError::Read {
        path: path.to_owned(),
        source,
    }
}
