//! What an export takes from the model that the run began with, and whether that model fits the checkpoint.

use std::{collections::BTreeMap, fs, io, path::Path};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use storage::{LocalStore, Store};

use super::{
    ExportError,
    directory::{header, weight_files},
    dtype::{ExportDtype, WeightDtype},
    shards::Tensor,
};
use crate::{folder::at, parts::TensorSpec};

pub(super) const CONFIG: &str = "config.json";

/// In a kept source, what the headers of the model's weights said: the weights themselves are not kept.
pub(super) const TENSORS: &str = "tensors.json";

/// The template that transformers reads first.
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Files of a tokenizer and of generation that do not begin with `tokenizer` or `chat_template`.
const COPIED: [&str; 7] = [
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
];

/// A tensor of the source, as in the header of its file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SourceTensor {
    dtype: Dtype,
    shape: Vec<usize>,
}

/// The source's config.json with the dtype of the exported weights.
pub(super) fn config(source: &Path, dtype: WeightDtype) -> Result<Vec<u8>, ExportError> {
    let path = source.join(CONFIG);
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ExportError::NoModel {
                path: source.to_owned(),
            });
        }
        bytes => bytes.map_err(at("read", &path))?,
    };
    let refused = |reason: String| ExportError::Source {
        path: path.clone(),
        reason,
    };
    let mut config: Value =
        serde_json::from_slice(&bytes).map_err(|error| refused(error.to_string()))?;
    let name = dtype.torch();
    let changed = set_dtype(&mut config, name);
    let Value::Object(fields) = &mut config else {
        return Err(refused("not a JSON object".into()));
    };
    if !changed {
        // The name that old and new versions of transformers read.
        fields.insert("torch_dtype".into(), name.into());
    }
    let mut text =
        serde_json::to_vec_pretty(&config).map_err(|error| refused(error.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

/// Sets `dtype` and `torch_dtype` where they are, in nested configs too; true if one was at the top.
fn set_dtype(config: &mut Value, name: &str) -> bool {
    let Value::Object(fields) = config else {
        return false;
    };
    let mut changed = false;
    for (key, value) in fields {
        if key == "dtype" || key == "torch_dtype" {
            *value = name.into();
            changed = true;
        } else {
            set_dtype(value, name);
        }
    }
    changed
}

/// Names of the files to copy, sorted.
pub(super) fn files(source: &Path) -> Result<Vec<String>, ExportError> {
    let mut names = LocalStore::new(source).list("")?;
    names.retain(|name| {
        let wanted = name.starts_with("tokenizer")
            || name.starts_with("chat_template")
            || COPIED.contains(&name.as_str());
        // Through links, which is how Hugging Face's cache holds files.
        wanted && source.join(name).is_file()
    });
    Ok(names)
}

/// The source's tensors by name: from the headers of its weights, else from what was kept of them; none where neither is
/// there.
pub(super) fn tensors(source: &Path) -> Result<BTreeMap<String, SourceTensor>, ExportError> {
    let mut tensors = BTreeMap::new();
    for path in weight_files(source)? {
        let header = header(&path)?;
        let entries = header.tensors().into_iter().map(|(name, info)| {
            let (dtype, shape) = (info.dtype, info.shape.clone());
            (name, SourceTensor { dtype, shape })
        });
        tensors.extend(entries);
    }
    if !tensors.is_empty() {
        return Ok(tensors);
    }
    let path = source.join(TENSORS);
    match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(tensors),
        bytes => {
            let bytes = bytes.map_err(at("read", &path))?;
            serde_json::from_slice(&bytes).map_err(|error| ExportError::Source {
                path,
                reason: error.to_string(),
            })
        }
    }
}

/// The checkpoint's tensors with the types that they are exported in. Where the source tells its tensors they must have the
/// checkpoint's shapes: config and weights of two models would load and be nonsense.
pub(super) fn typed<'a>(
    source: &Path,
    specs: &'a [TensorSpec],
    dtype: ExportDtype,
) -> Result<Vec<Tensor<'a>>, ExportError> {
    let known = tensors(source)?;
    let typed = specs.iter().map(|spec| {
        let found = known.get(&spec.name);
        if !known.is_empty() && found.is_none_or(|found| found.shape != spec.shape) {
            let missing = || "is not there".to_owned();
            return Err(ExportError::OtherModel {
                path: source.to_owned(),
                tensor: spec.name.clone(),
                expected: spec.shape.clone(),
                found: found.map_or_else(missing, |found| format!("is {:?}", found.shape)),
            });
        }
        let dtype = match (dtype, found) {
            (ExportDtype::F32, _) | (ExportDtype::Source, None) => WeightDtype::F32,
            (ExportDtype::Bf16, _) => WeightDtype::Bf16,
            (ExportDtype::F16, _) => WeightDtype::F16,
            (ExportDtype::Source, Some(found)) => {
                WeightDtype::of(found.dtype).ok_or_else(|| ExportError::SourceDtype {
                    path: source.to_owned(),
                    tensor: spec.name.clone(),
                    found: found.dtype,
                })?
            }
        };
        Ok(Tensor {
            spec,
            dtype,
            had_dtype: found.is_some_and(|found| found.dtype == dtype.safetensors()),
        })
    });
    typed.collect()
}
