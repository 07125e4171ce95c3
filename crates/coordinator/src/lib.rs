//! Schedules a job's workers: gRPC services, launchers, journal, run directory; the coordinator program.
//!
//! What needs no server is here as plain functions and values: the layered configuration ([`config`]), the run directory
//! and its journal ([`run_directory`]), plots ([`plots`]), the summary ([`summary`]) and what a person sees ([`ui`]).

pub mod config;
mod numbers;
pub mod plots;
pub mod run_directory;
pub mod summary;
mod timestamp;
pub mod ui;
