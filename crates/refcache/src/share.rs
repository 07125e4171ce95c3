//! Entries through a folder that machines share, of any [`storage::Store`]: an object store can neither be locked nor appended
//! to nor mapped, so what a run works with stays a folder of a disk, and finished segments are exchanged.
//!
//! ```text
//! <shared>/<scope digest>/scope.json
//!                         <root, 64 hex digits>.segment   a sorted segment, named after the digest of all it holds
//!                         compacting.json         while somebody merges some of them (`compact.rs`)
//! ```
//! Nothing there is ever changed: a name stands for its bytes, so two that push the same write the same, a list that is late
//! costs entries that are computed anew, and no put needs a condition to be safe. A segment is removed only after one that has
//! all of its entries is there, so whoever finds one gone that was listed lists again. What is fetched is checked to the last
//! byte before it gets a name that is read. On the disk a segment that is shared has the same name, and [`crate::clean`] merges
//! only those that are not, or it would be fetched and pushed again.

use std::{collections::BTreeSet, io, path::Path, time::SystemTime};

use storage::{Condition, DurableFile, FileError, remove_file, rename, was_replaced};

use crate::{
    Compaction, Extent, Folder, Store, StoreError,
    entry::hex,
    folder::{MERGING, SCOPE_FILE},
    inspect::check,
    segment::{EXTENSION, Form, Segment},
};

/// Bytes sent at once.
const BLOCK_BYTES: usize = 1 << 20;

/// How often a folder is listed in which segments vanish. Each time somebody has merged them since it was listed.
const LISTS_MAX: usize = 8;

/// The folder or object store at `location`: a path, or a URL such as `s3://bucket/prefix`.
///
/// # Errors
/// A location that this program cannot reach.
pub fn shared_folder(location: &Path) -> Result<storage::Folder, StoreError> {
    Ok(storage::Folder::open(location)?)
}

/// What [`Store::pull`] did.
#[derive(Debug, Default)]
pub struct Pulled {
    /// Segments that were fetched.
    pub segments: usize,
    /// Their sizes together.
    pub bytes: u64,
    /// Objects that are not what their name says, left out: their entries are computed anew. Somebody should remove them.
    pub refused: Vec<StoreError>,
}

/// What [`Store::push`] did.
#[derive(Debug, Default)]
pub struct Pushed {
    /// Segments that were sent.
    pub segments: usize,
    /// Their sizes together.
    pub bytes: u64,
    /// What became of the segments there, where some were sent and they may be too many; that it failed costs no entry.
    pub compaction: Option<Result<Compaction, StoreError>>,
}

impl Store {
    /// Fetches the scope's segments of the folder `shared` that are not here, and reads them with the others.
    ///
    /// # Errors
    /// The folder cannot be read, or the disk not be written; what was fetched before stays.
    pub fn pull(&mut self, shared: &storage::Folder) -> Result<Pulled, StoreError> {
        let shared = shared.below(&hex(&self.folder.digest));
        Ok(self.fetch_all(&shared)?.0)
    }

    /// [`Store::pull`] of the scope's own folder. Gives the names of the segments that are there and now here, too.
    pub(crate) fn fetch_all(
        &mut self,
        shared: &storage::Folder,
    ) -> Result<(Pulled, Vec<String>), StoreError> {
        let mut pulled = Pulled::default();
        let mut refused = BTreeSet::new();
        let mut lists = 0;
        let here = loop {
            let (mut here, mut vanished) = (Vec::new(), false);
            for name in shared.list()? {
                let Some(root) = root_of(Path::new(&name)) else {
                    continue;
                };
                if refused.contains(&name) {
                    continue;
                }
                let path = self.folder.path.join(&name);
                if path
                    .try_exists()
                    .map_err(|error| StoreError::at("look for", &path, error))?
                {
                    here.push(name);
                    continue;
                }
                match self.folder.fetch(shared, &name, root) {
                    Ok(None) => vanished = true,
                    Ok(Some(bytes)) => {
                        pulled.segments += 1;
                        pulled.bytes += bytes;
                        here.push(name);
                    }
                    Err(error) if error.place().is_some() => {
                        pulled.refused.push(error);
                        refused.insert(name);
                    }
                    Err(error) => return Err(error),
                }
            }
            lists += 1;
            // Its entries are in a segment that the list did not have.
            if !vanished || lists == LISTS_MAX {
                break here;
            }
        };
        self.reload()?;
        Ok((pulled, here))
    }

