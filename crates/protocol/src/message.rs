//! What workers and the coordinator say to each other.
//!
//! Every message is idempotent: saying it twice changes nothing. A worker that waits repeats what it waits for in its
//! beats, and the coordinator repeats its answer, so that a lost message costs one heartbeat. (Where the transport may
//! lose a worker's words too, the worker repeats them as well: Join until Welcome, then Ready, Prepared, Saved, Finished
//! beside the beat that awaits their answer. A gRPC stream loses nothing short of its connection.)

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    EvaluationRow, Fence, Generation, GpuFigures, Held, Incarnation, JobId, Layout, Phases, Rank,
    Sample, Step, StepReport,
};

/// Version of these messages. A worker that speaks another one is refused. A field that may be absent makes no new one.
pub const WIRE_VERSION: u32 = 6;

/// A worker's message with its fences.
#[derive(Clone, Debug, PartialEq)]
pub struct FromWorker {
    /// The job it believes to work for; empty for the only job of a coordinator that runs one.
    pub job: JobId,
    /// Its own incarnation.
    pub incarnation: Incarnation,
    /// The generation it believes in; 0 before its first. In one incarnation it never goes back: a job takes what is
    /// said in an older one for an old message. A worker that starts over is another incarnation.
    pub generation: Generation,
    /// What it says.
    pub message: WorkerMessage,
}

/// A message to one worker.
#[derive(Clone, Debug, PartialEq)]
pub struct ToWorker {
    /// Receiver.
    pub incarnation: Incarnation,
    /// Who says it: a worker ignores what has a lower one than it has heard of its job ([`Fence::admits`]).
    pub fence: Fence,
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
        /// What it does.
        activity: Activity,
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
        /// Fewest members of a generation among whom its device has room for its part of the state; 0 for any number.
        workers_min: u32,
    },
    /// Its vote on a step.
    Prepared {
        /// The reduced report.
        report: StepReport,
        /// Where this member's time went; not part of what is voted on.
        phases: Phases,
        /// How its GPU fares; not part of it either.
        gpu: GpuFigures,
    },
    /// An evaluation's result, sent by rank 0.
    Evaluated {
        /// The means.
        row: EvaluationRow,
        /// Greedy continuations with the same weights.
        samples: Vec<Sample>,
    },
    /// Its part of a checkpoint is durable. It may be written on when the generation that asked for it is over.
    Saved {
        /// The step whose state was saved.
        step: Step,
        /// The generation whose Commit or Go asked for it; 0 for the one that this is said in.
        asked: Generation,
        /// The part's entry for the manifest, in the checkpoint crate's JSON.
        shard: String,
    },
    /// Its part of a checkpoint could not be written. Training goes on, unless it was the last checkpoint.
    SaveFailed {
        /// The step whose state was to be saved.
        step: Step,
        /// The generation whose Commit or Go asked for it; 0 for the one that this is said in.
        asked: Generation,
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
    /// It was told to leave. The job goes on without it if enough members are left; otherwise it saves and stops.
    Leave {
        /// Why.
        reason: String,
    },
    /// It is in no generation now, and changes nothing of this until its next Form. The answer to Abort and
    /// to Welcome; said with the generation that it left.
    Held {
        /// The newest cut first; two at most, none of a worker that has trained nothing.
        held: Vec<Held>,
        /// As of [`WorkerMessage::Ready`]; 0 also where it has not loaded.
        workers_min: u32,
    },
    /// A spare has loaded model and data, and can be admitted. Said with the generation that it left, or 0.
    Loaded {
        /// What it found; `committed` says nothing.
        facts: RunFacts,
    },
    /// A collective of its generation broke or took too long, which is nobody's end yet.
    CollectiveFailed {
        /// Who did not answer, if it can tell.
        suspect: Option<Rank>,
        /// What happened.
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

/// What a worker does, for whoever wonders whether it still does it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// The step that it is about; 0 outside of steps.
    pub step: Step,
    /// The kind of work.
    pub work: Work,
    /// Counts up as the work moves on: packs, blocks, buckets. Never goes back in one generation.
    pub progress: u64,
}

/// Kinds of work, by whose fault it is when it stands still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Work {
    /// It does not tell: only deadlines judge it.
    #[default]
    Untold,
    /// Its own: nobody else holds it up.
    Computes,
    /// A collective: any peer may hold it up.
    Exchanges,
    /// It waits for the coordinator.
    Waits,
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
        if self == other {
            return None;
        }
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
        /// A generation runs already. Load, say Loaded, and be admitted at a step boundary.
        spare: bool,
        /// The job, as the worker is to name it from now on.
        job: JobId,
        /// What holds for its session.
        terms: Terms,
    },
    /// A generation: load, connect, score your part of the reference, then say Ready.
    Form {
        /// The receiver's rank.
        rank: Rank,
        /// Collective addresses of all members, by rank.
        addresses: Arc<[String]>,
        /// Key of this generation's collective handshake.
        secret: [u8; 32],
        /// The last commit.
        committed: Step,
        /// The checkpoint that holds its state; `None` at step 0, and where `base` says who does.
        resume: Option<String>,
        /// The verdict on `committed`: who holds its gradient and has not heard it applies or drops that, before anything else.
        /// A gradient of a later step is dropped.
        apply: bool,
        /// Which members hold the state: gather the shards, cut them anew for this generation, mirror them. `None`: from
        /// `resume`, or else the weights that the run starts with. Who is named as a holder and holds no such cut (it was told
        /// of by an old message) takes no part, and says Held in this generation.
        base: Option<Arc<Layout>>,
    },
    /// Begin: what the last commit asked for and this generation is to do (again), then the next step.
    Go {
        /// The first step of the generation.
        step: Step,
        /// Evaluate before it.
        evaluate: bool,
        /// Save before it.
        save: bool,
        /// No step follows.
        last: bool,
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
    /// The generation is over: leave its collective at once, drop no gradient yet, say Held and await Form.
    Abort {
        /// Why.
        reason: String,
    },
    /// A beat arrived and nothing is to be said to it. A worker that misses these is not heard, or does not hear: it connects
    /// again.
    Heard {
        /// The last commit.
        committed: Step,
    },
}

