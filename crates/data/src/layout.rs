//! A row's meaning: which columns it has, where its prompt ends, plain text or conversation. No tokens here.
//!
//! | row | prompt |
//! |---|---|
//! | texts with `prompt` | the column |
//! | texts without | longest common prefix of the two, less one trailing space (as TRL); of HH transcripts, up to the last `Assistant:` |
//! | message lists with a `prompt` list | the column; completions that repeat it lose it |
//! | message lists with a `prompt` string | shared leading turns; the string must be the first user turn (UltraFeedback) |
//! | message lists without | shared leading turns |
//! | `conversations` instead of `prompt` (ShareGPT) | the column, behind the text of `system` if there is one; `chosen` and `rejected` are one message or several |
//!
//! A row of one completion, with or without a label, is read as if it were `chosen` alone.
//! Messages may be `{role, content}` or `{from, value}`. A completion row, also one with a label, may be a whole conversation in
//! `messages` or `conversations`; its last answer is the completion.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{Columns, DataConfig, Format, Sides};
use crate::conversation;
use crate::error::{DataError, Place};
use crate::rows::{Row, kind};

/// How a row says what its prompt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Texts with a prompt of their own.
    Text,
    /// Texts that start with the prompt.
    TextImplicit,
    /// Anthropic's HH transcripts.
    Transcript,
    /// Message lists with a prompt of their own.
    Chat,
    /// Message lists that start with the prompt.
    ChatImplicit,
    /// Whole conversations beside the text of their first user turn, as UltraFeedback has them.
    ChatWithText,
    /// `conversations`, as ShareGPT has them.
    ShareGpt,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text with its prompt in a column",
            Self::TextImplicit => "text that starts with its prompt",
            Self::Transcript => "HH transcripts, the prompt up to the last `Assistant:`",
            Self::Chat => "messages with their prompt in a column",
            Self::ChatImplicit => "messages that start with their prompt",
            Self::ChatWithText => "UltraFeedback's whole conversations beside the prompt's text",
            Self::ShareGpt => "ShareGPT's `conversations`",
        })
    }
}

/// ShareGPT's name for the prompt's turns.
const CONVERSATIONS: &str = "conversations";

/// What holds a whole conversation in completion rows that name no completion.
const WHOLE: [&str; 2] = ["messages", CONVERSATIONS];

/// What a row says.
pub(crate) struct Meaning {
    pub layout: Layout,
    pub parts: Parts,
    /// Of unpaired rows, whether the completion is desirable.
    pub label: Option<bool>,
    /// Of chosen and rejected, where somebody asked for them.
    pub scores: Option<[f64; 2]>,
}

/// Prompt and completions; `rejected` is absent in rows of one completion, which is `chosen` whatever its label.
pub(crate) enum Parts {
    /// Text that is tokenized as it is.
    Plain {
        prompt: String,
        chosen: String,
        rejected: Option<String>,
    },
    /// Messages for the chat template.
    Chat {
        prompt: Vec<Value>,
        chosen: Vec<Value>,
        rejected: Option<Vec<Value>>,
    },
}

/// The format of the files: what the configuration says, or under `auto` what the first row shows. Where nobody needs the rejected
/// side, preference rows are still read as such if they have one, because it may tell where the prompt ends.
pub(crate) fn resolve(
    config: &DataConfig,
    first: &Map<String, Value>,
    sides: Sides,
) -> Result<Format, Fault> {
    let format = match config.format {
        Format::Auto => shown(first, &config.columns, sides),
        named => named,
    };
    match (format, sides) {
        (Format::Completion, Sides::Both) => fault(
            "data.format = \"completion\" reads no rejected side and the objective compares two",
            "set data.format = \"preference\", or objective.kind = \"sft\"",
        ),
        (Format::Completion, Sides::Either) => fault(
            "data.format = \"completion\" does not tell which completions are undesirable",
            "set data.format = \"unpaired\" or \"preference\", or objective.kind = \"sft\"",
        ),
        (Format::Unpaired, Sides::Both) => fault(
            "the row is unpaired, one completion with a label, and the objective compares two",
            "set objective.kind = \"kto\", or give pairs of chosen and rejected",
        ),
        _ => Ok(format),
    }
}

