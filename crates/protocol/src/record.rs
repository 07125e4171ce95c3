//! The journal's records, and what a restarted coordinator makes of them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    Cause, EarlyStop, EvaluationRow, Fence, Generation, Incarnation, MetricsRow, RunFacts, Step,
};

/// A record as a journal has it: that of a run, or [`crate::JobRecord`] of the queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry<R = Record> {
    /// Who wrote it. Absent, which is 0, in journals of versions that did not fence.
    #[serde(default)]
    pub fence: Fence,
    /// What is written.
    #[serde(flatten)]
    pub record: R,
}

/// One record of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// A coordinator opened the journal, and from here on no other's records are accepted. Its first, before it says anything.
    Opened,
    /// The run is another one from here on: what was agreed on and evaluated before does not count. Only where no step was ever
    /// committed. Fences and generations go on, since somebody may still speak in an old one.
    Anew,
    /// A generation was formed.
    Generation {
        /// Its number, never used again.
        generation: Generation,
        /// Members by rank.
        members: Vec<Incarnation>,
    },
    /// All members of a generation agreed on what they train.
    Facts {
        /// What they agreed on.
        facts: RunFacts,
    },
    /// A step is committed: this record is the commit (invariant M2).
    Commit(CommitRecord),
    /// The held-out pairs were evaluated. Journaled before the next step commits and before the step's checkpoint becomes
    /// visible, so that whoever goes on from there knows it.
    Evaluation {
        /// The means.
        row: EvaluationRow,
        /// The decision that it brought: the next step is the last.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stop: Option<EarlyStop>,
    },
    /// A checkpoint became visible.
    Checkpoint {
        /// Its step.
        step: Step,
    },
    /// Commits after `to` no longer count.
    Rewind {
        /// The step whose state the run goes on from.
        to: Step,
        /// Why.
        reason: String,
    },
    /// The run is complete.
    Completed {
        /// Its last step.
        step: Step,
    },
}

/// A committed step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommitRecord {
    /// Whether the update was applied or skipped.
    pub apply: bool,
    /// Its row in `metrics.jsonl`.
    pub row: MetricsRow,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are committed and saved, or those up to an early stop.
    Completed,
    /// Somebody asked it to stop; the same command goes on.
    Interrupted {
        /// The last commit, which a checkpoint holds (or 0).
        committed: Step,
    },
    /// It could not go on.
    Failed {
        /// Who is to act.
        cause: Cause,
        /// What happened.
        reason: String,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed => write!(f, "completed"),
            Self::Interrupted { committed } => {
                write!(
                    f,
                    "interrupted after step {committed}; the same command goes on from there"
                )
            }
            Self::Failed { reason, .. } => write!(f, "failed: {reason}"),
        }
    }
}

/// What a restarted coordinator goes on from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recovery {
    /// Highest generation ever journaled; the next one is above it.
    pub generation: Generation,
    /// The commit to go on from.
    pub committed: Step,
    /// Highest commit ever journaled, rewound ones included: no worker can honestly know a later one (invariant M2).
    pub highest_committed: Step,
    /// What was agreed on, once it was.
    pub facts: Option<RunFacts>,
    /// Consecutive skipped steps up to `committed`.
    pub skipped: u64,
    /// Evaluations up to `committed`, in order.
    pub evaluations: Vec<EvaluationRow>,
    /// What the last of them decided, if it did.
    pub early_stop: Option<EarlyStop>,
    /// The run is complete.
    pub completed: bool,
    /// To be journaled before anything else: commits whose state no checkpoint holds.
    pub rewind: Option<Record>,
    /// The newest checkpoint that verifies; 0 for none. What a job whose workers lost their state goes back to.
    pub checkpoint: Step,
    /// Consecutive skipped steps up to `checkpoint`.
    pub checkpoint_skipped: u64,
    /// Whether the update of `committed` was applied, for workers that have not heard.
    pub apply: bool,
    /// The generation that committed `committed`; 0 at step 0.
    pub since: Generation,
    /// Members of the last generation, who may still hold its state.
    pub members: Vec<Incarnation>,
    /// Generations in which workers have certainly spoken: they voted on a step. What they said in older ones is stale.
    pub spoke: BTreeMap<Incarnation, Generation>,
}

