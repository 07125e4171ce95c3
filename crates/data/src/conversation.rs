//! Where the prompt of a conversation ends: message lists in, prompt and completions out. Text rows are `layout`'s own matter.

use serde_json::{Map, Value, json};

use crate::layout::{Fault, Named, Parts, fault};
use crate::rows::kind;

/// Splits the row's conversations into prompt and completions; a prompt that is null is what they start with.
pub(crate) fn parts(
    (prompt_name, prompt): Named<'_>,
    chosen: Named<'_>,
    rejected: Option<Named<'_>>,
) -> Result<Parts, Fault> {
    let (chosen_name, rejected_name) = (chosen.0, rejected.map(|(name, _)| name));
    let chosen = messages(chosen)?;
    let rejected = rejected.map(messages).transpose()?;
    match prompt {
        Value::Array(_) => {
            let prompt = self::prompt((prompt_name, prompt))?;
            return behind(prompt, chosen, rejected);
        }
        Value::String(text) => {
            let whole = [Some(chosen_name), rejected_name].map(|name| name.map(quoted));
            let whole = whole.into_iter().flatten().collect::<Vec<_>>();
            first_user_turn_is(text, &chosen, prompt_name, &whole)?;
        }
        Value::Null => {}
        other => {
            return fault(
                format!("`{prompt_name}` is {}", kind(other)),
                "write it as a list of messages, or as the text of the first user turn",
            );
        }
    }
    let split = shared_turns(&chosen, rejected.as_deref())?;
    Ok(Parts::Chat {
        prompt: chosen[..split].to_vec(),
        chosen: chosen[split..].to_vec(),
        rejected: rejected.map(|messages| messages[split..].to_vec()),
    })
}

fn quoted(name: &str) -> String {
    format!("`{name}`")
}

/// Puts the text of a `system` column before the prompt, unless the prompt starts with it already.
pub(crate) fn start_with_system(system: &str, prompt: &mut Vec<Value>) -> Result<(), Fault> {
    if system.is_empty() {
        return Ok(());
    }
    let turn = json!({ "role": "system", "content": system });
    match prompt.first() {
        Some(first) if role(first) == "system" => {
            if first.get("content") != turn.get("content") {
                return fault(
                    "`system` differs from the conversation's own system turn",
                    "leave one of them out",
                );
            }
        }
        _ => prompt.insert(0, turn),
    }
    Ok(())
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

/// A non-empty list of objects, each with a role; a single object is a list of one.
fn messages((name, value): Named<'_>) -> Result<Vec<Value>, Fault> {
    let cure = "write messages as {\"role\": \"user\" or \"assistant\" …, \"content\": …}";
    let list = match value {
        Value::Array(list) => list.as_slice(),
        Value::Object(message) if message.contains_key("role") || message.contains_key("from") => {
            std::slice::from_ref(value)
        }
        _ => return fault(format!("`{name}` is {}", kind(value)), cure),
    };
    if list.is_empty() {
        return fault(format!("`{name}` is an empty list of messages"), cure);
    }
    let mut messages = Vec::with_capacity(list.len());
    for (index, message) in list.iter().enumerate() {
        let message = match message.get("role") {
            None | Some(Value::Null) => from_share_gpt(message, index, name)?,
            Some(_) => message.clone(),
        };
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
        messages.push(message);
    }
    Ok(messages)
}

/// ShareGPT's names for who speaks. Others (tools, observations) mean different things to different templates.
const SPEAKERS: [(&str, &str); 7] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("assistant", "assistant"),
    ("model", "assistant"),
    ("system", "system"),
];

/// `{from, value}` as `{role, content}`; what has no `from` stays as it is.
fn from_share_gpt(message: &Value, index: usize, name: &str) -> Result<Value, Fault> {
    let (Some(object), Some(from)) = (message.as_object(), message.get("from")) else {
        return Ok(message.clone());
    };
    let Some((_, role)) = SPEAKERS.iter().find(|(speaker, _)| from == speaker) else {
        let known: Vec<&str> = SPEAKERS.iter().map(|(speaker, _)| *speaker).collect();
        return fault(
            format!("message {index} of `{name}` is from {from}"),
            format!(
                "known are {}; write others as {{\"role\": …, \"content\": …}}",
                known.join(", ")
            ),
        );
    };
    let mut turn = Map::new();
    turn.insert("role".into(), (*role).into());
    for (key, value) in object {
        match key.as_str() {
            "role" | "from" => continue,
            "value" => turn.insert("content".into(), value.clone()),
            _ => turn.insert(key.clone(), value.clone()),
        };
    }
    Ok(turn.into())
}

/// Whether message lists start with an answer, so that their prompt must be elsewhere.
pub(crate) fn is_answer(value: &Value) -> bool {
    let first = match value {
        Value::Array(list) => list.first(),
        other => Some(other),
    };
    let speaker = first.and_then(|message| {
        let role = message.get("role").and_then(Value::as_str);
        role.or_else(|| message.get("from")?.as_str())
    });
    speaker.is_some_and(|speaker| SPEAKERS.contains(&(speaker, "assistant")))
}

fn role(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or("")
}

/// `whole` are the quoted columns that must be whole conversations, the conversation's own first.
fn first_user_turn_is(
    string: &str,
    conversation: &[Value],
    prompt_name: &str,
    whole: &[String],
) -> Result<(), Fault> {
    let first = conversation.iter().find(|message| role(message) == "user");
    let content = first.and_then(|message| message.get("content")?.as_str());
    if content == Some(string) {
        return Ok(());
    }
    fault(
        format!(
            "`{prompt_name}` is {:?} and the first user turn of {} is {:?}",
            abbreviated(string),
            whole[0],
            abbreviated(content.unwrap_or(""))
        ),
        format!(
            "{} must be whole conversations that start with the prompt; otherwise write the prompt as a list of messages",
            whole.join(" and ")
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
