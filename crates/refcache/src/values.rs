//! The entries of one scope in memory: where values of several segments meet, and must agree.

use std::collections::{HashMap, hash_map::Entry};

use crate::{EntryKey, Folder, StoreError, TornTail, segment};

/// The value of each entry.
pub type Values = HashMap<EntryKey, f32>;

/// Adds the entries of the segment at `path` to `values`.
///
/// # Errors
/// The first thing that is wrong with the segment; entries before that may have been added.
pub fn add_segment(
    values: &mut Values,
    path: &std::path::Path,
    folder: &Folder,
) -> Result<Option<TornTail>, StoreError> {
    let segment = segment::read(path, &folder.digest)?;
    for (key, value, offset) in segment.entries {
        if !value.is_finite() {
            return Err(StoreError::NotFinite {
                path: path.to_owned(),
                offset,
                key,
                value,
            });
        }
        match values.entry(key) {
            Entry::Vacant(vacant) => {
                vacant.insert(value);
            }
            Entry::Occupied(occupied) if occupied.get().to_bits() == value.to_bits() => {}
            Entry::Occupied(occupied) => {
                return Err(StoreError::Contradiction {
                    path: path.to_owned(),
                    offset,
                    key,
                    value,
                    other: *occupied.get(),
                });
            }
        }
    }
    Ok(segment.torn)
}
