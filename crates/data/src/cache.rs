//! Tokenizing once: a dataset is kept in a folder under a key of all that decides it, and read from there while nothing changed.
//!
//! The key is BLAKE3 over the names and contents of the input files, the tokenizer's digest (chat template included), the parts of
//! the configuration that decide rows, what the objective needs, and the version of this crate. Contents are hashed at every load
//! and no time stamps are compared: hashing takes a hundredth of the time of tokenizing and cannot be wrong.
//!
//! Nothing is ever removed. Files of the folder may be deleted at any time, and several processes may share it.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::cache_file;
use crate::config::{DataConfig, Needs};
use crate::dataset::{self, Dataset};
use crate::error::DataError;
use crate::inputs::{self, Input};
use crate::tokenizer::{Hasher, Tokenizer};

/// A dataset and how it came about.
#[derive(Debug)]
pub struct Loaded {
    /// The dataset.
    pub dataset: Dataset,
    /// Whether it was read from the cache.
    pub from_cache: bool,
    /// What went wrong with the cache, with its cure; the dataset is right nevertheless.
    pub warnings: Vec<String>,
}

/// What [`crate::load`] gives, from the folder `cache` if it holds that; otherwise it is put there. `progress` is told now and then
/// how many bytes of how many have been read of the input files, at last all of them.
///
/// # Errors
/// As [`crate::load`]. A cache that cannot be read or written, or that holds damaged files, is a warning.
pub fn load_cached(
    files: &[PathBuf],
    config: &DataConfig,
    tokenizer: &Tokenizer,
    needs: Needs,
    cache: Option<&Path>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Loaded, DataError> {
    let inputs = inputs::expand(files)?;
    let mut warnings = Vec::new();
    let Some(folder) = cache else {
        return Ok(Loaded {
            dataset: dataset::read(files, &inputs, config, tokenizer, needs, progress)?,
            from_cache: false,
            warnings,
        });
    };
    let key = key(&inputs, config, tokenizer, needs)?;
    let file = folder.join(format!("{}.pairs", blake3::Hash::from(key).to_hex()));
    match cache_file::read(&file, &key, &inputs) {
        Ok(Some(dataset)) => {
            let total = inputs.iter().map(Input::bytes).sum();
            progress(total, total);
            return Ok(Loaded {
                dataset,
                from_cache: true,
                warnings,
            });
        }
        Ok(None) => {}
        Err(reason) => warnings.push(format!(
            "{}: {reason}; the pairs are tokenized again and the file is replaced",
            file.display()
        )),
    }
    let dataset = dataset::read(files, &inputs, config, tokenizer, needs, progress)?;
    // What was read may be newer than what was hashed.
    if self::key(&inputs, config, tokenizer, needs)? != key {
        warnings.push(
            "the files of pairs changed while they were read, so the cache does not keep them; start again if that was no \
             accident"
                .into(),
        );
    } else if let Err(reason) = cache_file::write(&file, &key, &inputs, &dataset) {
        warnings.push(format!(
            "the tokenized pairs are not kept for the next time: {reason}; check that {} can be written",
            folder.display()
        ));
    }
    Ok(Loaded {
        dataset,
        from_cache: false,
        warnings,
    })
}

/// BLAKE3 over all that decides a dataset.
fn key(
    inputs: &[Input],
    config: &DataConfig,
    tokenizer: &Tokenizer,
    needs: Needs,
) -> Result<[u8; 32], DataError> {
    let mut hasher = Hasher::new();
    hasher.bytes(b"caldpo dataset cache v1");
    hasher.bytes(env!("CARGO_PKG_VERSION").as_bytes());
    hasher.bytes(&tokenizer.digest());
    let DataConfig {
        train: _,
        eval: _,
        cache: _,
        format,
        columns,
        // The tokenizer's digest has its text.
        chat_template: _,
        max_length,
        truncation,
        shuffle: _,
    } = config;
    let decisive = serde_json::to_vec(&(format, columns, max_length, truncation, needs));
    hasher.bytes(&decisive.expect("names and numbers can be written as JSON"));
    for Input { file, .. } in inputs {
        // Names are in places, and their ends say how to read a file.
        hasher.bytes(file.as_os_str().as_encoded_bytes());
        let mut content = blake3::Hasher::new();
        File::open(file)
            .and_then(|open| content.update_reader(open).map(drop))
            .map_err(|source| DataError::Read {
                file: file.to_path_buf(),
                source,
            })?;
        hasher.bytes(content.finalize().as_bytes());
    }
    Ok(hasher.finish())
}
