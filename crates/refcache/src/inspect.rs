//! What a store holds and whether it holds together: every byte is read, nothing is changed.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::{Folder, Scope, StoreError, TornTail, entry::hex, merge::Distinct, segment::Segment};

/// How often progress is told, in entries.
const TOLD_ENTRIES: usize = 1 << 16;

/// One scope of a store.
#[derive(Debug)]
pub struct ScopeReport {
    /// Its digest, in hexadecimal digits.
    pub digest: String,
    /// Its folder.
    pub folder: PathBuf,
    /// The scope in words; `None` where `scope.json` is missing or damaged.
    pub scope: Option<Scope>,
    /// Distinct entries that can be read.
    pub entries: usize,
    /// Number of segments.
    pub segments: usize,
    /// Their sizes together.
    pub bytes: u64,
    /// When a run last opened the scope or added to it: the newest modification of its files.
    pub used: SystemTime,
    /// Appends that did not finish; no damage.
    pub torn: Vec<TornTail>,
    /// What is wrong, with file and offset; of each file the first thing.
    pub damages: Vec<StoreError>,
}

/// Reads all scopes under `store` and checks every byte of them. Runs may use them meanwhile.
///
/// `progress` is told of the bytes that were read since it was told last; [`size`] tells of how many.
///
/// # Errors
/// Only what keeps it from looking; damage is part of the reports.
pub fn inspect(
    store: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<ScopeReport>, StoreError> {
    let mut reports = Vec::new();
    for folder in Folder::all(store)?.0 {
        let _in_use = match folder.share_existing() {
            // A clean-up has just removed it.
            Err(_) if !folder.path.exists() => continue,
            shared => shared?,
        };
        reports.push(examine(&folder, progress)?.0);
    }
    Ok(reports)
}

/// Bytes of all segments under `store`, which is what [`inspect`] is to read.
///
/// # Errors
/// What keeps it from looking.
pub fn size(store: &Path) -> Result<u64, StoreError> {
    let mut bytes = 0;
    for folder in Folder::all(store)?.0 {
        bytes += folder.bytes()?;
    }
    Ok(bytes)
}

/// Reads one scope, which the caller holds locked. Gives back its segments that are in order, too.
pub fn examine(
    folder: &Folder,
    progress: &mut dyn FnMut(u64),
) -> Result<(ScopeReport, Vec<Segment>), StoreError> {
    let (mut segments, mut torn, mut damages) = (Vec::new(), Vec::new(), Vec::new());
    let scope = folder.scope().unwrap_or_else(|error| {
        damages.push(error);
        None
    });
    let paths = folder.segments()?;
    for path in &paths {
        let read = Segment::open(path, &folder.digest)
            .and_then(|segment| check(&segment, progress).map(|()| segment));
        match read {
            Ok(segment) => {
                torn.extend(segment.torn().cloned());
                segments.push(segment);
            }
            Err(error) => damages.push(error),
        }
    }
    let mut entries = 0;
    for entry in Distinct::new(&segments) {
        match entry {
            Ok(_) => entries += 1,
            Err(error) => damages.push(error),
        }
    }
    let report = ScopeReport {
        digest: hex(&folder.digest),
        folder: folder.path.clone(),
        scope,
        entries,
        segments: paths.len(),
        bytes: folder.bytes()?,
        used: folder.used()?,
        torn,
        damages,
    };
    Ok((report, segments))
}

/// Reads every entry of a segment.
pub fn check(segment: &Segment, progress: &mut dyn FnMut(u64)) -> Result<(), StoreError> {
    let (count, mut told) = (segment.len(), 0);
    for index in 0..count {
        segment.entry(index)?;
        if index % TOLD_ENTRIES == 0 {
            let read = segment.offset(index);
            progress(read - told);
            told = read;
        }
    }
    progress(segment.bytes - told);
    Ok(())
}
