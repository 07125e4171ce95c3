//! What a store holds and whether it holds together: every byte is read, nothing is changed.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::{Folder, Scope, StoreError, TornTail, entry::hex, values, values::Values};

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
/// # Errors
/// Only what keeps it from looking; damage is part of the reports.
pub fn inspect(store: &Path) -> Result<Vec<ScopeReport>, StoreError> {
    let mut reports = Vec::new();
    for folder in Folder::all(store)?.0 {
        let _in_use = match folder.share_existing() {
            // A clean-up has just removed it.
            Err(_) if !folder.path.exists() => continue,
            shared => shared?,
        };
        reports.push(examine(&folder)?.0);
    }
    Ok(reports)
}

/// Reads one scope, which the caller holds locked.
pub fn examine(folder: &Folder) -> Result<(ScopeReport, Values), StoreError> {
    let (mut values, mut torn, mut damages) = (Values::new(), Vec::new(), Vec::new());
    let scope = folder.scope().unwrap_or_else(|error| {
        damages.push(error);
        None
    });
    let segments = folder.segments()?;
    let mut bytes = 0;
    for path in &segments {
        let metadata = fs::metadata(path).map_err(|error| StoreError::at("look at", path, error));
        bytes += metadata?.len();
        match values::add_segment(&mut values, path, folder) {
            Ok(tail) => torn.extend(tail),
            Err(error) => damages.push(error),
        }
    }
    let report = ScopeReport {
        digest: hex(&folder.digest),
        folder: folder.path.clone(),
        scope,
        entries: values.len(),
        segments: segments.len(),
        bytes,
        used: folder.used()?,
        torn,
        damages,
    };
    Ok((report, values))
}
