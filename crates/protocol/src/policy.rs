//! What the owner of a job decided about its course: sizes, cadences, limits.

use crate::Selection;

/// A job's policy. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct JobPolicy {
    /// Members of a generation.
    pub world: u32,
    /// A checkpoint every so many steps; `None` only at the end.
    pub save_every: Option<u64>,
    /// An evaluation every so many steps besides the first and the last; `None` only those two.
    pub evaluate_every: Option<u64>,
    /// What makes one evaluation better than another, and what follows from it; `None` compares none.
    pub selection: Option<Selection>,
    /// Silence after which a worker counts as lost.
    pub heartbeat_timeout_ms: u64,
    /// How long workers may take to join.
    pub join_timeout_ms: u64,
    /// How long loading and the reference pass may go without progress.
    pub form_timeout_ms: u64,
    /// How long one step may take, an evaluation and a snapshot before it included.
    pub step_timeout_ms: u64,
    /// How long a checkpoint may take to become durable after the last step.
    pub save_timeout_ms: u64,
    /// Consecutive skipped steps that end the job (invariant T6).
    pub skipped_steps_max: u64,
}

impl JobPolicy {
    /// Whether the weights after `step` are saved for their cadence.
    pub(crate) fn saves_at(&self, step: u64) -> bool {
        self.save_every
            .is_some_and(|every| step.is_multiple_of(every))
    }

    /// Whether the weights after `step` are evaluated for their cadence.
    pub(crate) fn evaluates_at(&self, step: u64) -> bool {
        self.evaluate_every
            .is_some_and(|every| step.is_multiple_of(every))
    }

    /// Whether every evaluated step is saved, so that the best one can be kept.
    pub(crate) fn keeps_best(&self) -> bool {
        self.selection.as_ref().is_some_and(|it| it.keep_best)
    }

    /// Whether training may go on after so many consecutive skipped steps (invariant T6).
    pub(crate) fn skips_allowed(&self, skipped: u64) -> bool {
        skipped == 0 || skipped < self.skipped_steps_max
    }
}
