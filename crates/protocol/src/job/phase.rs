//! A job's phases with what belongs to each, and its members.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    Activity, Generation, GpuFigures, Held, Incarnation, Outcome, Phases, Pulse, Rank, RunFacts,
    Step, StepReport,
};

/// Where a job is.
pub(super) enum Phase {
    /// Workers join until there are as many as the policy's world.
    Gathering {
        since_ms: u64,
        /// Whether whoever still lives after a restart had the time to come back.
        grace_over: bool,
    },
    /// The generation is over for its members, of which some are lost or others to be added: they leave it, and say what they
    /// hold.
    Regrouping {
        /// Why.
        reason: String,
        /// When it began.
        since_ms: u64,
    },
    /// Members load, connect, and score their parts of the reference; or move the state that some of them hold.
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
    /// Each rank's own.
    pub(super) gpu: GpuFigures,
}

/// A worker that joined: a member, or a spare.
pub(super) struct Member {
    /// Its rank, from Forming on.
    pub(super) rank: Option<Rank>,
    /// What people call it.
    pub(super) name: String,
    /// `host:port` of its collective listener.
    pub(super) address: String,
    /// When it said something that was not stale, and how regularly.
    pub(super) pulse: Pulse,
    /// Whether its being late was noted.
    pub(super) late: bool,
    /// The long phase it is in: name, units done, units in all.
    pub(super) progress: Option<(String, u64, u64)>,
    /// The last commit it is known to have heard of.
    pub(super) committed: Step,
    /// What it said that it holds, outside of generations, and in which one it said so.
    pub(super) held: Option<(Generation, Vec<Held>)>,
    /// Fewest members among whom its device has room, as it last said; 0 for any number.
    pub(super) workers_min: u32,
    /// Since when a spare is waited for to say what it holds.
    pub(super) asked_ms: u64,
    /// What a spare found when it had loaded.
    pub(super) loaded: Option<RunFacts>,
    /// Why it is to leave.
    pub(super) leaving: Option<String>,
    /// What it last said of its work, and when that last moved.
    pub(super) activity: (Activity, u64),
    /// Steps in a row in which it was slow.
    pub(super) slow: u32,
}

impl Member {
    pub(super) fn new(now_ms: u64, name: String, address: String, committed: Step) -> Self {
        Self {
            rank: None,
            name,
            address,
            pulse: Pulse::new(now_ms),
            late: false,
            progress: None,
            committed,
            held: None,
            workers_min: 0,
            asked_ms: now_ms,
            loaded: None,
            leaving: None,
            activity: (Activity::default(), now_ms),
            slow: 0,
        }
    }

    pub(super) fn heard(&mut self, now_ms: u64) {
        self.pulse.heard(now_ms);
        self.late = false;
    }

    /// It said, in no generation now and out of `generation`, what it holds; words of an older one do not count.
    pub(super) fn hear_held(&mut self, generation: Generation, held: Vec<Held>, workers_min: u32) {
        let before = self.held.as_ref();
        if before.is_none_or(|(then, _)| *then <= generation) {
            self.held = Some((generation, held));
            self.workers_min = workers_min;
        }
    }

    /// What it holds, if it said so.
    pub(super) fn holds(&self) -> &[Held] {
        self.held.as_ref().map_or(&[], |(_, held)| held)
    }
}

/// A step that fails again and again.
pub(super) struct Failing {
    /// Why a member was lost.
    pub(super) reason: String,
    /// In how many generations in a row, for the same reason.
    pub(super) times: u32,
    /// The last of them.
    pub(super) generation: Generation,
}

/// A checkpoint under way.
pub(super) struct Save {
    /// The generation that writes it.
    pub(super) generation: Generation,
    /// Its members, who may write on in a later generation.
    pub(super) writers: BTreeMap<Incarnation, Rank>,
    /// What each rank said of its part.
    pub(super) shards: BTreeMap<Rank, String>,
    /// All parts are durable, and the manifest is being written: members may go.
    pub(super) publishing: bool,
    /// Consecutive skipped steps up to its own.
    pub(super) skipped: u64,
}

impl Save {
    /// Whether a worker has nothing more to write for it.
    pub(super) fn is_done_by(&self, incarnation: Incarnation) -> bool {
        let rank = self.writers.get(&incarnation);
        rank.is_none_or(|rank| self.shards.contains_key(rank))
    }
}

/// The newest checkpoint that is visible.
pub(super) struct Newest {
    /// Its step; 0 for none.
    pub(super) step: Step,
    /// Where it is; `None` for none.
    pub(super) path: Option<String>,
    /// Consecutive skipped steps up to it.
    pub(super) skipped: u64,
}
