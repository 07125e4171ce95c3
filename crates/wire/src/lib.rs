//! The gRPC messages of `caldpo.v1` and their validated conversions.
//!
//! The files under `/proto` are the source; [`proto`] is what is generated from them. Every message converts to its type in
//! `protocol` with `TryFrom`, which refuses what is missing or out of range and names the field ([`WireError`]), and back
//! with `From`:
//!
//! ```
//! use protocol::{FromWorker, Generation, Incarnation, JobId, WorkerMessage};
//!
//! let said = FromWorker {
//!     job: JobId("run".into()),
//!     incarnation: Incarnation(7),
//!     generation: Generation(1),
//!     message: WorkerMessage::Finished,
//! };
//! let sent = wire::proto::FromWorker::from(said.clone());
//! assert_eq!(FromWorker::try_from(sent), Ok(said));
//! ```
//!
//! Not here: what the messages mean (`protocol`), servers and clients (`coordinator`, `worker`).

mod error;
mod from_worker;
mod report;
mod status;
mod to_worker;
mod token;

pub use error::WireError;
pub use protocol::WIRE_VERSION;
pub use status::{job_state, pool_worker, queued_job, running_job};
pub use token::{Guard, Pass, Token, TokenError};

/// What tonic and prost generate from `/proto`; its documentation is that of the protocol files.
#[allow(
    missing_docs,
    clippy::large_enum_variant,
    clippy::pedantic,
    clippy::unwrap_used,
    reason = "generated code"
)]
pub mod proto {
    tonic::include_proto!("caldpo.v1");
}

/// The compiled protocol files, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("caldpo.v1");
