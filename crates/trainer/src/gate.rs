//! The narrow door between training and the control of a job: what next, what was prepared, what was decided.
//!
//! `worker` implements [`StepGate`] over its session with the coordinator, tests implement it with a script. Nothing here
//! knows about messages, generations or other processes.

use objective::RewardStatistics;

use crate::error::TrainError;
use crate::phases::Phases;
use crate::reform::{Held, Past};
use crate::trainer::Membership;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Score the held-out pairs with the present weights.
    Evaluate,
    /// Prepare this step (from 1); always the one after the last committed step.
    Step(u64),
    /// Take a snapshot of the present state, which an earlier generation was asked for and did not complete.
    Save {
        /// No step follows.
        last: bool,
    },
    /// The job is done; the last checkpoint is in place.
    Finish,
    /// Leave before the end; the job may be resumed later.
    Stop,
}

/// What was decided about a prepared step, the same on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Apply the optimizer; otherwise the step counts as skipped (T6).
    pub apply: bool,
    /// Take a snapshot of the state after this step.
    pub save: bool,
    /// Score the held-out pairs after this step.
    pub evaluate: bool,
    /// No step follows: the run is complete, or it stops here.
    pub last: bool,
}

/// The next generation of a run.
pub struct Reformation {
    /// This rank's place in it. If its `resume` names a checkpoint, the run goes back to it, and nothing that ranks hold
    /// counts.
    pub membership: Membership,
    /// The last committed step: who has its gradient and has not heard its verdict gets to it; what was prepared beyond it is
    /// dropped.
    pub committed: u64,
    /// That verdict: apply it, otherwise it was skipped (T6).
    pub apply: bool,
    /// Who brings what. Without it the checkpoint does.
    pub past: Option<Past>,
}

/// A prepared step. All ranks report identical bits, times and utilization apart, so that the coordinator can compare them.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// From 1.
    pub step: u64,
    /// From 0.
    pub epoch: u64,
    /// Whether the global gradient has only finite elements.
    pub finite: bool,
    /// Norm of the global gradient before clipping.
    pub grad_norm: f64,
    /// Rate that the step applies.
    pub learning_rate: f64,
    /// Loss: a mean over the step's pairs, for `sft` over its tokens.
    pub loss: f64,
    /// Its preference (or cross-entropy) term.
    pub loss_pairwise: f64,
    /// Its calibration term, weight included.
    pub loss_calibration: f64,
    /// Means over the step's pairs.
    pub rewards: RewardStatistics,
    /// Tokens of the step, unpadded, a prompt counted once for each of its completions.
    pub tokens: u64,
    /// Pairs of the step.
    pub pairs: u64,
    /// Where this rank's time went since its last report.
    pub phases: Phases,
    /// Model FLOPs utilization of this rank, 0 to 1: operations that its packs need, by its time in the step, over what its GPU can
    /// do at most. `None` on the CPU and on a GPU whose peak is not known.
    pub mfu: Option<f64>,
}

impl StepReport {
    /// Every value but times and utilization as bits: equal exactly when two ranks prepared the same step. (A skipped step may hold NaN, which is
    /// unequal to itself, so the type has no `PartialEq`.)
    pub fn bits(&self) -> [u64; 18] {
        let rewards = &self.rewards;
        [
            self.step,
            self.epoch,
            u64::from(self.finite),
            self.grad_norm.to_bits(),
            self.learning_rate.to_bits(),
            self.loss.to_bits(),
            self.loss_pairwise.to_bits(),
            self.loss_calibration.to_bits(),
            rewards.rewards_chosen.to_bits(),
            rewards.rewards_rejected.to_bits(),
            rewards.rewards_margins.to_bits(),
            rewards.rewards_accuracies.to_bits(),
            rewards.log_ratios_chosen.to_bits(),
            rewards.log_ratios_rejected.to_bits(),
            rewards.logps_chosen.to_bits(),
            rewards.logps_rejected.to_bits(),
            self.tokens,
            self.pairs,
        ]
    }
}

/// The held-out pairs after a step; step 0 is before training.
#[derive(Clone, Debug)]
pub struct EvaluationRow {
    /// Committed steps.
    pub step: u64,
    /// Held-out pairs.
    pub pairs: u64,
    /// As in [`StepReport`].
    pub loss: f64,
    /// As in [`StepReport`].
    pub loss_pairwise: f64,
    /// As in [`StepReport`].
    pub loss_calibration: f64,
    /// Means over the held-out pairs.
    pub rewards: RewardStatistics,
}

/// A greedy continuation of a held-out prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The prompt's text, special tokens included.
    pub prompt: String,
    /// What the model wrote.
    pub text: String,
}

/// A snapshot that is durable, or was not written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedShard {
    /// The step after which it was taken.
    pub step: u64,
    /// The rank's file as the manifest lists it (`checkpoint::RankFile` in JSON), or why there is none.
    pub file: Result<String, String>,
}

/// Tells that a snapshot is durable, from the thread that wrote it: the job may be waiting for this while
/// [`StepGate::next`] blocks.
pub type SavedReporter = Box<dyn FnOnce(SavedShard) + Send>;

/// The control side is gone or wants this process to leave at once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the job's control closed: {reason}")]
pub struct GateClosed {
    /// Why.
    pub reason: String,
}

/// What training asks and tells. Calls block as long as the answer takes; deadlines are the implementation's.
pub trait StepGate: Send {
    /// What to do next. The first answer also says that every rank has its reference values in the store.
    ///
    /// # Errors
    /// The control side is gone.
    fn next(&mut self) -> Result<Next, GateClosed>;

    /// Reports a prepared step and waits for its commit.
    ///
    /// # Errors
    /// The control side is gone, or gave the step up.
    fn prepared(&mut self, report: &StepReport) -> Result<Verdict, GateClosed>;

    /// Reports the held-out pairs; all ranks have the same row, rank 0 alone has samples, and those only before the first
    /// step and after the last.
    ///
    /// # Errors
    /// The control side is gone.
    fn evaluated(&mut self, row: &EvaluationRow, samples: &[Sample]) -> Result<(), GateClosed>;

    /// A step, an evaluation or a wait was interrupted by `why`: a lost peer, or the group is to be formed anew. Tells what
    /// this rank holds, the newest first, and waits for the next generation; `None` where there will be none, so that the
    /// error stands.
    ///
    /// # Errors
    /// The control side is gone.
    fn reform(
        &mut self,
        why: &TrainError,
        held: &[Held],
    ) -> Result<Option<Reformation>, GateClosed> {
        let _ = (why, held);
        Ok(None)
    }

    /// This rank has all that the generation starts from and waits for the others.
    ///
    /// # Errors
    /// The control side is gone.
    fn reformed(&mut self, committed: u64) -> Result<(), GateClosed> {
        let _ = committed;
        Ok(())
    }

    /// Where a snapshot in the making will report; called once per snapshot.
    fn saved_reporter(&mut self) -> SavedReporter;

    /// A long phase moves: `done` of `total`. Not called during steps.
    fn progress(&mut self, phase: &str, done: u64, total: u64);
}
