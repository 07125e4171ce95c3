//! Where the prompt of a conversation ends: message lists in, prompt and completions out. Text rows are `layout`'s own matter.

use serde_json::Value;

use crate::config::Columns;
use crate::layout::{Fault, Named, Parts, fault};
use crate::rows::kind;

/// Splits the row's conversations into prompt and completions.
pub(crate) fn parts(
    prompt: Option<&Value>,
    chosen: Named<'_>,
    rejected: Option<Named<'_>>,
    columns: &Columns,
) -> Result<Parts, Fault> {
    let chosen = messages(chosen)?;
    let rejected = rejected.map(messages).transpose()?;
    let string = match prompt {
        Some(list @ Value::Array(_)) => {
            let prompt = self::prompt((&columns.prompt, list))?;
            return behind(prompt, chosen, rejected);
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

/// A prompt that is given as messages.
pub(crate) fn prompt((name, list): Named<'_>) -> Result<Vec<Value>, Fault> {
    let prompt = messages((name, list))?;
    if role(&prompt[prompt.len() - 1]) == "assistant" {
        return fault(
            format!("`{name}` ends with an assistant turn"),
            "end it with the user's turn and put the assistant's into the completions",
        );
    }
    Ok(prompt)
}

/// Completions of a prompt that is given as messages: the assistant's turns, or whole conversations that start with the prompt.
fn behind(
    prompt: Vec<Value>,
    mut chosen: Vec<Value>,
    mut rejected: Option<Vec<Value>>,
) -> Result<Parts, Fault> {
    for completion in std::iter::once(&mut chosen).chain(rejected.as_mut()) {
        if completion.len() > prompt.len() && completion.starts_with(&prompt) {
            completion.drain(..prompt.len());
        }
        let first = role(&completion[0]);
        if first != "assistant" {
            return fault(
                format!("a completion starts with a turn of role \"{first}\""),
                "start each completion with the assistant's turn",
            );
        }
    }
    Ok(Parts::Chat {
        prompt,
        chosen,
        rejected,
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
