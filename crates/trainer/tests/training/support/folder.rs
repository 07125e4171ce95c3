//! A model folder of a tiny random Llama with a word tokenizer, and preference rows over its words.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use model::{Layout, ModelConfig, random_weights, write_safetensors};
use serde_json::json;
use spec::Spec;
use tempfile::TempDir;

/// Words of the tokenizer; ids 0 and 1 are `<unk>` and `</s>`.
const WORDS: usize = 64;

/// A temporary folder with `model/`, `train.jsonl` and `eval.jsonl`.
pub struct Folder {
    dir: TempDir,
}

impl Folder {
    /// `pairs` training rows and 7 held-out ones.
    pub fn new(pairs: usize) -> Self {
        Self::with(pairs, false)
    }

    /// The same with a model whose head is its embedding.
    pub fn tied(pairs: usize) -> Self {
        Self::with(pairs, true)
    }

    /// The same with weights that bf16 has, whose operands are dithered once they have moved.
    pub fn even(pairs: usize) -> Self {
        let folder = Self::new(pairs);
        folder.change_weights(|_, values| {
            for value in values {
                *value = f32::from_bits(value.to_bits() & 0xffff_0000);
            }
        });
        folder
    }

    fn with(pairs: usize, tied: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = Self { dir };
        write_model(&folder.path("model"), tied, |_, _| {});
        fs::write(folder.path("train.jsonl"), rows(pairs, 1)).unwrap();
        fs::write(folder.path("eval.jsonl"), rows(7, 2)).unwrap();
        folder
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Rewrites the weights: `change` gets a tensor's name and its values.
    pub fn change_weights(&self, change: impl Fn(&str, &mut [f32])) {
        write_model(&self.path("model"), false, change);
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// A spec over this folder; `lines` are further TOML lines, dotted keys.
    pub fn spec(&self, lines: &str) -> Spec {
        let text = format!(
            "model.path = {:?}\nreference.store = {:?}\ndata.train = [{:?}]\ndata.eval = [{:?}]\n{lines}\n",
            self.path("model"),
            self.path("store"),
            self.path("train.jsonl"),
            self.path("eval.jsonl"),
        );
        let spec: Spec = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        spec.validate().unwrap();
        spec
    }
}

fn write_model(dir: &Path, tied: bool, change: impl Fn(&str, &mut [f32])) {
    fs::create_dir_all(dir).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": tied,
        "attention_bias": false, "mlp_bias": false, "eos_token_id": 1,
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let config = ModelConfig::load(dir).unwrap();
    let layout = Layout::new(&config);
    let mut weights = random_weights(&config, 7);
    for parameter in &layout.parameters {
        let values = &mut weights[parameter.bucket][parameter.range()];
        // Deviation 0.02 makes all tokens equally likely; a trained model's are not.
        if parameter.decay {
            for value in &mut *values {
                *value *= 6.0;
            }
        }
        change(&parameter.name, values);
    }
    let mut file = fs::File::create(dir.join("model.safetensors")).unwrap();
    write_safetensors(&weights, &layout, &mut file).unwrap();
    let special = |id: usize, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true })
    };
    let mut vocabulary = serde_json::Map::new();
    vocabulary.insert("<unk>".into(), json!(0));
    vocabulary.insert("</s>".into(), json!(1));
    for id in 2..WORDS {
        vocabulary.insert(format!("w{id}"), json!(id));
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [special(0, "<unk>"), special(1, "</s>")],
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let specials = json!({ "eos_token": "</s>", "unk_token": "<unk>" });
    fs::write(dir.join("tokenizer_config.json"), specials.to_string()).unwrap();
}

/// Preference rows of 1 to 17 words; few prompts and completions, so that entries repeat alone and in other company. The last
/// word of the vocabulary never occurs.
fn rows(count: usize, seed: u64) -> String {
    let mut state = seed;
    let mut below = move |bound: u64| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % bound
    };
    let mut words = |most: u64| {
        let count = 1 + below(most);
        (0..count).fold(String::new(), |mut text, _| {
            write!(text, " w{}", 2 + below(WORDS as u64 - 3)).unwrap();
            text
        })
    };
    let prompts: Vec<String> = (0..5).map(|_| words(9)).collect();
    let completions: Vec<String> = (0..9).map(|_| words(17)).collect();
    let mut text = String::new();
    for row in 0..count {
        let fresh = words(12);
        let row = json!({
            "prompt": prompts[row % 5].trim(), "chosen": completions[row % 9],
            "rejected": if row % 3 == 0 { completions[(row + 4) % 9].clone() } else { fresh },
        });
        writeln!(text, "{row}").unwrap();
    }
    text
}

/// A folder of ../shared/fixtures/hf, if it is there.
pub fn fixture(name: &str) -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/fixtures/hf")
        .join(name);
    if dir.is_dir() {
        return Some(dir);
    }
    println!("skipped: ../shared is absent");
    None
}

/// |found − expected| / |expected|; exact for 0.
pub fn relative_error(found: f64, expected: f64) -> f64 {
    if found == expected {
        return 0.0;
    }
    (found - expected).abs() / expected.abs()
}
