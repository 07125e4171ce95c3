//! A text file of whole lines, for projections that people and plots read (`metrics.jsonl`). The journal is the truth; such
//! a file can be cut back and written again from it, so lines carry no checksum and appends are not synced one by one.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use crate::files::{FileError, at, directory_of, sync_directory};

/// A file of lines, open for appending. One writer.
#[derive(Debug)]
pub struct LineFile {
    file: File,
    path: PathBuf,
    /// End of the last whole line; an append that failed half-way is cut back to it.
    end: u64,
}

impl LineFile {
    /// Opens the file at `path`, creating it when absent, and cuts off a last line without its end: a torn append.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let created = !path.exists();
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(at("open", path))?;
        if created {
            sync_directory(directory_of(path))?;
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(at("read", path))?;
        let end = whole_lines(&bytes);
        let mut lines = Self {
            file,
            path: path.to_owned(),
            end: bytes.len() as u64,
        };
        lines.cut(end)?;
        Ok(lines)
    }

    /// Length of the file in bytes, which is the end of its last line. Remember it to come back with
    /// [`LineFile::truncate_to`].
    pub fn bytes(&self) -> u64 {
        self.end
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
        let bytes = format!("{line}\n");
        if let Err(error) = self.file.write_all(bytes.as_bytes()) {
            self.cut(self.end)?;
            return Err(at("append to", &self.path)(error));
        }
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Removes all lines that end after `bytes`, durably.
    ///
    /// # Panics
    /// If the file is shorter than `bytes`.
    pub fn truncate_to(&mut self, bytes: u64) -> Result<(), FileError> {
        assert!(
            bytes <= self.end,
            "{} has {} bytes, not {bytes}",
            self.path.display(),
            self.end
        );
        let mut kept = vec![0; bytes as usize];
        self.file
            .rewind()
            .and_then(|()| self.file.read_exact(&mut kept))
            .map_err(at("read", &self.path))?;
        self.cut(whole_lines(&kept))?;
        self.sync()
    }

    /// Makes all lines durable.
    pub fn sync(&mut self) -> Result<(), FileError> {
        self.file.sync_all().map_err(at("sync", &self.path))
    }

    fn cut(&mut self, end: u64) -> Result<(), FileError> {
        self.file
            .set_len(end)
            .and_then(|()| self.file.seek(SeekFrom::Start(end)))
            .map_err(at("cut", &self.path))?;
        self.end = end;
        Ok(())
    }
}

/// Length of the part of `bytes` that is whole lines.
fn whole_lines(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rposition(|&byte| byte == b'\n')
        .map_or(0, |last| last as u64 + 1)
}
