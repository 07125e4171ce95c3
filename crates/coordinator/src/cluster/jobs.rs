//! The state folder of a coordinator that serves job after job.
//!
//! ```text
//! jobs.log   what became of every job: one checksummed record per decision (storage::log), rewritten short at each start
//! .lock      held by the coordinator that works here
//! ```

use std::path::Path;

use anyhow::Context;
use protocol::{JobRecord, JobsRecovery, recover_jobs};
use storage::Lock;
use storage::log::Log;

const JOURNAL: &str = "jobs.log";

/// The queue's journal, held by this process alone.
pub(super) struct Jobs {
    journal: Log,
    /// What the journal says.
    pub(super) recovery: JobsRecovery,
    _lock: Lock,
}

/// Opens the folder, or makes it.
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
    let mut records = Vec::new();
    for (index, payload) in opened.records.iter().enumerate() {
        let record: JobRecord = serde_json::from_slice(payload)
            .with_context(|| format!("read record {} of {}", index + 1, path.display()))?;
        records.push(record);
    }
    let recovery = recover_jobs(&records);
    let journal = compact(&path, opened.log, &records, &recovery)?;
    Ok(Jobs {
        journal,
        recovery,
        _lock: lock,
    })
}

impl Jobs {
    /// Appends a record; durable when it returns.
    pub(super) fn journal(&mut self, record: &JobRecord) -> anyhow::Result<()> {
        let payload = serde_json::to_vec(record).context("write a record as JSON")?;
        Ok(self.journal.append(&payload)?)
    }
}

/// Replaces a journal that says more than is needed by one that does not: beside it, then renamed.
fn compact(
    path: &Path,
    journal: Log,
    records: &[JobRecord],
    recovery: &JobsRecovery,
) -> anyhow::Result<Log> {
    let short = recovery.records();
    if short.len() == records.len() {
        return Ok(journal);
    }
    let beside = path.with_extension("log.new");
    if beside.exists() {
        storage::remove_file(&beside)?;
    }
    let mut log = Log::open(&beside)?.log;
    for record in &short {
        log.append(&serde_json::to_vec(record).context("write a record as JSON")?)?;
    }
    drop(log);
    storage::rename(&beside, path)?;
    Ok(Log::open(path)?.log)
}