/// What a row looks like.
fn shown(row: &Map<String, Value>, columns: &Columns, sides: Sides) -> Format {
    let has = |name| column(row, name).is_some();
    let paired = has(&columns.chosen) || has(&columns.rejected);
    let completed = has(&columns.completion)
        || WHOLE
            .iter()
            .any(|name| row.get(*name).is_some_and(Value::is_array));
    // Data for other ends has labels of other kinds.
    let labelled = column(row, &columns.label).is_some_and(|value| desirable(value).is_some());
    match sides {
        _ if !paired && completed && labelled => Format::Unpaired,
        // What such a row lacks is the label.
        Sides::Either if !paired => Format::Unpaired,
        Sides::Chosen if !has(&columns.rejected) => Format::Completion,
        _ => Format::Preference,
    }
}

/// Reads a row under a resolved `format`, scores only if they are wanted.
pub(crate) fn meaning(
    row: &Row,
    format: Format,
    columns: &Columns,
    scores: bool,
) -> Result<Meaning, DataError> {
    let read = || {
        let (layout, parts) = read_parts(&row.object, format, columns)?;
        let unpaired = format == Format::Unpaired;
        let label = unpaired.then(|| label(&row.object, columns)).transpose()?;
        let scores = scores
            .then(|| self::scores(&row.object, columns))
            .transpose()?;
        Ok(Meaning {
            layout,
            parts,
            label,
            scores,
        })
    };
    read().map_err(|fault: Fault| fault.at(&row.place))
}

/// What is wrong with a row, before its place is known.
pub(crate) struct Fault {
    reason: String,
    cure: String,
}

impl Fault {
    /// The same, told with the place.
    pub fn at(self, place: &Place) -> DataError {
        DataError::Row {
            place: place.clone(),
            reason: self.reason,
            cure: self.cure,
        }
    }
}

/// Refuses a row.
pub(crate) fn fault<T>(reason: impl Into<String>, cure: impl Into<String>) -> Result<T, Fault> {
    Err(Fault {
        reason: reason.into(),
        cure: cure.into(),
    })
}

fn read_parts(
    object: &Map<String, Value>,
    format: Format,
    columns: &Columns,
) -> Result<(Layout, Parts), Fault> {
    let chosen = chosen_column(object, format, columns)?;
    let rejected = rejected_column(object, format, columns)?;
    let prompt = prompt_column(object, chosen, columns);
    let (chosen_name, chosen_value) = chosen;
    match (chosen_value, rejected) {
        (Value::String(text), None) => plain(prompt, text, None),
        (Value::String(text), Some((_, Value::String(rejected)))) => {
            plain(prompt, text, Some(rejected))
        }
        (Value::Array(_) | Value::Object(_), None) => chat(object, prompt, chosen, None),
        (Value::Array(_) | Value::Object(_), Some((_, Value::Array(_) | Value::Object(_)))) => {
            chat(object, prompt, chosen, rejected)
        }
        (Value::String(_) | Value::Array(_) | Value::Object(_), Some((name, rejected))) => fault(
            format!(
                "`{chosen_name}` is {} and `{name}` is {}",
                kind(chosen_value),
                kind(rejected)
            ),
            "write both as text or both as lists of messages",
        ),
        (other, _) => fault(
            format!("`{chosen_name}` is {}", kind(other)),
            "write it as text or as a list of messages",
        ),
    }
}

/// The parts of message lists.
fn chat(
    object: &Map<String, Value>,
    prompt: Named<'_>,
    chosen: Named<'_>,
    rejected: Option<Named<'_>>,
) -> Result<(Layout, Parts), Fault> {
    let whole = chosen.0 == CONVERSATIONS;
    let share_gpt = whole || prompt.0 == CONVERSATIONS;
    let layout = match prompt.1 {
        _ if share_gpt => Layout::ShareGpt,
        Value::Null => Layout::ChatImplicit,
        Value::String(_) => Layout::ChatWithText,
        _ => Layout::Chat,
    };
    let mut parts = conversation::parts(prompt, chosen, rejected)?;
    let system = column(object, "system").filter(|_| share_gpt);
    if let (Some(Value::String(system)), Parts::Chat { prompt, .. }) = (system, &mut parts) {
        conversation::start_with_system(system, prompt)?;
    }
    Ok((layout, parts))
}

