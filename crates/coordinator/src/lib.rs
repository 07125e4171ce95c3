//! Schedules a job's workers: gRPC services, launchers, journal, run directory; the coordinator program.
//!
//! What needs no server is here as plain functions and values: the layered configuration ([`config`]), the run directory
//! and its journal ([`run_directory`]), warnings ([`monitor`]), plots ([`plots`]), the summary ([`summary`]), what a person
//! sees ([`ui`]), runs beside each other ([`compare`]), what a job will need of this machine (`plan`),
//! and who watches: files for other programs ([`trackers`]) and Prometheus ([`metrics`]).
//!
//! ```text
//! run: open run directory ─► recover ─► serve, launch workers ─► driver ─► finish: export, plots, summary
//!      driver: inputs of sessions, processes, signals ─► protocol::Job ─► actions, strictly in order
//!              every action ─► observer: trackers, metrics
//! ```
//! `--cluster` ([`cluster`]) serves job after job the same way, each attempt on a thread of its own; [`client`] is what people
//! type to it. Decisions about a job are `protocol`'s; training is the workers'.

mod address;
mod attempt;
pub mod cache;
mod claim;
pub mod client;
pub mod cluster;
pub mod compare;
pub mod config;
mod driver;
mod export;
mod feed;
pub mod finish;
pub mod init;
mod launcher;
pub mod log;
pub mod metrics;
pub mod model_card;
pub mod monitor;
mod numbers;
mod objective;
pub mod observer;
mod only;
mod output;
mod phases;
#[cfg(feature = "local")]
pub mod plan;
pub mod plots;
mod random;
mod rows;
pub mod run;
pub mod run_directory;
mod server;
mod signals;
pub mod summary;
mod timestamp;
pub mod trackers;
pub mod ui;
