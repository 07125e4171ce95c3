//! What cannot be used is refused with its place and a cure.

use data::{DataConfig, load};
use serde_json::{Value, json};

use crate::support::{BOTH, Folder, TEMPLATE, config};

const GOOD: &str = r#"{"prompt": "q", "chosen": "y", "rejected": "n"}"#;

/// The refusal of `content`; the model has a chat template.
fn refusal(content: impl AsRef<[u8]>, config: &DataConfig) -> String {
    let folder = Folder::with_tokenizer();
    folder.write("chat_template.jinja", TEMPLATE);
    folder.message(&folder.load(content, config).unwrap_err())
}

#[track_caller]
fn refused(content: impl AsRef<[u8]>, expected: &str) {
    assert_eq!(refusal(content, &config(64)), expected);
}

#[track_caller]
fn row_refused(row: &Value, expected: &str) {
    let message = refusal(row.to_string(), &config(64));
    assert!(message.starts_with("pairs.jsonl:1: "), "{message}");
    assert!(message.contains(expected), "{message}");
}

#[test]
fn malformed_json_names_line_and_column() {
    refused(
        format!("{GOOD}\n\n{{\"prompt\": \"q\", \"chosen\" 7}}\n"),
        "pairs.jsonl:3:26: malformed JSON: expected `:`; every line must be one complete JSON object",
    );
    refused(
        format!("[{GOOD},\n  {{\"prompt\": }}]"),
        "pairs.jsonl:2:14: malformed JSON: expected value; every line must be one complete JSON object",
    );
}

#[test]
fn a_torn_last_line_is_malformed() {
    let message = refusal(format!("{GOOD}\n{}", &GOOD[..30]), &config(64));
    assert!(
        message.starts_with("pairs.jsonl:2:30: malformed JSON: EOF"),
        "{message}"
    );
}

#[test]
fn bytes_that_are_not_utf8_name_line_and_column() {
    refused(
        [GOOD.as_bytes(), b"\n{\"prompt\": \"caf\xe9\"}"].concat(),
        "pairs.jsonl:2:16: byte 0xe9 is not UTF-8; re-encode the file, for example with iconv -t UTF-8",
    );
}

#[test]
fn other_containers_are_named() {
    refused(
        b"PAR1\x15\x04",
        "pairs.jsonl: this is a Parquet file, not JSON; name it .parquet",
    );
    refused(
        [0x1f, 0x8b, 8],
        "pairs.jsonl: this is a gzip file, not JSON; name it .jsonl.gz",
    );
}

#[test]
fn a_missing_file_is_named() {
    let folder = Folder::with_tokenizer();
    let file = folder.path().join("absent.jsonl");
    let error = load(&[file], &config(64), &folder.tokenizer(), BOTH).unwrap_err();
    let message = folder.message(&error);
    assert!(
        message.starts_with("absent.jsonl: No such file"),
        "{message}"
    );
    assert!(
        message.ends_with("check the path in data.train or data.eval"),
        "{message}"
    );
}

#[test]
fn rows_that_lack_a_part_name_it_and_what_they_have() {
    row_refused(
        &json!({ "prompt": "q", "chosen": "y" }),
        "the row has no `rejected`, it has prompt, chosen; add it",
    );
    row_refused(
        &json!({ "rejected": "n" }),
        "the row has no `chosen`, it has rejected; add it",
    );
    row_refused(&json!({}), "the row has no `chosen`, it is empty");
    row_refused(&json!([1]), "the row is a number, not an object");
    row_refused(
        &json!({ "prompt": "q", "completion": "y" }),
        "the row has no `chosen`",
    );
}

#[test]
fn parts_of_different_kinds_are_refused() {
    let answer = json!([{ "role": "assistant", "content": "y" }]);
    row_refused(
        &json!({ "prompt": "q", "chosen": "y", "rejected": answer }),
        "`chosen` is a string and `rejected` is a list",
    );
    row_refused(
        &json!({ "prompt": 7, "chosen": "y", "rejected": "n" }),
        "`prompt` is a number",
    );
    row_refused(
        &json!({ "prompt": "q", "chosen": 7, "rejected": "n" }),
        "`chosen` is a number",
    );
}

#[test]
fn broken_conversations_are_refused() {
    let user = json!({ "role": "user", "content": "q" });
    let answer = json!({ "role": "assistant", "content": "y" });
    let chat = |prompt: Value, chosen: Value| json!({ "prompt": prompt, "chosen": chosen, "rejected": [user, answer] });
    row_refused(
        &chat(Value::Null, json!([])),
        "`chosen` is an empty list of messages",
    );
    row_refused(
        &chat(Value::Null, json!([{ "content": "q" }])),
        "message 0 of `chosen` has no text `role`",
    );
    row_refused(
        &chat(Value::Null, json!([user, { "role": "assistant" }])),
        "message 1 of `chosen` has no `content`",
    );
    row_refused(
        &chat(json!("p"), json!([user, answer])),
        "`prompt` is \"p\" and the first user turn of `chosen` is \"q\"",
    );
    row_refused(
        &chat(Value::Null, json!([answer, answer])),
        "share no leading turns",
    );
    row_refused(
        &chat(json!([user, answer]), json!([answer])),
        "`prompt` ends with an assistant turn",
    );
    row_refused(
        &chat(json!([{ "role": "user", "content": "z" }]), json!([answer])),
        "a completion starts with a turn of role \"user\"",
    );
}

