//! Every deadline of a job in one table, and what happens when one passes (invariant M5).

use super::phase::Phase;
use super::{Action, Job, note};
use crate::{Cause, Incarnation};

/// What must happen before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Deadline {
    /// A member says something.
    Heartbeat(Incarnation),
    /// The world is full.
    Join,
    /// Some member moves on.
    Form,
    /// All members have prepared the step; the last one's evaluation is recorded.
    Step,
    /// The last checkpoint is visible.
    Save,
    /// All members have left.
    Finish,
}

impl Job {
    /// When each deadline passes. Empty once the job is done.
    pub(super) fn deadlines(&self) -> Vec<(u64, Deadline)> {
        let policy = &self.spec.policy;
        let of_phase = match &self.phase {
            Phase::Gathering { since_ms } => (since_ms + policy.join_timeout_ms, Deadline::Join),
            Phase::Forming { progressed_ms, .. } => {
                (progressed_ms + policy.form_timeout_ms, Deadline::Form)
            }
            Phase::Stepping { since_ms, .. } => (since_ms + policy.step_timeout_ms, Deadline::Step),
            // The last evaluation still runs, and a step's time allows for one.
            Phase::Draining { since_ms, .. } if self.evaluating.is_some() => {
                (since_ms + policy.step_timeout_ms, Deadline::Step)
            }
            Phase::Draining { since_ms, .. } => (since_ms + policy.save_timeout_ms, Deadline::Save),
            Phase::Finishing { since_ms, .. } => {
                (since_ms + policy.step_timeout_ms, Deadline::Finish)
            }
            Phase::Done(_) => return Vec::new(),
        };
        let mut table = vec![of_phase];
        for (incarnation, member) in &self.members {
            let gone = match &self.phase {
                Phase::Finishing { gone, .. } => member.rank.is_some_and(|it| gone.contains(&it)),
                _ => false,
            };
            if !gone {
                let at_ms = member.last_heard_ms + policy.heartbeat_timeout_ms;
                table.push((at_ms, Deadline::Heartbeat(*incarnation)));
            }
        }
        table
    }

    /// Acts on what has passed, the earliest first; silence explains more than the phase it stalls.
    pub(super) fn tick(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        loop {
            let passed = self
                .deadlines()
                .into_iter()
                .filter(|(at_ms, _)| *at_ms <= now_ms);
            let Some((_, deadline)) = passed.min() else {
                return;
            };
            self.passed(now_ms, deadline, actions);
        }
    }

    /// Each arm removes its deadline from the table, or ends the job.
    fn passed(&mut self, now_ms: u64, deadline: Deadline, actions: &mut Vec<Action>) {
        let policy = &self.spec.policy;
        let waiting = self.waiting();
        let reason = match deadline {
            Deadline::Heartbeat(incarnation) => {
                let heard_ms = self
                    .members
                    .get(&incarnation)
                    .map_or(now_ms, |it| it.last_heard_ms);
                let how = format!("silent for {}", seconds(now_ms - heard_ms));
                return self.lost(incarnation, &how, actions);
            }
            Deadline::Finish => {
                let text = format!("{waiting} for {}", seconds(policy.step_timeout_ms));
                actions.push(note("lost", text));
                return self.leave(actions);
            }
            Deadline::Join => format!(
                "{waiting} for {}; start the missing workers, or raise the join timeout",
                seconds(policy.join_timeout_ms)
            ),
            Deadline::Form => {
                let doing: Vec<_> = self
                    .late()
                    .into_iter()
                    .filter_map(|rank| self.incarnation_of(rank))
                    .map(|it| format!("{}: {}", self.name(it), self.doing(it)))
                    .collect();
                format!(
                    "{waiting}, no progress for {} ({}); raise the form timeout if that is too short",
                    seconds(policy.form_timeout_ms),
                    doing.join("; ")
                )
            }
            Deadline::Step => format!(
                "{waiting} for {}; raise the step timeout if that is too short",
                seconds(policy.step_timeout_ms)
            ),
            Deadline::Save => format!(
                "{waiting} for {}; raise the save timeout if that is too short",
                seconds(policy.save_timeout_ms)
            ),
        };
        actions.push(note("lost", reason.clone()));
        self.fail(Cause::Temporary, reason, None, actions);
    }
}

fn seconds(ms: u64) -> String {
    format!("{} s", ms as f64 / 1000.0)
}
