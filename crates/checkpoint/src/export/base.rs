//! The weights of a model directory, read as f32 a range at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use super::ExportError;
use super::directory::{data_start, header, weight_files};
use super::dtype::WeightDtype;
use crate::folder::at;
use crate::parts::TensorSpec;

/// Where every tensor of a model lies.
pub(crate) struct Base {
    tensors: BTreeMap<String, Place>,
    specs: Vec<TensorSpec>,
}

struct Place {
    file: PathBuf,
    /// First byte of its data in the file.
    start: u64,
    dtype: WeightDtype,
    shape: Vec<usize>,
}

impl Base {
    /// The model in `dir`.
    ///
    /// # Errors
    /// No weights, files that are not safetensors, or a type that is not read.
    pub fn open(dir: &Path) -> Result<Self, ExportError> {
        let mut tensors = BTreeMap::new();
        let files = weight_files(dir)?;
        if files.is_empty() {
            return Err(ExportError::NoBase {
                path: dir.to_owned(),
            });
        }
        for file in files {
            let (header, data) = (header(&file)?, data_start(&file)?);
            for (name, info) in header.tensors() {
                let dtype = WeightDtype::of(info.dtype);
                let dtype = dtype.ok_or_else(|| ExportError::SourceDtype {
                    path: dir.to_owned(),
                    tensor: name.clone(),
                    found: info.dtype,
                })?;
                let place = Place {
                    file: file.clone(),
                    start: data + info.data_offsets.0 as u64,
                    dtype,
                    shape: info.shape.clone(),
                };
                tensors.insert(name, place);
            }
        }
        let spec = |(name, place): (&String, &Place)| TensorSpec {
            name: name.clone(),
            shape: place.shape.clone(),
        };
        Ok(Self {
            specs: tensors.iter().map(spec).collect(),
            tensors,
        })
    }

    /// All tensors by name.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    pub fn shape(&self, tensor: &str) -> Option<&[usize]> {
        self.tensors.get(tensor).map(|place| place.shape.as_slice())
    }

    /// Fills `values` with a tensor's elements from `start` on.
    pub fn read(&self, tensor: &str, start: usize, values: &mut [f32]) -> Result<(), ExportError> {
        let place = &self.tensors[tensor];
        let size = place.dtype.size();
        let mut bytes = vec![0; values.len() * size as usize];
        let mut fill = || {
            let mut file = File::open(&place.file)?;
            file.seek(SeekFrom::Start(place.start + start as u64 * size))?;
            file.read_exact(&mut bytes)
        };
        fill().map_err(at("read", &place.file))?;
        match place.dtype {
            WeightDtype::F32 => decode(&bytes, values, f32::from_le_bytes),
            WeightDtype::Bf16 => decode(&bytes, values, |it| bf16::from_le_bytes(it).to_f32()),
            WeightDtype::F16 => decode(&bytes, values, |it| f16::from_le_bytes(it).to_f32()),
        }
        Ok(())
    }
}

fn decode<const SIZE: usize>(
    bytes: &[u8],
    values: &mut [f32],
    element: impl Fn([u8; SIZE]) -> f32,
) {
    let (elements, _) = bytes.as_chunks::<SIZE>();
    for (value, bytes) in values.iter_mut().zip(elements) {
        *value = element(*bytes);
    }
}
