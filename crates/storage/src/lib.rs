//! The only writer of files and objects: atomic puts, durable directories, a checksummed append-only log, lines, locks; and
//! whole objects on a disk or in an object store behind one trait, [`Store`], chosen by a path or URL ([`Folder::open`]).
//!
//! # What survives what: local disks
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
//! # What survives what: objects
//! A put, or the commit of an upload, that has returned
//! - on a disk ([`LocalStore`]; a path, `file://`) outlives a power cut: the file, its name and the folders above are synced;
//! - in `s3://`, `gs://` and `az://` outlives what the service promises for a write that it has acknowledged;
//! - in `memory://` is gone with the process.
//!
//! When the process dies inside it, the old object is there or the new one, never a mixture. Beside them may lie, on a disk, a
//! `*.tmp`; in an object store, parts of an upload, unlisted and paid for, until a lifecycle rule of the bucket ends them (S3:
//! `AbortIncompleteMultipartUpload`).
//!
//! An answer that is lost on the way is asked for again; a put under a condition whose bytes turn out to be there is done.
//!
//! Readers see the old object or the new one. An [`Object`] that was opened keeps its bytes on a disk; in an object store it
//! fails once its key is replaced, instead of mixing the two.
//!
//! Of two puts under a condition at the same moment one is done. Services compare (`If-None-Match`, `If-Match`, generations);
//! a disk has exclusive renames, else hard links, and a lock on the file that is replaced, so that only puts under a condition
//! exclude one another; a file system with neither may let two creations pass. [`Store::remove_all`] cut short has removed
//! some. Lists are of what is there: the three services list all that they have acknowledged.
//!
//! An operation on an object store ends within 5 minutes: each request within 60 s, tried again up to 8 times or for 3
//! minutes where the service asks for patience or the connection breaks; the error says how often and why. Credentials come
//! from the environment and appear in no message.
//!
//! Object stores come with the feature `object-store`; without it their URLs are refused with an error that says so.
//! [`testing`] has stores and disks that fail on purpose.
//!
//! Formats above plain bytes belong to their owners (`checkpoint`, `refcache`).

mod append;
mod directories;
mod files;
mod folder;
mod lines;
mod local;
mod location;
mod lock;
pub mod log;
mod map;
#[cfg(feature = "object-store")]
mod remote;
mod space;
mod steps;
mod store;
pub mod testing;

pub use append::AppendFile;
pub use directories::{create_directory, remove_directory, remove_file, rename};
pub use files::{DurableFile, FileError, atomic_write, sync_directory};
pub use folder::{Folder, open, was_replaced};
pub use lines::LineFile;
pub use local::LocalStore;
pub use location::{check_location, is_remote};
pub use lock::{Lock, LockError};
pub use map::{Mapping, map};
#[cfg(feature = "object-store")]
pub use remote::RemoteStore;
pub use space::{Space, space};
pub use store::{Condition, Object, Put, Store, Upload, Version};
