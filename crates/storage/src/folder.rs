//! A folder of a store, which is what a path or URL in a config or on a command line stands for.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    FileError,
    files::at,
    local::LocalStore,
    location::{self, Location},
    store::{Condition, Object, Put, Store, Upload, Version},
};

/// Most bytes of an object that is read whole; manifests of thousands of ranks and vocabularies are far below.
const READ_BYTES_MAX: u64 = 1 << 30;

/// How often an object is read anew because it was replaced on the way.
const READS_MAX: usize = 8;

/// Whether a read failed because the object was replaced or removed after it was opened.
pub fn was_replaced(error: &FileError) -> bool {
    matches!(
        error.source.kind(),
        ErrorKind::StaleNetworkFileHandle | ErrorKind::NotFound
    )
}

/// The store whose own folder is the one at `location`: a path, `file:///path`, or with the feature `object-store` one of
/// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` and, for tests, `memory://name/prefix`. Nothing is
/// read or written, and nobody is asked.
///
/// # Errors
/// A URL that cannot be used, and why; a client that cannot be made of what the environment says.
pub fn open(location: &Path) -> Result<Arc<dyn Store>, FileError> {
    Ok(match location::parse(location)? {
        Location::Local(root) => Arc::new(LocalStore::new(root)),
        #[cfg(feature = "object-store")]
        Location::Remote(url) => Arc::new(crate::remote::RemoteStore::open(&url)?),
        #[cfg(not(feature = "object-store"))]
        Location::Remote(_) => {
            let reason = "this program was built without object stores; build it with the feature `object-store`, or name \
                          a folder";
            let unsupported = std::io::Error::new(ErrorKind::Unsupported, reason);
            return Err(crate::files::at("use", location)(unsupported));
        }
    })
}

/// A folder of a [`Store`]; names below it may have slashes. Need not exist.
#[derive(Clone, Debug)]
pub struct Folder {
    store: Arc<dyn Store>,
    /// Without a slash at its end; empty for the store's own folder.
    key: String,
}

impl Folder {
    /// The folder at `location`, as [`open`] takes it.
    pub fn open(location: &Path) -> Result<Self, FileError> {
        Ok(Self::of(open(location)?))
    }

    /// The store's own folder.
    pub fn of(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            key: String::new(),
        }
    }

    /// The folder or object `name` in it.
    #[must_use]
    pub fn below(&self, name: &str) -> Self {
        Self {
            store: Arc::clone(&self.store),
            key: self.key(name),
        }
    }

    /// What people call it, and what [`Folder::open`] takes.
    pub fn path(&self) -> PathBuf {
        self.store.path(&self.key)
    }

    /// [`Store::put`] of `name` in it.
    pub fn put(
        &self,
        name: &str,
        bytes: &[u8],
        condition: Condition<'_>,
    ) -> Result<Put, FileError> {
        self.store.put(&self.key(name), bytes, condition)
    }

    /// [`Store::create`] of `name` in it.
    pub fn create(&self, name: &str, bytes: u64) -> Result<Box<dyn Upload>, FileError> {
        self.store.create(&self.key(name), bytes)
    }

    /// [`Store::open`] of `name` in it.
    pub fn object(&self, name: &str) -> Result<Option<Box<dyn Object>>, FileError> {
        self.store.open(&self.key(name))
    }

    /// All bytes of `name` in it; none where there is no such object.
    ///
    /// # Errors
    /// Also where it is larger than 1 GiB, before anything is read.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, FileError> {
        Ok(self.read_versioned(name)?.map(|(bytes, _)| bytes))
    }

    /// [`Folder::read`] with what tells these bytes from others that `name` had or will have.
    ///
    /// # Errors
    /// Also where the object is replaced again and again while it is read.
    pub fn read_versioned(&self, name: &str) -> Result<Option<(Vec<u8>, Version)>, FileError> {
        let mut tries = 0;
        loop {
            let Some(object) = self.object(name)? else {
                return Ok(None);
            };
            let size = object.bytes();
            if size > READ_BYTES_MAX {
                let reason = format!("it has {size} bytes, more than is read at once");
                let large = io::Error::new(ErrorKind::FileTooLarge, reason);
                return Err(at("read", &self.store.path(&self.key(name)))(large));
            }
            let mut bytes = vec![0; size as usize];
            match object.read_at(0, &mut bytes) {
                Ok(()) => return Ok(Some((bytes, object.version().clone()))),
                Err(error) if was_replaced(&error) && tries < READS_MAX => tries += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// [`Store::list`] of it.
    pub fn list(&self) -> Result<Vec<String>, FileError> {
        self.store.list(&self.key)
    }

    /// [`Store::remove`] of `name` in it.
    pub fn remove(&self, name: &str) -> Result<(), FileError> {
        self.store.remove(&self.key(name))
    }

    /// [`Store::remove_all`] of it.
    pub fn remove_all(&self) -> Result<(), FileError> {
        self.store.remove_all(&self.key)
    }

    fn key(&self, name: &str) -> String {
        if self.key.is_empty() {
            name.to_owned()
        } else {
            format!("{}/{name}", self.key)
        }
    }
}
