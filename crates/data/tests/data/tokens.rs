//! Token ids are those of transformers, BOS and EOS included, and survive as they are or not at all.

use std::path::Path;

use data::{Dataset, Tokenizer, TokenizerError, load};
use serde_json::{Value, json};

use crate::support::{BOTH, Folder, TEMPLATE, config, read_json, shared};

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn load_with(model: &Path, file: &Path, max_length: usize) -> Dataset {
    let tokenizer = Tokenizer::load(model, None).unwrap();
    load(&[file.into()], &config(max_length), &tokenizer, BOTH).unwrap()
}

#[test]
fn plain_pairs_of_the_fixtures_have_the_golden_token_ids() {
    let Some(shared) = shared() else { return };
    // Without qwen2: transformers made its golden ids with a pre-tokenizer of its own class, not with this tokenizer.json.
    for name in [
        "llama",
        "llama3-tied",
        "mistral-window",
        "qwen3",
        "gemma3",
        "gpt-neox",
        "phi3",
    ] {
        let folder = shared.join("fixtures/hf").join(name);
        let dataset = load_with(&folder, &folder.join("pairs.jsonl"), 1024);
        let golden = read_json(&folder.join("golden.json"));
        let golden = golden["token_ids"].as_array().unwrap();
        assert_eq!(dataset.pairs.len(), golden.len(), "{name}");
        for (pair, golden) in dataset.pairs.iter().zip(golden) {
            assert_eq!(pair.prompt, ids(&golden["prompt"]), "{name} {}", pair.place);
            assert_eq!(pair.chosen, ids(&golden["chosen"]), "{name} {}", pair.place);
            assert_eq!(
                pair.rejected,
                ids(&golden["rejected"]),
                "{name} {}",
                pair.place
            );
        }
    }
}

#[test]
fn chat_pairs_have_the_token_ids_of_smollm2_in_transformers() {
    let Some(shared) = shared() else { return };
    let golden = read_json(&shared.join("fixtures/chat.json"));
    let cases = golden["tokenized_smollm2"].as_array().unwrap();
    let rows: Vec<String> = cases
        .iter()
        .map(|case| {
            let turn = |name: &str| json!([{ "role": "assistant", "content": case[name] }]);
            let prompt = &golden["messages"][case["messages"].as_str().unwrap()];
            json!({ "prompt": prompt, "chosen": turn("chosen"), "rejected": turn("rejected") })
                .to_string()
        })
        .collect();
    let folder = Folder::new();
    let file = folder.write("chat.jsonl", rows.join("\n"));
    let dataset = load_with(&shared.join("models/smollm2-135m-instruct"), &file, 1024);
    assert_eq!(dataset.pairs.len(), 4);
    for (pair, case) in dataset.pairs.iter().zip(cases) {
        assert_eq!(pair.prompt, ids(&case["prompt_ids"]), "{}", pair.place);
        assert_eq!(pair.chosen, ids(&case["chosen_ids"]), "{}", pair.place);
        assert_eq!(pair.rejected, ids(&case["rejected_ids"]), "{}", pair.place);
    }
}

#[test]
fn real_chat_data_loads_in_both_layouts_to_the_same_ids() {
    let Some(shared) = shared() else { return };
    let model = shared.join("models/smollm2-135m-instruct");
    let ultrafeedback = load_with(&model, &shared.join("data/chat-preferences.jsonl"), 1024);
    assert_eq!(ultrafeedback.report.rows, 300);
    let conversational = load_with(
        &model,
        &shared.join("data/chat-preferences-1024.jsonl"),
        1024,
    );
    assert!(conversational.report.dropped.is_empty());
    assert_eq!(conversational.report.truncated, 0);
    for pair in &conversational.pairs {
        let twin = ultrafeedback.pairs.iter().find(|other| {
            (&other.prompt, &other.chosen, &other.rejected)
                == (&pair.prompt, &pair.chosen, &pair.rejected)
        });
        assert!(twin.is_some(), "{} has no twin", pair.place);
    }
    let instructions = load_with(
        &model,
        &shared.join("data/instruction-preferences.jsonl"),
        1024,
    );
    assert_eq!(
        (instructions.report.pairs, instructions.report.identical),
        (1100, 6)
    );
}

