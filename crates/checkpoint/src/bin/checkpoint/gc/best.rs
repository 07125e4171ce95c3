//! Which evaluated steps of a run are the best, from its `eval.jsonl`: one JSON object per line with `step` and metrics.

use std::{cmp::Ordering, fs, path::Path};

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::Usage;

/// Which values are better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Better {
    /// The larger ones.
    Higher,
    /// The smaller ones.
    Lower,
}

/// Steps by a metric.
#[derive(Debug, PartialEq, Eq)]
pub struct Ranking {
    /// The best first.
    pub best_first: Vec<u64>,
    /// First step that no evaluation tells anything about.
    pub since: u64,
}

impl Default for Ranking {
    fn default() -> Self {
        Self {
            best_first: Vec::new(),
            since: u64::MAX,
        }
    }
}

/// Ranks the evaluations in `file` by `metric`; of equals the earlier is better. Values that are not finite do not count.
pub fn rank(file: &Path, metric: &str, better: Option<Better>) -> Result<Ranking> {
    let better = better
        .or_else(|| direction(metric))
        .ok_or_else(|| Usage(format!("say --better higher or --better lower of {metric}")))?;
    let text = fs::read_to_string(file).with_context(|| {
        format!(
            "read the evaluations in {}; --evaluations names another file",
            file.display()
        )
    })?;
    let rows = rows(&text).with_context(|| format!("read {}", file.display()))?;
    if !rows.iter().any(|row| row.contains_key(metric)) {
        let last = rows.last().into_iter().flatten();
        let known: Vec<&str> = last.map(|(name, _)| name.as_str()).collect();
        let known = known.join(", ");
        let reason = format!(
            "{}: no evaluation has `{metric}`; they have: {known}",
            file.display()
        );
        return Err(Usage(reason).into());
    }
    let step = |row: &Map<String, Value>| row.get("step").and_then(Value::as_u64).unwrap_or(0);
    let since = rows.iter().map(step).max().map_or(0, |last| last + 1);
    let mut ranked: Vec<(f64, u64)> = rows
        .iter()
        .filter_map(|row| Some((row.get(metric)?.as_f64()?, step(row))))
        .filter(|(value, _)| value.is_finite())
        .collect();
    ranked.sort_by(|one, other| {
        let by_value = one.0.partial_cmp(&other.0).unwrap_or(Ordering::Equal);
        let by_value = match better {
            Better::Higher => by_value.reverse(),
            Better::Lower => by_value,
        };
        by_value.then(one.1.cmp(&other.1))
    });
    Ok(Ranking {
        best_first: ranked.into_iter().map(|(_, step)| step).collect(),
        since,
    })
}

fn rows(text: &str) -> Result<Vec<Map<String, Value>>> {
    let mut rows = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        // A crash may have torn the last line; the run's next start cuts it off.
        if !line.ends_with('\n') {
            break;
        }
        let row = serde_json::from_str(line).with_context(|| format!("line {}", index + 1))?;
        rows.push(row);
    }
    Ok(rows)
}

/// The direction of metrics that leave no choice.
fn direction(metric: &str) -> Option<Better> {
    match metric {
        "rewards/chosen" | "rewards/margins" | "rewards/accuracies" | "log_ratios/chosen"
        | "logps/chosen" => Some(Better::Higher),
        _ if metric == "loss" || metric.starts_with("loss/") => Some(Better::Lower),
        _ => None,
    }
}
