//! Content of `summary.json`: how a run ended, in numbers that a script can read.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::Context;

use protocol::{Cause, EarlyStop, EvaluationRow, MetricsRow, Outcome, Phases, RunFacts};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    config::Config,
    monitor::{DATA, Warning},
    phases::shares,
    timestamp::rfc3339,
};

/// Where the run's results are; absent what was not written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Artifacts {
    /// Newest verified checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The best evaluated step's checkpoint, where `checkpoint.keep_best` keeps it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_checkpoint: Option<PathBuf>,
    /// Trained model in Hugging Face's layout.
    pub export: Option<PathBuf>,
    /// Step of the weights in `export`; absent when they are not this run's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export_step: Option<u64>,
    /// Plot for people.
    pub plot: Option<PathBuf>,
}

/// Reference values of the run's generations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReferenceCounts {
    /// Found in the store.
    pub reused: u64,
    /// Computed.
    pub computed: u64,
}

impl ReferenceCounts {
    /// Both counts together with `other`'s.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            reused: self.reused + other.reused,
            computed: self.computed + other.computed,
        }
    }
}

/// Sums over the committed steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Committed steps.
    pub steps: u64,
    /// Those whose gradient was not finite, and whose update was dropped.
    pub skipped_steps: u64,
    /// Pairs, counted each time they were trained on.
    pub pairs: u64,
    /// Tokens, unpadded, the prompt counted for both completions.
    pub tokens: u64,
    /// Time in steps.
    pub seconds: f64,
    /// Where the members' time went, the mean over the ranks; all 0 where nobody measured.
    #[serde(flatten)]
    pub phases: Phases,
    /// Tokens divided by seconds; 0 where there was no step.
    pub tokens_per_second: f64,
    /// Pairs divided by seconds; 0 where there was no step.
    pub pairs_per_second: f64,
}

/// The best evaluation of trained weights by `evaluate.metric`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BestEvaluation {
    /// What was compared.
    pub metric: &'static str,
    /// Its direction.
    pub higher_is_better: bool,
    /// The committed step whose weights were evaluated.
    pub step: u64,
    /// Its value.
    pub value: f64,
    /// The starting weights' value, where they were evaluated.
    pub start: Option<f64>,
}

/// Training that ended before its schedule.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StoppedEarly {
    /// The last step.
    pub step: u64,
    /// Why, with the numbers.
    pub reason: String,
    /// The evaluation that decided it.
    pub decision: EarlyStop,
}

/// `summary.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// `job.name`.
    pub name: String,
    /// `completed`, `interrupted` or `failed`; of a service's job also `cancelled` ([`record_cancelled`]).
    pub outcome: &'static str,
    /// Why it failed, or was cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Who is to act on a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// When this was written, RFC 3339.
    pub time: String,
    /// Version of the program.
    pub tool_version: &'static str,
    /// `objective.kind`.
    pub objective: String,
    /// Where the objective calibrates r_w to: t = 1/(2β) unless it is shifted.
    pub target: Option<f64>,
    /// Where it calibrates r_l to: −t.
    pub target_rejected: Option<f64>,
    /// Worker processes.
    pub workers: u32,
    /// What the workers found; absent when they never loaded.
    pub facts: Option<RunFacts>,
    /// Sums over the committed steps.
    pub totals: Totals,
    /// What each phase has of the time that was measured, by name; absent where nobody measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase_shares: Option<BTreeMap<&'static str, f64>>,
    /// Why there are fewer of them than the schedule has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stop: Option<StoppedEarly>,
    /// Reference values.
    pub reference: ReferenceCounts,
    /// First evaluation: step 0, unless the run never got there.
    pub before: Option<EvaluationRow>,
    /// Last evaluation, when it is not the first.
    pub after: Option<EvaluationRow>,
    /// Best evaluation, where they are compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<BestEvaluation>,
    /// The evaluation of the exported weights, when it is neither the first nor the last.
    #[serde(skip)]
    pub exported: Option<EvaluationRow>,
    /// The last committed step.
    pub last_step: Option<MetricsRow>,
    /// What was warned of: of each rule the latest, the oldest first.
    pub warnings: Vec<Warning>,
    /// Where the results are.
    #[serde(flatten)]
    pub artifacts: Artifacts,
}

/// What a summary is made of besides the configuration.
pub struct Ending<'a> {
    /// How the run ended.
    pub outcome: &'a Outcome,
    /// What the workers found.
    pub facts: Option<&'a RunFacts>,
    /// Rows of the committed steps.
    pub metrics: &'a [MetricsRow],
    /// Rows of the evaluations.
    pub evaluations: &'a [EvaluationRow],
    /// Why the run ended before its schedule.
    pub early_stop: Option<&'a EarlyStop>,
    /// Warnings, the oldest first.
    pub warnings: &'a [Warning],
    /// Reference values.
    pub reference: ReferenceCounts,
    /// Where the results are.
    pub artifacts: Artifacts,
}

