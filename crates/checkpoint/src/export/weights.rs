//! A safetensors file of an export, streamed a block at a time.

use std::path::Path;

use serde_json::{Map, json};
use storage::DurableFile;

use super::{
    ExportError,
    directory::{RUN_KEY, STEP_KEY},
    dtype::Rounding,
    shards::Tensor,
};
use crate::{manifest::Manifest, rank_file::safetensors_header};

/// Elements read, converted and written at once.
const BLOCK: usize = 1 << 20;

/// Fills a slice with a tensor's values from an element on.
pub(super) type Reader<'a> = &'a mut dyn FnMut(&str, usize, &mut [f32]) -> Result<(), ExportError>;

/// Writes `tensors`, whose values `read` gives, to `path`; returns the size of the file.
pub(super) fn write(
    path: &Path,
    manifest: &Manifest,
    tensors: &[Tensor],
    read: Reader<'_>,
) -> Result<u64, ExportError> {
    let header = header(manifest, tensors);
    let mut file = DurableFile::create(path)?;
    file.append(&header)?;
    let mut written = header.len() as u64;
    let mut values = Vec::with_capacity(BLOCK);
    let mut bytes = Vec::with_capacity(4 * BLOCK);
    for tensor in tensors {
        let (name, len) = (&tensor.spec.name, tensor.elements());
        let mut rounding = Rounding::of(tensor);
        for start in (0..len).step_by(BLOCK) {
            values.resize(BLOCK.min(len - start), 0.0);
            read(name, start, &mut values)?;
            if let Some(value) = tensor.dtype.overflow(&values) {
                return Err(ExportError::Overflow {
                    tensor: name.clone(),
                    value,
                    dtype: tensor.dtype.torch(),
                });
            }
            tensor.dtype.encode(&values, &mut rounding, &mut bytes);
            file.append(&bytes)?;
            written += bytes.len() as u64;
        }
    }
    file.commit()?;
    Ok(written)
}

fn header(manifest: &Manifest, tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Map::new();
    let about = json!({
        "format": "pt",
        RUN_KEY: manifest.info.run_digest,
        STEP_KEY: manifest.state.step.to_string(),
    });
    header.insert("__metadata__".into(), about);
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let entry = json!({
            "dtype": tensor.dtype.safetensors(),
            "shape": tensor.spec.shape,
            "data_offsets": [start, end],
        });
        header.insert(tensor.spec.name.clone(), entry);
        start = end;
    }
    safetensors_header(header)
}
