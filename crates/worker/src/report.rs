//! What becomes of a job's rows, before anything is trained.

use spec::JobError;
use toml::Table;
use trainer::{Reports, TrainError};

/// Why there is no report. Every case is the job's to mend.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The sections do not resolve.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The tokenizer or the rows cannot be used.
    #[error(transparent)]
    Data(#[from] TrainError),
}

/// Reads tokenizer and data of a job as its training does.
///
/// # Errors
/// What its training would refuse about them, with its place.
pub fn reports(sections: &Table) -> Result<Reports, ReportError> {
    Ok(trainer::reports(&spec::resolve(sections)?.spec)?)
}
