//! Writing a sorted segment in place of what its entries come from.

use std::{fs::File, path::Path, time::SystemTime};

use storage::{remove_file, rename};

use crate::{EntryKey, StoreError, folder::MERGING, segment::Segment, sorted};

/// Writes the sorted segment `path` of `count` entries, which may replace a file, and dates it when told to. A crash at any
/// point leaves what was there, or all of the new one.
///
/// `entries` gives them twice: what replaces the only copy is not taken on trust, so it is read back and compared before it
/// gets its name.
pub fn write<I>(
    path: &Path,
    scope: &[u8; 32],
    count: usize,
    entries: impl Fn() -> I,
    used: Option<SystemTime>,
) -> Result<(), StoreError>
where
    I: Iterator<Item = Result<(EntryKey, f32), StoreError>>,
{
    let unfinished = path.with_extension(MERGING);
    let written = sorted::write(&unfinished, scope, count, entries())
        .and_then(|()| read_back(&unfinished, scope, count, entries()))
        .and_then(|()| match used {
            Some(used) => File::open(&unfinished)
                .and_then(|file| file.set_modified(used))
                .map_err(|error| StoreError::at("date", &unfinished, error)),
            None => Ok(()),
        });
    if written.is_err() {
        // Perhaps the disk is full. The next clean-up would remove it too.
        drop(remove_file(&unfinished));
    }
    written?;
    Ok(rename(&unfinished, path)?)
}

/// Compares the segment at `path` with the entries that it was just made of.
pub fn read_back(
    path: &Path,
    scope: &[u8; 32],
    count: usize,
    entries: impl Iterator<Item = Result<(EntryKey, f32), StoreError>>,
) -> Result<(), StoreError> {
    let different = |offset| StoreError::Damaged {
        path: path.to_owned(),
        offset,
        reason: "it was just written and reads back differently; check the disk",
    };
    let read = Segment::open(path, scope)?;
    if read.len() != count {
        return Err(different(0));
    }
    for (index, entry) in entries.enumerate() {
        let ((key, value), (found, bits)) = (entry?, read.entry(index)?);
        if (key, value.to_bits()) != (found, bits.to_bits()) {
            return Err(different(read.offset(index)));
        }
    }
    Ok(())
}
