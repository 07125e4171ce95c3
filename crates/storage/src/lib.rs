//! The only writer of files: atomic puts, a checksummed append-only log, locks.
//!
//! # What survives what (local disks)
//! - [`atomic_write`]: after it returns, a crash of process or machine leaves the new content; before, the old content or
//!   nothing. Never a mixture, never an empty file. A reader sees one or the other.
//! - [`log::Log::append`]: after it returns, the record survives. A crash inside it leaves the record whole, absent, or as a
//!   torn tail that the next [`log::Log::open`] cuts off and reports.
//! - [`Lock`]: held until dropped or until the process dies; the kernel lets go, no stale file can keep it.
//!
//! Formats above plain bytes belong to their owners (`checkpoint`, `refcache`); object stores are not here yet.

mod files;
mod lock;
pub mod log;

pub use files::{FileError, atomic_write, sync_directory};
pub use lock::{Lock, LockError};
