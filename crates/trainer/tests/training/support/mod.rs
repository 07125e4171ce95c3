//! What the tests share: a tiny model folder with pairs, a scripted gate, and whole worlds run in threads.

mod folder;
mod world;

pub use folder::{Folder, fixture, relative_error};
pub use world::{Run, Script, run, state_bits, try_run};
