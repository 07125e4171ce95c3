//! What the owner of a job decided about its course: sizes, cadences, limits, and how long a recovery may take by them.

use crate::Selection;

/// A job's policy. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct JobPolicy {
    /// Members that the first generation waits for.
    pub world: u32,
    /// A checkpoint every so many steps; `None` only at the end.
    pub save_every: Option<u64>,
    /// An evaluation every so many steps besides the first and the last; `None` only those two.
    pub evaluate_every: Option<u64>,
    /// What makes one evaluation better than another, and what follows from it; `None` compares none.
    pub selection: Option<Selection>,
    /// Silence after which a worker counts as lost.
    pub heartbeat_timeout_ms: u64,
    /// How long workers may take to join, at the beginning or when too few are left.
    pub join_timeout_ms: u64,
    /// How long loading and the reference pass may go without progress.
    pub form_timeout_ms: u64,
    /// How long one step may take, an evaluation and a snapshot before it included.
    pub step_timeout_ms: u64,
    /// How long a checkpoint may take to become durable after the last step.
    pub save_timeout_ms: u64,
    /// Consecutive skipped steps that end the job (invariant T6).
    pub skipped_steps_max: u64,
    /// Consecutive checkpoints that could not be written and end the job. Each is tried at the next step that saves.
    pub failed_saves_max: u32,
    /// How it goes on without a lost member.
    pub elastic: Elastic,
}

/// How a job outlives the loss of members and takes others in. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Elastic {
    /// Fewest members that train. With fewer it waits for a joiner.
    pub workers_min: u32,
    /// Most members. More wait as spares.
    pub workers_max: u32,
    /// Whether each member holds the optimizer shard of the one before it, too: then no state is lost with any one of them.
    /// Otherwise the run goes back to its last checkpoint.
    pub mirror: bool,
    /// Whether members keep gradients in shards too (ZeRO stage 2).
    pub shard_gradients: bool,
    /// Whether members with GPUs keep the optimizer's state, and the f32 weights, in the host's memory.
    pub offload: bool,
    /// So many generations in a row that lose a member for the same reason before the same step commits end the attempt.
    pub failures_max: u32,
    /// How long a member may take to leave its generation once told to.
    pub abort_timeout_ms: u64,
    /// How long a member waits for its peers in a collective before it gives the generation up; workers keep it.
    pub collective_timeout_ms: u64,
    /// How long the job may go without a commit before the attempt ends, resumable.
    pub job_timeout_ms: u64,
    /// A member whose progress stands still for so many learned step times hangs.
    pub hang_factor: f64,
    /// A member that computes so many times as long as the median of its peers is slow.
    pub slow_factor: f64,
}

/// A policy that cannot work.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PolicyError {
    /// The ladder of timeouts has a rung out of place: what waits for another must wait longer.
    #[error(
        "{lower} is {lower_ms} ms and {upper} {upper_ms} ms: {upper} must be longer, or it passes before what it waits for"
    )]
    Ladder {
        /// The rung that must be shorter.
        lower: &'static str,
        /// Its time.
        lower_ms: u64,
        /// The rung above it.
        upper: &'static str,
        /// Its time.
        upper_ms: u64,
    },
    /// Numbers of workers that contradict each other.
    #[error(
        "workers_min {min}, workers {world} and workers_max {max} must be in this order, and 1 or more"
    )]
    Workers {
        /// Fewest.
        min: u32,
        /// At the beginning.
        world: u32,
        /// Most.
        max: u32,
    },
    /// A factor that is none.
    #[error("{name} is {value}, expected a finite number above 1")]
    Factor {
        /// Which.
        name: &'static str,
        /// What it is.
        value: f64,
    },
}

impl JobPolicy {
    /// Checks the numbers against each other: heartbeat < abort < collective < step < rendezvous (`join`) <
    /// job, and the two that end no other wait, forming and saving, against what they contain.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn check(&self) -> Result<(), PolicyError> {
        let elastic = &self.elastic;
        let (min, world, max) = (elastic.workers_min, self.world, elastic.workers_max);
        if min == 0 || min > world || world > max {
            return Err(PolicyError::Workers { min, world, max });
        }
        let heartbeat = ("heartbeat_timeout", self.heartbeat_timeout_ms);
        let abort = ("abort_timeout", elastic.abort_timeout_ms);
        let collective = ("collective_timeout", elastic.collective_timeout_ms);
        let step = ("step_timeout", self.step_timeout_ms);
        let rendezvous = ("join_timeout", self.join_timeout_ms);
        let job = ("job_timeout", elastic.job_timeout_ms);
        let pairs = [
            (("zero", 0), heartbeat),
            (heartbeat, abort),
            (abort, collective),
            (collective, step),
            (step, rendezvous),
            (rendezvous, job),
            // Connecting is a collective; a save ends no sooner than its writers leave.
            (collective, ("form_timeout", self.form_timeout_ms)),
            (abort, ("save_timeout", self.save_timeout_ms)),
        ];
        for ((lower, lower_ms), (upper, upper_ms)) in pairs {
            if lower_ms >= upper_ms {
                return Err(PolicyError::Ladder {
                    lower,
                    lower_ms,
                    upper,
                    upper_ms,
                });
            }
        }
        let factors = [
            ("hang_factor", elastic.hang_factor),
            ("slow_factor", elastic.slow_factor),
        ];
        for (name, value) in factors {
            if !value.is_finite() || value <= 1.0 {
                return Err(PolicyError::Factor { name, value });
            }
        }
        Ok(())
    }

    /// Longest time from one fault to the commit of the step that it hit, in milliseconds, while as many members survive as
    /// training needs; otherwise [`JobPolicy::join_timeout_ms`] more (invariant M5).
    ///
    /// It is noticed by the step's own deadline at the latest (a death by the heartbeat's, a broken collective by its own);
    /// survivors leave their generation or are left behind; the next one may go without progress for `form_timeout_ms` (a
    /// transfer that moves on has no bound); and the step is computed again.
    pub fn recovery_ms_max(&self) -> u64 {
        let noticed = self.step_timeout_ms;
        noticed + self.elastic.abort_timeout_ms + self.form_timeout_ms + self.step_timeout_ms
    }

    /// How long a worker that joins a running job may take to say what it holds, which its training thread does before anything
    /// else: it may be in the middle of a step, or of loading, that it was left behind for, and is stuck if it takes longer.
    pub(crate) fn answer_timeout_ms(&self) -> u64 {
        self.step_timeout_ms.max(self.form_timeout_ms)
    }

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
