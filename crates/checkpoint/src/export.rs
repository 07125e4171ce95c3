//! A checkpoint's weights as a Hugging Face model directory: weights from the checkpoint (those of an adapter merged into the
//! model's), everything else from the model that the run began with. Adapters also by themselves: see `adapter`.
//!
//! ```text
//! model.safetensors        u64 LE  length of the header, a multiple of 8
//!                          header  JSON: {"__metadata__": {"format": "pt", "caldpo_run": .., "caldpo_step": ..},
//!                                         NAME: {"dtype": "F32" | "BF16" | "F16", "shape": [..], "data_offsets": [start, end]}, ..}
//!                          data    little endian, tensors without gaps: those of 4 bytes an element, then those of 2, each in
//!                                  the model's order
//! or, where that would exceed the largest shard,
//! model-00001-of-00002.safetensors, ..      the same, each with its part of the tensors
//! model.safetensors.index.json              {"metadata": {"total_parameters", "total_size"}, "weight_map": {NAME: FILE, ..}}
//!
//! config.json              the source's, with the dtype of the weights: that of most parameters where they differ
//! generation_config.json, tokenizer*, chat_template*, special_tokens_map.json, ..   the source's, byte for byte
//! ```

mod adapter;
mod base;
mod directory;
mod dtype;
mod shards;
mod source;
mod weights;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use safetensors::Dtype;
use serde::Serialize;
use storage::{Condition, FileError, Folder};

use crate::{
    digest::Watch,
    folder::at,
    manifest::Manifest,
    parts::{Kind, TensorSpec},
    read::{Checkpoint, CheckpointError},
};

pub(crate) use base::Base;

pub use adapter::{export_adapter, is_adapter, keep_adapter};
pub use directory::{Exported, exported, has_weights};
pub use dtype::{ExportDtype, WeightDtype};
pub use shards::SHARD_BYTES_MAX;

use adapter::Merged;
use shards::{Shard, Tensor};

/// Folder beside the checkpoints with the model's config and tokenizer, and what its weights are like.
pub const SOURCE: &str = "source";

