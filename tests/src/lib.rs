//! What crosses crates: real processes on loopback, golden files, tidy rules.
//!
//! The tests live in `tests/tests`; this library holds only what several of them need.

pub mod cluster;
pub mod faults;
pub mod network;
pub mod programs;
pub mod quickstart;
pub mod replay;

use std::path::PathBuf;

/// The workspace root.
pub fn workspace_root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lies below the workspace root")
        .to_owned()
}