/// A column's name and its value.
pub(crate) type Named<'a> = (&'a str, &'a Value);

/// A column's value; null is as good as absent, which is how tables write a missing cell. A name with dots that is no column leads
/// into objects by their keys and into lists by their indices, from 0.
fn column<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let value = object.get(name).or_else(|| nested(object, name));
    value.filter(|value| !value.is_null())
}

fn nested<'a>(object: &'a Map<String, Value>, path: &str) -> Option<&'a Value> {
    let mut steps = path.split('.');
    let mut value = object.get(steps.next()?)?;
    for step in steps {
        value = match value {
            Value::Object(object) => object.get(step)?,
            Value::Array(list) => list.get(step.parse::<usize>().ok()?)?,
            _ => return None,
        };
    }
    Some(value)
}

/// The prompt's column, null if there is none. `conversations` is it only where the completions are answers: beside whole
/// conversations it may be anything.
fn prompt_column<'a>(
    object: &'a Map<String, Value>,
    chosen: Named<'_>,
    columns: &'a Columns,
) -> Named<'a> {
    let named = columns.prompt.as_str();
    if let Some(value) = column(object, named) {
        return (named, value);
    }
    match column(object, CONVERSATIONS) {
        Some(value @ Value::Array(_)) if conversation::is_answer(chosen.1) => {
            (CONVERSATIONS, value)
        }
        _ => (named, &Value::Null),
    }
}

/// The column of the preferred completion, by its name. Completion rows may call it either way.
fn chosen_column<'a>(
    object: &'a Map<String, Value>,
    format: Format,
    columns: &'a Columns,
) -> Result<Named<'a>, Fault> {
    let completion = ("completion", columns.completion.as_str());
    let chosen = ("chosen", columns.chosen.as_str());
    let wanted = match format {
        Format::Completion => vec![completion, chosen],
        Format::Unpaired => vec![completion],
        Format::Auto | Format::Preference => vec![chosen],
    };
    for (_, name) in &wanted {
        if let Some(value) = column(object, name) {
            return Ok((name, value));
        }
    }
    if has_one_completion(format) {
        for name in WHOLE {
            if let Some(value @ Value::Array(_)) = column(object, name) {
                return Ok((name, value));
            }
        }
    }
    let (key, name) = wanted[0];
    fault(
        format!("the row has no `{name}`{}", has(object)),
        format!("add it, or name the column that holds it with data.columns.{key}"),
    )
}

fn rejected_column<'a>(
    object: &'a Map<String, Value>,
    format: Format,
    columns: &'a Columns,
) -> Result<Option<Named<'a>>, Fault> {
    if has_one_completion(format) {
        return Ok(None);
    }
    match column(object, &columns.rejected) {
        Some(value) => Ok(Some((&columns.rejected, value))),
        None => fault(
            format!("the row has no `{}`{}", columns.rejected, has(object)),
            "add it, name the column that holds it with data.columns.rejected, or set data.format = \"completion\" to train on the \
             chosen side alone (objective sft)",
        ),
    }
}

fn has_one_completion(format: Format) -> bool {
    matches!(format, Format::Completion | Format::Unpaired)
}

/// Whether the completion of an unpaired row is desirable.
fn label(object: &Map<String, Value>, columns: &Columns) -> Result<bool, Fault> {
    let name = &columns.label;
    let Some(value) = column(object, name) else {
        return fault(
            format!("the row has no `{name}`{}", has(object)),
            "add it, name the column that holds it with data.columns.label, or give pairs of chosen and rejected",
        );
    };
    match desirable(value) {
        Some(desirable) => Ok(desirable),
        None => fault(
            format!("`{name}` is {}", told(value)),
            "write it as true or false, or as 1 or 0; if it means something else and the objective is sft, set data.format = \"completion\"",
        ),
    }
}

