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
//! Messages may be `{role, content}` or `{from, value}`. A completion row may be a whole conversation in `messages` or `conversations`;
//! its last answer is the completion.

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::config::{Columns, DataConfig, Format};
use crate::conversation;
use crate::error::DataError;
use crate::rows::{Row, kind};

/// How a row says what its prompt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
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

/// Prompt and completions; `rejected` is absent in completion rows.
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

/// The layout of a file: what the configuration says, or under `auto` what the first row shows. Where nobody needs the rejected
/// side, preference rows are still read as such if they have one, because it may tell where the prompt ends.
pub(crate) fn resolve(
    config: &DataConfig,
    first: &Map<String, Value>,
    needs_rejected: bool,
) -> Format {
    let columns = &config.columns;
    let has_rejected = column(first, &columns.rejected).is_some();
    match config.format {
        Format::Auto if needs_rejected || has_rejected => Format::Preference,
        Format::Auto => Format::Completion,
        named => named,
    }
}

/// Tells a row's parts apart under a resolved `format`.
pub(crate) fn parts(
    row: &Row,
    format: Format,
    columns: &Columns,
) -> Result<(Layout, Parts), DataError> {
    read_parts(&row.object, format, columns).map_err(|Fault { reason, cure }| DataError::Row {
        place: row.place.clone(),
        reason,
        cure,
    })
}

/// What is wrong with a row, before its place is known.
pub(crate) struct Fault {
    pub reason: String,
    pub cure: String,
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
        Format::Auto | Format::Preference => vec![chosen],
    };
    for (_, name) in &wanted {
        if let Some(value) = column(object, name) {
            return Ok((name, value));
        }
    }
    if format == Format::Completion {
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
    if format == Format::Completion {
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
