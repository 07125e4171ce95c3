//! `<output>/`: everything a run leaves behind, and the journal it goes on from.
//!
//! ```text
//! run.json        what makes the run this run; another run is refused by it
//! config.toml     resolved configuration
//! journal.log     the truth: one checksummed record per decision (storage::log), under the fence of who wrote it
//! metrics.jsonl   projection of the surviving commits, one row a step
//! eval.jsonl      one row per evaluation
//! samples.jsonl   greedy continuations before and after
//! events.jsonl    time, kind, text; a warning also its rule and step
//! data-report.txt what became of the rows of the data files
//! logs/           worker-N.log of this machine's workers
//! summary.json    the outcome
//! plots/          rewards.png, rewards.svg
//! export/         the trained model (written by the exporter), README.md its model card
//! trackers.json   the run's id in trackers; their folders tensorboard/, wandb/, mlruns/, unless telemetry says otherwise
//! checkpoints/    unless checkpoint.path says otherwise (written by the workers)
//! .lock           held by the coordinator that works here
//! ```

mod error;
mod events;
mod journal;
mod projection;
mod run_file;

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use protocol::{
    EarlyStop, EvaluationRow, Fence, MetricsRow, Note, Record, RunFacts, Sample, Step, early_stop,
    surviving,
};
use serde_json::{Value, json};
use storage::{LineFile, Lock, atomic_write, create_directory};

use crate::{monitor::Warning, plots::Drawing, random, summary::Summary, timestamp::rfc3339};
use journal::{Journal, OpenedJournal};
use projection::Projection;
use run_file::RunFile;

pub use error::{Difference, RunDirectoryError};
pub use projection::SampleRow;

/// Names that make a directory without `run.json` somebody else's.
const OWN_FILES: [&str; 7] = [
    "config.toml",
    "journal.log",
    "metrics.jsonl",
    "eval.jsonl",
    "samples.jsonl",
    "events.jsonl",
    "summary.json",
];

/// What a start that committed no step leaves of itself, and the run that takes its place begins without.
const REPLACED_FILES: [&str; 7] = [
    "metrics.jsonl",
    "eval.jsonl",
    "samples.jsonl",
    "events.jsonl",
    "data-report.txt",
    "summary.json",
    // Its id leads to a description that is not this run's.
    "trackers.json",
];

/// Where trackers write by default: they would take what lies there for another run's.
const REPLACED_FOLDERS: [&str; 3] = ["tensorboard", "wandb", "mlruns"];

/// A run's directory, held by this process alone.
pub struct RunDirectory {
    path: PathBuf,
    journal: Journal,
    metrics: Projection<MetricsRow>,
    evaluations: Projection<EvaluationRow>,
    samples: Projection<SampleRow>,
    events: LineFile,
    /// Those of `events.jsonl`, the oldest first.
    warnings: Vec<Warning>,
    /// What the last evaluation that decided something decided.
    early_stop: Option<EarlyStop>,
    run: RunFile,
    _lock: Lock,
}

/// What [`RunDirectory::open`] found.
pub struct Opened {
    /// The directory.
    pub directory: RunDirectory,
    /// The journal's records, oldest first; none for a new run.
    pub records: Vec<Record>,
    /// Bytes of a torn last record that were cut off the journal.
    pub torn_bytes: u64,
    /// In which this run differs from the one whose place it took, because that had not committed a step.
    pub replaced: Vec<Difference>,
}