impl Summary {
    /// Sums a run up.
    pub fn new(config: &Config, ending: Ending, now: SystemTime) -> Self {
        let (outcome, reason, cause) = match ending.outcome {
            Outcome::Completed => ("completed", None, None),
            Outcome::Interrupted { .. } => ("interrupted", None, None),
            Outcome::Failed { cause, reason } => ("failed", Some(reason.clone()), Some(*cause)),
        };
        let (before, after) = before_after(ending.evaluations);
        let exported = ending.evaluations.iter().find(|row| {
            let ends = [before, after].into_iter().flatten();
            Some(row.step) == ending.artifacts.export_step
                && ends.clone().all(|it| it.step != row.step)
        });
        let totals = Totals::of(ending.metrics);
        let steps = totals.steps;
        let early_stop = ending.early_stop.map(|decision| StoppedEarly {
            step: steps,
            reason: decision.to_string(),
            decision: decision.clone(),
        });
        Self {
            name: config.job.name.clone(),
            outcome,
            reason,
            cause,
            time: rfc3339(now),
            tool_version: env!("CARGO_PKG_VERSION"),
            objective: config.objective().to_owned(),
            target: config.targets().map(|targets| targets.chosen),
            target_rejected: config.targets().map(|targets| targets.rejected),
            workers: config.cluster.workers,
            facts: ending.facts.cloned(),
            phase_shares: shares(&totals.phases).map(BTreeMap::from),
            totals,
            early_stop,
            reference: ending.reference,
            before: before.copied(),
            after: after.copied(),
            best: best(config, ending.evaluations),
            exported: exported.copied(),
            last_step: ending.metrics.last().copied(),
            warnings: latest(ending.warnings),
            artifacts: ending.artifacts,
        }
    }
}

/// Writes into the summary in the run directory `output` that the job was cancelled, and why. An attempt knows only that it was to
/// stop; that it will not go on is known to whoever it was cancelled with, perhaps while it waited for its next attempt. A
/// summary that tells of another end stays, and where there is none the run never began.
///
/// # Errors
/// A summary that cannot be read or written.
pub fn record_cancelled(output: &Path, reason: &str) -> anyhow::Result<()> {
    let path = output.join("summary.json");
    let text = match std::fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        text => text.with_context(|| format!("read {}", path.display()))?,
    };
    let mut summary: Map<String, Value> =
        serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
    if summary.get("outcome").and_then(Value::as_str) != Some("interrupted") {
        return Ok(());
    }
    summary.insert("outcome".into(), "cancelled".into());
    summary.insert("reason".into(), reason.into());
    let text = serde_json::to_string_pretty(&summary).context("write the summary as JSON")?;
    storage::atomic_write(&path, format!("{text}\n").as_bytes())?;
    Ok(())
}

impl Totals {
    /// Sums rows up.
    pub fn of(rows: &[MetricsRow]) -> Self {
        let mut totals = Self::default();
        for row in rows {
            totals.steps += 1;
            totals.skipped_steps += u64::from(!row.report.finite);
            totals.pairs += row.report.pairs;
            totals.tokens += row.report.tokens;
            totals.seconds += row.seconds;
            totals.phases = totals.phases.plus(&row.phases);
        }
        if totals.seconds > 0.0 {
            totals.tokens_per_second = totals.tokens as f64 / totals.seconds;
            totals.pairs_per_second = totals.pairs as f64 / totals.seconds;
        }
        totals
    }
}

/// The first evaluation, and the last when there is another.
pub(crate) fn before_after(
    rows: &[EvaluationRow],
) -> (Option<&EvaluationRow>, Option<&EvaluationRow>) {
    match rows {
        [] => (None, None),
        [only] => (Some(only), None),
        [first, .., last] => (Some(first), Some(last)),
    }
}

/// The best evaluation, where they are compared.
fn best(config: &Config, rows: &[EvaluationRow]) -> Option<BestEvaluation> {
    let selection = config.selection()?;
    let best = selection.best(rows)?;
    let start = rows.first().filter(|row| row.step == 0);
    Some(BestEvaluation {
        metric: selection.metric.name(),
        higher_is_better: selection.higher_is_better,
        step: best.step,
        value: best.value,
        start: start.map(|row| selection.metric.of(&row.statistics)),
    })
}

/// Of each rule the latest warning; the data's are one each.
pub fn latest(warnings: &[Warning]) -> Vec<Warning> {
    let mut kept: Vec<Warning> = Vec::new();
    for warning in warnings {
        let same = |it: &Warning| it.kind == warning.kind && it.kind != DATA;
        match kept.iter().position(same) {
            Some(place) => kept[place] = warning.clone(),
            None => kept.push(warning.clone()),
        }
    }
    kept
}
