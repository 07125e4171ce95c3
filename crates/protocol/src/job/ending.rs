//! Checkpoints becoming visible, and every way a job ends.

use std::collections::BTreeSet;

use super::phase::Phase;
use super::{Action, Job, note};
use crate::{Cause, CoordinatorMessage, Incarnation, Outcome, Rank, Record, Step};

impl Job {
    /// A rank's part of a checkpoint is durable. With all parts, the manifest can be written.
    pub(super) fn saved(
        &mut self,
        rank: Rank,
        step: Step,
        shard: String,
        actions: &mut Vec<Action>,
    ) {
        let Some(save) = self.saves.get_mut(&step) else {
            return; // never asked for, given up, or visible already
        };
        if save.shards.contains_key(&rank) {
            return;
        }
        save.shards.insert(rank, shard);
        self.publish_when_ready(step, actions);
    }

    /// Has the manifest written once all parts are there, and the step's evaluation is recorded: a run that goes on from this
    /// checkpoint does not evaluate it again.
    pub(super) fn publish_when_ready(&self, step: Step, actions: &mut Vec<Action>) {
        let Some(save) = self.saves.get(&step) else {
            return;
        };
        if save.shards.len() == self.members.len() && self.evaluating != Some(step) {
            actions.push(Action::CommitCheckpoint {
                generation: self.generation,
                step,
                world: self.spec.policy.world,
                shards: save.shards.values().cloned().collect(),
                best_first: self.best_first(),
            });
        }
    }

    pub(super) fn checkpoint_committed(
        &mut self,
        now_ms: u64,
        step: Step,
        actions: &mut Vec<Action>,
    ) {
        if self.outcome().is_some() || self.saves.remove(&step).is_none() {
            return;
        }
        actions.push(Action::Journal(Record::Checkpoint { step }));
        actions.push(note(
            "checkpoint",
            format!("checkpoint of step {step} is complete"),
        ));
        self.finish_when_drained(now_ms, actions);
    }

    /// Ends a job whose last commit is made once no checkpoint is waited for.
    fn finish_when_drained(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        if let Phase::Draining { outcome, .. } = &self.phase
            && self.awaited_save().is_none()
        {
            let outcome = outcome.clone();
            self.finish(now_ms, outcome, actions);
        }
    }

    /// The checkpoint that a draining job waits for: the last one, then the best one where that is kept.
    pub(super) fn awaited_save(&self) -> Option<Step> {
        let Phase::Draining { step: last, .. } = &self.phase else {
            return None;
        };
        let best = self.best_first().into_iter().next();
        [Some(*last), best]
            .into_iter()
            .flatten()
            .find(|step| self.saves.contains_key(step))
    }

    /// A checkpoint will not become visible. The older one still serves, unless this was the last.
    pub(super) fn save_failed(
        &mut self,
        now_ms: u64,
        step: Step,
        reason: &str,
        actions: &mut Vec<Action>,
    ) {
        if self.outcome().is_some() || self.saves.remove(&step).is_none() {
            return;
        }
        let text = format!(
            "checkpoint of step {step} could not be written: {reason}; make room there, or set checkpoint.path to another disk"
        );
        actions.push(note("unsaved", text.clone()));
        match &self.phase {
            Phase::Draining { step: last, .. } if *last == step => {
                self.fail(Cause::Fatal, text, None, actions);
            }
            _ => self.finish_when_drained(now_ms, actions),
        }
    }

    pub(super) fn stop_requested(&mut self, reason: String, actions: &mut Vec<Action>) {
        match &mut self.phase {
            Phase::Gathering { .. } | Phase::Forming { .. } => {
                actions.push(note("stop", format!("before the first step: {reason}")));
                for incarnation in self.members.keys() {
                    self.stop(*incarnation, reason.clone(), actions);
                }
                let committed = self.committed;
                self.end(Outcome::Interrupted { committed }, actions);
            }
            Phase::Stepping { stop, .. } => {
                if stop.is_none() {
                    let text = format!("after step {}: {reason}", self.committed.next());
                    actions.push(note("stop", text));
                    *stop = Some(reason);
                }
            }
            Phase::Draining { .. } | Phase::Finishing { .. } | Phase::Done(_) => {}
        }
    }

    /// All is durable: members may leave.
    pub(super) fn finish(&mut self, now_ms: u64, outcome: Outcome, actions: &mut Vec<Action>) {
        self.phase = Phase::Finishing {
            outcome,
            gone: BTreeSet::new(),
            since_ms: now_ms,
        };
        self.send_all(&CoordinatorMessage::Finish, actions);
    }

    pub(super) fn finished(&mut self, incarnation: Incarnation, actions: &mut Vec<Action>) {
        let rank = self.members.get(&incarnation).and_then(|it| it.rank);
        let Phase::Finishing { gone, .. } = &mut self.phase else {
            return;
        };
        gone.extend(rank);
        if gone.len() == self.members.len() {
            self.leave(actions);
        }
    }

    /// Ends a job whose members have left, or had their time to.
    pub(super) fn leave(&mut self, actions: &mut Vec<Action>) {
        let Phase::Finishing { outcome, .. } = &self.phase else {
            return;
        };
        let outcome = outcome.clone();
        if outcome == Outcome::Completed {
            let step = self.committed;
            actions.push(Action::Journal(Record::Completed { step }));
        }
        self.end(outcome, actions);
    }

    /// A member that cannot go on, by its own word.
    pub(super) fn member_failed(
        &mut self,
        incarnation: Incarnation,
        cause: Cause,
        reason: &str,
        actions: &mut Vec<Action>,
    ) {
        let text = format!("{}: {reason}", self.name(incarnation));
        if matches!(self.phase, Phase::Finishing { .. }) {
            actions.push(note("lost", text));
            return self.finished(incarnation, actions);
        }
        self.fail(cause, text, Some(incarnation), actions);
    }

    /// A member whose connection closed or that fell silent. Before the generation is formed its place is free again;
    /// when all is durable it harms nothing; in between it ends the job, which can be resumed.
    pub(super) fn lost(&mut self, incarnation: Incarnation, how: &str, actions: &mut Vec<Action>) {
        if self.outcome().is_some() || !self.members.contains_key(&incarnation) {
            return;
        }
        let doing = self.doing(incarnation);
        let text = format!("{} was lost ({doing}): {how}", self.name(incarnation));
        match &self.phase {
            Phase::Gathering { .. } => {
                actions.push(note("lost", text));
                self.members.remove(&incarnation);
            }
            Phase::Finishing { gone, .. } => {
                let rank = self.members.get(&incarnation).and_then(|it| it.rank);
                if rank.is_some_and(|rank| !gone.contains(&rank)) {
                    actions.push(note("lost", text));
                    self.finished(incarnation, actions);
                }
            }
            _ => {
                actions.push(note("lost", text.clone()));
                self.fail(Cause::Temporary, text, Some(incarnation), actions);
            }
        }
    }

    /// Tells all but `except` to stop, and ends the job.
    pub(super) fn fail(
        &mut self,
        cause: Cause,
        reason: String,
        except: Option<Incarnation>,
        actions: &mut Vec<Action>,
    ) {
        for incarnation in self.members.keys().filter(|it| Some(**it) != except) {
            self.stop(*incarnation, reason.clone(), actions);
        }
        self.end(Outcome::Failed { cause, reason }, actions);
    }

    pub(super) fn end(&mut self, outcome: Outcome, actions: &mut Vec<Action>) {
        actions.push(note("done", outcome.to_string()));
        self.phase = Phase::Done(outcome.clone());
        actions.push(Action::Done(outcome));
    }
}
