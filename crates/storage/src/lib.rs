//! The only writer of files: atomic puts, durable directories, a checksummed append-only log, lines, locks.
//!
//! # What survives what (local disks)
//! - [`atomic_write`]: after it returns, a crash of process or machine leaves the new content; before, the old content or
//!   nothing. Never a mixture, never an empty file. A reader sees one or the other.
//! - [`DurableFile`]: the same for content that is written in pieces.
//! - [`create_directory`], [`rename`], [`remove_directory`], [`remove_file`]: after they return, a crash does not undo them.
//!   A crash inside [`remove_directory`] leaves some of the content: remove what makes it valid first.
//! - [`log::Log::append`]: after it returns, the record survives. A crash inside it leaves the record whole, absent, or as a
//!   torn tail that the next [`log::Log::open`] cuts off and reports. [`log::read`] only looks.
//! - [`AppendFile::append`]: all of the bytes or none, unless the process dies inside it. Durable after a sync.
//! - [`LineFile::append`]: whole lines for readers; a torn last line is cut at the next open. Durable after a sync.
//! - [`Lock`]: one holder, or several that share it; held until dropped or until the process dies; the kernel lets go, no
//!   stale file can keep it.
//! - [`map`] and [`log::parse`] only look.
//!
//! Formats above plain bytes belong to their owners (`checkpoint`, `refcache`); object stores are not here yet.

mod append;
mod directories;
mod files;
mod lines;
mod lock;
pub mod log;
mod map;
mod space;

pub use append::AppendFile;
pub use directories::{create_directory, remove_directory, remove_file, rename};
pub use files::{DurableFile, FileError, atomic_write, sync_directory};
pub use lines::LineFile;
pub use lock::{Lock, LockError};
pub use map::{Mapping, map};
pub use space::{Space, space};
