//! `[data]` of a configuration: which files, how their rows are laid out, how long a pair may get.
//!
//! Values only; nothing here opens a file.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::hub_entry::HubEntry;

/// Shortest `max_length` that leaves room for a prompt token and a scored one.
const MAX_LENGTH_MIN: usize = 2;

/// Input files and how to read them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Training files, read as one list in this order. At least one. An entry is a file (.jsonl, .ndjson or .json, also with .gz or
    /// .zst; .parquet; .arrow), a folder of such files, a folder of Hugging Face's `save_to_disk`, or a pattern such as
    /// `data/train-*.parquet`; what a folder or a pattern names is sorted. `hf://datasets/OWNER/NAME[@REVISION][/FILE, FOLDER or
    /// PATTERN]` is a data set of the Hugging Face hub, which every worker downloads into Hugging Face's own cache.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub train: Vec<PathBuf>,
    /// Held-out files, named likewise. Default none.
    #[serde(default)]
    pub eval: Vec<PathBuf>,
    /// Row layout. Default `auto`.
    #[serde(default = "default_format")]
    pub format: Format,
    /// Column names. Default `prompt`, `chosen`, `rejected`, `completion`, `label`, `score_chosen`, `score_rejected`.
    #[serde(default = "default_columns")]
    pub columns: Columns,
    /// Folder of tokenized pairs, shared by runs. Default `data-cache` beside `reference.store`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// A Jinja chat template used instead of the model's own. Default none.
    #[serde(default)]
    pub chat_template: Option<PathBuf>,
    /// Most tokens of prompt + completion, each completion counted on its own. Default 1024.
    #[serde(default = "default_max_length")]
    #[schemars(range(min = 2))]
    pub max_length: usize,
    /// What a sequence over `max_length` loses. Default `keep_start`.
    #[serde(default = "default_truncation")]
    pub truncation: Truncation,
    /// Whether every epoch visits the pairs in an order of its own. Default true.
    #[serde(default = "default_shuffle")]
    pub shuffle: bool,
}

/// How a row is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `unpaired` if the first row has a completion with a label and neither `chosen` nor `rejected`; otherwise `preference`, or under
    /// an objective that compares nothing (`sft`) `completion` if the first row has no `rejected`.
    Auto,
    /// `chosen` and `rejected`, with or without `prompt`.
    Preference,
    /// `prompt` with `completion` (or `chosen`); `rejected` is not read and stays empty.
    Completion,
    /// `prompt` with `completion` and `label`: true for a desirable completion, false for an undesirable one (`kto`).
    Unpaired,
}

/// What an objective needs of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// Which completions.
    pub sides: Sides,
    /// Whether every pair needs the scores of its completions.
    pub scores: bool,
}

/// Which completions an objective trains on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sides {
    /// The preferred one (`sft`); rejected sides are left empty and undesirable rows dropped.
    Chosen,
    /// One or both (`kto`): rows may be pairs or unpaired.
    Either,
    /// Both of every pair.
    Both,
}

/// Names of the columns, for files that call them otherwise. A name with dots that is no column leads into objects and lists:
/// `answers.0.text` is the `text` of the first of `answers`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// The prompt. Default `prompt`; in rows without one, `conversations`, if the completions are answers to it.
    #[serde(default = "default_prompt")]
    #[schemars(length(min = 1))]
    pub prompt: String,
    /// The preferred completion. Default `chosen`.
    #[serde(default = "default_chosen")]
    #[schemars(length(min = 1))]
    pub chosen: String,
    /// The other completion. Default `rejected`.
    #[serde(default = "default_rejected")]
    #[schemars(length(min = 1))]
    pub rejected: String,
    /// The completion of completion rows. Default `completion`; in rows without one, the last answer of `messages` or `conversations`.
    #[serde(default = "default_completion")]
    #[schemars(length(min = 1))]
    pub completion: String,
    /// Whether the completion of an unpaired row is desirable: true or false, 1 or 0. Default `label`.
    #[serde(default = "default_label")]
    #[schemars(length(min = 1))]
    pub label: String,
    /// The score of the preferred completion, read where the objective scales by scores. Default `score_chosen`.
    #[serde(default = "default_score_chosen")]
    #[schemars(length(min = 1))]
    pub score_chosen: String,
    /// The score of the other completion. Default `score_rejected`.
    #[serde(default = "default_score_rejected")]
    #[schemars(length(min = 1))]
    pub score_rejected: String,
}

