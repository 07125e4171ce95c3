//! What became of the rows of a dataset: for a person as text, for a program as JSON.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::Format;
use crate::error::Place;
use crate::layout::Layout;

/// Dropped rows that the text lists one by one; JSON has them all.
const LISTED_MAX: usize = 5;

/// Characters of a decoded text that are shown of its start, and as many of its end.
const SHOWN_CHARACTERS: usize = 240;

/// Share of the pairs that may lose their end before it is said aloud: what is cut off is not trained on, and an answer without
/// its end teaches not to end.
const TRUNCATED_SHARE: f64 = 0.05;
/// Share of the rows that may be dropped: beyond it the pairs are no longer what was collected.
const DROPPED_SHARE: f64 = 0.05;
/// Share of the pairs that may have no preference in them, one in two hundred: they only pull towards the reference.
const IDENTICAL_SHARE: f64 = 0.005;
/// Share of the pairs that may be repetitions, one in a hundred: each weighs twice.
const REPEATED_SHARE: f64 = 0.01;

/// What became of the rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Rows read.
    pub rows: usize,
    /// Pairs kept.
    pub pairs: usize,
    /// What the rows are: never `auto`.
    pub format: Format,
    /// How the kept rows say what their prompt is.
    pub layouts: Vec<LayoutCount>,
    /// Kept rows of unpaired data whose completion is desirable.
    pub desirable: usize,
    /// Kept rows of unpaired data whose completion is undesirable.
    pub undesirable: usize,
    /// Rows that gave no pair.
    pub dropped: Vec<Dropped>,
    /// Pairs of which a completion lost its end to `max_length`.
    pub truncated: usize,
    /// Pairs whose prompt lost its start to `max_length`.
    pub prompts_cut: usize,
    /// Pairs with the same tokens in chosen and rejected: legal, and without a preference.
    pub identical: usize,
    /// Pairs with the tokens of an earlier one.
    pub repeated: usize,
    /// Pairs whose chosen score is not above the rejected one, where scores are read.
    pub scores_not_above: usize,
    /// Pairs whose prompt gave its last tokens to the completions, because the tokenizer merges across the border.
    pub border_moved: usize,
    /// Tokens of all pairs, the prompt counted once per completion.
    pub tokens: u64,
    /// Tokens that are scored: all completion tokens.
    pub scored_tokens: u64,
    /// Most tokens of prompt + completion.
    pub longest: usize,
    /// Sequences (prompt + one completion) by length.
    pub lengths: Vec<Bucket>,
    /// The first pair as the model sees it.
    pub example: Option<Example>,
    /// Whether the chat template asked for today's date and got the fixed one.
    pub fixed_date: bool,
}

/// Pairs whose rows have one layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayoutCount {
    /// The layout.
    pub layout: Layout,
    /// Pairs.
    pub pairs: usize,
}

/// A row that gave no pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// The row.
    pub place: Place,
    /// Why.
    pub reason: DropReason,
}

/// Why a row gave no pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DropReason {
    /// A completion has no token, or none within `max_length`.
    EmptyCompletion {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// The limit.
        max_length: usize,
    },
    /// The longer completion leaves no room for a token of the prompt.
    LongCompletion {
        /// Tokens of the longer completion.
        completion_tokens: usize,
        /// The limit.
        max_length: usize,
    },
    /// The prompt has no token, so nothing predicts a completion's first one.
    EmptyPrompt,
    /// The completion is labelled undesirable, and the objective trains on desirable ones alone.
    Undesirable,
}

/// Sequences of `from..=to` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Fewest tokens.
    pub from: usize,
    /// Most tokens.
    pub to: usize,
    /// Sequences.
    pub count: usize,
}

/// A pair decoded; completions are exactly what is scored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// The row.
    pub place: Place,
    /// Read by the model, not scored.
    pub prompt: String,
    /// Scored; empty for an undesirable row.
    pub chosen: String,
    /// Scored; empty for completion data and desirable rows.
    pub rejected: String,
}

/// Counts equal layouts.
pub(crate) fn layouts(layouts: impl Iterator<Item = Layout>) -> Vec<LayoutCount> {
    let mut counts = BTreeMap::new();
    for layout in layouts {
        *counts.entry(layout).or_insert(0) += 1;
    }
    let counts = counts.into_iter();
    counts
        .map(|(layout, pairs)| LayoutCount { layout, pairs })
        .collect()
}

