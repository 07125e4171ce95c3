//! A checkpoint of a low-rank adapter: as an adapter in PEFT's format, and merged into the weights of the model it stands on.
//!
//! ```text
//! adapter_config.json          the one that was kept beside the checkpoints
//! adapter_model.safetensors    f32, under the checkpoint's names, which are PEFT's
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use storage::Folder;

use super::base::Base;
use super::dtype::WeightDtype;
use super::shards::{Shard, Tensor};
use super::{
    ExportError, ExportSummary, SOURCE, beside, check_target, keep, put_in_place, weights,
};
use crate::folder::at;
use crate::parts::{Kind, TensorSpec};
use crate::read::Checkpoint;

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// What PEFT puts before the name of a module, and how the names of its two matrices end.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// Whether the checkpoint at `path` is of an adapter, and not of a model.
///
/// # Errors
/// It cannot be opened.
pub fn is_adapter(path: &Path) -> Result<bool, ExportError> {
    Ok(holds_adapter(&Checkpoint::open(path)?))
}

pub(super) fn holds_adapter(checkpoint: &Checkpoint) -> bool {
    let tensors = &checkpoint.manifest().tensors;
    let adapts = |spec: &TensorSpec| spec.name.ends_with(A) || spec.name.ends_with(B);
    !tensors.is_empty() && tensors.iter().all(adapts)
}

/// Keeps `config`, the text of an adapter_config.json, below `checkpoints`, where [`export_adapter`] finds it.
///
/// # Errors
/// It cannot be written.
pub fn keep_adapter(config: &str, checkpoints: &Path) -> Result<(), ExportError> {
    let folder = Folder::open(checkpoints)?.below(SOURCE);
    Ok(keep(&folder, CONFIG, config.as_bytes())?)
}

/// Writes the adapter in `checkpoint` as the folder `out` in PEFT's format. `out` appears whole, and an earlier export of the
/// same run is replaced.
///
/// # Errors
/// A checkpoint that is not of an adapter, or beside which its adapter_config.json is missing. Nothing is left behind then.
pub fn export_adapter(checkpoint: &Path, out: &Path) -> Result<ExportSummary, ExportError> {
    let location = checkpoint;
    let checkpoint = Checkpoint::open(checkpoint)?;
    if !holds_adapter(&checkpoint) {
        return Err(ExportError::NoAdapter {
            path: checkpoint.path().to_owned(),
        });
    }
    let (_, config) = kept_config(location)?;
    let manifest = checkpoint.manifest();
    check_target(out, &manifest.info.run_digest)?;
    let tensors: Vec<Tensor<'_>> = manifest
        .tensors
        .iter()
        .map(|spec| Tensor {
            spec,
            dtype: WeightDtype::F32,
            had_dtype: false,
        })
        .collect();
    let shard = Shard {
        name: WEIGHTS.into(),
        tensors,
    };
    let temporary = beside(out, "tmp");
    storage::remove_directory(&temporary)?;
    storage::create_directory(&temporary)?;
    let fill = || {
        let mut read = |name: &str, start: usize, values: &mut [f32]| {
            Ok(checkpoint.read(name, Kind::Weight, start, values)?)
        };
        let path = temporary.join(WEIGHTS);
        let bytes = weights::write(&path, manifest, &shard.tensors, &mut read)?;
        storage::atomic_write(&temporary.join(CONFIG), &config)?;
        put_in_place(&temporary, out)?;
        Ok(bytes)
    };
    let bytes = fill().inspect_err(|_: &ExportError| {
        // The first error is the one to tell.
        drop(storage::remove_directory(&temporary));
    })?;
    Ok(ExportSummary {
        path: out.to_owned(),
        step: manifest.state.step,
        dtype: WeightDtype::F32,
        tensors: shard.tensors.len(),
        parameters: shard.tensors.iter().map(Tensor::elements).sum(),
        bytes,
        weights: vec![shard.name],
        copied: vec![CONFIG.into()],
    })
}

/// Path and content of the adapter_config.json that was kept beside `checkpoint`.
fn kept_config(checkpoint: &Path) -> Result<(PathBuf, Vec<u8>), ExportError> {
    let beside = checkpoint.parent().unwrap_or(Path::new("."));
    let folder = Folder::open(&beside.join(SOURCE))?;
    let path = folder.below(CONFIG).path();
    let missing = || at("read", &path)(io::ErrorKind::NotFound.into());
    let content = folder.read(CONFIG)?.ok_or_else(missing)?;
    Ok((path, content))
}

