//! What a worker says: its fences are checked, then it is acted on; and what a beat is answered with.

use std::collections::BTreeSet;

use super::phase::{Phase, Vote};
use super::spoken::GONE_MAX;
use super::{Action, Job};
use crate::record::COUNTED_MAX;
use crate::{
    Awaits, Cause, CoordinatorMessage, FromWorker, Generation, Incarnation, Rank, Step,
    WorkerMessage,
};

impl Job {
    /// Checks a message's fences (invariant M1), then acts on it.
    pub(super) fn message(&mut self, now_ms: u64, from: FromWorker, actions: &mut Vec<Action>) {
        let FromWorker {
            job,
            incarnation,
            generation,
            message,
        } = from;
        // A worker may not know the name of the only job here.
        if !job.0.is_empty() && job != self.spec.id {
            let reason = format!("this coordinator runs job {}, not {job}", self.spec.id);
            return self.stop(incarnation, reason, actions);
        }
        if let Phase::Done(outcome) = &self.phase {
            let reason = format!("the job ended: {outcome}");
            return self.stop(incarnation, reason, actions);
        }
        if let Some(reason) = self.knows_more(incarnation, generation, &message) {
            return self.fail(Cause::Fatal, reason, None, actions);
        }
        if self.spoken.is_stale(incarnation, generation) {
            return; // it has said newer things since, and hears the answers to those
        }
        self.forget_gone();
        if let WorkerMessage::Join(profile) = message {
            return self.join(now_ms, incarnation, profile, actions);
        }
        let gathering = matches!(self.phase, Phase::Gathering { .. });
        let truth = CoordinatorMessage::Stale {
            committed: self.committed,
        };
        if self.spares.contains_key(&incarnation) {
            return self.spare_message(now_ms, incarnation, generation, message, actions);
        }
        let Some(member) = self.members.get_mut(&incarnation) else {
            if gathering {
                return self.send(incarnation, truth, actions);
            }
            let reason = format!("generation {} has its members already", self.generation);
            return self.stop(incarnation, reason, actions);
        };
        if gathering || generation != self.generation {
            return self.outside(now_ms, incarnation, generation, message, actions);
        }
        member.heard(now_ms);
        let Some(rank) = member.rank else { return };
        match message {
            WorkerMessage::Join(_) => unreachable!("joins were taken above"),
            WorkerMessage::Beat {
                committed,
                awaits,
                activity,
            } => {
                member.pulse.beat(now_ms);
                member.committed = member.committed.max(committed);
                if member.activity.0 != activity {
                    member.activity = (activity, now_ms);
                }
                self.answer(now_ms, incarnation, committed, awaits, actions);
            }
            WorkerMessage::Progress { phase, done, total } => {
                self.progress(now_ms, incarnation, (phase, done, total), actions);
            }
            WorkerMessage::DataReport { text } => {
                // Once a generation: a repetition is not shown again.
                if rank == Rank(0) && !std::mem::replace(&mut self.reported, true) {
                    actions.push(Action::DataReport { text });
                }
            }
            WorkerMessage::Ready {
                facts,
                reference_reused,
                reference_computed,
                workers_min,
            } => {
                member.workers_min = workers_min;
                let counts = (reference_reused, reference_computed);
                self.ready(now_ms, incarnation, facts, counts, actions);
            }
            WorkerMessage::Prepared {
                report,
                phases,
                gpu,
            } => {
                let vote = Vote {
                    report,
                    phases,
                    gpu,
                };
                self.prepared(now_ms, incarnation, vote, actions);
            }
            WorkerMessage::Evaluated { row, samples } => {
                self.evaluated(now_ms, rank, row, samples, actions);
            }
            WorkerMessage::Saved { step, asked, shard } if self.asks(step, asked, generation) => {
                self.saved(incarnation, step, shard, actions);
            }
            WorkerMessage::SaveFailed {
                step,
                asked,
                reason,
            } if self.asks(step, asked, generation) => {
                let reason = format!("{}: {reason}", self.name(incarnation));
                self.save_failed(now_ms, step, &reason, actions);
            }
            WorkerMessage::Finished => self.finished(incarnation, actions),
            WorkerMessage::Failed { cause, reason } => {
                self.member_failed(now_ms, incarnation, cause, &reason, actions);
            }
            WorkerMessage::Leave { reason } => self.leaves(now_ms, incarnation, reason, actions),
            WorkerMessage::Held { held, workers_min } => {
                let held = (held, workers_min);
                self.held(now_ms, incarnation, generation, held, actions);
            }
            // Of a save that was given up, or of a time when it was a spare.
            WorkerMessage::Saved { .. }
            | WorkerMessage::SaveFailed { .. }
            | WorkerMessage::Loaded { .. } => {}
            WorkerMessage::CollectiveFailed { suspect, reason } => {
                self.collective_failed(now_ms, incarnation, suspect, &reason, actions);
            }
        }
    }

