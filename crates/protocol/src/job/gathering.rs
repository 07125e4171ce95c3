//! Gathering: who may join, when there are enough, what a worker is told that may not; and spares, who wait.

use std::collections::BTreeSet;

use super::phase::{Member, Phase};
use super::{Action, Job, note};
use crate::{
    Afterwards, Awaits, CoordinatorMessage, Generation, Incarnation, RunFacts, Terms,
    WorkerMessage, WorkerProfile,
};

impl Job {
    pub(super) fn join(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        profile: WorkerProfile,
        actions: &mut Vec<Action>,
    ) {
        if let Some(member) = self.members.get_mut(&incarnation) {
            // Said again: the Welcome was lost, or this Join came late. Either way the answer is the same.
            member.heard(now_ms);
            return self.send(incarnation, self.welcome(false), actions);
        }
        if let Some(spare) = self.spares.get_mut(&incarnation) {
            spare.heard(now_ms);
            return self.send(incarnation, self.welcome(true), actions);
        }
        if let Some((reason, afterwards)) = self.refusal(&profile) {
            let text = format!("worker {} may not join: {reason}", profile.name);
            actions.push(note("stop", text));
            let stop = CoordinatorMessage::Stop { reason, afterwards };
            return self.send(incarnation, stop, actions);
        }
        let spare = !matches!(self.phase, Phase::Gathering { .. });
        let world = self.spec.policy.world;
        let text = format!("worker {} joined from {}", profile.name, profile.address);
        let member = Member::new(now_ms, profile.name, profile.address, self.committed);
        if spare {
            self.spares.insert(incarnation, member);
            actions.push(note("join", format!("{text}, a spare")));
        } else {
            self.members.insert(incarnation, member);
            actions.push(note(
                "join",
                format!("{text} ({} of {world})", self.members.len()),
            ));
        }
        self.send(incarnation, self.welcome(spare), actions);
        self.gather(now_ms, actions);
    }

    pub(super) fn welcome(&self, spare: bool) -> CoordinatorMessage {
        CoordinatorMessage::Welcome {
            config_toml: self.spec.config_toml.clone(),
            checkpoint_dir: self.spec.checkpoint_dir.clone(),
            probe: self.spec.probe.clone(),
            spare,
            job: self.spec.id.clone(),
            terms: Terms {
                mirror: self.elastic().mirror,
                shard_gradients: self.elastic().shard_gradients,
                offload: self.elastic().offload,
                collective_timeout_ms: self.elastic().collective_timeout_ms,
                silence_ms: self.spec.policy.heartbeat_timeout_ms,
            },
        }
    }

    /// Why a worker may not join now, and what it does next.
    fn refusal(&self, profile: &WorkerProfile) -> Option<(String, Afterwards)> {
        if let Some(reason) = profile.mismatch(&self.spec.build) {
            return Some((reason, Afterwards::Refused));
        }
        let room = !matches!(self.phase, Phase::Finishing { .. })
            && self.spares.len() < self.elastic().workers_max as usize;
        if !matches!(self.phase, Phase::Gathering { .. }) && !room {
            let reason = format!(
                "generation {} has its {} members already",
                self.generation,
                self.members.len()
            );
            return Some((reason, Afterwards::Rejoin));
        }
        None
    }

    /// Forms the first generation of this life once enough workers are there.
    ///
    /// A job whose coordinator was restarted waits for those who may still hold its state: until all of them are back,
    /// or have had the time to come; then it takes whoever holds all of it, or else a full world from the newest checkpoint.
    pub(super) fn gather(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let Phase::Gathering { grace_over, .. } = self.phase else {
            return;
        };
        let world = self.spec.policy.world as usize;
        let here = self.present();
        let full = here.len() >= world;
        let enough = here.len() >= self.wanted();
        let held = self.layout_of(&here).is_some();
        let last = &self.spec.recovery.members;
        let all_back = !last.is_empty() && last.iter().all(|it| here.contains(it));
        let ready = if grace_over {
            full || (enough && held)
        } else {
            (held || self.committed == self.newest.step) && (full || (enough && all_back))
        };
        if ready {
            self.form_first(now_ms, actions);
        }
    }

    /// Workers that gather and have said what they hold, at most as many as may train: those first who hold something.
    fn present(&self) -> BTreeSet<Incarnation> {
        let most = self.elastic().workers_max as usize;
        let here = self.members.iter().filter(|(_, it)| it.held.is_some());
        let mut here: Vec<_> = here
            .map(|(it, member)| (member.holds().is_empty(), *it))
            .collect();
        here.sort_unstable();
        here.into_iter().take(most).map(|(_, it)| it).collect()
    }