/// What a label means. Texts are left out: to Python, which wrote most files, \"false\" is true.
fn desirable(label: &Value) -> Option<bool> {
    let number = label.as_f64();
    match label {
        Value::Bool(desirable) => Some(*desirable),
        _ if number == Some(1.0) => Some(true),
        _ if number == Some(0.0) => Some(false),
        _ => None,
    }
}

/// The scores of chosen and rejected.
fn scores(object: &Map<String, Value>, columns: &Columns) -> Result<[f64; 2], Fault> {
    let score = |name: &str, key: &str| {
        let value = column(object, name);
        if let Some(score) = value.and_then(Value::as_f64) {
            return Ok(score);
        }
        let reason = match value {
            // Tables have NaN and infinities, JSON does not.
            None => format!("the row has no finite number in `{name}`{}", has(object)),
            Some(value) => format!("`{name}` is {}", told(value)),
        };
        fault(
            reason,
            format!(
                "give a number, name the column that holds it with data.columns.{key}, or leave out objective.score_scale"
            ),
        )
    };
    Ok([
        score(&columns.score_chosen, "score_chosen")?,
        score(&columns.score_rejected, "score_rejected")?,
    ])
}

/// A value for a message: numbers as they are, others by what they are.
fn told(value: &Value) -> String {
    match value {
        Value::Number(number) => number.to_string(),
        other => kind(other).into(),
    }
}

fn has(object: &Map<String, Value>) -> String {
    let names: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
    if names.is_empty() {
        return ", it is empty".into();
    }
    format!(", it has {}", names.join(", "))
}

fn plain(
    (prompt_name, prompt): Named<'_>,
    chosen: &str,
    rejected: Option<&str>,
) -> Result<(Layout, Parts), Fault> {
    let (layout, start) = match (prompt, rejected) {
        (Value::String(prompt), _) => {
            let parts = Parts::Plain {
                prompt: prompt.clone(),
                chosen: chosen.into(),
                rejected: rejected.map(Into::into),
            };
            return Ok((Layout::Text, parts));
        }
        (Value::Null, Some(rejected)) => border(chosen, rejected),
        (Value::Null, None) => {
            return fault(
                format!("the row has no `{prompt_name}`"),
                "add it, or name the column that holds it with data.columns.prompt",
            );
        }
        (other, _) => {
            return fault(
                format!(
                    "`{prompt_name}` is {} and the completions are text",
                    kind(other)
                ),
                "write all three as text or all three as lists of messages",
            );
        }
    };
    let parts = Parts::Plain {
        prompt: chosen[..start].into(),
        chosen: chosen[start..].into(),
        rejected: rejected.map(|text| text[start..].into()),
    };
    Ok((layout, parts))
}

/// Where the prompt of two whole texts ends, in bytes. Identical texts are all prompt; an EOS is what is left to score.
fn border(chosen: &str, rejected: &str) -> (Layout, usize) {
    match (hh_border(chosen), hh_border(rejected)) {
        (Some(a), Some(b)) if chosen[..a] == rejected[..b] => (Layout::Transcript, a),
        _ => (Layout::TextImplicit, common_prefix(chosen, rejected)),
    }
}

/// Anthropic's HH transcripts answer behind their last `Assistant:`. Their common prefix would eat shared first words of the answers.
fn hh_border(transcript: &str) -> Option<usize> {
    const ANSWER: &str = "\n\nAssistant:";
    let start = transcript.starts_with("\n\nHuman:");
    let answer = transcript.rfind(ANSWER).filter(|_| start)?;
    Some(answer + ANSWER.len())
}

/// Bytes of the longest common prefix in whole characters. A space before the split goes to the completions, since most
/// tokenizers put it into the token of the word after it.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    let length = same.map(|(character, _)| character.len_utf8()).sum();
    let differs_after = length < a.len() || length < b.len();
    if differs_after && a[..length].ends_with(' ') {
        return length - 1;
    }
    length
}
