//! What a coordinator writes down of its queue, and what a restarted one makes of it.

use serde::{Deserialize, Serialize};

use super::{ENDED_MAX, Ending, NewJob};
use crate::record::in_turn;
use crate::{Entry, Fence, JobId, RecoveryError, Step};

/// One record of the queue's journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum JobRecord {
    /// A coordinator took the queue over, under this record's fence.
    Opened,
    /// A job was taken.
    Submitted {
        /// What it is.
        #[serde(flatten)]
        job: NewJob,
    },
    /// An attempt began.
    Started {
        /// Whose.
        id: JobId,
    },
    /// An attempt ended, and the job goes on later.
    Stopped {
        /// Whose.
        id: JobId,
        /// Its last commit.
        committed: Step,
        /// How long it ran.
        ran_ms: u64,
    },
    /// It may not start.
    Paused {
        /// Which.
        id: JobId,
        /// Who and why.
        reason: String,
    },
    /// It may start again.
    Resumed {
        /// Which.
        id: JobId,
        /// Who and why.
        reason: String,
    },
    /// It will not run again.
    Ended {
        /// Which.
        id: JobId,
        /// Its last commit.
        committed: Step,
        /// How.
        #[serde(flatten)]
        ending: Ending,
    },
}

/// What a restarted coordinator goes on with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobsRecovery {
    /// In the order of their submission.
    pub(super) jobs: Vec<RecoveredJob>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RecoveredJob {
    pub(super) job: NewJob,
    pub(super) attempts: u32,
    pub(super) committed: Step,
    /// Of the attempts whose end was written down.
    pub(super) ran_ms: u64,
    pub(super) paused: Option<String>,
    pub(super) ending: Option<Ending>,
}

impl JobsRecovery {
    /// The shortest journal that says the same, for compaction.
    pub fn records(&self) -> Vec<JobRecord> {
        let mut records = Vec::new();
        for it in &self.jobs {
            let id = it.job.id.clone();
            records.push(JobRecord::Submitted {
                job: it.job.clone(),
            });
            for _ in 0..it.attempts {
                records.push(JobRecord::Started { id: id.clone() });
            }
            let committed = it.committed;
            if it.ending.is_none() && (committed > Step(0) || it.ran_ms > 0) {
                records.push(JobRecord::Stopped {
                    id: id.clone(),
                    committed,
                    ran_ms: it.ran_ms,
                });
            }
            if let Some(reason) = it.paused.clone() {
                let id = id.clone();
                records.push(JobRecord::Paused { id, reason });
            }
            if let Some(ending) = it.ending.clone() {
                records.push(JobRecord::Ended {
                    id,
                    committed,
                    ending,
                });
            }
        }
        records
    }
}

/// The records of a queue's journal, and the fence of whoever opens it next.
///
/// # Errors
/// A record of a coordinator that had been replaced when it was written, or one whose fence has no next.
pub fn fenced_jobs(
    entries: Vec<Entry<JobRecord>>,
) -> Result<(Vec<JobRecord>, Fence), RecoveryError> {
    in_turn(entries, &JobRecord::Opened, |_| Ok(()))
}

/// The jobs of a journal; the newest of each name, and at most [`ENDED_MAX`] that have ended.
pub fn recover_jobs(records: &[JobRecord]) -> JobsRecovery {
    let mut jobs: Vec<RecoveredJob> = Vec::new();
    for record in records {
        match record {
            JobRecord::Opened => {}
            JobRecord::Submitted { job } => {
                jobs.retain(|it| it.job.id != job.id);
                jobs.push(RecoveredJob {
                    job: job.clone(),
                    attempts: 0,
                    committed: Step(0),
                    ran_ms: 0,
                    paused: None,
                    ending: None,
                });
            }
            JobRecord::Started { id } => {
                if let Some(it) = of(&mut jobs, id) {
                    it.attempts = it.attempts.saturating_add(1);
                }
            }
            JobRecord::Stopped {
                id,
                committed,
                ran_ms,
            } => {
                if let Some(it) = of(&mut jobs, id) {
                    it.committed = *committed;
                    it.ran_ms = it.ran_ms.saturating_add(*ran_ms);
                }
            }
            JobRecord::Paused { id, reason } => {
                if let Some(it) = of(&mut jobs, id) {
                    it.paused = Some(reason.clone());
                }
            }
            JobRecord::Resumed { id, .. } => {
                if let Some(it) = of(&mut jobs, id) {
                    it.paused = None;
                }
            }
            JobRecord::Ended {
                id,
                committed,
                ending,
            } => {
                if let Some(it) = of(&mut jobs, id) {
                    it.committed = *committed;
                    // It will not start, however long it ran.
                    it.ran_ms = 0;
                    it.paused = None;
                    it.ending = Some(ending.clone());
                }
            }
        }
    }
    let ended = jobs.iter().filter(|it| it.ending.is_some()).count();
    let mut forget = ended.saturating_sub(ENDED_MAX);
    jobs.retain(|it| {
        let forgotten = it.ending.is_some() && forget > 0;
        forget -= usize::from(forgotten);
        !forgotten
    });
    JobsRecovery { jobs }
}

/// The job of a record. Nothing becomes of one that has ended.
fn of<'a>(jobs: &'a mut [RecoveredJob], id: &JobId) -> Option<&'a mut RecoveredJob> {
    jobs.iter_mut()
        .find(|it| it.job.id == *id && it.ending.is_none())
}
