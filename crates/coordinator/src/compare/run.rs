//! A run as its directory tells it.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
};

use protocol::{EvaluationRow, MetricsRow, RunFacts, Statistics};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{objective::Objective, summary::Totals};

/// One batch is noisy: training values are means over so many steps.
const TRAINING_STEPS: usize = 10;

/// Why runs cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// Some of the folders are no run directories.
    #[error("{}", .0.join("\n       "))]
    NoRuns(Vec<String>),
    /// A file is there but cannot be understood.
    #[error("{place}: {reason}")]
    Damaged {
        /// File and line.
        place: String,
        /// What the parser said.
        reason: String,
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
}

impl CompareError {
    /// Whether other arguments are the cure.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NoRuns(_))
    }
}

/// A run's configuration and rows.
pub(super) struct Run {
    pub label: String,
    pub path: PathBuf,
    pub objective: Objective,
    pub outcome: String,
    pub reason: Option<String>,
    pub facts: Option<RunFacts>,
    pub totals: Totals,
    metrics: Vec<MetricsRow>,
    evaluations: Vec<EvaluationRow>,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Measured {
    /// Means over the held-out pairs with the weights after a step.
    HeldOut(EvaluationRow),
    /// Means over the batches of the steps `first..=last`.
    Training {
        first: u64,
        last: u64,
        statistics: Statistics,
    },
}

/// What of `summary.json` is needed here.
#[derive(Deserialize)]
struct Ended {
    outcome: String,
    reason: Option<String>,
    facts: Option<RunFacts>,
    totals: EndedTotals,
}

#[derive(Deserialize)]
struct EndedTotals {
    steps: u64,
}

impl Run {
    /// Reads all directories, each once, or says which of them are none.
    pub(super) fn read_all(directories: &[PathBuf]) -> Result<Vec<Self>, CompareError> {
        let (mut refused, mut stores) = (Vec::new(), Vec::new());
        let mut seen = HashSet::new();
        let mut runs = Vec::new();
        for path in directories {
            // They often lie among the runs, where `runs/*` names them too.
            if is_store(path) {
                stores.push(format!(
                    "{} is a store of reference values or tokens, not a run directory",
                    path.display()
                ));
                continue;
            }
            if let Some(reason) = no_run(path) {
                refused.push(format!("{} {reason}", path.display()));
                continue;
            }
            let once = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            if seen.insert(once) {
                runs.push(Self::read(path)?);
            }
        }
        if runs.is_empty() {
            refused.append(&mut stores);
        }
        if refused.is_empty() {
            return Ok(runs);
        }
        Err(CompareError::NoRuns(refused))
    }

    fn read(path: &Path) -> Result<Self, CompareError> {
        let (name, objective) = configuration(&path.join("config.toml"))?;
        let metrics: Vec<MetricsRow> = rows(&path.join("metrics.jsonl"))?;
        let ended = ended(&path.join("summary.json"))?;
        // A run that was continued after its summary was written has not ended.
        let current = ended
            .as_ref()
            .filter(|ended| ended.totals.steps == metrics.len() as u64);
        Ok(Self {
            label: name,
            path: path.to_owned(),
            objective,
            outcome: current.map_or_else(|| "unfinished".into(), |ended| ended.outcome.clone()),
            reason: current.and_then(|ended| ended.reason.clone()),
            facts: ended.and_then(|ended| ended.facts),
            totals: Totals::of(&metrics),
            metrics,
            evaluations: rows(&path.join("eval.jsonl"))?,
        })
    }

    /// Whether held-out pairs tell what the run came to. An evaluation before the first step tells nothing of it.
    pub(super) fn is_held_out(&self) -> bool {
        let last = self.evaluations.last();
        last.is_some_and(|last| last.step > 0 || self.metrics.is_empty())
    }

    /// `None` before the first row.
    pub(super) fn measured(&self) -> Option<Measured> {
        if self.is_held_out() {
            return self.evaluations.last().copied().map(Measured::HeldOut);
        }
        let rows = self.finite_rows();
        let last = &rows[rows.len().saturating_sub(TRAINING_STEPS)..];
        Some(Measured::Training {
            first: last.first()?.report.step,
            last: last.last()?.report.step,
            statistics: mean(last),
        })
    }

