//! Whole runs of tiny models: golden trajectories, the invariants T1 to T6, reference values, resumption, tools.
//!
//! One program, since the ML stack is linked into every test program once more.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::unnecessary_debug_formatting,
    reason = "a path in TOML is quoted as Debug quotes it"
)]

mod adapters;
mod batches;
mod golden;
mod plan;
mod reference;
mod reforming;
mod resume;
mod spec;
mod support;
mod tools;
mod worlds;
