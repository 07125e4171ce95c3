//! Every deadline of a job in one table, and what happens when one passes (invariant M5).

use std::collections::{BTreeMap, BTreeSet};
use std::mem::Discriminant;

use super::phase::Phase;
use super::roster::Touched;
use super::{Action, Job, note};
use crate::ids::listed;
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
    /// A spare says what it holds.
    Answer(Incarnation),
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
    /// The last checkpoint, which failed, may be tried again.
    SaveAgain,
    /// All members have left.
    Finish,
    /// A step is committed.
    Job,
}

/// The deadlines of single workers in their order: with thousands of workers, most events move those of one. Those that the
/// whole job has are few and are not kept.
#[derive(Default)]
pub(super) struct Table {
    order: BTreeSet<(u64, Deadline)>,
    /// The same by worker.
    of: BTreeMap<Incarnation, Own>,
    /// What they were computed by, besides the worker itself.
    common: Common,
}

/// A worker's own deadlines.
type Own = [Option<(u64, Deadline)>; 4];

/// What the deadlines of all workers depend on.
#[derive(Clone, Copy, Default, PartialEq)]
struct Common {
    phase: Option<Discriminant<Phase>>,
    /// When the step began.
    since_ms: Option<u64>,
    hang_ms: Option<u64>,
}

impl Table {
    fn set(&mut self, incarnation: Incarnation, own: Own) {
        let before = if own == Own::default() {
            self.of.remove(&incarnation)
        } else {
            self.of.insert(incarnation, own)
        };
        for deadline in before.into_iter().flatten().flatten() {
            self.order.remove(&deadline);
        }
        self.order.extend(own.into_iter().flatten());
    }
}

impl Job {
    /// The next deadline; `None` once the job is done.
    pub(super) fn first_deadline(&self) -> Option<(u64, Deadline)> {
        let own = self.table.order.first().copied();
        own.into_iter().chain(self.common_deadlines()).min()
    }

    /// Brings the table up to date: to be called when an event, or a deadline, has been dealt with.
    pub(super) fn refresh(&mut self) {
        let common = Common {
            phase: Some(std::mem::discriminant(&self.phase)),
            since_ms: match &self.phase {
                Phase::Stepping { since_ms, .. } => Some(*since_ms),
                _ => None,
            },
            hang_ms: self.hang_ms(),
        };
        let touched = [self.members.take_touched(), self.spares.take_touched()];
        let mut some = Vec::new();
        for touched in touched {
            match touched {
                Touched::Some(touched) if common == self.table.common => some.extend(touched),
                _ => {
                    self.table = self.compute_table(common);
                    return;
                }
            }
        }
        for incarnation in some {
            self.table.set(incarnation, self.own_deadlines(incarnation));
        }
    }

    fn compute_table(&self, common: Common) -> Table {
        let workers = self.members.keys().chain(self.spares.keys());
        let own = workers.map(|it| (*it, self.own_deadlines(*it)));
        let of: BTreeMap<Incarnation, Own> = own.filter(|(_, it)| *it != Own::default()).collect();
        Table {
            order: of.values().copied().flatten().flatten().collect(),
            of,
            common,
        }
    }

    /// Whether the table of workers' deadlines is what it would be if it were computed anew. For tests.
    #[doc(hidden)]
    pub fn deadlines_agree(&self) -> bool {
        // Without making it, which a test asks for after every event.
        let workers = || self.members.keys().chain(self.spares.keys());
        let (mut some, mut all) = (0, 0);
        let agree = workers().all(|it| {
            let own = self.own_deadlines(*it);
            let deadlines = || own.iter().flatten();
            some += usize::from(own != Own::default());
            all += deadlines().count();
            self.table.of.get(it).copied().unwrap_or_default() == own
                && deadlines().all(|it| self.table.order.contains(it))
        });
        agree && self.table.of.len() == some && self.table.order.len() == all
    }

    /// When a worker's own deadlines pass; none once the job is done.
    fn own_deadlines(&self, incarnation: Incarnation) -> Own {
        let finishing = match &self.phase {
            Phase::Done(_) => return Own::default(),
            Phase::Finishing { gone, .. } => Some(gone),
            _ => None,
        };
        let member = self.members.get(&incarnation);
        let Some(worker) = member.or_else(|| self.spares.get(&incarnation)) else {
            return Own::default();
        };
        let timeout_ms = self.spec.policy.heartbeat_timeout_ms;
        let gone = finishing.is_some_and(|gone| worker.rank.is_some_and(|it| gone.contains(&it)));
        let silent_ms = (!gone).then_some(worker.pulse.last_heard_ms() + timeout_ms);
        let watched = finishing.is_none();
        let late_ms = (watched && !worker.late).then(|| worker.pulse.late_at_ms(timeout_ms));
        let hangs_ms = self.hangs_at(incarnation).filter(|_| watched);
        let asked = watched && member.is_none() && worker.held.is_none();
        let answers_ms = asked.then(|| worker.asked_ms + self.spec.policy.answer_timeout_ms());
        [
            silent_ms.map(|at_ms| (at_ms, Deadline::Heartbeat(incarnation))),
            late_ms.map(|at_ms| (at_ms, Deadline::Late(incarnation))),
            hangs_ms.map(|at_ms| (at_ms, Deadline::Hang(incarnation))),
            answers_ms.map(|at_ms| (at_ms, Deadline::Answer(incarnation))),
        ]
    }

