//! After the last event: export with its model card, plots, summary, and what a person reads at the end.

use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::Context;
use checkpoint::{Retention, newest};
use protocol::{Cause, Outcome, RunFacts};

use crate::config::Config;
use crate::export::{best_checkpoint, export, exported_step};
use crate::model_card::ModelCard;
use crate::monitor::of_the_end;
use crate::objective::label;
use crate::plots::{RewardPlot, draw};
use crate::run_directory::RunDirectory;
use crate::summary::{Artifacts, Ending, ReferenceCounts, Summary, Totals};
use crate::ui::Report;

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
    let checkpoint = match newest(&config.checkpoint.path).context("look for checkpoints") {
        Ok(checkpoints) => checkpoints.found,
        Err(error) if *finished.outcome == Outcome::Completed => return Err(error),
        // The store may be what the run has failed of: its own words are the ones to read.
        Err(error) => {
            tracing::warn!("{error:#}");
            None
        }
    };
    let export = match finished.outcome {
        Outcome::Completed => {
            let checkpoint = checkpoint.as_ref();
            remove_older(config, directory, checkpoint);
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
    if *finished.outcome == Outcome::Completed {
        let last = directory.evaluations().last();
        if let Some(warning) = of_the_end(config, last, directory.warnings()) {
            directory.warning(SystemTime::now(), &warning)?;
        }
    }
    let digest = config.run_digest();
    let export_step = export
        .as_ref()
        .and_then(|export| exported_step(export, &digest));
    let ending = Ending {
        outcome: finished.outcome,
        facts: finished.facts,
        metrics: directory.metrics(),
        evaluations: directory.evaluations(),
        early_stop: directory.early_stop(),
        warnings: directory.warnings(),
        reference: finished.references,
        artifacts: Artifacts {
            checkpoint: checkpoint.map(|(_, path)| path),
            best_checkpoint: best_checkpoint(config, directory).map(|(_, path)| path),
            export,
            export_step,
            plot,
        },
    };
    let summary = Summary::new(config, ending, SystemTime::now());
    directory.write_summary(&summary)?;
    write_card(config, directory, &summary)?;
    let report = Report {
        summary: &summary,
        steps_total: finished.facts.map(|facts| facts.steps_total),
        samples: directory.samples(),
        summary_path: &directory.summary_path(),
        next: &next,
    };
    Ok(report.to_string())
}

/// Removes the checkpoints that the last one replaces, where a crash came between the two.
fn remove_older(config: &Config, directory: &RunDirectory, newest: Option<&(u64, PathBuf)>) {
    let Some(&(since, _)) = newest else {
        return;
    };
    let selection = config.selection().filter(|it| it.keep_best);
    let ranking = selection.map(|it| it.ranking(directory.evaluations()));
    let best_first: Vec<u64> = ranking.iter().flatten().map(|step| step.0).collect();
    let retention = Retention {
        keep_last: config.checkpoint.keep_last,
        keep_every_steps: config.checkpoint.keep_every_steps,
        best_first: &best_first,
        since,
        idle: false,
    };
    if let Err(error) = checkpoint::retain(&config.checkpoint.path, retention) {
        tracing::warn!("old checkpoints stay: {error}");
    }
}

/// Writes the card of the weights that are there. Exporting by hand may have put another checkpoint there, which no evaluation
/// describes.
fn write_card(config: &Config, directory: &RunDirectory, summary: &Summary) -> anyhow::Result<()> {
    let Some(step) = summary.artifacts.export_step else {
        return Ok(());
    };
    let last = step == summary.totals.steps;
    let evaluated = directory.evaluations().iter().any(|row| row.step == step);
    let Some(seen) = directory.metrics().get(..step as usize) else {
        return Ok(());
    };
    if !last && !evaluated {
        return Ok(());
    }
    let card = ModelCard {
        config,
        summary,
        step,
        seen: Totals::of(seen),
        evaluations: directory.evaluations(),
    };
    directory.write_model_card(&card.to_string())?;
    Ok(())
}

fn plot(config: &Config, directory: &RunDirectory) -> anyhow::Result<Option<PathBuf>> {
    // Without a reference there are no log-ratios to show.
    if directory.metrics().is_empty() || !config.has_rewards() {
        return Ok(None);
    }
    let objective = label(&config.objective_config, " = ");
    let title = format!("{} · {objective}", config.job.name);
    let drawing = draw(&RewardPlot {
        title: &title,
        metrics: directory.metrics(),
        evaluations: directory.evaluations(),
        targets: config.targets(),
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
    let model = if checkpoint::has_weights(export) {
        export.display().to_string()
    } else {
        // An adapter whose model is where the workers are.
        let model = config.training_value("model", "path");
        let model = model.and_then(toml::Value::as_str).unwrap_or("MODEL");
        format!("{model} --adapter {}", export.display())
    };
    format!(
        "{} worker score --model {model} --data {data} --out {}",
        program.unwrap_or("coordinator"),
        config.job.output.join("scores.jsonl").display()
    )
}
