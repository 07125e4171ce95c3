//! The queue of a long-lived coordinator: which job runs on which workers.
//!
//! A [`Scheduler`] knows the workers that wait (their sessions are nobody else's until a job gets them) and all jobs. It is
//! handed events with the time and answers with actions, like [`crate::Job`], which runs one attempt of one job on the
//! workers that it is given here.
//!
//! ```text
//! submitted ─► Queued ─ enough idle workers, its turn, not paused ─► Running ─ ended ─► Ended
//!                ▲                                                     │
//!                ├── too many workers lost, coordinator restarted: from what workers hold, or from the last checkpoint
//!                └── paused, or workers given to a job with a higher priority: saved before
//! ```
//! The queue is ordered by priority, then by submission: only its head may take workers, so that a large job is not starved by
//! small ones. When running jobs with a lower priority have what it lacks, the fewest of them make room (`room`). A running job
//! that lost workers gets others before jobs of its priority that wait, and more than it began with after them.
//!
//! A job ends as failed when what it needs can only come from a person: its configuration is wrong, its attempts come no
//! further, or they ran as long as they may. Making room and pausing are none of these.
//!
//! State is bounded: [`JOBS_MAX`] jobs that have not ended, [`ENDED_MAX`] that have; workers live as long as their sessions.

mod course;
mod event;
mod joining;
mod journal;
mod pool;
mod retry;
mod room;
mod starting;
mod view;

use std::collections::BTreeMap;

use crate::{Afterwards, Cause, Incarnation, JobId, Note, Step};
use pool::Pool;
use retry::Attempts;

pub use event::{NewJob, SchedulerAction, SchedulerEvent, SubmitError};
pub use journal::{JobRecord, JobsRecovery, fenced_jobs, recover_jobs};
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
    /// Silence after which an idle worker counts as lost, and one that does not come back from its job.
    pub heartbeat_timeout_ms: u64,
    /// Pause before a job that lost workers is started again.
    pub retry_pause_ms: u64,
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
    /// How long the attempts ran that have ended.
    ran_ms: u64,
    /// Why it may not start, until it is resumed.
    paused: Option<String>,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// It waits for its turn, not before this time.
    Queued { not_before_ms: u64 },
    /// An attempt runs.
    Running {
        since_ms: u64,
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
    /// It ran as long as it may.
    Limit { reason: String },
    /// It is paused, makes room for another job, or the coordinator leaves: it goes on later.
    Later { reason: String },
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
                ran_ms: it.ran_ms,
                paused: it.paused,
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
        let text = match job.priority {
            0 => format!("job {id} is queued"),
            priority => format!("job {id} is queued with priority {priority}"),
        };
        actions.push(note("submit", text));
        let number = self.next_number;
        self.next_number += 1;
        self.jobs.insert(
            number,
            Entry {
                job,
                attempts: Attempts::default(),
                committed: Step(0),
                ran_ms: 0,
                paused: None,
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
            SchedulerEvent::Heard { incarnation } => {
                // Nearly all that happens: a beat changes nothing but one deadline, and what else is due has a Tick.
                self.pool.heard(now_ms, incarnation);
                return actions;
            }
            SchedulerEvent::Leaving {
                incarnation,
                reason,
            } => self.leaving(incarnation, &reason, &mut actions),
            SchedulerEvent::Gone { incarnation } => self.gone(now_ms, incarnation, &mut actions),
            SchedulerEvent::Released { id } => self.released(now_ms, &id),
            SchedulerEvent::Ended {
                id,
                outcome,
                committed,
            } => self.ended(now_ms, &id, outcome, committed, &mut actions),
            SchedulerEvent::CancelRequested { id, reason } => {
                self.cancel(&id, reason, &mut actions);
            }
            SchedulerEvent::PauseRequested { id, reason } => {
                self.pause(&id, &reason, &mut actions);
            }
            SchedulerEvent::ResumeRequested { id, reason } => {
                self.resume(&id, &reason, &mut actions);
            }
            SchedulerEvent::DrainRequested { name } => self.drain(&name, &mut actions),
            SchedulerEvent::ShutdownRequested { reason } => self.shut_down(&reason, &mut actions),
            SchedulerEvent::Tick => self.tick(now_ms, &mut actions),
        }
        self.stop_at_limits(now_ms, &mut actions);
        self.start_jobs(now_ms, &mut actions);
        actions
    }

    /// When to hand in [`SchedulerEvent::Tick`]; `None` while there is nothing to wait for.
    pub fn next_deadline(&self) -> Option<u64> {
        let policy = &self.policy;
        let idle = self.pool.first_silent(policy.heartbeat_timeout_ms);
        let returning = self.pool.first_expected();
        let retry = self.jobs.values().filter_map(|it| match it.state {
            State::Queued { not_before_ms } if it.paused.is_none() => Some(not_before_ms),
            _ => None,
        });
        // A job whose wait is over waits for workers, whose coming is an event.
        let retry = retry.filter(|at_ms| *at_ms > self.now_ms);
        let limit = self.jobs.values().filter_map(Entry::limit_at_ms);
        let remind = self.reminded_ms.map(|at_ms| at_ms + policy.remind_ms);
        let workers = idle.into_iter().chain(returning);
        workers.chain(retry).chain(limit).chain(remind).min()
    }

    /// Whether the pool's orders in time are what they would be if they were made anew. For tests.
    #[doc(hidden)]
    pub fn orders_agree(&self) -> bool {
        self.pool.orders_agree()
    }

    /// Whether every job has stopped after [`SchedulerEvent::ShutdownRequested`].
    pub fn is_shut_down(&self) -> bool {
        let runs = |it: &Entry| matches!(it.state, State::Running { .. });
        self.shutting_down && !self.jobs.values().any(runs)
    }

    /// The job of that name that has not ended.
    fn unended(&self, id: &JobId) -> Option<(u64, &Entry)> {
        let mut jobs = self.jobs.iter();
        jobs.find(|(_, it)| it.job.id == *id && !it.has_ended())
            .map(|(number, it)| (*number, it))
    }
}

impl State {
    /// Whether an attempt runs that takes workers.
    fn takes_workers(&self) -> bool {
        matches!(
            self,
            Self::Running {
                works: true,
                stopping: None,
                ..
            }
        )
    }
}

impl Entry {
    fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended(_))
    }

    /// Its place among jobs: the first has the highest priority, then the smallest number.
    fn order(&self, number: u64) -> (std::cmp::Reverse<i32>, u64) {
        (std::cmp::Reverse(self.job.priority), number)
    }

    /// When its running attempt will have to stop, unless it stops already.
    fn limit_at_ms(&self) -> Option<u64> {
        let State::Running {
            since_ms,
            works: true,
            stopping: None,
        } = self.state
        else {
            return None;
        };
        let left_ms = self.job.run_ms_max?.saturating_sub(self.ran_ms);
        Some(since_ms.saturating_add(left_ms))
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
