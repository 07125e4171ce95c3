//! Forming: ranks are given, members load and say what they found, which must be alike.

use std::collections::BTreeMap;

use super::phase::Phase;
use super::{Action, Job, note};
use crate::{Cause, CoordinatorMessage, Incarnation, Outcome, Rank, Record, RunFacts};

impl Job {
    /// Journals the generation, then tells its members. Ranks follow the order of incarnations.
    pub(super) fn form(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        for (rank, member) in self.members.values_mut().enumerate() {
            member.rank = Some(Rank(rank as u32));
        }
        self.phase = Phase::Forming {
            ready: BTreeMap::new(),
            progressed_ms: now_ms,
        };
        // Durable before anybody hears of it, so that its number is never used again (invariant M2).
        actions.push(Action::Journal(Record::Generation {
            generation: self.generation,
            members: self.members.keys().copied().collect(),
        }));
        let names: Vec<_> = self.members.keys().map(|it| self.name(*it)).collect();
        actions.push(note(
            "form",
            format!(
                "generation {} goes on from step {}: {}",
                self.generation,
                self.committed,
                names.join(", ")
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
            addresses: self.members.values().map(|it| it.address.clone()).collect(),
            secret: self.spec.secret,
            committed: self.committed,
            resume: self.spec.resume.clone(),
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
        let others = ready.iter().map(|(rank, it)| (format!("rank {rank}"), it));
        let all = [("the journal".to_string(), &journal)]
            .into_iter()
            .chain(others);
        for (other, theirs) in all {
            if let Some((fact, here, there)) = facts.first_difference(theirs) {
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
        let steps_total = facts.steps_total;
        if self.facts.is_none() {
            self.facts = Some(facts.clone());
            actions.push(Action::Journal(Record::Facts { facts }));
        }
        if self.committed.0 >= steps_total || self.stopped_early() {
            // An earlier generation committed and saved the last step, and was lost before it said so.
            return self.finish(now_ms, Outcome::Completed, actions);
        }
        self.phase = Phase::Stepping {
            prepared: BTreeMap::new(),
            since_ms: now_ms,
            stop: None,
        };
        let first = self.committed.next();
        actions.push(note(
            "go",
            format!("training begins with step {first} of {steps_total}"),
        ));
        self.send_all(&self.go_message(), actions);
        if self.evaluates_first() {
            self.await_evaluation(self.committed);
        }
    }

    pub(super) fn go_message(&self) -> CoordinatorMessage {
        CoordinatorMessage::Go {
            step: self.committed.next(),
            evaluate: self.evaluates_first(),
        }
    }
}
