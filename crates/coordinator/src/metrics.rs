//! What Prometheus is told: of every job its last committed step, its last evaluation, and what happened so far.
//!
//! Names begin with `caldpo_`, units are base units, and every series has the label `job` (those of `step_phase_seconds` also
//! `phase`); a new job adds no new name. A scrape keeps that label with `honor_labels: true`; without, Prometheus calls it
//! `exported_job`, since it has a `job` of its own. Values are those of `metrics.jsonl`. Counters begin with this process: of a
//! job that it resumed, they count what it saw.
//!
//! Bound: a job has fewer than 80 series, a histogram among them. They stay for [`KEPT_AFTER_END`] after its end, so that the
//! last values are scraped, and are then gone; a job of the same name that begins takes their place.

mod families;
mod server;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::prometheus_text,
    metrics::{histogram::Histogram, info::Info},
    registry::Registry,
};
use protocol::{EvaluationRow, MetricsRow, Note, Record};

pub use prometheus_text::CONTENT_TYPE;
pub use server::{Listening, listen, serve};

/// How long the series of a job stay when it has ended.
pub const KEPT_AFTER_END: Duration = Duration::from_mins(15);

/// Upper bounds of a step's seconds: 10 ms, doubled up to 22 minutes.
const STEP_SECONDS: (f64, f64, u16) = (0.01, 2.0, 18);

/// The metrics of this process. Clones are the same metrics.
#[derive(Clone)]
pub struct Metrics {
    jobs: Jobs,
    registry: Arc<Registry>,
}

/// Every job's state, by name.
#[derive(Clone, Debug, Default)]
struct Jobs(Arc<Mutex<BTreeMap<String, State>>>);

/// What is told of a job.
#[derive(Debug)]
struct State {
    /// Which of the jobs of this name it is.
    begun: Instant,
    steps_planned: u64,
    row: Option<MetricsRow>,
    evaluation: Option<EvaluationRow>,
    /// Seconds since 1970.
    committed_at: Option<f64>,
    checkpoint: Option<u64>,
    counts: Counts,
    step_seconds: Histogram,
    ended: Option<Instant>,
}

/// What happened in this process.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    steps: u64,
    skipped: u64,
    pairs: u64,
    tokens: u64,
    evaluations: u64,
    checkpoints: u64,
    checkpoint_failures: u64,
    workers_lost: u64,
    rewinds: u64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Metrics without a job.
    pub fn new() -> Self {
        let jobs = Jobs::default();
        let mut registry = Registry::with_prefix("caldpo");
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        let build = Info::new(version.to_vec());
        registry.register("build", "The coordinator's build", build);
        registry.register_collector(Box::new(jobs.clone()));
        Self {
            jobs,
            registry: Arc::new(registry),
        }
    }

    /// A job begins, or goes on from `last` and `evaluation`. Series of an earlier job of its name end.
    pub fn job(
        &self,
        now: Instant,
        name: &str,
        last: Option<&MetricsRow>,
        evaluation: Option<&EvaluationRow>,
    ) -> JobMetrics {
        let (start, factor, length) = STEP_SECONDS;
        let bounds =
            prometheus_client::metrics::histogram::exponential_buckets(start, factor, length);
        let state = State {
            begun: now,
            steps_planned: 0,
            row: last.copied(),
            evaluation: evaluation.copied(),
            committed_at: None,
            checkpoint: None,
            counts: Counts::default(),
            step_seconds: Histogram::new(bounds),
            ended: None,
        };
        self.jobs.lock().insert(name.to_owned(), state);
        JobMetrics {
            jobs: self.jobs.clone(),
            name: name.to_owned(),
            begun: now,
        }
    }

    /// All metrics at `now` in Prometheus' text format; forgets the jobs whose time is over.
    pub fn text(&self, now: Instant) -> String {
        self.jobs.lock().retain(|_, job| {
            job.ended
                .is_none_or(|ended| now.saturating_duration_since(ended) < KEPT_AFTER_END)
        });
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.registry).expect("a string takes everything");
        text
    }
}

impl Jobs {
    /// No code panics while it holds the lock; were it so, the numbers would still be numbers.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, State>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running job's side of the metrics. Dropped, the job has ended.
pub struct JobMetrics {
    jobs: Jobs,
    name: String,
    begun: Instant,
}

impl JobMetrics {
    /// How many steps the whole run has.
    pub fn steps_planned(&self, steps: u64) {
        self.change(|state| state.steps_planned = steps);
    }

    /// A step was committed at `now`.
    pub fn step(&self, now: SystemTime, row: &MetricsRow) {
        self.change(|state| {
            let counts = &mut state.counts;
            counts.steps += 1;
            counts.skipped += u64::from(!row.report.finite);
            counts.pairs += row.report.pairs;
            counts.tokens += row.report.tokens;
            state.step_seconds.observe(row.seconds);
            state.row = Some(*row);
            let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
            state.committed_at = Some(since.as_secs_f64());
        });
    }

    /// Held-out pairs were evaluated.
    pub fn evaluation(&self, row: &EvaluationRow) {
        self.change(|state| {
            state.counts.evaluations += 1;
            state.evaluation = Some(*row);
        });
    }

    /// Something was journaled.
    pub fn record(&self, record: &Record) {
        self.change(|state| match record {
            Record::Checkpoint { step } => {
                state.counts.checkpoints += 1;
                state.checkpoint = Some(step.0);
            }
            Record::Rewind { .. } => state.counts.rewinds += 1,
            Record::Facts { facts } => state.steps_planned = facts.steps_total,
            Record::Opened
            | Record::Anew
            | Record::Generation { .. }
            | Record::Commit(_)
            | Record::Evaluation { .. }
            | Record::Completed { .. } => {}
        });
    }

    /// Something was noted.
    pub fn note(&self, note: &Note) {
        self.change(|state| match note.kind {
            "lost" => state.counts.workers_lost += 1,
            "unsaved" => state.counts.checkpoint_failures += 1,
            _ => {}
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut jobs = self.jobs.lock();
        let state = jobs.get_mut(&self.name);
        // A later job of the same name has its own.
        if let Some(state) = state.filter(|state| state.begun == self.begun) {
            change(state);
        }
    }
}

impl Drop for JobMetrics {
    fn drop(&mut self) {
        self.change(|state| state.ended = Some(Instant::now()));
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics")
            .field("jobs", &self.jobs)
            .finish_non_exhaustive()
    }
}
