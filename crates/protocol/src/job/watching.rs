//! Watching members at work: who hangs, who is slow, who is late. A hang is put out, the others are only told.

use std::collections::BTreeMap;

use super::phase::{Phase, Vote};
use super::{Action, Job, note};
use crate::{Afterwards, Incarnation, Liveness, Rank, Work};

/// Steps before their time is known.
const STEPS_TO_LEARN: u32 = 3;

/// Slow steps in a row that are worth a word.
const SLOW_STEPS: u32 = 10;

/// How long steps take: a mean that follows changes, with a gain of 1/8.
#[derive(Default)]
pub(super) struct Pace {
    /// Whether a generation began to train in this life.
    begun: bool,
    mean_ms: f64,
    steps: u32,
}

impl Pace {
    pub(super) fn begin(&mut self) {
        self.begun = true;
    }

    pub(super) fn begun(&self) -> bool {
        self.begun
    }

    pub(super) fn step(&mut self, took_ms: u64) {
        let took_ms = took_ms as f64;
        self.steps = self.steps.saturating_add(1);
        let gain = 1.0 / f64::from(self.steps.min(8));
        self.mean_ms += (took_ms - self.mean_ms) * gain;
    }

    /// The mean, once it means something.
    fn learned_ms(&self) -> Option<f64> {
        (self.steps >= STEPS_TO_LEARN).then_some(self.mean_ms)
    }
}

impl Job {
    /// How each worker fares at `now_ms`.
    pub fn liveness(&self, now_ms: u64) -> Vec<(Incarnation, Liveness)> {
        let timeout_ms = self.spec.policy.heartbeat_timeout_ms;
        let all = self.members.iter().chain(self.spares.iter());
        let liveness = all.map(|(it, worker)| (*it, worker.pulse.liveness(now_ms, timeout_ms)));
        liveness.collect()
    }

    /// How long a member's own work may stand still. At least as long as a silence, so that a pause is one or the other;
    /// the step's deadline still holds.
    pub(super) fn hang_ms(&self) -> Option<u64> {
        let usual_ms = self.pace.learned_ms()?;
        let hang_ms = (self.elastic().hang_factor * usual_ms) as u64;
        Some(hang_ms.max(self.spec.policy.heartbeat_timeout_ms))
    }

    /// When a member counts as hanging unless it moves. Who waits, for peers or for the coordinator, is not at fault, and who
    /// does not tell is judged by the step's deadline alone.
    pub(super) fn hangs_at(&self, incarnation: Incarnation) -> Option<u64> {
        let Phase::Stepping { prepared, since_ms } = &self.phase else {
            return None;
        };
        let member = self.members.get(&incarnation)?;
        let (activity, moved_ms) = &member.activity;
        let voted = member.rank.is_none_or(|rank| prepared.contains_key(&rank));
        if voted || activity.work != Work::Computes {
            return None;
        }
        Some((*moved_ms).max(*since_ms) + self.hang_ms()?)
    }

    /// It beats and does not move.
    pub(super) fn hung(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        actions: &mut Vec<Action>,
    ) {
        let Some(member) = self.members.get(&incarnation) else {
            return;
        };
        let stood = now_ms.saturating_sub(member.activity.1);
        let reason = format!(
            "{} hangs: its heartbeats come, and step {} has not moved for {} s",
            self.name(incarnation),
            self.committed.next(),
            stood as f64 / 1000.0
        );
        self.put_out(incarnation, &reason, actions);
        self.regroup(now_ms, reason, actions);
    }

    /// A spare beats, and has not said what it holds: its training thread hears nothing any more, and another process may take
    /// its place.
    pub(super) fn is_stuck(&mut self, incarnation: Incarnation, actions: &mut Vec<Action>) {
        let reason = format!(
            "{} is stuck: its heartbeats come, and it has not said for {} s what it holds; its process is to be started again",
            self.name(incarnation),
            self.spec.policy.answer_timeout_ms() as f64 / 1000.0
        );
        actions.push(note("lost", reason.clone()));
        self.dismiss(incarnation, reason, Afterwards::Restart, actions);
    }

    /// Notes that a worker is late, once until it is heard again.
    pub(super) fn is_late(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        actions: &mut Vec<Action>,
    ) {
        let name = self.name(incarnation);
        let worker = self.members.get_mut(&incarnation);
        let Some(worker) = worker.or_else(|| self.spares.get_mut(&incarnation)) else {
            return;
        };
        worker.late = true;
        let silent_ms = now_ms.saturating_sub(worker.pulse.last_heard_ms());
        let text = format!(
            "{name} is late: silent for {} s, it counts as lost after {} s",
            silent_ms as f64 / 1000.0,
            self.spec.policy.heartbeat_timeout_ms as f64 / 1000.0
        );
        actions.push(note("late", text));
    }

    /// Reports who computes for longer than its peers, by the times of a step that all have voted on. Time spent waiting says
    /// nothing: everybody waits for the slowest.
    pub(super) fn note_slow(&mut self, votes: &BTreeMap<Rank, Vote>, actions: &mut Vec<Action>) {
        let factor = self.elastic().slow_factor;
        let busy = |vote: &Vote| {
            let it = &vote.phases;
            it.data + it.forward + it.head + it.backward
        };
        let mut times: Vec<f64> = votes.values().map(busy).collect();
        times.sort_by(f64::total_cmp);
        let ranked = self.members.iter();
        let ranked = ranked.filter_map(|(it, member)| Some((member.rank?, *it)));
        for (rank, incarnation) in ranked.collect::<Vec<_>>() {
            let Some(vote) = votes.get(&rank) else {
                continue;
            };
            let own = busy(vote);
            let Some(median) = median_of_peers(&times, own) else {
                continue;
            };
            let Some(member) = self.members.get_mut(&incarnation) else {
                continue;
            };
            if median <= 0.0 || own < factor * median {
                member.slow = 0;
                continue;
            }
            member.slow = member.slow.saturating_add(1);
            if member.slow == SLOW_STEPS {
                let name = self.name(incarnation);
                let text = format!(
                    "{name} is slow: it computes {:.1} times as long as the median of its peers ({own:.3} s against \
                     {median:.3} s), {SLOW_STEPS} steps in a row; all wait for it",
                    own / median
                );
                actions.push(note("slow", text));
            }
        }
    }
}

/// The upper median of all `times`, which are sorted, but one that is `own`; `None` where there is no other.
fn median_of_peers(times: &[f64], own: f64) -> Option<f64> {
    let middle = (times.len() - 1) / 2;
    let at = times.partition_point(|it| it.total_cmp(&own).is_lt());
    times
        .get(if at <= middle { middle + 1 } else { middle })
        .copied()
}

#[cfg(test)]
mod tests {
    use super::median_of_peers;

    #[test]
    fn the_median_of_peers_is_that_of_all_others() {
        let times = [0.5, 1.0, 1.0, 1.0, 2.0, 3.0, f64::NAN];
        for world in 1..=times.len() {
            for own in 0..world {
                let mut peers = times[..world].to_vec();
                peers.remove(own);
                let slowly = peers.get(peers.len() / 2).map(|it| it.to_bits());
                let quickly = median_of_peers(&times[..world], times[own]);
                assert_eq!(quickly.map(f64::to_bits), slowly, "{own} of {world}");
            }
        }
    }
}
