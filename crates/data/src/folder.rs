//! What a model folder says about its tokenizer besides `tokenizer.json`: special tokens, EOS, the chat template.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::tokenizer::TokenizerError;

/// A JSON object, or an empty one if there is no such file.
pub(crate) fn object(file: &Path) -> Result<Map<String, Value>, TokenizerError> {
    let Some(text) = optional(file)? else {
        return Ok(Map::new());
    };
    serde_json::from_str(&text).map_err(|error| invalid(file, &error.to_string()))
}

fn optional(file: &Path) -> Result<Option<String>, TokenizerError> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read {
            file: file.into(),
            source,
        }),
    }
}

/// (`bos_token`, `<s>`) and its like, sorted by name; the configuration wins over the older map.
pub(crate) fn special_tokens(
    config: &Map<String, Value>,
    map: &Map<String, Value>,
) -> Vec<(String, String)> {
    let mut tokens = std::collections::BTreeMap::new();
    for (name, value) in map.iter().chain(config) {
        // A token is its text, or an object with the text and how to match it. `add_bos_token` is neither.
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        if let Some(text) = text.filter(|_| name.ends_with("_token")) {
            tokens.insert(name.clone(), text.to_owned());
        }
    }
    tokens.into_iter().collect()
}

/// The named EOS first, then what the generation settings add (chat models often stop at several).
pub(crate) fn eos_ids(model_dir: &Path, named: Option<u32>) -> Result<Vec<u32>, TokenizerError> {
    let mut ids: Vec<u32> = named.into_iter().collect();
    for name in ["generation_config.json", "config.json"] {
        let file = model_dir.join(name);
        let config = object(&file)?;
        let values = match config.get("eos_token_id") {
            None | Some(Value::Null) => continue,
            Some(Value::Array(list)) => list.clone(),
            Some(one) => vec![one.clone()],
        };
        for value in values {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            let Some(id) = id else {
                return Err(invalid(
                    &file,
                    &format!("eos_token_id {value} is not a token id"),
                ));
            };
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        break;
    }
    Ok(ids)
}

/// The template's source and the file it is in.
pub(crate) fn template(
    model_dir: &Path,
    config: &Map<String, Value>,
    chosen: Option<&Path>,
) -> Result<Option<(PathBuf, String)>, TokenizerError> {
    if let Some(file) = chosen {
        let source = fs::read_to_string(file).map_err(|source| TokenizerError::ReadTemplate {
            file: file.into(),
            source,
        })?;
        return Ok(Some((file.into(), source)));
    }
    let file = model_dir.join("chat_template.jinja");
    if let Some(source) = optional(&file)? {
        return Ok(Some((file, source)));
    }
    let legacy = model_dir.join("chat_template.json");
    for (file, object) in [
        (legacy.clone(), &object(&legacy)?),
        (model_dir.join("tokenizer_config.json"), config),
    ] {
        let source = match object.get("chat_template") {
            None | Some(Value::Null) => continue,
            Some(Value::String(source)) => Some(source.as_str()),
            // Several by name: the one for plain chat is called default.
            Some(Value::Array(list)) => list
                .iter()
                .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
                .and_then(|entry| entry.get("template")?.as_str()),
            Some(_) => None,
        };
        return match source {
            Some(source) => Ok(Some((file, source.into()))),
            None => Err(invalid(
                &file,
                "chat_template is neither a text nor a list with a template named \"default\"",
            )),
        };
    }
    Ok(None)
}

/// A file that does not hold what it should.
pub(crate) fn invalid(file: &Path, reason: &str) -> TokenizerError {
    TokenizerError::Invalid {
        file: file.into(),
        reason: reason.into(),
    }
}
