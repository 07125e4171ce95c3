//! One safetensors file, read with plain ranged reads: header first, then a tensor's bytes in pieces, as f32, on all threads.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::ModelError;

/// Longest header that safetensors itself accepts.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Bytes read at a time; a multiple of every element size.
const PIECE_BYTES: usize = 1 << 22;

/// An open file whose header fits its length.
pub(super) struct WeightFile {
    path: PathBuf,
    file: File,
    /// Byte at which the tensors' data begins.
    data_start: u64,
    header: Metadata,
}

impl WeightFile {
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let read = |source| ModelError::Read {
            path: path.to_owned(),
            source,
        };
        let bad = |reason: String| ModelError::Header {
            path: path.to_owned(),
            reason,
        };
        let mut file = File::open(path).map_err(read)?;
        let file_len = file.metadata().map_err(read)?.len();
        if file_len < 8 {
            return Err(bad(format!("{file_len} bytes are too few for a header")));
        }
        let mut header_len = [0; 8];
        file.read_exact(&mut header_len).map_err(read)?;
        let header_len = u64::from_le_bytes(header_len);
        if header_len > HEADER_BYTES_MAX || header_len > file_len - 8 {
            return Err(bad(format!(
                "it announces a header of {header_len} bytes in a file of {file_len}"
            )));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact(&mut header).map_err(read)?;
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|error| bad(error.to_string()))?;
        let data_start = 8 + header_len;
        let end = |info: &TensorInfo| data_start.saturating_add(info.data_offsets.1 as u64);
        for tensor in header.offset_keys() {
            let needed = header.info(&tensor).map_or(0, end);
            if needed > file_len {
                return Err(ModelError::Truncated {
                    path: path.to_owned(),
                    tensor,
                    needed,
                    found: file_len,
                });
            }
        }
        let trailing = file_len - data_start - header.data_len() as u64;
        if trailing > 0 {
            return Err(bad(format!("{trailing} bytes follow the last tensor")));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            data_start,
            header,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensor names in file order.
    pub fn names(&self) -> impl Iterator<Item = String> + use<> {
        self.header.offset_keys().into_iter()
    }

    pub fn holds(&self, tensor: &str) -> bool {
        self.header.info(tensor).is_some()
    }

    /// Whether all tensors are of bf16.
    pub fn is_bf16(&self) -> bool {
        let tensors = self.header.tensors();
        tensors.values().all(|info| info.dtype == Dtype::BF16)
    }

    /// The tensor is here, with this shape and a supported element type.
    pub fn check(&self, tensor: &str, expected: &[usize]) -> Result<(), ModelError> {
        let info = self.info(tensor)?;
        if info.shape != expected {
            let (expected, found) = (expected.to_vec(), info.shape.clone());
            return Err(ModelError::Shape {
                path: self.path.clone(),
                tensor: tensor.to_owned(),
                expected,
                found,
            });
        }
        decoder(info.dtype)
            .map(|_| ())
            .ok_or_else(|| self.unsupported(tensor, info.dtype))
    }

    /// Fills `values` with the tensor; [`WeightFile::check`] has vouched for its size.
    pub fn read(&self, tensor: &str, values: &mut [f32]) -> Result<(), ModelError> {
        let info = self.info(tensor)?;
        let (size, decode) =
            decoder(info.dtype).ok_or_else(|| self.unsupported(tensor, info.dtype))?;
        assert_eq!(
            info.data_offsets.1 - info.data_offsets.0,
            size * values.len(),
            "bytes of `{tensor}`"
        );
        let start = self.data_start + info.data_offsets.0 as u64;
        let pieces = values.par_chunks_mut(PIECE_BYTES / size).enumerate();
        pieces.try_for_each_init(Vec::new, |bytes, (index, piece)| {
            bytes.resize(size * piece.len(), 0);
            self.file
                .read_exact_at(bytes, start + (index * PIECE_BYTES) as u64)
                .map_err(|source| self.cut(tensor, info, source))?;
            decode(bytes, piece);
            Ok(())
        })
    }

    fn info(&self, tensor: &str) -> Result<&TensorInfo, ModelError> {
        let missing = || ModelError::Missing {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
        };
        self.header.info(tensor).ok_or_else(missing)
    }

    fn unsupported(&self, tensor: &str, dtype: Dtype) -> ModelError {
        ModelError::Dtype {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
            found: dtype.to_string(),
        }
    }

    /// The file was long enough when it was opened; it can only have shrunk since.
    fn cut(&self, tensor: &str, info: &TensorInfo, source: io::Error) -> ModelError {
        match (source.kind(), self.file.metadata()) {
            (io::ErrorKind::UnexpectedEof, Ok(now)) => ModelError::Truncated {
                path: self.path.clone(),
                tensor: tensor.to_owned(),
                needed: self.data_start + info.data_offsets.1 as u64,
                found: now.len(),
            },
            _ => ModelError::Read {
                path: self.path.clone(),
                source,
            },
        }
    }
}

/// Bytes per element and how they become f32.
type Decoder = (usize, fn(&[u8], &mut [f32]));

fn decoder(dtype: Dtype) -> Option<Decoder> {
    match dtype {
        Dtype::F32 => Some((4, |bytes, values| {
            convert(bytes, values, f32::from_le_bytes);
        })),
        Dtype::F16 => Some((2, |bytes, values| {
            convert(bytes, values, |pair| f16::from_le_bytes(pair).to_f32());
        })),
        Dtype::BF16 => Some((2, |bytes, values| {
            convert(bytes, values, |pair| bf16::from_le_bytes(pair).to_f32());
        })),
        _ => None,
    }
}

fn convert<const SIZE: usize>(
    bytes: &[u8],
    values: &mut [f32],
    element: impl Fn([u8; SIZE]) -> f32,
) {
    let (elements, rest) = bytes.as_chunks::<SIZE>();
    assert!(
        rest.is_empty() && elements.len() == values.len(),
        "{} bytes for {} values",
        bytes.len(),
        values.len()
    );
    for (value, &bytes) in values.iter_mut().zip(elements) {
        *value = element(bytes);
    }
}
