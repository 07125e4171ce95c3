//! A checkpoint's weights as a Hugging Face model directory: weights from the checkpoint, everything else from the model that
//! the run began with.
//!
//! ```text
//! model.safetensors        u64 LE  length of the header, a multiple of 8
//!                          header  JSON: {"__metadata__": {"format": "pt", "caldpo_run": .., "caldpo_step": ..},
//!                                         NAME: {"dtype": "F32" | "BF16", "shape": [..], "data_offsets": [start, end]}, ..}
//!                          data    f32 or bf16 LE, tensors in the model's order without gaps
//! config.json              the source's, with the dtype of the weights
//! generation_config.json, tokenizer*, chat_template*, special_tokens_map.json, ..   the source's, byte for byte
//! ```

mod source;
mod weights;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;
use storage::FileError;

use crate::{
    folder::at,
    read::{Checkpoint, CheckpointError},
};

/// Folder beside the checkpoints with the model's config and tokenizer.
pub const SOURCE: &str = "source";

/// Element type of exported weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportDtype {
    /// The bits of the checkpoint.
    F32,
    /// Rounded to the nearest bf16, ties to even.
    Bf16,
}

/// What an export has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExportSummary {
    /// The model directory.
    pub path: PathBuf,
    /// Step of the weights.
    pub step: u64,
    /// Element type of the weights.
    pub dtype: ExportDtype,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of elements of all tensors.
    pub parameters: usize,
    /// Size of `model.safetensors`.
    pub bytes: u64,
    /// Names of the files that were copied from the source.
    pub copied: Vec<String>,
}

/// Why nothing was exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The source is no model directory.
    #[error(
        "{path} has no {}; name the model directory that the run began with",
        source::CONFIG
    )]
    NoModel {
        /// The directory.
        path: PathBuf,
    },
    /// The source's file is not what it should be.
    #[error("{path}: {reason}")]
    Source {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The source is another model than the checkpoint's.
    #[error(
        "{path}: tensor `{tensor}` {found}, in the checkpoint it is {expected:?}; name the model that the run began with"
    )]
    OtherModel {
        /// The source's directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape in the checkpoint.
        expected: Vec<usize>,
        /// What the source has instead.
        found: String,
    },
    /// The target holds something that is not an earlier export of this run.
    #[error(
        "{path} exists and is not an earlier export of this run; remove it or name another folder"
    )]
    Occupied {
        /// The target.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Writes the weights of `checkpoint` as the model directory `out`, with the other files of `source_model_dir`. An earlier
/// export of the same run is replaced. `out` appears whole: it is made beside its place and renamed.
///
/// # Errors
/// Nothing is left behind then. A crash may leave a folder `OUT.*.tmp`.
pub fn export(
    checkpoint: &Path,
    source_model_dir: &Path,
    out: &Path,
    dtype: ExportDtype,
) -> Result<ExportSummary, ExportError> {
    let checkpoint = Checkpoint::open(checkpoint)?;
    let config = source::config(source_model_dir, dtype)?;
    source::check_tensors(source_model_dir, &checkpoint.manifest().tensors)?;
    let copied = source::files(source_model_dir)?;
    check_target(out, &checkpoint)?;

    let temporary = beside(out, "tmp");
    storage::remove_directory(&temporary)?;
    storage::create_directory(&temporary)?;
    let written = fill(
        &temporary,
        &checkpoint,
        source_model_dir,
        &copied,
        &config,
        dtype,
    );
    let moved = written.and_then(|bytes| put_in_place(&temporary, out).map(|()| bytes));
    let bytes = match moved {
        Ok(bytes) => bytes,
        Err(error) => {
            // The first error is the one to tell.
            drop(storage::remove_directory(&temporary));
            return Err(error);
        }
    };
    let manifest = checkpoint.manifest();
    Ok(ExportSummary {
        path: out.to_owned(),
        step: manifest.state.step,
        dtype,
        tensors: manifest.tensors.len(),
        parameters: weights::parameters(manifest),
        bytes,
        copied,
    })
}

/// Copies the small files of `model_dir` that an export needs (config and tokenizer) to [`SOURCE`] below `checkpoints`, so that
/// it can be made where the model is not. Files that are there already with the same content stay untouched.
///
/// # Errors
/// `model_dir` is no model directory, or something cannot be written.
pub fn keep_source(model_dir: &Path, checkpoints: &Path) -> Result<(), ExportError> {
    let folder = checkpoints.join(SOURCE);
    storage::create_directory(&folder)?;
    let mut names = source::files(model_dir)?;
    names.push(source::CONFIG.into());
    for name in names {
        let from = model_dir.join(&name);
        let content = fs::read(&from).map_err(at("read", &from))?;
        let to = folder.join(&name);
        if fs::read(&to).is_ok_and(|there| there == content) {
            continue;
        }
        storage::atomic_write(&to, &content)?;
    }
    Ok(())
}

/// Refuses a target whose content would be lost.
fn check_target(out: &Path, checkpoint: &Checkpoint) -> Result<(), ExportError> {
    let occupied = || ExportError::Occupied {
        path: out.to_owned(),
    };
    let mut entries = match fs::read_dir(out) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Err(occupied()),
        entries => entries.map_err(at("list", out))?,
    };
    if entries.next().is_none() {
        return Ok(());
    }
    let run = source::header(&out.join(weights::FILE))
        .ok()
        .and_then(|header| header.metadata().as_ref()?.get(weights::RUN_KEY).cloned());
    if run.as_ref() == Some(&checkpoint.manifest().info.run_digest) {
        return Ok(());
    }
    Err(occupied())
}

/// Writes all files of the model directory; returns the size of the weights.
fn fill(
    folder: &Path,
    checkpoint: &Checkpoint,
    source: &Path,
    copied: &[String],
    config: &[u8],
    dtype: ExportDtype,
) -> Result<u64, ExportError> {
    let bytes = weights::write(&folder.join(weights::FILE), checkpoint, dtype)?;
    storage::atomic_write(&folder.join(source::CONFIG), config)?;
    for name in copied {
        let from = source.join(name);
        let content = fs::read(&from).map_err(at("read", &from))?;
        storage::atomic_write(&folder.join(name), &content)?;
    }
    Ok(bytes)
}

/// Renames the finished folder to `out`, after moving an earlier export out of the way.
fn put_in_place(finished: &Path, out: &Path) -> Result<(), ExportError> {
    if !out.exists() {
        return Ok(storage::rename(finished, out)?);
    }
    let old = beside(out, "old.tmp");
    storage::remove_directory(&old)?;
    storage::rename(out, &old)?;
    storage::rename(finished, out)?;
    // The new one stands; an old one that stays costs disk space only.
    drop(storage::remove_directory(&old));
    Ok(())
}

/// A name in the same directory, and thus the same file system, for this process.
fn beside(out: &Path, ending: &str) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.{ending}", std::process::id()));
    out.with_file_name(name)
}
