//! A row's meaning: which columns it has, where its prompt ends, plain text or conversation. No tokens here.
//!
//! | row | prompt |
//! |---|---|
//! | texts with `prompt` | the column |
//! | texts without | longest common prefix of the two, less one trailing space (as TRL) |
//! | message lists with a `prompt` list | the column |
//! | message lists with a `prompt` string | shared leading turns; the string must be the first user turn (UltraFeedback) |
//! | message lists without | shared leading turns |

use serde_json::{Map, Value};

use crate::config::{Columns, DataConfig, Format};
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
struct Fault {
    reason: String,
    cure: String,
}

fn fault<T>(reason: impl Into<String>, cure: impl Into<String>) -> Result<T, Fault> {
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
        (Value::Array(_), None) => chat(prompt, (chosen_name, chosen), None, columns),
        (Value::Array(_), Some(rejected @ Value::Array(_))) => {
            let rejected = Some((columns.rejected.as_str(), rejected));
            chat(prompt, (chosen_name, chosen), rejected, columns)
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
        (None, Some(rejected)) => common_prefix(chosen, rejected),
        (None, None) => {
            return fault(
                format!("the row has no `{}`", columns.prompt),
                "add it, or name the column that holds it with data.columns.prompt",
            );
        }
    };
    if rejected == Some(chosen) {
        return fault(
            "the two texts are identical and there is no prompt column, so nothing tells where the completion starts",
            format!("add `{}`, or remove the row", columns.prompt),
        );
    }
    Ok(Parts::Plain {
        prompt: chosen[..start].into(),
        chosen: chosen[start..].into(),
        rejected: rejected.map(|text| text[start..].into()),
    })
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

type Named<'a> = (&'a str, &'a Value);

fn chat(
    prompt: Option<&Value>,
    chosen: Named<'_>,
    rejected: Option<Named<'_>>,
    columns: &Columns,
) -> Result<Parts, Fault> {
    let chosen = messages(chosen)?;
    let rejected = rejected.map(messages).transpose()?;
    let string = match prompt {
        Some(list @ Value::Array(_)) => {
            let prompt = messages((&columns.prompt, list))?;
            if role(&prompt[prompt.len() - 1]) == "assistant" {
                return fault(
                    format!("`{}` ends with an assistant turn", columns.prompt),
                    "end it with the user's turn and put the assistant's into the completions",
                );
            }
            return Ok(Parts::Chat {
                prompt,
                chosen,
                rejected,
            });
        }
        Some(Value::String(string)) => Some(string),
        Some(other) => {
            return fault(
                format!("`{}` is {}", columns.prompt, kind(other)),
                "write it as a list of messages, or as the text of the first user turn",
            );
        }
        None => None,
    };

    if let Some(string) = string {
        first_user_turn_is(string, &chosen, columns)?;
    }
    let split = shared_turns(&chosen, rejected.as_deref())?;
    Ok(Parts::Chat {
        prompt: chosen[..split].to_vec(),
        chosen: chosen[split..].to_vec(),
        rejected: rejected.map(|messages| messages[split..].to_vec()),
    })
}

/// A non-empty list of objects, each with a role.
fn messages((name, value): Named<'_>) -> Result<Vec<Value>, Fault> {
    let cure = "write messages as {\"role\": \"user\" or \"assistant\" …, \"content\": …}";
    let Value::Array(list) = value else {
        return fault(format!("`{name}` is {}", kind(value)), cure);
    };
    if list.is_empty() {
        return fault(format!("`{name}` is an empty list of messages"), cure);
    }
    for (index, message) in list.iter().enumerate() {
        if !message.get("role").is_some_and(Value::is_string) {
            return fault(
                format!("message {index} of `{name}` has no text `role`"),
                cure,
            );
        }
        // Tool calls come without content; a template that needs it says so itself.
        if message.get("content").is_none() && message.get("tool_calls").is_none() {
            return fault(
                format!("message {index} of `{name}` has no `content`"),
                cure,
            );
        }
    }
    Ok(list.clone())
}

fn role(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or("")
}

fn first_user_turn_is(
    string: &str,
    conversation: &[Value],
    columns: &Columns,
) -> Result<(), Fault> {
    let first = conversation.iter().find(|message| role(message) == "user");
    let content = first.and_then(|message| message.get("content")?.as_str());
    if content == Some(string) {
        return Ok(());
    }
    fault(
        format!(
            "`{}` is {:?} and the first user turn of `{}` is {:?}",
            columns.prompt,
            abbreviated(string),
            columns.chosen,
            abbreviated(content.unwrap_or(""))
        ),
        format!(
            "`{}` and `{}` must be whole conversations that start with the prompt; otherwise write the prompt as a list of messages",
            columns.chosen, columns.rejected
        ),
    )
}

fn abbreviated(text: &str) -> String {
    const CHARACTERS_MAX: usize = 60;
    let mut short: String = text.chars().take(CHARACTERS_MAX).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// How many leading turns are the prompt: as many as both share, so far that an assistant turn of each follows.
///
/// Identical conversations share every turn; their last one is the completion.
fn shared_turns(chosen: &[Value], rejected: Option<&[Value]>) -> Result<usize, Fault> {
    let rejected = rejected.unwrap_or(chosen);
    let same = chosen.iter().zip(rejected).take_while(|(a, b)| a == b);
    let most = same.count().min(chosen.len() - 1).min(rejected.len() - 1);
    let split = (1..=most).rev().find(|&split| {
        role(&chosen[split - 1]) != "assistant"
            && role(&chosen[split]) == "assistant"
            && role(&rejected[split]) == "assistant"
    });
    match split {
        Some(split) => Ok(split),
        None => fault(
            "the conversations share no leading turns with an assistant turn after them",
            "start both with the same user turn, or write the prompt as a list of messages",
        ),
    }
}
