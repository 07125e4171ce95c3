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

/// A record and where it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Located {
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

    pub(super) fn sync(&mut self) -> Result<(), FileError> {
        self.0.sync()
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

fn record(bytes: &[u8], mut offset: usize) -> Option<Located> {
    let mut payload = Vec::new();
    let mut begun = false;
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
        let fits = match kind {
            WHOLE | FIRST => !begun,
            MIDDLE | LAST => begun,
            _ => false,
        };
        if !fits || checksum != crc(kind, data) {
            return None;
        }
        begun = true;
        payload.extend_from_slice(data);
        offset += FRAGMENT_HEAD + length;
        if matches!(kind, WHOLE | LAST) {
            return Some(Located {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(length: usize, period: usize) -> Vec<u8> {
        (0..length).map(|at| (at % period) as u8).collect()
    }

    /// Records that leave 0 to 9 bytes of a block, each with a short one behind it, and one over several blocks.
    fn payloads() -> Vec<Vec<u8>> {
        let mut payloads = Vec::new();
        let mut end = HEADER.len() as u64;
        let mut add = |payload: Vec<u8>, end: &mut u64| {
            *end += fragments(*end, &payload).len() as u64;
            payloads.push(payload);
        };
        for left in 0..10 {
            let room = BLOCK - end as usize % BLOCK;
            // The next block begins where no fragment fits.
            let room = if room < FRAGMENT_HEAD { BLOCK } else { room };
            let length = (room - FRAGMENT_HEAD).checked_sub(left);
            let length = length.unwrap_or_else(|| room + BLOCK - 2 * FRAGMENT_HEAD - left);
            add(pattern(length, 251), &mut end);
            add(pattern(5, 249), &mut end);
        }
        add(pattern(100_000, 251), &mut end);
        payloads
    }

    fn file(payloads: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = HEADER.to_vec();
        for payload in payloads {
            bytes.extend(fragments(bytes.len() as u64, payload));
        }
        bytes
    }

    /// Length and crc32 of what the DataStore of wandb 0.22.3 makes of the same payloads.
    #[test]
    fn files_are_those_of_wandbs_own_writer() {
        let short = b":W&B\xe1\xbe\0\xa9\x20\x9d\x53\x03\0\x01abc";
        assert_eq!(file(&[b"abc".to_vec()]), short);
        let bytes = file(&payloads());
        assert_eq!(
            (bytes.len(), crc32fast::hash(&bytes)),
            (427_718, 0x6bcf_ab84)
        );
    }

    #[test]
    fn records_are_read_as_they_were_written_wherever_they_lie() {
        let payloads = payloads();
        let bytes = file(&payloads);
        let records = read(&bytes).expect("a file of W&B");
        assert_eq!(records.len(), payloads.len());
        for (index, (record, payload)) in records.iter().zip(&payloads).enumerate() {
            assert!(record.payload == *payload, "record {index}");
        }
        let last = records.last().expect("the longest record");
        assert_eq!(last.end, bytes.len() as u64);
        assert_eq!(read(b"CALDPLOG"), None);
    }

    #[test]
    fn a_file_cut_or_flipped_at_any_byte_gives_the_records_before() {
        let payloads = [pattern(30, 251), Vec::new(), pattern(4, 251)];
        let bytes = file(&payloads);
        let all = read(&bytes).expect("a file of W&B");
        for at in HEADER.len()..bytes.len() {
            let whole = all
                .iter()
                .take_while(|record| record.end <= at as u64)
                .count();
            assert_eq!(
                read(&bytes[..at]).as_deref(),
                Some(&all[..whole]),
                "cut at {at}"
            );
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert_eq!(
                read(&flipped).as_deref(),
                Some(&all[..whole]),
                "flipped at {at}"
            );
        }
    }
}