/// The model's weights with the adapter's product added: W + s·B A.
pub(super) struct Merged<'a> {
    checkpoint: &'a Checkpoint,
    base: Base,
    scale: f32,
    /// Modules with an adapter, by the name of their weight in the model.
    adapted: BTreeMap<String, [&'a TensorSpec; 2]>,
    /// A and B of the tensor that was asked for last.
    loaded: Option<Loaded>,
}

struct Loaded {
    tensor: String,
    rank: usize,
    columns: usize,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl<'a> Merged<'a> {
    /// Opens the model in `source` and fits the adapter's tensors to its own.
    pub fn open(
        checkpoint: &'a Checkpoint,
        path: &Path,
        source: &Path,
    ) -> Result<Self, ExportError> {
        let base = Base::open(source)?;
        let mut adapted = BTreeMap::new();
        let specs = &checkpoint.manifest().tensors;
        for a in specs {
            let Some(module) = a.name.strip_suffix(A) else {
                continue;
            };
            let b = specs
                .iter()
                .find(|b| b.name.strip_suffix(B) == Some(module));
            let name = module.strip_prefix(PREFIX).unwrap_or(module);
            let name = format!("{name}.weight");
            let found = base.shape(&name);
            let expected = b.map(|b| vec![b.shape[0], a.shape[1]]);
            match (b, &expected) {
                (Some(b), Some(shape)) if found == Some(shape.as_slice()) => {
                    adapted.insert(name, [a, b]);
                }
                _ => {
                    return Err(ExportError::OtherModel {
                        path: source.to_owned(),
                        tensor: name,
                        expected: expected.unwrap_or_default(),
                        found: found.map_or("is not there".into(), |shape| format!("is {shape:?}")),
                    });
                }
            }
        }
        Ok(Self {
            scale: scale(path)?,
            checkpoint,
            base,
            adapted,
            loaded: None,
        })
    }

    /// All tensors of the model.
    pub fn specs(&self) -> &[TensorSpec] {
        self.base.specs()
    }

    /// Fills `values` with the merged weight's elements from `start` on.
    pub fn read(
        &mut self,
        name: &str,
        start: usize,
        values: &mut [f32],
    ) -> Result<(), ExportError> {
        self.base.read(name, start, values)?;
        let Some(&[a, b]) = self.adapted.get(name) else {
            return Ok(());
        };
        if self.loaded.as_ref().is_none_or(|it| it.tensor != name) {
            let whole = |spec: &TensorSpec| {
                let mut values = vec![0.0; spec.shape.iter().product()];
                self.checkpoint
                    .read(&spec.name, Kind::Weight, 0, &mut values)?;
                Ok::<_, ExportError>(values)
            };
            self.loaded = Some(Loaded {
                tensor: name.to_owned(),
                rank: a.shape[0],
                columns: a.shape[1],
                a: whole(a)?,
                b: whole(b)?,
            });
        }
        let loaded = self.loaded.as_ref().expect("just loaded");
        loaded.add(self.scale, start, values);
        Ok(())
    }
}

impl Loaded {
    /// Adds s·B A to the elements from `start` on, row by row.
    fn add(&self, scale: f32, start: usize, values: &mut [f32]) {
        let (mut place, mut rest) = (start, values);
        while !rest.is_empty() {
            let (row, column) = (place / self.columns, place % self.columns);
            let len = rest.len().min(self.columns - column);
            let (part, others) = rest.split_at_mut(len);
            for k in 0..self.rank {
                let factor = scale * self.b[row * self.rank + k];
                let a = &self.a[k * self.columns + column..][..len];
                for (value, a) in part.iter_mut().zip(a) {
                    *value += factor * a;
                }
            }
            (place, rest) = (place + len, others);
        }
    }
}

/// s of the adapter in `checkpoint`, as its adapter_config.json says.
fn scale(checkpoint: &Path) -> Result<f32, ExportError> {
    #[derive(Deserialize)]
    struct Config {
        r: f64,
        lora_alpha: f64,
        #[serde(default)]
        use_rslora: bool,
    }
    let (path, bytes) = kept_config(checkpoint)?;
    let config: Config = serde_json::from_slice(&bytes).map_err(|error| ExportError::Source {
        path,
        reason: error.to_string(),
    })?;
    let divisor = if config.use_rslora {
        config.r.sqrt()
    } else {
        config.r
    };
    Ok((config.lora_alpha / divisor) as f32)
}
