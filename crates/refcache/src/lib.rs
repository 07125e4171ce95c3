//! The reference log-prob store: what the frozen model says about a completion is computed once and used by every run.
//!
//! An entry is one f32, the summed log-prob of a completion after its prompt. It is found by its [`EntryKey`] (the token
//! ids) inside one [`Scope`] (everything else that decides the value's bits), so that a value is never used for other
//! weights, another truncation, dtype, backend, device class or kernel version (invariant R1). Entries are per prompt and
//! completion, so that re-paired and unpaired data find them again.
//!
//! # On disk
//! ```text
//! <store>/
//!   <scope digest, 64 hex digits>/
//!     scope.json                     the scope in words, for people; checked against the folder's name
//!     <random, 32 hex digits>.segment   one per writer, in one of two forms
//!     <root, 64 hex digits>.segment     one that is shared, sorted
//!     lock                           shared by all that use the scope, held alone to clean it up
//!
//! appended (format version 1): a log of `storage::log` (16-byte header, then frames, each with a checksummed head and a
//! chained BLAKE3), while its writer is at work and where one died
//!   frame 0      head record  0   8  magic "CALDPREF"
//!                             8   4  format version, u32 little endian, 1
//!                             12  32 scope digest
//!   frame 1..    batch        n entries of 36 bytes, one frame per append (cut at 65536 entries)
//!                             0   32 entry key
//!                             32  4  value, f32 little endian, finite
//! sorted (format version 2): immutable, in the order of keys; `sorted.rs` draws it byte by byte
//! ```
//! A writer appends, because what it was told is durable must be so at once. At its end it replaces the log by its sorted
//! form ([`Writer::finish`]), which is mapped into memory and searched by interpolation, as keys are digests. That opens in
//! milliseconds however large it is, and a lookup costs a fraction of a microsecond (`benches/lookup.rs`). A tree of BLAKE3
//! digests vouches for every byte, and a block of entries is checked when it is first used.
//!
//! Writers of several processes never share a file, so they need no lock against each other. A frame that the end of its
//! log cuts short is the trace of a writer that died, or is still writing: it is reported and left out, and its entries
//! are computed anew. Every other damage is refused with the file and the byte where the record or block begins that does not
//! hold. Nothing is ever repaired in place: the cure is to delete the named segment, which costs its entries and nothing else.
//!
//! # Durability
//! ```text
//! append   write and sync a frame                                the call's entries are all there, or a torn tail is
//! finish   write and sync  X.merging, sorted                     not read by anybody
//!          read it back and compare it with X.segment, the log
//!          rename          X.merging -> X.segment, durably       one or the other, with equal entries
//! clean    `gc.rs`
//! ```
//! A segment is thus never changed but at its end by its writer, and never absent: whoever opens the name finds the log or its
//! sorted form, and whoever has either open keeps it.
//!
//! # Shared between machines
//! [`Store::pull`] and [`Store::push`] exchange finished segments with a folder of an object store, or any other; `share.rs`
//! draws it. The store that a run opens stays a folder of a disk. A push that finds more than [`SHARED_SEGMENTS_MAX`] segments
//! there merges the smallest, and [`compact`] all of each scope, among readers and writers and without a lock; `compact.rs`
//! draws the steps.
//!
//! # Cleaning up
//! [`clean`] removes scopes that nobody has used for long and merges the segments of the others; `gc.rs` draws the steps. A
//! [`Store`] and its [`Writer`]s share their scope's lock as long as they live, and a clean-up needs it alone. So no segment
//! in use is removed, and no reader is left with a list of segments that are gone. The one reader without a lock is one that
//! may not write the folder at all (a read-only mount, another user's): if a clean-up elsewhere removes a segment under its
//! hands, it is told which file is missing, and opens the store again. Opening renews the date of `scope.json`, which tells
//! when a scope was last used. Locks are the kernel's (`flock`), of local disks.
//!
//! What this crate is not: it holds no model and computes nothing; which entries a run needs is the trainer's affair.

mod appended;
mod compact;
mod entry;
mod folder;
mod gc;
mod inspect;
mod merge;
mod replace;
mod sample;
mod scope;
mod search;
mod segment;
mod share;
mod sorted;
mod store;

pub use compact::{CompactedScope, Compaction, Extent, SHARED_SEGMENTS_MAX, compact};
pub use entry::EntryKey;
pub use gc::{Action, Cleaned, CleanedScope, Cleaning, clean};
pub use inspect::{ScopeReport, inspect, size};
pub use sample::sample;
pub use scope::Scope;
pub use segment::TornTail;
pub use share::{Pulled, Pushed, shared_folder};
pub use store::{AppendError, Store, StoreError, Writer};

use folder::Folder;
