//! The frames of a `.wandb` file: LevelDB's log format with a header of its own.
//!
//! ```text
//! header  0  4  ":W&B"
//!         4  2  0xbee1, u16 little endian
//!         6  1  version, 0
//! block   32 KiB of the file, the header included; a fragment does not cross its end, and fewer than 7 bytes there are zero
//! fragment 0 4  crc32 (zlib's) of type and data, u32 little endian
//!         4  2  length n of the data, u16 little endian
//!         6  1  type: 1 whole record, 2 its first part, 3 a middle part, 4 its last part
//!         7  n  data
//! ```

use std::path::Path;

use storage::{AppendFile, FileError};

/// What a file begins with.
pub(super) const HEADER: [u8; 7] = [b':', b'W', b'&', b'B', 0xe1, 0xbe, 0];

const BLOCK: usize = 32 * 1024;
const FRAGMENT_HEAD: usize = 7;

const WHOLE: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;

/// A record and where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Located {
    /// Where its first fragment begins, padding before it included.
    pub start: u64,
    /// Where its last fragment ends.
    pub end: u64,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// A `.wandb` file open for appending.
#[derive(Debug)]
pub(super) struct TransactionLog(AppendFile);

impl TransactionLog {
    /// Opens the file at `path`, or begins it.
    pub(super) fn open(path: &Path) -> Result<Self, FileError> {
        let mut file = AppendFile::open(path)?;
        if file.bytes() < HEADER.len() as u64 {
            file.cut(0)?;
            file.append(&HEADER)?;
        }
        Ok(Self(file))
    }

    pub(super) fn append(&mut self, payload: &[u8]) -> Result<(), FileError> {
        self.0.append(&fragments(self.0.bytes(), payload))
    }

    /// Removes all that lies behind the first `end` bytes.
    pub(super) fn cut(&mut self, end: u64) -> Result<(), FileError> {
        self.0.cut(end)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.bytes()
    }
}

/// The whole records of a file, up to the first byte that does not hold. `None` where it is not such a file.
pub(super) fn read(bytes: &[u8]) -> Option<Vec<Located>> {
    if bytes.get(..HEADER.len()) != Some(&HEADER) {
        return None;
    }
    let mut records = Vec::new();
    let mut offset = HEADER.len();
    while let Some(record) = record(bytes, offset) {
        offset = record.end as usize;
        records.push(record);
    }
    Some(records)
}

fn record(bytes: &[u8], start: usize) -> Option<Located> {
    let mut payload = Vec::new();
    let mut offset = start;
    loop {
        let left = BLOCK - offset % BLOCK;
        if left < FRAGMENT_HEAD {
            offset += left;
        }
        let head = bytes.get(offset..offset + FRAGMENT_HEAD)?;
        let checksum = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let length = usize::from(u16::from_le_bytes([head[4], head[5]]));
        let kind = head[6];
        let data = bytes.get(offset + FRAGMENT_HEAD..offset + FRAGMENT_HEAD + length)?;
        let begins = matches!(kind, WHOLE | FIRST);
        if checksum != crc(kind, data) || kind > LAST || begins != payload.is_empty() {
            return None;
        }
        payload.extend_from_slice(data);
        offset += FRAGMENT_HEAD + length;
        if matches!(kind, WHOLE | LAST) {
            return Some(Located {
                start: start as u64,
                end: offset as u64,
                payload,
            });
        }
    }
}

/// The bytes that add `payload` to a file of `end` bytes.
fn fragments(end: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(payload.len() + 2 * FRAGMENT_HEAD);
    let mut rest = payload;
    let mut first = true;
    loop {
        let mut room = BLOCK - (end as usize + bytes.len()) % BLOCK;
        if room < FRAGMENT_HEAD {
            bytes.resize(bytes.len() + room, 0);
            room = BLOCK;
        }
        let (data, after) = rest.split_at(rest.len().min(room - FRAGMENT_HEAD));
        let kind = match (first, after.is_empty()) {
            (true, true) => WHOLE,
            (true, false) => FIRST,
            (false, false) => MIDDLE,
            (false, true) => LAST,
        };
        bytes.extend_from_slice(&crc(kind, data).to_le_bytes());
        bytes.extend_from_slice(&(data.len() as u16).to_le_bytes());
        bytes.push(kind);
        bytes.extend_from_slice(data);
        rest = after;
        first = false;
        if rest.is_empty() {
            return bytes;
        }
    }
}

fn crc(kind: u8, data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind]);
    hasher.update(data);
    hasher.finalize()
}
