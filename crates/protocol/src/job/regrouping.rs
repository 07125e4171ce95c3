//! Regrouping: a generation is over for its members; who is in the next one, and where it finds the state.
//!
//! Members are told to abort and say what they hold. When all have, or had their time to, the next generation is formed of
//! them and of spares, from the newest cut of which they hold every shard. What was not committed is computed again; what was,
//! they roll forward to (invariant M4). A rewind to the newest checkpoint is the last resort.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::phase::Phase;
use super::{Action, Job, note};
use crate::layout::newest_layout;
use crate::{
    Afterwards, Awaits, Cause, CoordinatorMessage, Generation, Held, Incarnation, Layout, Rank,
    Record, Step, WorkerMessage,
};

impl Job {
    /// The generation ends for its members, and with it the votes on its step. Checkpoints are written on.
    pub(super) fn regroup(&mut self, now_ms: u64, reason: String, actions: &mut Vec<Action>) {
        if self.members_may_go() {
            return;
        }
        if !matches!(self.phase, Phase::Regrouping { .. }) {
            for member in self.members.values_mut() {
                member.held = None;
                member.progress = None;
            }
            let text = format!(
                "generation {} is over after step {}: {reason}",
                self.generation, self.committed
            );
            actions.push(note("abort", text));
            let abort = CoordinatorMessage::Abort {
                reason: reason.clone(),
            };
            self.send_all(&abort, actions);
            self.phase = Phase::Regrouping {
                reason,
                since_ms: now_ms,
            };
        }
        self.reform(now_ms, actions);
    }

    /// A member is out, and may come back as a spare if it lives.
    pub(super) fn put_out(
        &mut self,
        incarnation: Incarnation,
        why: &str,
        actions: &mut Vec<Action>,
    ) {
        actions.push(note("lost", why.to_owned()));
        self.members.remove(&incarnation);
        self.suspected.remove(&incarnation);
        self.strikes.remove(&incarnation);
        let stop = CoordinatorMessage::Stop {
            reason: why.to_owned(),
            afterwards: Afterwards::Return,
        };
        self.send(incarnation, stop, actions);
    }

    /// Puts out those who have not done what the phase waits for, except `innocent` ones, and regroups. Where that would be
    /// everybody, nobody is to blame: the same members try again.
    pub(super) fn put_out_late(
        &mut self,
        now_ms: u64,
        reason: String,
        innocent: impl Fn(&super::Member) -> bool,
        actions: &mut Vec<Action>,
    ) {
        let guilty = self
            .late_members()
            .filter(|it| !innocent(&self.members[it]));
        let guilty: Vec<Incarnation> = guilty.collect();
        if guilty.len() < self.members.len() {
            for incarnation in guilty {
                let name = self.name(incarnation);
                let why = format!(
                    "{name} was left behind ({}): {reason}",
                    self.doing(incarnation)
                );
                self.put_out(incarnation, &why, actions);
            }
        }
        self.regroup(now_ms, reason, actions);
    }

    /// What a worker says that it holds: it is out of the generation it says so in.
    pub(super) fn held(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        generation: Generation,
        (held, workers_min): (Vec<Held>, u32),
        actions: &mut Vec<Action>,
    ) {
        match self.phase {
            Phase::Regrouping { .. } => {
                if let Some(member) = self.members.get_mut(&incarnation) {
                    member.hear_held(generation, held, workers_min);
                }
                self.reform(now_ms, actions);
            }
            Phase::Forming { .. } | Phase::Stepping { .. } | Phase::Draining { .. } => {
                let reason = format!("{} left the generation", self.name(incarnation));
                self.regroup(now_ms, reason, actions);
            }
            Phase::Gathering { .. } | Phase::Finishing { .. } | Phase::Done(_) => {}
        }
    }

