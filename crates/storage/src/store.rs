//! Where durable objects live: whole files under slash-separated keys, on a local disk or in an object store. What each
//! backend promises stands in the crate's documentation. Not here: which backend a path or URL stands for (`location`), and
//! files that grow ([`crate::log`], [`crate::AppendFile`]), which no object store has.

use std::{fmt, fs::File, ops::Range, path::PathBuf, sync::Arc};

use crate::FileError;

/// Bytes handed over at once by [`Object::scan`] on a local disk.
const SCAN_BYTES: u64 = 1 << 20;

/// Objects under keys such as `step-00000100/manifest.json`. All calls block, and each ends within a deadline of the backend.
///
/// # Errors
/// Of all calls: what the backend answered, after the retries that it makes. Its kind tells a missing permission, a full
/// disk and a deadline apart. An object that is absent is no error.
pub trait Store: fmt::Debug + Send + Sync {
    /// What people call the object or folder `key`, and what [`crate::Folder::open`] takes: a path, or a URL.
    fn path(&self, key: &str) -> PathBuf;

    /// Puts `bytes` in place as the object `key` if `condition` holds: readers see the old object or the new one, never a
    /// mixture. Durable when it returns.
    ///
    /// An object store may have carried the put out and lost the answer; there an object that already has the very same bytes
    /// counts as put. So a put is no lock for two writers of the same bytes.
    ///
    /// # Errors
    /// The object is then as before, or as wanted; never in between.
    fn put(&self, key: &str, bytes: &[u8], condition: Condition<'_>) -> Result<Put, FileError>;

    /// Begins an object that is written in pieces and replaces whatever is there at [`Upload::commit`]. `bytes` is the size
    /// that is expected: it decides how large the parts are that an object store gets.
    fn create(&self, key: &str, bytes: u64) -> Result<Box<dyn Upload>, FileError>;

    /// The object `key` as it is now; none where there is none.
    fn open(&self, key: &str) -> Result<Option<Box<dyn Object>>, FileError>;

    /// Names directly below `folder`, of objects and of folders, sorted; none where there is no such folder. The key of the
    /// store's own folder is empty. Names that are not text are left out.
    fn list(&self, folder: &str) -> Result<Vec<String>, FileError>;

    /// Removes the object `key`, durably. One that is not there is fine.
    fn remove(&self, key: &str) -> Result<(), FileError>;

    /// Removes everything below `folder`, durably and in any order: remove first what makes it valid.
    ///
    /// # Errors
    /// Part of the content may then be gone.
    fn remove_all(&self, folder: &str) -> Result<(), FileError>;
}

/// An object being written. Dropped before [`Upload::commit`], it was never there.
pub trait Upload: Send {
    /// Adds `bytes` at the end.
    fn append(&mut self, bytes: &[u8]) -> Result<(), FileError>;

    /// Makes the object durable and puts it in place of whatever had the key.
    ///
    /// # Errors
    /// The old object stays, unless the answer to the last step alone was lost: then it is either of the two.
    fn commit(self: Box<Self>) -> Result<(), FileError>;
}

/// An object as it was when it was opened.
pub trait Object: fmt::Debug + Send + Sync {
    /// Its size.
    fn bytes(&self) -> u64;

    /// What tells it from what was there before and from what may come after it.
    fn version(&self) -> &Version;

    /// Fills `out` with its bytes from `offset` on.
    ///
    /// # Errors
    /// It ends before `out` does; or, in an object store, it was replaced meanwhile (`StaleNetworkFileHandle`) or removed.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), FileError>;

    /// Hands over the bytes of `range` in order, in pieces that suit the backend.
    ///
    /// # Errors
    /// As [`Object::read_at`]; some pieces may have been handed over.
    fn scan(&self, range: Range<u64>, sink: &mut dyn FnMut(&[u8])) -> Result<(), FileError> {
        let mut buffer = vec![0; (range.end.saturating_sub(range.start)).min(SCAN_BYTES) as usize];
        let mut offset = range.start;
        while offset < range.end {
            let count = buffer.len().min((range.end - offset) as usize);
            self.read_at(offset, &mut buffer[..count])?;
            sink(&buffer[..count]);
            offset += count as u64;
        }
        Ok(())
    }
}

/// When a put may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition<'a> {
    /// Whatever is there.
    Always,
    /// Nothing is there.
    Absent,
    /// What is there has this version still.
    Unchanged(&'a Version),
}

/// What became of a put.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The bytes are in place and durable.
    Done,
    /// The condition did not hold; nothing was changed. Look at what is there now.
    Refused,
}

/// Tells one content of a key from another: what a service or a file system says of it.
#[derive(Clone, Debug, Default)]
pub struct Version {
    /// An entity tag, or a file's number, size and time.
    pub(crate) tag: Option<String>,
    /// A number that a service counts up, where it has one.
    pub(crate) number: Option<String>,
    /// The file itself: as long as it is open no other one gets its number.
    #[expect(dead_code, reason = "held, not used")]
    pub(crate) held: Option<Arc<File>>,
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        (&self.tag, &self.number) == (&other.tag, &other.number)
    }
}

impl Eq for Version {}
