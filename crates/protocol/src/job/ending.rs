//! Checkpoints becoming visible, and every way a job ends.

use std::collections::{BTreeMap, BTreeSet};

use super::phase::{Failing, Newest, Phase, Save};
use super::{Action, Job, note};
use crate::{
    Afterwards, Cause, CoordinatorMessage, Generation, Incarnation, Outcome, Record, Step,
};

impl Job {
    /// Whether the state after `step` is saved.
    pub(super) fn saves_after(&self, step: Step, last: bool) -> bool {
        let policy = &self.spec.policy;
        let may_be_best = policy.keeps_best() && self.evaluates_after(step) && self.has_held_out();
        last || policy.saves_at(step.0) || may_be_best
    }

    /// Whether the state of the last commit is still to be saved, by members that did not hear it with the commit.
    pub(super) fn save_is_due(&self, last: bool) -> bool {
        let step = self.committed;
        let due = step > self.newest.step && self.saves_after(step, last);
        due && !self.saves.contains_key(&step)
    }

    /// Members are asked to save the state of the last commit.
    pub(super) fn begin_save(&mut self) {
        let ranked = self
            .members
            .iter()
            .filter_map(|(it, member)| Some((*it, member.rank?)));
        let save = Save {
            generation: self.generation,
            writers: ranked.collect(),
            shards: BTreeMap::new(),
            publishing: false,
            skipped: self.skipped,
        };
        self.saves.insert(self.committed, save);
    }

    /// Gives up checkpoints of which some part is not written and its writer is no member any more.
    pub(super) fn drop_orphaned_saves(&mut self) {
        let members = &self.members;
        self.saves.retain(|_, save| {
            let mut writers = save.writers.keys();
            save.publishing || writers.all(|it| members.contains_key(it) || save.is_done_by(*it))
        });
    }

    /// Whether the save of `step` that is under way is the one that `asked` (0: `said`) asked for.
    pub(super) fn asks(&self, step: Step, asked: Generation, said: Generation) -> bool {
        let asked = if asked == Generation(0) { said } else { asked };
        let save = self.saves.get(&step);
        save.is_some_and(|it| it.generation == asked)
    }

    /// A member's part of a checkpoint is durable. With all parts, the manifest can be written.
    pub(super) fn saved(
        &mut self,
        incarnation: Incarnation,
        step: Step,
        shard: String,
        actions: &mut Vec<Action>,
    ) {
        let Some(save) = self.saves.get_mut(&step) else {
            return; // never asked for, given up, or visible already
        };
        if save.is_done_by(incarnation) {
            return;
        }
        if let Some(rank) = save.writers.get(&incarnation) {
            save.shards.insert(*rank, shard);
        }
        self.publish_when_ready(step, actions);
    }

    /// Has the manifest written once all parts are there, and the step's evaluation is recorded: a run that goes on from this
    /// checkpoint does not evaluate it again.
    pub(super) fn publish_when_ready(&mut self, step: Step, actions: &mut Vec<Action>) {
        let best_first = self.best_first();
        let Some(save) = self.saves.get_mut(&step) else {
            return;
        };
        let complete = save.shards.len() == save.writers.len() && self.evaluating != Some(step);
        if complete && !std::mem::replace(&mut save.publishing, true) {
            actions.push(Action::CommitCheckpoint {
                generation: save.generation,
                step,
                world: save.writers.len() as u32,
                shards: save.shards.values().cloned().collect(),
                best_first,
            });
        }
    }

    pub(super) fn checkpoint_committed(
        &mut self,
        now_ms: u64,
        step: Step,
        path: String,
        actions: &mut Vec<Action>,
    ) {
        if self.outcome().is_some() {
            return;
        }
        let Some(save) = self.saves.remove(&step) else {
            return;
        };
        self.unsaved = 0;
        if step > self.newest.step {
            self.newest = Newest {
                step,
                path: Some(path),
                skipped: save.skipped,
            };
        }
        actions.push(Action::Journal(Record::Checkpoint { step }));
        actions.push(note(
            "checkpoint",
            format!("checkpoint of step {step} is complete"),
        ));
        self.finish_when_drained(now_ms, actions);
        self.reform(now_ms, actions);
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
        self.awaited_saves().next()
    }

    fn awaited_saves(&self) -> impl Iterator<Item = Step> {
        let last = match &self.phase {
            Phase::Draining { step, .. } => Some(*step),
            _ => None,
        };
        let best = last.and_then(|_| self.best_first().into_iter().next());
        let awaited = last.into_iter().chain(best);
        awaited.filter(|step| self.saves.contains_key(step))
    }

    /// Whether all that a job still waits for is the disk, so that it needs its members no more.
    pub(super) fn members_may_go(&self) -> bool {
        let Phase::Draining { step: last, .. } = self.phase else {
            return false;
        };
        let publishing = |step: Step| self.saves.get(&step).is_some_and(|it| it.publishing);
        self.evaluating.is_none()
            && (self.newest.step >= last || publishing(last))
            && self.awaited_saves().all(publishing)
    }

