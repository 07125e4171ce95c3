//! `coordinator compare`: finished and unfinished runs beside each other, as one table and one plot.
//!
//! Run directories are only read, without their locks: a run may go on meanwhile.

mod run;
mod table;

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Context;
use serde_json::json;
use storage::{atomic_write, create_directory};

use crate::plots::{ComparedCurve, draw_comparison};
use run::Run;

pub use run::CompareError;

/// Beyond this, hues cannot be told apart.
const CURVES_MAX: usize = 16;

/// What to compare, and how to show it.
pub struct Comparison {
    /// Run directories, in the order of the rows.
    pub directories: Vec<PathBuf>,
    /// Print one JSON object instead of a table.
    pub json: bool,
    /// Folder of `compare.png` and `compare.svg`.
    pub out: PathBuf,
}

/// Draws the plot, and returns what to print, without its last line end.
///
/// # Errors
/// [`CompareError`] where a directory cannot be read as a run's; else what could not be drawn or written.
pub fn compare(comparison: &Comparison) -> anyhow::Result<String> {
    let runs = labelled(Run::read_all(&comparison.directories)?);
    let mut notes = table::notes(&runs);
    let plot = plot(&runs, comparison, &mut notes)?;
    if comparison.json {
        let runs: Vec<_> = runs.iter().map(Run::to_json).collect();
        let object = json!({"runs": runs, "notes": notes, "plot": plot});
        return serde_json::to_string_pretty(&object).context("write the comparison");
    }
    let mut text = table::table(&runs).to_string();
    for note in &notes {
        text = format!("{text}\n{note}");
    }
    if let Some(plot) = plot {
        text = format!("{text}\nplot: {}", plot.display());
    }
    Ok(text)
}

/// Runs of one name are told apart by their folders.
fn labelled(mut runs: Vec<Run>) -> Vec<Run> {
    let mut times = BTreeMap::new();
    for run in &runs {
        *times.entry(run.label.clone()).or_insert(0) += 1;
    }
    for run in &mut runs {
        if times[&run.label] > 1 {
            run.label = format!("{} ({})", run.label, run.path.display());
        }
    }
    runs
}

fn plot(
    runs: &[Run],
    comparison: &Comparison,
    notes: &mut Vec<String>,
) -> anyhow::Result<Option<PathBuf>> {
    let curves: Vec<_> = runs
        .iter()
        .filter(|run| run.objective.has_rewards())
        .map(|run| ComparedCurve {
            name: format!("{} · {}", run.label, run.objective.label()),
            held_out: run.is_held_out(),
            points: run.curve(),
        })
        .filter(|curve| !curve.points.is_empty())
        .collect();
    if curves.is_empty() {
        notes.push("no plot: none of these runs has rewards yet".into());
        return Ok(None);
    }
    if curves.len() > CURVES_MAX {
        notes.push(format!(
            "no plot: the hues of {} runs cannot be told apart; name at most {CURVES_MAX}",
            curves.len()
        ));
        return Ok(None);
    }
    let drawing = draw_comparison(&curves)?;
    let png = comparison.out.join("compare.png");
    create_directory(&comparison.out)?;
    atomic_write(&png, &drawing.png)?;
    atomic_write(&png.with_extension("svg"), drawing.svg.as_bytes())?;
    Ok(Some(png))
}
