//! What a job waits for and how its workers fare, as values for people and status pages.

use std::fmt;

use super::Job;
use super::phase::Phase;
use crate::{Generation, Incarnation, Rank, Step};

/// What a job waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Workers to join.
    Join {
        /// Joined so far.
        joined: u32,
        /// Wanted.
        world: u32,
    },
    /// Members to load and score their parts of the reference.
    Ready {
        /// Who is not ready.
        ranks: Vec<Rank>,
    },
    /// Votes on a step.
    Prepared {
        /// The step.
        step: Step,
        /// Who has not voted.
        ranks: Vec<Rank>,
    },
    /// The held-out pairs to be evaluated.
    Evaluated {
        /// The step whose weights are.
        step: Step,
    },
    /// Members to write their parts of the last checkpoint.
    Saved {
        /// Its step.
        step: Step,
        /// Who has not.
        ranks: Vec<Rank>,
    },
    /// The last checkpoint's parts to be verified and its manifest to be written.
    Checkpoint {
        /// Its step.
        step: Step,
    },
    /// Members to leave.
    Finished {
        /// Who has not.
        ranks: Vec<Rank>,
    },
    /// Nothing: it ended.
    Nothing,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Join { joined, world } => {
                write!(f, "waiting for workers to join ({joined} of {world} have)")
            }
            Self::Ready { ranks } => write!(f, "waiting for {} to be ready", ranks_text(ranks)),
            Self::Prepared { step, ranks } => {
                write!(
                    f,
                    "waiting for {} to compute step {step}",
                    ranks_text(ranks)
                )
            }
            Self::Evaluated { step } => {
                write!(f, "waiting for the evaluation of step {step}")
            }
            Self::Saved { step, ranks } => {
                write!(f, "waiting for {} to save step {step}", ranks_text(ranks))
            }
            Self::Checkpoint { step } => {
                write!(
                    f,
                    "waiting for the checkpoint of step {step} to be verified"
                )
            }
            Self::Finished { ranks } => write!(f, "waiting for {} to leave", ranks_text(ranks)),
            Self::Nothing => write!(f, "waiting for nothing"),
        }
    }
}

/// A worker as its job sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerView {
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// What people call it.
    pub name: String,
    /// Its rank, once it has one.
    pub rank: Option<Rank>,
    /// `host:port` of its collective listener.
    pub address: String,
    /// The generation it belongs to; 0 before one is formed.
    pub generation: Generation,
    /// What it does, such as `reference pass 128/512`, `computes step 7`.
    pub phase: String,
    /// The last commit it is known to have heard of.
    pub committed: Step,
    /// When it was last heard, in the job's clock.
    pub last_heard_ms: u64,
}

impl Job {
    /// What it waits for.
    pub fn waiting(&self) -> Waiting {
        let ranks = self.late();
        if let (Phase::Stepping { .. } | Phase::Draining { .. }, Some(step)) =
            (&self.phase, self.evaluating)
            && ranks.is_empty()
        {
            return Waiting::Evaluated { step };
        }
        match &self.phase {
            Phase::Gathering { .. } => Waiting::Join {
                joined: self.members.len() as u32,
                world: self.spec.policy.world,
            },
            Phase::Forming { .. } => Waiting::Ready { ranks },
            Phase::Stepping { .. } => {
                let step = self.committed.next();
                Waiting::Prepared { step, ranks }
            }
            Phase::Draining { step, .. } => {
                let step = self.awaited_save().unwrap_or(*step);
                if ranks.is_empty() {
                    Waiting::Checkpoint { step }
                } else {
                    Waiting::Saved { step, ranks }
                }
            }
            Phase::Finishing { .. } => Waiting::Finished { ranks },
            Phase::Done(_) => Waiting::Nothing,
        }
    }

    /// Its workers, by rank once they have one.
    pub fn workers(&self) -> Vec<WorkerView> {
        let view = |(incarnation, member): (&Incarnation, &super::Member)| WorkerView {
            incarnation: *incarnation,
            name: member.name.clone(),
            rank: member.rank,
            address: member.address.clone(),
            generation: member.rank.map_or(Generation(0), |_| self.generation),
            phase: self.doing(*incarnation),
            committed: member.committed,
            last_heard_ms: member.last_heard_ms,
        };
        self.members.iter().map(view).collect()
    }

    /// Ranks that have not done what the phase waits for.
    pub(super) fn late(&self) -> Vec<Rank> {
        let ranks = self.members.values().filter_map(|it| it.rank);
        ranks.filter(|rank| !self.has_done(*rank)).collect()
    }

    fn has_done(&self, rank: Rank) -> bool {
        match &self.phase {
            Phase::Gathering { .. } | Phase::Done(_) => true,
            Phase::Forming { ready, .. } => ready.contains_key(&rank),
            Phase::Stepping { prepared, .. } => prepared.contains_key(&rank),
            Phase::Draining { .. } => {
                let save = self.awaited_save().and_then(|step| self.saves.get(&step));
                save.is_none_or(|it| it.shards.contains_key(&rank))
            }
            Phase::Finishing { gone, .. } => gone.contains(&rank),
        }
    }

    pub(super) fn incarnation_of(&self, rank: Rank) -> Option<Incarnation> {
        let mut members = self.members.iter();
        members
            .find(|(_, it)| it.rank == Some(rank))
            .map(|(incarnation, _)| *incarnation)
    }

    /// What a member does, in two or three words.
    pub(super) fn doing(&self, incarnation: Incarnation) -> String {
        let member = self.members.get(&incarnation);
        let done = member
            .and_then(|it| it.rank)
            .is_some_and(|rank| self.has_done(rank));
        let next = self.committed.next();
        let save = self.awaited_save().unwrap_or(self.committed);
        match (&self.phase, done) {
            (Phase::Gathering { .. }, _) => "joined".into(),
            (Phase::Forming { .. }, true) => "ready".into(),
            (Phase::Forming { .. }, false) => match member.and_then(|it| it.progress.as_ref()) {
                Some((phase, done, total)) => format!("{phase} {done}/{total}"),
                None => "loads".into(),
            },
            (Phase::Stepping { .. }, true) => format!("prepared step {next}"),
            (Phase::Stepping { .. }, false) => format!("computes step {next}"),
            (Phase::Draining { .. }, true) => format!("saved step {save}"),
            (Phase::Draining { .. }, false) => format!("saves step {save}"),
            (Phase::Finishing { .. }, false) => "leaves".into(),
            (Phase::Finishing { .. }, true) | (Phase::Done(_), _) => "left".into(),
        }
    }
}

/// `rank 1`, `ranks 0, 2`.
pub(super) fn ranks_text(ranks: &[Rank]) -> String {
    let list: Vec<_> = ranks.iter().map(Rank::to_string).collect();
    match list.as_slice() {
        [one] => format!("rank {one}"),
        _ => format!("ranks {}", list.join(", ")),
    }
}
