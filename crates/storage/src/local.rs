//! A folder of a disk as a [`Store`]: keys are paths below it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    FileError,
    directories::{create_directory, remove_directory, remove_file},
    files::{DurableFile, at, directory_of, sync_directory},
    store::{Condition, Object, Put, Store, Upload, Version},
};

/// The objects below a folder of a disk, which need not exist: a put makes what is missing.
#[derive(Clone, Debug)]
pub struct LocalStore {
    root: PathBuf,
}

impl LocalStore {
    /// The objects below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Starts the file of `key`, with the folders above it.
    fn begin(&self, key: &str) -> Result<LocalUpload, FileError> {
        let path = self.path(key);
        create_directory(directory_of(&path))?;
        let depth = key.matches('/').count();
        let above = path.ancestors().skip(2).take(depth);
        Ok(LocalUpload {
            above: above.map(Path::to_owned).collect(),
            file: DurableFile::create(&path)?,
        })
    }
}

impl Store for LocalStore {
    fn path(&self, key: &str) -> PathBuf {
        if key.is_empty() {
            return self.root.clone();
        }
        self.root.join(key)
    }

    fn put(&self, key: &str, bytes: &[u8], condition: Condition<'_>) -> Result<Put, FileError> {
        let mut upload = self.begin(key)?;
        upload.file.append(bytes)?;
        let LocalUpload { file, above } = upload;
        let done = match condition {
            Condition::Always => file.commit().map(|()| true)?,
            Condition::Absent => file.commit_absent()?,
            Condition::Unchanged(version) => {
                file.commit_over(&|metadata| version_of(metadata) == *version)?
            }
        };
        if !done {
            return Ok(Put::Refused);
        }
        sync_all(&above)?;
        Ok(Put::Done)
    }

    fn create(&self, key: &str, _bytes: u64) -> Result<Box<dyn Upload>, FileError> {
        Ok(Box::new(self.begin(key)?))
    }

    fn open(&self, key: &str) -> Result<Option<Box<dyn Object>>, FileError> {
        let path = self.path(key);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => Arc::new(opened.map_err(at("open", &path))?),
        };
        let metadata = file.metadata().map_err(at("inspect", &path))?;
        Ok(Some(Box::new(LocalObject {
            bytes: metadata.len(),
            version: Version {
                held: Some(Arc::clone(&file)),
                ..version_of(&metadata)
            },
            file,
            path,
        })))
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, FileError> {
        let folder = self.path(folder);
        let listed = fs::read_dir(&folder).and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<io::Result<Vec<_>>>()
        });
        let listed = match listed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            listed => listed.map_err(at("list", &folder))?,
        };
        let names = listed
            .into_iter()
            .filter_map(|name| name.into_string().ok());
        let mut names: Vec<String> = names.collect();
        names.sort();
        Ok(names)
    }

    fn remove(&self, key: &str) -> Result<(), FileError> {
        remove_file(&self.path(key))
    }

    fn remove_all(&self, folder: &str) -> Result<(), FileError> {
        remove_directory(&self.path(folder))
    }
}

#[derive(Debug)]
struct LocalUpload {
    file: DurableFile,
    /// Folders between the file's own and the store's, that one included. Another process may have made an entry in one of
    /// them and not have synced it yet.
    above: Vec<PathBuf>,
}

impl Upload for LocalUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.file.append(bytes)
    }

    fn commit(self: Box<Self>) -> Result<(), FileError> {
        self.file.commit()?;
        sync_all(&self.above)
    }
}

fn sync_all(folders: &[PathBuf]) -> Result<(), FileError> {
    folders.iter().try_for_each(|folder| sync_directory(folder))
}

#[derive(Debug)]
struct LocalObject {
    file: Arc<File>,
    path: PathBuf,
    bytes: u64,
    version: Version,
}

impl Object for LocalObject {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn version(&self) -> &Version {
        &self.version
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), FileError> {
        self.file
            .read_exact_at(out, offset)
            .map_err(at("read", &self.path))
    }
}

/// Files are replaced and not changed, so a file's number tells one from the next while the one is open; size and time help
/// against those who do not keep to that.
fn version_of(metadata: &fs::Metadata) -> Version {
    let (device, number, bytes) = (metadata.dev(), metadata.ino(), metadata.len());
    let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
    Version {
        tag: Some(format!(
            "{device}-{number}-{bytes}-{seconds}.{nanoseconds:09}"
        )),
        ..Version::default()
    }
}