/// A journal that contradicts itself or the checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryError {
    /// Commits must follow each other.
    #[error("the journal commits step {found} after step {committed}")]
    Gap {
        /// The commit before.
        committed: Step,
        /// The commit that does not follow.
        found: Step,
    },
    /// A checkpoint knows a commit that the journal does not (invariant M2).
    #[error(
        "a checkpoint holds step {checkpoint}, but the journal ends at step {committed}: it is not this run's \
         journal; restore the journal, or choose another checkpoint.path"
    )]
    CheckpointAhead {
        /// The checkpoint's step.
        checkpoint: Step,
        /// The journal's last commit.
        committed: Step,
    },
    /// Whoever opens the journal later has a higher fence, and only it may write.
    #[error(
        "record {index} was written under fence {fence}, after another coordinator had opened the journal under {newest}: \
         two coordinators worked with one journal; restore the journal as it was before"
    )]
    Replaced {
        /// The record's place, from 1.
        index: usize,
        /// Its own.
        fence: Fence,
        /// The highest before it.
        newest: Fence,
    },
    /// Evaluations and checkpoints are of committed steps, and a run is complete with its last commit.
    #[error("the journal {what} step {step} when step {committed} is its last commit")]
    Misplaced {
        /// What it does with the step: `evaluates`, `saves`, `ends with`, `begins anew at`.
        what: &'static str,
        /// Which.
        step: Step,
        /// The commit before.
        committed: Step,
    },
    /// Fences and generations are counted up from 1, and the next one must be a number still.
    #[error("{number} stands for its {what}, and no run comes that far")]
    OutOfRange {
        /// Its `fence` or `generation`.
        what: &'static str,
        /// What it says.
        number: u64,
    },
    /// One of these, and the record in which it came to light.
    #[error("record {index}: {source}")]
    At {
        /// The record's place, from 1.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: Box<RecoveryError>,
    },
    /// A rewind must go back.
    #[error("the journal rewinds to step {to} from step {committed}")]
    RewindForward {
        /// Its target.
        to: Step,
        /// The commit it starts from.
        committed: Step,
    },
}

/// Fences and generations are below, so that there is a next one; a worker that speaks of a higher one is not believed.
pub(crate) const COUNTED_MAX: u64 = 1 << 63;

/// The journal's records, and the fence of whoever opens it next.
///
/// # Errors
/// [`RecoveryError::Replaced`] or [`RecoveryError::At`]: a record of a coordinator that had been replaced when it was written, or
/// one that cannot follow those before it.
pub fn fenced(entries: Vec<Entry>) -> Result<(Vec<Record>, Fence), RecoveryError> {
    let mut commits = Vec::new();
    let follow = |record: &Record| follow(&mut commits, record);
    in_turn(entries, &Record::Opened, follow)
}

/// The records but `opened`, and the fence of whoever opens the journal next; `follow` judges each beside those before it.
pub(crate) fn in_turn<R: PartialEq>(
    entries: Vec<Entry<R>>,
    opened: &R,
    mut follow: impl FnMut(&R) -> Result<(), RecoveryError>,
) -> Result<(Vec<R>, Fence), RecoveryError> {
    let mut newest = Fence(0);
    for (index, entry) in entries.iter().enumerate() {
        let opens = entry.record == *opened;
        if entry.fence < newest || (opens && entry.fence == newest) {
            return Err(RecoveryError::Replaced {
                index: index + 1,
                fence: entry.fence,
                newest,
            });
        }
        newest = entry.fence;
        // The next one is written by whoever opens the journal, who must be able to open it again.
        let followed =
            in_range("fence", newest.0.saturating_add(1)).and_then(|()| follow(&entry.record));
        followed.map_err(|source| RecoveryError::At {
            index: index + 1,
            source: Box::new(source),
        })?;
    }
    let records = entries.into_iter().map(|it| it.record);
    let records = records.filter(|it| it != opened);
    Ok((records.collect(), Fence(newest.0 + 1)))
}

/// The commits that count: the journal minus its rewinds, in order, one a step (invariant M3).
///
/// # Errors
/// A record that cannot follow those before it.
pub fn surviving(records: &[Record]) -> Result<Vec<CommitRecord>, RecoveryError> {
    let mut commits = Vec::new();
    for record in records {
        follow(&mut commits, record)?;
    }
    Ok(commits)
}

/// Takes the next record in, given the commits that count before it.
fn follow(commits: &mut Vec<CommitRecord>, record: &Record) -> Result<(), RecoveryError> {
    let committed = Step(commits.len() as u64);
    match record {
        Record::Commit(commit) => {
            let found = Step(commit.row.report.step);
            if found != committed.next() {
                return Err(RecoveryError::Gap { committed, found });
            }
            in_range("generation", commit.row.generation)?;
            commits.push(*commit);
        }
        Record::Rewind { to, .. } => {
            if *to > committed {
                return Err(RecoveryError::RewindForward { to: *to, committed });
            }
            commits.truncate(to.0 as usize);
        }
        Record::Evaluation { row, stop } => {
            let decided = stop.as_ref().map_or(0, |stop| stop.step);
            let step = Step(row.step.max(decided));
            if step > committed {
                return Err(misplaced("evaluates", step, committed));
            }
        }
        Record::Checkpoint { step } => {
            if *step > committed {
                return Err(misplaced("saves", *step, committed));
            }
        }
        Record::Completed { step } => {
            if *step != committed {
                return Err(misplaced("ends with", *step, committed));
            }
        }
        Record::Generation { generation, .. } => in_range("generation", generation.0)?,
        Record::Anew if committed > Step(0) => {
            return Err(misplaced("begins anew at", Step(0), committed));
        }
        Record::Opened | Record::Anew | Record::Facts { .. } => {}
    }
    Ok(())
}

