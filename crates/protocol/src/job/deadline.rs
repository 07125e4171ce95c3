//! Every deadline of a job in one table, and what happens when one passes (invariant M5).

use super::phase::Phase;
use super::{Action, Job, note};
use crate::{Cause, Incarnation, Work};

/// What must happen before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Deadline {
    /// A worker says something.
    Heartbeat(Incarnation),
    /// A worker says something as soon as it used to.
    Late(Incarnation),
    /// A member's work moves on.
    Hang(Incarnation),
    /// Members leave their generation.
    Abort,
    /// Whoever outlived the coordinator is back.
    Grace,
    /// The world is full; too few are enough.
    Join,
    /// Some member moves on.
    Form,
    /// All members have prepared the step; the last one's evaluation is recorded.
    Step,
    /// The last checkpoint is visible.
    Save,
    /// All members have left.
    Finish,
    /// A step is committed.
    Job,
}

impl Job {
    /// When each deadline passes. Empty once the job is done.
    pub(super) fn deadlines(&self) -> Vec<(u64, Deadline)> {
        if self.outcome().is_some() {
            return Vec::new();
        }
        let mut table = vec![self.phase_deadline()];
        let timeout_ms = self.spec.policy.heartbeat_timeout_ms;
        for (incarnation, member) in &self.members {
            let gone = match &self.phase {
                Phase::Finishing { gone, .. } => member.rank.is_some_and(|it| gone.contains(&it)),
                _ => false,
            };
            if !gone {
                let at_ms = member.pulse.last_heard_ms() + timeout_ms;
                table.push((at_ms, Deadline::Heartbeat(*incarnation)));
            }
        }
        self.elastic_deadlines(&mut table);
        table
    }

    fn phase_deadline(&self) -> (u64, Deadline) {
        let policy = &self.spec.policy;
        match &self.phase {
            Phase::Gathering { since_ms, .. } => {
                (since_ms + policy.join_timeout_ms, Deadline::Join)
            }
            Phase::Regrouping { since_ms, .. } => {
                let abort_ms = self.elastic().map_or(0, |it| it.abort_timeout_ms);
                if self.members.values().any(|it| it.held.is_none()) {
                    (since_ms + abort_ms, Deadline::Abort)
                } else if self.awaits_publication() {
                    (since_ms + policy.save_timeout_ms, Deadline::Save)
                } else {
                    (since_ms + policy.join_timeout_ms, Deadline::Join)
                }
            }
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
            Phase::Done(_) => unreachable!("a job that is done has no deadlines"),
        }
    }

    fn elastic_deadlines(&self, table: &mut Vec<(u64, Deadline)>) {
        let Some(elastic) = self.elastic() else {
            return;
        };
        let timeout_ms = self.spec.policy.heartbeat_timeout_ms;
        for (incarnation, spare) in &self.spares {
            let at_ms = spare.pulse.last_heard_ms() + timeout_ms;
            table.push((at_ms, Deadline::Heartbeat(*incarnation)));
        }
        if matches!(self.phase, Phase::Finishing { .. }) {
            return;
        }
        for (incarnation, worker) in self.members.iter().chain(&self.spares) {
            if !worker.late {
                let at_ms = worker.pulse.late_at_ms(timeout_ms);
                table.push((at_ms, Deadline::Late(*incarnation)));
            }
            if let Some(at_ms) = self.hangs_at(*incarnation) {
                table.push((at_ms, Deadline::Hang(*incarnation)));
            }
        }
        match self.phase {
            Phase::Gathering {
                since_ms,
                grace_over: false,
            } => table.push((since_ms + elastic.abort_timeout_ms, Deadline::Grace)),
            Phase::Gathering { .. } => {}
            _ => table.push((self.moved_ms + elastic.job_timeout_ms, Deadline::Job)),
        }
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
        let elastic = policy.elastic.is_some();
        let waiting = self.waiting();
        let reason = match deadline {
            Deadline::Heartbeat(incarnation) => {
                let worker = self.members.get(&incarnation);
                let worker = worker.or_else(|| self.spares.get(&incarnation));
                let heard_ms = worker.map_or(now_ms, |it| it.pulse.last_heard_ms());
                let how = format!("silent for {}", seconds(now_ms - heard_ms));
                return self.lost(now_ms, incarnation, &how, actions);
            }
            Deadline::Late(incarnation) => return self.is_late(now_ms, incarnation, actions),
            Deadline::Hang(incarnation) => return self.hung(now_ms, incarnation, actions),
            Deadline::Abort => return self.leave_behind(now_ms, actions),
            Deadline::Grace => {
                if let Phase::Gathering { grace_over, .. } = &mut self.phase {
                    *grace_over = true;
                }
                return self.gather(now_ms, actions);
            }
            Deadline::Finish => {
                let text = format!("{waiting} for {}", seconds(policy.step_timeout_ms));
                actions.push(note("lost", text));
                return self.leave(actions);
            }
            Deadline::Join => {
                let gathers = matches!(self.phase, Phase::Gathering { .. });
                let reason = format!(
                    "{waiting} for {}; start the missing workers, or raise the join timeout",
                    seconds(policy.join_timeout_ms)
                );
                if elastic && gathers && self.form_first(now_ms, actions) {
                    return;
                }
                reason
            }
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
            Deadline::Job => {
                let job_ms = self.elastic().map_or(0, |it| it.job_timeout_ms);
                format!(
                    "{waiting}, no step was committed for {}; look into the workers' logs, or raise the job timeout",
                    seconds(job_ms)
                )
            }
        };
        if elastic && self.outlives(deadline) {
            // Who is held up by a peer in a collective is not to blame.
            let innocent = |it: &super::Member| it.activity.0.work == Work::Exchanges;
            return self.put_out_late(now_ms, reason, innocent, actions);
        }
        actions.push(note("lost", reason.clone()));
        self.fail(Cause::Temporary, reason, None, actions);
    }

    /// Whether an elastic job goes on with those who are not late for `deadline`.
    fn outlives(&self, deadline: Deadline) -> bool {
        match deadline {
            Deadline::Form | Deadline::Step => true,
            // What only the disk holds up, another generation would not mend.
            Deadline::Save => !self.members_may_go() && !self.late().is_empty(),
            _ => false,
        }
    }

    /// Who has not left its generation by now is left behind.
    fn leave_behind(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let stays = |it: &super::Member| it.held.is_none();
        let stays = self.members.iter().filter(|(_, it)| stays(it));
        let stays: Vec<Incarnation> = stays.map(|(it, _)| *it).collect();
        for incarnation in stays {
            let abort_ms = self.elastic().map_or(0, |it| it.abort_timeout_ms);
            let why = format!(
                "{} did not leave generation {} within {}",
                self.name(incarnation),
                self.generation,
                seconds(abort_ms)
            );
            self.put_out(incarnation, &why, actions);
        }
        self.reform(now_ms, actions);
    }
}

fn seconds(ms: u64) -> String {
    format!("{} s", ms as f64 / 1000.0)
}
