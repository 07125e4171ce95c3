//! One holder per lock file, or several that share it, kept by the kernel.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};

use crate::files::{FileError, at};

/// How often a lock that is held is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// A lock, let go when dropped or when the process dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it alone.
    #[error("{path} is held by process {holder}; stop that process or use another directory")]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Process id that the holder wrote, or "unknown".
        holder: String,
    },
    /// Others share it. Sharing leaves no trace in the file, so they cannot be named.
    #[error("{path} is shared by running processes; wait until they end")]
    Shared {
        /// The lock file.
        path: PathBuf,
    },
    /// The file could not be used.
    #[error(transparent)]
    File(#[from] FileError),
}

impl Lock {
    /// Takes the lock at `path` alone, without waiting; creates the file if needed.
    ///
    /// # Errors
    /// [`LockError::Held`] names the holder; [`LockError::Shared`].
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        let mut file = loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .map_err(at("open lock", path))?;
            if !try_lock(&file, path, FlockOperation::NonBlockingLockExclusive)? {
                // Who shares it lets others share it.
                if try_lock(&file, path, FlockOperation::NonBlockingLockShared)? {
                    let path = path.to_owned();
                    return Err(LockError::Shared { path });
                }
                return Err(held(file, path));
            }
            if names(path, &file)? {
                break file;
            }
        };
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(at("write lock", path))?;
        Ok(Self { _file: file })
    }

    /// Takes the lock at `path` together with any others that share it, and waits up to `patience` for one that has it
    /// alone; creates the file if needed, and otherwise only reads it.
    ///
    /// # Errors
    /// [`LockError::Held`] names the holder.
    pub fn share(path: &Path, patience: Duration) -> Result<Self, LockError> {
        let deadline = Instant::now() + patience;
        loop {
            let file = match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(path),
                opened => opened,
            };
            let file = file.map_err(at("open lock", path))?;
            if try_lock(&file, path, FlockOperation::NonBlockingLockShared)? {
                if names(path, &file)? {
                    return Ok(Self { _file: file });
                }
            } else if Instant::now() >= deadline {
                return Err(held(file, path));
            } else {
                thread::sleep(RETRY);
            }
        }
    }
}

/// Whether `file` could be locked without waiting.
fn try_lock(file: &File, path: &Path, operation: FlockOperation) -> Result<bool, LockError> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(at("lock", path)(error.into()).into()),
    }
}

/// Whether `path` still leads to `file`. A holder may have moved the lock away with the folder that it guards, and a lock on
/// a file without that name keeps nobody out.
fn names(path: &Path, file: &File) -> Result<bool, LockError> {
    let locked = file.metadata().map_err(at("look at lock", path))?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (locked.dev(), locked.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(at("look at lock", path)(error).into()),
    }
}

fn held(mut file: File, path: &Path) -> LockError {
    let mut holder = String::new();
    let read = file.read_to_string(&mut holder);
    if read.is_err() || holder.trim().is_empty() {
        holder = "unknown".into();
    }
    LockError::Held {
        path: path.to_owned(),
        holder: holder.trim().to_owned(),
    }
}
