//! What can be wrong with input files, each with its place and its cure.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::chat::TemplateError;

/// Where a row starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The file, as the configuration names it; one name for all of its rows.
    #[serde(serialize_with = "write_file", deserialize_with = "read_file")]
    pub file: Arc<Path>,
    /// Line of the row's first character in a text, number of the row in a table; from 1.
    pub line: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

// serde writes what is shared only with its feature `rc`, for which every crate above it would be compiled anew.
fn write_file<S: Serializer>(file: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    file.serialize(serializer)
}

fn read_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Path>, D::Error> {
    PathBuf::deserialize(deserializer).map(Into::into)
}

/// What to add where a path looks like a data set's name on the Hugging Face hub.
fn hub_hint(file: &Path) -> String {
    match file.to_str().and_then(|text| text.split_once('/')) {
        Some((owner, name)) if !owner.is_empty() && !name.contains(['/', '.', '*']) => {
            format!(
                ", or write hf://datasets/{owner}/{name} for a data set of the Hugging Face hub"
            )
        }
        _ => String::new(),
    }
}

/// Why files could not become a dataset.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file cannot be read.
    #[error("{}: {source}; check the path in data.train or data.eval{}", file.display(), hub_hint(file))]
    Read {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file of prompts cannot be read.
    #[error("{}: {source}; check the path of the prompts", file.display())]
    ReadPrompts {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is in another container.
    #[error("{}: this is {kind}, not JSON; {cure}", file.display())]
    Container {
        /// The file.
        file: PathBuf,
        /// The container that its first bytes name.
        kind: &'static str,
        /// What to do.
        cure: &'static str,
    },
    /// An entry of the configuration that names no file that can be read.
    #[error("{}: {reason}; {cure}", path.display())]
    Input {
        /// The entry, or what it led to.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What to do.
        cure: String,
    },
    /// A file that is torn, or not what its name says.
    #[error("{}: this is no whole {kind} file: {reason}; write or download it again", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What its name says that it is.
        kind: &'static str,
        /// What its decoder met.
        reason: String,
    },
    /// A file is not UTF-8.
    #[error(
        "{place}:{column}: byte 0x{byte:02x} is not UTF-8; re-encode the file, for example with iconv -t UTF-8"
    )]
    NotUtf8 {
        /// The line.
        place: Place,
        /// Byte in that line, from 1.
        column: usize,
        /// The first byte that does not fit.
        byte: u8,
    },
    /// Text that is not JSON.
    #[error(
        "{place}:{column}: malformed JSON: {reason}; every line must be one complete JSON object"
    )]
    Json {
        /// The line.
        place: Place,
        /// Column of the fault in that line, from 1.
        column: usize,
        /// What the parser met.
        reason: String,
    },
    /// A row that lacks something or contradicts itself.
    #[error("{place}: {reason}; {cure}")]
    Row {
        /// The row.
        place: Place,
        /// What is wrong.
        reason: String,
        /// What to do.
        cure: String,
    },
    /// A chat row, and the model has no chat template.
    #[error(
        "{place}: the row is a conversation and the model has no chat template; give one with data.chat_template \
         (--chat-template where there is no configuration), or add chat_template.jinja to the model's folder"
    )]
    NoTemplate {
        /// The first such row.
        place: Place,
    },
    /// The chat template refused the row.
    #[error(
        "{place}: the chat template refuses this conversation: {source}; change the row, or give another template with \
         data.chat_template (--chat-template where there is no configuration)"
    )]
    Template {
        /// The row.
        place: Place,
        /// What the template said.
        source: TemplateError,
    },
    /// The tokenizer refused a text.
    #[error("{place}: tokenize: {reason}; check that tokenizer.json belongs to this model")]
    Tokenize {
        /// The row.
        place: Place,
        /// What the tokenizer said.
        reason: String,
    },
    /// No pair has a completion of another prompt.
    #[error(
        "all {pairs} pairs have the same prompt, and kto estimates its KL divergence on completions of other prompts; give rows with \
         two prompts or more, or set another objective.kind"
    )]
    OnePrompt {
        /// Pairs.
        pairs: usize,
    },
    /// Nothing is left to train on.
    #[error("no pairs left of {rows} rows in {files}: {reason}; {cure}")]
    NoPairs {
        /// The files, joined.
        files: String,
        /// Rows read.
        rows: usize,
        /// What happened to them.
        reason: String,
        /// What to do.
        cure: String,
    },
}
