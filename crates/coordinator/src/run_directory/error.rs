//! Why a run directory cannot be used.

use std::{fmt, io, path::PathBuf};

use protocol::{Fence, RecoveryError};
use storage::{FileError, LockError, log::LogError};

/// A value that is one thing in the directory and another in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Dotted path.
    pub key: String,
    /// The directory's value, as JSON.
    pub there: String,
    /// The configuration's value, as JSON.
    pub here: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is {} there, {} here",
            self.key, self.there, self.here
        )
    }
}

/// Why a run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirectoryError {
    /// Another coordinator works in it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// It belongs to another run.
    #[error(
        "{path} holds another run: {}; a run's settings stay as they were when it committed its first step: choose another \
         job.output, or give that run's values to continue it",
        list(.differences)
    )]
    AnotherRun {
        /// The directory.
        path: PathBuf,
        /// What differs.
        differences: Vec<Difference>,
    },
    /// The files behind the configuration changed since the run began.
    #[error(
        "{path} was begun with other inputs: {}; restore them, or choose another job.output",
        list(.differences)
    )]
    OtherInputs {
        /// The directory.
        path: PathBuf,
        /// What differs.
        differences: Vec<Difference>,
    },
    /// Files that a run would write, but no `run.json`.
    #[error(
        "{path} holds {found} but no run.json: it is not a run directory; choose another job.output, or move the file away"
    )]
    NotARun {
        /// The directory.
        path: PathBuf,
        /// A name that a run would write.
        found: &'static str,
    },
    /// `run.json` cannot be understood.
    #[error(
        "{path} is not a run's description: {reason}; restore it, or choose another job.output"
    )]
    DamagedRunFile {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A line of a file whose rows are nowhere else cannot be understood.
    #[error("{path}:{line} is not a row: {reason}; restore the file, or remove the line")]
    DamagedLine {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What the parser said.
        reason: String,
    },
    /// The journal's bytes do not hold.
    #[error(transparent)]
    Journal(#[from] LogError),
    /// A journal record of another version.
    #[error(
        "record {index} of {path} is not one this version writes: {reason}; continue the run with the version that began it"
    )]
    Record {
        /// The journal.
        path: PathBuf,
        /// From 1.
        index: usize,
        /// What the parser said.
        reason: String,
    },
    /// The journal contradicts itself.
    #[error("{path}: {source}")]
    Contradiction {
        /// The journal.
        path: PathBuf,
        /// Where.
        #[source]
        source: RecoveryError,
    },
    /// Another coordinator has opened the journal since, and this one must not go on.
    #[error(
        "{path} is not as this coordinator left it under fence {fence}: another one has taken the run over; let that one go on"
    )]
    Replaced {
        /// The journal.
        path: PathBuf,
        /// This coordinator's.
        fence: Fence,
    },
    /// A file cannot be read.
    #[error("read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] FileError),
}

fn list(differences: &[Difference]) -> String {
    let listed: Vec<_> = differences.iter().map(Difference::to_string).collect();
    listed.join("; ")
}

impl RunDirectoryError {
    /// Whether another configuration, not another attempt, is the cure.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::AnotherRun { .. } | Self::OtherInputs { .. } | Self::NotARun { .. }
        )
    }
}
