//! The store of one scope: opening, looking up, re-reading, and writing a segment of one's own.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs, io,
    path::{Path, PathBuf},
};

use storage::{
    atomic_write,
    log::{Log, LogError},
    sync_directory,
};

use crate::{
    EntryKey, Scope, TornTail,
    segment::{self, BATCH_ENTRIES_MAX, EXTENSION},
};

const SCOPE_FILE: &str = "scope.json";

/// The entries of one scope, as they were when the store was opened or last reloaded.
#[derive(Debug)]
pub struct Store {
    /// Folder of the scope.
    folder: PathBuf,
    scope: [u8; 32],
    values: HashMap<EntryKey, f32>,
}

/// A segment of one's own, open for appending. Its entries show in a [`Store`] after [`Store::reload`].
#[derive(Debug)]
pub struct Writer {
    log: Log,
}

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Bytes that no crash explains.
    #[error(
        "{path} is damaged at byte {offset}: {reason}; delete this file, and its entries are computed anew"
    )]
    Damaged {
        /// The segment or `scope.json`.
        path: PathBuf,
        /// First byte of the record that does not hold.
        offset: u64,
        /// Which check failed.
        reason: &'static str,
    },
    /// Two records disagree about one entry, so at least one of them was not computed under this scope.
    #[error(
        "{path} at byte {offset} says {value} for entry {key}, but another record says {other}; values of one scope must \
         agree bit for bit; delete the folder of this file, and its entries are computed anew"
    )]
    Contradiction {
        /// The segment read later.
        path: PathBuf,
        /// First byte of its record.
        offset: u64,
        /// The entry.
        key: EntryKey,
        /// Its value there.
        value: f32,
        /// The value read before.
        other: f32,
    },
    /// An entry without a usable value.
    #[error(
        "{path} at byte {offset} holds {value} for entry {key}, expected a finite log-prob; delete this file, and its \
         entries are computed anew"
    )]
    NotFinite {
        /// The segment.
        path: PathBuf,
        /// First byte of its record.
        offset: u64,
        /// The entry.
        key: EntryKey,
        /// Its value.
        value: f32,
    },
    /// A file or folder could not be read or made.
    #[error("{operation} {path}: {source}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// A file could not be written.
    #[error(transparent)]
    Write(#[from] storage::FileError),
    /// A segment could not be started.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The system gave no random bytes for a segment's name.
    #[error("name a segment: {0}")]
    Random(getrandom::Error),
}

/// Why entries were not stored.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// A value that no reference model in order gives. Nothing of the call was stored.
    #[error(
        "entry {key} is {value}, expected a finite log-prob; check the reference model's weights"
    )]
    NotFinite {
        /// The entry.
        key: EntryKey,
        /// The value offered.
        value: f32,
    },
    /// The segment could not be written.
    #[error(transparent)]
    Log(#[from] LogError),
}

impl StoreError {
    pub(crate) fn at(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}

impl Store {
    /// Opens the entries of `scope` under `dir`, creating both when absent, and checks every byte.
    ///
    /// The second value lists appends that did not finish; they are left out and left in place.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Contradiction`] or [`StoreError::NotFinite`] name the file, the byte and
    /// the cure.
    pub fn open(dir: &Path, scope: &Scope) -> Result<(Self, Vec<TornTail>), StoreError> {
        let folder = dir.join(scope.folder());
        create_folder(&folder)?;
        keep_scope_file(&folder.join(SCOPE_FILE), scope)?;
        let mut store = Self {
            folder,
            scope: scope.digest(),
            values: HashMap::new(),
        };
        let torn = store.reload()?;
        Ok((store, torn))
    }

