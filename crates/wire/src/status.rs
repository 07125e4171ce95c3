//! A job's status, for whoever asks.

use protocol::{Job, MetricsRow, Outcome, Waiting, WorkerView};

use crate::proto::{self, JobState};

/// The status of `job` at `now_ms` of its clock; `last_row` is the last committed step's.
pub fn status(job: &Job, now_ms: u64, last_row: Option<&MetricsRow>) -> proto::Status {
    let waiting = job.waiting();
    proto::Status {
        job: job.spec().id.0.clone(),
        state: state(&waiting, job.outcome()).into(),
        waiting: match job.outcome() {
            Some(outcome) => outcome.to_string(),
            None => waiting.to_string(),
        },
        generation: job.generation().0,
        committed_step: job.committed().0,
        steps_total: job.facts().map(|facts| facts.steps_total),
        world_size: job.spec().policy.world,
        build: job.spec().build.clone(),
        workers: job
            .workers()
            .into_iter()
            .map(|it| worker(it, now_ms))
            .collect(),
        last_row: last_row.copied().map(Into::into),
    }
}

fn state(waiting: &Waiting, outcome: Option<&Outcome>) -> JobState {
    match (outcome, waiting) {
        (Some(Outcome::Completed), _) => JobState::Completed,
        (Some(Outcome::Interrupted { .. }), _) => JobState::Interrupted,
        (Some(Outcome::Failed { .. }), _) => JobState::Failed,
        (None, Waiting::Join { .. }) => JobState::Gathering,
        (None, Waiting::Ready { .. }) => JobState::Forming,
        (None, Waiting::Prepared { .. }) => JobState::Training,
        (None, Waiting::Saved { .. } | Waiting::Checkpoint { .. }) => JobState::Saving,
        (None, Waiting::Finished { .. } | Waiting::Nothing) => JobState::Finishing,
    }
}

fn worker(it: WorkerView, now_ms: u64) -> proto::WorkerStatus {
    proto::WorkerStatus {
        incarnation: it.incarnation.0,
        rank: it.rank.map(|rank| rank.0),
        address: it.address,
        generation: it.generation.0,
        phase: it.phase,
        committed_step: it.committed.0,
        silent_ms: now_ms.saturating_sub(it.last_heard_ms),
    }
}
