//! MLflow: a run in a file store, which MLflow's clients read (`MLFLOW_ALLOW_FILE_STORE=true` in version 3) and
//! `mlflow migrate-filestore` moves into a database.
//!
//! ```text
//! <mlflow_folder>/EXPERIMENT/meta.yaml       the experiment's name
//! <mlflow_folder>/EXPERIMENT/ID/
//!     meta.yaml               names, status, start and end
//!     metrics/NAME            lines of milliseconds, value, step
//!     params/NAME             a value of the configuration
//!     tags/NAME
//!     artifacts/samples/      step-NNNNNNNN.txt
//! ```
//! A name with `/` in it is a file in a folder, so `loss` and `loss/pairwise` cannot both be; the names below `loss` and
//! `seconds` have a dot there instead (`loss.pairwise`, `seconds.forward`). A row is in many files, and a crash may leave it in
//! some of them: the next start gives each file what it lacks.

mod meta;

use std::{
    collections::BTreeMap,
    fmt::Write,
    path::{Path, PathBuf},
    time::SystemTime,
};

use protocol::{EvaluationRow, Outcome, Sample};
use storage::{LineFile, atomic_write, create_directory, remove_file};

use super::{Description, Entry, Position, Tracker, TrackerError, description::plain_text, files};
use meta::{Experiment, Run, Status};

/// Longer values of the configuration are cut, as MLflow's own client does.
const PARAMETER_CHARACTERS_MAX: usize = 6000;
/// Folders whose name is a metric as well.
const METRICS_WITH_PARTS: [&str; 3] = ["loss", "eval/loss", "seconds"];

/// This run in its file store.
pub(super) struct Mlflow {
    description: Description,
    /// Folder of the run, once it is there.
    run: Option<PathBuf>,
    metrics: BTreeMap<String, Metric>,
    position: Position,
    /// This start has written into it.
    writing: bool,
}

/// A metric's file.
struct Metric {
    file: LineFile,
    /// The last step in it.
    last: Option<u64>,
}

impl Mlflow {
    /// Reads how far this run's files reach.
    ///
    /// # Errors
    /// They cannot be read, or hold what no tracker wrote.
    pub(super) fn open(description: &Description) -> Result<Self, TrackerError> {
        let folder = &description.telemetry.mlflow_folder;
        let mut tracker = Self {
            description: description.clone(),
            run: find_run(folder, &description.id)?,
            metrics: BTreeMap::new(),
            position: Position::default(),
            writing: false,
        };
        if let Some(run) = tracker.run.clone() {
            let metrics = run.join("metrics");
            for path in all_files(&metrics)? {
                let name = path.strip_prefix(&metrics).unwrap_or(&path);
                tracker.open_metric(&run, &name.to_string_lossy())?;
            }
            tracker.position = tracker.complete();
        }
        Ok(tracker)
    }

    fn open_metric(&mut self, run: &Path, name: &str) -> Result<&mut Metric, TrackerError> {
        let path = run.join("metrics").join(name);
        create_directory(path.parent().expect("it is below metrics"))?;
        let file = LineFile::open(&path)?;
        let last = lines(&path)?.last().map(|line| line.step);
        let metric = Metric { file, last };
        Ok(self
            .metrics
            .entry(name.to_owned())
            .insert_entry(metric)
            .into_mut())
    }

    /// The last entry up to which all files have all.
    fn complete(&self) -> Position {
        let evaluation = Entry::Evaluation {
            row: EvaluationRow::default(),
            samples: Vec::new(),
        };
        let trained = self.last_of_all(&Entry::Step(Box::default()));
        let evaluated = self.last_of_all(&evaluation);
        match (trained, evaluated) {
            (None, evaluated) => Position {
                step: 0,
                evaluated: evaluated.is_some(),
            },
            (Some(step), evaluated) if evaluated >= Some(step) => Position::last_of(step),
            // An evaluation before that step may be missing; what is there of others is not written twice.
            (Some(_), evaluated) => evaluated.map_or(Position::default(), Position::last_of),
        }
    }