    /// The value of `key`, if this scope has it.
    pub fn get(&self, key: &EntryKey) -> Option<f32> {
        self.values.get(key).copied()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Reads all segments anew, those of other processes included; everything whose append has returned is in.
    ///
    /// # Errors
    /// As [`Store::open`]; the entries read before stay.
    pub fn reload(&mut self) -> Result<Vec<TornTail>, StoreError> {
        let mut values: HashMap<EntryKey, f32> = HashMap::new();
        let mut torn = Vec::new();
        for path in self.segments()? {
            let segment = segment::read(&path, &self.scope)?;
            for (key, value, offset) in segment.entries {
                if !value.is_finite() {
                    return Err(StoreError::NotFinite {
                        path,
                        offset,
                        key,
                        value,
                    });
                }
                match values.entry(key) {
                    Entry::Vacant(vacant) => {
                        vacant.insert(value);
                    }
                    Entry::Occupied(occupied) if occupied.get().to_bits() == value.to_bits() => {}
                    Entry::Occupied(occupied) => {
                        return Err(StoreError::Contradiction {
                            path,
                            offset,
                            key,
                            value,
                            other: *occupied.get(),
                        });
                    }
                }
            }
            torn.extend(segment.torn);
        }
        self.values = values;
        Ok(torn)
    }

    /// Starts a segment of one's own; ask for one only when there is something to store. Any number of writers may be at work at once, in any processes.
    pub fn writer(&self) -> Result<Writer, StoreError> {
        // 128 random bits make the name exclusive without a lock, on shared folders too.
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(StoreError::Random)?;
        let name = format!("{:032x}", u128::from_le_bytes(random));
        let path = self.folder.join(name).with_extension(EXTENSION);
        let mut opened = Log::open(&path)?;
        assert!(
            opened.records.is_empty(),
            "{} was just named at random and holds records",
            path.display()
        );
        opened.log.append(&segment::head_record(&self.scope))?;
        Ok(Writer { log: opened.log })
    }

    /// The segments in the order of their names, so that reports do not depend on the file system.
    fn segments(&self) -> Result<Vec<PathBuf>, StoreError> {
        let list = |source| StoreError::at("list", &self.folder, source);
        let mut segments = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(list)? {
            let path = entry.map_err(list)?.path();
            if path.extension().is_some_and(|found| found == EXTENSION) {
                segments.push(path);
            }
        }
        segments.sort();
        Ok(segments)
    }
}

impl Writer {
    /// Stores entries; they are durable when this returns. Storing an entry again with the same bits is harmless.
    ///
    /// # Errors
    /// [`AppendError::NotFinite`] before anything is written.
    pub fn append(&mut self, entries: &[(EntryKey, f32)]) -> Result<(), AppendError> {
        if let Some(&(key, value)) = entries.iter().find(|(_, value)| !value.is_finite()) {
            return Err(AppendError::NotFinite { key, value });
        }
        for batch in entries.chunks(BATCH_ENTRIES_MAX) {
            self.log.append(&segment::batch_record(batch))?;
        }
        Ok(())
    }
}

/// Creates `folder` and what is missing above it, and makes the new names durable.
fn create_folder(folder: &Path) -> Result<(), StoreError> {
    let missing: Vec<&Path> = folder
        .ancestors()
        .take_while(|path| !path.as_os_str().is_empty() && !path.is_dir())
        .collect();
    fs::create_dir_all(folder).map_err(|source| StoreError::at("create", folder, source))?;
    for path in missing {
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent)?,
            _ => sync_directory(Path::new("."))?,
        }
    }
    Ok(())
}

/// Writes `scope.json` when absent and otherwise checks that it tells this scope.
fn keep_scope_file(path: &Path, scope: &Scope) -> Result<(), StoreError> {
    let expected = serde_json::to_vec_pretty(scope).expect("a scope is plain data");
    match fs::read(path) {
        Ok(found) if serde_json::from_slice::<Scope>(&found).is_ok_and(|found| found == *scope) => {
            Ok(())
        }
        Ok(_) => Err(StoreError::Damaged {
            path: path.to_owned(),
            offset: 0,
            reason: "it does not describe the scope that its folder is named after",
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(atomic_write(path, &expected)?),
        Err(error) => Err(StoreError::at("read", path, error)),
    }
}
