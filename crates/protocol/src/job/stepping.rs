//! Stepping: votes on a step become its commit, which is journaled before anybody hears of it.

use std::collections::BTreeMap;

use super::phase::{Phase, Vote};
use super::{Action, Job, note};
use crate::{
    Cause, CommitRecord, CoordinatorMessage, GpuFigures, Incarnation, MetricsRow, Outcome, Phases,
    Record, Step, StepReport,
};

impl Job {
    /// A vote. When all members have voted with the same bits, the step commits. Their phases are not compared.
    pub(super) fn prepared(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        vote: Vote,
        actions: &mut Vec<Action>,
    ) {
        let step = Step(vote.report.step);
        let rank = self.members.get(&incarnation).and_then(|it| it.rank);
        let Some(rank) = rank else { return };
        if step == self.committed {
            return self.repeat_verdict(incarnation, actions);
        }
        if step < self.committed {
            let committed = self.committed;
            return self.send(
                incarnation,
                CoordinatorMessage::Stale { committed },
                actions,
            );
        }
        if let Phase::Regrouping { reason, .. } = &self.phase {
            let reason = reason.clone();
            return self.send(incarnation, CoordinatorMessage::Abort { reason }, actions);
        }
        let Phase::Stepping { prepared, .. } = &mut self.phase else {
            let reason = format!(
                "{} prepared step {step}, which nobody asked for; the last commit is {}",
                self.name(incarnation),
                self.committed
            );
            return self.fail(Cause::Fatal, reason, None, actions);
        };
        if step != self.committed.next() {
            let reason = format!(
                "{} prepared step {step}, but the last commit is {}",
                self.name(incarnation),
                self.committed
            );
            return self.fail(Cause::Fatal, reason, None, actions);
        }
        // A vote may be repeated, by its rank or another, but never with other bits: the first stands for all.
        let difference = prepared.first_key_value().and_then(|(other, theirs)| {
            let difference = vote.report.first_difference(&theirs.report)?;
            Some((*other, difference))
        });
        if let Some((other, (field, here, there))) = difference {
            let reason = format!(
                "rank {rank} prepared step {step} with {field} {here}, rank {other} with {there}: \
                 reduced values must have the same bits on all ranks; the step was not committed"
            );
            return self.fail(Cause::Fatal, reason, None, actions);
        }
        prepared.insert(rank, vote);
        self.commit_when_ready(now_ms, actions);
    }

    /// Commits the step once all members have voted on it and the evaluation before it is recorded: what that evaluation
    /// decides holds for this step, however late its word came.
    pub(super) fn commit_when_ready(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let Phase::Stepping { prepared, .. } = &self.phase else {
            return;
        };
        let report = prepared.values().next().map(|vote| vote.report);
        if let Some(report) = report
            && prepared.len() == self.members.len()
            && self.evaluating.is_none()
        {
            let phases = Phases::mean(prepared.values().map(|vote| &vote.phases));
            let gpu: Vec<GpuFigures> = prepared.values().map(|vote| vote.gpu).collect();
            let gpu = GpuFigures::of(&gpu);
            self.commit(now_ms, report, (phases, gpu), actions);
        }
    }

    fn commit(
        &mut self,
        now_ms: u64,
        report: StepReport,
        (phases, gpu): (Phases, GpuFigures),
        actions: &mut Vec<Action>,
    ) {
        let Phase::Stepping { since_ms, prepared } = &mut self.phase else {
            return;
        };
        let votes = std::mem::take(prepared);
        self.pace.step(now_ms.saturating_sub(*since_ms));
        let seconds = now_ms.saturating_sub(*since_ms) as f64 / 1000.0;
        let step = Step(report.step);
        let apply = report.finite;
        self.skipped = if apply { 0 } else { self.skipped + 1 };
        let last = self.last_outcome(step, self.stop.is_some());
        // An interruption adds no evaluation, so that the resumed run has the rows of an uninterrupted one.
        let evaluate = self.evaluates_after(step);
        let save = self.saves_after(step, last.is_some());
        let verdict = CoordinatorMessage::Commit {
            step,
            apply,
            save,
            evaluate,
            last: last.is_some(),
        };
        let row = MetricsRow {
            report,
            // A step within one tick of the clock has no rate; a metric must be a number.
            tokens_per_second: if seconds > 0.0 {
                report.tokens as f64 / seconds
            } else {
                0.0
            },
            world_size: self.members.len() as u32,
            generation: self.generation.0,
            seconds,
            phases,
            gpu,
        };
        // This record is the commit: from here on all roll forward (invariants M2, M4).
        actions.push(Action::Journal(Record::Commit(CommitRecord { apply, row })));
        self.committed = step;
        self.highest = self.highest.max(step);
        (self.apply, self.since) = (apply, self.generation);
        self.moved_ms = now_ms;
        self.strikes.clear();
        self.failing = None;
        self.ending.clone_from(&last);
        // Where others are to compute the next step, its Form brings the verdict, and its Go what is to be done before.
        let regroups = last.is_none() && self.changes_members();
        self.said = None;
        if !regroups {
            self.send_all(&verdict, actions);
            self.said = Some(verdict);
        }
        for member in self.members.values_mut() {
            member.progress = None;
        }
        actions.push(Action::RecordStep(row));
        self.note_slow(&votes, actions);
        if !apply {
            let text = format!(
                "step {step} had a gradient that is not finite and was skipped ({} in a row, the job stops at {})",
                self.skipped, self.spec.policy.skipped_steps_max
            );
            actions.push(note("skip", text));
        }
        if evaluate {
            self.await_evaluation(step);
        }
        if regroups {
            self.phase = Phase::Regrouping {
                reason: "members change".into(),
                since_ms: now_ms,
            };
            return self.reform(now_ms, actions);
        }
        if save {
            self.begin_save();
        }
        self.phase = match last {
            Some(outcome) => {
                if let Some(reason) = &self.stop {
                    actions.push(note("stop", format!("step {step} is the last: {reason}")));
                }
                Phase::Draining {
                    step,
                    outcome,
                    since_ms: now_ms,
                }
            }
            None => Phase::Stepping {
                prepared: BTreeMap::new(),
                since_ms: now_ms,
            },
        };
    }

    /// How the job ends with this commit, if it does.
    fn last_outcome(&self, step: Step, stop: bool) -> Option<Outcome> {
        if !self.spec.policy.skips_allowed(self.skipped) {
            return Some(Outcome::Failed {
                cause: Cause::Fatal,
                reason: format!(
                    "{} steps in a row up to step {step} (train.skipped_steps_max) had gradients that are not finite; the \
                     workers' logs name the pairs. A run's settings stay as they are: begin another one, with another \
                     job.output, and a lower optimizer.learning_rate or without broken rows",
                    self.skipped
                ),
            });
        }
        if self.is_final(step) || self.early_stop.is_some() {
            return Some(Outcome::Completed);
        }
        stop.then_some(Outcome::Interrupted { committed: step })
    }

    pub(super) fn is_final(&self, step: Step) -> bool {
        self.facts
            .as_ref()
            .is_some_and(|facts| step.0 >= facts.steps_total)
    }

    pub(super) fn repeat_verdict(&self, incarnation: Incarnation, actions: &mut Vec<Action>) {
        if let Some(verdict @ CoordinatorMessage::Commit { .. }) = &self.said {
            self.send(incarnation, verdict.clone(), actions);
        }
    }
}