    /// Step, chosen and rejected log-ratio: held-out, else trailing means over training steps.
    pub(super) fn curve(&self) -> Vec<(f64, f64, f64)> {
        let point = |step: u64, of: &Statistics| {
            let (chosen, rejected) = (of.log_ratios_chosen, of.log_ratios_rejected);
            (step as f64, chosen, rejected)
        };
        if self.is_held_out() {
            let rows = self.evaluations.iter();
            return rows.map(|row| point(row.step, &row.statistics)).collect();
        }
        let rows = self.finite_rows();
        let trailing = (1..=rows.len()).map(|end| {
            let of = mean(&rows[end.saturating_sub(TRAINING_STEPS)..end]);
            point(rows[end - 1].report.step, &of)
        });
        trailing.collect()
    }

    pub(super) fn to_json(&self) -> Value {
        let measured = self.measured().map(|measured| match measured {
            Measured::HeldOut(row) => json!({
                "on": "held_out", "step": row.step, "pairs": row.pairs, "statistics": row.statistics,
            }),
            Measured::Training {
                first,
                last,
                statistics,
            } => json!({
                "on": "training", "first_step": first, "step": last, "statistics": statistics,
            }),
        });
        json!({
            "name": self.label,
            "path": self.path,
            "objective": self.objective,
            "steps_total": self.facts.as_ref().map(|facts| facts.steps_total),
            "measured": measured,
            "totals": self.totals,
            "facts": self.facts,
            "outcome": self.outcome,
            "reason": self.reason,
        })
    }

    fn finite_rows(&self) -> Vec<MetricsRow> {
        let finite = |row: &&MetricsRow| row.report.statistics.loss.is_finite();
        self.metrics.iter().filter(finite).copied().collect()
    }
}

impl Measured {
    pub(super) fn statistics(&self) -> &Statistics {
        match self {
            Self::HeldOut(row) => &row.statistics,
            Self::Training { statistics, .. } => statistics,
        }
    }
}

/// Whether `path` holds nothing but what is named by digests, as reference values and tokens are.
fn is_store(path: &Path) -> bool {
    let is_digest = |entry: fs::DirEntry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let digest = name.split('.').next().unwrap_or_default();
        digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let mut entries = fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .peekable();
    entries.peek().is_some() && entries.all(is_digest)
}

/// Why `path` is no run directory.
fn no_run(path: &Path) -> Option<String> {
    if path.join("config.toml").is_file() && path.join("run.json").is_file() {
        return None;
    }
    if !path.exists() {
        return Some("does not exist; name a run's directory, such as runs/quickstart".into());
    }
    if !path.is_dir() {
        return Some("is a file; name a run's directory, such as runs/quickstart".into());
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let inside = entries.filter(|entry| entry.path().join("run.json").is_file());
    Some(match inside.count() {
        0 => "is no run directory: it has no run.json and config.toml".into(),
        count => format!(
            "is no run directory, but holds {count}; name them: {}",
            path.join("*").display()
        ),
    })
}

fn configuration(path: &Path) -> Result<(String, Objective), CompareError> {
    let damaged = |reason: String| CompareError::Damaged {
        place: path.display().to_string(),
        reason,
    };
    let text = read(path)?.unwrap_or_default();
    let config: toml::Table = toml::from_str(&text).map_err(|error| damaged(error.to_string()))?;
    let name = config.get("job").and_then(|job| job.get("name"));
    let name = name
        .and_then(toml::Value::as_str)
        .ok_or_else(|| damaged("job.name is missing".into()))?;
    let objective = config
        .get("objective")
        .ok_or_else(|| damaged("[objective] is missing".into()))?;
    let objective = Objective::from_section(objective)
        .map_err(|error| damaged(format!("objective: {}", error.message())))?;
    Ok((name.to_owned(), objective))
}

fn ended(path: &Path) -> Result<Option<Ended>, CompareError> {
    let Some(text) = read(path)? else {
        return Ok(None);
    };
    let parsed = serde_json::from_str(&text);
    parsed.map(Some).map_err(|error| CompareError::Damaged {
        place: path.display().to_string(),
        reason: error.to_string(),
    })
}

/// Rows of a file of lines; none where it is absent. A last line without its end is still being written.
fn rows<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, CompareError> {
    let text = read(path)?.unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines().enumerate();
    let parsed = lines.map(|(index, line)| {
        serde_json::from_str(line).map_err(|error| CompareError::Damaged {
            place: format!("{}:{}", path.display(), index + 1),
            reason: format!("not a row: {error}"),
        })
    });
    parsed.collect()
}

fn read(path: &Path) -> Result<Option<String>, CompareError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CompareError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

fn mean(rows: &[MetricsRow]) -> Statistics {
    let mut sums = [0.0; 11];
    for row in rows {
        for (sum, (_, value)) in sums.iter_mut().zip(row.report.statistics.values()) {
            *sum += value;
        }
    }
    Statistics::from_values(sums.map(|sum| sum / rows.len() as f64))
}
