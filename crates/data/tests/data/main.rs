//! What the crate promises, through its public interface. Tests of `../shared` say aloud when it is absent.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod cache;
mod chat;
mod files;
mod formats;
mod hostile;
#[cfg(feature = "hub")]
mod hub;
mod mismatched;
mod plan;
mod prompts;
mod refusals;
mod report;
mod scores;
mod support;
mod tokens;
mod unpaired;