#[test]
fn bos_is_never_doubled_and_eos_ends_plain_text_alone() {
    let folder = Folder::with_tokenizer();
    folder.write("chat_template.jinja", TEMPLATE);
    let rows = [
        json!({ "prompt": "x", "chosen": "yes", "rejected": "no</s>" }),
        json!({ "prompt": "<s>x", "chosen": "yes", "rejected": "" }),
        json!({ "prompt": [{ "role": "user", "content": "x" }], "chosen": [{ "role": "assistant", "content": "yes" }],
                "rejected": [{ "role": "assistant", "content": "no" }] }),
    ];
    let content = rows.map(|row| row.to_string()).join("\n");
    let pairs = folder.load(content, &config(64)).unwrap().pairs;
    let tokenizer = folder.tokenizer();
    let texts: Vec<[String; 3]> = pairs
        .iter()
        .map(|pair| [&pair.prompt, &pair.chosen, &pair.rejected].map(|ids| tokenizer.decode(ids)))
        .collect();
    assert_eq!(texts[0], ["<s>x", "yes</s>", "no</s>"]);
    assert_eq!(texts[1], ["<s>x", "yes</s>", "</s>"]);
    assert_eq!(texts[2], ["<s>u:x\na:", "yes\n", "no\n"]);
}

#[test]
fn add_bos_token_overrules_the_post_processor() {
    let folder = Folder::with_tokenizer();
    let encode = || folder.tokenizer().encode("x").unwrap().len();
    assert_eq!(encode(), 2);
    let config = json!({ "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": false });
    folder.write("tokenizer_config.json", config.to_string());
    assert_eq!(encode(), 1);
}

#[test]
fn a_token_across_the_border_is_scored_whole_in_both_completions() {
    // "xa" + "b" tokenizes to x, ab: the prompt keeps x, and `a` is scored with either completion.
    let folder = Folder::with_tokenizer();
    let row = json!({ "prompt": "xa", "chosen": "b", "rejected": "c" }).to_string();
    let dataset = folder.load(row, &config(64)).unwrap();
    let tokenizer = folder.tokenizer();
    let pair = &dataset.pairs[0];
    assert_eq!(tokenizer.decode(&pair.prompt), "<s>x");
    assert_eq!(
        (tokenizer.decode(&pair.chosen), pair.chosen.len()),
        ("ab</s>".into(), 2)
    );
    assert_eq!(tokenizer.decode(&pair.rejected), "ac</s>");
    assert_eq!(dataset.report.border_moved, 1);
}

#[test]
fn truncation_keeps_the_start_of_each_completion_on_its_own() {
    let folder = Folder::with_tokenizer();
    let row = json!({ "prompt": "1234", "chosen": "long one", "rejected": "no" }).to_string();
    let dataset = folder.load(row, &config(8)).unwrap();
    let tokenizer = folder.tokenizer();
    let pair = &dataset.pairs[0];
    assert_eq!(tokenizer.decode(&pair.prompt), "<s>1234");
    assert_eq!(tokenizer.decode(&pair.chosen), "lon");
    assert_eq!(tokenizer.decode(&pair.rejected), "no</s>");
    assert_eq!((pair.packed_tokens(), pair.tokens()), (11, 16));
    assert_eq!(dataset.report.truncated, 1);
}

#[test]
fn keep_end_takes_the_start_of_the_shared_prompt_and_no_completion() {
    let folder = Folder::with_tokenizer();
    let row = |chosen: &str, rejected: &str| {
        json!({ "prompt": "1234", "chosen": chosen, "rejected": rejected }).to_string()
    };
    let mut config = config(8);
    config.truncation = data::Truncation::KeepEnd;
    let short = "12345678";
    let rows = [
        row("long", "no"),
        row("no", "long e"),
        row("y", "n"),
        row(&short[..6], "n"),
        row(&short[..7], "n"),
        row("n", short),
    ];
    let dataset = folder.load(rows.join("\n"), &config).unwrap();
    let tokenizer = folder.tokenizer();
    let parts = |pair: &data::Pair| {
        [&pair.prompt, &pair.chosen, &pair.rejected].map(|ids| tokenizer.decode(ids))
    };
    let found: Vec<[String; 3]> = dataset.pairs.iter().map(parts).collect();
    let expected = [
        ["234", "long</s>", "no</s>"],
        ["4", "no</s>", "long e</s>"],
        ["<s>1234", "y</s>", "n</s>"],
        ["4", "123456</s>", "n</s>"],
    ];
    assert_eq!(found, expected);
    let report = &dataset.report;
    assert_eq!((report.prompts_cut, report.truncated), (3, 0));
    let dropped: Vec<_> = report.dropped.iter().map(|it| it.place.line).collect();
    assert_eq!(dropped, [5, 6]);
    let text = report.to_string();
    for words in [
        "3 pairs truncated: the prompt lost its start to data.max_length",
        ":5: no prompt left: a completion alone has 8 tokens and data.max_length is 8",
        "3 of 4 (75.0 %) pairs lost the start of their prompt",
    ] {
        assert!(text.contains(words), "{text}");
    }
    let none = folder
        .load(row(short, "n"), &config)
        .unwrap_err()
        .to_string();
    assert!(
        none.ends_with("or give rows with shorter completions"),
        "{none}"
    );
}

