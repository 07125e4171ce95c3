//! A segment while its writer is at work: how records are made, and how they are read without touching the file.
//!
//! Reading goes through [`storage::log::parse`]: opening a log for writing cuts its torn tail, and the tail of another
//! process's segment may be an append that is under way.

use std::{io::BufRead, path::Path};

use storage::log::{self, LogError};

use crate::{
    EntryKey, StoreError, TornTail,
    segment::{ENTRY_BYTES, decode, encode},
};

/// Most entries of one frame, 2.25 MiB and so far below the log's limit of a record.
pub const BATCH_ENTRIES_MAX: usize = 1 << 16;

const MAGIC: &[u8; 8] = b"CALDPREF";
const VERSION: u32 = 1;

/// An entry, with the first byte of the frame that carries it.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    pub key: EntryKey,
    pub value: f32,
    pub offset: u64,
}

/// What a log holds.
#[derive(Debug)]
pub struct Appended {
    /// Ascending by key, each once.
    pub entries: Vec<Placed>,
    /// The unfinished record at its end, if any.
    pub torn: Option<TornTail>,
    /// Size of the log.
    pub bytes: u64,
}

/// The first record of every log.
pub fn head_record(scope: &[u8; 32]) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), scope].concat()
}

/// One record of entries.
pub fn batch_record(entries: &[(EntryKey, f32)]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|&(key, value)| encode(key, value))
        .collect()
}

impl Appended {
    /// Checks every byte of a log, which must belong to `scope`.
    pub fn parse(path: &Path, content: impl BufRead, scope: &[u8; 32]) -> Result<Self, StoreError> {
        let damaged = |offset, reason| StoreError::Damaged {
            path: path.to_owned(),
            offset,
            reason,
        };
        let read = log::parse(path, content).map_err(|error| match error {
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
            let offset = record.offset;
            let (batch, rest) = record.payload.as_chunks::<ENTRY_BYTES>();
            if !rest.is_empty() {
                return Err(damaged(offset, "a record is not a whole number of entries"));
            }
            for (key, value) in batch.iter().map(decode) {
                if !value.is_finite() {
                    return Err(StoreError::NotFinite {
                        path: path.to_owned(),
                        offset,
                        key,
                        value,
                    });
                }
                entries.push(Placed { key, value, offset });
            }
        }
        let torn = (read.torn_bytes > 0).then(|| TornTail {
            path: path.to_owned(),
            offset: read.end,
            bytes: read.torn_bytes,
        });
        let entries = sorted(path, entries)?;
        let bytes = read.end + read.torn_bytes;
        Ok(Self {
            entries,
            torn,
            bytes,
        })
    }
}

/// Sorts by key and keeps one of several equal entries, the earliest.
fn sorted(path: &Path, mut entries: Vec<Placed>) -> Result<Vec<Placed>, StoreError> {
    entries.sort_unstable_by_key(|entry| (entry.key, entry.offset));
    let later = |pair: &&[Placed]| {
        pair[0].key == pair[1].key && pair[0].value.to_bits() != pair[1].value.to_bits()
    };
    if let Some(&[before, after]) = entries.windows(2).find(later) {
        return Err(StoreError::Contradiction {
            path: path.to_owned(),
            offset: after.offset,
            key: after.key,
            value: after.value,
            other: before.value,
        });
    }
    entries.dedup_by_key(|entry| entry.key);
    Ok(entries)
}
