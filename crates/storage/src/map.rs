//! Finished files as memory: nothing is read before it is looked at, and all processes of a machine share one copy.

#![allow(unsafe_code)]

use std::{fs::File, ops::Deref, path::Path};

use memmap2::Mmap;

use crate::files::{FileError, at};

/// The bytes of a file, as they were when it was mapped.
#[derive(Debug)]
pub struct Mapping(Mmap);

/// Maps the whole of `file`; `path` is for the error.
///
/// Only for files that nobody changes once they have their name. A file that is cut, or a disk that cannot read, ends the
/// process with SIGBUS at the byte concerned. Replacing or removing the name is harmless: the mapping keeps the old file.
pub fn map(file: &File, path: &Path) -> Result<Mapping, FileError> {
    // SAFETY: a mapping is unsound only if the file changes under it. This crate never changes a file in place but for logs
    // and lines, which callers do not map, and a stranger who writes into files of a store can do more harm than that.
    let mapping = unsafe { Mmap::map(file) };
    mapping.map(Mapping).map_err(at("map", path))
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
