//! One process's training: step, flat parameters, sharded optimizer, evaluation, reference pass.
//!
//! ```text
//! Spec ──► Setup::load: tokens, weights, digests ──► Trainer::new: reference values durable, state at the last commit
//!      ──► Trainer::run: StepGate says what next, every step is prepared, decided upon, applied or dropped
//! ```
//! [`Trainer::run`] reads as the training loop; `learner` is one step's arithmetic over all ranks, `batch` what a step trains
//! on, `reference` the frozen model's log-probs, `snapshot` what a checkpoint holds. [`score`] and [`bench`] use the same
//! forward and the same step; [`reports`] stops before the model, [`generate`] lets one write; [`plan`] says before a run
//! what it will need.
//!
//! Not here: who is a member, when to save or to evaluate, what a decision is based on (`protocol`, behind [`StepGate`]);
//! which checkpoint is whole (`checkpoint`); losses (`objective`); data formats and order (`data`).

mod adapter;
mod batch;
mod bench;
mod divergence;
mod error;
mod evaluate;
mod exchange;
mod gate;
mod generate;
mod lanes;
mod learner;
mod masters;
mod measure;
mod moments;
mod phases;
pub mod plan;
mod process;
mod pulse;
mod reference;
mod reform;
mod scope;
mod score;
mod setup;
mod shard_sums;
mod shards;
mod shared_sums;
mod snapshot;
mod trainer;
mod update;
mod utilization;
mod warm_up;

pub use bench::{BenchRequest, BenchResult, Profile, bench};
pub use error::{Cause, TrainError};
pub use gate::{
    EvaluationRow, GateClosed, Next, Reformation, Sample, SavedReporter, SavedShard, StepGate,
    StepReport, Verdict,
};
pub use generate::{Continuation, GenerateRequest, Prompts, generate};
pub use phases::Phases;
pub use pulse::{Pulse, Work};
pub use reference::ReferenceCounts;
pub use reform::{Held, Past};
pub use score::{ScoreRequest, ScoredPair, score};
pub use setup::{Facts, Progress, Reports, Setup, reports};
pub use shards::Sharding;
pub use trainer::{End, Membership, Trainer};
pub use warm_up::KernelTimes;
