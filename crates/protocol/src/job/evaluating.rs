//! Evaluations: awaited, recorded once, and what they decide.

use super::phase::Phase;
use super::{Action, Job, note};
use crate::{EvaluationRow, Rank, Record, Sample, Step};

impl Job {
    /// Rank 0's evaluation, recorded once a step. The next step's commit and this step's checkpoint wait for it.
    pub(super) fn evaluated(
        &mut self,
        now_ms: u64,
        rank: Rank,
        row: EvaluationRow,
        samples: Vec<Sample>,
        actions: &mut Vec<Action>,
    ) {
        let seen = self
            .evaluations
            .last()
            .is_some_and(|it| row.step <= it.step);
        if rank != Rank(0) || seen || row.step > self.committed.0 {
            return;
        }
        self.evaluations.push(row);
        // The row first: one that is journaled is not asked for again, so it must be in its file.
        actions.push(Action::RecordEvaluation { row, samples });
        let step = Step(row.step);
        self.decide(row, actions);
        if self.evaluating == Some(step) {
            self.evaluating = None;
        }
        if let Phase::Draining {
            step: last,
            since_ms,
            ..
        } = &mut self.phase
            && *last == step
        {
            *since_ms = now_ms;
        }
        self.publish_when_ready(step, actions);
        self.commit_when_ready(now_ms, actions);
    }

    /// Journals the evaluation with the decision that it brings.
    fn decide(&mut self, row: EvaluationRow, actions: &mut Vec<Action>) {
        let last = self.committed.next();
        // With one step left the schedule ends as early as a stop would. A job that is on its way to an interruption decides
        // like any other: the resumed run does not see this evaluation again.
        let open = self.early_stop.is_none() && !self.is_final(last);
        let selection = self.spec.policy.selection.as_ref();
        let stop = selection
            .filter(|_| open)
            .and_then(|selection| selection.early_stop(&self.evaluations));
        let text = stop.as_ref().map(ToString::to_string);
        if stop.is_some() {
            self.early_stop.clone_from(&stop);
        }
        actions.push(Action::Journal(Record::Evaluation { row, stop }));
        if let Some(reason) = text {
            let text = format!("training ends early with step {last}: {reason}");
            actions.push(note("early-stop", text));
        }
    }

    /// An evaluation of `step` was asked for. Without held-out pairs there is none to wait for.
    pub(super) fn await_evaluation(&mut self, step: Step) {
        if self.has_held_out() {
            self.evaluating = Some(step);
        }
    }

    pub(super) fn has_held_out(&self) -> bool {
        self.facts
            .as_ref()
            .is_some_and(|facts| facts.eval_pairs > 0)
    }

    /// Whether the weights that training begins with are evaluated, which is done once.
    pub(super) fn evaluates_first(&self) -> bool {
        self.committed == Step(0) && self.evaluations.is_empty()
    }

    /// Whether the weights after `step` are evaluated.
    pub(super) fn evaluates_after(&self, step: Step) -> bool {
        let stop = self.early_stop.as_ref();
        step > Step(0)
            && (self.spec.policy.evaluates_at(step.0)
                || self.is_final(step)
                || stop.is_some_and(|stop| stop.step < step.0))
    }

    pub(super) fn is_evaluated(&self, step: Step) -> bool {
        let last = self.evaluations.last();
        last.is_some_and(|row| row.step >= step.0)
    }

    /// Whether the last commit is the one after the evaluation that ended training.
    pub(super) fn stopped_early(&self) -> bool {
        let stop = self.early_stop.as_ref();
        stop.is_some_and(|stop| self.committed.0 > stop.step)
    }

    /// Evaluated steps, the best first, where the best one's checkpoint is kept.
    pub(super) fn best_first(&self) -> Vec<Step> {
        let selection = self.spec.policy.selection.as_ref();
        selection
            .filter(|it| it.keep_best)
            .map_or_else(Vec::new, |it| it.ranking(&self.evaluations))
    }
}
