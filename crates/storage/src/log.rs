//! An append-only log of records, checksummed and chained.
//!
//! ```text
//! header  0   8  magic  "CALDPLOG"
//!         8   4  format version, u32 little endian, 1
//!         12  4  crc32c of bytes 0..12, u32 little endian
//! frame   0   4  payload length n, u32 little endian, at most 16 MiB
//!         4   4  crc32c of length and chain, u32 little endian
//!         8   32 chain: BLAKE3(previous chain ‖ payload); before the first frame the previous chain is BLAKE3(header)
//!         40  n  payload
//! ```
//! The chain covers the payload and makes a frame that was removed, repeated, reordered or brought from another log
//! visible. The checksum vouches for the length before it is believed, so that a flipped length in the middle cannot pass
//! for a torn tail and take the records behind it along. Only a frame that the end of the file cuts short is a torn tail, and
//! zeros up to the end, which some file systems leave of an append that a power cut interrupted.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::{
    files::{FileError, at, atomic_write},
    steps::{Step, before},
};

/// Largest payload of one record, so that a damaged length is caught before anything is allocated.
pub const RECORD_BYTES_MAX: usize = 16 << 20;

const MAGIC: &[u8; 8] = b"CALDPLOG";
const VERSION: u32 = 1;
/// Size of a log without records.
pub const HEADER_BYTES: usize = 16;
/// What a record takes besides its payload.
pub const FRAME_BYTES: usize = 40;

/// A log open for appending. One writer: its owner holds a [`crate::Lock`] beside it.
#[derive(Debug)]
pub struct Log {
    file: File,
    path: PathBuf,
    chain: [u8; 32],
    /// End of the last whole frame; an append that failed half-way is cut back to it.
    end: u64,
}

/// What [`Log::open`] found.
#[derive(Debug)]
pub struct Opened {
    /// The log, ready for the next record.
    pub log: Log,
    /// Payloads of all records, oldest first.
    pub records: Vec<Vec<u8>>,
    /// Bytes of a torn tail that were cut off.
    pub torn_bytes: u64,
}

/// What [`read`] found.
#[derive(Debug)]
pub struct ReadLog {
    /// All whole records, oldest first.
    pub records: Vec<Record>,
    /// Bytes of a torn tail, which is left in place: its writer may still be at it. It begins at [`ReadLog::end`].
    pub torn_bytes: u64,
    /// End of the last whole record.
    pub end: u64,
}

/// One record and where it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    /// First byte of its frame, for reports.
    pub offset: u64,
    /// What was appended.
    pub payload: Vec<u8>,
}

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Bytes that no crash explains. The log is left as it is.
    #[error(
        "{path} is damaged at byte {offset}: {reason}; restore the file, or move it away to start anew"
    )]
    Damaged {
        /// The log.
        path: PathBuf,
        /// First byte of the frame (or header) that does not hold.
        offset: u64,
        /// Which check failed.
        reason: &'static str,
    },
    /// A record larger than [`RECORD_BYTES_MAX`].
    #[error("a record of {bytes} bytes is larger than the limit of {RECORD_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

impl Log {
    /// Opens the log at `path`, creating it when absent, and checks every byte.
    ///
    /// # Errors
    /// [`LogError::Damaged`] for anything but a torn tail, which is cut off and counted.
    pub fn open(path: &Path) -> Result<Opened, LogError> {
        if !path.try_exists().map_err(at("look for", path))? {
            atomic_write(path, &header())?;
        }
        let mut file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(at("open", path))?;
        let Scan {
            records,
            chain,
            end,
            torn_bytes,
        } = scan(path, BufReader::new(&file))?;
        if torn_bytes > 0 {
            file.set_len(end)
                .and_then(|()| file.sync_all())
                .map_err(at("cut the torn tail of", path))?;
        }
        file.seek(SeekFrom::Start(end)).map_err(at("seek", path))?;
        Ok(Opened {
            log: Self {
                file,
                path: path.to_owned(),
                chain,
                end,
            },
            records: records.into_iter().map(|record| record.payload).collect(),
            torn_bytes,
        })
    }

    /// Appends one record; it is durable when this returns.
    ///
    /// # Errors
    /// After an error the record is not in the log, unless cutting back failed too, and then the error says so.
    pub fn append(&mut self, payload: &[u8]) -> Result<(), LogError> {
        if payload.len() > RECORD_BYTES_MAX {
            return Err(LogError::TooLarge {
                bytes: payload.len(),
            });
        }
        let chain = link(&self.chain, payload);
        let frame = frame(&chain, payload);
        if let Err(error) = self.write(&frame) {
            self.file
                .set_len(self.end)
                .and_then(|()| self.file.seek(SeekFrom::Start(self.end)))
                .map_err(at("cut a failed record off", &self.path))?;
            return Err(at("append to", &self.path)(error).into());
        }
        self.chain = chain;
        self.end += frame.len() as u64;
        Ok(())
    }

    /// Whether the file at the log's path is this one as its last append left it: not replaced, and by nobody else appended to.
    /// Where a [`crate::Lock`] does not hold (a file system that lost it, a process that slept through its loss), this tells.
    ///
    /// # Errors
    /// A file that is gone.
    pub fn is_as_left(&self) -> Result<bool, FileError> {
        let look = at("look at", &self.path);
        let there = fs::metadata(&self.path).and_then(|it| Ok((it, self.file.metadata()?)));
        let (there, own) = there.map_err(look)?;
        let same = (there.dev(), there.ino()) == (own.dev(), own.ino());
        Ok(same && there.len() == self.end)
    }

