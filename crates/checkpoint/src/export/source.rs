//! What an export takes from the model that the run began with, and whether that model fits the checkpoint.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use safetensors::tensor::Metadata;
use serde_json::Value;

use super::{ExportDtype, ExportError};
use crate::{
    folder::{self, at},
    parts::TensorSpec,
};

pub(super) const CONFIG: &str = "config.json";

/// Longest header that safetensors itself accepts.
const HEADER_BYTES_MAX: u64 = 100_000_000;

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

/// The source's config.json with the dtype of the exported weights.
pub(super) fn config(source: &Path, dtype: ExportDtype) -> Result<Vec<u8>, ExportError> {
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
    let name = match dtype {
        ExportDtype::F32 => "float32",
        ExportDtype::Bf16 => "bfloat16",
    };
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
    let mut names = folder::names(source)?;
    names.retain(|name| {
        let wanted = name.starts_with("tokenizer")
            || name.starts_with("chat_template")
            || COPIED.contains(&name.as_str());
        // Through links, which is how Hugging Face's cache holds files.
        wanted && source.join(name).is_file()
    });
    Ok(names)
}

/// Checks that the source's weights, where it has them, hold the checkpoint's tensors with their shapes: config and weights
/// of two models would load and be nonsense.
pub(super) fn check_tensors(source: &Path, tensors: &[TensorSpec]) -> Result<(), ExportError> {
    let mut shapes: HashMap<String, Vec<usize>> = HashMap::new();
    for name in folder::names(source)? {
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let header = header(&source.join(name))?;
            let entries = header.tensors().into_iter();
            shapes.extend(entries.map(|(name, info)| (name, info.shape.clone())));
        }
    }
    if shapes.is_empty() {
        return Ok(());
    }
    for spec in tensors {
        let shape = shapes.get(&spec.name);
        if shape != Some(&spec.shape) {
            let missing = || "is not there".to_owned();
            return Err(ExportError::OtherModel {
                path: source.to_owned(),
                tensor: spec.name.clone(),
                expected: spec.shape.clone(),
                found: shape.map_or_else(missing, |shape| format!("is {shape:?}")),
            });
        }
    }
    Ok(())
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
