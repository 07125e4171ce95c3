//! Prompts that a model is to continue: given as they are, or rows with a prompt column. Completions are not read.

use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::chat::TemplateError;
use crate::conversation;
use crate::error::{DataError, Place};
use crate::inputs::Input;
use crate::layout::fault;
use crate::rows::{self, Position, Row};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// The column that holds it.
const COLUMN: &str = "prompt";

/// What a model is to continue.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Text that is tokenized as it is.
    Text(String),
    /// Messages for the chat template, the last of them not the assistant's.
    Messages(Vec<Value>),
}

/// Why a prompt gives no tokens.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// Messages, and the model has no chat template.
    #[error(
        "the prompt is a conversation and the model has no chat template; give one with --chat-template, add \
         chat_template.jinja to the model's folder, or write the prompt as text"
    )]
    NoTemplate,
    /// The chat template refused the messages.
    #[error(
        "the chat template refuses this conversation: {0}; change its messages, or give another template with --chat-template"
    )]
    Template(TemplateError),
    /// The tokenizer refused the text.
    #[error(transparent)]
    Tokenize(#[from] TokenizerError),
    /// Nothing predicts a first token.
    #[error(
        "the prompt has no tokens and the tokenizer puts none before it; write at least one word"
    )]
    Empty,
}

impl Prompt {
    /// One user turn.
    pub fn user(content: &str) -> Self {
        Self::Messages(vec![
            serde_json::json!({"role": "user", "content": content}),
        ])
    }

    /// The ids that a model continues, at least one; of messages up to where the assistant's turn starts.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, PromptError> {
        let ids = match self {
            Self::Text(text) => tokenizer.encode(text)?,
            Self::Messages(messages) => {
                let template = tokenizer.chat_template().ok_or(PromptError::NoTemplate)?;
                let text = template.render(messages, true);
                tokenizer.encode_bare(&text.map_err(PromptError::Template)?)?
            }
        };
        if ids.is_empty() {
            return Err(PromptError::Empty);
        }
        Ok(ids)
    }
}

/// Text as it is; messages as a line each.
impl fmt::Display for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages = match self {
            Self::Text(text) => return f.write_str(text),
            Self::Messages(messages) => messages,
        };
        for (index, message) in messages.iter().enumerate() {
            let break_before = if index == 0 { "" } else { "\n" };
            let field = |name| message.get(name).unwrap_or(&Value::Null);
            let role = field("role").as_str().unwrap_or("");
            match field("content") {
                Value::String(text) => write!(f, "{break_before}{role}: {text}")?,
                other => write!(f, "{break_before}{role}: {other}")?,
            }
        }
        Ok(())
    }
}

/// Every row's prompt with its place, in order; the file is any that pairs can be in.
///
/// # Errors
/// At the first row without a prompt that can be used, and if there is no row.
pub fn prompts(file: &Path) -> Result<Vec<(Place, Prompt)>, DataError> {
    let mut prompts = Vec::new();
    let mut take = |row| {
        prompts.push(prompt(row)?);
        Ok(())
    };
    let input = Input::new(file);
    let done = input.and_then(|input| rows::read(&input, &Position::default(), &mut take));
    done.map_err(|error| match error {
        DataError::Read { file, source } => DataError::ReadPrompts { file, source },
        other => other,
    })?;
    if prompts.is_empty() {
        return Err(DataError::Row {
            place: Place {
                file: file.into(),
                line: 1,
            },
            reason: "the file holds no row".into(),
            cure: "write each row as {\"prompt\": …}".into(),
        });
    }
    Ok(prompts)
}

fn prompt(Row { place, mut object }: Row) -> Result<(Place, Prompt), DataError> {
    let read = match object.remove(COLUMN) {
        Some(Value::String(text)) => Ok(Prompt::Text(text)),
        None | Some(Value::Null) => fault(
            format!("the row has no `{COLUMN}`"),
            "add it, as text or as a list of messages",
        ),
        Some(messages) => conversation::prompt((COLUMN, &messages)).map(Prompt::Messages),
    };
    match read {
        Ok(prompt) => Ok((place, prompt)),
        Err(fault) => Err(fault.at(&place)),
    }
}