    /// Keeps the memory of who spoke bounded.
    pub(super) fn forget_gone(&mut self) {
        // Whoever outlived the coordinator may be back soon.
        let last = &self.spec.recovery.members;
        let here = self.members.len() + self.spares.len() + last.len();
        if self.spoken.len() > here + GONE_MAX {
            let (members, spares) = (&self.members, &self.spares);
            let last: BTreeSet<Incarnation> = last.iter().copied().collect();
            self.spoken.forget(|it| {
                members.contains_key(it) || spares.contains_key(it) || last.contains(it)
            });
        }
    }

    /// How many workers are remembered that have spoken. For tests.
    #[doc(hidden)]
    pub fn remembered(&self) -> usize {
        self.spoken.len()
    }

    /// Whether a worker knows more than the journal, so that the journal cannot be this run's newest (invariant M2).
    ///
    /// A higher generation is a number that is used: the next one is above it.
    fn knows_more(
        &mut self,
        incarnation: Incarnation,
        generation: Generation,
        message: &WorkerMessage,
    ) -> Option<String> {
        let cure = "the journal is not the newest of this run: restore it, or stop the workers of the other coordinator";
        if generation > self.generation && generation.0 < COUNTED_MAX {
            self.known = self.known.max(generation);
            if matches!(self.phase, Phase::Gathering { .. }) {
                self.generation = Generation(self.known.0 + 1);
            }
        }
        let knows = match message {
            WorkerMessage::Beat { committed, .. } => *committed,
            WorkerMessage::Held { held, .. } => {
                let applied = held.iter().map(|it| it.applied);
                applied.max().unwrap_or_default()
            }
            _ => return None,
        };
        (knows > self.highest).then(|| {
            format!(
                "worker {incarnation} knows commit {knows}, the journal ends at {}; {cure}",
                self.highest
            )
        })
    }

    /// Answers a beat. What a waiting worker lacks is repeated: a lost message costs one heartbeat.
    fn answer(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        committed: Step,
        awaits: Awaits,
        actions: &mut Vec<Action>,
    ) {
        let answer = match (awaits, &self.phase, &self.said) {
            (_, Phase::Regrouping { reason, .. }, _) => {
                let known = self.members.get(&incarnation);
                let asked = known.is_some_and(|it| it.held.is_none());
                let reason = reason.clone();
                asked.then_some(CoordinatorMessage::Abort { reason })
            }
            // It left the generation that the others are in: they cannot go on without it.
            (
                Awaits::Form,
                Phase::Forming { .. } | Phase::Stepping { .. } | Phase::Draining { .. },
                _,
            ) => {
                let reason = format!("{} left the generation", self.name(incarnation));
                return self.regroup(now_ms, reason, actions);
            }
            (Awaits::Go, _, Some(said @ CoordinatorMessage::Go { .. })) => Some(said.clone()),
            (Awaits::Commit, _, Some(said @ CoordinatorMessage::Commit { .. }))
                if committed < self.committed =>
            {
                Some(said.clone())
            }
            (Awaits::Go | Awaits::End, Phase::Finishing { .. }, _) => {
                Some(CoordinatorMessage::Finish)
            }
            _ => None,
        };
        if let Some(answer) = answer {
            self.send(incarnation, answer, actions);
        } else {
            let committed = self.committed;
            self.send(
                incarnation,
                CoordinatorMessage::Heard { committed },
                actions,
            );
        }
    }
}