    /// The last step that the files of all metrics of such an entry have.
    fn last_of_all(&self, entry: &Entry) -> Option<u64> {
        let names = entry.metrics().into_iter();
        let lasts = names.map(|(name, _)| self.metrics.get(&file_name(name))?.last);
        lasts.min().flatten()
    }

    /// Takes out what lies behind step `to`.
    fn cut(&mut self, to: u64) -> Result<(), TrackerError> {
        let Some(run) = &self.run else {
            return Ok(());
        };
        for (name, metric) in &mut self.metrics {
            if metric.last <= Some(to) {
                continue;
            }
            let lines = lines(&run.join("metrics").join(name))?;
            let kept = lines.iter().rev().find(|line| line.step <= to);
            metric.file.truncate_to(kept.map_or(0, |line| line.end))?;
            metric.last = kept.map(|line| line.step);
        }
        for path in files::entries(&run.join("artifacts").join("samples"))? {
            let name = files::name(&path);
            let step = name
                .strip_prefix("step-")
                .and_then(|name| name.strip_suffix(".txt"));
            let step = step.and_then(|step| step.parse().ok());
            if step.is_some_and(|step: u64| step > to) {
                remove_file(&path)?;
            }
        }
        self.position = self.position.min(Position::last_of(to));
        Ok(())
    }

    /// Marks the run as running, with this start's configuration; makes it where it is not there.
    fn begin(&mut self, at: SystemTime) -> Result<PathBuf, TrackerError> {
        if let (true, Some(run)) = (self.writing, &self.run) {
            return Ok(run.clone());
        }
        let run = if let Some(run) = &self.run {
            run.clone()
        } else {
            let folder = &self.description.telemetry.mlflow_folder;
            let name = &self.description.telemetry.mlflow_experiment;
            let experiment = Experiment::enter(folder, name, milliseconds(at))?;
            experiment.join(&self.description.id)
        };
        for name in ["metrics", "params", "tags", "artifacts"] {
            create_directory(&run.join(name))?;
        }
        for (name, value) in self.description.parameters() {
            let value: String = plain_text(value)
                .chars()
                .take(PARAMETER_CHARACTERS_MAX)
                .collect();
            put(&run.join("params").join(name), &value)?;
        }
        for (name, value) in [
            ("mlflow.runName", self.description.name.clone()),
            ("mlflow.source.name", "caldpo".into()),
            ("mlflow.source.type", "LOCAL".into()),
            (
                "caldpo.output",
                self.description.output.display().to_string(),
            ),
            ("caldpo.run_digest", self.description.run_digest.clone()),
            ("caldpo.version", env!("CARGO_PKG_VERSION").into()),
        ] {
            put(&run.join("tags").join(name), &value)?;
        }
        self.run = Some(run.clone());
        self.write_meta(&run, at, Status::Running)?;
        self.writing = true;
        Ok(run)
    }

    fn write_meta(&self, run: &Path, at: SystemTime, status: Status) -> Result<(), TrackerError> {
        let experiment = run.parent().and_then(Path::file_name).unwrap_or_default();
        let at = milliseconds(at);
        let meta = Run {
            id: &self.description.id,
            name: &self.description.name,
            experiment: &experiment.to_string_lossy(),
            artifacts: &run.join("artifacts"),
            start: Run::start(run)?.unwrap_or(at),
            status,
            end: (status != Status::Running).then_some(at),
        };
        Ok(atomic_write(
            &run.join("meta.yaml"),
            meta.to_yaml().as_bytes(),
        )?)
    }
}

impl Tracker for Mlflow {
    fn position(&self) -> Position {
        self.position
    }

