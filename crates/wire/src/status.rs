//! Jobs and workers, for whoever asks.

use protocol::{
    Incarnation, Job, JobSummary, JobSummaryState, Liveness, MetricsRow, Outcome, PoolWorker,
    Waiting, WorkerView,
};

use crate::proto::{self, JobState};

/// `job` as it is at `now_ms` of its clock; `last_row` is the last committed step's. What only its shell knows (events,
/// output, submission) is left empty.
pub fn running_job(job: &Job, now_ms: u64, last_row: Option<&MetricsRow>) -> proto::Job {
    let waiting = job.waiting();
    proto::Job {
        name: job.spec().id.0.clone(),
        state: state(&waiting, job.outcome()).into(),
        waiting: match job.outcome() {
            Some(outcome) => outcome.to_string(),
            None => waiting.to_string(),
        },
        generation: job.generation().0,
        committed_step: job.committed().0,
        steps_total: job.facts().map(|facts| facts.steps_total),
        world_size: job.world(),
        workers: job
            .workers()
            .into_iter()
            .map(|it| worker(it, now_ms, job.spec().policy.heartbeat_timeout_ms))
            .collect(),
        last_row: last_row.copied().map(Into::into),
        ..proto::Job::default()
    }
}

/// A job as the queue sees it.
pub fn queued_job(it: JobSummary) -> proto::Job {
    let state = match it.state {
        JobSummaryState::Queued => JobState::Queued,
        JobSummaryState::Paused => JobState::Paused,
        JobSummaryState::Running => JobState::Gathering,
        JobSummaryState::Completed => JobState::Completed,
        JobSummaryState::Cancelled => JobState::Cancelled,
        JobSummaryState::Failed => JobState::Failed,
    };
    proto::Job {
        name: it.id.0,
        state: state.into(),
        waiting: it.waiting,
        world_size: it.workers,
        attempts: it.attempts,
        committed_step: it.committed.0,
        submitted_unix_ms: it.submitted_unix_ms,
        priority: it.priority,
        ..proto::Job::default()
    }
}

/// A connected worker of a coordinator that serves job after job.
pub fn pool_worker(incarnation: Incarnation, it: &PoolWorker, now_ms: u64) -> proto::Worker {
    proto::Worker {
        name: it.profile.name.clone(),
        incarnation: incarnation.0,
        address: it.profile.address.clone(),
        device: it.profile.device.clone(),
        job: it.job.as_ref().map(|id| id.0.clone()).unwrap_or_default(),
        draining: it.draining,
        silent_ms: match it.job {
            None => Some(now_ms.saturating_sub(it.last_heard_ms)),
            Some(_) => None,
        },
    }
}

/// Where `job` is.
pub fn job_state(job: &Job) -> JobState {
    state(&job.waiting_in_short(), job.outcome())
}

fn state(waiting: &Waiting, outcome: Option<&Outcome>) -> JobState {
    match (outcome, waiting) {
        (Some(Outcome::Completed), _) => JobState::Completed,
        (Some(Outcome::Interrupted { .. }), _) => JobState::Interrupted,
        (Some(Outcome::Failed { .. }), _) => JobState::Failed,
        (None, Waiting::Join { .. } | Waiting::Joiner { .. }) => JobState::Gathering,
        (None, Waiting::Left { .. } | Waiting::Ready { .. }) => JobState::Forming,
        (None, Waiting::Prepared { .. } | Waiting::Evaluated { .. }) => JobState::Training,
        (None, Waiting::Saved { .. } | Waiting::Checkpoint { .. }) => JobState::Saving,
        (None, Waiting::Finished { .. } | Waiting::Nothing) => JobState::Finishing,
    }
}

fn worker(it: WorkerView, now_ms: u64, timeout_ms: u64) -> proto::WorkerStatus {
    proto::WorkerStatus {
        incarnation: it.incarnation.0,
        name: it.name,
        rank: it.rank.map(|rank| rank.0),
        address: it.address,
        generation: it.generation.0,
        phase: it.phase,
        committed_step: it.committed.0,
        silent_ms: now_ms.saturating_sub(it.last_heard_ms),
        liveness: match it.pulse.liveness(now_ms, timeout_ms) {
            Liveness::Green => proto::Liveness::Unspecified,
            Liveness::Yellow => proto::Liveness::Late,
            Liveness::Red => proto::Liveness::Lost,
        }
        .into(),
        spare: it.spare,
    }
}
