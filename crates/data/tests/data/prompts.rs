//! Prompts without completions: which ids are continued, which rows are refused.

use data::{Prompt, prompts};
use serde_json::json;

use crate::support::{Folder, TEMPLATE};

#[test]
fn a_prompt_ends_where_the_model_goes_on() {
    let folder = Folder::with_tokenizer();
    folder.write("chat_template.jinja", TEMPLATE);
    let tokenizer = folder.tokenizer();
    let shown = |prompt: &Prompt| tokenizer.decode(&prompt.encode(&tokenizer).unwrap());
    assert_eq!(shown(&Prompt::Text("hi".into())), "<s>hi");
    // The template writes its own BOS, and the assistant's turn is open.
    assert_eq!(shown(&Prompt::user("hi")), "<s>u:hi\na:");
}

#[test]
fn rows_keep_their_order_and_blank_lines_count_as_lines() {
    let folder = Folder::new();
    let messages =
        json!([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]);
    let rows = format!(
        "{}\n\n{}\n",
        json!({"prompt": "a"}),
        json!({"prompt": messages})
    );
    let file = folder.write("prompts.jsonl", rows);
    let read = prompts(&file).unwrap();
    let lines: Vec<usize> = read.iter().map(|(place, _)| place.line).collect();
    assert_eq!(lines, [1, 3]);
    let texts: Vec<String> = read.iter().map(|(_, prompt)| prompt.to_string()).collect();
    assert_eq!(texts, ["a", "system: be kind\nuser: hi"]);
}

#[test]
fn prompts_that_are_no_text_and_no_open_conversation_are_refused() {
    let answered = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}]);
    for (prompt, expected) in [
        (json!(7), "`prompt` is a number"),
        (json!([]), "`prompt` is an empty list of messages"),
        (answered, "`prompt` ends with an assistant turn"),
        (json!(null), "the row has no `prompt`"),
    ] {
        let folder = Folder::new();
        let file = folder.write("prompts.jsonl", json!({ "prompt": prompt }).to_string());
        let message = prompts(&file).unwrap_err().to_string();
        assert!(message.contains(":1: "), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}