/// What workers keep. Times are in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Each holds the optimizer shard of the one before it, too.
    pub mirror: bool,
    /// Each keeps gradients of its shards alone.
    pub shard_gradients: bool,
    /// Each with a GPU keeps the optimizer's state, and the f32 weights, in the host's memory.
    pub offload: bool,
    /// How long it waits for its peers in a collective before it says CollectiveFailed.
    pub collective_timeout_ms: u64,
    /// Silence after which it connects again. Every beat is answered.
    pub silence_ms: u64,
}

/// What a stopped worker does next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Afterwards {
    /// Ask for the next job, if it serves more than one.
    #[default]
    Rejoin,
    /// Join this job again, with what it holds: it was taken for lost, and lives.
    Return,
    /// Let a supervisor start its process again, which ends with the temporary exit code: its session lives, and its training
    /// thread does not answer.
    Restart,
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
                apply,
                base,
                ..
            } => write!(
                f,
                "Form {{ rank: {rank}, addresses: {addresses:?}, committed: {committed}, resume: {resume:?}, \
                 apply: {apply}, base: {base:?}, .. }}"
            ),
            Self::Go {
                step,
                evaluate,
                save,
                last,
            } => write!(
                f,
                "Go {{ step: {step}, evaluate: {evaluate}, save: {save}, last: {last} }}"
            ),
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
            Self::Abort { reason } => write!(f, "Abort {{ reason: {reason:?} }}"),
            Self::Heard { committed } => write!(f, "Heard {{ committed: {committed} }}"),
        }
    }
}

/// Something worth a line in `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// One word: `join`, `form`, `ready`, `go`, `skip`, `checkpoint`, `unsaved` (a checkpoint that failed), `rewind`, `lost`,
    /// `stop`, `early-stop`, `done`, `late`, `slow`, `abort`, `spare`, `bound`; of the queue `submit`, `start`, `pause`, `queue`, `retry`, `cancel`, `drain`, `refuse`,
    /// `wait`; of the shell `warning`.
    pub kind: &'static str,
    /// A sentence for a person.
    pub text: String,
}
