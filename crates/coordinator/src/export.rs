//! `export/`: which step's weights a complete run leaves as its model, and which ones lie there.

use std::path::{Path, PathBuf};

use anyhow::Context;
use checkpoint::{ExportDtype, SHARD_BYTES_MAX, visible};

use crate::config::Config;
use crate::run_directory::RunDirectory;

/// The export of a complete run, in the element types of the model that it began with, made unless it is there: one that was
/// made by hand stays. An adapter is left by itself too, and that alone where the model is not here. `newest` are step and
/// folder of the newest checkpoint that verifies.
pub(crate) fn export(
    config: &Config,
    directory: &RunDirectory,
    newest: Option<&(u64, PathBuf)>,
) -> anyhow::Result<PathBuf> {
    let out = directory.export_path();
    if checkpoint::has_weights(&out) {
        return Ok(out);
    }
    let model = config.training_value("model", "path");
    let model = model
        .and_then(toml::Value::as_str)
        .context("model.path is missing")?;
    // Workers on other machines may see a model that this one does not; rank 0 left a copy of what an export needs.
    let here = Path::new(model);
    let mut kept = config.checkpoint.path.join(checkpoint::SOURCE);
    let is_here = here.join("config.json").exists();
    if !is_here && storage::is_remote(&config.checkpoint.path) {
        kept = out.with_file_name(checkpoint::SOURCE);
        checkpoint::fetch_source(&config.checkpoint.path, &kept)?;
    }
    let model = if is_here || !kept.exists() {
        here
    } else {
        &kept
    };
    let write = |checkpoint: &Path| -> anyhow::Result<PathBuf> {
        if checkpoint::is_adapter(checkpoint)? {
            let adapter = directory.adapter_path();
            checkpoint::export_adapter(checkpoint, &adapter)?;
            if !checkpoint::has_weights(model) {
                // Merging needs the model, which only the workers see.
                return Ok(adapter);
            }
        }
        checkpoint::export(
            checkpoint,
            model,
            &out,
            ExportDtype::Source,
            SHARD_BYTES_MAX,
        )?;
        Ok(out.clone())
    };
    let Some((step, checkpoint)) = best_checkpoint(config, directory) else {
        return write(last_checkpoint(config, directory, newest)?);
    };
    write(&checkpoint).with_context(|| {
        format!(
            "step {step} is the best that was kept; --set checkpoint.keep_best=false exports the last one instead"
        )
    })
}

/// Step and folder of the best checkpoint, where it is kept: the first, from the best evaluation down, that is there. A save
/// may have failed.
pub(crate) fn best_checkpoint(config: &Config, directory: &RunDirectory) -> Option<(u64, PathBuf)> {
    let selection = config.selection().filter(|it| it.keep_best)?;
    let ranking = selection.ranking(directory.evaluations());
    ranking.into_iter().find_map(|step| {
        let path = visible(&config.checkpoint.path, step.0)?;
        Some((step.0, path))
    })
}

/// Folder of the last step's checkpoint. An older one, where that is damaged, holds other weights than the rows tell of.
fn last_checkpoint<'a>(
    config: &Config,
    directory: &RunDirectory,
    newest: Option<&'a (u64, PathBuf)>,
) -> anyhow::Result<&'a Path> {
    let last = directory.metrics().len() as u64;
    let Some((_, checkpoint)) = newest.filter(|(step, _)| *step == last) else {
        anyhow::bail!(
            "{}: the run is complete, but no checkpoint that verifies holds its last step, {last}; restore it, or choose \
             another job.output to run again",
            config.checkpoint.path.display()
        )
    };
    Ok(checkpoint)
}

/// Step of the weights in `export`, where they are this run's.
pub(crate) fn exported_step(export: &Path, run_digest: &str) -> Option<u64> {
    let exported = checkpoint::exported(export)?;
    (exported.run_digest == run_digest).then_some(exported.step)
}
