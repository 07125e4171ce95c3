//! Who runs next: the queue's order, and which workers go to which job.

use super::{JobRecord, NewJob, Scheduler, SchedulerAction, State, note};
use crate::Incarnation;

impl Scheduler {
    /// Gives workers to jobs: those that hold a queued job's state to it; idle ones to running jobs that lost some, unless
    /// the head of the queue has a higher priority and can start; then to the head, as long as there are enough of them, and
    /// where there are not, jobs with a lower priority make room; then to running jobs that take more.
    pub(super) fn start_jobs(&mut self, now_ms: u64, actions: &mut Vec<SchedulerAction>) {
        self.now_ms = now_ms;
        self.pool.expect_no_longer(now_ms);
        if self.shutting_down {
            return;
        }
        for number in self.numbers(|it| matches!(it, State::Queued { .. })) {
            let holders = self.pool.holders_of(&self.jobs[&number].job.id);
            if !holders.is_empty() {
                self.start(number, holders, true, actions);
            }
        }
        let begins_with = |job: &NewJob| job.workers;
        loop {
            let Some(number) = self.head() else {
                self.reminded_ms = None;
                self.lend(begins_with, i32::MIN, actions);
                return self.lend(|job| job.workers_max.max(job.workers), i32::MIN, actions);
            };
            let job = &self.jobs[&number].job;
            let (wanted, priority) = (job.workers as usize, job.priority);
            self.lend(begins_with, priority, actions);
            if !self.is_ready(number) {
                // It tries again soon, and finds what is idle now.
                self.reminded_ms = None;
                return;
            }
            if let Some(workers) = self.pool.idle(wanted) {
                self.reminded_ms = None;
                self.start(number, workers, false, actions);
                continue;
            }
            self.reminded_ms.get_or_insert(now_ms);
            if !self.make_room(number, actions) {
                // It cannot start, whoever stops.
                self.lend(begins_with, i32::MIN, actions);
            }
            return;
        }
    }

    fn start(
        &mut self,
        number: u64,
        workers: Vec<Incarnation>,
        holding: bool,
        actions: &mut Vec<SchedulerAction>,
    ) {
        let entry = self.jobs.get_mut(&number).expect("a job of the queue");
        let id = entry.job.id.clone();
        entry.attempts.started();
        entry.state = State::Running {
            since_ms: self.now_ms,
            works: true,
            stopping: None,
        };
        self.pool.assign(&workers, &id);
        let names = self.pool.names(&workers).join(", ");
        actions.push(SchedulerAction::Journal(JobRecord::Started {
            id: id.clone(),
        }));
        actions.push(note("start", format!("job {id} starts on {names}")));
        actions.push(SchedulerAction::Start {
            id: id.clone(),
            workers,
            holding,
        });
        actions.push(SchedulerAction::Changed(id));
    }

    /// Lends idle workers to running jobs of at least this priority that have fewer than `wanted`.
    fn lend(
        &mut self,
        wanted: impl Fn(&NewJob) -> u32,
        priority_min: i32,
        actions: &mut Vec<SchedulerAction>,
    ) {
        for number in self.numbers(State::takes_workers) {
            let job = &self.jobs[&number].job;
            if job.priority < priority_min {
                return;
            }
            let missing = wanted(job) as usize;
            let missing = missing.saturating_sub(self.pool.count_of(&job.id));
            for _ in 0..missing {
                let Some(worker) = self.pool.idle(1) else {
                    return;
                };
                self.pool.assign(&worker, &job.id);
                let names = self.pool.names(&worker).join(", ");
                let text = format!("worker {names} is lent to job {}", job.id);
                actions.push(note("lend", text));
                actions.push(SchedulerAction::Lend {
                    id: job.id.clone(),
                    incarnation: worker[0],
                });
            }
        }
    }

    /// Jobs in such a state, in the order of their priority.
    pub(super) fn numbers(&self, wanted: impl Fn(&State) -> bool) -> Vec<u64> {
        let jobs = self.jobs.iter().filter(|(_, it)| wanted(&it.state));
        let mut numbers: Vec<u64> = jobs.map(|(number, _)| *number).collect();
        numbers.sort_by_key(|number| self.jobs[number].order(*number));
        numbers
    }

    /// The first job of the queue that is not paused.
    pub(super) fn head(&self) -> Option<u64> {
        let queued = self.numbers(|it| matches!(it, State::Queued { .. }));
        queued
            .into_iter()
            .find(|number| self.jobs[number].paused.is_none())
    }

    /// Whether the wait of a queued job is over.
    fn is_ready(&self, number: u64) -> bool {
        match self.jobs[&number].state {
            State::Queued { not_before_ms } => not_before_ms <= self.now_ms,
            _ => false,
        }
    }
}
