//! The store of one scope: opening, looking up, re-reading, and writing a segment of one's own.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use storage::{
    Lock, LockError,
    log::{Log, LogError},
};

use crate::{
    EntryKey, Folder, Scope, TornTail,
    appended::{self, BATCH_ENTRIES_MAX},
    merge::Distinct,
    replace,
    segment::{Form, Segment},
};

/// The entries of one scope, as they were when the store was opened or last reloaded. While it is open, nobody cleans the
/// scope up.
#[derive(Debug)]
pub struct Store {
    pub(crate) folder: Folder,
    pub(crate) segments: Vec<Arc<Segment>>,
    in_use: Arc<Option<Lock>>,
}

/// A segment of one's own, open for appending. Its entries show in a [`Store`] after [`Store::reload`]. It may outlive the
/// store that it came from. Dropped without [`Writer::finish`], it leaves its entries as safe as they are, but slow to open.
#[derive(Debug)]
pub struct Writer {
    folder: Folder,
    path: PathBuf,
    log: Log,
    /// Keeps the segment from being merged away.
    _in_use: Arc<Option<Lock>>,
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
    /// Somebody uses the scope who cannot share it with the caller: runs against a clean-up, a clean-up against anybody.
    #[error("{folder} is in use: {source}")]
    InUse {
        /// The scope's folder.
        folder: PathBuf,
        /// Who has it, as far as known.
        #[source]
        source: LockError,
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

    /// The same of another path, where it is of `path`.
    pub(crate) fn of(mut self, path: &Path, other: &Path) -> Self {
        if let Self::Damaged { path: at, .. } | Self::NotFinite { path: at, .. } = &mut self
            && at == path
        {
            other.clone_into(at);
        }
        self
    }

    /// File and first byte of what is wrong, where it is something inside a file.
    pub fn place(&self) -> Option<(&Path, u64)> {
        match self {
            Self::Damaged { path, offset, .. }
            | Self::Contradiction { path, offset, .. }
            | Self::NotFinite { path, offset, .. } => Some((path, *offset)),
            _ => None,
        }
    }
}

impl Store {
    /// Opens the entries of `scope` under `dir`, creating both when absent, and checks every byte of logs, and of sorted
    /// segments all but the blocks of entries, which are checked before they are first used.
    ///
    /// The second value lists appends that did not finish; they are left out and left in place. Waits for a clean-up of the
    /// scope that is under way, up to a minute.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Contradiction`] or [`StoreError::NotFinite`] name the file, the byte and
    /// the cure.
    pub fn open(dir: &Path, scope: &Scope) -> Result<(Self, Vec<TornTail>), StoreError> {
        let folder = Folder::of(dir, scope);
        let in_use = Arc::new(folder.share()?);
        folder.keep_scope_file(scope)?;
        let mut store = Self {
            folder,
            segments: Vec::new(),
            in_use,
        };
        let torn = store.reload()?;
        Ok((store, torn))
    }

    /// As [`Store::open`], for looking only: `None` where the scope has no folder, and none is made.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_existing(dir: &Path, scope: &Scope) -> Result<Option<Self>, StoreError> {
        let folder = Folder::of(dir, scope);
        if !folder.path.is_dir() {
            return Ok(None);
        }
        let mut store = Self {
            in_use: Arc::new(folder.share_existing()?),
            folder,
            segments: Vec::new(),
        };
        store.reload()?;
        Ok(Some(store))
    }

    /// A store that nobody else knows, which needs no lock; nothing of it is read yet.
    pub(crate) fn private(folder: Folder) -> Self {
        Self {
            folder,
            segments: Vec::new(),
            in_use: Arc::new(None),
        }
    }

    /// The value of `key`, if this scope has it.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], when the block that may hold it was changed, and [`StoreError::Contradiction`], when two
    /// segments disagree about it.
    pub fn get(&self, key: &EntryKey) -> Result<Option<f32>, StoreError> {
        let mut found: Option<f32> = None;
        for segment in &self.segments {
            let Some((value, place)) = segment.find(key)? else {
                continue;
            };
            if let Some(other) = found
                && other.to_bits() != value.to_bits()
            {
                return Err(segment.contradicts(place, *key, value, other));
            }
            found = Some(value);
        }
        Ok(found)
    }

    /// Counts the entries. That reads and checks every one.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn count(&self) -> Result<usize, StoreError> {
        let mut count = 0;
        for entry in Distinct::new(self.segments.iter().map(Arc::as_ref)) {
            entry?;
            count += 1;
        }
        Ok(count)
    }

    /// Looks for segments anew, those of other processes included; everything whose append has returned is in.
    ///
    /// # Errors
    /// As [`Store::open`]; the segments read before stay.
    pub fn reload(&mut self) -> Result<Vec<TornTail>, StoreError> {
        let mut segments = Vec::new();
        for path in self.folder.segments()? {
            let known = self.segments.iter().find(|segment| {
                // Nobody changes it, and what was checked of it need not be checked again.
                matches!(segment.form, Form::Sorted(_)) && segment.path == path
            });
            segments.push(match known {
                Some(known) => Arc::clone(known),
                None => Arc::new(Segment::open(&path, &self.folder.digest)?),
            });
        }
        self.segments = segments;
        let torn = self.segments.iter().filter_map(|segment| segment.torn());
        Ok(torn.cloned().collect())
    }

    /// Starts a segment of one's own; ask for one only when there is something to store. Any number of writers may be at work
    /// at once, in any processes.
    pub fn writer(&self) -> Result<Writer, StoreError> {
        let path = self.folder.new_segment()?;
        let mut opened = Log::open(&path)?;
        assert!(
            opened.records.is_empty(),
            "{} was just named at random and holds records",
            path.display()
        );
        opened
            .log
            .append(&appended::head_record(&self.folder.digest))?;
        Ok(Writer {
            folder: self.folder.clone(),
            path,
            log: opened.log,
            _in_use: Arc::clone(&self.in_use),
        })
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
            self.log.append(&appended::batch_record(batch))?;
        }
        Ok(())
    }

    /// Ends the segment: its log is replaced by the sorted form, which opens at once. That holds the segment's entries in memory
    /// twice for a moment.
    ///
    /// # Errors
    /// The log is then still in place with all its entries, unless the error is that of the last step, a sync of the folder.
    pub fn finish(self) -> Result<(), StoreError> {
        let log = Segment::open(&self.path, &self.folder.digest)?;
        let entries = || Distinct::new([&log]);
        replace::write(&self.path, &self.folder.digest, log.len(), entries, None)
    }
}