    fn record(&mut self, at: SystemTime, entry: &Entry) -> Result<(), TrackerError> {
        let position = entry.position();
        let step = position.step;
        let mut metrics = entry.metrics();
        for (name, _) in &mut metrics {
            *name = file_name(std::mem::take(name));
        }
        metrics.retain(|(name, _)| self.metrics.get(name).and_then(|it| it.last) < Some(step));
        if !metrics.is_empty() {
            let run = self.begin(at)?;
            if !entry.samples().is_empty() {
                let folder = run.join("artifacts").join("samples");
                create_directory(&folder)?;
                let file = folder.join(format!("step-{step:08}.txt"));
                atomic_write(&file, written(entry.samples()).as_bytes())?;
            }
            let at = milliseconds(at);
            for (name, value) in metrics {
                let metric = if self.metrics.contains_key(&name) {
                    self.metrics.get_mut(&name).expect("it is there")
                } else {
                    self.open_metric(&run, &name)?
                };
                // `{:?}` is the shortest text that reads back as the same float, and Python reads its NaN and inf.
                metric.file.append(&format!("{at} {value:?} {step}"))?;
                metric.last = Some(step);
            }
        }
        self.position = position;
        Ok(())
    }

    fn rewind(&mut self, _at: SystemTime, to: u64) -> Result<(), TrackerError> {
        self.cut(to)
    }

    fn end(&mut self, at: SystemTime, outcome: &Outcome) -> Result<(), TrackerError> {
        let Some(run) = &self.run else {
            return Ok(());
        };
        let status = match outcome {
            Outcome::Completed => Status::Finished,
            Outcome::Interrupted { .. } => Status::Killed,
            Outcome::Failed { .. } => Status::Failed,
        };
        if !self.writing && Run::status(run)? == Some(status) {
            return Ok(());
        }
        self.write_meta(run, at, status)
    }
}

/// A line of a metric's file.
struct Line {
    step: u64,
    /// Where it ends.
    end: u64,
}

fn lines(path: &Path) -> Result<Vec<Line>, TrackerError> {
    let text = files::text(path)?.unwrap_or_default();
    let mut end = 0;
    let mut lines = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        end += line.len() as u64;
        let step = line
            .split_whitespace()
            .nth(2)
            .and_then(|step| step.parse().ok());
        let Some(step) = step else {
            return Err(TrackerError::Content {
                path: path.to_owned(),
                reason: format!(
                    "line {} is not `milliseconds value step`; remove the line, or the run from MLflow",
                    index + 1
                ),
            });
        };
        lines.push(Line { step, end });
    }
    Ok(lines)
}

/// The file of a metric; see the head of this file.
fn file_name(name: String) -> String {
    for whole in METRICS_WITH_PARTS {
        if let Some(part) = name
            .strip_prefix(whole)
            .and_then(|rest| rest.strip_prefix('/'))
        {
            return format!("{whole}.{part}");
        }
    }
    name
}

/// The folder of the run `id` in any experiment of the store.
fn find_run(folder: &Path, id: &str) -> Result<Option<PathBuf>, TrackerError> {
    let runs = meta::experiments(folder)?
        .into_iter()
        .map(|experiment| experiment.join(id));
    Ok(runs.into_iter().find(|run| run.is_dir()))
}

/// All files below `folder`, in its folders too; none where it is absent.
fn all_files(folder: &Path) -> Result<Vec<PathBuf>, TrackerError> {
    let mut files = Vec::new();
    for path in files::entries(folder)? {
        if path.is_dir() {
            files.extend(all_files(&path)?);
        } else {
            files.push(path);
        }
    }
    Ok(files)
}

/// Writes `text` unless it is there.
fn put(path: &Path, text: &str) -> Result<(), TrackerError> {
    if files::text(path)?.as_deref() != Some(text) {
        atomic_write(path, text.as_bytes())?;
    }
    Ok(())
}

fn milliseconds(at: SystemTime) -> u64 {
    files::since_1970(at).as_millis() as u64
}

fn written(samples: &[Sample]) -> String {
    let mut text = String::new();
    for sample in samples {
        let rule = "─".repeat(40);
        writeln!(text, "{}\n{rule}\n{}\n{rule}\n", sample.prompt, sample.text)
            .expect("a string takes everything");
    }
    text
}
