//! What the crate promises, through its public interface. Tests of `../shared` say aloud when it is absent.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod chat;
mod files;
mod formats;
mod hostile;
mod plan;
mod prompts;
mod refusals;
mod report;
mod support;
mod tokens;
