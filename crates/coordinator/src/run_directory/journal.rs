//! The journal as one coordinator writes it: every record under its fence, the first of them that it took the run over. Who only
//! looks at a run, a finished one for example, changes nothing.
//!
//! The directory's lock keeps a second coordinator out. Where it does not (a file system that lost it, a folder that was copied
//! back, a process that slept through all that), the fence does: the one that opened the journal last writes on, and the other
//! finds, before its next record, a file that is not as it left it. Between that look and the write there is only the lock.

use std::path::{Path, PathBuf};

use protocol::{Entry, Fence, Record, fenced};
use storage::log::Log;

use super::RunDirectoryError;

/// A run's journal, opened.
pub(super) struct Journal {
    path: PathBuf,
    log: Log,
    fence: Fence,
    /// Whether that is in the journal.
    taken_over: bool,
}

/// What [`Journal::open`] found.
pub(super) struct OpenedJournal {
    pub(super) journal: Journal,
    /// Oldest first.
    pub(super) records: Vec<Record>,
    /// Bytes of a torn last record that were cut off.
    pub(super) torn_bytes: u64,
}

impl Journal {
    /// Opens the journal, with a fence above all before it.
    ///
    /// # Errors
    /// Damage, and records of a coordinator that had been replaced when it wrote them.
    pub(super) fn open(path: &Path) -> Result<OpenedJournal, RunDirectoryError> {
        let opened = Log::open(path)?;
        let entries = parse(path, &opened.records)?;
        let contradiction = |source| RunDirectoryError::Contradiction {
            path: path.to_owned(),
            source,
        };
        let (records, fence) = fenced(entries).map_err(contradiction)?;
        let journal = Self {
            path: path.to_owned(),
            log: opened.log,
            fence,
            taken_over: false,
        };
        Ok(OpenedJournal {
            journal,
            records,
            torn_bytes: opened.torn_bytes,
        })
    }

    /// Makes the fence durable, if it is not; whoever had the journal before writes no more.
    ///
    /// # Errors
    /// [`RunDirectoryError::Replaced`].
    pub(super) fn take_over(&mut self) -> Result<Fence, RunDirectoryError> {
        if !self.taken_over {
            self.write(Record::Opened)?;
            self.taken_over = true;
        }
        Ok(self.fence)
    }

    /// Appends a record; durable when it returns.
    ///
    /// # Errors
    /// [`RunDirectoryError::Replaced`]: the record is not in the journal, and this coordinator must not go on.
    pub(super) fn append(&mut self, record: Record) -> Result<(), RunDirectoryError> {
        self.take_over()?;
        self.write(record)
    }

    fn write(&mut self, record: Record) -> Result<(), RunDirectoryError> {
        self.check()?;
        let entry = Entry {
            fence: self.fence,
            record,
        };
        let payload = serde_json::to_vec(&entry).expect("a record has only strings for keys");
        Ok(self.log.append(&payload)?)
    }

    /// Whether nobody else wrote to the journal since.
    ///
    /// # Errors
    /// [`RunDirectoryError::Replaced`].
    pub(super) fn check(&self) -> Result<(), RunDirectoryError> {
        if self.log.is_as_left()? {
            return Ok(());
        }
        Err(RunDirectoryError::Replaced {
            path: self.path.clone(),
            fence: self.fence,
        })
    }
}

fn parse(path: &Path, payloads: &[Vec<u8>]) -> Result<Vec<Entry>, RunDirectoryError> {
    let entries = payloads.iter().enumerate().map(|(index, payload)| {
        serde_json::from_slice(payload).map_err(|error| RunDirectoryError::Record {
            path: path.to_owned(),
            index: index + 1,
            reason: error.to_string(),
        })
    });
    entries.collect()
}