/// What an export has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExportSummary {
    /// The model directory.
    pub path: PathBuf,
    /// Step of the weights.
    pub step: u64,
    /// Element type of most parameters, which config.json names.
    pub dtype: WeightDtype,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of elements of all tensors.
    pub parameters: usize,
    /// Size of all files with weights.
    pub bytes: u64,
    /// Names of these files.
    pub weights: Vec<String>,
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
    /// The source holds a tensor in a type that is not written.
    #[error(
        "{path}: tensor `{tensor}` is {found:?}, which an export does not write; choose one for all with `checkpoint export --dtype f32`"
    )]
    SourceDtype {
        /// The source's directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type there.
        found: Dtype,
    },
    /// A weight would become infinite.
    #[error(
        "tensor `{tensor}`: {value:e} is beyond the largest {dtype}; export it with `checkpoint export --dtype f32`, or bf16 instead \
         of f16"
    )]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The value.
        value: f32,
        /// The type that it does not fit into, in torch's words.
        dtype: &'static str,
    },
    /// An adapter is to be merged into a model that is not here.
    #[error("{path} has no weights; name the model directory that the adapter was trained on")]
    NoBase {
        /// The directory.
        path: PathBuf,
    },
    /// The checkpoint is of a model.
    #[error("{path} holds a model and no adapter; export it without `--adapter`")]
    NoAdapter {
        /// The checkpoint.
        path: PathBuf,
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

/// Writes the weights of `checkpoint` (of an adapter, merged into those of `source_model_dir`) as the model directory `out`, with the other files of `source_model_dir`, in files of at
/// most `shard_bytes_max` bytes of tensors (a larger tensor has one for itself). An earlier export of the same run is replaced.
/// `out` appears whole: it is made beside its place and renamed.
///
/// # Errors
/// Nothing is left behind then. A crash may leave a folder `OUT.*.tmp`.
pub fn export(
    checkpoint: &Path,
    source_model_dir: &Path,
    out: &Path,
    dtype: ExportDtype,
    shard_bytes_max: u64,
) -> Result<ExportSummary, ExportError> {
    export_watched(
        checkpoint,
        source_model_dir,
        out,
        dtype,
        shard_bytes_max,
        &|_| (),
    )
}

/// [`export`]; `watch` hears of the weights' bytes, as f32, as they are read.
pub fn export_watched(
    checkpoint: &Path,
    source_model_dir: &Path,
    out: &Path,
    dtype: ExportDtype,
    shard_bytes_max: u64,
    watch: Watch<'_>,
) -> Result<ExportSummary, ExportError> {
    let path = checkpoint;
    let checkpoint = Checkpoint::open(path)?;
    let manifest = checkpoint.manifest();
    let mut weights = if adapter::holds_adapter(&checkpoint) {
        Weights::Merged(Merged::open(&checkpoint, path, source_model_dir)?)
    } else {
        Weights::Own(&checkpoint)
    };
    let specs = weights.specs();
    let tensors = source::typed(source_model_dir, &specs, dtype)?;
    let dtype = prevailing(&tensors);
    let mut copied = source::files(source_model_dir)?;
    let chat_template = kept_chat_template(path)?;
    if chat_template.is_some() {
        copied.retain(|name| name != source::CHAT_TEMPLATE);
    }
    let export = Export {
        config: source::config(source_model_dir, dtype)?,
        copied,
        chat_template,
        source: source_model_dir,
        shards: shards::plan(&tensors, shard_bytes_max),
        manifest,
    };
    check_target(out, &manifest.info.run_digest)?;

    let temporary = beside(out, "tmp");
    storage::remove_directory(&temporary)?;
    storage::create_directory(&temporary)?;
    let written = export.fill(&temporary, &mut weights, watch);
    let moved = written.and_then(|bytes| put_in_place(&temporary, out).map(|()| bytes));
    let bytes = match moved {
        Ok(bytes) => bytes,
        Err(error) => {
            // The first error is the one to tell.
            drop(storage::remove_directory(&temporary));
            return Err(error);
        }
    };
    Ok(ExportSummary {
        path: out.to_owned(),
        step: manifest.state.step,
        dtype,
        tensors: tensors.len(),
        parameters: tensors.iter().map(Tensor::elements).sum(),
        bytes,
        weights: export.shards.into_iter().map(|shard| shard.name).collect(),
        copied: export.copied,
    })
}

/// Copies the small files of `model_dir` that an export needs (config and tokenizer) to [`SOURCE`] below `checkpoints`, with the
/// types and shapes of its tensors, so that it can be made where the model is not. The file of a `chat_template` that the run used
/// takes the place of the model's own, in every export of these checkpoints. Files that are there already with the same content
/// stay untouched.
///
/// # Errors
/// `model_dir` is no model directory, or something cannot be written.
pub fn keep_source(
    model_dir: &Path,
    chat_template: Option<&Path>,
    checkpoints: &Path,
) -> Result<(), ExportError> {
    let folder = Folder::open(checkpoints)?.below(SOURCE);
    let mut names = source::files(model_dir)?;
    if let Some(template) = chat_template {
        names.retain(|name| name != source::CHAT_TEMPLATE);
        let content = fs::read(template).map_err(at("read", template))?;
        keep(&folder, source::CHAT_TEMPLATE, &content)?;
    } else if !names.iter().any(|name| name == source::CHAT_TEMPLATE) {
        // Of a run that had another one, and ended before it saved anything.
        folder.remove(source::CHAT_TEMPLATE)?;
    }
    names.push(source::CONFIG.into());
    for name in names {
        let from = model_dir.join(&name);
        keep(&folder, &name, &fs::read(&from).map_err(at("read", &from))?)?;
    }
    let tensors = source::tensors(model_dir)?;
    if !tensors.is_empty() {
        let content = serde_json::to_vec(&tensors).expect("names and numbers are always JSON");
        keep(&folder, source::TENSORS, &content)?;
    }
    Ok(())
}

/// Copies what [`keep_source`] has kept below `checkpoints` to the directory `into`, where an export can use it: an export reads
/// the model's files from a disk. False where nothing was kept.
///
/// # Errors
/// Something cannot be read or written.
pub fn fetch_source(checkpoints: &Path, into: &Path) -> Result<bool, ExportError> {
    let kept = Folder::open(checkpoints)?.below(SOURCE);
    let names = kept.list()?;
    let copy = Folder::open(into)?;
    for name in &names {
        if let Some(content) = kept.read(name)? {
            keep(&copy, name, &content)?;
        }
    }
    Ok(!names.is_empty())
}

/// The chat template beside the checkpoint at `path`: the model's own, or the one that the run used in its place.
fn kept_chat_template(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    let Some(checkpoints) = path.parent() else {
        return Ok(None);
    };
    let kept = Folder::open(checkpoints)?.below(SOURCE);
    kept.read(source::CHAT_TEMPLATE)
}

/// Puts a small file there, unless it is there already with that content.
fn keep(folder: &Folder, name: &str, content: &[u8]) -> Result<(), FileError> {
    if folder.read(name)?.is_some_and(|there| there == content) {
        return Ok(());
    }
    // Others keep the same; which of them comes last does not matter.
    let _ = folder.put(name, content, Condition::Always)?;
    Ok(())
}

/// Where an export's weights come from.
enum Weights<'a> {
    /// The checkpoint's own.
    Own(&'a Checkpoint),
    /// A model's, with the checkpoint's adapter.
    Merged(Merged<'a>),
}

impl Weights<'_> {
    fn specs(&self) -> Vec<TensorSpec> {
        match self {
            Self::Own(checkpoint) => checkpoint.manifest().tensors.clone(),
            Self::Merged(merged) => merged.specs().to_vec(),
        }
    }

    fn read(&mut self, name: &str, start: usize, values: &mut [f32]) -> Result<(), ExportError> {
        match self {
            Self::Own(checkpoint) => Ok(checkpoint.read(name, Kind::Weight, start, values)?),
            Self::Merged(merged) => merged.read(name, start, values),
        }
    }
}

/// What goes into a model directory.
struct Export<'a> {
    manifest: &'a Manifest,
    shards: Vec<Shard<'a>>,
    source: &'a Path,
    /// Names of the files that are taken over.
    copied: Vec<String>,
    /// What the run kept of its chat template.
    chat_template: Option<Vec<u8>>,
    /// config.json.
    config: Vec<u8>,
}