    /// Sends the sorted segments that were not shared yet to the folder `shared`. Writers end before: a log is not sent. Where
    /// that makes more than [`crate::SHARED_SEGMENTS_MAX`], merges some ([`Store::compact`]).
    ///
    /// # Errors
    /// The folder cannot be written; what was sent before stays, and the next call goes on.
    pub fn push(&mut self, shared: &storage::Folder) -> Result<Pushed, StoreError> {
        let scope = shared.below(&hex(&self.folder.digest));
        let mut pushed = Pushed::default();
        self.reload()?;
        for segment in &self.segments {
            let Form::Sorted(sorted) = &segment.form else {
                continue;
            };
            if root_of(&segment.path).is_some() || sorted.len() == 0 {
                continue;
            }
            // Before it leaves, every byte of it is checked.
            check(segment, &mut |_| ())?;
            if pushed.segments == 0 {
                self.folder.tell_scope(&scope)?;
            }
            let name = segment_name(&sorted.root());
            send(&scope, &name, sorted.bytes())?;
            match rename(&segment.path, &self.folder.path.join(name)) {
                // Another process has pushed it just now.
                Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed?,
            }
            pushed.segments += 1;
            pushed.bytes += segment.bytes;
        }
        self.reload()?;
        if pushed.segments > 0 {
            let compacted = self.compact(shared, Extent::Crowded, SystemTime::now());
            pushed.compaction = Some(compacted.map(|(compaction, _)| compaction));
        }
        Ok(pushed)
    }
}

impl Folder {
    /// Fetches the segment `name`, whose root is to be `root`; none where it is gone.
    fn fetch(
        &self,
        shared: &storage::Folder,
        name: &str,
        root: [u8; 32],
    ) -> Result<Option<u64>, StoreError> {
        // A list may be older than a removal.
        let Some(object) = shared.object(name)? else {
            return Ok(None);
        };
        let unfinished = self.new_segment()?.with_extension(MERGING);
        let mut file = DurableFile::create(&unfinished)?;
        let mut written: Result<(), FileError> = Ok(());
        let read = object.scan(0..object.bytes(), &mut |bytes| {
            if written.is_ok() {
                written = file.append(bytes);
            }
        });
        match read {
            Err(error) if was_replaced(&error) => return Ok(None),
            read => read?,
        }
        written?;
        file.commit()?;
        let checked = self.checked(&unfinished, root);
        let placed = checked.and_then(|()| Ok(rename(&unfinished, &self.path.join(name))?));
        if placed.is_err() {
            // The first error is the one to tell.
            drop(remove_file(&unfinished));
        }
        // What is wrong is wrong in the shared folder: there it must be removed.
        placed.map_err(|error| error.of(&unfinished, &shared.path().join(name)))?;
        Ok(Some(object.bytes()))
    }

    /// Whether a file is the sorted segment of this scope with that root, in order to the last byte.
    fn checked(&self, path: &Path, root: [u8; 32]) -> Result<(), StoreError> {
        let segment = Segment::open(path, &self.digest)?;
        match &segment.form {
            Form::Sorted(sorted) if sorted.root() == root => check(&segment, &mut |_| ()),
            _ => Err(StoreError::Damaged {
                path: path.to_owned(),
                offset: 0,
                reason: "it is not the segment that it is named after",
            }),
        }
    }

    /// Puts the scope in words there, for people, unless it is there. Entries do not depend on it, so what else is there under
    /// its name, such as half of it, is replaced.
    fn tell_scope(&self, shared: &storage::Folder) -> Result<(), StoreError> {
        let Some(scope) = self.scope()? else {
            return Ok(());
        };
        let text = scope.described();
        if shared.read(SCOPE_FILE)?.is_none_or(|there| there != text) {
            // Everybody puts the same.
            let _ = shared.put(SCOPE_FILE, &text, Condition::Always)?;
        }
        Ok(())
    }
}

/// Puts a segment in place as the object `name`.
pub fn send(shared: &storage::Folder, name: &str, bytes: &[u8]) -> Result<(), FileError> {
    let mut upload = shared.create(name, bytes.len() as u64)?;
    for block in bytes.chunks(BLOCK_BYTES) {
        upload.append(block)?;
    }
    upload.commit()
}

/// What an object is, compared with some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum There {
    /// Those bytes.
    Same,
    /// Not there, or no longer.
    Absent,
    /// Others, from this one on.
    Different(u64),
}

/// Compares all of the object `name` with `bytes`.
pub fn compare(shared: &storage::Folder, name: &str, bytes: &[u8]) -> Result<There, FileError> {
    let Some(object) = shared.object(name)? else {
        return Ok(There::Absent);
    };
    let (mut same, mut rest) = (0, bytes);
    let read = object.scan(0..object.bytes(), &mut |read| {
        let count = rest.iter().zip(read).take_while(|(a, b)| a == b).count();
        same += count as u64;
        // After a difference nothing is compared any more.
        rest = if count == read.len() {
            &rest[count..]
        } else {
            &[]
        };
    });
    match read {
        Err(error) if was_replaced(&error) => return Ok(There::Absent),
        read => read?,
    }
    if [object.bytes(), bytes.len() as u64] == [same, same] {
        return Ok(There::Same);
    }
    Ok(There::Different(same))
}

/// What the shared segment with this root is called.
pub fn segment_name(root: &[u8; 32]) -> String {
    format!("{}.{EXTENSION}", hex(root))
}

/// The name of a segment's file, where it is text.
pub fn name_of(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// The root that a shared segment is named after, in the very form that they are named in; none of others.
pub fn root_of(path: &Path) -> Option<[u8; 32]> {
    let name = path.file_stem()?.to_str()?;
    let root = blake3::Hash::from_hex(name).ok()?;
    let shared = path.extension().is_some_and(|it| it == EXTENSION) && root.to_string() == name;
    shared.then(|| *root.as_bytes())
}
