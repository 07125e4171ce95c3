//! The control plane of a training job as pure state machines: who is a member, which step runs, what is committed.
//!
//! Nothing here reads a clock, opens a socket or a file, or depends on the order of a hash map. The shell around
//! [`Job`] hands in events with the time (`now_ms`, milliseconds of any monotonic clock) and executes the returned
//! [`Action`]s **strictly in order**; [`Action::Journal`] is synchronous, so that nothing is said before it is durable.
//!
//! How a step commits: every member sends [`WorkerMessage::Prepared`] with the reduced report of its step; when all members
//! of the generation have sent identical bits, the job journals COMMIT and only then sends [`CoordinatorMessage::Commit`],
//! which lets the optimizer step. The journaled record is the commit.
//!
//! Not here: gRPC (`wire`), files and processes (`coordinator`), training (`trainer`). A lost worker ends the job as
//! failed and resumable; forming a new generation among survivors is not built.

mod ids;
mod job;
mod message;
mod policy;
mod record;
mod report;

pub use ids::{Generation, Incarnation, JobId, Rank, Step};
pub use job::{Action, Event, Job, JobSpec, Waiting, WorkerView};
pub use message::{
    Awaits, Cause, CoordinatorMessage, FromWorker, Note, RunFacts, ToWorker, WIRE_VERSION,
    WorkerMessage,
};
pub use policy::JobPolicy;
pub use record::{CommitRecord, Outcome, Record, Recovery, RecoveryError, recover, surviving};
pub use report::{EvaluationRow, MetricsRow, Sample, Statistics, StepReport};