/// Counts `lengths` into buckets that end at powers of two, as limits mostly do, from the shortest that has any to the longest.
pub(crate) fn buckets(lengths: &[usize]) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let (mut from, mut to) = (1, 1);
    while from <= longest {
        let within = lengths.iter().filter(|&&n| from <= n && n <= to);
        let count = within.count();
        if count > 0 || !buckets.is_empty() {
            buckets.push(Bucket { from, to, count });
        }
        (from, to) = (to + 1, 2 * to);
    }
    buckets
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyCompletion {
                prompt_tokens,
                max_length,
            } if prompt_tokens >= max_length => write!(
                f,
                "no completion left: the prompt alone has {prompt_tokens} tokens and data.max_length is {max_length}"
            ),
            Self::EmptyCompletion { .. } => f.write_str("a completion has no tokens"),
            Self::LongCompletion {
                completion_tokens,
                max_length,
            } => write!(
                f,
                "no prompt left: a completion alone has {completion_tokens} tokens and data.max_length is {max_length}"
            ),
            Self::EmptyPrompt => f.write_str("the prompt has no tokens"),
            Self::Undesirable => f.write_str(
                "its label says undesirable, and the objective trains on desirable completions alone",
            ),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} of {}",
            counted(self.pairs, "pair"),
            counted(self.rows, "row")
        )?;
        let unpaired = match self.format {
            Format::Unpaired => "unpaired, ",
            _ => "",
        };
        for LayoutCount { layout, pairs } in &self.layouts {
            match self.layouts.len() {
                1 => writeln!(f, "layout: {unpaired}{layout}")?,
                _ => writeln!(
                    f,
                    "layout of {}: {unpaired}{layout}",
                    counted(*pairs, "pair")
                )?,
            }
        }
        if self.format == Format::Unpaired {
            let (desirable, undesirable) = (self.desirable, self.undesirable);
            writeln!(
                f,
                "{} desirable, {undesirable} undesirable",
                counted(desirable, "completion")
            )?;
        }
        writeln!(
            f,
            "{} tokens, {} of them scored; longest sequence {}",
            self.tokens, self.scored_tokens, self.longest
        )?;
        for (count, meaning) in [
            (
                self.truncated,
                "truncated: a completion lost its end to data.max_length",
            ),
            (
                self.prompts_cut,
                "truncated: the prompt lost its start to data.max_length",
            ),
            (
                self.identical,
                "with identical chosen and rejected, which teach no preference",
            ),
            (self.repeated, "with the tokens of an earlier one"),
            (
                self.scores_not_above,
                "whose chosen score is not above the rejected one",
            ),
            (
                self.border_moved,
                "whose last prompt token merges with the completion and is scored with it",
            ),
        ] {
            if count > 0 {
                writeln!(f, "{} {meaning}", counted(count, "pair"))?;
            }
        }
        self.write_dropped(f)?;
        for warning in self.warnings() {
            writeln!(f, "warning: {warning}")?;
        }
        if self.fixed_date {
            writeln!(
                f,
                "the chat template asks for today's date; it always gets 26 Jul 2024, so that tokens stay the same"
            )?;
        }
        self.write_lengths(f)?;
        match &self.example {
            Some(example) => write!(f, "{example}"),
            None => Ok(()),
        }
    }
}

impl Report {
    /// What of this is more than a curiosity, with the numbers and the cure.
    pub fn warnings(&self) -> Vec<String> {
        let (rows, pairs) = (self.rows, self.pairs);
        let rules = [
            (
                (self.truncated, pairs, TRUNCATED_SHARE),
                "pairs lost the end of a completion to data.max_length; raise it, or leave long rows out",
            ),
            (
                (self.prompts_cut, pairs, TRUNCATED_SHARE),
                "pairs lost the start of their prompt to data.max_length; raise it, or leave long rows out",
            ),
            (
                (self.dropped.len(), rows, DROPPED_SHARE),
                "rows gave no pair; the first of them are listed with their reasons",
            ),
            (
                (self.identical, pairs, IDENTICAL_SHARE),
                "pairs have the same tokens in chosen and rejected: they teach no preference and count as ties; leave them out",
            ),
            (
                (self.repeated, pairs, REPEATED_SHARE),
                "pairs repeat an earlier one and weigh twice; leave them out",
            ),
        ];
        let mut warnings = Vec::new();
        for ((count, of, share), meaning) in rules {
            if count as f64 > share * of as f64 {
                let percent = 100.0 * count as f64 / of as f64;
                warnings.push(format!("{count} of {of} ({percent:.1} %) {meaning}"));
            }
        }
        warnings
    }

    fn write_dropped(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.dropped.is_empty() {
            return Ok(());
        }
        writeln!(f, "{} dropped:", counted(self.dropped.len(), "row"))?;
        for Dropped { place, reason } in self.dropped.iter().take(LISTED_MAX) {
            writeln!(f, "  {place}: {reason}")?;
        }
        if self.dropped.len() > LISTED_MAX {
            writeln!(f, "  and {} more", self.dropped.len() - LISTED_MAX)?;
        }
        Ok(())
    }

    fn write_lengths(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const BAR: usize = 40;
        let most = self.lengths.iter().map(|bucket| bucket.count).max();
        let Some(most) = most else {
            return Ok(());
        };
        writeln!(f, "sequences by tokens of prompt + completion:")?;
        for Bucket { from, to, count } in &self.lengths {
            let bar = "█".repeat((count * BAR).div_ceil(most));
            writeln!(f, "  {from:>6} – {to:<6} {count:>7} {bar}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Example {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} as the model sees it, scored tokens in ⟦ ⟧:",
            self.place
        )?;
        writeln!(f, "  prompt    {}", shown(&self.prompt))?;
        for (name, completion) in [("chosen  ", &self.chosen), ("rejected", &self.rejected)] {
            if !completion.is_empty() {
                writeln!(f, "  {name} ⟦{}⟧", shown(completion))?;
            }
        }
        Ok(())
    }
}

fn counted(count: usize, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

/// Start and end on one line; line breaks and other control characters are escaped.
fn shown(text: &str) -> String {
    let count = text.chars().count();
    let escaped = |text: String| {
        text.escape_debug()
            .to_string()
            .replace("\\\"", "\"")
            .replace("\\'", "'")
    };
    if count <= 2 * SHOWN_CHARACTERS {
        return escaped(text.into());
    }
    let start: String = text.chars().take(SHOWN_CHARACTERS).collect();
    let end: String = text.chars().skip(count - SHOWN_CHARACTERS).collect();
    format!(
        "{} … {} characters … {}",
        escaped(start),
        count - 2 * SHOWN_CHARACTERS,
        escaped(end)
    )
}