impl Export<'_> {
    /// Writes all files of the model directory; returns the size of the weights.
    fn fill(
        &self,
        folder: &Path,
        from: &mut Weights<'_>,
        watch: Watch<'_>,
    ) -> Result<u64, ExportError> {
        let mut bytes = 0;
        let mut read = |name: &str, start: usize, values: &mut [f32]| {
            from.read(name, start, values)?;
            watch(4 * values.len() as u64);
            Ok(())
        };
        for Shard { name, tensors } in &self.shards {
            bytes += weights::write(&folder.join(name), self.manifest, tensors, &mut read)?;
        }
        if self.shards.len() > 1 {
            let index = shards::index(&self.shards);
            storage::atomic_write(&folder.join(directory::INDEX), &index)?;
        }
        storage::atomic_write(&folder.join(source::CONFIG), &self.config)?;
        for name in &self.copied {
            let from = self.source.join(name);
            let content = fs::read(&from).map_err(at("read", &from))?;
            storage::atomic_write(&folder.join(name), &content)?;
        }
        if let Some(template) = &self.chat_template {
            storage::atomic_write(&folder.join(source::CHAT_TEMPLATE), template)?;
        }
        Ok(bytes)
    }
}

/// The type of most parameters, the widest of several.
fn prevailing(tensors: &[Tensor]) -> WeightDtype {
    let parameters = |dtype: &WeightDtype| -> usize {
        let of_type = tensors.iter().filter(|tensor| tensor.dtype == *dtype);
        of_type.map(Tensor::elements).sum()
    };
    // The last one of equals is taken.
    let types = [WeightDtype::F16, WeightDtype::Bf16, WeightDtype::F32];
    types
        .into_iter()
        .max_by_key(parameters)
        .expect("there are types")
}

/// Refuses a target whose content would be lost.
fn check_target(out: &Path, run_digest: &str) -> Result<(), ExportError> {
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
    match directory::exported(out) {
        Some(earlier) if earlier.run_digest == run_digest => Ok(()),
        _ => Err(occupied()),
    }
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
