//! Storage that fails on purpose, for tests of what is built on it: [`HostileStore`] at the level of [`crate::Store`], for
//! every backend; [`disk`] below it, at the level of system calls, for what a power cut leaves. No feature: with one, tests and
//! programs would compile everything above this crate twice.

pub mod disk;
mod hostile;

pub use hostile::{Fault, HostileStore};
