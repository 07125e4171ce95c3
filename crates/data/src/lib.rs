//! Preference rows in, token ids, order and packs out: formats, chat templates, truncation, plans.
//!
//! ```text
//! hf:// ─ hub ─► files
//! files ─ inputs, rows ─► JSON objects ─ layout ─► prompt | chosen | rejected ─ chat ─► text ─ tokenizer ─► ids ─ dataset ─► pairs, digest, report
//! (seed, step) ─ order ─► the step's pairs ─ pack ─► packs ─ deal ─► this rank's packs
//! ```
//!
//! Absent: tensors, the network (but in `Hub`, which only fetches files), the world size (but in [`deal`]), and any state between
//! calls (but the cache of [`load_cached`], which changes no result). The same files, tokenizer and configuration give the same
//! [`Dataset::digest`] on every machine.

mod arrow_file;
mod cache;
mod cache_file;
mod chat;
mod config;
mod conversation;
mod dataset;
mod encode;
mod error;
mod folder;
#[cfg(feature = "hub")]
mod hub;
mod hub_entry;
mod inputs;
mod json_file;
mod layout;
mod mismatched;
mod order;
mod pack;
mod parquet_file;
mod prompts;
mod python_json;
mod report;
mod rows;
mod table;
mod tokenizer;

pub use cache::{Loaded, load_cached};
pub use chat::{ChatTemplate, TemplateError};
pub use config::{Columns, ConfigError, DataConfig, Format, Needs, Sides, Truncation};
pub use dataset::{Dataset, Pair, load};
pub use error::{DataError, Place};
#[cfg(feature = "hub")]
pub use hub::Hub;
pub use layout::Layout;
pub use mismatched::mismatched;
pub use order::{StepPairs, epoch_steps, step_pairs, steps_per_epoch};
pub use pack::{deal, pack_plan};
pub use prompts::{Prompt, PromptError, prompts};
pub use report::{Bucket, DropReason, Dropped, Example, LayoutCount, Report};
pub use tokenizer::{Tokenizer, TokenizerError};
