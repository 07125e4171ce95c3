//! The queue of a long-lived coordinator: which job runs on which workers.
//!
//! A [`Scheduler`] knows the workers that wait (their sessions are nobody else's until a job gets them) and all jobs. It is
//! handed events with the time and answers with actions, like [`crate::Job`], which runs one attempt of one job on the
//! workers that it is given here.
//!
//! ```text
//! submitted ─► Queued ─ enough idle workers, its turn ─► Running ─ ended ─► Ended
//!                ▲                                          │
//!                └── too many workers lost, coordinator restarted: from what workers hold, or from the last checkpoint
//! ```
//! The queue is first in, first out: only its head may take workers, so that a large job is not starved by small ones. A
//! running job that lost workers gets others before the ones that wait, and more than it began with after them.
//!
//! State is bounded: [`JOBS_MAX`] jobs that have not ended, [`ENDED_MAX`] that have; workers live as long as their sessions.

mod event;
mod journal;
mod pool;
mod retry;
mod view;

use std::collections::BTreeMap;

use crate::{Afterwards, Cause, Incarnation, JobId, Note, Outcome, Step, WorkerProfile};
use pool::Pool;
use retry::Attempts;

pub use event::{NewJob, SchedulerAction, SchedulerEvent, SubmitError};
pub use journal::{JobRecord, JobsRecovery, recover_jobs};
pub use pool::PoolWorker;
pub use view::{JobSummary, JobSummaryState};

/// Jobs that have not ended; more are refused.
pub const JOBS_MAX: usize = 1000;

/// Ended jobs that are remembered; the oldest is forgotten. Their run directories stay.
pub const ENDED_MAX: usize = 200;

/// What holds for all jobs. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerPolicy {
    /// Version of the program that all workers must run.
    pub build: String,
    /// Silence after which an idle worker counts as lost.
    pub heartbeat_timeout_ms: u64,
    /// Pause before a job that lost workers is started again.
    pub retry_pause_ms: u64,
    /// Attempts that end at the same step with a loss before the job counts as failed.
    pub attempts_max: u32,
    /// How long a job that was started before this coordinator waits for workers that hold its state.
    pub return_ms: u64,
    /// How long the head of the queue waits in silence; then what it waits for is noted, again and again.
    pub remind_ms: u64,
}

/// A job that the scheduler knows.
#[derive(Clone, Debug)]
struct Entry {
    job: NewJob,
    attempts: Attempts,
    /// Where it stood when an attempt last ended.
    committed: Step,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// It waits for its turn, not before this time.
    Queued { not_before_ms: u64 },
    /// An attempt runs.
    Running {
        /// Whether it has workers, or wants some.
        works: bool,
        /// What becomes of it when it stops as asked.
        stopping: Option<Stopping>,
    },
    /// It will not run again.
    Ended(Ending),
}

/// Why a running job was asked to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stopping {
    /// Somebody cancelled it.
    Cancel { reason: String },
    /// Workers leave, or the coordinator: it goes on later.
    Pause { reason: String },
}

/// How a job ended for good.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "ending", rename_all = "snake_case")]
pub enum Ending {
    /// All steps are committed and saved.
    Completed,
    /// Somebody cancelled it.
    Cancelled {
        /// Who and why.
        reason: String,
    },
    /// It could not go on.
    Failed {
        /// Who is to act.
        cause: Cause,
        /// What happened.
        reason: String,
    },
}

/// The jobs and the waiting workers of a coordinator.
pub struct Scheduler {
    policy: SchedulerPolicy,
    /// By number, which is the order of submission.
    jobs: BTreeMap<u64, Entry>,
    next_number: u64,
    pool: Pool,
    /// When the head of the queue began to wait for workers, or was last reminded of.
    reminded_ms: Option<u64>,
    shutting_down: bool,
    /// When it last heard of anything.
    now_ms: u64,
}

