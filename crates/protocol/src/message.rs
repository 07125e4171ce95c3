//! What workers and the coordinator say to each other.
//!
//! Every message is idempotent: saying it twice changes nothing. A worker that waits repeats what it waits for in its
//! beats, and the coordinator repeats its answer, so that a lost message costs one heartbeat. (Where the transport may
//! lose a worker's words too, the worker repeats them as well: Join until Welcome, then Ready, Prepared, Saved, Finished
//! beside the beat that awaits their answer. A gRPC stream loses nothing short of its connection.)

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    EvaluationRow, Generation, Incarnation, JobId, Phases, Rank, Sample, Step, StepReport,
};

/// Version of these messages. A worker that speaks another one is refused. A field that may be absent makes no new one.
pub const WIRE_VERSION: u32 = 2;

/// A worker's message with its fences.
#[derive(Clone, Debug, PartialEq)]
pub struct FromWorker {
    /// The job it believes to work for; empty for the only job of a coordinator that runs one.
    pub job: JobId,
    /// Its own incarnation.
    pub incarnation: Incarnation,
    /// The generation it believes in; 0 before its first.
    pub generation: Generation,
    /// What it says.
    pub message: WorkerMessage,
}

/// A message to one worker.
#[derive(Clone, Debug, PartialEq)]
pub struct ToWorker {
    /// Receiver.
    pub incarnation: Incarnation,
    /// The generation that is true now.
    pub generation: Generation,
    /// What is said.
    pub message: CoordinatorMessage,
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq)]
pub enum WorkerMessage {
    /// Here I am.
    Join(WorkerProfile),
    /// Alive.
    Beat {
        /// The last commit it knows.
        committed: Step,
        /// What it waits for.
        awaits: Awaits,
    },
    /// A long phase moves on.
    Progress {
        /// Such as `load model`, `reference pass`.
        phase: String,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
    },
    /// What became of the rows of the data files, sent by rank 0 once they are read.
    DataReport {
        /// Several lines for a person.
        text: String,
    },
    /// Loaded, reference values durable, collective connected.
    Ready {
        /// What it found, which all members must agree on.
        facts: RunFacts,
        /// Reference values found in the store.
        reference_reused: u64,
        /// Reference values computed by this member.
        reference_computed: u64,
    },
    /// Its vote on a step.
    Prepared {
        /// The reduced report.
        report: StepReport,
        /// Where this member's time went; not part of what is voted on.
        phases: Phases,
    },
    /// An evaluation's result, sent by rank 0.
    Evaluated {
        /// The means.
        row: EvaluationRow,
        /// Greedy continuations with the same weights.
        samples: Vec<Sample>,
    },
    /// Its part of a checkpoint is durable.
    Saved {
        /// The step whose state was saved.
        step: Step,
        /// The part's entry for the manifest, in the checkpoint crate's JSON.
        shard: String,
    },
    /// Its part of a checkpoint could not be written. Training goes on, unless it was the last checkpoint.
    SaveFailed {
        /// The step whose state was to be saved.
        step: Step,
        /// What happened, where, and the cure.
        reason: String,
    },
    /// It heard that the job is at its end and has nothing left to do.
    Finished,
    /// It cannot go on.
    Failed {
        /// Who is to act.
        cause: Cause,
        /// What happened, where, and the cure.
        reason: String,
    },
    /// It was told to leave, and asks for its job to save first.
    Leave {
        /// Why.
        reason: String,
    },
}

/// What a worker says of itself when it joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerProfile {
    /// Version of the program; all members must run the same.
    pub build: String,
    /// Version of these messages.
    pub wire_version: u32,
    /// `host:port` of its bound collective listener.
    pub address: String,
    /// What people call it; unique among the workers of a coordinator.
    pub name: String,
    /// What it computes on, such as `cpu, 2 threads`.
    pub device: String,
}

impl WorkerProfile {
    /// Why it cannot work with a coordinator of version `build`, if it cannot.
    pub(crate) fn mismatch(&self, build: &str) -> Option<String> {
        if self.wire_version != WIRE_VERSION {
            return Some(format!(
                "it speaks wire version {}, the coordinator {WIRE_VERSION}; install the same version on both",
                self.wire_version
            ));
        }
        (self.build != build).then(|| {
            format!(
                "it runs build {}, the coordinator {build}; install the same version on both",
                self.build
            )
        })
    }
}

/// What a waiting worker waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Awaits {
    /// Nothing: it is at work.
    #[default]
    Nothing,
    /// A generation.
    Form,
    /// The first step of its generation.
    Go,
    /// The verdict on the step after its last commit.
    Commit,
    /// The end.
    End,
}

/// Why a job failed, by what a supervisor should do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Configuration or input: the same attempt fails again.
    Config,
    /// A lost process or connection: trying again may help.
    Temporary,
    /// Anything else.
    Fatal,
}