fn in_range(what: &'static str, number: u64) -> Result<(), RecoveryError> {
    if number >= COUNTED_MAX {
        return Err(RecoveryError::OutOfRange { what, number });
    }
    Ok(())
}

fn misplaced(what: &'static str, step: Step, committed: Step) -> RecoveryError {
    RecoveryError::Misplaced {
        what,
        step,
        committed,
    }
}

/// What the last surviving evaluation that decided something decided; whether the run then ended by it,
/// [`EarlyStop::ended`] tells.
pub fn early_stop(records: &[Record]) -> Option<EarlyStop> {
    evaluated(records, Step(u64::MAX)).1
}

/// Surviving evaluations up to `last`, one a step, and what was decided by one of them.
fn evaluated(records: &[Record], last: Step) -> (Vec<EvaluationRow>, Option<EarlyStop>) {
    let mut rows: Vec<EvaluationRow> = Vec::new();
    let mut decided: Option<EarlyStop> = None;
    let end = Record::Rewind {
        to: last,
        reason: "nothing later counts".into(),
    };
    for record in records.iter().chain([&end]) {
        match record {
            Record::Evaluation { row, stop } => {
                if rows.last().is_none_or(|before| before.step < row.step) {
                    rows.push(*row);
                }
                if stop.is_some() {
                    decided.clone_from(stop);
                }
            }
            Record::Anew => {
                rows.clear();
                decided = None;
            }
            Record::Rewind { to, .. } => {
                rows.retain(|row| row.step <= to.0);
                decided.take_if(|stop| stop.step > to.0);
            }
            _ => {}
        }
    }
    (rows, decided)
}

/// The newest checkpoint that the journal knows of and no rewind has passed over; step 0 if there is none.
pub fn saved(records: &[Record]) -> Step {
    records.iter().fold(Step(0), |newest, record| match record {
        Record::Checkpoint { step } => newest.max(*step),
        Record::Rewind { to, .. } => newest.min(*to),
        _ => newest,
    })
}

/// What to go on from, given the journal and the newest checkpoint that verifies.
///
/// All workers are gone when a local coordinator starts, so commits beyond the checkpoint are rewound.
///
/// # Errors
/// A journal that contradicts itself or the checkpoint.
pub fn recover(
    records: &[Record],
    newest_checkpoint: Option<Step>,
) -> Result<Recovery, RecoveryError> {
    let mut recovery = recover_living(records, newest_checkpoint)?;
    let (to, journaled) = (recovery.checkpoint, recovery.committed);
    if recovery.completed || to == journaled {
        return Ok(recovery);
    }
    recovery.committed = to;
    recovery.skipped = recovery.checkpoint_skipped;
    (recovery.evaluations, recovery.early_stop) = evaluated(records, to);
    recovery.rewind = Some(Record::Rewind {
        to,
        reason: format!(
            "the newest checkpoint holds step {to}; steps up to {journaled} are computed again"
        ),
    });
    Ok(recovery)
}

/// The same for a job whose workers outlive its coordinator: they may hold what was committed after the checkpoint,
/// so nothing is rewound before they had the time to say so.
///
/// # Errors
/// As [`recover`].
pub fn recover_living(
    records: &[Record],
    newest_checkpoint: Option<Step>,
) -> Result<Recovery, RecoveryError> {
    let commits = surviving(records)?;
    let committed = Step(commits.len() as u64);
    let checkpoint = newest_checkpoint.unwrap_or_default();
    if checkpoint > committed {
        return Err(RecoveryError::CheckpointAhead {
            checkpoint,
            committed,
        });
    }
    let last = commits.last();
    let mut recovery = Recovery {
        committed,
        skipped: skipped(&commits),
        checkpoint,
        checkpoint_skipped: skipped(&commits[..checkpoint.0 as usize]),
        apply: last.is_some_and(|commit| commit.apply),
        since: Generation(last.map_or(0, |commit| commit.row.generation)),
        ..Recovery::default()
    };
    for record in records {
        match record {
            Record::Generation {
                generation,
                members,
            } => {
                recovery.generation = recovery.generation.max(*generation);
                recovery.members.clone_from(members);
            }
            Record::Facts { facts } => recovery.facts = Some(facts.clone()),
            Record::Anew => {
                recovery.facts = None;
                recovery.members.clear();
            }
            Record::Completed { .. } => recovery.completed = true,
            Record::Rewind { .. } => recovery.completed = false,
            Record::Commit(commit) => {
                let step = Step(commit.row.report.step);
                recovery.highest_committed = recovery.highest_committed.max(step);
                let voted = recovery.members.iter().map(|it| (*it, recovery.generation));
                recovery.spoke.extend(voted);
            }
            Record::Opened | Record::Checkpoint { .. } | Record::Evaluation { .. } => {}
        }
    }
    (recovery.evaluations, recovery.early_stop) = evaluated(records, committed);
    Ok(recovery)
}

/// Consecutive skipped steps at the end of `commits`.
fn skipped(commits: &[CommitRecord]) -> u64 {
    let run = commits.iter().rev().take_while(|commit| !commit.apply);
    run.count() as u64
}
