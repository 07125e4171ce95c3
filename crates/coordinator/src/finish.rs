//! After the last event: export with its model card, plots, summary, and what a person reads at the end.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use checkpoint::{ExportDtype, newest};
use protocol::{Cause, Outcome, RunFacts};

use crate::config::Config;
use crate::model_card::ModelCard;
use crate::plots::{RewardPlot, draw};
use crate::run_directory::RunDirectory;
use crate::summary::{Artifacts, Ending, ReferenceCounts, Summary};
use crate::ui::Report;

/// Longest header that safetensors itself accepts.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// What is known at the end of a run.
pub struct Finished<'a> {
    /// How it ended.
    pub outcome: &'a Outcome,
    /// What the members agreed on.
    pub facts: Option<&'a RunFacts>,
    /// Reference values of this start of the run.
    pub references: ReferenceCounts,
    /// The command that continues an unfinished run.
    pub same_command: &'a str,
}

/// Writes what a run leaves behind and returns the report for a person. May be called again: an export and a
/// model card that are there stay.
///
/// # Errors
/// What could not be written. A plot that cannot be drawn is only a warning.
pub fn finish(
    config: &Config,
    directory: &mut RunDirectory,
    finished: &Finished,
) -> anyhow::Result<String> {
    let checkpoint = newest(&config.checkpoint.path)
        .context("look for checkpoints")?
        .found;
    let export = match finished.outcome {
        Outcome::Completed => {
            let checkpoint = checkpoint.as_ref();
            Some(export(config, directory, checkpoint).context("export the model")?)
        }
        _ => None,
    };
    let plot = match plot(config, directory) {
        Ok(plot) => plot,
        Err(error) => {
            tracing::warn!("{error:#}");
            None
        }
    };
    let next = next_command(config, finished, export.as_ref());
    let ending = Ending {
        outcome: finished.outcome,
        facts: finished.facts,
        metrics: directory.metrics(),
        evaluations: directory.evaluations(),
        reference: finished.references,
        artifacts: Artifacts {
            checkpoint: checkpoint.map(|(_, path)| path),
            export,
            plot,
        },
    };
    let summary = Summary::new(config, ending, SystemTime::now());
    directory.write_summary(&summary)?;
    if let Some(export) = &summary.artifacts.export
        && exported_step(export, &config.run_digest()) == Some(summary.totals.steps)
    {
        let card = ModelCard {
            config,
            summary: &summary,
            evaluations: directory.evaluations(),
        };
        directory.write_model_card(&card.to_string())?;
    }
    let report = Report {
        summary: &summary,
        steps_total: finished.facts.map(|facts| facts.steps_total),
        samples: directory.samples(),
        summary_path: &directory.summary_path(),
        next: &next,
    };
    Ok(report.to_string())
}

/// The export of a complete run, made from its newest checkpoint (step and folder) unless it is there.
fn export(
    config: &Config,
    directory: &RunDirectory,
    checkpoint: Option<&(u64, PathBuf)>,
) -> anyhow::Result<PathBuf> {
    let out = directory.export_path();
    if out.join("model.safetensors").exists() {
        return Ok(out);
    }
    // An older checkpoint, where the last one is damaged, holds other weights than the rows tell of.
    let last = directory.metrics().len() as u64;
    let Some((_, checkpoint)) = checkpoint.filter(|(step, _)| *step == last) else {
        anyhow::bail!(
            "{}: the run is complete, but no checkpoint that verifies holds its last step, {last}; restore it, or choose \
             another job.output to run again",
            config.checkpoint.path.display()
        )
    };
    let model = config.training_value("model", "path");
    let model = model
        .and_then(toml::Value::as_str)
        .context("model.path is missing")?;
    let dtype = match config.training_value("model", "dtype") {
        Some(dtype) if dtype.as_str() == Some("bf16") => ExportDtype::Bf16,
        _ => ExportDtype::F32,
    };
    // Workers on other machines may see a model that this one does not; rank 0 left a copy of what an export needs.
    let kept = config.checkpoint.path.join(checkpoint::SOURCE);
    let model = match Path::new(model) {
        here if here.join("config.json").exists() || !kept.exists() => here,
        _ => &kept,
    };
    checkpoint::export(checkpoint, model, &out, dtype)?;
    Ok(out)
}

/// Step of the weights in `export`, where they are this run's. Exporting by hand may have put an earlier checkpoint there,
/// which the card of the whole run would not describe.
fn exported_step(export: &Path, run_digest: &str) -> Option<u64> {
    let mut file = File::open(export.join("model.safetensors")).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let header = file.take(u64::from_le_bytes(length).min(HEADER_BYTES_MAX));
    let header: serde_json::Value = serde_json::from_reader(BufReader::new(header)).ok()?;
    let metadata = header.get("__metadata__")?;
    if metadata.get("caldpo_run")?.as_str() != Some(run_digest) {
        return None;
    }
    metadata.get("caldpo_step")?.as_str()?.parse().ok()
}

fn plot(config: &Config, directory: &RunDirectory) -> anyhow::Result<Option<PathBuf>> {
    // Completions without a rejected side have no rewards to show.
    if directory.metrics().is_empty() || config.objective() == "sft" {
        return Ok(None);
    }
    let mut title = format!("{} · {}", config.job.name, config.objective());
    if let Some(beta) = config.training_value("objective", "beta") {
        title = format!("{title}, β = {beta}");
    }
    let drawing = draw(&RewardPlot {
        title: &title,
        metrics: directory.metrics(),
        evaluations: directory.evaluations(),
        target: config.target(),
    })?;
    directory.write_plots(&drawing)?;
    Ok(Some(directory.plot_path()))
}

fn next_command(config: &Config, finished: &Finished, export: Option<&PathBuf>) -> String {
    let Some(export) = export else {
        let cause = match finished.outcome {
            Outcome::Failed { cause, .. } => Some(*cause),
            _ => None,
        };
        // What failed for its input fails again.
        let first = match cause {
            Some(Cause::Config) => "mend what is named above, then ",
            _ => "",
        };
        return format!("{first}{}", finished.same_command);
    };
    let list = |key| config.training_value("data", key)?.as_array()?.first();
    let data = list("eval").or_else(|| list("train"));
    let data = data.and_then(toml::Value::as_str).unwrap_or("pairs.jsonl");
    // This program carries the worker's commands, wherever it lies.
    let program = finished.same_command.split(' ').next();
    format!(
        "{} worker score --model {} --data {data} --out {}",
        program.unwrap_or("coordinator"),
        export.display(),
        config.job.output.join("scores.jsonl").display()
    )
}
