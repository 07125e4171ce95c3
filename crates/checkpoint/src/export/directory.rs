//! The safetensors files of a model directory, one or many, and what their headers say. Nothing here reads or writes weights.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::{ExportError, adapter};
use crate::folder::at;

/// All weights in one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// Which of several files holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Names the run in a file's metadata: what makes a folder an export that a later one of the same run may replace.
pub(super) const RUN_KEY: &str = "caldpo_run";
/// Names the step of the weights in a file's metadata.
pub(super) const STEP_KEY: &str = "caldpo_step";

/// Longest header that safetensors itself accepts.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// What an export's weights say of themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Digest of what defines the run.
    pub run_digest: String,
    /// Step of the weights.
    pub step: u64,
}

/// Whether `dir` holds the weights of a model, whoever wrote them.
pub fn has_weights(dir: &Path) -> bool {
    dir.join(SINGLE).exists() || dir.join(INDEX).exists()
}

/// Run and step of the weights in `dir`, a model's or an adapter's, if they are an export: every file of them tells the same.
pub fn exported(dir: &Path) -> Option<Exported> {
    let mut files = weight_files(dir).ok()?;
    if files.is_empty() {
        files.push(dir.join(adapter::WEIGHTS));
    }
    let mut origins = files.into_iter().map(|path| {
        let header = header(&path).ok()?;
        let metadata = header.metadata().as_ref()?;
        Some(Exported {
            run_digest: metadata.get(RUN_KEY)?.clone(),
            step: metadata.get(STEP_KEY)?.parse().ok()?,
        })
    });
    let first = origins.next()??;
    origins
        .all(|origin| origin.as_ref() == Some(&first))
        .then_some(first)
}

/// The files with the weights of `dir`, none if it has none. The single file goes before the index, as in training and in
/// transformers.
pub(super) fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, ExportError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let single = dir.join(SINGLE);
    if single.exists() {
        return Ok(vec![single]);
    }
    let path = dir.join(INDEX);
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        bytes => bytes.map_err(at("read", &path))?,
    };
    let refused = |reason: String| ExportError::Source {
        path: path.clone(),
        reason,
    };
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|error| refused(error.to_string()))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    // A shard lies beside its index; anything else would read files that the model does not own.
    let plain = |name: &str| Path::new(name).file_name().is_some_and(|it| it == name);
    if let Some(name) = names.iter().find(|name| !plain(name)) {
        return Err(refused(format!("`{name}` is not a plain file name")));
    }
    Ok(names.iter().map(|name| dir.join(name)).collect())
}

/// First byte of the tensors' data in a safetensors file whose [`header`] was read.
pub(super) fn data_start(path: &Path) -> Result<u64, ExportError> {
    let mut length = [0; 8];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut length));
    read.map_err(at("read", path))?;
    Ok(8 + u64::from_le_bytes(length))
}

/// The header of a safetensors file.
pub(super) fn header(path: &Path) -> Result<Metadata, ExportError> {
    let refused = |reason: String| ExportError::Source {
        path: path.to_owned(),
        reason: format!("not a safetensors file: {reason}"),
    };
    let read = |source: io::Error| at("read", path)(source);
    let mut file = File::open(path).map_err(read)?;
    let bytes = file.metadata().map_err(read)?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(read)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX || length > bytes {
        return Err(refused(format!(
            "it announces a header of {length} bytes in a file of {bytes}"
        )));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(read)?;
    serde_json::from_slice(&header).map_err(|error| refused(error.to_string()))
}
