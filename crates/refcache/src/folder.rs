//! A scope's folder: what lies where, who may touch it, and when it was last used.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use storage::{FileError, Lock, LockError, atomic_write, create_directory};

use crate::{Scope, StoreError, segment::EXTENSION};

pub const SCOPE_FILE: &str = "scope.json";
const LOCK_FILE: &str = "lock";
/// Ending of a sorted segment before it is read back, a name that nobody reads.
pub const MERGING: &str = "merging";
/// Ending of the name of a folder that is being removed.
const REMOVED: &str = "removed";

/// How long opening waits for a clean-up. That is at most a removal or a merge.
const PATIENCE: Duration = Duration::from_mins(1);
/// How often the folder may be removed between making it and locking it; a bound for what is no clean-up.
const ATTEMPTS_MAX: usize = 100;

/// One scope's folder, which need not exist.
#[derive(Clone, Debug)]
pub struct Folder {
    pub path: PathBuf,
    /// What its name says.
    pub digest: [u8; 32],
}

impl Folder {
    pub fn of(store: &Path, scope: &Scope) -> Self {
        Self {
            path: store.join(scope.folder()),
            digest: scope.digest(),
        }
    }

    /// All scopes of a store, by name, and the folders whose removal did not finish.
    pub fn all(store: &Path) -> Result<(Vec<Self>, Vec<PathBuf>), StoreError> {
        let (mut folders, mut removed) = (Vec::new(), Vec::new());
        for path in list(store)? {
            let Some(digest) = digest_of(&path) else {
                continue;
            };
            if path.extension().is_none() {
                folders.push(Self { path, digest });
            } else if has_extension(&path, REMOVED) {
                removed.push(path);
            }
        }
        Ok((folders, removed))
    }

    /// Makes the folder and keeps it from being cleaned up until the lock is dropped. `None` where nothing may be written:
    /// nobody cleans up through such a mount either.
    pub fn share(&self) -> Result<Option<Lock>, StoreError> {
        let mut attempts = 1;
        loop {
            let made = create_directory(&self.path).map_err(StoreError::from);
            match made.and_then(|()| self.share_existing()) {
                // A clean-up removed it in between: after it was made, or after it was found to be there already.
                Err(StoreError::Write(error))
                    if matches!(
                        error.source.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
                    ) && attempts < ATTEMPTS_MAX =>
                {
                    attempts += 1;
                }
                shared => return shared,
            }
        }
    }

    /// As [`Folder::share`], for a folder that is there.
    pub fn share_existing(&self) -> Result<Option<Lock>, StoreError> {
        match Lock::share(&self.path.join(LOCK_FILE), PATIENCE) {
            Ok(lock) => Ok(Some(lock)),
            Err(LockError::File(FileError { source, .. }))
                if matches!(
                    source.kind(),
                    io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(self.refused(error)),
        }
    }

    /// Takes the scope alone, to clean it up.
    pub fn lock_alone(&self) -> Result<Lock, StoreError> {
        Lock::acquire(&self.path.join(LOCK_FILE)).map_err(|error| self.refused(error))
    }

    fn refused(&self, error: LockError) -> StoreError {
        match error {
            LockError::File(error) => error.into(),
            source => StoreError::InUse {
                folder: self.path.clone(),
                source,
            },
        }
    }

    /// The segments in the order of their names, so that reports do not depend on the file system.
    pub fn segments(&self) -> Result<Vec<PathBuf>, StoreError> {
        let listed = || -> Result<Vec<PathBuf>, StoreError> {
            let mut paths = list(&self.path)?;
            paths.retain(|path| has_extension(path, EXTENSION));
            Ok(paths)
        };
        // A writer that ends meanwhile puts another file under its segment's name, and on some file systems a listing may
        // miss both. The next listing has it, so two that agree have missed nothing.
        let mut paths = listed()?;
        for _ in 0..ATTEMPTS_MAX {
            let again = listed()?;
            if again == paths {
                break;
            }
            paths = again;
        }
        Ok(paths)
    }

    /// Sizes of all segments together.
    pub fn bytes(&self) -> Result<u64, StoreError> {
        let mut bytes = 0;
        for path in self.segments()? {
            match fs::metadata(&path) {
                Ok(metadata) => bytes += metadata.len(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StoreError::at("look at", &path, error)),
            }
        }
        Ok(bytes)
    }

    /// Files of writes and merges that did not finish. Whoever has the scope alone may remove them.
    pub fn leftovers(&self) -> Result<Vec<PathBuf>, StoreError> {
        let mut paths = list(&self.path)?;
        paths.retain(|path| has_extension(path, "tmp") || has_extension(path, MERGING));
        Ok(paths)
    }

    /// A name for a new segment.
    pub fn new_segment(&self) -> Result<PathBuf, StoreError> {
        Ok(self.path.join(random_name()?).with_extension(EXTENSION))
    }

    /// Where the folder goes before its content is removed.
    pub fn removed(&self) -> PathBuf {
        self.path.with_extension(REMOVED)
    }

    /// Writes `scope.json` when absent, and otherwise checks that it tells this scope and dates it as used now.
    pub fn keep_scope_file(&self, scope: &Scope) -> Result<(), StoreError> {
        let path = self.path.join(SCOPE_FILE);
        if self.scope()?.is_none() {
            return Ok(atomic_write(&path, &scope.described())?);
        }
        // On a folder of another user or a read-only one the date stays, which costs at most a cache that was cleaned up.
        drop(File::open(&path).and_then(|file| file.set_modified(SystemTime::now())));
        Ok(())
    }

    /// What `scope.json` says, checked against the folder's name; `None` without the file.
    pub fn scope(&self) -> Result<Option<Scope>, StoreError> {
        let path = self.path.join(SCOPE_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::at("read", &path, error)),
        };
        match serde_json::from_slice::<Scope>(&text) {
            Ok(scope) if scope.digest() == self.digest => Ok(Some(scope)),
            _ => Err(StoreError::Damaged {
                path,
                offset: 0,
                reason: "it does not describe the scope that its folder is named after",
            }),
        }
    }

    /// When a run last opened the scope or added to it.
    pub fn used(&self) -> Result<SystemTime, StoreError> {
        let mut paths = self.segments()?;
        paths.push(self.path.join(SCOPE_FILE));
        let mut newest = None;
        for path in paths {
            match fs::metadata(&path).and_then(|metadata| metadata.modified()) {
                Ok(modified) => newest = newest.max(Some(modified)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StoreError::at("look at", &path, error)),
            }
        }
        match newest {
            Some(newest) => Ok(newest),
            // Somebody made it and died.
            None => fs::metadata(&self.path)
                .and_then(|metadata| metadata.modified())
                .map_err(|error| StoreError::at("look at", &self.path, error)),
        }
    }
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let error = |source| StoreError::at("list", folder, source);
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(error)? {
        paths.push(entry.map_err(error)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// A name that nobody else picks: 128 random bits make it exclusive without a lock, on shared folders too.
pub fn random_name() -> Result<String, StoreError> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(StoreError::Random)?;
    Ok(format!("{:032x}", u128::from_le_bytes(random)))
}

/// The digest that a folder is named after.
fn digest_of(path: &Path) -> Option<[u8; 32]> {
    let digest = digest_named(path.file_stem()?.to_str()?)?;
    path.is_dir().then_some(digest)
}

/// The digest that these digits are, in the very form that scopes are named in.
pub fn digest_named(name: &str) -> Option<[u8; 32]> {
    let digest = blake3::Hash::from_hex(name).ok()?;
    (digest.to_string() == name).then(|| *digest.as_bytes())
}
