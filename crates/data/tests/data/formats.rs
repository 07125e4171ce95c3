//! Every row layout gives the same three parts.

use data::{DataConfig, Layout, Needs, load};
use serde_json::{Value, json};

use crate::support::{BOTH, CHOSEN, Folder, TEMPLATE, config};

/// Loads `rows` and compares the decoded parts of the first.
fn check(rows: &[Value], config: &DataConfig, needs: Needs, expected: [&str; 3]) {
    let folder = Folder::with_tokenizer();
    folder.write("chat_template.jinja", TEMPLATE);
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    let file = folder.write("pairs.jsonl", lines.join("\n"));
    let tokenizer = folder.tokenizer();
    let dataset =
        load(&[file], config, &tokenizer, needs).unwrap_or_else(|error| panic!("{error}"));
    let pair = &dataset.pairs[0];
    let parts = [&pair.prompt, &pair.chosen, &pair.rejected].map(|ids| tokenizer.decode(ids));
    assert_eq!(parts, expected, "{rows:?}");
}

fn pairs(row: &Value, expected: [&str; 3]) {
    check(std::slice::from_ref(row), &config(128), BOTH, expected);
}

fn turn(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

#[test]
fn a_text_prompt_is_taken_from_its_column() {
    pairs(
        &json!({ "prompt": "Q: ", "chosen": "yes", "rejected": "yeah" }),
        ["<s>Q: ", "yes</s>", "yeah</s>"],
    );
}

#[test]
fn an_implicit_text_prompt_is_the_longest_common_prefix_less_a_space() {
    pairs(
        &json!({ "chosen": "Q: yes", "rejected": "Q: no" }),
        ["<s>Q:", " yes</s>", " no</s>"],
    );
    pairs(
        &json!({ "chosen": "Q: é1", "rejected": "Q: è1" }),
        ["<s>Q:", " 1</s>", " 1</s>"],
    );
    pairs(
        &json!({ "prompt": null, "chosen": "same", "rejected": "same" }),
        ["<s>same", "</s>", "</s>"],
    );
}

#[test]
fn an_hh_transcript_is_split_at_its_last_answer() {
    pairs(
        &json!({ "chosen": "\n\nHuman: q\n\nAssistant: I am", "rejected": "\n\nHuman: q\n\nAssistant: I was" }),
        ["<s>\n\nHuman: q\n\nAssistant:", " I am</s>", " I was</s>"],
    );
}

#[test]
fn conversations_are_split_by_column_or_by_shared_turns() {
    let question = turn("user", "q");
    let expected = ["<s>u:q\na:", "y\n", "n\n"];
    let (yes, no) = (turn("assistant", "y"), turn("assistant", "n"));
    // Explicit; explicit with whole conversations; implicit; UltraFeedback.
    pairs(
        &json!({ "prompt": [question], "chosen": [yes], "rejected": [no] }),
        expected,
    );
    pairs(
        &json!({ "prompt": [question], "chosen": [question, yes], "rejected": [question, no] }),
        expected,
    );
    pairs(
        &json!({ "chosen": [question, yes], "rejected": [question, no] }),
        expected,
    );
    pairs(
        &json!({ "prompt": "q", "chosen": [question, yes], "rejected": [question, no] }),
        expected,
    );
}

#[test]
fn shared_turns_reach_to_the_last_common_one_and_leave_an_answer() {
    let start = [
        turn("system", "s"),
        turn("user", "q"),
        turn("assistant", "a"),
        turn("user", "r"),
    ];
    let with = |answer: &str| [&start[..], &[turn("assistant", answer)]].concat();
    pairs(
        &json!({ "prompt": "q", "chosen": with("y"), "rejected": with("n") }),
        ["<s>s:s\nu:q\na:a\nu:r\na:", "y\n", "n\n"],
    );
    pairs(
        &json!({ "chosen": with("y"), "rejected": with("y") }),
        ["<s>s:s\nu:q\na:a\nu:r\na:", "y\n", "y\n"],
    );
}

#[test]
fn sft_reads_completions_and_the_chosen_side_of_pairs() {
    let sft = |row: Value, expected| check(&[row], &config(128), CHOSEN, expected);
    sft(
        json!({ "prompt": "q", "completion": "y" }),
        ["<s>q", "y</s>", ""],
    );
    sft(
        json!({ "prompt": "q", "chosen": "y", "rejected": "n" }),
        ["<s>q", "y</s>", ""],
    );
    sft(
        json!({ "chosen": "q: y", "rejected": "q: n" }),
        ["<s>q:", " y</s>", ""],
    );
    sft(
        json!({ "prompt": [turn("user", "q")], "completion": [turn("assistant", "y")] }),
        ["<s>u:q\na:", "y\n", ""],
    );
}

fn said(from: &str, value: &str) -> Value {
    json!({ "from": from, "value": value })
}

#[test]
fn share_gpt_rows_answer_their_conversations() {
    let (human, yes, no) = (said("human", "q"), said("gpt", "y"), said("gpt", "n"));
    let expected = ["<s>u:q\na:", "y\n", "n\n"];
    // One message, lists of one, messages of other names, whole conversations.
    pairs(
        &json!({ "conversations": [human], "chosen": yes, "rejected": no }),
        expected,
    );
    pairs(
        &json!({ "conversations": [human], "chosen": [yes], "rejected": [no] }),
        expected,
    );
    pairs(
        &json!({ "conversations": [human], "chosen": turn("assistant", "y"), "rejected": no }),
        expected,
    );
    pairs(
        &json!({ "chosen": [human, yes], "rejected": [human, no] }),
        expected,
    );
    // Beside whole conversations the column is not read.
    pairs(
        &json!({ "conversations": [human, yes], "chosen": [human, yes], "rejected": [human, no] }),
        expected,
    );
    let with_system = ["<s>s:s\nu:q\na:", "y\n", "n\n"];
    pairs(
        &json!({ "conversations": [said("system", "s"), human], "chosen": yes, "rejected": no }),
        with_system,
    );
    for conversation in [json!([human]), json!([said("system", "s"), human])] {
        pairs(
            &json!({ "system": "s", "conversations": conversation, "chosen": yes, "rejected": no }),
            with_system,
        );
    }
}

#[test]
fn sft_takes_the_last_answer_of_a_whole_conversation() {
    let turns = ["q", "a", "r", "b"];
    let expected = ["<s>u:q\na:a\nu:r\na:", "b\n", ""];
    let roles = ["user", "assistant"].iter().cycle();
    let messages: Vec<Value> = roles
        .zip(turns)
        .map(|(role, text)| turn(role, text))
        .collect();
    let speakers = ["human", "gpt"].iter().cycle();
    let conversations: Vec<Value> = speakers
        .zip(turns)
        .map(|(from, text)| said(from, text))
        .collect();
    for row in [
        json!({ "messages": messages }),
        json!({ "conversations": conversations }),
    ] {
        check(&[row], &config(128), CHOSEN, expected);
    }
}

#[test]
fn the_report_tells_the_layouts() {
    let folder = Folder::with_tokenizer();
    folder.write("chat_template.jinja", TEMPLATE);
    let (user, yes, no) = (
        turn("user", "q"),
        turn("assistant", "y"),
        turn("assistant", "n"),
    );
    let rows = [
        json!({ "prompt": "q", "chosen": "y", "rejected": "n" }),
        json!({ "prompt": [user], "chosen": [yes], "rejected": [no] }),
        json!({ "prompt": "q", "chosen": [user, yes], "rejected": [user, no] }),
        json!({ "conversations": [user], "chosen": yes, "rejected": no }),
        json!({ "prompt": "q", "chosen": "y", "rejected": "z" }),
        json!({ "chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: n" }),
    ];
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    let report = folder.load(lines.join("\n"), &config(128)).unwrap().report;
    let counts: Vec<_> = report
        .layouts
        .iter()
        .map(|it| (it.layout, it.pairs))
        .collect();
    let expected = [
        (Layout::Text, 2),
        (Layout::Transcript, 1),
        (Layout::Chat, 1),
        (Layout::ChatWithText, 1),
        (Layout::ShareGpt, 1),
    ];
    assert_eq!(counts, expected);
    let text = report.to_string();
    assert!(
        text.contains(
            "rows\nlayout of 2 pairs: text with its prompt in a column\nlayout of 1 pair: HH"
        ),
        "{text}"
    );
}

#[test]
fn column_names_lead_into_objects_and_lists() {
    let mut config = config(128);
    config.columns.prompt = "in.text".into();
    config.columns.chosen = "out.0.text".into();
    config.columns.rejected = "out.1.text".into();
    let out = [json!({ "text": "y" }), json!({ "text": "n" })];
    let expected = ["<s>q", "y</s>", "n</s>"];
    check(
        &[json!({ "in": { "text": "q" }, "out": out })],
        &config,
        BOTH,
        expected,
    );
    // A column that is called so comes first.
    let row = json!({ "in.text": "q", "in": { "text": "?" }, "out": out });
    check(&[row], &config, BOTH, expected);
}

#[test]
fn columns_may_have_other_names() {
    let mut config = config(128);
    config.columns.prompt = "question".into();
    config.columns.rejected = "bad".into();
    let row = json!({ "question": "q", "chosen": "y", "bad": "n", "prompt": 7 });
    check(&[row], &config, BOTH, ["<s>q", "y</s>", "n</s>"]);
}

#[test]
fn one_json_array_reads_as_lines_do_and_places_count_lines() {
    let folder = Folder::with_tokenizer();
    let row = r#"{"prompt": "q", "chosen": "y", "rejected": "n"}"#;
    let lines = folder
        .load(format!("\u{feff}{row}\r\n\n{row}\n"), &config(64))
        .unwrap();
    let array = folder
        .load(format!("[\n  {row},\n\n  {row}\n]\n"), &config(64))
        .unwrap();
    assert_eq!(array.digest, lines.digest);
    let places = |dataset: &data::Dataset| -> Vec<usize> {
        dataset.pairs.iter().map(|pair| pair.place.line).collect()
    };
    assert_eq!(places(&lines), [1, 3]);
    assert_eq!(places(&array), [2, 4]);
}

#[test]
fn several_files_read_as_one_list() {
    let folder = Folder::with_tokenizer();
    let row =
        |chosen: &str| json!({ "prompt": "q", "chosen": chosen, "rejected": "n" }).to_string();
    let files = [
        folder.write("a.jsonl", row("1")),
        folder.write("b.jsonl", row("2")),
    ];
    let dataset = load(&files, &config(64), &folder.tokenizer(), BOTH).unwrap();
    let names: Vec<_> = dataset
        .pairs
        .iter()
        .map(|pair| pair.place.file.file_name().unwrap())
        .collect();
    assert_eq!(names, ["a.jsonl", "b.jsonl"]);
}
