//! One JSON-lines file with a row per step, that can be cut back to a step.
//!
//! Rows are kept in memory too: plots and the summary need them all at the end.

use std::path::{Path, PathBuf};

use protocol::{EvaluationRow, MetricsRow, Sample};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use storage::LineFile;

use super::RunDirectoryError;

/// A row that belongs to a step.
pub(super) trait StepRow: Serialize + DeserializeOwned {
    fn step(&self) -> u64;
}

/// One line of `samples.jsonl`: greedy continuations with the weights after `step`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleRow {
    /// Committed step whose weights wrote them; 0 before training.
    pub step: u64,
    /// The continuations.
    pub samples: Vec<Sample>,
}

impl StepRow for MetricsRow {
    fn step(&self) -> u64 {
        self.report.step
    }
}

impl StepRow for EvaluationRow {
    fn step(&self) -> u64 {
        self.step
    }
}

impl StepRow for SampleRow {
    fn step(&self) -> u64 {
        self.step
    }
}

pub(super) struct Projection<T> {
    path: PathBuf,
    file: LineFile,
    rows: Vec<T>,
    /// Where each row's line ends in the file.
    ends: Vec<u64>,
}

impl<T: StepRow> Projection<T> {
    /// Opens the file with the rows up to step `last`; later ones are removed.
    ///
    /// These rows are nowhere else, so a line that cannot be read is refused.
    pub(super) fn open(path: &Path, last: u64) -> Result<Self, RunDirectoryError> {
        let (mut projection, lines) = Self::start(path)?;
        for (index, line) in lines.iter().enumerate() {
            let row: T =
                serde_json::from_str(line).map_err(|error| RunDirectoryError::DamagedLine {
                    path: path.to_owned(),
                    line: index + 1,
                    reason: error.to_string(),
                })?;
            if row.step() > last {
                break;
            }
            projection.keep(row, line);
        }
        projection.cut()?;
        Ok(projection)
    }

    /// Opens the file and makes it hold exactly `rows`. Lines that already say so stay byte for byte.
    pub(super) fn of(path: &Path, rows: Vec<T>) -> Result<Self, RunDirectoryError> {
        let (mut projection, lines) = Self::start(path)?;
        let mut rows = rows.into_iter().peekable();
        for line in lines {
            // Compared as written, so that NaN equals NaN.
            let same = |row: &T| {
                let found = serde_json::from_str::<T>(&line);
                found.is_ok_and(|found| text(&found) == text(row))
            };
            let Some(row) = rows.next_if(same) else {
                break;
            };
            projection.keep(row, &line);
        }
        projection.cut()?;
        for row in rows {
            projection.append(row)?;
        }
        projection.file.sync()?;
        Ok(projection)
    }

    pub(super) fn append(&mut self, row: T) -> Result<(), RunDirectoryError> {
        self.file.append(&text(&row))?;
        self.rows.push(row);
        self.ends.push(self.file.bytes());
        Ok(())
    }

    pub(super) fn sync(&mut self) -> Result<(), RunDirectoryError> {
        Ok(self.file.sync()?)
    }

    /// Removes the rows after step `last`.
    pub(super) fn rewind(&mut self, last: u64) -> Result<(), RunDirectoryError> {
        let kept = self.rows.partition_point(|row| row.step() <= last);
        self.rows.truncate(kept);
        self.ends.truncate(kept);
        self.cut()
    }

    pub(super) fn rows(&self) -> &[T] {
        &self.rows
    }

    fn start(path: &Path) -> Result<(Self, Vec<String>), RunDirectoryError> {
        let file = LineFile::open(path)?;
        let read = std::fs::read_to_string(path).map_err(|source| RunDirectoryError::Read {
            path: path.to_owned(),
            source,
        })?;
        let projection = Self {
            path: path.to_owned(),
            file,
            rows: Vec::new(),
            ends: Vec::new(),
        };
        Ok((projection, read.lines().map(str::to_owned).collect()))
    }

    fn keep(&mut self, row: T, line: &str) {
        let start = self.ends.last().copied().unwrap_or(0);
        self.rows.push(row);
        self.ends.push(start + line.len() as u64 + 1);
    }

    fn cut(&mut self) -> Result<(), RunDirectoryError> {
        let end = self.ends.last().copied().unwrap_or(0);
        assert!(
            end <= self.file.bytes(),
            "{} has {} bytes, its rows {end}",
            self.path.display(),
            self.file.bytes()
        );
        if end < self.file.bytes() {
            self.file.truncate_to(end)?;
        }
        Ok(())
    }
}

fn text(row: &impl Serialize) -> String {
    serde_json::to_string(row).expect("a row has only strings for keys")
}
