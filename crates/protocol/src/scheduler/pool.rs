//! The workers of a coordinator: who waits, who works for which job, who is to leave.

use std::collections::BTreeMap;

use crate::{Incarnation, JobId, WorkerProfile};

/// A connected worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolWorker {
    /// What it says of itself.
    pub profile: WorkerProfile,
    /// The job it works for; `None` while it waits.
    pub job: Option<JobId>,
    /// The queued job whose state it holds, and waits for.
    pub holds: Option<JobId>,
    /// Whether it is to leave after its job.
    pub draining: bool,
    /// When it was last heard, while it waits; in a job its job listens.
    pub last_heard_ms: u64,
}

#[derive(Default)]
pub(super) struct Pool {
    workers: BTreeMap<Incarnation, PoolWorker>,
    /// By name, those whose job let them go, and until when they are expected to come back.
    returning: BTreeMap<String, u64>,
}

impl Pool {
    pub(super) fn join(
        &mut self,
        now_ms: u64,
        incarnation: Incarnation,
        profile: WorkerProfile,
        holds: Option<JobId>,
    ) {
        let worker = PoolWorker {
            profile,
            job: None,
            holds,
            draining: false,
            last_heard_ms: now_ms,
        };
        self.returning.remove(&worker.profile.name);
        self.workers.insert(incarnation, worker);
    }

    pub(super) fn heard(&mut self, now_ms: u64, incarnation: Incarnation) {
        if let Some(worker) = self.workers.get_mut(&incarnation) {
            worker.last_heard_ms = now_ms;
        }
    }

    pub(super) fn remove(&mut self, incarnation: Incarnation) -> Option<PoolWorker> {
        self.workers.remove(&incarnation)
    }

    pub(super) fn get(&self, incarnation: Incarnation) -> Option<&PoolWorker> {
        self.workers.get(&incarnation)
    }

    pub(super) fn of_name(&self, name: &str) -> Option<Incarnation> {
        let mut workers = self.workers.iter();
        workers
            .find(|(_, it)| it.profile.name == name)
            .map(|(incarnation, _)| *incarnation)
    }

    /// Where the worker of that name is.
    pub(super) fn address_of(&self, name: &str) -> Option<String> {
        let incarnation = self.of_name(name)?;
        Some(self.workers.get(&incarnation)?.profile.address.clone())
    }

    /// Marks a worker that leaves after its job; false if it was marked before.
    pub(super) fn drain(&mut self, incarnation: Incarnation) -> bool {
        let worker = self.workers.get_mut(&incarnation);
        worker.is_some_and(|it| !std::mem::replace(&mut it.draining, true))
    }

    /// The first `count` waiting workers by name, if there are so many. Those that leave are not given away.
    pub(super) fn idle(&self, count: usize) -> Option<Vec<Incarnation>> {
        let mut idle: Vec<(&str, Incarnation)> = self
            .waiting()
            .map(|(incarnation, it)| (it.profile.name.as_str(), incarnation))
            .collect();
        if idle.len() < count {
            return None;
        }
        idle.sort_unstable();
        idle.truncate(count);
        Some(
            idle.into_iter()
                .map(|(_, incarnation)| incarnation)
                .collect(),
        )
    }

    pub(super) fn idle_count(&self) -> usize {
        self.waiting().count()
    }

    pub(super) fn assign(&mut self, workers: &[Incarnation], id: &JobId) {
        for incarnation in workers {
            if let Some(worker) = self.workers.get_mut(incarnation) {
                worker.job = Some(id.clone());
                worker.holds = None;
            }
        }
    }

    /// An attempt ended: its workers leave their sessions, and come back under other incarnations, until `expected_ms` unless
    /// they are lost.
    pub(super) fn forget_job(&mut self, id: &JobId, expected_ms: u64) {
        for worker in self.workers.values() {
            if worker.job.as_ref() == Some(id) && !worker.draining {
                let name = worker.profile.name.clone();
                self.returning.insert(name, expected_ms);
            }
        }
        self.workers.retain(|_, it| it.job.as_ref() != Some(id));
    }

    /// A worker of that name is expected to come back by then.
    pub(super) fn expect(&mut self, name: String, until_ms: u64) {
        self.returning.insert(name, until_ms);
    }

    /// Forgets workers that were expected by now.
    pub(super) fn expect_no_longer(&mut self, now_ms: u64) {
        self.returning.retain(|_, until_ms| *until_ms > now_ms);
    }

    /// Workers that are expected to come back.
    pub(super) fn returning_count(&self) -> usize {
        self.returning.len()
    }

    /// When the first of these is expected no longer.
    pub(super) fn first_expected(&self) -> Option<u64> {
        self.returning.values().copied().min()
    }

    /// Workers that work for `id`.
    pub(super) fn count_of(&self, id: &JobId) -> usize {
        let all = self.workers.values();
        all.filter(|it| it.job.as_ref() == Some(id)).count()
    }

    /// Those of them that others could have after it.
    pub(super) fn staying_count_of(&self, id: &JobId) -> usize {
        let all = self.workers.values();
        all.filter(|it| it.job.as_ref() == Some(id) && !it.draining)
            .count()
    }

    /// Workers that wait for `id`, whose state they hold.
    pub(super) fn holders_of(&self, id: &JobId) -> Vec<Incarnation> {
        let all = self.workers.iter();
        all.filter(|(_, it)| it.holds.as_ref() == Some(id))
            .map(|(incarnation, _)| *incarnation)
            .collect()
    }

    pub(super) fn names(&self, workers: &[Incarnation]) -> Vec<String> {
        let names = workers.iter().filter_map(|it| self.workers.get(it));
        names.map(|it| it.profile.name.clone()).collect()
    }

    /// Takes out who waits and has been silent for too long.
    pub(super) fn silent(
        &mut self,
        now_ms: u64,
        timeout_ms: u64,
    ) -> Vec<(Incarnation, PoolWorker)> {
        let silent: Vec<Incarnation> = self
            .jobless()
            .filter(|(_, it)| now_ms >= it.last_heard_ms + timeout_ms)
            .map(|(incarnation, _)| incarnation)
            .collect();
        silent
            .into_iter()
            .filter_map(|it| Some((it, self.workers.remove(&it)?)))
            .collect()
    }

    /// When the first waiting worker will have been silent for too long.
    pub(super) fn first_silent(&self, timeout_ms: u64) -> Option<u64> {
        self.jobless()
            .map(|(_, it)| it.last_heard_ms + timeout_ms)
            .min()
    }

    pub(super) fn workers(&self) -> impl Iterator<Item = (Incarnation, &PoolWorker)> {
        self.workers
            .iter()
            .map(|(incarnation, it)| (*incarnation, it))
    }

    /// Those that a job may have.
    fn waiting(&self) -> impl Iterator<Item = (Incarnation, &PoolWorker)> {
        self.jobless()
            .filter(|(_, it)| it.holds.is_none() && !it.draining)
    }

    fn jobless(&self) -> impl Iterator<Item = (Incarnation, &PoolWorker)> {
        self.workers().filter(|(_, it)| it.job.is_none())
    }
}
