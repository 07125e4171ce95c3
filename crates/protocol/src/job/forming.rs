//! Forming: ranks are given, members load (or move the state that some hold) and say what they found, which must be alike.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::phase::Phase;
use super::{Action, Job, note};
use crate::ids::listed;
use crate::{
    Activity, Cause, CoordinatorMessage, Generation, Incarnation, Outcome, Rank, Record, RunFacts,
};

impl Job {
    /// Journals the generation, then tells its members. Ranks follow the order of incarnations.
    pub(super) fn form(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Gathering { .. }) {
            self.generation = Generation(self.generation.max(self.known).0 + 1);
        }
        for (rank, member) in self.members.values_mut().enumerate() {
            member.rank = Some(Rank(rank as u32));
            member.progress = None;
            member.activity = (Activity::default(), now_ms);
            member.slow = 0;
        }
        self.addresses = self.members.values().map(|it| it.address.clone()).collect();
        self.said = None;
        self.suspected.clear();
        self.phase = Phase::Forming {
            ready: BTreeMap::new(),
            progressed_ms: now_ms,
        };
        // Durable before anybody hears of it, so that its number is never used again (invariant M2).
        actions.push(Action::Journal(Record::Generation {
            generation: self.generation,
            members: self.members.keys().copied().collect(),
        }));
        let names = self.members.keys().map(|it| self.name(*it));
        actions.push(note(
            "form",
            format!(
                "generation {} goes on from step {}: {}",
                self.generation,
                self.committed,
                listed(names, ", ")
            ),
        ));
        for incarnation in self.members.keys() {
            self.send(*incarnation, self.form_message(*incarnation), actions);
        }
    }

    pub(super) fn form_message(&self, incarnation: Incarnation) -> CoordinatorMessage {
        let rank = self.members.get(&incarnation).and_then(|it| it.rank);
        CoordinatorMessage::Form {
            rank: rank.expect("a Form goes to members, which have ranks from Forming on"),
            addresses: Arc::clone(&self.addresses),
            secret: self.spec.secret,
            committed: self.committed,
            resume: self.newest.path.clone().filter(|_| self.base.is_none()),
            apply: self.apply,
            base: self.base.clone(),
        }
    }

    pub(super) fn progress(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        progress: (String, u64, u64),
        actions: &mut Vec<Action>,
    ) {
        let Some(member) = self.members.get_mut(&incarnation) else {
            return;
        };
        let moved = match &member.progress {
            Some((phase, done, _)) => *phase != progress.0 || progress.1 > *done,
            None => true,
        };
        if !moved {
            return;
        }
        member.progress = Some(progress.clone());
        if let Some(rank) = member.rank {
            let (phase, done, total) = progress;
            actions.push(Action::Progress {
                rank,
                phase,
                done,
                total,
            });
        }
        // Anybody's progress counts: who is through its own slice waits for the slowest.
        if let Phase::Forming { progressed_ms, .. } = &mut self.phase {
            *progressed_ms = now_ms;
            if !self.pace.begun() {
                self.moved_ms = now_ms;
            }
        }
    }

    pub(super) fn ready(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        facts: RunFacts,
        (reused, computed): (u64, u64),
        actions: &mut Vec<Action>,
    ) {
        let name = self.name(incarnation);
        let disagreement = self.disagreement(&name, &facts);
        let member = self.members.get_mut(&incarnation);
        let Some((rank, member)) = member.and_then(|it| it.rank.map(|rank| (rank, it))) else {
            return;
        };
        let Phase::Forming {
            ready,
            progressed_ms,
        } = &mut self.phase
        else {
            return; // said again; its beat asks for what it lacks
        };
        if let Some(reason) = disagreement {
            return self.fail(Cause::Config, reason, None, actions);
        }
        if ready.contains_key(&rank) {
            return;
        }
        *progressed_ms = now_ms;
        member.progress = None;
        ready.insert(rank, facts);
        let everybody = ready.len() == self.members.len();
        actions.push(note(
            "ready",
            format!(
                "{name} is ready: {reused} reference values from the store, {computed} computed"
            ),
        ));
        if everybody {
            self.agreed(now_ms, actions);
        }
    }

    /// Why these facts do not fit the journal's, or another member's.
    fn disagreement(&self, name: &str, facts: &RunFacts) -> Option<String> {
        let Phase::Forming { ready, .. } = &self.phase else {
            return None;
        };
        // The journal's facts are as old as the first generation: their commit was true then.
        let journal = RunFacts {
            committed: self.committed.0,
            ..self.facts.clone().unwrap_or_else(|| facts.clone())
        };
        // Those who are ready have said the same: the first stands for all.
        let first = ready.first_key_value();
        let others = [(None, &journal)]
            .into_iter()
            .chain(first.map(|(rank, it)| (Some(*rank), it)));
        for (other, theirs) in others {
            if let Some((fact, here, there)) = facts.first_difference(theirs) {
                let other = other.map_or("the journal".into(), |rank| format!("rank {rank}"));
                return Some(format!(
                    "{name} found {fact} {here}, {other} has {there}: all workers must read the same model and data \
                     that the run began with"
                ));
            }
        }
        None
    }

    /// All are ready and alike: journals the facts the first time, then lets them go.
    fn agreed(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let Phase::Forming { ready, .. } = &self.phase else {
            return;
        };
        let Some(facts) = ready.values().next().cloned() else {
            return;
        };
        let room = self.members.values().map(|it| it.workers_min).max();
        self.room = room.unwrap_or(0);
        let steps_total = facts.steps_total;
        if self.facts.is_none() {
            self.facts = Some(facts.clone());
            actions.push(Action::Journal(Record::Facts { facts }));
        }
        if !self.pace.begun() {
            self.pace.begin();
            self.moved_ms = now_ms;
        }
        let committed = self.committed;
        let first = self.evaluates_first();
        // What a lost generation did not bring to its end, this one does.
        let missed = self.evaluates_after(committed) && !self.is_evaluated(committed);
        if first || missed {
            self.await_evaluation(committed);
        }
        let last = self.ending.clone().or_else(|| self.ends_here());
        let save = self.save_is_due(last.is_some());
        let evaluate = first || self.evaluating.is_some();
        if save {
            self.begin_save();
        }
        if let Some(outcome) = &last
            && !save
            && !self.saves.contains_key(&committed)
        {
            // An earlier generation committed and saved the last step, and was lost before it said so.
            return self.finish(now_ms, outcome.clone(), actions);
        }
        let go = CoordinatorMessage::Go {
            step: committed.next(),
            evaluate,
            save,
            last: last.is_some(),
        };
        self.phase = if let Some(outcome) = last {
            Phase::Draining {
                step: committed,
                outcome,
                since_ms: now_ms,
            }
        } else {
            let step = committed.next();
            let text = format!("training begins with step {step} of {steps_total}");
            actions.push(note("go", text));
            Phase::Stepping {
                prepared: BTreeMap::new(),
                since_ms: now_ms,
            }
        };
        self.send_all(&go, actions);
        self.said = Some(go);
    }

    /// How the job ends where it stands, if it does: nothing is left to do, or it was asked to stop.
    fn ends_here(&self) -> Option<Outcome> {
        let committed = self.committed;
        if self.is_final(committed) || self.stopped_early() {
            return Some(Outcome::Completed);
        }
        let stop = self.stop.as_ref();
        stop.map(|_| Outcome::Interrupted { committed })
    }
}