    /// A word of a member that gathers, or that has not heard the Form or Abort that holds now.
    pub(super) fn outside(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        generation: Generation,
        message: WorkerMessage,
        actions: &mut Vec<Action>,
    ) {
        let Some(member) = self.members.get_mut(&incarnation) else {
            return;
        };
        let gathering = matches!(self.phase, Phase::Gathering { .. });
        let underway = matches!(
            self.phase,
            Phase::Stepping { .. } | Phase::Draining { .. } | Phase::Finishing { .. }
        );
        if !underway {
            // It takes a member of the generation to be heard in it.
            member.heard(now_ms);
        }
        if gathering {
            // What it said before it was in a later generation is of no use.
            member.held.take_if(|(then, _)| *then < generation);
        }
        match message {
            WorkerMessage::Held { held, workers_min } if gathering => {
                member.hear_held(generation, held, workers_min);
                return self.gather(now_ms, actions);
            }
            WorkerMessage::Leave { reason } => {
                return self.leaves(now_ms, incarnation, reason, actions);
            }
            WorkerMessage::Failed { cause, reason } if !underway => {
                return self.member_failed(now_ms, incarnation, cause, &reason, actions);
            }
            WorkerMessage::Beat { awaits, .. } if gathering => {
                member.pulse.beat(now_ms);
                let known = member.held.is_some();
                let committed = self.committed;
                let answer = match (awaits, known) {
                    (Awaits::Form, true) => CoordinatorMessage::Heard { committed },
                    (Awaits::Form, false) => self.welcome(false),
                    // It still works in a generation that is no more: it is to join.
                    _ => CoordinatorMessage::Stale { committed },
                };
                return self.send(incarnation, answer, actions);
            }
            WorkerMessage::Beat { .. } if !underway => member.pulse.beat(now_ms),
            _ => {}
        }
        let committed = self.committed;
        let truth = match &self.phase {
            Phase::Regrouping { reason, .. } => CoordinatorMessage::Abort {
                reason: reason.clone(),
            },
            Phase::Forming { .. } => self.form_message(incarnation),
            _ => CoordinatorMessage::Stale { committed },
        };
        self.send(incarnation, truth, actions);
    }

    /// Somebody wants a worker to leave, which need not know.
    pub(super) fn drain(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        reason: String,
        actions: &mut Vec<Action>,
    ) {
        if self.spares.contains_key(&incarnation) {
            self.dismiss(incarnation, reason, Afterwards::Leave, actions);
        } else if self.members.contains_key(&incarnation) {
            self.leaves(now_ms, incarnation, reason, actions);
        }
    }

    /// A member asked to leave. Where too few would be left the job saves and stops, as any other job does.
    pub(super) fn leaves(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        reason: String,
        actions: &mut Vec<Action>,
    ) {
        let text = format!("{} leaves: {reason}", self.name(incarnation));
        let others = self.members.iter();
        let others = others.filter(|(it, member)| **it != incarnation && member.leaving.is_none());
        let enough = others.count() + self.spares.len() >= self.fewest();
        let running = matches!(
            self.phase,
            Phase::Regrouping { .. }
                | Phase::Forming { .. }
                | Phase::Stepping { .. }
                | Phase::Draining { .. }
        );
        if !running && enough {
            self.lost(
                now_ms,
                incarnation,
                &format!("it leaves: {reason}"),
                actions,
            );
            let afterwards = Afterwards::Leave;
            let stop = CoordinatorMessage::Stop { reason, afterwards };
            return self.send(incarnation, stop, actions);
        }
        let member = self.members.get_mut(&incarnation);
        let new = member.is_some_and(|it| it.leaving.replace(reason).is_none());
        if !enough {
            self.stop_requested(now_ms, text, actions);
        } else if new {
            self.regroup(now_ms, text, actions);
        }
    }

    /// A collective broke. Who is suspected may be the victim of a bad link: it is put out when it is suspected again, with no
    /// commit in between, or when it does not answer the Abort.
    pub(super) fn collective_failed(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        suspect: Option<Rank>,
        reason: &str,
        actions: &mut Vec<Action>,
    ) {
        if matches!(
            self.phase,
            Phase::Gathering { .. } | Phase::Finishing { .. }
        ) {
            return;
        }
        let accused = suspect.and_then(|rank| self.incarnation_of(rank));
        let mut text = format!("{} lost its collective: {reason}", self.name(incarnation));
        if let Some(accused) = accused {
            self.suspected.insert(incarnation, accused);
            text = format!("{text}; it suspects {}", self.name(accused));
        } else if !matches!(self.phase, Phase::Regrouping { .. })
            && let Some(times) = self.fails_again("a collective that broke by itself")
        {
            // Such as a library that refuses what all ranks ask of it: the next generation would fare no better.
            let text = format!(
                "{text}; the generations of step {} broke {times} times in a row without a rank to blame: look into the workers' logs",
                self.committed.next()
            );
            return self.fail(Cause::Temporary, text, None, actions);
        }
        self.regroup(now_ms, text, actions);
    }

