//! Gathering: who may join, and what a worker is told that may not.

use super::phase::{Member, Phase};
use super::{Action, Job, note};
use crate::{CoordinatorMessage, Incarnation, WIRE_VERSION};

/// What a joining worker says of itself.
pub(super) struct Join {
    pub(super) build: String,
    pub(super) wire_version: u32,
    pub(super) address: String,
}

impl Job {
    pub(super) fn join(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        join: Join,
        actions: &mut Vec<Action>,
    ) {
        let welcome = CoordinatorMessage::Welcome {
            config_toml: self.spec.config_toml.clone(),
            checkpoint_dir: self.spec.checkpoint_dir.clone(),
        };
        if let Some(member) = self.members.get_mut(&incarnation) {
            // Said again: the Welcome was lost, or this Join came late. Either way the answer is the same.
            member.last_heard_ms = now_ms;
            return self.send(incarnation, welcome, actions);
        }
        if let Some(reason) = self.refusal(&join) {
            let text = format!("worker {incarnation} may not join: {reason}");
            actions.push(note("stop", text));
            return self.send(incarnation, CoordinatorMessage::Stop { reason }, actions);
        }
        let world = self.spec.policy.world;
        let text = format!("worker {incarnation} joined from {}", join.address);
        let member = Member {
            rank: None,
            address: join.address,
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

    /// Why a worker may not join now.
    fn refusal(&self, join: &Join) -> Option<String> {
        if join.wire_version != WIRE_VERSION {
            return Some(format!(
                "it speaks wire version {}, the coordinator {WIRE_VERSION}; install the same version on both",
                join.wire_version
            ));
        }
        if join.build != self.spec.build {
            return Some(format!(
                "it runs build {}, the coordinator {}; install the same version on both",
                join.build, self.spec.build
            ));
        }
        if !matches!(self.phase, Phase::Gathering { .. }) {
            return Some(format!(
                "generation {} has its {} members already",
                self.generation, self.spec.policy.world
            ));
        }
        None
    }
}