    /// Forms the first generation of whoever is there; false if those are too few.
    pub(super) fn form_first(&mut self, now_ms: u64, actions: &mut Vec<Action>) -> bool {
        let here = self.present();
        if here.len() < self.wanted() {
            return false;
        }
        let base = self.layout_of(&here);
        self.take_base(base, actions);
        let absent: Vec<Incarnation> = self.members.keys().copied().collect();
        for incarnation in absent.into_iter().filter(|it| !here.contains(it)) {
            if let Some(mut member) = self.members.remove(&incarnation) {
                member.asked_ms = now_ms;
                self.spares.insert(incarnation, member);
                self.send(incarnation, self.welcome(true), actions);
            }
        }
        self.moved_ms = now_ms;
        self.form(now_ms, actions);
        true
    }

    /// A word of a spare.
    pub(super) fn spare_message(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        generation: Generation,
        message: WorkerMessage,
        actions: &mut Vec<Action>,
    ) {
        let name = self.name(incarnation);
        let committed = self.committed;
        let Some(spare) = self.spares.get_mut(&incarnation) else {
            return;
        };
        spare.heard(now_ms);
        if spare.held.take_if(|(then, _)| *then < generation).is_some() {
            spare.asked_ms = now_ms;
        }
        match message {
            WorkerMessage::Beat {
                awaits: Awaits::Form,
                ..
            } if spare.held.is_none() => {
                spare.pulse.beat(now_ms);
                self.send(incarnation, self.welcome(true), actions);
            }
            // What else it says that it waits for is of a generation that it is about to leave.
            WorkerMessage::Beat { .. } => {
                spare.pulse.beat(now_ms);
                self.send(
                    incarnation,
                    CoordinatorMessage::Heard { committed },
                    actions,
                );
            }
            WorkerMessage::Progress { phase, done, total } => {
                spare.progress = Some((phase, done, total));
            }
            WorkerMessage::Held { held, workers_min } => {
                spare.hear_held(generation, held, workers_min);
                self.reform(now_ms, actions);
            }
            WorkerMessage::Loaded { facts } => {
                self.loaded(now_ms, incarnation, facts, actions);
            }
            WorkerMessage::Leave { reason } => {
                self.dismiss(incarnation, reason, Afterwards::Leave, actions);
            }
            // What it lacks harms nobody else: the members found it all.
            WorkerMessage::Failed { reason, .. } => {
                actions.push(note("lost", format!("{name}, a spare, failed: {reason}")));
                self.spares.remove(&incarnation);
            }
            // It joined, and still works in a generation that it was put out of.
            _ => {
                let reason = format!("{name} is in no generation");
                self.send(incarnation, CoordinatorMessage::Abort { reason }, actions);
            }
        }
    }

    /// A spare has loaded; what it found must be what the members agreed on.
    fn loaded(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        facts: RunFacts,
        actions: &mut Vec<Action>,
    ) {
        let name = self.name(incarnation);
        let agreed = self.facts.as_ref();
        let difference = agreed.and_then(|agreed| {
            let facts = RunFacts {
                committed: agreed.committed,
                ..facts.clone()
            };
            facts.first_difference(agreed)
        });
        if let Some((fact, here, there)) = difference {
            let reason = format!(
                "{name} found {fact} {here}, the job has {there}: all workers must read the same model and data that the \
                 run began with"
            );
            actions.push(note("stop", reason.clone()));
            return self.dismiss(incarnation, reason, Afterwards::Refused, actions);
        }
        let Some(spare) = self.spares.get_mut(&incarnation) else {
            return;
        };
        spare.progress = None;
        if spare.loaded.replace(facts).is_none() {
            let text = format!("{name} has loaded, and is admitted at a step boundary");
            actions.push(note("spare", text));
            self.reform(now_ms, actions);
        }
    }

    /// Ends the job for a spare.
    pub(super) fn dismiss(
        &mut self,
        incarnation: Incarnation,
        reason: String,
        afterwards: Afterwards,
        actions: &mut Vec<Action>,
    ) {
        self.spares.remove(&incarnation);
        let stop = CoordinatorMessage::Stop { reason, afterwards };
        self.send(incarnation, stop, actions);
    }
}
