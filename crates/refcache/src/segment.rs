//! One segment file: how its records are made, and how it is read without touching it.
//!
//! Writing goes through [`storage::log::Log`]. Reading does not: opening a log for writing cuts its torn tail, and the
//! tail of another process's segment may be an append that is under way.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use crate::{EntryKey, StoreError};

/// Ending of a segment's file name; other files in a scope's folder are not read.
pub const EXTENSION: &str = "segment";

/// Most entries of one frame, 2.25 MiB and so far below the log's limit of a record.
pub const BATCH_ENTRIES_MAX: usize = 1 << 16;

const MAGIC: &[u8; 8] = b"CALDPREF";
const VERSION: u32 = 1;
const KEY_BYTES: usize = 32;
const ENTRY_BYTES: usize = KEY_BYTES + 4;

/// The part of storage's log format (`storage::log`, version 1) that a reader needs.
const LOG_MAGIC: &[u8; 8] = b"CALDPLOG";
const LOG_VERSION: u32 = 1;
const LOG_HEADER_BYTES: usize = 16;
const FRAME_HEAD_BYTES: usize = 40;

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

/// Reads the segment at `path`, which must belong to `scope`, and checks every byte of it.
pub fn read(path: &Path, scope: &[u8; 32]) -> Result<Segment, StoreError> {
    let bytes = fs::read(path).map_err(|source| StoreError::at("read", path, source))?;
    parse(path, &bytes, scope)
}

fn parse(path: &Path, bytes: &[u8], scope: &[u8; 32]) -> Result<Segment, StoreError> {
    let damaged = |offset: usize, reason| StoreError::Damaged {
        path: path.to_owned(),
        offset: offset as u64,
        reason,
    };
    // The log's header is put in place atomically, so a short one is damage.
    if bytes.get(..LOG_HEADER_BYTES) != Some(&log_header()[..]) {
        return Err(damaged(
            0,
            "not a segment of this format and version (log header)",
        ));
    }
    let mut chain = *blake3::hash(&bytes[..LOG_HEADER_BYTES]).as_bytes();
    let mut offset = LOG_HEADER_BYTES;
    let mut entries = Vec::new();
    while let Some(head) = bytes.get(offset..offset + FRAME_HEAD_BYTES) {
        // The checksum is checked before the length is believed: a flipped length must not pass for a torn tail.
        let (length, checksum) = (u32_at(head, 0), u32_at(head, 4));
        if checksum != crc32c::crc32c_append(crc32c::crc32c(&head[..4]), &head[8..]) {
            return Err(damaged(
                offset,
                "the checksum of a record's head does not hold",
            ));
        }
        let start = offset + FRAME_HEAD_BYTES;
        let Some(payload) = bytes.get(start..start.saturating_add(length as usize)) else {
            break;
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&chain).update(payload);
        chain = *hasher.finalize().as_bytes();
        if head[8..] != chain {
            return Err(damaged(
                offset,
                "a record was changed, or does not follow from the one before it",
            ));
        }
        if offset == LOG_HEADER_BYTES {
            if payload != head_record(scope) {
                return Err(damaged(
                    offset,
                    "the segment belongs to another scope or another format version",
                ));
            }
        } else {
            let (batch, rest) = payload.as_chunks::<ENTRY_BYTES>();
            if !rest.is_empty() {
                return Err(damaged(offset, "a record is not a whole number of entries"));
            }
            entries.extend(batch.iter().map(|entry| {
                let (key, value) = decode(entry);
                (key, value, offset as u64)
            }));
        }
        offset = start + payload.len();
    }
    let torn = (offset < bytes.len()).then(|| TornTail {
        path: path.to_owned(),
        offset: offset as u64,
        bytes: (bytes.len() - offset) as u64,
    });
    Ok(Segment { entries, torn })
}

fn decode(entry: &[u8; ENTRY_BYTES]) -> (EntryKey, f32) {
    let mut key = [0; KEY_BYTES];
    key.copy_from_slice(&entry[..KEY_BYTES]);
    let value = f32::from_bits(u32_at(entry, KEY_BYTES));
    (EntryKey::from_bytes(key), value)
}

fn log_header() -> [u8; LOG_HEADER_BYTES] {
    let mut header = [0; LOG_HEADER_BYTES];
    header[..8].copy_from_slice(LOG_MAGIC);
    header[8..12].copy_from_slice(&LOG_VERSION.to_le_bytes());
    let checksum = crc32c::crc32c(&header[..12]);
    header[12..].copy_from_slice(&checksum.to_le_bytes());
    header
}

fn u32_at(bytes: &[u8], start: usize) -> u32 {
    u32::from_le_bytes([
        bytes[start],
        bytes[start + 1],
        bytes[start + 2],
        bytes[start + 3],
    ])
}