impl RunDirectory {
    /// Creates the directory, or opens the one that the same run left; `config.toml` becomes `config_toml`. A run that had not
    /// committed a step, such as one that a misspelled path ended, gives its place to another one.
    ///
    /// # Errors
    /// Nothing is changed in a directory that another run or coordinator owns, except for the lock file and a torn end of the
    /// journal.
    pub fn open(
        path: &Path,
        identity: &Value,
        config_toml: &str,
    ) -> Result<Opened, RunDirectoryError> {
        create_directory(path)?;
        let lock = Lock::acquire(&path.join(".lock"))?;
        let mut run = enter(path, identity)?;
        let replaced = run.differences(identity);
        let journal_path = path.join("journal.log");
        let OpenedJournal {
            mut journal,
            mut records,
            torn_bytes,
        } = Journal::open(&journal_path)?;
        if !replaced.is_empty() {
            if records.iter().any(|it| matches!(it, Record::Commit(_))) {
                let (path, differences) = (path.to_owned(), replaced);
                return Err(RunDirectoryError::AnotherRun { path, differences });
            }
            // A crash on the way leaves the former description and a journal that begins anew: either run may go on.
            journal.append(Record::Anew)?;
            records.push(Record::Anew);
            for name in REPLACED_FILES {
                storage::remove_file(&path.join(name))?;
            }
            for name in REPLACED_FOLDERS {
                storage::remove_directory(&path.join(name))?;
            }
            run = RunFile::new(identity, run.id().to_owned());
            run.write(&path.join("run.json"))?;
        }
        atomic_write(&path.join("config.toml"), config_toml.as_bytes())?;
        let commits = surviving(&records).map_err(|source| RunDirectoryError::Contradiction {
            path: journal_path,
            source,
        })?;
        let committed = commits.len() as u64;
        let rows = commits.into_iter().map(|commit| commit.row).collect();
        let events_path = path.join("events.jsonl");
        let directory = Self {
            path: path.to_owned(),
            journal,
            metrics: Projection::of(&path.join("metrics.jsonl"), rows)?,
            evaluations: Projection::open(&path.join("eval.jsonl"), committed)?,
            samples: Projection::open(&path.join("samples.jsonl"), committed)?,
            events: LineFile::open(&events_path)?,
            warnings: events::warnings(&events_path)?,
            early_stop: early_stop(&records),
            run,
            _lock: lock,
        };
        Ok(Opened {
            directory,
            records,
            torn_bytes,
            replaced,
        })
    }

    /// What tells this run from all others, also from one of the same configuration in another directory.
    pub fn id(&self) -> &str {
        self.run.id()
    }

    /// Takes the run over from any coordinator before, durably: the fence of all that is written and said from here on.
    ///
    /// # Errors
    /// [`RunDirectoryError::Replaced`]: another one was quicker.
    pub fn take_over(&mut self) -> Result<Fence, RunDirectoryError> {
        self.journal.take_over()
    }

    /// Whether no other coordinator has opened the journal since.
    ///
    /// # Errors
    /// [`RunDirectoryError::Replaced`].
    pub fn check_journal(&self) -> Result<(), RunDirectoryError> {
        self.journal.check()
    }

    /// Appends to the journal; durable when it returns. A rewind also removes the later rows everywhere.
    ///
    /// # Errors
    /// [`RunDirectoryError::Replaced`]: nothing may be said or written any more.
    pub fn journal(&mut self, record: &Record) -> Result<(), RunDirectoryError> {
        self.journal.append(record.clone())?;
        match record {
            Record::Rewind { to, .. } => {
                self.metrics.rewind(to.0)?;
                self.evaluations.rewind(to.0)?;
                self.samples.rewind(to.0)?;
                self.early_stop.take_if(|stop| stop.step > to.0);
            }
            Record::Evaluation {
                stop: Some(stop), ..
            } => self.early_stop = Some(stop.clone()),
            _ => {}
        }
        Ok(())
    }

    /// Writes what the workers found into `run.json`.
    ///
    /// # Errors
    /// [`RunDirectoryError::OtherInputs`] when an earlier part of the run found something else.
    pub fn agree(&mut self, facts: &RunFacts) -> Result<(), RunDirectoryError> {
        let agreed = self.run.agree(facts);
        agreed.map_err(|differences| RunDirectoryError::OtherInputs {
            path: self.path.clone(),
            differences,
        })?;
        self.run.write(&self.path.join("run.json"))
    }

    /// Appends a committed step to `metrics.jsonl`; its commit is journaled before.
    ///
    /// # Panics
    /// If it is not the step after the last.
    pub fn record_step(&mut self, row: MetricsRow) -> Result<(), RunDirectoryError> {
        let next = self.metrics.rows().len() as u64 + 1;
        assert_eq!(row.report.step, next, "metrics.jsonl has one row a step");
        self.metrics.append(row)
    }

    /// Appends an evaluation and its samples, durably. A resumed run evaluates the same weights again: the first row stays.
    pub fn record_evaluation(
        &mut self,
        row: EvaluationRow,
        samples: &[Sample],
    ) -> Result<(), RunDirectoryError> {
        let later = |last: Option<u64>| last.is_none_or(|last| last < row.step);
        if !samples.is_empty() && later(self.samples.rows().last().map(|it| it.step)) {
            self.samples.append(SampleRow {
                step: row.step,
                samples: samples.to_vec(),
            })?;
            self.samples.sync()?;
        }
        if later(self.evaluations.rows().last().map(|it| it.step)) {
            self.evaluations.append(row)?;
            self.evaluations.sync()?;
        }
        Ok(())
    }

