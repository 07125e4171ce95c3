//! From files to a dataset: every row encoded, kept or dropped with its reason, counted. Order is not decided here.

use std::collections::HashSet;
use std::path::PathBuf;

use rayon::prelude::*;

use crate::chat::ChatTemplate;
use crate::config::{DataConfig, Format, Truncation};
use crate::encode::{Tokenized, tokenize};
use crate::error::{DataError, Place};
use crate::inputs;
use crate::layout;
use crate::report::{self, DropReason, Dropped, Example, Report};
use crate::rows::{self, Row};
use crate::tokenizer::{Hasher, Tokenizer};

/// A prompt and its completions as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The row it comes from.
    pub place: Place,
    /// Read, not scored. Never empty.
    pub prompt: Vec<u32>,
    /// The preferred completion. Never empty.
    pub chosen: Vec<u32>,
    /// The other completion; empty for completion data only.
    pub rejected: Vec<u32>,
}

impl Pair {
    /// Tokens in a pack, where both completions share the prompt.
    pub fn packed_tokens(&self) -> usize {
        self.prompt.len() + self.chosen.len() + self.rejected.len()
    }

    /// Tokens of all sequences, the prompt counted once per completion that is not empty.
    pub fn tokens(&self) -> u64 {
        self.sequence_lengths().sum::<usize>() as u64
    }

    fn sequence_lengths(&self) -> impl Iterator<Item = usize> {
        [self.chosen.len(), self.rejected.len()]
            .into_iter()
            .filter(|&length| length > 0)
            .map(|length| self.prompt.len() + length)
    }
}

/// Tokenized pairs in the order of their rows.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// At least one pair.
    pub pairs: Vec<Pair>,
    /// BLAKE3 over the ids of all pairs, in order: equal exactly if the pairs' ids are. The files' names, containers (.jsonl,
    /// .parquet, …), cuts into files, layouts, dropped rows and columns that are not read have no part in it.
    pub digest: [u8; 32],
    /// What became of the rows.
    pub report: Report,
}

/// Reads and tokenizes what `files` name (files, folders, patterns) as one list. With `needs_rejected` false (objective
/// `sft`) the rejected side is left empty, and files without one will do.
///
/// # Errors
/// At the first row that cannot be used, and if no pair is left. Rows without a completion within `max_length` are dropped and reported.
pub fn load(
    files: &[PathBuf],
    config: &DataConfig,
    tokenizer: &Tokenizer,
    needs_rejected: bool,
) -> Result<Dataset, DataError> {
    let mut reading = Reading {
        config,
        tokenizer,
        needs_rejected,
        format: None,
        waiting: Vec::new(),
        rows: 0,
        kept: Vec::new(),
        dropped: Vec::new(),
    };
    for input in inputs::expand(files)? {
        if let Err(error) = rows::read(&input, &mut |row| reading.take(row)) {
            // Rows before the one that cannot be read may hold the first fault.
            reading.tokenize()?;
            return Err(error);
        }
    }
    reading.tokenize()?;
    let Reading {
        rows,
        kept,
        dropped,
        ..
    } = reading;
    if rows == 0 {
        return Err(no_pairs(
            files,
            0,
            "the files hold no row",
            "check data.train and data.eval",
        ));
    }
    if kept.is_empty() {
        let Dropped { place, reason } = &dropped[0];
        let cure = match reason {
            DropReason::EmptyPrompt => "give rows with a prompt",
            DropReason::LongCompletion { .. } => {
                "raise data.max_length, or give rows with shorter completions"
            }
            DropReason::EmptyCompletion { .. } => {
                "raise data.max_length, or give rows with shorter prompts"
            }
        };
        let reason = format!("every row was dropped, the first at {place}: {reason}");
        return Err(no_pairs(files, rows, &reason, cure));
    }
    let cut = kept.iter().filter(|row| row.truncated).count();
    let (truncated, prompts_cut) = match config.truncation {
        Truncation::KeepStart => (cut, 0),
        Truncation::KeepEnd => (0, cut),
    };
    let border_moved = kept.iter().filter(|row| row.border_moved).count();
    let layouts = report::layouts(kept.iter().map(|row| row.layout));
    let pairs: Vec<Pair> = kept.into_iter().map(|row| row.pair).collect();
    let lengths: Vec<usize> = pairs.iter().flat_map(Pair::sequence_lengths).collect();
    let report = Report {
        rows,
        pairs: pairs.len(),
        layouts,
        dropped,
        truncated,
        prompts_cut,
        identical: pairs
            .iter()
            .filter(|pair| pair.chosen == pair.rejected)
            .count(),
        repeated: repeated(&pairs),
        border_moved,
        tokens: pairs.iter().map(Pair::tokens).sum(),
        scored_tokens: pairs
            .iter()
            .map(|pair| (pair.chosen.len() + pair.rejected.len()) as u64)
            .sum(),
        longest: lengths.iter().copied().max().unwrap_or(0),
        lengths: report::buckets(&lengths),
        example: pairs.first().map(|pair| example(pair, tokenizer)),
        fixed_date: tokenizer
            .chat_template()
            .is_some_and(ChatTemplate::reads_date),
    };
    Ok(Dataset {
        digest: digest(&pairs),
        pairs,
        report,
    })
}