impl Scheduler {
    /// Goes on with the jobs of `recovery`: those that ran are queued again.
    pub fn new(policy: SchedulerPolicy, recovery: JobsRecovery, now_ms: u64) -> Self {
        let next_number = recovery.jobs.len() as u64;
        let entry = |(number, it): (usize, journal::RecoveredJob)| {
            let state = match it.ending {
                Some(ending) => State::Ended(ending),
                None if it.attempts > 0 => State::Queued {
                    not_before_ms: now_ms + policy.return_ms,
                },
                None => State::Queued {
                    not_before_ms: now_ms,
                },
            };
            let entry = Entry {
                job: it.job,
                attempts: Attempts::recovered(it.attempts),
                committed: it.committed,
                state,
            };
            (number as u64, entry)
        };
        Self {
            pool: Pool::default(),
            jobs: recovery.jobs.into_iter().enumerate().map(entry).collect(),
            next_number,
            reminded_ms: None,
            shutting_down: false,
            now_ms,
            policy,
        }
    }

    /// Puts a job into the queue. The second value is false when its idempotency key was known, and nothing was submitted.
    pub fn submit(
        &mut self,
        now_ms: u64,
        job: NewJob,
    ) -> Result<(JobId, bool, Vec<SchedulerAction>), SubmitError> {
        let same_key = self
            .jobs
            .values()
            .find(|it| !job.key.is_empty() && it.job.key == job.key);
        if let Some(known) = same_key {
            if known.job.config_toml == job.config_toml {
                return Ok((known.job.id.clone(), false, Vec::new()));
            }
            return Err(SubmitError::KeyTaken {
                key: job.key,
                id: known.job.id.clone(),
            });
        }
        if self.shutting_down {
            return Err(SubmitError::ShuttingDown);
        }
        if let Some((_, other)) = self.unended(&job.id) {
            return Err(SubmitError::NameTaken {
                state: view::state(other),
                id: job.id,
            });
        }
        if self.jobs.values().filter(|it| !it.has_ended()).count() >= JOBS_MAX {
            return Err(SubmitError::Full);
        }
        let id = job.id.clone();
        // The run directory is the same, so that only the newest entry of a name tells what became of it.
        self.jobs.retain(|_, it| it.job.id != id);
        let mut actions = vec![SchedulerAction::Journal(JobRecord::Submitted {
            job: job.clone(),
        })];
        actions.push(note("submit", format!("job {id} is queued")));
        let number = self.next_number;
        self.next_number += 1;
        self.jobs.insert(
            number,
            Entry {
                job,
                attempts: Attempts::default(),
                committed: Step(0),
                state: State::Queued {
                    not_before_ms: now_ms,
                },
            },
        );
        self.start_jobs(now_ms, &mut actions);
        Ok((id, true, actions))
    }

    /// Takes an event in at `now_ms`, which never goes back, and says what to do.
    pub fn handle(&mut self, now_ms: u64, event: SchedulerEvent) -> Vec<SchedulerAction> {
        let mut actions = Vec::new();
        match event {
            SchedulerEvent::Joined {
                incarnation,
                profile,
                job,
            } => self.joined(now_ms, incarnation, profile, job, &mut actions),
            SchedulerEvent::Heard { incarnation } => self.pool.heard(now_ms, incarnation),
            SchedulerEvent::Leaving {
                incarnation,
                reason,
            } => self.leaving(incarnation, &reason, &mut actions),
            SchedulerEvent::Gone { incarnation } => self.gone(incarnation, &mut actions),
            SchedulerEvent::Released { id } => self.released(&id),
            SchedulerEvent::Ended {
                id,
                outcome,
                committed,
            } => self.ended(now_ms, &id, outcome, committed, &mut actions),
            SchedulerEvent::CancelRequested { id, reason } => {
                self.cancel(&id, reason, &mut actions);
            }
            SchedulerEvent::DrainRequested { name } => self.drain(&name, &mut actions),
            SchedulerEvent::ShutdownRequested { reason } => self.shut_down(&reason, &mut actions),
            SchedulerEvent::Tick => self.tick(now_ms, &mut actions),
        }
        self.start_jobs(now_ms, &mut actions);
        actions
    }