    /// Appends to `events.jsonl`.
    pub fn event(&mut self, now: SystemTime, note: &Note) -> Result<(), RunDirectoryError> {
        let line = json!({"time": rfc3339(now), "kind": note.kind, "text": note.text});
        Ok(self.events.append(&line.to_string())?)
    }

    /// Appends a warning to `events.jsonl`, once: a resumed run sees the same rows again. Whether it is new.
    pub fn warning(
        &mut self,
        now: SystemTime,
        warning: &Warning,
    ) -> Result<bool, RunDirectoryError> {
        if self.warnings.contains(warning) {
            return Ok(false);
        }
        self.events.append(&events::line(&rfc3339(now), warning))?;
        self.warnings.push(warning.clone());
        Ok(true)
    }

    /// Writes what became of the data files' rows to `data-report.txt`.
    pub fn write_data_report(&self, text: &str) -> Result<(), RunDirectoryError> {
        let text = format!("{text}\n");
        Ok(atomic_write(
            &self.path.join("data-report.txt"),
            text.as_bytes(),
        )?)
    }

    /// Writes `summary.json`, and makes the rows and events durable.
    pub fn write_summary(&mut self, summary: &Summary) -> Result<(), RunDirectoryError> {
        self.metrics.sync()?;
        self.events.sync()?;
        let mut text = serde_json::to_string_pretty(summary).expect("a summary is JSON");
        text.push('\n');
        Ok(atomic_write(&self.summary_path(), text.as_bytes())?)
    }

    /// Writes `export/README.md`, unless one is there: somebody may have added to it. Exporting again, which replaces the
    /// folder, removes it, and the next start of the finished run writes it anew.
    pub fn write_model_card(&self, text: &str) -> Result<(), RunDirectoryError> {
        let path = self.export_path().join("README.md");
        if path.exists() {
            return Ok(());
        }
        Ok(atomic_write(&path, text.as_bytes())?)
    }

    /// Writes `plots/rewards.png` and `plots/rewards.svg`.
    pub fn write_plots(&self, drawing: &Drawing) -> Result<(), RunDirectoryError> {
        let png = self.plot_path();
        create_directory(&self.path.join("plots"))?;
        atomic_write(&png, &drawing.png)?;
        Ok(atomic_write(
            &png.with_extension("svg"),
            drawing.svg.as_bytes(),
        )?)
    }

    /// Rows of the committed steps.
    pub fn metrics(&self) -> &[MetricsRow] {
        self.metrics.rows()
    }

    /// Rows of the evaluations.
    pub fn evaluations(&self) -> &[EvaluationRow] {
        self.evaluations.rows()
    }

    /// Samples, the oldest first.
    pub fn samples(&self) -> &[SampleRow] {
        self.samples.rows()
    }

    /// Warnings of all starts of the run, the oldest first.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Why the run ended before its schedule, if it did.
    pub fn early_stop(&self) -> Option<&EarlyStop> {
        let committed = Step(self.metrics.rows().len() as u64);
        self.early_stop.as_ref().filter(|it| it.ended(committed))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the trained model goes.
    pub fn export_path(&self) -> PathBuf {
        self.path.join("export")
    }

    /// The adapter of a run that trains one, in PEFT's format.
    pub fn adapter_path(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// The plot for people; the SVG lies beside it.
    pub fn plot_path(&self) -> PathBuf {
        self.path.join("plots").join("rewards.png")
    }

    /// The summary.
    pub fn summary_path(&self) -> PathBuf {
        self.path.join("summary.json")
    }
}

/// Reads or writes `run.json`; refuses a directory that is no run's.
fn enter(path: &Path, identity: &Value) -> Result<RunFile, RunDirectoryError> {
    let run_path = path.join("run.json");
    let draw = || {
        random::hexadecimal::<16>().map_err(|source| RunDirectoryError::Read {
            path: "random bytes".into(),
            source,
        })
    };
    match RunFile::read(&run_path)? {
        Some(run) if run.id().is_empty() => {
            let run = run.with_id(draw()?);
            run.write(&run_path)?;
            return Ok(run);
        }
        Some(run) => return Ok(run),
        None => {}
    }
    if let Some(found) = OWN_FILES.into_iter().find(|name| path.join(name).exists()) {
        let path = path.to_owned();
        return Err(RunDirectoryError::NotARun { path, found });
    }
    let run = RunFile::new(identity, draw()?);
    // First of all files, so that a crash during the first start does not leave something that looks foreign.
    run.write(&run_path)?;
    Ok(run)
}
