//! One segment file in either form: a log that its writer appends to, or the sorted form that is made of it at the end.

use std::{
    fmt,
    fs::File,
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

use crate::{
    EntryKey, StoreError,
    appended::Appended,
    search::partition_near,
    sorted::{self, Sorted},
};

/// Ending of a segment's file name; other files in a scope's folder are not read.
pub const EXTENSION: &str = "segment";

pub const KEY_BYTES: usize = 32;
/// An entry in both forms: 32 bytes of key, then its value, f32 little endian.
pub const ENTRY_BYTES: usize = KEY_BYTES + 4;

/// An append that did not finish: its writer died, or is still at it. The entries before it are in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    /// The segment.
    pub path: PathBuf,
    /// First byte of the unfinished record.
    pub offset: u64,
    /// Bytes from there to the end of the file.
    pub bytes: u64,
}

impl fmt::Display for TornTail {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} ends in an unfinished record of {} bytes at byte {}; its writer died or is still writing, so these \
             entries are computed anew",
            self.path.display(),
            self.bytes,
            self.offset
        )
    }
}

/// A segment that is open for reading.
#[derive(Debug)]
pub struct Segment {
    pub path: PathBuf,
    /// Size of its file.
    pub bytes: u64,
    pub form: Form,
}

#[derive(Debug)]
pub enum Form {
    /// Every byte is checked.
    Appended(Appended),
    /// Each block is checked when it is first used.
    Sorted(Sorted),
}

impl Segment {
    /// Opens the segment at `path`, which must belong to `scope`.
    pub fn open(path: &Path, scope: &[u8; 32]) -> Result<Self, StoreError> {
        let error = |source| StoreError::at("read", path, source);
        // Opened once: the name may lead to another form the next time.
        let mut file = File::open(path).map_err(error)?;
        let mut start = Vec::new();
        let mut head = (&mut file).take(sorted::MAGIC.len() as u64);
        head.read_to_end(&mut start).map_err(error)?;
        let (bytes, form) = if start == sorted::MAGIC {
            let mapping = storage::map(&file, path)?;
            let bytes = mapping.len() as u64;
            (bytes, Form::Sorted(Sorted::open(path, mapping, scope)?))
        } else {
            let content = start.chain(BufReader::new(file));
            let appended = Appended::parse(path, content, scope)?;
            (appended.bytes, Form::Appended(appended))
        };
        Ok(Self {
            path: path.to_owned(),
            bytes,
            form,
        })
    }

    /// Number of entries, which are in ascending order of their keys, each once.
    pub fn len(&self) -> usize {
        match &self.form {
            Form::Appended(appended) => appended.entries.len(),
            Form::Sorted(sorted) => sorted.len(),
        }
    }

    /// The unfinished record at its end, if any.
    pub fn torn(&self) -> Option<&TornTail> {
        match &self.form {
            Form::Appended(appended) => appended.torn.as_ref(),
            Form::Sorted(_) => None,
        }
    }

    /// The entry at a place in the order, below [`Segment::len`].
    pub fn entry(&self, index: usize) -> Result<(EntryKey, f32), StoreError> {
        match &self.form {
            Form::Appended(appended) => {
                let entry = &appended.entries[index];
                Ok((entry.key, entry.value))
            }
            Form::Sorted(sorted) => sorted.entry(&self.path, index),
        }
    }

    /// The error that the entry at `place` in the order has another value in a segment that was read before.
    pub fn contradicts(&self, place: usize, key: EntryKey, value: f32, other: f32) -> StoreError {
        StoreError::Contradiction {
            path: self.path.clone(),
            offset: self.offset(place),
            key,
            value,
            other,
        }
    }

    /// First byte of the record or block that holds the entry at a place in the order.
    pub fn offset(&self, index: usize) -> u64 {
        match &self.form {
            Form::Appended(appended) => appended.entries[index].offset,
            Form::Sorted(_) => sorted::offset(index),
        }
    }

    /// Value and place of `key`.
    pub fn find(&self, key: &EntryKey) -> Result<Option<(f32, usize)>, StoreError> {
        match &self.form {
            Form::Appended(Appended { entries, .. }) => {
                let guess = key.place_of(entries.len());
                let index = partition_near(entries.len(), guess, |index| entries[index].key < *key);
                let found = entries.get(index).filter(|entry| entry.key == *key);
                Ok(found.map(|entry| (entry.value, index)))
            }
            Form::Sorted(sorted) => sorted.find(&self.path, key),
        }
    }
}

/// The bytes of an entry.
pub fn encode(key: EntryKey, value: f32) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    entry[..KEY_BYTES].copy_from_slice(key.as_bytes());
    entry[KEY_BYTES..].copy_from_slice(&value.to_le_bytes());
    entry
}

/// The entry of these bytes.
pub fn decode(entry: &[u8; ENTRY_BYTES]) -> (EntryKey, f32) {
    let mut key = [0; KEY_BYTES];
    key.copy_from_slice(&entry[..KEY_BYTES]);
    let mut value = [0; 4];
    value.copy_from_slice(&entry[KEY_BYTES..]);
    (EntryKey::from_bytes(key), f32::from_le_bytes(value))
}
