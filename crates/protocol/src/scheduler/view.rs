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
    /// An attempt runs.
    Running,
    /// All steps are committed and saved.
    Completed,
    /// Somebody cancelled it.
    Cancelled,
    /// It could not go on.
    Failed,
}

impl fmt::Display for JobSummaryState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        })
    }
}

impl Scheduler {
    /// All jobs: running ones, the queue in its order, and those that ended, the newest first.
    pub fn jobs(&self) -> Vec<JobSummary> {
        let summary = |it: &Entry| self.summary(it);
        let of =
            |wanted: fn(&State) -> bool| self.jobs.values().filter(move |it| wanted(&it.state));
        let running = of(|it| matches!(it, State::Running { .. }));
        let queued = of(|it| matches!(it, State::Queued { .. }));
        let ended = self.jobs.values().rev().filter(|it| it.has_ended());
        running.chain(queued).chain(ended).map(summary).collect()
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

    /// What the head of the queue waits for, if anything does.
    pub fn waiting(&self) -> Option<String> {
        let (_, head) = self.head()?;
        Some(format!("job {} {}", head.job.id, self.sentence(head)))
    }

    fn summary(&self, entry: &Entry) -> JobSummary {
        JobSummary {
            id: entry.job.id.clone(),
            state: state(entry),
            waiting: self.sentence(entry),
            config_toml: entry.job.config_toml.clone(),
            workers: entry.job.workers,
            attempts: entry.attempts.count(),
            committed: entry.committed,
            submitted_unix_ms: entry.job.submitted_unix_ms,
        }
    }

    fn sentence(&self, entry: &Entry) -> String {
        match &entry.state {
            State::Queued { not_before_ms } if *not_before_ms > self.now_ms => {
                let seconds = (not_before_ms - self.now_ms) as f64 / 1000.0;
                format!("goes on in {seconds:.0} s")
            }
            State::Queued { .. } => {
                let ahead = self
                    .jobs
                    .values()
                    .take_while(|it| it.job.id != entry.job.id)
                    .filter(|it| matches!(it.state, State::Queued { .. }))
                    .count();
                match ahead {
                    0 => self.lacks(entry),
                    1 => "waits for the job before it".into(),
                    _ => format!("waits for the {ahead} jobs before it"),
                }
            }
            State::Running { stopping, .. } => match stopping {
                None => "runs".into(),
                Some(Stopping::Cancel { reason } | Stopping::Pause { reason }) => {
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
        if (wanted as usize) > idle + busy {
            let missing = wanted as usize - idle - busy;
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
