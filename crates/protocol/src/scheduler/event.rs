//! What a scheduler hears, and what it answers.

use serde::{Deserialize, Serialize};

use super::{JOBS_MAX, JobRecord, JobSummaryState};
use crate::{Afterwards, Incarnation, JobId, Note, Outcome, Step, WorkerProfile};

/// A job as it is submitted, checked already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewJob {
    /// Its name.
    pub id: JobId,
    /// Chosen by the client, to repeat a submission safely; empty for none.
    pub key: String,
    /// Its configuration.
    pub config_toml: String,
    /// Workers that it begins with.
    pub workers: u32,
    /// Most workers that it takes; 0, as in older journals, for `workers`.
    #[serde(default)]
    pub workers_max: u32,
    /// The job with the higher one goes first, and may take workers from running jobs with a lower one.
    #[serde(default)]
    pub priority: i32,
    /// How long its attempts may run together, in milliseconds; `None` for as long as they need.
    #[serde(default)]
    pub run_ms_max: Option<u64>,
    /// Attempts in a row that come no further before it counts as failed.
    #[serde(default = "attempts_max")]
    pub attempts_max: u32,
    /// When it was submitted, milliseconds since 1970, for people.
    pub submitted_unix_ms: u64,
}

/// What held for all jobs of older journals.
fn attempts_max() -> u32 {
    5
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum SchedulerEvent {
    /// A worker joined and waits for a job.
    Joined {
        /// This life of it.
        incarnation: Incarnation,
        /// What it says of itself.
        profile: WorkerProfile,
        /// The job whose state it holds, when it comes back from one.
        job: Option<JobId>,
    },
    /// A waiting worker said something.
    Heard {
        /// Whose.
        incarnation: Incarnation,
    },
    /// A worker asked to leave.
    Leaving {
        /// Whose.
        incarnation: Incarnation,
        /// Why.
        reason: String,
    },
    /// A worker's session ended, in a job or out of one.
    Gone {
        /// Whose.
        incarnation: Incarnation,
    },
    /// An attempt needs no workers any more: it writes what it leaves behind.
    Released {
        /// Its name.
        id: JobId,
    },
    /// An attempt of a job ended.
    Ended {
        /// Its name.
        id: JobId,
        /// How.
        outcome: Outcome,
        /// Where it stands.
        committed: Step,
    },
    /// Somebody wants a job to end for good.
    CancelRequested {
        /// Its name.
        id: JobId,
        /// Who and why.
        reason: String,
    },
    /// Somebody wants a job to save, to stop, and not to start until it is resumed.
    PauseRequested {
        /// Its name.
        id: JobId,
        /// Who and why.
        reason: String,
    },
    /// Somebody wants a paused job to go on.
    ResumeRequested {
        /// Its name.
        id: JobId,
        /// Who and why.
        reason: String,
    },
    /// Somebody wants a worker to leave.
    DrainRequested {
        /// Its name.
        name: String,
    },
    /// The coordinator is to leave: running jobs save, and go on after its restart.
    ShutdownRequested {
        /// Why.
        reason: String,
    },
    /// [`crate::Scheduler::next_deadline`] is reached.
    Tick,
}

/// What to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum SchedulerAction {
    /// Append to the journal and sync; go on only when it is durable.
    Journal(JobRecord),
    /// Run an attempt of a job on these workers, whose sessions are the job's from now on.
    Start {
        /// Its name.
        id: JobId,
        /// Its members.
        workers: Vec<Incarnation>,
        /// Whether they hold its state, from before the coordinator was restarted.
        holding: bool,
    },
    /// Hand one more worker's session to a running job.
    Lend {
        /// Its name.
        id: JobId,
        /// Whose.
        incarnation: Incarnation,
    },
    /// Ask a running job to let a worker go.
    Release {
        /// Its name.
        id: JobId,
        /// Whose.
        incarnation: Incarnation,
        /// Why.
        reason: String,
    },
    /// Ask a running job to stop with its state saved; [`SchedulerEvent::Ended`] follows.
    StopJob {
        /// Its name.
        id: JobId,
        /// Who and why.
        reason: String,
    },
    /// Tell a waiting worker to leave, and close its session.
    Dismiss {
        /// Whose.
        incarnation: Incarnation,
        /// Why.
        reason: String,
        /// What it does next.
        afterwards: Afterwards,
    },
    /// Tell watchers that a job is in another state.
    Changed(JobId),
    /// For the events of the coordinator.
    Note(Note),
}

/// Why a job was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Another job of that name has not ended.
    #[error(
        "there is a job {id} already, which is {state}: choose another job.name, or end that one with `coordinator cancel {id}`; \
         whoever may submit one job twice gives `coordinator submit` the same --key KEY each time, and the job is taken once"
    )]
    NameTaken {
        /// The name.
        id: JobId,
        /// What the other does.
        state: JobSummaryState,
    },
    /// The idempotency key belongs to a job with another configuration.
    #[error(
        "the idempotency key {key} was used for job {id} with another configuration; choose another key"
    )]
    KeyTaken {
        /// The key.
        key: String,
        /// Whose it is.
        id: JobId,
    },
    /// Too many jobs wait.
    #[error("{JOBS_MAX} jobs wait or run already; cancel some, or try again later")]
    Full,
    /// The coordinator is about to leave.
    #[error("the coordinator is shutting down; submit to it again when it is back")]
    ShuttingDown,
}
