//! Gathering: who may join, and what a worker is told that may not.

use super::phase::{Member, Phase};
use super::{Action, Job, note};
use crate::{Afterwards, CoordinatorMessage, Incarnation, WorkerProfile};

impl Job {
    pub(super) fn join(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        profile: WorkerProfile,
        actions: &mut Vec<Action>,
    ) {
        let welcome = CoordinatorMessage::Welcome {
            config_toml: self.spec.config_toml.clone(),
            checkpoint_dir: self.spec.checkpoint_dir.clone(),
            probe: self.spec.probe.clone(),
        };
        if let Some(member) = self.members.get_mut(&incarnation) {
            // Said again: the Welcome was lost, or this Join came late. Either way the answer is the same.
            member.last_heard_ms = now_ms;
            return self.send(incarnation, welcome, actions);
        }
        if let Some((reason, afterwards)) = self.refusal(&profile) {
            let text = format!("worker {} may not join: {reason}", profile.name);
            actions.push(note("stop", text));
            let stop = CoordinatorMessage::Stop { reason, afterwards };
            return self.send(incarnation, stop, actions);
        }
        let world = self.spec.policy.world;
        let text = format!("worker {} joined from {}", profile.name, profile.address);
        let member = Member {
            rank: None,
            name: profile.name,
            address: profile.address,
            last_heard_ms: now_ms,
            progress: None,
            committed: self.committed,
        };
        self.members.insert(incarnation, member);
        actions.push(note(
            "join",
            format!("{text} ({} of {world})", self.members.len()),
        ));
        self.send(incarnation, welcome, actions);
        if self.members.len() >= world as usize {
            self.form(now_ms, actions);
        }
    }

    /// Why a worker may not join now, and what it does next.
    fn refusal(&self, profile: &WorkerProfile) -> Option<(String, Afterwards)> {
        if let Some(reason) = profile.mismatch(&self.spec.build) {
            return Some((reason, Afterwards::Refused));
        }
        if !matches!(self.phase, Phase::Gathering { .. }) {
            let reason = format!(
                "generation {} has its {} members already",
                self.generation, self.spec.policy.world
            );
            return Some((reason, Afterwards::Rejoin));
        }
        None
    }
}