    /// When to hand in [`SchedulerEvent::Tick`]; `None` while there is nothing to wait for.
    pub fn next_deadline(&self) -> Option<u64> {
        let policy = &self.policy;
        let idle = self.pool.first_silent(policy.heartbeat_timeout_ms);
        let pause = self.jobs.values().filter_map(|it| match it.state {
            State::Queued { not_before_ms } => Some(not_before_ms),
            _ => None,
        });
        // A job whose pause is over waits for workers, whose coming is an event.
        let pause = pause.filter(|at_ms| *at_ms > self.now_ms);
        let remind = self.reminded_ms.map(|at_ms| at_ms + policy.remind_ms);
        idle.into_iter().chain(pause).chain(remind).min()
    }

    /// Whether every job has stopped after [`SchedulerEvent::ShutdownRequested`].
    pub fn is_shut_down(&self) -> bool {
        let runs = |it: &Entry| matches!(it.state, State::Running { .. });
        self.shutting_down && !self.jobs.values().any(runs)
    }

    fn joined(
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
        let found = found.map(|(_, entry)| &entry.state);
        let runs = matches!(found, Some(State::Running { works: true, .. }));
        let queued = matches!(found, Some(State::Queued { .. }));
        if let Some(id) = &job
            && !runs
            && !queued
        {
            let reason = format!("job {id} needs no worker any more");
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

    fn leaving(
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

    fn gone(&mut self, incarnation: Incarnation, actions: &mut Vec<SchedulerAction>) {
        if let Some(worker) = self.pool.remove(incarnation)
            && worker.job.is_none()
        {
            let text = format!(
                "worker {} was lost: its connection closed",
                worker.profile.name
            );
            actions.push(note("lost", text));
        }
    }

    fn drain(&mut self, name: &str, actions: &mut Vec<SchedulerAction>) {
        let Some(incarnation) = self.pool.of_name(name) else {
            return;
        };
        self.leaving(incarnation, "drained", actions);
    }

    fn cancel(&mut self, id: &JobId, reason: String, actions: &mut Vec<SchedulerAction>) {
        let Some((number, entry)) = self.unended(id) else {
            return;
        };
        match &entry.state {
            State::Running { .. } => {
                let told = format!("cancelled: {reason}");
                if let Some(Entry {
                    state: State::Running { stopping, .. },
                    ..
                }) = self.jobs.get_mut(&number)
                {
                    // A cancellation outweighs a pause.
                    *stopping = Some(Stopping::Cancel { reason });
                }
                actions.push(note("cancel", format!("job {id} is to stop, {told}")));
                actions.push(SchedulerAction::StopJob {
                    id: id.clone(),
                    reason: told,
                });
            }
            State::Queued { .. } => self.end(number, Ending::Cancelled { reason }, actions),
            State::Ended(_) => {}
        }
    }

    /// Stops a running job, which goes on later.
    fn pause(&mut self, id: &JobId, reason: String, actions: &mut Vec<SchedulerAction>) {
        let Some((number, _)) = self.unended(id) else {
            return;
        };
        let Some(Entry {
            state: State::Running { stopping, .. },
            ..
        }) = self.jobs.get_mut(&number)
        else {
            return;
        };
        if stopping.is_none() {
            *stopping = Some(Stopping::Pause {
                reason: reason.clone(),
            });
            actions.push(note(
                "pause",
                format!("job {id} saves and pauses: {reason}"),
            ));
            actions.push(SchedulerAction::StopJob {
                id: id.clone(),
                reason,
            });
        }
    }

    fn shut_down(&mut self, reason: &str, actions: &mut Vec<SchedulerAction>) {
        self.shutting_down = true;
        let running: Vec<JobId> = self
            .jobs
            .values()
            .filter(|it| matches!(it.state, State::Running { .. }))
            .map(|it| it.job.id.clone())
            .collect();
        for id in running {
            self.pause(&id, format!("the coordinator leaves ({reason})"), actions);
        }
    }

    /// An attempt needs no workers any more.
    fn released(&mut self, id: &JobId) {
        self.pool.forget_job(id);
        let number = self.unended(id).map(|(number, _)| number);
        if let Some(number) = number
            && let Some(Entry {
                state: State::Running { works, .. },
                ..
            }) = self.jobs.get_mut(&number)
        {
            *works = false;
        }
    }

    /// An attempt ended: the job has, or goes back into the queue at its place.
    fn ended(
        &mut self,
        now_ms: u64,
        id: &JobId,
        outcome: Outcome,
        committed: Step,
        actions: &mut Vec<SchedulerAction>,
    ) {
        let Some((number, entry)) = self.unended(id) else {
            return;
        };
        let State::Running { stopping, .. } = entry.state.clone() else {
            return;
        };
        self.pool.forget_job(id);
        let entry = self.jobs.get_mut(&number).expect("it was just found");
        entry.committed = committed;
        let policy = &self.policy;
        match (outcome, stopping) {
            (Outcome::Completed, _) => self.end(number, Ending::Completed, actions),
            (Outcome::Interrupted { .. }, Some(Stopping::Cancel { reason })) => {
                self.end(number, Ending::Cancelled { reason }, actions);
            }
            (Outcome::Interrupted { .. }, _) => {
                // It stopped as asked, with its state saved: no failure.
                entry.state = State::Queued {
                    not_before_ms: now_ms,
                };
                let text = format!("job {id} waits to go on from step {committed}");
                actions.push(note("queue", text));
                actions.push(SchedulerAction::Changed(id.clone()));
            }
            (Outcome::Failed { reason, .. }, Some(Stopping::Cancel { .. })) => {
                let reason = format!("cancelled, and its state could not be saved: {reason}");
                self.end(number, Ending::Cancelled { reason }, actions);
            }
            (
                Outcome::Failed {
                    cause: Cause::Temporary,
                    reason,
                },
                _,
            ) => {
                let failures = entry.attempts.failed_at(committed);
                if failures >= policy.attempts_max {
                    let reason = format!(
                        "{failures} attempts in a row ended after step {committed}, the last because {reason}; look into \
                         the workers' logs, and submit it again to go on from its last checkpoint"
                    );
                    let cause = Cause::Temporary;
                    return self.end(number, Ending::Failed { cause, reason }, actions);
                }
                let pause = policy.retry_pause_ms << (failures - 1).min(5);
                entry.state = State::Queued {
                    not_before_ms: now_ms + pause,
                };
                actions.push(note(
                    "retry",
                    format!(
                        "job {id} goes on from its last checkpoint in {} s (attempt {failures} of {} at step {committed} \
                         failed): {reason}",
                        pause as f64 / 1000.0,
                        policy.attempts_max
                    ),
                ));
                actions.push(SchedulerAction::Changed(id.clone()));
            }
            // What failed for its input, or for what nobody foresaw, fails again.
            (Outcome::Failed { cause, reason }, _) => {
                self.end(number, Ending::Failed { cause, reason }, actions);
            }
        }
    }

    fn end(&mut self, number: u64, ending: Ending, actions: &mut Vec<SchedulerAction>) {
        let Some(entry) = self.jobs.get_mut(&number) else {
            return;
        };
        let id = entry.job.id.clone();
        let text = format!("job {id} {}", view::ending(&ending));
        actions.push(SchedulerAction::Journal(JobRecord::Ended {
            id: id.clone(),
            committed: entry.committed,
            ending: ending.clone(),
        }));
        entry.state = State::Ended(ending);
        actions.push(note("done", text));
        actions.push(SchedulerAction::Changed(id));
        let ended: Vec<u64> = self
            .jobs
            .iter()
            .filter(|(_, it)| it.has_ended())
            .map(|(number, _)| *number)
            .collect();
        for number in ended.iter().rev().skip(ENDED_MAX) {
            self.jobs.remove(number);
        }
    }

    /// Gives workers to jobs: those that hold a queued job's state to it; idle ones to running jobs that lost some, then to the
    /// head of the queue, as long as there are enough of them, then to running jobs that take more.
    fn start_jobs(&mut self, now_ms: u64, actions: &mut Vec<SchedulerAction>) {
        self.now_ms = now_ms;
        if self.shutting_down {
            return;
        }
        let queued = self.jobs.iter();
        let queued = queued.filter(|(_, it)| matches!(it.state, State::Queued { .. }));
        let queued: Vec<u64> = queued.map(|(number, _)| *number).collect();
        for number in queued {
            let holders = self.pool.holders_of(&self.jobs[&number].job.id);
            if !holders.is_empty() {
                self.start(number, holders, true, actions);
            }
        }
        self.lend(|job| job.workers, actions);
        loop {
            let head = self.ready_head(now_ms);
            let Some((number, wanted)) = head.map(|(number, it)| (number, it.job.workers)) else {
                self.reminded_ms = None;
                return self.lend(|job| job.workers_max.max(job.workers), actions);
            };
            let Some(workers) = self.pool.idle(wanted as usize) else {
                self.reminded_ms.get_or_insert(now_ms);
                return;
            };
            self.reminded_ms = None;
            self.start(number, workers, false, actions);
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

    /// Lends idle workers to running jobs that have fewer than `wanted`.
    fn lend(&mut self, wanted: impl Fn(&NewJob) -> u32, actions: &mut Vec<SchedulerAction>) {
        for entry in self.jobs.values() {
            let State::Running {
                works: true,
                stopping: None,
            } = entry.state
            else {
                continue;
            };
            let id = &entry.job.id;
            let missing = wanted(&entry.job) as usize;
            let missing = missing.saturating_sub(self.pool.count_of(id));
            for _ in 0..missing {
                let Some(worker) = self.pool.idle(1) else {
                    return;
                };
                self.pool.assign(&worker, id);
                let names = self.pool.names(&worker).join(", ");
                actions.push(note("lend", format!("worker {names} is lent to job {id}")));
                actions.push(SchedulerAction::Lend {
                    id: id.clone(),
                    incarnation: worker[0],
                });
            }
        }
    }

    /// The first job of the queue.
    fn head(&self) -> Option<(u64, &Entry)> {
        let mut queue = self.jobs.iter();
        queue
            .find(|(_, it)| matches!(it.state, State::Queued { .. }))
            .map(|(number, it)| (*number, it))
    }

    /// The same once its pause is over.
    fn ready_head(&self, now_ms: u64) -> Option<(u64, &Entry)> {
        self.head().filter(|(_, it)| match it.state {
            State::Queued { not_before_ms } => not_before_ms <= now_ms,
            _ => false,
        })
    }

    fn tick(&mut self, now_ms: u64, actions: &mut Vec<SchedulerAction>) {
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

    /// The job of that name that has not ended.
    fn unended(&self, id: &JobId) -> Option<(u64, &Entry)> {
        let mut jobs = self.jobs.iter();
        jobs.find(|(_, it)| it.job.id == *id && !it.has_ended())
            .map(|(number, it)| (*number, it))
    }
}

impl Entry {
    fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended(_))
    }
}

fn dismiss(
    incarnation: Incarnation,
    reason: String,
    afterwards: Afterwards,
    actions: &mut Vec<SchedulerAction>,
) {
    actions.push(SchedulerAction::Dismiss {
        incarnation,
        reason,
        afterwards,
    });
}

fn note(kind: &'static str, text: String) -> SchedulerAction {
    SchedulerAction::Note(Note { kind, text })
}
