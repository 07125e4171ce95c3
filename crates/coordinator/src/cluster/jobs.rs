//! The state folder of a coordinator that serves job after job.
//!
//! ```text
//! jobs.log   what became of every job: one checksummed record per decision (storage::log), each under the fence of the coordinator
//!            that wrote it; at each start another file, as short as can be, takes its place
//! .lock      held by the coordinator that works here
//! ```
//! The lock keeps a second coordinator out. Where it does not, the fence does: whoever took the folder over has put another file in
//! place, and the one before it finds that, before its next record, and ends.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use protocol::{
    Entry, Fence, JobRecord, JobsRecovery, NAME_RULE, fenced_jobs, is_name, recover_jobs,
};
use storage::Lock;
use storage::log::Log;

const JOURNAL: &str = "jobs.log";

/// The queue's journal, held by this process alone.
pub(super) struct Jobs {
    path: PathBuf,
    log: Log,
    fence: Fence,
    /// What the journal says.
    pub(super) recovery: JobsRecovery,
    _lock: Lock,
}

/// Opens the folder, or makes it, and takes it over.
///
/// # Errors
/// Another coordinator works there; damage.
pub(super) fn open(folder: &Path) -> anyhow::Result<Jobs> {
    storage::create_directory(folder)?;
    let lock = Lock::acquire(&folder.join(".lock"))
        .context("cluster.state: another coordinator works on this folder")?;
    let path = folder.join(JOURNAL);
    let opened = Log::open(&path)?;
    if opened.torn_bytes > 0 {
        tracing::warn!(
            torn_bytes = opened.torn_bytes,
            "the last record of {} was torn and is cut off",
            path.display()
        );
    }
    let mut entries = Vec::new();
    for (index, payload) in opened.records.iter().enumerate() {
        let entry = parse(payload)
            .with_context(|| format!("read record {} of {}", index + 1, path.display()))?;
        entries.push(entry);
    }
    let (records, fence) =
        fenced_jobs(entries).with_context(|| format!("read {}", path.display()))?;
    let recovery = recover_jobs(&records);
    Ok(Jobs {
        log: take_over(&path, fence, &recovery)?,
        path,
        fence,
        recovery,
        _lock: lock,
    })
}

impl Jobs {
    /// Appends a record; durable when it returns.
    ///
    /// # Errors
    /// Also another coordinator that has taken the folder over: the record is not in its journal, and this one must not go on.
    pub(super) fn journal(&mut self, record: JobRecord) -> anyhow::Result<()> {
        if !self.log.is_as_left()? {
            bail!(
                "{} is not as this coordinator left it under fence {}: another one has taken the service over; let that one \
                 go on",
                self.path.display(),
                self.fence
            );
        }
        append(&mut self.log, self.fence, record)
    }
}

fn append(log: &mut Log, fence: Fence, record: JobRecord) -> anyhow::Result<()> {
    let payload = serde_json::to_vec(&Entry { fence, record }).context("write a record as JSON")?;
    Ok(log.append(&payload)?)
}

fn parse(payload: &[u8]) -> anyhow::Result<Entry<JobRecord>> {
    let entry: Entry<JobRecord> = serde_json::from_slice(payload)?;
    if let JobRecord::Submitted { job } = &entry.record {
        // It becomes the name of files, and stands on command lines.
        ensure!(
            is_name(&job.id.0),
            "{:?} is no job's name, which has {NAME_RULE}",
            job.id.0
        );
    }
    Ok(entry)
}

/// Puts a journal in place that says no more than is needed, and under whose fence: beside it, then renamed.
fn take_over(path: &Path, fence: Fence, recovery: &JobsRecovery) -> anyhow::Result<Log> {
    let beside = path.with_extension("log.new");
    if beside.exists() {
        storage::remove_file(&beside)?;
    }
    let mut log = Log::open(&beside)?.log;
    append(&mut log, fence, JobRecord::Opened)?;
    for record in recovery.records() {
        append(&mut log, fence, record)?;
    }
    drop(log);
    storage::rename(&beside, path)?;
    Ok(Log::open(path)?.log)
}