/// Rows that are read and not yet tokenized; so many that every thread has work, so few that no file is held as a whole.
const WAITING_ROWS_MAX: usize = 1024;

/// What has become of the rows so far.
struct Reading<'a> {
    config: &'a DataConfig,
    tokenizer: &'a Tokenizer,
    needs_rejected: bool,
    /// Resolved by the first row.
    format: Option<Format>,
    waiting: Vec<Row>,
    /// Rows read, waiting ones included.
    rows: usize,
    kept: Vec<Tokenized>,
    dropped: Vec<Dropped>,
}

impl Reading<'_> {
    fn take(&mut self, row: Row) -> Result<(), DataError> {
        self.waiting.push(row);
        self.rows += 1;
        if self.waiting.len() < WAITING_ROWS_MAX {
            return Ok(());
        }
        self.tokenize()
    }

    /// Tokenizes what waits.
    fn tokenize(&mut self) -> Result<(), DataError> {
        let (config, needs_rejected) = (self.config, self.needs_rejected);
        let Some(first) = self.waiting.first() else {
            return Ok(());
        };
        if needs_rejected && config.format == Format::Completion {
            return Err(DataError::Row {
                place: first.place.clone(),
                reason: "data.format = \"completion\" reads no rejected side and the objective compares two".into(),
                cure: "set data.format = \"preference\", or objective.kind = \"sft\"".into(),
            });
        }
        let format = self.format;
        let format =
            format.unwrap_or_else(|| layout::resolve(config, &first.object, needs_rejected));
        self.format = Some(format);
        let rows = std::mem::take(&mut self.waiting);
        let tokenized: Vec<Result<Tokenized, DataError>> = rows
            .par_iter()
            .map(|row| tokenize(row, format, config, self.tokenizer, needs_rejected))
            .collect();
        for (row, tokenized) in rows.into_iter().zip(tokenized) {
            let tokenized = tokenized?;
            match drop_reason(&tokenized, config.max_length, needs_rejected) {
                None => self.kept.push(tokenized),
                Some(reason) => self.dropped.push(Dropped {
                    place: row.place,
                    reason,
                }),
            }
        }
        Ok(())
    }
}

fn no_pairs(files: &[PathBuf], rows: usize, reason: &str, cure: &str) -> DataError {
    let names: Vec<String> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    DataError::NoPairs {
        files: names.join(", "),
        rows,
        reason: reason.into(),
        cure: cure.into(),
    }
}

fn drop_reason(row: &Tokenized, max_length: usize, needs_rejected: bool) -> Option<DropReason> {
    let Pair {
        prompt,
        chosen,
        rejected,
        ..
    } = &row.pair;
    if row.prompt_tokens == 0 {
        return Some(DropReason::EmptyPrompt);
    }
    if prompt.is_empty() {
        return Some(DropReason::LongCompletion {
            completion_tokens: row.completion_tokens,
            max_length,
        });
    }
    (chosen.is_empty() || needs_rejected && rejected.is_empty()).then_some(
        DropReason::EmptyCompletion {
            prompt_tokens: row.prompt_tokens,
            max_length,
        },
    )
}

fn example(pair: &Pair, tokenizer: &Tokenizer) -> Example {
    let behind = |completion| tokenizer.decode_behind(&pair.prompt, completion);
    Example {
        place: pair.place.clone(),
        prompt: tokenizer.decode(&pair.prompt),
        chosen: behind(&pair.chosen),
        rejected: behind(&pair.rejected),
    }
}

/// Pairs with the tokens of an earlier one.
fn repeated(pairs: &[Pair]) -> usize {
    let tokens = pairs
        .iter()
        .map(|pair| (&pair.prompt, &pair.chosen, &pair.rejected));
    pairs.len() - tokens.collect::<HashSet<_>>().len()
}

fn digest(pairs: &[Pair]) -> [u8; 32] {
    let mut hasher = Hasher::new();
    hasher.bytes(b"caldpo dataset v1");
    for pair in pairs {
        hasher.ids(&pair.prompt);
        hasher.ids(&pair.chosen);
        hasher.ids(&pair.rejected);
    }
    hasher.finish()
}
