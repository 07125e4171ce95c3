//! Continuations of prompts by one model, on this process alone, to read what it writes.

use std::path::{Path, PathBuf};

use data::{Prompt, Tokenizer};
use model::{Device, Model, Sampler};

use crate::adapter::put_on;
use crate::error::TrainError;
use crate::setup::check_ids;

/// What to continue, and how.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Hugging Face directory.
    pub model: PathBuf,
    /// An adapter to put on it, in PEFT's format.
    pub adapter: Option<PathBuf>,
    /// A Jinja file in place of the model's own chat template.
    pub chat_template: Option<PathBuf>,
    /// What to continue.
    pub prompts: Prompts,
    /// Whether a text is a user's turn of a conversation, and not itself what is continued.
    pub chat: bool,
    /// Most tokens of a continuation.
    pub max_tokens: usize,
    /// Of softmax(logits / temperature); 0 takes the most likely token.
    pub temperature: f64,
    /// Draw of the fewest likeliest tokens that together have this probability; 1 for all.
    pub top_p: f64,
    /// Of the one stream of random numbers that all prompts draw from.
    pub seed: u64,
}

/// Where prompts come from.
#[derive(Clone, Debug)]
pub enum Prompts {
    /// One text.
    Text(String),
    /// Rows with a `prompt`.
    File(PathBuf),
}

/// A prompt continued.
#[derive(Clone, Debug, PartialEq)]
pub struct Continuation {
    /// As it was given.
    pub prompt: Prompt,
    /// What the model writes behind it, without the token that ends it.
    pub text: String,
    /// Tokens generated, the one that ends it included.
    pub tokens: usize,
    /// Whether the model ended it; otherwise `max_tokens` did.
    pub ended: bool,
}

/// Continues every prompt and hands it to `each` in order, until `each` says stop with an error of its own.
///
/// # Errors
/// A file or prompt that cannot be used, before anything is generated.
///
/// # Panics
/// If the temperature is negative or not finite, or `top_p` is not above 0 and at most 1.
pub fn generate<E: From<TrainError>>(
    request: &GenerateRequest,
    device: &Device,
    each: &mut dyn FnMut(Continuation) -> Result<(), E>,
) -> Result<(), E> {
    let tokenizer = Tokenizer::load(&request.model, request.chat_template.as_deref());
    let tokenizer = tokenizer.map_err(TrainError::from)?;
    let prompts = read(request, &tokenizer)?;
    let mut model = Model::load(&request.model, device).map_err(TrainError::from)?;
    put_on(request.adapter.as_deref(), &mut model)?;
    for (place, _, ids) in &prompts {
        check_ids(ids, place, model.config().vocabulary, &request.model)?;
    }
    let stop = stop_ids(&model, &tokenizer);
    let mut sampler = Sampler::new(request.temperature, request.top_p, request.seed);
    for (place, prompt, ids) in prompts {
        let new = model.generate(&ids, request.max_tokens, &mut sampler, &stop);
        warn_beyond_positions(&model, &place, ids.len() + new.len());
        let ended = new.last().is_some_and(|last| stop.contains(last));
        let written = &new[..new.len() - usize::from(ended)];
        each(Continuation {
            prompt,
            text: tokenizer.decode_behind(&ids, written),
            tokens: new.len(),
            ended,
        })?;
    }
    Ok(())
}

fn warn_beyond_positions(model: &Model, place: &str, tokens: usize) {
    if let Some(positions) = model.config().positions_max
        && tokens > positions
    {
        tracing::warn!(
            tokens,
            positions,
            "{place}: longer than the model was made for (max_position_embeddings); do not trust its end"
        );
    }
}

/// Every token that ends what `model` writes.
pub(crate) fn stop_ids(model: &Model, tokenizer: &Tokenizer) -> Vec<u32> {
    [tokenizer.eos_ids(), &model.config().eos_ids].concat()
}

/// Each prompt with where it comes from and its ids.
fn read(
    request: &GenerateRequest,
    tokenizer: &Tokenizer,
) -> Result<Vec<(String, Prompt, Vec<u32>)>, TrainError> {
    let given = match &request.prompts {
        Prompts::Text(text) => vec![("--prompt".to_owned(), Prompt::Text(text.clone()))],
        Prompts::File(file) => from_file(file)?,
    };
    let encoded = given.into_iter().map(|(place, prompt)| {
        let prompt = match prompt {
            Prompt::Text(text) if request.chat => Prompt::user(&text),
            other => other,
        };
        match prompt.encode(tokenizer) {
            Ok(ids) => Ok((place, prompt, ids)),
            Err(source) => Err(TrainError::Prompt {
                place,
                model: request.model.clone(),
                source,
            }),
        }
    });
    encoded.collect()
}

fn from_file(file: &Path) -> Result<Vec<(String, Prompt)>, TrainError> {
    let rows = data::prompts(file)?;
    let named = rows
        .into_iter()
        .map(|(place, prompt)| (place.to_string(), prompt));
    Ok(named.collect())
}