#[test]
fn share_gpt_rows_that_are_not_clear_are_refused() {
    let said = |from: &str| json!({ "from": from, "value": "x" });
    let row = |conversations: Value| json!({ "system": "s", "conversations": conversations, "chosen": said("gpt"), "rejected": said("gpt") });
    row_refused(
        &row(json!([said("human"), said("observation")])),
        "message 1 of `conversations` is from \"observation\"; known are human, user, gpt, ",
    );
    row_refused(
        &row(json!([said("human"), said("gpt")])),
        "`conversations` ends with an assistant turn",
    );
    row_refused(
        &row(json!([said("system"), said("human")])),
        "`system` differs from the conversation's own system turn",
    );
    row_refused(
        &json!({ "prompt": "q", "chosen": { "text": "y" }, "rejected": { "text": "n" } }),
        "`chosen` is an object",
    );
    let mut columns = config(64);
    columns.columns.chosen = "answers.2.text".into();
    let message = refusal(r#"{"answers": [{"text": "y"}]}"#, &columns);
    let expected = "pairs.jsonl:1: the row has no `answers.2.text`, it has answers; ";
    assert!(message.starts_with(expected), "{message}");
}

#[test]
fn a_chat_row_needs_a_template() {
    let folder = Folder::with_tokenizer();
    let row = json!({ "chosen": [{ "role": "user", "content": "q" }, { "role": "assistant", "content": "y" }],
                      "rejected": [{ "role": "user", "content": "q" }, { "role": "assistant", "content": "n" }] });
    let error = folder.load(format!("\n{row}"), &config(64)).unwrap_err();
    assert_eq!(
        folder.message(&error),
        "pairs.jsonl:2: the row is a conversation and the model has no chat template; give one with data.chat_template \
         (--chat-template where there is no configuration), or add chat_template.jinja to the model's folder"
    );
}

#[test]
fn what_the_template_raises_is_passed_on() {
    row_refused(
        &json!({ "prompt": [{ "role": "narrator", "content": "q" }], "chosen": [{ "role": "assistant", "content": "y" }],
                 "rejected": [{ "role": "assistant", "content": "n" }] }),
        "the chat template refuses this conversation: no narrators; change the row",
    );
}

#[test]
fn a_template_that_rewrites_the_prompt_is_refused() {
    let folder = Folder::with_tokenizer();
    folder.write(
        "chat_template.jinja",
        "{{ messages | length }}{{ messages[-1].content }}",
    );
    let row = json!({ "prompt": [{ "role": "user", "content": "q" }], "chosen": [{ "role": "assistant", "content": "y" }],
                      "rejected": [{ "role": "assistant", "content": "n" }] });
    let error = folder.load(row.to_string(), &config(64)).unwrap_err();
    assert!(
        folder.message(&error).starts_with(
            "pairs.jsonl:1: the chat template writes the prompt differently once a completion follows it, from character 1 on"
        ),
        "{error}"
    );
}

#[test]
fn plain_text_needs_an_eos() {
    let folder = Folder::with_tokenizer();
    folder.write("tokenizer_config.json", r#"{"bos_token": "<s>"}"#);
    let error = folder.load(GOOD, &config(64)).unwrap_err();
    assert!(
        folder
            .message(&error)
            .ends_with("add eos_token to tokenizer_config.json"),
        "{error}"
    );
}

#[test]
fn an_objective_that_compares_refuses_completion_data() {
    let mut config = config(64);
    config.format = data::Format::Completion;
    let message = refusal(r#"{"prompt": "q", "completion": "y"}"#, &config);
    assert!(
        message.ends_with("set data.format = \"preference\", or objective.kind = \"sft\""),
        "{message}"
    );
}

#[test]
fn files_without_a_usable_pair_say_why() {
    refused(
        "\n \n",
        "no pairs left of 0 rows in pairs.jsonl: the files hold no row; check data.train and data.eval",
    );
    assert_eq!(
        refusal(format!("{GOOD}\n{GOOD}"), &config(2)),
        "no pairs left of 2 rows in pairs.jsonl: every row was dropped, the first at pairs.jsonl:1: no completion left: the prompt \
         alone has 2 tokens and data.max_length is 2; raise data.max_length, or give rows with shorter prompts"
    );
}

#[test]
fn a_configuration_that_cannot_work_names_its_key() {
    let key = |change: fn(&mut DataConfig)| {
        let mut config = config(64);
        change(&mut config);
        config.validate().unwrap_err().key
    };
    assert!(config(64).validate().is_ok());
    assert_eq!(key(|config| config.train.clear()), "data.train");
    assert_eq!(key(|config| config.max_length = 1), "data.max_length");
    assert_eq!(
        key(|config| config.columns.rejected = "chosen".into()),
        "data.columns.rejected"
    );
    assert_eq!(
        key(|config| config.columns.prompt.clear()),
        "data.columns.prompt"
    );
}
