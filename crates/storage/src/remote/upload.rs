//! An object sent in parts that are under way together; one that fits in a part is sent at once.

use std::{io, mem, path::PathBuf, sync::Arc};

use object_store::{
    Error, MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload, path::Path as Key,
};
use tokio::task::JoinSet;

use super::driver::run;
use crate::{FileError, files::at, store::Upload};

/// Least size of a part but the last.
const PART_BYTES: u64 = 16 << 20;
/// Most parts that a size known beforehand is cut into; S3 takes 10 000.
const PARTS_MAX: u64 = 9_000;
/// Parts under way together, and so in memory, besides the one that is filled.
const PARTS_UNDER_WAY: usize = 4;

pub(super) struct RemoteUpload {
    store: Arc<dyn ObjectStore>,
    name: Key,
    path: PathBuf,
    part_bytes: usize,
    /// The part that is being filled.
    part: Vec<u8>,
    sent: Sent,
}

/// What the store has of it.
enum Sent {
    Nothing,
    Parts(Parts),
    /// An operation failed and took the parts with it.
    Lost,
}

impl RemoteUpload {
    pub fn new(store: Arc<dyn ObjectStore>, name: Key, path: PathBuf, bytes: u64) -> Self {
        let part = bytes.div_ceil(PARTS_MAX).next_multiple_of(1 << 20);
        Self {
            store,
            name,
            path,
            part_bytes: part.max(PART_BYTES) as usize,
            part: Vec::new(),
            sent: Sent::Nothing,
        }
    }

    /// Sends the part that is full, once there is room for one more under way.
    fn send(&mut self) -> io::Result<()> {
        let part = mem::take(&mut self.part);
        let parts = match mem::replace(&mut self.sent, Sent::Lost) {
            Sent::Parts(parts) => parts,
            Sent::Nothing => {
                let (store, name) = (Arc::clone(&self.store), self.name.clone());
                run(async move { Parts::begin(&*store, &name).await })?
            }
            Sent::Lost => return Err(lost()),
        };
        self.sent = Sent::Parts(run(parts.send(part))?);
        self.part.reserve_exact(self.part_bytes);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        let part = mem::take(&mut self.part);
        match mem::replace(&mut self.sent, Sent::Lost) {
            Sent::Nothing => {
                let (store, name) = (Arc::clone(&self.store), self.name.clone());
                run(async move { store.put(&name, PutPayload::from(part)).await.map(drop) })
            }
            Sent::Parts(parts) => run(parts.complete(part)),
            Sent::Lost => Err(lost()),
        }
    }
}

fn lost() -> io::Error {
    io::Error::other("an earlier part could not be sent")
}

impl Upload for RemoteUpload {
    fn append(&mut self, mut bytes: &[u8]) -> Result<(), FileError> {
        while !bytes.is_empty() {
            if self.part.len() == self.part_bytes {
                self.send().map_err(at("write", &self.path))?;
            }
            let (now, later) = bytes.split_at(bytes.len().min(self.part_bytes - self.part.len()));
            self.part.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    fn commit(mut self: Box<Self>) -> Result<(), FileError> {
        self.finish().map_err(at("complete", &self.path))
    }
}

impl Drop for RemoteUpload {
    fn drop(&mut self) {
        if let Sent::Parts(parts) = mem::replace(&mut self.sent, Sent::Lost) {
            // Whoever drops it already has an error to tell; parts that stay are the bucket's lifecycle rule's to remove.
            drop(run(async move {
                parts.abort().await;
                Ok(())
            }));
        }
    }
}

/// An upload that has begun.
struct Parts {
    upload: Box<dyn MultipartUpload>,
    under_way: JoinSet<Result<(), Error>>,
}

impl Parts {
    async fn begin(store: &dyn ObjectStore, name: &Key) -> Result<Self, Error> {
        Ok(Self {
            upload: store
                .put_multipart_opts(name, object_store::PutMultipartOptions::default())
                .await?,
            under_way: JoinSet::new(),
        })
    }

    /// Lets the next part go. After an error none is left.
    async fn send(mut self, part: Vec<u8>) -> Result<Self, Error> {
        if let Err(error) = self.wait_until(PARTS_UNDER_WAY - 1).await {
            self.abort().await;
            return Err(error);
        }
        let part = self.upload.put_part(part.into());
        self.under_way.spawn(part);
        Ok(self)
    }

    /// Makes an object of the parts and this last one. After an error none is left.
    async fn complete(self, part: Vec<u8>) -> Result<(), Error> {
        let mut parts = self.send(part).await?;
        let arrived = parts.wait_until(0).await;
        let completed = match arrived {
            Ok(()) => parts.upload.complete().await.map(drop),
            Err(error) => Err(error),
        };
        if completed.is_err() {
            parts.abort().await;
        }
        completed
    }

    /// Waits until at most `most` parts are under way.
    async fn wait_until(&mut self, most: usize) -> Result<(), Error> {
        while self.under_way.len() > most
            && let Some(arrived) = self.under_way.join_next().await
        {
            arrived.map_err(|source| Error::JoinError { source })??;
        }
        Ok(())
    }

    async fn abort(mut self) {
        self.under_way.shutdown().await;
        // The error that led here is the one to tell.
        drop(self.upload.abort().await);
    }
}
