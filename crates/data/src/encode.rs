//! One row to token ids: template, tokenizer, EOS, the border between prompt and completion, the cut to length.

use serde_json::Value;

use crate::config::{DataConfig, Format, Needs, Sides, Truncation};
use crate::dataset::Pair;
use crate::error::{DataError, Place};
use crate::layout::{self, Layout, Meaning, Parts};
use crate::report::DropReason;
use crate::rows::Row;
use crate::tokenizer::{Tokenizer, TokenizerError};

/// A pair and what its row was.
pub(crate) struct Tokenized {
    pub pair: Pair,
    pub layout: Layout,
    /// Whether the cut took anything.
    pub truncated: bool,
    pub border_moved: bool,
}

/// The ids of one row, or why it gives no pair. A rejected side that nobody needs is left out.
pub(crate) fn tokenize(
    row: &Row,
    format: Format,
    config: &DataConfig,
    tokenizer: &Tokenizer,
    needs: Needs,
) -> Result<Result<Tokenized, DropReason>, DataError> {
    let place = &row.place;
    let needs_rejected = needs.sides != Sides::Chosen;
    let Meaning {
        layout,
        parts,
        label,
        scores,
    } = layout::meaning(row, format, &config.columns, needs.scores)?;
    if label == Some(false) && !needs_rejected {
        return Ok(Err(DropReason::Undesirable));
    }
    let (prompt, chosen, rejected) = match parts {
        Parts::Plain {
            prompt,
            chosen,
            rejected,
        } => {
            let rejected = rejected.filter(|_| needs_rejected);
            let whole = |completion: &str| plain(place, &prompt, completion, tokenizer);
            (
                encoded(place, tokenizer.encode(&prompt))?,
                whole(&chosen)?,
                rejected.map(|text| whole(&text)).transpose()?,
            )
        }
        Parts::Chat {
            prompt,
            chosen,
            rejected,
        } => {
            let rejected = rejected.filter(|_| needs_rejected);
            let text = rendered(place, &prompt, true, tokenizer)?;
            let whole = |completion| chat(place, &prompt, &text, completion, tokenizer);
            (
                encoded(place, tokenizer.encode_bare(&text))?,
                whole(chosen)?,
                rejected.map(whole).transpose()?,
            )
        }
    };
    let cut = match cut(&prompt, &chosen, rejected.as_deref(), config) {
        Ok(cut) => cut,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut pair = Pair {
        place: place.clone(),
        prompt: cut.prompt,
        chosen: cut.chosen,
        rejected: cut.rejected,
        scores,
    };
    if label == Some(false) {
        std::mem::swap(&mut pair.chosen, &mut pair.rejected);
    }
    Ok(Ok(Tokenized {
        border_moved: cut.border < prompt.len(),
        truncated: cut.truncated,
        pair,
        layout,
    }))
}

/// Prompt + completion + EOS of plain text.
fn plain(
    place: &Place,
    prompt: &str,
    completion: &str,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, DataError> {
    let Some(eos) = tokenizer.eos() else {
        return Err(DataError::Row {
            place: place.clone(),
            reason: "the row is plain text and the model names no token that ends it".into(),
            cure: "add eos_token to tokenizer_config.json".into(),
        });
    };
    let mut ids = encoded(place, tokenizer.encode(&format!("{prompt}{completion}")))?;
    // Some files end their completions with the EOS written out.
    if completion.is_empty() || ids.last() != Some(&eos) {
        ids.push(eos);
    }
    Ok(ids)
}

/// Prompt + completion of a conversation, checked to start with `prompt_text`.
fn chat(
    place: &Place,
    prompt: &[Value],
    prompt_text: &str,
    completion: Vec<Value>,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, DataError> {
    let messages: Vec<Value> = prompt.iter().cloned().chain(completion).collect();
    let whole = rendered(place, &messages, false, tokenizer)?;
    if !whole.starts_with(prompt_text) {
        let same = whole
            .chars()
            .zip(prompt_text.chars())
            .take_while(|(a, b)| a == b);
        return Err(DataError::Row {
            place: place.clone(),
            reason: format!(
                "the chat template writes the prompt differently once a completion follows it, from character {} on",
                same.count() + 1
            ),
            cure: "give a template with data.chat_template (--chat-template where there is no configuration) whose generation prompt \
                   starts the assistant's turn"
                .into(),
        });
    }
    encoded(place, tokenizer.encode_bare(&whole))
}

fn rendered(
    place: &Place,
    messages: &[Value],
    add_generation_prompt: bool,
    tokenizer: &Tokenizer,
) -> Result<String, DataError> {
    let Some(template) = tokenizer.chat_template() else {
        return Err(DataError::NoTemplate {
            place: place.clone(),
        });
    };
    let text = template.render(messages, add_generation_prompt);
    text.map_err(|source| DataError::Template {
        place: place.clone(),
        source,
    })
}

fn encoded(place: &Place, ids: Result<Vec<u32>, TokenizerError>) -> Result<Vec<u32>, DataError> {
    ids.map_err(|error| DataError::Tokenize {
        place: place.clone(),
        reason: error.to_string(),
    })
}

/// What is left of a row's ids.
struct Cut {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
    /// Tokens of the prompt before the cut.
    border: usize,
    truncated: bool,
}

/// Takes the completions as suffixes of the whole sequences, then cuts to `max_length`.
///
/// A tokenizer may merge the prompt's end with the completion's start into one token. The border then moves back to where both
/// whole sequences still agree with the prompt, so that each is exactly what its whole text tokenizes to, and the merged token
/// is scored. TRL cuts at the prompt's own length instead, and trains on a completion that lacks its start.
fn cut(
    prompt: &[u32],
    chosen: &[u32],
    rejected: Option<&[u32]>,
    config: &DataConfig,
) -> Result<Cut, DropReason> {
    let max_length = config.max_length;
    let border =
        common(prompt, chosen).min(rejected.map_or(usize::MAX, |whole| common(prompt, whole)));
    if border == 0 {
        return Err(DropReason::EmptyPrompt);
    }
    let longest = chosen.len().max(rejected.map_or(0, <[u32]>::len));
    let excess = longest.saturating_sub(max_length);
    // Where the prompt starts and the sequences end.
    let (start, end) = match config.truncation {
        Truncation::KeepStart => (0, max_length),
        Truncation::KeepEnd => (excess, usize::MAX),
    };
    if start >= border {
        return Err(DropReason::LongCompletion {
            completion_tokens: longest - border,
            max_length,
        });
    }
    let kept = |whole: &[u32]| {
        let end = whole.len().min(end);
        whole.get(border..end).unwrap_or(&[]).to_vec()
    };
    let (chosen, rejected) = (kept(chosen), rejected.map(kept));
    if chosen.is_empty() || rejected.as_ref().is_some_and(Vec::is_empty) {
        return Err(DropReason::EmptyCompletion {
            prompt_tokens: border,
            max_length,
        });
    }
    Ok(Cut {
        prompt: prompt[start..border].to_vec(),
        chosen,
        rejected: rejected.unwrap_or_default(),
        border,
        truncated: excess > 0,
    })
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
