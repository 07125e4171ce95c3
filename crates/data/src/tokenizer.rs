//! A model folder's tokenizer and chat template: text in, ids out, with BOS exactly as often as the model expects it.
//!
//! Read are `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` or `chat_template.json`, and
//! the `eos_token_id` of `generation_config.json` or `config.json`. Only the first must exist.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::chat::{ChatTemplate, TemplateError};
use crate::folder::{eos_ids, invalid, object, special_tokens, template};

/// Why a model folder gave no tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file cannot be read.
    #[error("{}: {source}; a model folder needs tokenizer.json, as save_pretrained of a fast tokenizer writes it", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {reason}; save the tokenizer anew with save_pretrained", file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The configured chat template cannot be read.
    #[error("{}: {source}; check the path in data.chat_template or behind --chat-template", file.display())]
    ReadTemplate {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The chat template does not compile.
    #[error("{}: chat template: {source}; give another with data.chat_template (--chat-template where there is no configuration)", file.display())]
    Template {
        /// The file that holds it.
        file: PathBuf,
        /// What the template engine said.
        source: TemplateError,
    },
    /// A text that the tokenizer refuses.
    #[error("tokenize {text:?}: {reason}; check that tokenizer.json belongs to this model")]
    Encode {
        /// Start of the text.
        text: String,
        /// What the tokenizer said.
        reason: String,
    },
}

/// A tokenizer with the special tokens and the chat template of its model.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
    /// What the tokenizer puts before plain text, mostly BOS.
    prefix: Vec<u32>,
    eos: Option<u32>,
    eos_ids: Vec<u32>,
    digest: [u8; 32],
}

impl Tokenizer {
    /// Reads `model_dir`; `chat_template` is a Jinja file used instead of the model's own template.
    pub fn load(model_dir: &Path, chat_template: Option<&Path>) -> Result<Self, TokenizerError> {
        let file = model_dir.join("tokenizer.json");
        let bytes = fs::read(&file).map_err(|source| TokenizerError::Read {
            file: file.clone(),
            source,
        })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| invalid(&file, &error.to_string()))?;
        // Some folders carry the padding and truncation of the run that saved them; here both are decided elsewhere.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| invalid(&file, &error.to_string()))?;

        let config_file = model_dir.join("tokenizer_config.json");
        let config = object(&config_file)?;
        let specials = special_tokens(
            &config,
            &object(&model_dir.join("special_tokens_map.json"))?,
        );
        let bos = token_id(&inner, &specials, "bos_token", &config_file)?;
        let named_eos = token_id(&inner, &specials, "eos_token", &config_file)?;
        let eos_ids = eos_ids(model_dir, named_eos)?;
        let eos = named_eos.or_else(|| eos_ids.first().copied());
        let prefix = prefix(&inner, &config, bos, &file)?;
        let template = template(model_dir, &config, chat_template)?;

        let mut hasher = Hasher::new();
        hasher.bytes(&bytes);
        hasher.ids(&prefix);
        hasher.ids(eos.as_slice());
        for (name, token) in &specials {
            hasher.bytes(name.as_bytes());
            hasher.bytes(token.as_bytes());
        }
        let template = match template {
            None => None,
            Some((file, source)) => {
                hasher.bytes(source.as_bytes());
                Some(
                    ChatTemplate::new(&source, &specials)
                        .map_err(|source| TokenizerError::Template { file, source })?,
                )
            }
        };
        Ok(Self {
            inner,
            template,
            prefix,
            eos,
            eos_ids,
            digest: hasher.finish(),
        })
    }

    /// BLAKE3 over all that decides ids: `tokenizer.json`, BOS and EOS, the special tokens, the chat template.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The ids of a plain prompt: BOS if the tokenizer adds one and `text` does not start with it, no EOS.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let ids = self.encode_bare(text)?;
        if ids.starts_with(&self.prefix) {
            return Ok(ids);
        }
        Ok([self.prefix.as_slice(), &ids].concat())
    }

    /// The ids of `text` alone, which is right for a rendered chat template: it writes its own BOS where the model wants one.
    pub(crate) fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, false);
        let encoding = encoding.map_err(|error| TokenizerError::Encode {
            text: text.chars().take(60).collect(),
            reason: error.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens included, so that it shows what the model sees. Unknown ids are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        // Only a broken decoder section fails; text for people is not worth stopping a run.
        self.inner
            .decode(ids, false)
            .unwrap_or_else(|_| format!("{ids:?}"))
    }

    /// The text of `ids` as it stands behind that of `prompt`: many decoders strip the space of a first token.
    pub fn decode_behind(&self, prompt: &[u32], ids: &[u32]) -> String {
        let whole = self.decode(&[prompt, ids].concat());
        match whole.strip_prefix(&self.decode(prompt)) {
            Some(text) => text.to_owned(),
            None => self.decode(ids),
        }
    }

    /// The token that ends a plain completion.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Every token that ends a generation; empty if the model names none.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The chat template, if the model or the configuration has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Number of ids, added tokens included.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

fn token_id(
    inner: &tokenizers::Tokenizer,
    specials: &[(String, String)],
    name: &str,
    file: &Path,
) -> Result<Option<u32>, TokenizerError> {
    let Some((_, token)) = specials.iter().find(|(known, _)| known == name) else {
        return Ok(None);
    };
    match inner.token_to_id(token) {
        Some(id) => Ok(Some(id)),
        None => Err(invalid(
            file,
            &format!("{name} is {token:?}, which tokenizer.json does not have"),
        )),
    }
}

/// What stands before plain text: asked of the post-processor by a probe, overruled by an explicit `add_bos_token`, as in transformers.
fn prefix(
    inner: &tokenizers::Tokenizer,
    config: &Map<String, Value>,
    bos: Option<u32>,
    file: &Path,
) -> Result<Vec<u32>, TokenizerError> {
    match config.get("add_bos_token").and_then(Value::as_bool) {
        Some(true) => return Ok(bos.into_iter().collect()),
        Some(false) => return Ok(Vec::new()),
        None => {}
    }
    let probe = |specials| {
        let encoding = inner.encode_fast("a", specials);
        let encoding = encoding.map_err(|error| invalid(file, &error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    };
    let (bare, whole) = (probe(false)?, probe(true)?);
    // Behind the text may stand an EOS, which is never wanted after a prompt.
    let start = whole.windows(bare.len().max(1)).position(|ids| ids == bare);
    Ok(whole[..start.unwrap_or(0)].to_vec())
}

/// BLAKE3 over length-prefixed parts, so that no two lists of parts run together to the same bytes.
pub(crate) struct Hasher(blake3::Hasher);

impl Hasher {
    pub(crate) fn new() -> Self {
        Self(blake3::Hasher::new())
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    pub(crate) fn ids(&mut self, ids: &[u32]) {
        self.0.update(&(ids.len() as u64).to_le_bytes());
        for id in ids {
            self.0.update(&id.to_le_bytes());
        }
    }

    pub(crate) fn finish(&self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}