/// What all members of a generation must find alike before the first step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFacts {
    /// Optimizer steps of the whole run.
    pub steps_total: u64,
    /// Training pairs after drops.
    pub pairs: u64,
    /// Held-out pairs.
    pub eval_pairs: u64,
    /// Parameters of the policy.
    pub parameters: u64,
    /// Digest of the starting weights, hexadecimal.
    pub model_digest: String,
    /// Digest of the tokenizer and chat template, hexadecimal.
    pub tokenizer_digest: String,
    /// Digest of the tokenized data, hexadecimal.
    pub data_digest: String,
    /// The commit its state is at.
    pub committed: u64,
}

impl RunFacts {
    /// Name and both values of the first fact that differs.
    pub fn first_difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let list = |facts: &Self| {
            [
                ("steps_total", facts.steps_total.to_string()),
                ("pairs", facts.pairs.to_string()),
                ("eval_pairs", facts.eval_pairs.to_string()),
                ("parameters", facts.parameters.to_string()),
                ("model_digest", facts.model_digest.clone()),
                ("tokenizer_digest", facts.tokenizer_digest.clone()),
                ("data_digest", facts.data_digest.clone()),
                ("committed", facts.committed.to_string()),
            ]
        };
        let mut pairs = list(self).into_iter().zip(list(other));
        pairs
            .find(|(a, b)| a.1 != b.1)
            .map(|(a, b)| (a.0, a.1, b.1))
    }
}

/// What the coordinator says.
#[derive(Clone, PartialEq)]
pub enum CoordinatorMessage {
    /// Answer to Join.
    Welcome {
        /// The resolved configuration.
        config_toml: String,
        /// Where checkpoints go.
        checkpoint_dir: String,
        /// A file in that folder, which a worker sees only if it looks at the same disk; empty for none.
        probe: String,
    },
    /// A generation: load, connect, score your part of the reference, then say Ready.
    Form {
        /// The receiver's rank.
        rank: Rank,
        /// Collective addresses of all members, by rank.
        addresses: Vec<String>,
        /// Key of this generation's collective handshake.
        secret: [u8; 32],
        /// The last commit.
        committed: Step,
        /// The checkpoint that holds its state; `None` at step 0.
        resume: Option<String>,
    },
    /// Begin with this step.
    Go {
        /// The first step of the generation.
        step: Step,
        /// Evaluate before it.
        evaluate: bool,
    },
    /// The verdict on a step, and what to do before the next.
    Commit {
        /// The step.
        step: Step,
        /// Apply the update; otherwise drop the gradients.
        apply: bool,
        /// Save the state after it.
        save: bool,
        /// Evaluate the weights after it.
        evaluate: bool,
        /// No step follows.
        last: bool,
    },
    /// All is done and durable: say Finished. Follows the last Commit; or Form, when no step was left to do.
    Finish,
    /// The job is over for this worker.
    Stop {
        /// Why.
        reason: String,
        /// What to do next.
        afterwards: Afterwards,
    },
    /// What was said is of another time; this is true now.
    Stale {
        /// The last commit.
        committed: Step,
    },
}

/// What a stopped worker does next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Afterwards {
    /// Ask for the next job, if it serves more than one.
    #[default]
    Rejoin,
    /// Leave in good order: it was drained.
    Leave,
    /// Leave, and do not try again as it is.
    Refused,
}

/// Without the secret (invariant S1).
impl fmt::Debug for CoordinatorMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Welcome { checkpoint_dir, .. } => {
                write!(f, "Welcome {{ checkpoint_dir: {checkpoint_dir:?}, .. }}")
            }
            Self::Form {
                rank,
                addresses,
                committed,
                resume,
                ..
            } => write!(
                f,
                "Form {{ rank: {rank}, addresses: {addresses:?}, committed: {committed}, resume: {resume:?}, .. }}"
            ),
            Self::Go { step, evaluate } => write!(f, "Go {{ step: {step}, evaluate: {evaluate} }}"),
            Self::Commit {
                step,
                apply,
                save,
                evaluate,
                last,
            } => write!(
                f,
                "Commit {{ step: {step}, apply: {apply}, save: {save}, evaluate: {evaluate}, last: {last} }}"
            ),
            Self::Finish => write!(f, "Finish"),
            Self::Stop { reason, afterwards } => {
                write!(
                    f,
                    "Stop {{ reason: {reason:?}, afterwards: {afterwards:?} }}"
                )
            }
            Self::Stale { committed } => write!(f, "Stale {{ committed: {committed} }}"),
        }
    }
}

/// Something worth a line in `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// One word: `join`, `form`, `ready`, `go`, `skip`, `checkpoint`, `unsaved` (a checkpoint that failed), `rewind`, `lost`,
    /// `stop`, `early-stop`, `done`; of the queue `submit`, `start`, `pause`, `queue`, `retry`, `cancel`, `drain`, `refuse`,
    /// `wait`; of the shell `warning`.
    pub kind: &'static str,
    /// A sentence for a person.
    pub text: String,
}
