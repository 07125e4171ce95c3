//! A bucket's prefix as a [`Store`], through the crate `object_store`: S3, Google Cloud Storage, Azure, and memory for tests.
//! Its futures run on one runtime of this module's own, which callers never see: they block.

mod client;
mod driver;
mod upload;

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use object_store::{
    Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, UpdateVersion, path::Path as Key,
};
use tokio_stream::StreamExt;

use self::{
    driver::{Pending, run, start},
    upload::RemoteUpload,
};
use crate::{
    FileError,
    files::at,
    folder::was_replaced,
    location::RemoteUrl,
    store::{Condition, Object, Put, Store, Upload, Version},
};

/// Bytes asked for at once, and how many such requests are under way together: enough to hide a round trip.
const FETCH_BYTES: u64 = 8 << 20;
const FETCHES: usize = 4;

/// The objects below a prefix of a bucket.
#[derive(Clone, Debug)]
pub struct RemoteStore {
    store: Arc<dyn ObjectStore>,
    /// What people call the prefix.
    url: String,
    /// Without slashes at its ends; may be empty.
    prefix: String,
}

impl RemoteStore {
    /// The objects in `store` below `prefix`, for a store that no URL and environment describe. `url` is what people call
    /// the prefix. Deadlines of requests and retries are `store`'s own.
    pub fn new(store: Arc<dyn ObjectStore>, url: &str, prefix: &str) -> Self {
        Self {
            store,
            url: url.trim_end_matches('/').to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
        }
    }

    /// The objects at `url`, with the credentials and options of the environment.
    pub(crate) fn open(url: &RemoteUrl) -> Result<Self, FileError> {
        let shown = format!("{}://{}/{}", url.scheme.name(), url.bucket, url.prefix);
        let store = client::client(url)
            .map_err(|error| at("use", Path::new(&shown))(driver::explain(&error)))?;
        Ok(Self::new(store, &shown, &url.prefix))
    }

    /// The object's name in the bucket.
    fn key(&self, key: &str) -> Result<Key, FileError> {
        let joined = [self.prefix.as_str(), key];
        let joined = joined.into_iter().filter(|part| !part.is_empty());
        let joined = joined.collect::<Vec<_>>().join("/");
        Key::parse(&joined).map_err(|error| {
            let refused = io::Error::new(io::ErrorKind::InvalidInput, error.to_string());
            at("name", &self.path(key))(refused)
        })
    }

    /// Waits for one operation on `key`.
    fn ask<T: Send + 'static>(
        &self,
        operation: &'static str,
        key: &str,
        future: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, FileError> {
        run(future).map_err(at(operation, &self.path(key)))
    }