#[test]
fn the_digest_follows_the_ids_and_nothing_else() {
    let folder = Folder::with_tokenizer();
    let digest = |content: &str| folder.load(content, &config(64)).unwrap().digest;
    let base = digest(r#"{"prompt": "x", "chosen": "yes", "rejected": "no"}"#);
    let spaced =
        "\n\n{\"chosen\": \"yes\", \"rejected\": \"no\", \"prompt\": \"x\", \"score\": 1}\n";
    assert_eq!(digest(spaced), base);
    for other in [
        r#"{"prompt": "xy", "chosen": "es", "rejected": "no"}"#,
        r#"{"prompt": "x", "chosen": "no", "rejected": "yes"}"#,
        r#"{"prompt": "x", "chosen": "yes", "rejected": "now"}"#,
    ] {
        assert_ne!(digest(other), base, "{other}");
    }
}

#[test]
fn the_tokenizers_digest_follows_what_decides_ids() {
    let folder = Folder::with_tokenizer();
    let base = folder.tokenizer().digest();
    assert_eq!(folder.tokenizer().digest(), base);
    folder.write("chat_template.jinja", TEMPLATE);
    let templated = folder.tokenizer().digest();
    assert_ne!(templated, base);
    let other = folder.write("other.jinja", format!("{TEMPLATE} "));
    let overruled = Tokenizer::load(folder.path(), Some(&other)).unwrap();
    assert_ne!(overruled.digest(), templated);
}

#[test]
fn generation_stops_at_every_token_the_model_names() {
    let folder = Folder::with_tokenizer();
    assert_eq!(folder.tokenizer().eos_ids(), [1]);
    folder.write("config.json", r#"{"eos_token_id": 9}"#);
    assert_eq!(folder.tokenizer().eos_ids(), [1, 9]);
    folder.write("generation_config.json", r#"{"eos_token_id": [5, 1]}"#);
    assert_eq!(folder.tokenizer().eos_ids(), [1, 5]);
    folder.write("tokenizer_config.json", "{}");
    assert_eq!(folder.tokenizer().eos(), Some(5));
}

#[test]
fn a_template_is_found_wherever_transformers_saves_one() {
    let folder = Folder::with_tokenizer();
    let renders = |expected: &str| {
        let tokenizer = folder.tokenizer();
        let text = tokenizer
            .chat_template()
            .unwrap()
            .render(&[], false)
            .unwrap();
        assert_eq!(text, expected);
    };
    assert!(folder.tokenizer().chat_template().is_none());
    let named = json!({ "chat_template": [{ "name": "tool_use", "template": "tools" }, { "name": "default", "template": "list" }] });
    folder.write("tokenizer_config.json", named.to_string());
    renders("list");
    folder.write("chat_template.json", r#"{"chat_template": "legacy"}"#);
    renders("legacy");
    folder.write("chat_template.jinja", "file");
    renders("file");
}

#[test]
fn a_folder_without_a_usable_tokenizer_is_refused() {
    let folder = Folder::with_tokenizer();
    let refused = |expected: &str| {
        let error: TokenizerError = Tokenizer::load(folder.path(), None).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    folder.write("chat_template.jinja", "a\n{% if %}");
    refused("chat_template.jinja: chat template: line 2");
    folder.write("tokenizer_config.json", r#"{"eos_token": "<eos>"}"#);
    refused("eos_token is \"<eos>\", which tokenizer.json does not have");
    folder.write("tokenizer_config.json", "{");
    refused("tokenizer_config.json: EOF while parsing");
    folder.write("tokenizer.json", "{}");
    refused("tokenizer.json: ");
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    refused("a model folder needs tokenizer.json");
}
