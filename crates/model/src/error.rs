//! What can be wrong with a model directory, and what to do about it. Shapes that do not fit inside the program are
//! bugs and panic; they are not here.

use std::io;
use std::path::PathBuf;

/// A model directory (or parts of a model) that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A value of config.json that this program does not compute, or that is missing or malformed.
    #[error("{}: `{key}`: {reason}", path.display())]
    Config {
        /// The config file.
        path: PathBuf,
        /// Key with its path, e.g. `rope_parameters.rope_type`.
        key: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Modules that an adapter cannot be put on.
    #[error("adapter.targets: {reason}; this model has {}", known.join(", "))]
    Targets {
        /// What is wrong with the names.
        reason: String,
        /// The modules that can be named.
        known: Vec<&'static str>,
    },
    /// No weight file in the directory.
    #[error(
        "{}: neither model.safetensors nor model.safetensors.index.json is here; save the weights as safetensors \
         (`save_pretrained` does so)",
        dir.display()
    )]
    NoWeights {
        /// The model directory.
        dir: PathBuf,
    },
    /// model.safetensors.index.json is not an index.
    #[error("{}: not a safetensors index: {reason}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The header of a safetensors file is damaged.
    #[error("{}: not a safetensors file: {reason}; fetch it again", path.display())]
    Header {
        /// The weight file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file ends before the tensors that its header announces.
    #[error(
        "{}: the file has {found} bytes, tensor `{tensor}` ends at byte {needed}; it is truncated, fetch it again",
        path.display()
    )]
    Truncated {
        /// The weight file.
        path: PathBuf,
        /// First tensor that is cut.
        tensor: String,
        /// Byte of the file at which the tensor ends.
        needed: u64,
        /// Length of the file.
        found: u64,
    },
    /// A tensor that the architecture needs is in no file.
    #[error("{}: tensor `{tensor}` is missing; config.json promises it", path.display())]
    Missing {
        /// The weight file or index that should hold it.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor that the architecture does not know.
    #[error(
        "{}: tensor `{tensor}` belongs to no part of the decoder in config.json; is this another model's file?",
        path.display()
    )]
    Extra {
        /// The weight file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor of another shape than config.json implies.
    #[error("{}: tensor `{tensor}` has shape {found:?}, config.json implies {expected:?}", path.display())]
    Shape {
        /// The weight file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Shape after config.json.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor of an element type that is not supported.
    #[error("{}: tensor `{tensor}` is {found}; supported are F32, F16, BF16", path.display())]
    Dtype {
        /// The weight file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Its element type.
        found: String,
    },
    /// `lm_head.weight` is stored although config.json ties it to the embedding, and it differs from it.
    #[error(
        "{}: `lm_head.weight` differs from `model.embed_tokens.weight`, but config.json says tie_word_embeddings = true; \
         set it to false or drop the tensor",
        path.display()
    )]
    NotTied {
        /// The file with `lm_head.weight`.
        path: PathBuf,
    },
    /// Weights handed over in memory do not have the layout's bucket lengths.
    #[error("buckets of {found:?} elements, the layout has {expected:?}")]
    Buckets {
        /// Lengths of the layout.
        expected: Vec<usize>,
        /// Lengths given.
        found: Vec<usize>,
    },
}