    /// Whether the object has these very bytes.
    fn holds(&self, key: &str, bytes: &[u8]) -> Result<bool, FileError> {
        let Some(object) = self.open(key)? else {
            return Ok(false);
        };
        if object.bytes() != bytes.len() as u64 {
            return Ok(false);
        }
        let mut there = vec![0; bytes.len()];
        match object.read_at(0, &mut there) {
            Ok(()) => Ok(there == bytes),
            // By somebody else, who saw what was there.
            Err(error) if was_replaced(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Store for RemoteStore {
    fn path(&self, key: &str) -> PathBuf {
        if key.is_empty() {
            return self.url.clone().into();
        }
        format!("{}/{key}", self.url).into()
    }

    fn put(&self, key: &str, bytes: &[u8], condition: Condition<'_>) -> Result<Put, FileError> {
        let mode = match condition {
            Condition::Always => PutMode::Overwrite,
            Condition::Absent => PutMode::Create,
            Condition::Unchanged(version) => PutMode::Update(UpdateVersion {
                e_tag: version.tag.clone(),
                version: version.number.clone(),
            }),
        };
        let (store, name) = (Arc::clone(&self.store), self.key(key)?);
        let payload = PutPayload::from(bytes.to_vec());
        let updates = matches!(condition, Condition::Unchanged(_));
        let put = self.ask("put", key, async move {
            let options = PutOptions::from(mode);
            match store.put_opts(&name, payload, options).await {
                Ok(_) => Ok(Put::Done),
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(Put::Refused),
                // What was to be unchanged is gone; for other puts it is the bucket that is not there.
                Err(Error::NotFound { .. }) if updates => Ok(Put::Refused),
                Err(error) => Err(error),
            }
        })?;
        // Refused may mean that our own first try, whose answer was lost, is there already.
        if put == Put::Refused && self.holds(key, bytes)? {
            return Ok(Put::Done);
        }
        Ok(put)
    }

    fn create(&self, key: &str, bytes: u64) -> Result<Box<dyn Upload>, FileError> {
        let (store, name) = (Arc::clone(&self.store), self.key(key)?);
        Ok(Box::new(RemoteUpload::new(
            store,
            name,
            self.path(key),
            bytes,
        )))
    }

    fn open(&self, key: &str) -> Result<Option<Box<dyn Object>>, FileError> {
        let (store, name) = (Arc::clone(&self.store), self.key(key)?);
        let found = self.ask("look for", key, async move {
            match store.head(&name).await {
                Err(Error::NotFound { .. }) => Ok(None),
                found => found.map(Some),
            }
        })?;
        Ok(found.map(|found| -> Box<dyn Object> {
            Box::new(RemoteObject {
                store: Arc::clone(&self.store),
                path: self.path(key),
                version: Version {
                    tag: found.e_tag.clone(),
                    number: found.version.clone(),
                    held: None,
                },
                found,
            })
        }))
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, FileError> {
        let (store, name) = (Arc::clone(&self.store), self.key(folder)?);
        let listed = self.ask("list", folder, async move {
            store.list_with_delimiter(Some(&name)).await
        })?;
        let objects = listed.objects.iter().map(|object| &object.location);
        let keys = listed.common_prefixes.iter().chain(objects);
        let mut names: Vec<String> = keys
            .filter_map(|key| Some(key.filename()?.to_owned()))
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn remove(&self, key: &str) -> Result<(), FileError> {
        let (store, name) = (Arc::clone(&self.store), self.key(key)?);
        self.ask("remove", key, async move { remove(&*store, &name).await })
    }

    fn remove_all(&self, folder: &str) -> Result<(), FileError> {
        let (store, name) = (Arc::clone(&self.store), self.key(folder)?);
        let found: Vec<ObjectMeta> = self.ask("list", folder, async move {
            store.list(Some(&name)).collect::<Result<_, _>>().await
        })?;
        for object in found {
            let (store, name) = (Arc::clone(&self.store), object.location);
            self.ask("remove all of", folder, async move {
                remove(&*store, &name).await
            })?;
        }
        Ok(())
    }
}

async fn remove(store: &dyn ObjectStore, name: &Key) -> Result<(), Error> {
    match store.delete(name).await {
        Err(Error::NotFound { .. }) => Ok(()),
        removed => removed,
    }
}

#[derive(Debug)]
struct RemoteObject {
    store: Arc<dyn ObjectStore>,
    path: PathBuf,
    found: ObjectMeta,
    version: Version,
}

impl RemoteObject {
    fn fetch(&self, range: Range<u64>) -> io::Result<Pending<Vec<u8>>> {
        let (store, name) = (Arc::clone(&self.store), self.found.location.clone());
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            // Of one object and not half of its successor.
            if_match: self.found.e_tag.clone(),
            ..GetOptions::default()
        };
        start(async move {
            let answer = store.get_opts(&name, options).await?;
            Ok(answer.bytes().await?.into())
        })
    }

    fn read(&self, range: Range<u64>, sink: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        if range.end > self.found.size {
            let reason = format!("it ends at byte {}, before {}", self.found.size, range.end);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
        }
        let mut next = range.start;
        let mut pending = VecDeque::new();
        while next < range.end || !pending.is_empty() {
            while next < range.end && pending.len() < FETCHES {
                let end = range.end.min(next + FETCH_BYTES);
                pending.push_back((end - next, self.fetch(next..end)?));
                next = end;
            }
            let Some((expected, fetched)) = pending.pop_front() else {
                break;
            };
            let bytes = fetched.wait()?;
            if bytes.len() as u64 != expected {
                let reason = format!("{} bytes came where {expected} were asked for", bytes.len());
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
            }
            sink(&bytes);
        }
        Ok(())
    }
}

impl Object for RemoteObject {
    fn bytes(&self) -> u64 {
        self.found.size
    }

    fn version(&self) -> &Version {
        &self.version
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), FileError> {
        let range = offset..offset.saturating_add(out.len() as u64);
        let mut filled = 0;
        self.scan(range, &mut |bytes| {
            out[filled..filled + bytes.len()].copy_from_slice(bytes);
            filled += bytes.len();
        })
    }

    fn scan(&self, range: Range<u64>, sink: &mut dyn FnMut(&[u8])) -> Result<(), FileError> {
        self.read(range, sink).map_err(at("read", &self.path))
    }
}
