//! From files to a dataset: every row encoded, kept or dropped with its reason, counted. Order is not decided here.

use std::collections::HashSet;
use std::path::PathBuf;

use rayon::prelude::*;

use crate::chat::ChatTemplate;
use crate::config::{DataConfig, Format, Needs, Truncation};
use crate::encode::{Tokenized, tokenize};
use crate::error::{DataError, Place};
use crate::inputs::{self, Input};
use crate::layout;
use crate::report::{self, DropReason, Dropped, Example, Report};
use crate::rows::{self, Position, Row};
use crate::tokenizer::{Hasher, Tokenizer};

/// A prompt and its completions as token ids. Of the two completions at least one has tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The row it comes from.
    pub place: Place,
    /// Read, not scored. Never empty.
    pub prompt: Vec<u32>,
    /// The preferred completion, or a desirable one; empty only for an undesirable row of unpaired data.
    pub chosen: Vec<u32>,
    /// The other completion, or an undesirable one; empty only for completion data and desirable rows of unpaired data.
    pub rejected: Vec<u32>,
    /// Scores of chosen and rejected, finite; read where [`Needs::scores`] asks for them.
    pub scores: Option<[f64; 2]>,
}

impl Pair {
    /// Tokens in a pack, where both completions share the prompt.
    pub fn packed_tokens(&self) -> usize {
        self.prompt.len() + self.chosen.len() + self.rejected.len()
    }

    /// Completions that are there.
    pub fn completions(&self) -> u64 {
        self.sequence_lengths().count() as u64
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
    /// BLAKE3 over the ids of all pairs, in order, and their scores where they are read: equal exactly if these are. The files'
    /// names, containers (.jsonl, .parquet, …), cuts into files, layouts, dropped rows and columns that are not read have no part
    /// in it.
    pub digest: [u8; 32],
    /// What became of the rows.
    pub report: Report,
}

/// Reads and tokenizes what `files` name (files, folders, patterns) as one list, as far as `needs` goes: a rejected side that
/// nobody needs is left empty, and files without one will do. [`crate::load_cached`] does the same, but not twice.
///
/// # Errors
/// At the first row that cannot be used, and if no pair is left. Rows without a completion within `max_length` are dropped and
/// reported, as are undesirable ones where nobody needs them.
pub fn load(
    files: &[PathBuf],
    config: &DataConfig,
    tokenizer: &Tokenizer,
    needs: Needs,
) -> Result<Dataset, DataError> {
    let inputs = inputs::expand(files)?;
    read(files, &inputs, config, tokenizer, needs, &mut |_, _| ())
}

/// Reads and tokenizes `inputs`, which `files` name. `progress` is told now and then how many bytes of how many have been read.
pub(crate) fn read(
    files: &[PathBuf],
    inputs: &[Input],
    config: &DataConfig,
    tokenizer: &Tokenizer,
    needs: Needs,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Dataset, DataError> {
    let mut reading = Reading {
        config,
        tokenizer,
        needs,
        format: None,
        waiting: Vec::new(),
        rows: 0,
        kept: Vec::new(),
        dropped: Vec::new(),
    };
    let total: u64 = inputs.iter().map(Input::bytes).sum();
    let mut before = 0;
    for input in inputs {
        let position = Position::default();
        let done = rows::read(input, &position, &mut |row| {
            if reading.take(row)? {
                progress(total.min(before + position.get()), total);
            }
            Ok(())
        });
        if let Err(error) = done {
            // Rows before the one that cannot be read may hold the first fault.
            reading.tokenize()?;
            return Err(error);
        }
        before += input.bytes();
    }
    reading.tokenize()?;
    progress(total, total);
    reading.dataset(files)
}

/// Rows that are read and not yet tokenized; so many that every thread has work, so few that no file is held as a whole.
const WAITING_ROWS_MAX: usize = 1024;

/// What has become of the rows so far.
struct Reading<'a> {
    config: &'a DataConfig,
    tokenizer: &'a Tokenizer,
    needs: Needs,
    /// Resolved by the first row.
    format: Option<Format>,
    waiting: Vec<Row>,
    /// Rows read, waiting ones included.
    rows: usize,
    kept: Vec<Tokenized>,
    dropped: Vec<Dropped>,
}

impl Reading<'_> {
    /// Whether the row was one too many to wait.
    fn take(&mut self, row: Row) -> Result<bool, DataError> {
        self.waiting.push(row);
        self.rows += 1;
        if self.waiting.len() < WAITING_ROWS_MAX {
            return Ok(false);
        }
        self.tokenize()?;
        Ok(true)
    }

