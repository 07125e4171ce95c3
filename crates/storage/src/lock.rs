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
    file: File,
}

impl Drop for Lock {
    /// Closing our descriptor is not enough. The lock belongs to the open file, and a child process that another thread is
    /// just starting holds a copy of every descriptor until it executes its program.
    fn drop(&mut self) {
        // Fails only for what is no open file.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
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
        let mut lock = loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .map_err(at("open lock", path))?;
            let lock = match try_lock(file, path, FlockOperation::NonBlockingLockExclusive)? {
                Ok(lock) => lock,
                // Who shares it lets others share it.
                Err(file) => match try_lock(file, path, FlockOperation::NonBlockingLockShared)? {
                    Ok(_) => {
                        let path = path.to_owned();
                        return Err(LockError::Shared { path });
                    }
                    Err(file) => return Err(held(file, path)),
                },
            };
            if names(path, &lock.file)? {
                break lock;
            }
        };
        let file = &mut lock.file;
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(at("write lock", path))?;
        Ok(lock)
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
            match try_lock(file, path, FlockOperation::NonBlockingLockShared)? {
                Ok(lock) if names(path, &lock.file)? => return Ok(lock),
                // The name leads elsewhere by now.
                Ok(_) => {}
                Err(file) if Instant::now() >= deadline => return Err(held(file, path)),
                Err(_) => thread::sleep(RETRY),
            }
        }
    }
}

/// How long [`take_turn`] waits: those before it only rename a file.
const TURN: Duration = Duration::from_secs(10);

/// The file at `path`, locked alone while it has that name, and what it is; none where there is no such file.
///
/// # Errors
/// Somebody keeps it longer than a rename takes.
pub(crate) fn take_turn(path: &Path) -> Result<Option<(Lock, fs::Metadata)>, FileError> {
    let deadline = Instant::now() + TURN;
    loop {
        let file = match File::options().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(at("open", path))?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let lock = Lock { file };
                if names(path, &lock.file)? {
                    let metadata = lock.file.metadata().map_err(at("inspect", path))?;
                    return Ok(Some((lock, metadata)));
                }
                // Replaced while we waited.
            }
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(RETRY),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let reason = "another process has kept it locked for 10 s";
                let late = io::Error::new(io::ErrorKind::TimedOut, reason);
                return Err(at("lock", path)(late));
            }
            Err(error) => return Err(at("lock", path)(error.into())),
        }
    }
}

/// Locks `file` if that is possible without waiting, and otherwise gives it back.
fn try_lock(
    file: File,
    path: &Path,
    operation: FlockOperation,
) -> Result<Result<Lock, File>, LockError> {
    match flock(&file, operation) {
        Ok(()) => Ok(Ok(Lock { file })),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Err(file)),
        Err(error) => Err(at("lock", path)(error.into()).into()),
    }
}

/// Whether `path` still leads to `file`. A holder may have moved the lock away with the folder that it guards, and a lock on
/// a file without that name keeps nobody out.
fn names(path: &Path, file: &File) -> Result<bool, FileError> {
    let locked = file.metadata().map_err(at("look at lock", path))?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (locked.dev(), locked.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(at("look at lock", path)(error)),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_lock_that_was_let_go_is_free_although_a_child_that_is_starting_has_a_copy_of_its_descriptor()
     {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let shared = Lock::share(&path, Duration::ZERO).unwrap();
        let copy = shared.file.try_clone().unwrap();
        drop(shared);
        let alone = Lock::acquire(&path).unwrap();
        drop(copy);
        let copy = alone.file.try_clone().unwrap();
        drop(alone);
        Lock::share(&path, Duration::ZERO).unwrap();
        drop(copy);
    }
}
