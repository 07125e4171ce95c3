//! The quickstart's files: what the generator makes, readable, and fit for each other.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, fs, path::PathBuf};

use model::ModelConfig;
use serde_json::Value;
use tests::quickstart;
use tokenizers::Tokenizer;

fn folder() -> PathBuf {
    tests::workspace_root().join("configs/quickstart")
}

fn rows(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(folder().join(name)).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(folder().join("init/tokenizer.json")).unwrap()
}

#[test]
fn the_committed_files_are_what_the_generator_makes() {
    let models = quickstart::model_files()
        .into_iter()
        .map(|(name, text)| (format!("init/{name}"), text));
    let data = quickstart::data_files()
        .into_iter()
        .map(|(name, text)| (name.to_owned(), text));
    for (name, text) in data.chain(models) {
        let committed = fs::read_to_string(folder().join(&name)).unwrap();
        assert!(
            committed == text,
            "{name} differs; run cargo run --release -p tests --example make_quickstart"
        );
    }
}

#[test]
fn every_text_is_known_to_the_tokenizer_and_comes_back_from_its_ids() {
    let tokenizer = tokenizer();
    let unknown = tokenizer.token_to_id("<unk>").unwrap();
    let mut longest = 0;
    for name in ["reference.jsonl", "train.jsonl", "eval.jsonl"] {
        for row in rows(name) {
            let prompt = row["prompt"].as_str().unwrap();
            for (column, completion) in row.as_object().unwrap() {
                if column == "prompt" {
                    continue;
                }
                let text = format!("{prompt}{}", completion.as_str().unwrap());
                let whole = tokenizer.encode(text.as_str(), true).unwrap();
                assert!(!whole.get_ids().contains(&unknown), "{text}");
                assert_eq!(tokenizer.decode(whole.get_ids(), true).unwrap(), text);
                let alone = tokenizer.encode(prompt, true).unwrap();
                assert!(whole.get_ids().starts_with(alone.get_ids()), "{text}");
                longest = longest.max(whole.len() + 1);
            }
        }
    }
    let config = ModelConfig::load(&folder().join("init")).unwrap();
    assert_eq!(config.vocabulary, tokenizer.get_vocab_size(true));
    assert!(
        longest <= config.positions_max.unwrap(),
        "{longest} tokens with EOS"
    );
    println!("longest sequence: {longest} tokens");
}

#[test]
fn training_and_held_out_prompts_are_apart() {
    let mut seen = BTreeSet::new();
    let counts = [
        ("reference.jsonl", quickstart::REFERENCE_ROWS),
        ("train.jsonl", quickstart::TRAIN_PAIRS),
        ("eval.jsonl", quickstart::EVAL_PAIRS),
    ];
    for (name, count) in counts {
        let rows = rows(name);
        assert_eq!(rows.len(), count, "{name}");
        for row in rows {
            let prompt = row["prompt"].as_str().unwrap().to_owned();
            assert!(
                seen.insert(prompt.clone()),
                "{prompt} stands twice, last in {name}"
            );
        }
    }
}

#[test]
fn chosen_letters_are_formal_as_often_as_stated() {
    // The two letters of a row differ only where one is formal and the other informal: 0.9² + 0.1² of the places.
    let tokenizer = tokenizer();
    let mut differing = 0;
    let rows = rows("train.jsonl");
    for row in &rows {
        let ids = |column: &str| {
            let text = row[column].as_str().unwrap();
            tokenizer.encode(text, false).unwrap().get_ids().to_vec()
        };
        let (chosen, rejected) = (ids("chosen"), ids("rejected"));
        assert_eq!(chosen.len(), rejected.len());
        differing += chosen
            .iter()
            .zip(&rejected)
            .filter(|(one, other)| one != other)
            .count();
    }
    let places = (rows.len() * quickstart::STYLE_WORDS) as f64;
    let share = differing as f64 / places;
    // Five standard deviations of a share of 8192 places.
    assert!(
        (share - 0.82).abs() < 5.0 * (0.82 * 0.18 / places).sqrt(),
        "{share}"
    );
}
