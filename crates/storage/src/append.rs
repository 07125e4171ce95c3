//! A file of bytes that grows at its end and can be cut back. What the bytes mean, and where a record of them ends, is its
//! owner's.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use crate::files::{FileError, at, directory_of, sync_directory};

/// A file open for appending. One writer.
#[derive(Debug)]
pub struct AppendFile {
    file: File,
    path: PathBuf,
    /// End of the last whole append; one that failed half-way is cut back to it.
    end: u64,
}

impl AppendFile {
    /// Opens the file at `path`, creating it when absent; appends go behind what is there.
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
        let end = file.seek(SeekFrom::End(0)).map_err(at("seek", path))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            end,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.end
    }

    /// Reads its first `bytes`, or all where it is shorter.
    pub fn read(&mut self, bytes: u64) -> Result<Vec<u8>, FileError> {
        let mut content = Vec::new();
        self.file
            .rewind()
            .and_then(|()| (&self.file).take(bytes).read_to_end(&mut content))
            .and_then(|_| self.file.seek(SeekFrom::Start(self.end)))
            .map_err(at("read", &self.path))?;
        Ok(content)
    }

    /// Adds `bytes`. A reader sees them at once; they outlive a power cut after [`AppendFile::sync`].
    ///
    /// # Errors
    /// None of them is then in the file, unless cutting back failed too, and then the error says so.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        if let Err(error) = self.file.write_all(bytes) {
            self.cut(self.end)?;
            return Err(at("append to", &self.path)(error));
        }
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Removes everything behind the first `end` bytes; durable after [`AppendFile::sync`].
    ///
    /// # Panics
    /// If the file is shorter.
    pub fn cut(&mut self, end: u64) -> Result<(), FileError> {
        assert!(
            end <= self.end,
            "{} has {} bytes, not {end}",
            self.path.display(),
            self.end
        );
        self.file
            .set_len(end)
            .and_then(|()| self.file.seek(SeekFrom::Start(end)))
            .map_err(at("cut", &self.path))?;
        self.end = end;
        Ok(())
    }

    /// Makes the content durable.
    pub fn sync(&mut self) -> Result<(), FileError> {
        self.file.sync_all().map_err(at("sync", &self.path))
    }
}
