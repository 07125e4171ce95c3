//! `model.safetensors` of an export, streamed from the checkpoint a block at a time.

use std::path::Path;

use half::bf16;
use serde_json::{Map, json};
use storage::DurableFile;

use super::{ExportDtype, ExportError};
use crate::{
    manifest::Manifest,
    parts::{Kind, TensorSpec},
    rank_file::{encode, safetensors_header},
    read::Checkpoint,
};

pub(super) const FILE: &str = "model.safetensors";
/// Names the run in the file's metadata: what makes a folder an export that a later one of the same run may replace.
pub(super) const RUN_KEY: &str = "caldpo_run";

/// Elements read, converted and written at once.
const BLOCK: usize = 1 << 20;

/// Number of elements of all tensors.
pub(super) fn parameters(manifest: &Manifest) -> usize {
    manifest.tensors.iter().map(elements).sum()
}

/// Writes all weights to `path`; returns the size of the file.
pub(super) fn write(
    path: &Path,
    checkpoint: &Checkpoint,
    dtype: ExportDtype,
) -> Result<u64, ExportError> {
    let header = header(checkpoint.manifest(), dtype);
    let mut file = DurableFile::create(path)?;
    file.append(&header)?;
    let mut written = header.len() as u64;
    let mut values = Vec::with_capacity(BLOCK);
    let mut bytes = Vec::with_capacity(4 * BLOCK);
    for spec in &checkpoint.manifest().tensors {
        let len = elements(spec);
        for start in (0..len).step_by(BLOCK) {
            values.resize(BLOCK.min(len - start), 0.0);
            checkpoint.read(&spec.name, Kind::Weight, start, &mut values)?;
            match dtype {
                ExportDtype::F32 => encode(&values, f32::to_le_bytes, &mut bytes),
                ExportDtype::Bf16 => {
                    encode(&values, |it| bf16::from_f32(it).to_le_bytes(), &mut bytes);
                }
            }
            file.append(&bytes)?;
            written += bytes.len() as u64;
        }
    }
    file.commit()?;
    Ok(written)
}

fn header(manifest: &Manifest, dtype: ExportDtype) -> Vec<u8> {
    let (name, size) = match dtype {
        ExportDtype::F32 => ("F32", 4),
        ExportDtype::Bf16 => ("BF16", 2),
    };
    let mut header = Map::new();
    let about = json!({
        "format": "pt",
        RUN_KEY: manifest.info.run_digest,
        "caldpo_step": manifest.state.step.to_string(),
    });
    header.insert("__metadata__".into(), about);
    let mut start = 0;
    for spec in &manifest.tensors {
        let end = start + size * elements(spec);
        let entry = json!({ "dtype": name, "shape": spec.shape, "data_offsets": [start, end] });
        header.insert(spec.name.clone(), entry);
        start = end;
    }
    safetensors_header(header)
}

fn elements(spec: &TensorSpec) -> usize {
    spec.elements()
        .expect("an open checkpoint's shapes are checked")
}
