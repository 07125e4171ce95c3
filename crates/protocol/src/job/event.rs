//! What a job is made of, what it hears, and what it answers.

use crate::{
    EvaluationRow, Fence, FromWorker, Generation, Incarnation, JobId, JobPolicy, MetricsRow, Note,
    Outcome, Rank, Record, Recovery, Sample, Step, ToWorker,
};

/// What a job is made of.
#[derive(Clone, PartialEq)]
pub struct JobSpec {
    /// Its name.
    pub id: JobId,
    /// Sizes, cadences, limits.
    pub policy: JobPolicy,
    /// Version of the program that all members must run.
    pub build: String,
    /// The resolved configuration, for the workers.
    pub config_toml: String,
    /// Where checkpoints go.
    pub checkpoint_dir: String,
    /// A file in that folder, by which workers see that it is the same disk; empty for none.
    pub probe: String,
    /// Key of the collective handshakes, which tell generations apart by their number.
    pub secret: [u8; 32],
    /// That of the coordinator's opening of the journal.
    pub fence: Fence,
    /// What to go on from.
    pub recovery: Recovery,
    /// The checkpoint that holds `recovery.checkpoint`; `None` at step 0.
    pub resume: Option<String>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
#[allow(
    clippy::large_enum_variant,
    reason = "nearly all events are messages, and few wait at a time"
)]
pub enum Event {
    /// A worker said something.
    Message(FromWorker),
    /// A worker's connection is gone, or its process.
    Disconnected {
        /// Whose.
        incarnation: Incarnation,
    },
    /// [`Action::CommitCheckpoint`] succeeded: the manifest is in place and verified.
    CheckpointCommitted {
        /// Its step.
        step: Step,
        /// Where it is, as a worker finds it in `Form.resume`.
        path: String,
    },
    /// [`Action::CommitCheckpoint`] did not succeed.
    CheckpointFailed {
        /// Its step.
        step: Step,
        /// What happened, where, and the cure.
        reason: String,
    },
    /// Somebody wants a worker to leave.
    DrainRequested {
        /// Whose.
        incarnation: Incarnation,
        /// Who and why.
        reason: String,
    },
    /// Somebody wants the job to stop, resumable.
    StopRequested {
        /// Who and why.
        reason: String,
    },
    /// [`crate::Job::next_deadline`] is reached. Messages that have arrived are handed in first, so that a coordinator which
    /// slept does not take its workers for silent.
    Tick,
}

/// What to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Append to the journal under [`JobSpec::fence`] and sync; go on only when it is durable.
    Journal(Record),
    /// Send, if the worker is still connected.
    Send(ToWorker),
    /// Verify all ranks' files and write the manifest, beside the loop; answer with [`Event::CheckpointCommitted`] or
    /// [`Event::CheckpointFailed`].
    CommitCheckpoint {
        /// The generation that wrote the files.
        generation: Generation,
        /// The step whose state they hold.
        step: Step,
        /// Their number.
        world: u32,
        /// What each rank said in [`crate::WorkerMessage::Saved`], by rank.
        shards: Vec<String>,
        /// Evaluated steps, the best first: the first of them that has a checkpoint keeps it, beside the newest ones. Empty
        /// where only the newest stay. Later steps than `step` may be better and are not known yet.
        best_first: Vec<Step>,
    },
    /// Append to `metrics.jsonl`.
    RecordStep(MetricsRow),
    /// Append to `eval.jsonl`, keep the samples.
    RecordEvaluation {
        /// The means.
        row: EvaluationRow,
        /// Greedy continuations with the same weights.
        samples: Vec<Sample>,
    },
    /// Show and keep rank 0's account of the data files.
    DataReport {
        /// Several lines for a person.
        text: String,
    },
    /// Append to `events.jsonl`.
    Note(Note),
    /// A long phase of a rank moved.
    Progress {
        /// Whose.
        rank: Rank,
        /// Such as `load model`.
        phase: String,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
    },
    /// The job ended. Always the last action; later events bring only [`crate::CoordinatorMessage::Stop`] to whoever still speaks.
    Done(Outcome),
}