    fn write(&mut self, frame: &[u8]) -> io::Result<()> {
        before(Step::Append(&self.path, frame))?;
        self.file.write_all(frame)?;
        before(Step::SyncFile(&self.path))?;
        self.file.sync_data()
    }
}

/// Reads the log at `path` and checks every byte, but never changes the file: for logs that others may be writing.
///
/// # Errors
/// [`LogError::Damaged`] for anything but a torn tail, which is counted.
pub fn read(path: &Path) -> Result<ReadLog, LogError> {
    let file = File::open(path).map_err(at("open", path))?;
    Ok(scan(path, BufReader::new(file))?.into())
}

/// As [`read`], for the content of a file, from its first byte to its last; `path` is for errors.
///
/// # Errors
/// [`LogError::Damaged`] for anything but a torn tail, which is counted.
pub fn parse(path: &Path, content: impl BufRead) -> Result<ReadLog, LogError> {
    Ok(scan(path, content)?.into())
}

/// The whole frames of a log.
struct Scan {
    records: Vec<Record>,
    /// Chain after the last of them.
    chain: [u8; 32],
    /// Where the last of them ends.
    end: u64,
    /// What follows there.
    torn_bytes: u64,
}

impl From<Scan> for ReadLog {
    fn from(scan: Scan) -> Self {
        Self {
            records: scan.records,
            torn_bytes: scan.torn_bytes,
            end: scan.end,
        }
    }
}

/// Reads a frame at a time, so that nothing is held but records, and no length is believed before its bytes have come.
fn scan(path: &Path, mut content: impl BufRead) -> Result<Scan, LogError> {
    let damaged = |offset: u64, reason| LogError::Damaged {
        path: path.to_owned(),
        offset,
        reason,
    };
    let error = |source| LogError::File(at("read", path)(source));
    let mut start = Vec::with_capacity(HEADER_BYTES);
    take(&mut content, HEADER_BYTES, &mut start).map_err(error)?;
    // The header is written atomically, so a short one is damage and not a torn tail.
    if start != header() {
        return Err(damaged(0, "not a log of this format and version"));
    }
    let mut scan = Scan {
        records: Vec::new(),
        chain: *blake3::hash(&start).as_bytes(),
        end: HEADER_BYTES as u64,
        torn_bytes: 0,
    };
    let mut head = Vec::with_capacity(FRAME_BYTES);
    loop {
        let offset = scan.end;
        take(&mut content, FRAME_BYTES, &mut head).map_err(error)?;
        let Ok(frame) = <&[u8; FRAME_BYTES]>::try_from(&head[..]) else {
            scan.torn_bytes = head.len() as u64;
            return Ok(scan);
        };
        let &[l0, l1, l2, l3, c0, c1, c2, c3, ref chain @ ..] = frame;
        let length = [l0, l1, l2, l3];
        if u32::from_le_bytes([c0, c1, c2, c3]) != head_checksum(length, chain) {
            // A power cut may keep the length of an append and lose its bytes. No frame begins with zeros.
            let zeros = if head.iter().all(|byte| *byte == 0) {
                zeros(&mut content).map_err(error)?
            } else {
                None
            };
            let Some(zeros) = zeros else {
                return Err(damaged(
                    offset,
                    "the checksum of a record's head does not hold",
                ));
            };
            scan.torn_bytes = head.len() as u64 + zeros;
            return Ok(scan);
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > RECORD_BYTES_MAX {
            return Err(damaged(offset, "the length of a record is impossible"));
        }
        let mut payload = Vec::new();
        take(&mut content, length, &mut payload).map_err(error)?;
        if payload.len() < length {
            scan.torn_bytes = (head.len() + payload.len()) as u64;
            return Ok(scan);
        }
        let next = link(&scan.chain, &payload);
        if *chain != next {
            return Err(damaged(
                offset,
                "a record was changed, or does not follow from the one before it",
            ));
        }
        scan.records.push(Record { offset, payload });
        scan.chain = next;
        scan.end = offset + (FRAME_BYTES + length) as u64;
    }
}

/// Fills `bytes` with the next `count` bytes, or with all that are left where these are fewer.
fn take(content: &mut impl BufRead, count: usize, bytes: &mut Vec<u8>) -> io::Result<()> {
    bytes.clear();
    content.take(count as u64).read_to_end(bytes)?;
    bytes.shrink_to_fit();
    Ok(())
}

/// Number of the bytes that are left, if they are zeros.
fn zeros(content: &mut impl BufRead) -> io::Result<Option<u64>> {
    let mut count = 0;
    loop {
        let bytes = content.fill_buf()?;
        if bytes.is_empty() {
            return Ok(Some(count));
        }
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(None);
        }
        let length = bytes.len();
        count += length as u64;
        content.consume(length);
    }
}

fn header() -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let checksum = crc32c::crc32c(&header[..12]);
    header[12..].copy_from_slice(&checksum.to_le_bytes());
    header
}

fn link(previous: &[u8; 32], payload: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(previous).update(payload);
    *hasher.finalize().as_bytes()
}

fn frame(chain: &[u8; 32], payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_le_bytes();
    let checksum = head_checksum(length, chain);
    let mut frame = Vec::with_capacity(FRAME_BYTES + payload.len());
    frame.extend_from_slice(&length);
    frame.extend_from_slice(&checksum.to_le_bytes());
    frame.extend_from_slice(chain);
    frame.extend_from_slice(payload);
    frame
}

fn head_checksum(length: [u8; 4], chain: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&length), chain)
}