    /// Puts out who was suspected in two generations in a row, the one that most have suspected.
    fn judge(&mut self, actions: &mut Vec<Action>) {
        let mut accusers: BTreeMap<Incarnation, usize> = BTreeMap::new();
        for accused in std::mem::take(&mut self.suspected).into_values() {
            *accusers.entry(accused).or_default() += 1;
        }
        for accused in accusers.keys() {
            *self.strikes.entry(*accused).or_default() += 1;
        }
        let worst = accusers
            .iter()
            .filter(|(it, _)| self.members.contains_key(it) && self.strikes[it] >= 2)
            .max_by_key(|(it, count)| (self.strikes[it], **count, **it));
        if let Some((accused, _)) = worst {
            let why = format!(
                "{} was suspected of breaking the collective in {} generations in a row",
                self.name(*accused),
                self.strikes[accused]
            );
            self.put_out(*accused, &why, actions);
        }
    }

    /// Forms the next generation, once all members have said what they hold and there are enough of them.
    pub(super) fn reform(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Regrouping { .. }) {
            return;
        }
        if self.members.values().any(|it| it.held.is_none()) {
            return;
        }
        if self.save_again_ms.is_some_and(|at_ms| now_ms < at_ms) {
            return;
        }
        self.save_again_ms = None;
        self.judge(actions);
        let next = self.next_members();
        if next.len() < self.wanted() {
            return;
        }
        let base = self.layout_of(&next);
        if base.is_none() && self.awaits_publication() {
            return;
        }
        self.take_base(base, actions);
        self.admit(&next, actions);
        self.drop_orphaned_saves();
        self.form(now_ms, actions);
    }

    /// Goes on from `base`; without one from the newest checkpoint, to which the journal goes back if it must.
    pub(super) fn take_base(&mut self, base: Option<Layout>, actions: &mut Vec<Action>) {
        if base.is_none() && self.committed != self.newest.step {
            self.rewind(actions);
        }
        self.base = base.map(Arc::new);
    }

    /// Whether a checkpoint is about to become visible, so that a rewind now would go back behind it.
    pub(super) fn awaits_publication(&self) -> bool {
        self.committed != self.newest.step && self.saves.values().any(|it| it.publishing)
    }

    /// Fewest members among whom the devices have room: by what the members say, or else those said that were the last.
    fn room(&self) -> usize {
        let said = self.members.values().map(|it| it.workers_min).max();
        said.filter(|it| *it > 0).unwrap_or(self.room) as usize
    }

    /// Fewest members that train.
    fn fewest(&self) -> usize {
        self.room().max(self.elastic().workers_min as usize)
    }

    /// Why more members are waited for than the policy wants, where that is so.
    pub(super) fn want_of_room(&self) -> Option<String> {
        let room = self.room();
        (room > self.elastic().workers_min as usize)
            .then(|| format!("the state has room on {room} devices or more"))
    }

    /// Fewest members of the next generation. To save what there is, so many are enough as have room for it.
    pub(super) fn wanted(&self) -> usize {
        let all = || self.members.keys().chain(self.spares.keys()).copied();
        // Where the state of the last step is lost, steps are to be computed again.
        let kept =
            || self.committed == self.newest.step || self.layout_of(&all().collect()).is_some();
        let saves = self.stop.is_some() || (self.ending.is_some() && kept());
        if saves {
            self.room().max(1)
        } else {
            self.fewest()
        }
    }

    /// Who is to be in the next generation: members; spares that have loaded, and others only while too few train; a leaver
    /// only if its shards live nowhere else, for one generation more.
    pub(super) fn next_members(&self) -> BTreeSet<Incarnation> {
        let mut next: BTreeSet<Incarnation> = self.members.keys().copied().collect();
        let most = self.elastic().workers_max as usize;
        let ready = self.spares.iter().filter(|(_, it)| it.held.is_some());
        let (loaded, cold): (Vec<_>, Vec<_>) = ready.partition(|(_, it)| it.loaded.is_some());
        let wanted = self.wanted();
        let spares = loaded.into_iter().map(|it| (it.0, most));
        let spares = spares.chain(cold.into_iter().map(|it| (it.0, most.min(wanted))));
        for (incarnation, limit) in spares {
            if next.len() < limit {
                next.insert(*incarnation);
            }
        }
        // One whose device has no room among so few waits until there are more.
        let wants = |it: &Incarnation| self.spares.get(it).map_or(0, |it| it.workers_min);
        while let Some(most) = next.iter().copied().max_by_key(wants)
            && wants(&most) as usize > next.len()
        {
            next.remove(&most);
        }
        for (incarnation, _) in self.members.iter().filter(|(_, it)| it.leaving.is_some()) {
            let mut without = next.clone();
            without.remove(incarnation);
            let held = self.layout_of(&without).is_some() || self.layout_of(&next).is_none();
            if held && without.len() >= wanted {
                next = without;
            }
        }
        next
    }

    /// Where these would find the state of the last commit among them.
    pub(super) fn layout_of(&self, next: &BTreeSet<Incarnation>) -> Option<Layout> {
        let holds = |incarnation: &Incarnation| {
            let here = self.members.get(incarnation);
            let here = here.or_else(|| self.spares.get(incarnation));
            here.map_or(&[][..], |it| it.holds())
        };
        let ranked = next.iter().enumerate();
        let ranked = ranked.map(|(rank, it)| (Rank(rank as u32), holds(it)));
        let mirror = self.elastic().mirror;
        newest_layout(self.committed, self.since, mirror, ranked)
    }

    /// Dismisses leavers and takes spares in.
    pub(super) fn admit(&mut self, next: &BTreeSet<Incarnation>, actions: &mut Vec<Action>) {
        let out: Vec<Incarnation> = self.members.keys().copied().collect();
        for incarnation in out.into_iter().filter(|it| !next.contains(it)) {
            let name = self.name(incarnation);
            let member = self.members.remove(&incarnation);
            let reason = member.and_then(|it| it.leaving).unwrap_or_default();
            actions.push(note("lost", format!("{name} left: {reason}")));
            let afterwards = Afterwards::Leave;
            let stop = CoordinatorMessage::Stop { reason, afterwards };
            self.send(incarnation, stop, actions);
        }
        for incarnation in next {
            if let Some(mut spare) = self.spares.remove(incarnation) {
                spare.rank = None;
                self.members.insert(*incarnation, spare);
            }
        }
    }

    /// After a commit: whether the next generation would have other members. All have voted on it, so what they hold is known
    /// without asking.
    pub(super) fn changes_members(&mut self) -> bool {
        let admits = self.spares.values().any(|it| it.loaded.is_some());
        let dismisses = self.members.values().any(|it| it.leaving.is_some());
        if !(admits || dismisses) {
            return false;
        }
        let world = self.members.len() as u32;
        for member in self.members.values_mut() {
            let held = Held {
                generation: self.generation,
                rank: member.rank.expect("members that voted have ranks"),
                world,
                applied: Step(self.committed.0 - 1),
                gradient: true,
            };
            member.held = Some((self.generation, vec![held]));
        }
        let next = self.next_members();
        let others = !next.iter().eq(self.members.keys()) && next.len() >= self.wanted();
        if !others {
            self.members.values_mut().for_each(|it| it.held = None);
        }
        others
    }

    /// No living worker has some shard: the journal goes back to the newest checkpoint (invariant M4).
    fn rewind(&mut self, actions: &mut Vec<Action>) {
        let to = self.newest.step;
        let reason = format!(
            "no worker is left that holds some optimizer shard at step {}, and the newest checkpoint holds step {to}",
            self.committed
        );
        actions.push(note("rewind", format!("back to step {to}: {reason}")));
        actions.push(Action::Journal(Record::Rewind { to, reason }));
        self.committed = to;
        self.skipped = self.newest.skipped;
        self.evaluations.retain(|row| row.step <= to.0);
        self.evaluating = None;
        self.saves.clear();
        self.early_stop.take_if(|stop| stop.step > to.0);
        self.ending = None;
    }
}
