//! A text file of whole lines, for projections that people and plots read (`metrics.jsonl`). The journal is the truth; such
//! a file can be cut back and written again from it, so lines carry no checksum and appends are not synced one by one.

use std::path::Path;

use crate::{append::AppendFile, files::FileError};

/// A file of lines, open for appending. One writer.
#[derive(Debug)]
pub struct LineFile(AppendFile);

impl LineFile {
    /// Opens the file at `path`, creating it when absent, and cuts off a last line without its end: a torn append.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let mut file = AppendFile::open(path)?;
        let bytes = file.read(file.bytes())?;
        file.cut(whole_lines(&bytes))?;
        Ok(Self(file))
    }

    /// Length of the file in bytes, which is the end of its last line. Remember it to come back with
    /// [`LineFile::truncate_to`].
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Adds one line. A reader sees it at once; it outlives a power cut after [`LineFile::sync`].
    ///
    /// # Errors
    /// The line is then not in the file, unless cutting back failed too, and then the error says so.
    ///
    /// # Panics
    /// If `line` holds a line end.
    pub fn append(&mut self, line: &str) -> Result<(), FileError> {
        assert!(!line.contains('\n'), "a line end within the line {line:?}");
        self.0.append(format!("{line}\n").as_bytes())
    }

    /// Removes all lines that end after `bytes`, durably.
    ///
    /// # Panics
    /// If the file is shorter than `bytes`.
    pub fn truncate_to(&mut self, bytes: u64) -> Result<(), FileError> {
        assert!(
            bytes <= self.bytes(),
            "{} has {} bytes, not {bytes}",
            self.0.path().display(),
            self.bytes()
        );
        let kept = self.0.read(bytes)?;
        self.0.cut(whole_lines(&kept))?;
        self.sync()
    }

    /// Makes all lines durable.
    pub fn sync(&mut self) -> Result<(), FileError> {
        self.0.sync()
    }
}

/// Length of the part of `bytes` that is whole lines.
fn whole_lines(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rposition(|&byte| byte == b'\n')
        .map_or(0, |last| last as u64 + 1)
}