    /// When the deadlines pass that the whole job has; none once it is done.
    fn common_deadlines(&self) -> impl Iterator<Item = (u64, Deadline)> {
        let phase = (!matches!(self.phase, Phase::Done(_))).then(|| self.phase_deadline());
        let elastic = self.elastic();
        let job = match self.phase {
            Phase::Gathering {
                since_ms,
                grace_over: false,
            } => Some((since_ms + elastic.abort_timeout_ms, Deadline::Grace)),
            Phase::Gathering { .. } | Phase::Finishing { .. } | Phase::Done(_) => None,
            _ => Some((self.moved_ms + elastic.job_timeout_ms, Deadline::Job)),
        };
        phase.into_iter().chain(job)
    }

    fn phase_deadline(&self) -> (u64, Deadline) {
        let policy = &self.spec.policy;
        match &self.phase {
            Phase::Gathering { since_ms, .. } => {
                (since_ms + policy.join_timeout_ms, Deadline::Join)
            }
            Phase::Regrouping { since_ms, .. } => {
                let abort_ms = self.elastic().abort_timeout_ms;
                if self.members.values().any(|it| it.held.is_none()) {
                    (since_ms + abort_ms, Deadline::Abort)
                } else if let Some(again_ms) = self.save_again_ms {
                    (again_ms, Deadline::SaveAgain)
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

    /// Acts on what has passed, the earliest first; silence explains more than the phase it stalls.
    pub(super) fn tick(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        while let Some((at_ms, deadline)) = self.first_deadline()
            && at_ms <= now_ms
        {
            self.passed(now_ms, deadline, actions);
            self.refresh();
        }
    }

    /// Each arm removes its deadline from the table, or ends the job.
    fn passed(&mut self, now_ms: u64, deadline: Deadline, actions: &mut Vec<Action>) {
        let policy = &self.spec.policy;
        let waiting = || self.waiting();
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
            Deadline::Answer(incarnation) => return self.is_stuck(incarnation, actions),
            Deadline::Abort => return self.leave_behind(now_ms, actions),
            Deadline::SaveAgain => return self.reform(now_ms, actions),
            Deadline::Grace => {
                if let Phase::Gathering { grace_over, .. } = &mut self.phase {
                    *grace_over = true;
                }
                return self.gather(now_ms, actions);
            }
            Deadline::Finish => {
                let text = format!("{} for {}", waiting(), seconds(policy.step_timeout_ms));
                actions.push(note("lost", text));
                return self.leave(actions);
            }
            Deadline::Join => {
                let gathers = matches!(self.phase, Phase::Gathering { .. });
                let reason = format!(
                    "{} for {}; start the missing workers, or raise the join timeout",
                    waiting(),
                    seconds(policy.join_timeout_ms)
                );
                if gathers && self.form_first(now_ms, actions) {
                    return;
                }
                reason
            }
            Deadline::Form => {
                let late: Vec<Incarnation> = self.late_members().collect();
                let doing = late
                    .iter()
                    .map(|it| format!("{}: {}", self.name(*it), self.doing(*it)));
                format!(
                    "{}, no progress for {} ({}); raise the form timeout if that is too short",
                    waiting(),
                    seconds(policy.form_timeout_ms),
                    listed(doing, "; ")
                )
            }
            Deadline::Step => format!(
                "{} for {}; raise the step timeout if that is too short",
                waiting(),
                seconds(policy.step_timeout_ms)
            ),
            Deadline::Save => format!(
                "{} for {}; raise the save timeout if that is too short",
                waiting(),
                seconds(policy.save_timeout_ms)
            ),
            Deadline::Job => {
                let job_ms = self.elastic().job_timeout_ms;
                format!(
                    "{}, no step was committed for {}; look into the workers' logs, or raise the job timeout",
                    waiting(),
                    seconds(job_ms)
                )
            }
        };
        if self.outlives(deadline) {
            // Who is held up by a peer in a collective is not to blame.
            let innocent = |it: &super::Member| it.activity.0.work == Work::Exchanges;
            return self.put_out_late(now_ms, reason, innocent, actions);
        }
        actions.push(note("lost", reason.clone()));
        self.fail(Cause::Temporary, reason, None, actions);
    }

    /// Whether the job goes on with those who are not late for `deadline`.
    fn outlives(&self, deadline: Deadline) -> bool {
        match deadline {
            Deadline::Form | Deadline::Step => true,
            // What only the disk holds up, another generation would not mend.
            Deadline::Save => !self.members_may_go() && self.late_members().next().is_some(),
            _ => false,
        }
    }

    /// Who has not left its generation by now is left behind.
    fn leave_behind(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let stays = |it: &super::Member| it.held.is_none();
        let stays = self.members.iter().filter(|(_, it)| stays(it));
        let stays: Vec<Incarnation> = stays.map(|(it, _)| *it).collect();
        for incarnation in stays {
            let abort_ms = self.elastic().abort_timeout_ms;
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