    /// A checkpoint will not become visible. The older one still serves; the last one is tried again after a pause, as long as
    /// members hold its state.
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
            "checkpoint of step {step} could not be written: {reason}; make room there or see that it can be reached, or \
             move the folder elsewhere and set checkpoint.path to that"
        );
        actions.push(note("unsaved", text.clone()));
        self.unsaved += 1;
        let most = self.spec.policy.failed_saves_max;
        if self.unsaved >= most {
            let text = format!(
                "{most} checkpoints in a row (checkpoint.failures_max) could not be written; the last: {text}"
            );
            return self.fail(Cause::Fatal, text, None, actions);
        }
        match &self.phase {
            Phase::Draining { step: last, .. } if *last == step => {
                if self.members.is_empty() {
                    return self.fail(Cause::Fatal, text, None, actions);
                }
                self.save_again_ms = Some(now_ms + self.elastic().abort_timeout_ms);
                self.regroup(now_ms, text, actions);
            }
            _ => {
                self.finish_when_drained(now_ms, actions);
                self.reform(now_ms, actions);
            }
        }
    }

    pub(super) fn stop_requested(
        &mut self,
        now_ms: u64,
        reason: String,
        actions: &mut Vec<Action>,
    ) {
        let durable = self.committed == self.newest.step;
        match &self.phase {
            // Workers hold what no checkpoint does: they form a generation to save it.
            Phase::Gathering { .. } | Phase::Regrouping { .. } | Phase::Forming { .. }
                if !durable =>
            {
                if self.stop.is_none() {
                    let text = format!("once step {} is saved: {reason}", self.committed);
                    actions.push(note("stop", text));
                    self.stop = Some(reason);
                }
                self.gather(now_ms, actions);
                self.reform(now_ms, actions);
            }
            Phase::Gathering { .. } | Phase::Regrouping { .. } | Phase::Forming { .. } => {
                actions.push(note("stop", format!("before the first step: {reason}")));
                for incarnation in self.members.keys() {
                    self.stop(*incarnation, reason.clone(), actions);
                }
                let committed = self.committed;
                self.end(Outcome::Interrupted { committed }, actions);
            }
            Phase::Stepping { .. } => {
                if self.stop.is_none() {
                    let text = format!("after step {}: {reason}", self.committed.next());
                    actions.push(note("stop", text));
                    self.stop = Some(reason);
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
        self.release_spares("the job is done", actions);
        let leaving = self.members.iter();
        let leaving = leaving.filter_map(|(it, member)| Some((*it, member.leaving.clone()?)));
        let leaving: BTreeMap<Incarnation, String> = leaving.collect();
        for incarnation in self.members.keys() {
            let message = match leaving.get(incarnation) {
                Some(reason) => CoordinatorMessage::Stop {
                    reason: reason.clone(),
                    afterwards: Afterwards::Leave,
                },
                None => CoordinatorMessage::Finish,
            };
            self.send(*incarnation, message, actions);
        }
        for incarnation in leaving.into_keys() {
            self.finished(incarnation, actions);
        }
        if self.members.is_empty() {
            self.leave(actions);
        }
    }

    /// Spares of a job that ends may serve another.
    fn release_spares(&mut self, reason: &str, actions: &mut Vec<Action>) {
        let spares: Vec<Incarnation> = self.spares.drain().collect();
        for incarnation in spares {
            self.stop(incarnation, reason.to_owned(), actions);
        }
    }

    pub(super) fn finished(&mut self, incarnation: Incarnation, actions: &mut Vec<Action>) {
        let rank = self.members.get(&incarnation).and_then(|it| it.rank);
        let Phase::Finishing { gone, .. } = &mut self.phase else {
            return;
        };
        gone.extend(rank);
        self.members.touch(incarnation);
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
        now_ms: u64,
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
        // What another try may mend is the loss of one worker; what fails anywhere would fail everywhere.
        if cause == Cause::Temporary {
            return self.lost(now_ms, incarnation, reason, actions);
        }
        self.fail(cause, text, Some(incarnation), actions);
    }

    /// A member whose connection closed or that fell silent. Before the generation is formed its place is free again;
    /// when all is durable it harms nothing; in between the job goes on without it.
    pub(super) fn lost(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        how: &str,
        actions: &mut Vec<Action>,
    ) {
        if self.outcome().is_some() {
            return;
        }
        if self.spares.contains_key(&incarnation) {
            let text = format!("{}, a spare, was lost: {how}", self.name(incarnation));
            actions.push(note("lost", text));
            self.spares.remove(&incarnation);
            return;
        }
        if !self.members.contains_key(&incarnation) {
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
                self.put_out(incarnation, &text, actions);
                if let Some(times) = self.fails_again(how) {
                    let reason = format!(
                        "{text}; step {} lost a worker {times} times in a row for this reason: look into the workers' logs",
                        self.committed.next()
                    );
                    return self.fail(Cause::Temporary, reason, None, actions);
                }
                self.regroup(now_ms, text, actions);
            }
        }
    }

    /// How often in a row the present step lost a worker for this reason, generation after generation, if that is too often: it will
    /// not mend itself.
    pub(super) fn fails_again(&mut self, how: &str) -> Option<u32> {
        let generation = self.generation;
        let times = match self.failing.take() {
            Some(it) if it.reason == how && it.generation == generation => it.times,
            Some(it) if it.reason == how => it.times + 1,
            _ => 1,
        };
        self.failing = Some(Failing {
            reason: how.to_owned(),
            times,
            generation,
        });
        let most = self.elastic().failures_max;
        (times >= most).then_some(times)
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
        self.release_spares("the job ended", actions);
        actions.push(note("done", outcome.to_string()));
        self.phase = Phase::Done(outcome.clone());
        actions.push(Action::Done(outcome));
    }
}
