//! A row's meaning: which columns it has, where its prompt ends, plain text or conversation. No tokens here.
//!
//! | row | prompt |
//! |---|---|
//! | texts with `prompt` | the column |
//! | texts without | longest common prefix of the two, less one trailing space (as TRL); of HH transcripts, up to the last `Assistant:` |
//! | message lists with a `prompt` list | the column; completions that repeat it lose it |
//! | message lists with a `prompt` string | shared leading turns; the string must be the first user turn (UltraFeedback) |
//! | message lists without | shared leading turns |

use serde_json::{Map, Value};

use crate::config::{Columns, DataConfig, Format};
use crate::conversation;
use crate::error::DataError;
use crate::rows::{Row, kind};

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
pub(crate) fn parts(row: &Row, format: Format, columns: &Columns) -> Result<Parts, DataError> {
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
) -> Result<Parts, Fault> {
    let prompt = column(object, &columns.prompt);
    let (chosen_name, chosen) = chosen_column(object, format, columns)?;
    let rejected = rejected_column(object, format, columns)?;
    match (chosen, rejected) {
        (Value::String(chosen), None) => plain(prompt, chosen, None, columns),
        (Value::String(chosen), Some(Value::String(rejected))) => {
            plain(prompt, chosen, Some(rejected), columns)
        }
        (Value::Array(_), None) => {
            conversation::parts(prompt, (chosen_name, chosen), None, columns)
        }
        (Value::Array(_), Some(rejected @ Value::Array(_))) => {
            let rejected = Some((columns.rejected.as_str(), rejected));
            conversation::parts(prompt, (chosen_name, chosen), rejected, columns)
        }
        (Value::String(_) | Value::Array(_), Some(rejected)) => fault(
            format!(
                "`{chosen_name}` is {} and `{}` is {}",
                kind(chosen),
                columns.rejected,
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

/// A column's name and its value.
pub(crate) type Named<'a> = (&'a str, &'a Value);

/// A column's value; null is as good as absent, which is how tables write a missing cell.
fn column<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    object.get(name).filter(|value| !value.is_null())
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
    let (key, name) = wanted[0];
    fault(
        format!("the row has no `{name}`{}", has(object)),
        format!("add it, or name the column that holds it with data.columns.{key}"),
    )
}

fn rejected_column<'a>(
    object: &'a Map<String, Value>,
    format: Format,
    columns: &Columns,
) -> Result<Option<&'a Value>, Fault> {
    if format == Format::Completion {
        return Ok(None);
    }
    match column(object, &columns.rejected) {
        Some(value) => Ok(Some(value)),
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
    prompt: Option<&Value>,
    chosen: &str,
    rejected: Option<&str>,
    columns: &Columns,
) -> Result<Parts, Fault> {
    let start = match (prompt, rejected) {
        (Some(Value::String(prompt)), _) => {
            return Ok(Parts::Plain {
                prompt: prompt.clone(),
                chosen: chosen.into(),
                rejected: rejected.map(Into::into),
            });
        }
        (Some(other), _) => {
            return fault(
                format!(
                    "`{}` is {} and the completions are text",
                    columns.prompt,
                    kind(other)
                ),
                "write all three as text or all three as lists of messages",
            );
        }
        (None, Some(rejected)) => border(chosen, rejected),
        (None, None) => {
            return fault(
                format!("the row has no `{}`", columns.prompt),
                "add it, or name the column that holds it with data.columns.prompt",
            );
        }
    };
    Ok(Parts::Plain {
        prompt: chosen[..start].into(),
        chosen: chosen[start..].into(),
        rejected: rejected.map(|text| text[start..].into()),
    })
}

/// Where the prompt of two whole texts ends, in bytes. Identical texts are all prompt; an EOS is what is left to score.
fn border(chosen: &str, rejected: &str) -> usize {
    match (hh_border(chosen), hh_border(rejected)) {
        (Some(a), Some(b)) if chosen[..a] == rejected[..b] => a,
        _ => common_prefix(chosen, rejected),
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
