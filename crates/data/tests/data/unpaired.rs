//! Rows of one completion with a label, and what other rows give an objective that takes them.

use data::{DataConfig, Dataset, DropReason, Format, Needs};
use serde_json::{Value, json};

use crate::support::{BOTH, CHOSEN, EITHER, Folder, TEMPLATE, config};

fn folder() -> Folder {
    let folder = Folder::with_tokenizer();
    folder.write("chat_template.jinja", TEMPLATE);
    folder
}

fn load(needs: Needs, rows: &[Value], config: &DataConfig) -> Result<Dataset, String> {
    let folder = folder();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    let loaded = folder.load_for(needs, lines.join("\n"), config);
    loaded.map_err(|error| folder.message(&error))
}

/// Prompt, chosen and rejected of every pair.
fn texts(dataset: &Dataset) -> Vec<[String; 3]> {
    let tokenizer = folder().tokenizer();
    let texts = |pair: &data::Pair| {
        [&pair.prompt, &pair.chosen, &pair.rejected].map(|ids| tokenizer.decode(ids))
    };
    dataset.pairs.iter().map(texts).collect()
}

fn check(rows: &[Value], config: &DataConfig, expected: &[[&str; 3]]) {
    let dataset = load(EITHER, rows, config).unwrap();
    assert_eq!(texts(&dataset), expected, "{rows:?}");
}