/// What a sequence over `max_length` loses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// The end: the first `max_length` tokens of prompt + completion stay.
    KeepStart,
    /// The start of the prompt, which both completions share: as much as the longer one needs to stay whole. What a template puts first
    /// (BOS, the system turn) goes with it. Pairs whose longer completion leaves no room for a prompt token are dropped.
    KeepEnd,
}

/// A value that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct ConfigError {
    /// Dotted path of the key.
    pub key: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl DataConfig {
    /// Checks what can be checked without opening a file.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.train.is_empty() {
            return refuse("data.train", "names no file; give at least one .jsonl file");
        }
        for (key, files) in [("data.train", &self.train), ("data.eval", &self.eval)] {
            for file in files {
                let hub = HubEntry::parse(&file.to_string_lossy());
                if hub.is_some_and(|hub| hub.owner_and_name.is_none()) {
                    let reason = format!(
                        "names {}, which is no data set of a hub; write hf://datasets/OWNER/NAME",
                        file.display()
                    );
                    return refuse(key, &reason);
                }
            }
        }
        if self.max_length < MAX_LENGTH_MIN {
            return refuse(
                "data.max_length",
                &format!(
                    "must be at least {MAX_LENGTH_MIN}, a prompt token and a scored one, got {}",
                    self.max_length
                ),
            );
        }
        self.columns.validate()
    }
}

impl Columns {
    fn validate(&self) -> Result<(), ConfigError> {
        let named = [
            ("prompt", &self.prompt),
            ("chosen", &self.chosen),
            ("rejected", &self.rejected),
            ("completion", &self.completion),
            ("label", &self.label),
            ("score_chosen", &self.score_chosen),
            ("score_rejected", &self.score_rejected),
        ];
        for (position, (key, name)) in named.iter().enumerate() {
            if name.is_empty() {
                return refuse(&format!("data.columns.{key}"), "is empty; name a column");
            }
            // `chosen` and `completion` may share a column: they never mean different things in one row.
            let twin = named[..position].iter().find(|(other, taken)| {
                taken == name && !(*other == "chosen" && *key == "completion")
            });
            if let Some((other, _)) = twin {
                return refuse(
                    &format!("data.columns.{key}"),
                    &format!("names the column \"{name}\", which {other} already has"),
                );
            }
        }
        Ok(())
    }
}

fn refuse(key: &str, reason: &str) -> Result<(), ConfigError> {
    Err(ConfigError {
        key: key.into(),
        reason: reason.into(),
    })
}

fn default_format() -> Format {
    Format::Auto
}

fn default_columns() -> Columns {
    Columns {
        prompt: default_prompt(),
        chosen: default_chosen(),
        rejected: default_rejected(),
        completion: default_completion(),
        label: default_label(),
        score_chosen: default_score_chosen(),
        score_rejected: default_score_rejected(),
    }
}

fn default_prompt() -> String {
    "prompt".into()
}

fn default_chosen() -> String {
    "chosen".into()
}

fn default_rejected() -> String {
    "rejected".into()
}

fn default_completion() -> String {
    "completion".into()
}

fn default_label() -> String {
    "label".into()
}

fn default_score_chosen() -> String {
    "score_chosen".into()
}

fn default_score_rejected() -> String {
    "score_rejected".into()
}

fn default_max_length() -> usize {
    1024
}

fn default_truncation() -> Truncation {
    Truncation::KeepStart
}

fn default_shuffle() -> bool {
    true
}
