//! The control plane of a training job as pure state machines: who is a member, which step runs, what is committed.
//!
//! Nothing here reads a clock, opens a socket or a file, or depends on the order of a hash map. The shell around
//! [`Job`] hands in events with the time (`now_ms`, milliseconds of any monotonic clock) and executes the returned
//! [`Action`]s **strictly in order**; [`Action::Journal`] is synchronous, so that nothing is said before it is durable.
//!
//! How a step commits: every member sends [`WorkerMessage::Prepared`] with the reduced report of its step; when all members
//! of the generation have sent identical bits, the job journals COMMIT and only then sends [`CoordinatorMessage::Commit`],
//! which lets the optimizer step. The journaled record is the commit. Beside the report each member says where its time went
//! ([`Phases`]), which no two have alike and nothing is decided by: the record has the means.
//!
//! Who may write and speak: a coordinator takes a job over by opening its journal under a higher [`Fence`], which is durable
//! before it says anything. Every record and every word carries it ([`Entry`], [`ToWorker`]), so that of one that was replaced
//! and does not know it the journal accepts nothing and workers believe nothing.
//!
//! What an evaluation decides: its row is journaled, with an early stop if it brings one, before the next step commits and
//! before the step's checkpoint becomes visible. So the decision is a function of the journal alone, and a resumed run makes
//! the same one ([`Selection`]).
//!
//! [`Scheduler`] is the queue of a coordinator that serves job after job: it gives waiting workers to jobs, each of whose
//! attempts is a [`Job`].
//!
//! What a loss costs ([`Elastic`] says how many may be lost, and how long all may take): the members are told
//! to abort and say what they hold ([`Held`]), the journal gets the next generation, and its [`CoordinatorMessage::Form`] says
//! who has which shard ([`Layout`]): before the COMMIT of a step the step is computed again, after it all roll forward. Spares
//! are admitted at a step boundary in the same way. Only when some shard has no living copy the journal is rewound to the
//! newest checkpoint. `tests/simulation` plays this against lost, late and doubled messages, partitions, deaths and hangs.
//!
//! Not here: gRPC (`wire`), files and processes (`coordinator`), training and the moving of shards (`trainer`).

mod gpu;
mod ids;
mod job;
mod layout;
mod liveness;
mod message;
mod phases;
mod policy;
mod record;
mod report;
mod scheduler;
mod selection;

pub use gpu::GpuFigures;
pub use ids::{Fence, Generation, Incarnation, JobId, NAME_RULE, Rank, Step, is_name};
pub use job::{Action, Event, Job, JobSpec, Waiting, WorkerView};
pub use layout::{Copies, Held, Layout, mirror_of};
pub use liveness::{Liveness, Pulse};
pub use message::{
    Activity, Afterwards, Awaits, Cause, CoordinatorMessage, FromWorker, Note, RunFacts, Terms,
    ToWorker, WIRE_VERSION, Work, WorkerMessage, WorkerProfile,
};
pub use phases::Phases;
pub use policy::{Elastic, JobPolicy, PolicyError};
pub use record::{
    CommitRecord, Entry, Outcome, Record, Recovery, RecoveryError, early_stop, fenced, recover,
    recover_living, saved, surviving,
};
pub use report::{EvaluationRow, MetricsRow, Sample, Statistics, StepReport};
pub use scheduler::{
    ENDED_MAX, Ending, JOBS_MAX, JobRecord, JobSummary, JobSummaryState, JobsRecovery, NewJob,
    PoolWorker, Scheduler, SchedulerAction, SchedulerEvent, SchedulerPolicy, SubmitError,
    fenced_jobs, recover_jobs,
};
pub use selection::{Best, EarlyStop, Metric, Selection};
