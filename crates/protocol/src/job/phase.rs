//! A job's phases with what belongs to each, and its members.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Outcome, Phases, Rank, RunFacts, Step, StepReport};

/// Where a job is.
pub(super) enum Phase {
    /// Workers join until there are as many as the policy's world.
    Gathering { since_ms: u64 },
    /// Members load, connect, and score their parts of the reference.
    Forming {
        /// What the ready members found.
        ready: BTreeMap<Rank, RunFacts>,
        /// When some member last moved on.
        progressed_ms: u64,
    },
    /// Members compute the step after the last commit.
    Stepping {
        /// Votes on it.
        prepared: BTreeMap<Rank, Vote>,
        /// When it began: at Go, or at the commit before.
        since_ms: u64,
        /// The next commit is to be the last, and why.
        stop: Option<String>,
    },
    /// The last commit is journaled; its checkpoint, or the best one, is not yet visible.
    Draining {
        /// Its step.
        step: Step,
        /// How the job ends once it is.
        outcome: Outcome,
        /// When it was committed, or its evaluation was recorded.
        since_ms: u64,
    },
    /// All is durable; members leave.
    Finishing {
        /// How the job ends.
        outcome: Outcome,
        /// Who has left, or was lost, which harms nothing now.
        gone: BTreeSet<Rank>,
        /// When they were told.
        since_ms: u64,
    },
    /// It ended.
    Done(Outcome),
}

/// What a member prepared.
pub(super) struct Vote {
    /// The same bits on all ranks.
    pub(super) report: StepReport,
    /// Each rank's own.
    pub(super) phases: Phases,
}

/// A worker that joined.
pub(super) struct Member {
    /// Its rank, from Forming on.
    pub(super) rank: Option<Rank>,
    /// What people call it.
    pub(super) name: String,
    /// `host:port` of its collective listener.
    pub(super) address: String,
    /// When it last said something that was not stale.
    pub(super) last_heard_ms: u64,
    /// The long phase it is in: name, units done, units in all.
    pub(super) progress: Option<(String, u64, u64)>,
    /// The last commit it is known to have heard of.
    pub(super) committed: Step,
}

/// A checkpoint under way.
#[derive(Default)]
pub(super) struct Save {
    /// What each rank said of its part.
    pub(super) shards: BTreeMap<Rank, String>,
}
