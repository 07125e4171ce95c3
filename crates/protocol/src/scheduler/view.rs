//! The queue as values for people and status pages.

use std::fmt;

use super::{Ending, Entry, Scheduler, State, Stopping};
use crate::{Incarnation, JobId, Step};

/// A job as the queue sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSummary {
    /// Its name.
    pub id: JobId,
    /// Where it is.
    pub state: JobSummaryState,
    /// What it waits for, or how it ended: a sentence.
    pub waiting: String,
    /// Its configuration.
    pub config_toml: String,
    /// Higher goes first.
    pub priority: i32,
    /// Workers that it runs on.
    pub workers: u32,
    /// How often it was started.
    pub attempts: u32,
    /// Where it stood when an attempt last ended.
    pub committed: Step,
    /// Milliseconds since 1970.
    pub submitted_unix_ms: u64,
}

/// Where a job is, for the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobSummaryState {
    /// It waits for its turn.
    Queued,
    /// It does not start until it is resumed.
    Paused,
    /// An attempt runs.
    Running,
    /// All steps are committed and saved.
    Completed,
    /// Somebody cancelled it.
    Cancelled,
    /// It could not go on.
    Failed,
}

impl JobSummaryState {
    /// Whether it will not run again.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Failed)
    }
}

impl fmt::Display for JobSummaryState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queued => "queued",
            Self::Paused => "paused",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        })
    }
}

impl Scheduler {
    /// All jobs: running ones and the queue by priority and submission, and those that ended, the newest first.
    pub fn jobs(&self) -> Vec<JobSummary> {
        let running = self.numbers(|it| matches!(it, State::Running { .. }));
        let queued = self.numbers(|it| matches!(it, State::Queued { .. }));
        let unended = running.into_iter().chain(queued);
        let unended = unended.map(|number| &self.jobs[&number]);
        let ended = self.jobs.values().rev().filter(|it| it.has_ended());
        unended.chain(ended).map(|it| self.summary(it)).collect()
    }

    /// The job of that name; without a name, the only one that has not ended.
    pub fn job(&self, id: &JobId) -> Option<JobSummary> {
        if id.0.is_empty() {
            let mut unended = self.jobs.values().filter(|it| !it.has_ended());
            let only = unended.next()?;
            return unended.next().is_none().then(|| self.summary(only));
        }
        let entry = self.jobs.values().find(|it| it.job.id == *id)?;
        Some(self.summary(entry))
    }

    /// All connected workers.
    pub fn workers(&self) -> impl Iterator<Item = (Incarnation, &super::PoolWorker)> {
        self.pool.workers()
    }

    /// Whether a worker of that name is connected.
    pub fn worker(&self, name: &str) -> Option<(Incarnation, &super::PoolWorker)> {
        let incarnation = self.pool.of_name(name)?;
        Some((incarnation, self.pool.get(incarnation)?))
    }

    /// The job that a connected worker works for.
    pub fn job_of(&self, incarnation: Incarnation) -> Option<&JobId> {
        self.pool.get(incarnation)?.job.as_ref()
    }

    /// What the head of the queue waits for, if anything does.
    pub fn waiting(&self) -> Option<String> {
        let head = &self.jobs[&self.head()?];
        Some(format!("job {} {}", head.job.id, self.sentence(head)))
    }

    fn summary(&self, entry: &Entry) -> JobSummary {
        JobSummary {
            id: entry.job.id.clone(),
            state: state(entry),
            waiting: self.sentence(entry),
            config_toml: entry.job.config_toml.clone(),
            priority: entry.job.priority,
            workers: entry.job.workers,
            attempts: entry.attempts.count(),
            committed: entry.committed,
            submitted_unix_ms: entry.job.submitted_unix_ms,
        }
    }

    fn sentence(&self, entry: &Entry) -> String {
        match &entry.state {
            State::Queued { not_before_ms } => {
                if let Some(reason) = &entry.paused {
                    let id = &entry.job.id;
                    return format!("is paused: {reason}; go on with: coordinator resume {id}");
                }
                if *not_before_ms > self.now_ms {
                    let seconds = (not_before_ms - self.now_ms) as f64 / 1000.0;
                    return format!("goes on in {seconds:.0} s");
                }
                let queued = self.numbers(|it| matches!(it, State::Queued { .. }));
                let queued = queued.iter().map(|number| &self.jobs[number]);
                let ahead = queued.take_while(|it| it.job.id != entry.job.id);
                match ahead.filter(|it| it.paused.is_none()).count() {
                    0 => self.lacks(entry),
                    1 => "waits for the job before it".into(),
                    ahead => format!("waits for the {ahead} jobs before it"),
                }
            }
            State::Running { stopping, .. } => match stopping {
                None => "runs".into(),
                Some(
                    Stopping::Cancel { reason }
                    | Stopping::Limit { reason }
                    | Stopping::Later { reason },
                ) => {
                    format!("saves and stops: {reason}")
                }
            },
            State::Ended(it) => ending(it),
        }
    }

    fn lacks(&self, entry: &Entry) -> String {
        let (wanted, idle) = (entry.job.workers, self.pool.idle_count());
        let busy = self
            .pool
            .workers()
            .filter(|(_, it)| it.job.is_some())
            .count();
        let workers = |count: usize| match count {
            1 => "1 worker".to_owned(),
            _ => format!("{count} workers"),
        };
        let mut text = format!("waits for {}: {idle} idle", workers(wanted as usize));
        if busy > 0 {
            text = format!("{text}, {busy} in other jobs");
        }
        let (coming, returning) = (self.coming(), self.pool.returning_count());
        if coming > 0 {
            text = format!("{text}, {coming} soon idle");
        }
        if (wanted as usize) > idle + busy + returning {
            let missing = wanted as usize - idle - busy - returning;
            text = format!(
                "{text}; start {} more with `worker --coordinator URL`, or submit it with a smaller cluster.workers",
                workers(missing)
            );
        }
        text
    }
}

pub(super) fn state(entry: &Entry) -> JobSummaryState {
    match &entry.state {
        State::Queued { .. } if entry.paused.is_some() => JobSummaryState::Paused,
        State::Queued { .. } => JobSummaryState::Queued,
        State::Running { .. } => JobSummaryState::Running,
        State::Ended(Ending::Completed) => JobSummaryState::Completed,
        State::Ended(Ending::Cancelled { .. }) => JobSummaryState::Cancelled,
        State::Ended(Ending::Failed { .. }) => JobSummaryState::Failed,
    }
}

pub(super) fn ending(ending: &Ending) -> String {
    match ending {
        Ending::Completed => "completed".into(),
        Ending::Cancelled { reason } => format!("was cancelled: {reason}"),
        Ending::Failed { reason, .. } => format!("failed: {reason}"),
    }
}
