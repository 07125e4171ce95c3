//! Workers that come and go: who may wait here, who is told to leave, who is silent.

use super::{Scheduler, SchedulerAction, State, dismiss, note};
use crate::{Afterwards, Incarnation, JobId, WorkerProfile};

impl Scheduler {
    pub(super) fn joined(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        profile: WorkerProfile,
        job: Option<JobId>,
        actions: &mut Vec<SchedulerAction>,
    ) {
        if let Some(known) = self.pool.get(incarnation) {
            // Said again, or in a new session while the old one's end is not noticed yet.
            if let Some(id) = known.job.clone() {
                actions.push(SchedulerAction::Lend { id, incarnation });
            }
            return self.pool.heard(now_ms, incarnation);
        }
        let name = profile.name.clone();
        if let Some(reason) = profile.mismatch(&self.policy.build) {
            actions.push(note(
                "refuse",
                format!("worker {name} may not join: {reason}"),
            ));
            return dismiss(incarnation, reason, Afterwards::Refused, actions);
        }
        if let Some(address) = self.pool.address_of(&name) {
            let reason = format!(
                "a worker of the name {name} is here already, from {address}; give every worker a --name of its own"
            );
            actions.push(note("refuse", reason.clone()));
            // The other may be this one's earlier life, whose end is not noticed yet.
            return dismiss(incarnation, reason, Afterwards::Rejoin, actions);
        }
        let found = job.as_ref().and_then(|id| self.unended(id));
        let paused = found.is_some_and(|(_, entry)| entry.paused.is_some());
        let found = found.map(|(_, entry)| &entry.state);
        let runs = matches!(found, Some(State::Running { works: true, .. }));
        let queued = matches!(found, Some(State::Queued { .. })) && !paused;
        if let Some(id) = &job
            && !runs
            && !queued
        {
            // A paused one is saved, or computes again what it lost of its last life.
            let now = if paused { "now" } else { "any more" };
            let reason = format!("job {id} needs no worker {now}");
            return dismiss(incarnation, reason, Afterwards::Rejoin, actions);
        }
        let (address, device) = (&profile.address, &profile.device);
        let mut text = format!("worker {name} joined from {address} ({device})");
        if let Some(id) = &job {
            text = format!("worker {name} came back from {address} with the state of job {id}");
        }
        actions.push(note("join", text));
        let holds = job.clone().filter(|_| queued);
        self.pool.join(now_ms, incarnation, profile, holds);
        if let Some(id) = job.filter(|_| runs) {
            self.pool.assign(&[incarnation], &id);
            actions.push(SchedulerAction::Lend { id, incarnation });
        }
    }

    pub(super) fn leaving(
        &mut self,
        incarnation: Incarnation,
        reason: &str,
        actions: &mut Vec<SchedulerAction>,
    ) {
        let Some(worker) = self.pool.get(incarnation) else {
            return;
        };
        let name = worker.profile.name.clone();
        match worker.job.clone() {
            None => {
                self.pool.remove(incarnation);
                actions.push(note("drain", format!("worker {name} leaves: {reason}")));
                dismiss(incarnation, reason.into(), Afterwards::Leave, actions);
            }
            Some(id) => {
                if self.pool.drain(incarnation) {
                    let reason = reason.to_owned();
                    actions.push(note(
                        "drain",
                        format!("worker {name} is to leave: {reason}"),
                    ));
                    actions.push(SchedulerAction::Release {
                        id,
                        incarnation,
                        reason,
                    });
                }
            }
        }
    }

    pub(super) fn gone(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        actions: &mut Vec<SchedulerAction>,
    ) {
        let expected_ms = now_ms + self.policy.heartbeat_timeout_ms;
        let Some(worker) = self.pool.remove(incarnation) else {
            return;
        };
        if worker.job.is_none() {
            let name = &worker.profile.name;
            let text = format!("worker {name} was lost: its connection closed");
            actions.push(note("lost", text));
        } else if !worker.draining {
            // Its job lets it go, or it is lost, which its job finds out.
            self.pool.expect(worker.profile.name, expected_ms);
        }
    }

    pub(super) fn drain(&mut self, name: &str, actions: &mut Vec<SchedulerAction>) {
        let Some(incarnation) = self.pool.of_name(name) else {
            return;
        };
        self.leaving(incarnation, "drained", actions);
    }

    pub(super) fn tick(&mut self, now_ms: u64, actions: &mut Vec<SchedulerAction>) {
        let timeout = self.policy.heartbeat_timeout_ms;
        for (incarnation, worker) in self.pool.silent(now_ms, timeout) {
            let reason = format!("silent for {} s", timeout as f64 / 1000.0);
            let text = format!("worker {} was lost: {reason}", worker.profile.name);
            actions.push(note("lost", text));
            dismiss(incarnation, reason, Afterwards::Rejoin, actions);
        }
        if self
            .reminded_ms
            .is_some_and(|at_ms| now_ms >= at_ms + self.policy.remind_ms)
        {
            self.reminded_ms = Some(now_ms);
            if let Some(waiting) = self.waiting() {
                actions.push(note("wait", waiting));
            }
        }
    }
}
