//! What a coordinator writes down of its queue, and what a restarted one makes of it.

use serde::{Deserialize, Serialize};

use super::{ENDED_MAX, Ending, NewJob};
use crate::{JobId, Step};

/// One record of the queue's journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum JobRecord {
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
            if let Some(ending) = it.ending.clone() {
                let committed = it.committed;
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

/// The jobs of a journal; the newest of each name, and at most [`ENDED_MAX`] that have ended.
pub fn recover_jobs(records: &[JobRecord]) -> JobsRecovery {
    let mut jobs: Vec<RecoveredJob> = Vec::new();
    for record in records {
        match record {
            JobRecord::Submitted { job } => {
                jobs.retain(|it| it.job.id != job.id);
                jobs.push(RecoveredJob {
                    job: job.clone(),
                    attempts: 0,
                    committed: Step(0),
                    ending: None,
                });
            }
            JobRecord::Started { id } => {
                if let Some(it) = of(&mut jobs, id) {
                    it.attempts += 1;
                }
            }
            JobRecord::Ended {
                id,
                committed,
                ending,
            } => {
                if let Some(it) = of(&mut jobs, id) {
                    it.committed = *committed;
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

fn of<'a>(jobs: &'a mut [RecoveredJob], id: &JobId) -> Option<&'a mut RecoveredJob> {
    jobs.iter_mut().find(|it| it.job.id == *id)
}
