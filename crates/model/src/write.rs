//! Flat weights as a Hugging Face safetensors file. Only the bytes; where they go durably is the caller's business, and
//! exports of training checkpoints are `checkpoint`'s.
//!
//! ```text
//! u64 LE   length of the header, a multiple of 8
//! header   JSON: {"__metadata__": {"format": "pt"}, NAME: {"dtype": "F32", "shape": [..], "data_offsets": [start, end]}, ..},
//!          padded with spaces
//! data     f32 LE, tensors in layout order without gaps
//! ```

use std::io::{self, Write};

use serde_json::{Map, json};

use crate::Layout;

/// Writes `weights`, flat as in `layout`, as f32.
///
/// # Panics
/// If the buckets are not the layout's.
pub fn write_safetensors(
    weights: &[Vec<f32>],
    layout: &Layout,
    out: &mut dyn Write,
) -> io::Result<()> {
    let lens: Vec<usize> = weights.iter().map(Vec::len).collect();
    assert_eq!(lens, layout.bucket_lens(), "lengths of the weight buckets");
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut start = 0;
    for parameter in &layout.parameters {
        let end = start + 4 * parameter.elements();
        let entry =
            json!({ "dtype": "F32", "shape": parameter.shape, "data_offsets": [start, end] });
        header.insert(parameter.name.clone(), entry);
        start = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for parameter in &layout.parameters {
        little_endian(&weights[parameter.bucket][parameter.range()], |bytes| {
            out.write_all(bytes)
        })?;
    }
    out.flush()
}

/// Hands `values` to `sink` as little-endian bytes, a piece at a time.
pub(crate) fn little_endian<E>(
    values: &[f32],
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut bytes = Vec::with_capacity(1 << 16);
    for piece in values.chunks(1 << 14) {
        bytes.clear();
        bytes.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
        sink(&bytes)?;
    }
    Ok(())
}
