//! What a job waits for and how its workers fare, as values for people and status pages.

use std::fmt;

use super::Job;
use super::phase::{Member, Phase};
use crate::ids::listed;
use crate::{Generation, Incarnation, Pulse, Rank, Step};

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
    /// Members to leave a generation that is over.
    Left {
        /// It.
        generation: Generation,
        /// Who has not.
        ranks: Vec<Rank>,
        /// Why it is over.
        reason: String,
    },
    /// A worker to join, because too few are left to train.
    Joiner {
        /// Members and spares.
        here: u32,
        /// Fewest that train.
        wanted: u32,
        /// Why others are gone.
        reason: String,
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
            Self::Left {
                generation,
                ranks,
                reason,
            } => write!(
                f,
                "waiting for {} to leave generation {generation}: {reason}",
                ranks_text(ranks)
            ),
            Self::Joiner {
                here,
                wanted,
                reason,
            } => write!(
                f,
                "waiting for a worker to join ({here} here, {wanted} train): {reason}"
            ),
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
#[derive(Clone, Debug, PartialEq)]
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
    /// How regularly it is heard.
    pub pulse: Pulse,
    /// Whether it waits to be admitted.
    pub spare: bool,
}

impl Job {
    /// What it waits for.
    pub fn waiting(&self) -> Waiting {
        let late = self.late_members();
        let ranks: Vec<Rank> = late.filter_map(|it| self.members[&it].rank).collect();
        self.waiting_for(!ranks.is_empty(), ranks)
    }

    /// The same without the ranks: quickly told, to be asked after every word of thousands.
    pub fn waiting_in_short(&self) -> Waiting {
        let members = self.members.len();
        let somebody = match &self.phase {
            // Nobody is counted who is no member.
            Phase::Forming { ready, .. } => ready.len() < members,
            Phase::Stepping { prepared, .. } => prepared.len() < members,
            _ => self.late_members().next().is_some(),
        };
        self.waiting_for(somebody, Vec::new())
    }

    /// Given whether somebody is late, and who.
    fn waiting_for(&self, late: bool, ranks: Vec<Rank>) -> Waiting {
        if let (Phase::Stepping { .. } | Phase::Draining { .. }, Some(step)) =
            (&self.phase, self.evaluating)
            && !late
        {
            return Waiting::Evaluated { step };
        }
        match &self.phase {
            Phase::Regrouping { reason, .. } if late => Waiting::Left {
                generation: self.generation,
                ranks,
                reason: reason.clone(),
            },
            Phase::Regrouping { .. } if self.awaits_publication() => {
                let publishing = self.saves.iter().filter(|(_, it)| it.publishing);
                let last = publishing.map(|(step, _)| *step).next_back();
                Waiting::Checkpoint {
                    step: last.unwrap_or(self.committed),
                }
            }
            Phase::Regrouping { reason, .. } => Waiting::Joiner {
                here: (self.members.len() + self.spares.len()) as u32,
                wanted: self.wanted() as u32,
                reason: match self.want_of_room() {
                    Some(want) => format!("{want}; {reason}"),
                    None => reason.clone(),
                },
            },
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
                if late {
                    Waiting::Saved { step, ranks }
                } else {
                    Waiting::Checkpoint { step }
                }
            }
            Phase::Finishing { .. } => Waiting::Finished { ranks },
            Phase::Done(_) => Waiting::Nothing,
        }
    }

    /// Its workers, by rank once they have one, then its spares.
    pub fn workers(&self) -> Vec<WorkerView> {
        let view = |spare, incarnation: &Incarnation, member: &Member| WorkerView {
            incarnation: *incarnation,
            name: member.name.clone(),
            rank: member.rank,
            address: member.address.clone(),
            generation: member.rank.map_or(Generation(0), |_| self.generation),
            phase: self.doing(*incarnation),
            committed: member.committed,
            last_heard_ms: member.pulse.last_heard_ms(),
            pulse: member.pulse,
            spare,
        };
        let members = self
            .members
            .iter()
            .map(|(it, member)| view(false, it, member));
        let spares = self.spares.iter().map(|(it, spare)| view(true, it, spare));
        members.chain(spares).collect()
    }

    /// Members with a rank that have not done what the phase waits for.
    pub(super) fn late_members(&self) -> impl Iterator<Item = Incarnation> {
        let ranked = self.members.iter().filter(|(_, it)| it.rank.is_some());
        ranked
            .filter(|(it, member)| !self.has_done(**it, member))
            .map(|(it, _)| *it)
    }

    fn has_done(&self, incarnation: Incarnation, member: &Member) -> bool {
        let Some(rank) = member.rank else {
            return false;
        };
        match &self.phase {
            Phase::Gathering { .. } | Phase::Done(_) => true,
            Phase::Regrouping { .. } => member.held.is_some(),
            Phase::Forming { ready, .. } => ready.contains_key(&rank),
            Phase::Stepping { prepared, .. } => prepared.contains_key(&rank),
            Phase::Draining { .. } => {
                let save = self.awaited_save().and_then(|step| self.saves.get(&step));
                save.is_none_or(|it| it.is_done_by(incarnation))
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
        if let Some(spare) = self.spares.get(&incarnation) {
            return match (&spare.progress, &spare.loaded) {
                (Some((phase, done, total)), _) => format!("{phase} {done}/{total}"),
                (None, None) => "loads".into(),
                (None, Some(_)) => "spare".into(),
            };
        }
        let member = self.members.get(&incarnation);
        let done = member.is_some_and(|it| self.has_done(incarnation, it));
        let next = self.committed.next();
        let save = self.awaited_save().unwrap_or(self.committed);
        match (&self.phase, done) {
            (Phase::Gathering { .. }, _) => "joined".into(),
            (Phase::Regrouping { .. }, true) => format!("left generation {}", self.generation),
            (Phase::Regrouping { .. }, false) => format!("leaves generation {}", self.generation),
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
    match ranks {
        [one] => format!("rank {one}"),
        _ => format!("ranks {}", listed(ranks.iter(), ", ")),
    }
}
