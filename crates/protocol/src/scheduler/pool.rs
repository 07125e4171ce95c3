//! The workers of a coordinator: who waits, who works for which job, who is to leave.

use std::collections::{BTreeMap, BTreeSet};

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
    /// Those without a job in the order of their last word: thousands of them beat twice a second.
    heard: BTreeSet<(u64, Incarnation)>,
    /// By name, those whose job let them go, and until when they are expected to come back.
    returning: BTreeMap<String, u64>,
    /// The same in the order of that time.
    expected: BTreeSet<(u64, String)>,
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
        if let Some(until_ms) = self.returning.remove(&worker.profile.name) {
            let name = worker.profile.name.clone();
            self.expected.remove(&(until_ms, name));
        }
        self.remove(incarnation);
        self.heard.insert((now_ms, incarnation));
        self.workers.insert(incarnation, worker);
    }

    pub(super) fn heard(&mut self, now_ms: u64, incarnation: Incarnation) {
        if let Some(worker) = self.workers.get_mut(&incarnation) {
            let before_ms = std::mem::replace(&mut worker.last_heard_ms, now_ms);
            if self.heard.remove(&(before_ms, incarnation)) {
                self.heard.insert((now_ms, incarnation));
            }
        }
    }

    pub(super) fn remove(&mut self, incarnation: Incarnation) -> Option<PoolWorker> {
        let worker = self.workers.remove(&incarnation)?;
        self.heard.remove(&(worker.last_heard_ms, incarnation));
        Some(worker)
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
                self.heard.remove(&(worker.last_heard_ms, *incarnation));
                worker.job = Some(id.clone());
                worker.holds = None;
            }
        }
    }

    /// An attempt ended: its workers leave their sessions, and come back under other incarnations, until `expected_ms` unless
    /// they are lost.
    pub(super) fn forget_job(&mut self, id: &JobId, expected_ms: u64) {
        let of = |_: &Incarnation, it: &mut PoolWorker| it.job.as_ref() == Some(id);
        let forgotten: Vec<PoolWorker> = self.workers.extract_if(.., of).map(|it| it.1).collect();
        for worker in forgotten.into_iter().filter(|it| !it.draining) {
            self.expect(worker.profile.name, expected_ms);
        }
    }

    /// A worker of that name is expected to come back by then.
    pub(super) fn expect(&mut self, name: String, until_ms: u64) {
        if let Some(before_ms) = self.returning.insert(name.clone(), until_ms) {
            self.expected.remove(&(before_ms, name.clone()));
        }
        self.expected.insert((until_ms, name));
    }

    /// Forgets workers that were expected by now.
    pub(super) fn expect_no_longer(&mut self, now_ms: u64) {
        let later = self.expected.split_off(&(now_ms + 1, String::new()));
        for (_, name) in std::mem::replace(&mut self.expected, later) {
            self.returning.remove(&name);
        }
    }

    /// Workers that are expected to come back.
    pub(super) fn returning_count(&self) -> usize {
        self.returning.len()
    }

    /// When the first of these is expected no longer.
    pub(super) fn first_expected(&self) -> Option<u64> {
        self.expected.first().map(|it| it.0)
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
        let mut silent = Vec::new();
        while let Some((heard_ms, incarnation)) = self.heard.first().copied()
            && now_ms >= heard_ms + timeout_ms
        {
            let worker = self.remove(incarnation);
            silent.push((incarnation, worker.expect("whoever was heard is here")));
        }
        silent
    }

    /// When the first waiting worker will have been silent for too long.
    pub(super) fn first_silent(&self, timeout_ms: u64) -> Option<u64> {
        self.heard.first().map(|it| it.0 + timeout_ms)
    }

    /// Whether the orders in time are what they would be if they were made anew.
    pub(super) fn orders_agree(&self) -> bool {
        let heard = self
            .jobless()
            .map(|(it, worker)| (worker.last_heard_ms, it));
        let expected = self
            .returning
            .iter()
            .map(|(name, at_ms)| (*at_ms, name.clone()));
        self.heard == heard.collect() && self.expected == expected.collect()
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
