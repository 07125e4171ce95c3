//! One segment file: how its records are made, and how it is read without touching it.
//!
//! Reading goes through [`storage::log::read`]: opening a log for writing cuts its torn tail, and the tail of another
//! process's segment may be an append that is under way.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use storage::log::{self, LogError};

use crate::{EntryKey, StoreError};

/// Ending of a segment's file name; other files in a scope's folder are not read.
pub const EXTENSION: &str = "segment";

/// Most entries of one frame, 2.25 MiB and so far below the log's limit of a record.
pub const BATCH_ENTRIES_MAX: usize = 1 << 16;

const MAGIC: &[u8; 8] = b"CALDPREF";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 8 + 4 + 32;
const KEY_BYTES: usize = 32;
const ENTRY_BYTES: usize = KEY_BYTES + 4;

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

/// What a segment holds.
pub struct Segment {
    /// Entries in the order of writing, with the first byte of the frame that carries them.
    pub entries: Vec<(EntryKey, f32, u64)>,
    /// The unfinished record at its end, if any.
    pub torn: Option<TornTail>,
}

/// The first record of every segment.
pub fn head_record(scope: &[u8; 32]) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), scope].concat()
}

/// One record of entries.
pub fn batch_record(entries: &[(EntryKey, f32)]) -> Vec<u8> {
    let mut record = Vec::with_capacity(entries.len() * ENTRY_BYTES);
    for (key, value) in entries {
        record.extend_from_slice(key.as_bytes());
        record.extend_from_slice(&value.to_le_bytes());
    }
    record
}

/// Size of a segment of `entries` entries that were appended in one call.
pub fn bytes(entries: usize) -> u64 {
    let batches = entries.div_ceil(BATCH_ENTRIES_MAX);
    let payload = HEAD_BYTES + entries * ENTRY_BYTES;
    (log::HEADER_BYTES + (1 + batches) * log::FRAME_BYTES + payload) as u64
}

/// Reads the segment at `path`, which must belong to `scope`, and checks every byte of it.
pub fn read(path: &Path, scope: &[u8; 32]) -> Result<Segment, StoreError> {
    let damaged = |offset, reason| StoreError::Damaged {
        path: path.to_owned(),
        offset,
        reason,
    };
    let read = log::read(path).map_err(|error| match error {
        // The log's words stay, but the cure is the store's: entries can be computed anew.
        LogError::Damaged { offset, reason, .. } => damaged(offset, reason),
        other => other.into(),
    })?;
    let mut records = read.records.iter();
    if let Some(head) = records.next()
        && head.payload != head_record(scope)
    {
        return Err(damaged(
            head.offset,
            "the segment belongs to another scope or another format version",
        ));
    }
    let mut entries = Vec::new();
    for record in records {
        let (batch, rest) = record.payload.as_chunks::<ENTRY_BYTES>();
        if !rest.is_empty() {
            return Err(damaged(
                record.offset,
                "a record is not a whole number of entries",
            ));
        }
        entries.extend(batch.iter().map(|entry| {
            let (key, value) = decode(entry);
            (key, value, record.offset)
        }));
    }
    let torn = (read.torn_bytes > 0).then(|| TornTail {
        path: path.to_owned(),
        offset: read.end,
        bytes: read.torn_bytes,
    });
    Ok(Segment { entries, torn })
}

fn decode(entry: &[u8; ENTRY_BYTES]) -> (EntryKey, f32) {
    let mut key = [0; KEY_BYTES];
    key.copy_from_slice(&entry[..KEY_BYTES]);
    let mut value = [0; 4];
    value.copy_from_slice(&entry[KEY_BYTES..]);
    (EntryKey::from_bytes(key), f32::from_le_bytes(value))
}
