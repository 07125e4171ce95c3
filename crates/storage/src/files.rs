//! Durable replacement of whole files on a local disk.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// A file operation that did not happen.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}: {source}")]
pub struct FileError {
    /// What was tried.
    pub operation: &'static str,
    /// On which path.
    pub path: PathBuf,
    /// What the system answered.
    #[source]
    pub source: io::Error,
}

/// Attaches operation and path to the system's answer.
pub(crate) fn at<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// Replaces `path` by `bytes`: a temporary file in the same directory, fsync, rename, fsync of the directory.
///
/// # Errors
/// Any step's failure; the old content is then untouched and the temporary file removed. Only a failed sync of the
/// directory, the last step, leaves the new content in place without the promise that it outlives a power cut.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}-{unique}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = write_synced(&temporary, bytes)
        .map_err(at("write", &temporary))
        .and_then(|()| fs::rename(&temporary, path).map_err(at("rename into", path)));
    if let Err(error) = written {
        // The first error is the one to tell; a leftover temporary file is harmless.
        drop(fs::remove_file(&temporary));
        return Err(error);
    }
    sync_directory(directory_of(path))
}

/// Makes entries created, renamed or removed in `directory` durable.
pub fn sync_directory(directory: &Path) -> Result<(), FileError> {
    File::open(directory)
        .and_then(|opened| opened.sync_all())
        .map_err(at("sync directory", directory))
}

/// The directory that holds `path`; the current one for a bare file name.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