#[cfg(test)]
#[path = "../../../storage/tests/fuzz/mod.rs"]
mod fuzz;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use std::fs;

    use proptest::{collection::vec, prelude::*, sample::Index, test_runner::TestCaseError};
    use protocol::{
        Cause, Ending, JobId, NewJob, Scheduler, SchedulerEvent, SchedulerPolicy, Step,
    };

    use super::{
        fuzz::{edited, edits, fuzz},
        *,
    };

    fn submitted(id: &str) -> JobRecord {
        let job = NewJob {
            id: JobId(id.into()),
            key: format!("key-{id}"),
            config_toml: "[job]".into(),
            workers: 2,
            workers_max: 3,
            priority: -1,
            run_ms_max: Some(3_600_000),
            attempts_max: 5,
            submitted_unix_ms: 1_700_000_000_000,
        };
        JobRecord::Submitted { job }
    }

    /// A journal of three jobs: one has ended, one was stopped and paused, one runs.
    fn whole() -> Vec<Vec<u8>> {
        let [a, b, c] = ["a", "b", "c"].map(|id| JobId(id.into()));
        let reason = || "somebody asked for it".to_owned();
        let stopped = |id: &JobId, committed| JobRecord::Stopped {
            id: id.clone(),
            committed: Step(committed),
            ran_ms: 60_000,
        };
        let records = [
            submitted("a"),
            JobRecord::Started { id: a.clone() },
            submitted("b"),
            stopped(&a, 7),
            JobRecord::Started { id: b.clone() },
            JobRecord::Paused {
                id: a.clone(),
                reason: reason(),
            },
            JobRecord::Resumed {
                id: a.clone(),
                reason: reason(),
            },
            JobRecord::Started { id: a.clone() },
            JobRecord::Ended {
                id: a,
                committed: Step(9),
                ending: Ending::Failed {
                    cause: Cause::Fatal,
                    reason: reason(),
                },
            },
            stopped(&b, 3),
            JobRecord::Paused {
                id: b,
                reason: reason(),
            },
            submitted("c"),
            JobRecord::Started { id: c },
        ];
        let records = records.iter();
        records.map(|it| serde_json::to_vec(it).unwrap()).collect()
    }

    /// The queue goes on with what was read, and reads the same again.
    fn check(folder: &Path, payloads: &[Vec<u8>]) -> Result<bool, TestCaseError> {
        let path = folder.join(JOURNAL);
        drop(fs::remove_file(&path));
        let mut log = Log::open(&path).unwrap().log;
        for payload in payloads {
            log.append(payload).unwrap();
        }
        drop(log);
        let jobs = match open(folder) {
            Ok(jobs) => jobs,
            Err(error) => {
                let text = format!("{error:#}");
                prop_assert!(text.contains("record "), "{text}");
                prop_assert!(text.contains(JOURNAL), "{text}");
                return Ok(false);
            }
        };
        let recovery = jobs.recovery.clone();
        drop(jobs);
        prop_assert_eq!(&recover_jobs(&recovery.records()), &recovery);
        prop_assert_eq!(&open(folder).unwrap().recovery, &recovery);
        let policy = SchedulerPolicy {
            build: "build".into(),
            heartbeat_timeout_ms: 5_000,
            retry_pause_ms: 1_000,
            return_ms: 30_000,
            remind_ms: 60_000,
        };
        let mut scheduler = Scheduler::new(policy, recovery, 0);
        for now_ms in [1, 40_000, 200_000] {
            scheduler.handle(now_ms, SchedulerEvent::Tick);
        }
        Ok(true)
    }

    #[test]
    fn a_coordinator_whose_folder_was_taken_over_writes_nothing_more() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path();
        let mut first = open(folder).unwrap();
        first.journal(submitted("a")).unwrap();
        // A file system that lost the lock.
        fs::remove_file(folder.join(".lock")).unwrap();
        let mut second = open(folder).unwrap();
        assert!(second.fence > first.fence);
        let error = first.journal(submitted("b")).unwrap_err().to_string();
        assert!(
            error.contains("another one has taken the service over"),
            "{error}"
        );
        second.journal(submitted("c")).unwrap();
        drop((first, second));
        let third = open(folder).unwrap();
        let expected = recover_jobs(&[submitted("a"), submitted("c")]);
        assert_eq!(third.recovery, expected);
        assert_eq!(third.fence, Fence(3));
    }

    #[test]
    fn records_of_a_coordinator_that_was_replaced_are_refused_by_place() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path();
        let mut jobs = open(folder).unwrap();
        append(&mut jobs.log, Fence(2), JobRecord::Opened).unwrap();
        append(&mut jobs.log, Fence(1), submitted("a")).unwrap();
        drop(jobs);
        let error = format!("{:#}", open(folder).err().unwrap());
        for part in [JOURNAL, "record 3 was written under fence 1"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_queue_of_any_records_is_refused_by_name_or_read_as_one_that_goes_on() {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() {
            memory.to_owned()
        } else {
            std::env::temp_dir()
        };
        let directory = tempfile::tempdir_in(parent).unwrap();
        let folder = directory.path();
        let whole = whole();
        assert!(check(folder, &whole).unwrap());
        let place = any::<Index>;
        let change = (place(), place(), 0..8u32, edits());
        let sound = std::cell::Cell::new(0);
        fuzz("queue", 4000, &vec(change, 1..5), |changes| {
            let mut records = whole.clone();
            for (at, other, kind, edits) in &changes {
                let (at, other) = (at.index(records.len()), other.index(records.len()));
                match kind {
                    0 if records.len() > 1 => drop(records.remove(at)),
                    1 => records.swap(at, other),
                    2 => records.insert(at, records[other].clone()),
                    _ => records[at] = edited(&records[at], edits),
                }
            }
            sound.set(sound.get() + u32::from(check(folder, &records)?));
            Ok(())
        });
        assert!(sound.get() > 400, "only {} were read", sound.get());
    }
}
