//! Folders and tokenizers that tests are made of.

use std::fs;
use std::path::{Path, PathBuf};

use data::{DataConfig, DataError, Dataset, Needs, Sides, Tokenizer};
use serde_json::{Value, json};

/// A template with a turn per line that starts with BOS and raises on role "narrator".
pub const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'narrator' %}\
    {{ raise_exception('no narrators') }}{% endif %}{{ m.role[:1] + ':' + m.content + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}a:{% endif %}";

/// What most objectives need.
pub const BOTH: Needs = needs(Sides::Both);
/// What `kto` needs.
pub const EITHER: Needs = needs(Sides::Either);
/// What `sft` needs.
pub const CHOSEN: Needs = needs(Sides::Chosen);

const fn needs(sides: Sides) -> Needs {
    Needs {
        sides,
        scores: false,
    }
}

/// `../shared`, unless it is absent, which is said aloud.
pub fn shared() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    if !path.is_dir() {
        println!("skipped: ../shared is absent");
        return None;
    }
    Some(path)
}

/// JSON of a file.
pub fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// A configuration of defaults with `max_length`.
pub fn config(max_length: usize) -> DataConfig {
    serde_json::from_value(json!({ "train": ["x.jsonl"], "max_length": max_length })).unwrap()
}

/// A folder that goes away with the test.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A folder with a tokenizer of characters: `<s>` 0, `</s>` 1, then ASCII; `ab` is one token. `<s>` before every text.
    pub fn with_tokenizer() -> Self {
        let folder = Self::new();
        folder.write("tokenizer.json", tokenizer_json().to_string());
        let config = json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" } });
        folder.write("tokenizer_config.json", config.to_string());
        folder
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    pub fn tokenizer(&self) -> Tokenizer {
        Tokenizer::load(self.path(), None).unwrap()
    }

    /// Loads one file of `content` as preference pairs with this folder's tokenizer.
    pub fn load(
        &self,
        content: impl AsRef<[u8]>,
        config: &DataConfig,
    ) -> Result<Dataset, DataError> {
        self.load_for(BOTH, content, config)
    }

    /// Loads one file of `content` for an objective.
    pub fn load_for(
        &self,
        needs: Needs,
        content: impl AsRef<[u8]>,
        config: &DataConfig,
    ) -> Result<Dataset, DataError> {
        let file = self.write("pairs.jsonl", content);
        data::load(&[file], config, &self.tokenizer(), needs)
    }

    /// The message of an error, the folder's path taken out.
    pub fn message(&self, error: &DataError) -> String {
        error
            .to_string()
            .replace(&format!("{}/", self.path().display()), "")
    }
}

fn tokenizer_json() -> Value {
    let mut vocabulary = serde_json::Map::new();
    let characters = (' '..='~').chain(['\n']).map(String::from);
    let tokens = ["<s>", "</s>"].map(String::from).into_iter();
    for (id, token) in tokens.chain(characters).chain(["ab".into()]).enumerate() {
        vocabulary.insert(token, id.into());
    }
    let special = |id: u32, content: &str| json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    let bos = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
    let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0 },
        "padding": null,
        "added_tokens": [special(0, "<s>"), special(1, "</s>")],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } },
        },
        "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]] },
    })
}
