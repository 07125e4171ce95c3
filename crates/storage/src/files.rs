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
/// As [`DurableFile::commit`].
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut file = DurableFile::create(path)?;
    file.append(bytes)?;
    file.commit()
}

/// A file that is written in pieces and appears under its name, whole and durable, at [`DurableFile::commit`]. Dropped
/// before that, it was never there.
#[derive(Debug)]
pub struct DurableFile {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    committed: bool,
}

impl DurableFile {
    /// Starts a file that is to become `path`, under a temporary name in the same directory.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        loop {
            let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(format!(".{}-{unique}.tmp", std::process::id()));
            let temporary = path.with_file_name(name);
            match File::create_new(&temporary) {
                Ok(file) => {
                    return Ok(Self {
                        file,
                        temporary,
                        path: path.to_owned(),
                        committed: false,
                    });
                }
                // In containers every program is process 1: the name may be a dead one's leftover, or a live one's on
                // another machine. Neither is touched.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(at("create", &temporary)(error)),
            }
        }
    }

    /// The name it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds `bytes` at the end.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.file
            .write_all(bytes)
            .map_err(at("write", &self.temporary))
    }

    /// Makes the content durable and puts it in place of whatever had the name: fsync, rename, fsync of the directory.
    ///
    /// # Errors
    /// Any step's failure; the old content is then untouched and the temporary file removed. Only a failed sync of the
    /// directory, the last step, leaves the new content in place without the promise that it outlives a power cut.
    pub fn commit(mut self) -> Result<(), FileError> {
        self.file.sync_all().map_err(at("sync", &self.temporary))?;
        fs::rename(&self.temporary, &self.path).map_err(at("rename into", &self.path))?;
        self.committed = true;
        sync_directory(directory_of(&self.path))
    }
}

impl Write for DurableFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for DurableFile {
    fn drop(&mut self) {
        if !self.committed {
            // Whoever drops it already has an error to tell; a leftover temporary file is harmless.
            drop(fs::remove_file(&self.temporary));
        }
    }
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