    /// Tokenizes what waits.
    fn tokenize(&mut self) -> Result<(), DataError> {
        let (config, needs) = (self.config, self.needs);
        let Some(first) = self.waiting.first() else {
            return Ok(());
        };
        let format = match self.format {
            Some(format) => format,
            None => layout::resolve(config, &first.object, needs.sides)
                .map_err(|fault| fault.at(&first.place))?,
        };
        self.format = Some(format);
        let rows = std::mem::take(&mut self.waiting);
        let tokenized: Vec<_> = rows
            .par_iter()
            .map(|row| tokenize(row, format, config, self.tokenizer, needs))
            .collect();
        for (row, tokenized) in rows.into_iter().zip(tokenized) {
            match tokenized? {
                Ok(tokenized) => self.kept.push(tokenized),
                Err(reason) => self.dropped.push(Dropped {
                    place: row.place,
                    reason,
                }),
            }
        }
        Ok(())
    }

    /// What all rows have become, once none waits.
    fn dataset(self, files: &[PathBuf]) -> Result<Dataset, DataError> {
        let Reading {
            rows,
            format,
            kept,
            dropped,
            config,
            tokenizer,
            needs,
            waiting: _,
        } = self;
        let Some(format) = format else {
            return Err(no_pairs(
                files,
                0,
                "the files hold no row",
                "check data.train and data.eval",
            ));
        };
        if kept.is_empty() {
            return Err(all_dropped(files, rows, &dropped[0]));
        }
        let cut = kept.iter().filter(|row| row.truncated).count();
        let (truncated, prompts_cut) = match config.truncation {
            Truncation::KeepStart => (cut, 0),
            Truncation::KeepEnd => (0, cut),
        };
        let border_moved = kept.iter().filter(|row| row.border_moved).count();
        let layouts = report::layouts(kept.iter().map(|row| row.layout));
        let pairs: Vec<Pair> = kept.into_iter().map(|row| row.pair).collect();
        let unpaired = match format {
            Format::Unpaired => pairs.as_slice(),
            _ => &[],
        };
        let lengths: Vec<usize> = pairs.iter().flat_map(Pair::sequence_lengths).collect();
        let report = Report {
            rows,
            pairs: pairs.len(),
            format,
            layouts,
            desirable: unpaired.iter().filter(|it| !it.chosen.is_empty()).count(),
            undesirable: unpaired.iter().filter(|it| !it.rejected.is_empty()).count(),
            dropped,
            truncated,
            prompts_cut,
            identical: pairs
                .iter()
                .filter(|pair| pair.chosen == pair.rejected)
                .count(),
            repeated: repeated(&pairs),
            scores_not_above: pairs
                .iter()
                .filter_map(|pair| pair.scores)
                .filter(|[chosen, rejected]| chosen <= rejected)
                .count(),
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
            digest: digest(&pairs, needs.scores),
            pairs,
            report,
        })
    }
}

fn all_dropped(files: &[PathBuf], rows: usize, first: &Dropped) -> DataError {
    let Dropped { place, reason } = first;
    let cure = match reason {
        DropReason::EmptyPrompt => "give rows with a prompt",
        DropReason::LongCompletion { .. } => {
            "raise data.max_length, or give rows with shorter completions"
        }
        DropReason::EmptyCompletion { .. } => {
            "raise data.max_length, or give rows with shorter prompts"
        }
        DropReason::Undesirable => {
            "give desirable rows too, or set objective.kind = \"kto\", which trains on both"
        }
    };
    let reason = format!("every row was dropped, the first at {place}: {reason}");
    no_pairs(files, rows, &reason, cure)
}

fn no_pairs(files: &[PathBuf], rows: usize, reason: &str, cure: &str) -> DataError {
    let names = files.iter().map(|file| file.display().to_string());
    let names: Vec<String> = names.collect();
    DataError::NoPairs {
        files: names.join(", "),
        rows,
        reason: reason.into(),
        cure: cure.into(),
    }
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

fn digest(pairs: &[Pair], scores: bool) -> [u8; 32] {
    let mut hasher = Hasher::new();
    let head: &[u8] = if scores {
        b"caldpo dataset with scores v1"
    } else {
        b"caldpo dataset v1"
    };
    hasher.bytes(head);
    for pair in pairs {
        hasher.ids(&pair.prompt);
        hasher.ids(&pair.chosen);
        hasher.ids(&pair.rejected);
        for score in pair.scores.iter().flatten() {
            hasher.bytes(&score.to_le_bytes());
        }
    }
    hasher.finish()
}