fn turn(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

#[test]
fn a_label_tells_which_side_a_completion_is() {
    let row = |label: Value| json!({ "prompt": "q", "completion": "y", "label": label });
    let (desirable, undesirable) = (["<s>q", "y</s>", ""], ["<s>q", "", "y</s>"]);
    for label in [json!(true), json!(1), json!(1.0)] {
        check(&[row(label)], &config(64), &[desirable]);
    }
    for label in [json!(false), json!(0), json!(0.0)] {
        check(&[row(label)], &config(64), &[undesirable]);
    }
}

#[test]
fn unpaired_conversations_have_their_prompt_in_a_column_or_before_the_last_answer() {
    let (user, answer) = (turn("user", "q"), turn("assistant", "y"));
    let expected = [["<s>u:q\na:", "", "y\n"]];
    for row in [
        json!({ "prompt": [user], "completion": [answer], "label": false }),
        json!({ "completion": [user, answer], "label": false }),
        json!({ "messages": [user, answer], "label": false }),
        json!({ "conversations": [{ "from": "human", "value": "q" }, { "from": "gpt", "value": "y" }], "label": false }),
    ] {
        check(&[row], &config(64), &expected);
    }
}

#[test]
fn columns_may_have_other_names() {
    let mut config = config(64);
    config.columns.completion = "answer.text".into();
    config.columns.label = "votes.good".into();
    let row = json!({ "prompt": "q", "answer": { "text": "y" }, "votes": { "good": true } });
    check(&[row], &config, &[["<s>q", "y</s>", ""]]);
}

#[test]
fn either_takes_pairs_with_both_sides() {
    let row = json!({ "prompt": "q", "chosen": "y", "rejected": "n" });
    let dataset = load(EITHER, std::slice::from_ref(&row), &config(64)).unwrap();
    assert_eq!(texts(&dataset), [["<s>q", "y</s>", "n</s>"]]);
    let paired = load(BOTH, &[row], &config(64)).unwrap();
    assert_eq!(dataset.digest, paired.digest);
    let report = &dataset.report;
    assert_eq!(report.format, Format::Preference);
    assert_eq!((report.desirable, report.undesirable), (0, 0));
}

#[test]
fn the_report_counts_desirable_and_undesirable_completions() {
    let row = |label: bool| json!({ "prompt": "q", "completion": "y", "label": label });
    let rows = [row(false), row(true), row(true)];
    let report = load(EITHER, &rows, &config(64)).unwrap().report;
    assert_eq!(report.format, Format::Unpaired);
    assert_eq!((report.desirable, report.undesirable), (2, 1));
    assert_eq!((report.identical, report.repeated), (0, 1));
    let text = report.to_string();
    for words in [
        "\nlayout: unpaired, text with its prompt in a column\n2 completions desirable, 1 undesirable\n",
        "  prompt    <s>q\n  rejected ⟦y</s>⟧\n",
    ] {
        assert!(text.contains(words), "{text}");
    }
    assert!(!text.contains("chosen   ⟦"), "{text}");
}

#[test]
fn sft_takes_desirable_rows_and_reports_the_others() {
    let row = |label: bool| json!({ "prompt": "q", "completion": "y", "label": label });
    let dataset = load(CHOSEN, &[row(false), row(true)], &config(64)).unwrap();
    assert_eq!(texts(&dataset), [["<s>q", "y</s>", ""]]);
    let report = &dataset.report;
    assert_eq!((report.desirable, report.undesirable), (1, 0));
    assert_eq!(report.dropped.len(), 1);
    assert_eq!(report.dropped[0].place.line, 1);
    assert_eq!(report.dropped[0].reason, DropReason::Undesirable);
    let text = report.to_string();
    assert!(
        text.contains(":1: its label says undesirable, and"),
        "{text}"
    );
    let none = load(CHOSEN, &[row(false)], &config(64)).unwrap_err();
    assert!(
        none.ends_with("set objective.kind = \"kto\", which trains on both"),
        "{none}"
    );
}

#[test]
fn sft_reads_labels_of_other_kinds_only_if_it_is_told_to() {
    let row = json!({ "prompt": "q", "completion": "y", "label": "maths" });
    let mut config = config(64);
    let dataset = load(CHOSEN, std::slice::from_ref(&row), &config).unwrap();
    assert_eq!(dataset.report.format, Format::Completion);
    config.format = Format::Unpaired;
    let message = load(CHOSEN, &[row], &config).unwrap_err();
    assert!(
        message.starts_with("pairs.jsonl:1: `label` is a string; write it as true or false"),
        "{message}"
    );
}

#[test]
fn a_row_that_is_not_unpaired_says_what_it_lacks() {
    let good = json!({ "prompt": "q", "completion": "y", "label": true });
    for (row, words) in [
        (
            json!({ "prompt": "q", "completion": "y" }),
            "the row has no `label`, it has prompt, completion; add it, name",
        ),
        (
            json!({ "prompt": "q", "completion": "y", "label": null }),
            "the row has no `label`",
        ),
        (
            json!({ "prompt": "q", "completion": "y", "label": "false" }),
            "`label` is a string; write it as true or false, or as 1 or 0",
        ),
        (
            json!({ "prompt": "q", "completion": "y", "label": -1 }),
            "`label` is -1; write",
        ),
        (
            json!({ "prompt": "q", "completion": "y", "label": 0.5 }),
            "`label` is 0.5; write",
        ),
        (
            json!({ "prompt": "q", "label": true }),
            "the row has no `completion`",
        ),
        (
            json!({ "completion": "y", "label": true }),
            "the row has no `prompt`",
        ),
    ] {
        let message = load(EITHER, &[good.clone(), row], &config(64)).unwrap_err();
        assert!(
            message.starts_with(&format!("pairs.jsonl:2: {words}")),
            "{message}"
        );
    }
    let first = load(
        EITHER,
        &[json!({ "prompt": "q", "completion": "y" })],
        &config(64),
    );
    assert!(first.unwrap_err().contains("the row has no `label`"));
}

#[test]
fn objectives_refuse_formats_that_they_cannot_use() {
    let row = json!({ "prompt": "q", "completion": "y", "label": true });
    for (needs, format, cure) in [
        (
            BOTH,
            Format::Auto,
            "set objective.kind = \"kto\", or give pairs of chosen and rejected",
        ),
        (
            BOTH,
            Format::Unpaired,
            "set objective.kind = \"kto\", or give pairs of chosen and rejected",
        ),
        (
            EITHER,
            Format::Completion,
            "set data.format = \"unpaired\" or \"preference\", or objective.kind = \"sft\"",
        ),
    ] {
        let mut config = config(64);
        config.format = format;
        let message = load(needs, std::slice::from_ref(&row), &config).unwrap_err();
        assert!(message.starts_with("pairs.jsonl:1: "), "{message}");
        assert!(message.ends_with(cure), "{message}");
    }
}

#[test]
fn long_unpaired_rows_are_cut_and_dropped_like_others() {
    let row = |prompt: &str| json!({ "prompt": prompt, "completion": "12345", "label": false });
    let dataset = load(EITHER, &[row("1234"), row("12345678")], &config(8)).unwrap();
    assert_eq!(texts(&dataset), [["<s>1234", "", "123"]]);
    assert_eq!(dataset.report.truncated, 1);
    let expected = DropReason::EmptyCompletion {
        prompt_tokens: 9,
        max_length: 8,
    };
    assert_eq!(dataset.report.dropped[0].reason, expected);
}
