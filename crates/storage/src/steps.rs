//! The steps by which files come to be durable, announced to [`crate::testing::disk`] before each is taken: a test records
//! them, makes one fail, and rebuilds what a crash may leave. Otherwise an announcement is one look at a thread's variable.

use std::path::Path;

pub(crate) use crate::testing::disk::before;

/// A change to the disk.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step<'a> {
    /// One directory is made in a parent that is there.
    CreateDirectory(&'a Path),
    /// An empty file is made.
    CreateFile(&'a Path),
    /// Bytes are added to a file's end.
    Append(&'a Path, &'a [u8]),
    /// A file's content becomes durable.
    SyncFile(&'a Path),
    /// A directory's entries become durable.
    SyncDirectory(&'a Path),
    /// A file takes another name in place of what had it.
    Rename(&'a Path, &'a Path),
    /// A file loses its name.
    RemoveFile(&'a Path),
    /// A directory is removed with all that it holds, in any order.
    RemoveDirectory(&'a Path),
}
