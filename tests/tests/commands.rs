//! The commands beside training, through the real programs: what a person asks before a run and after it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tests::programs::{Run, SMALL, program};
use tests::workspace_root;

/// Bad usage or configuration: do not try again.
const USAGE: i32 = 2;

const REFERENCE: &str = "configs/quickstart/reference";
const PROMPT: &str = "Invite Ben to see the concert on Friday.";

fn stdout(output: &Output) -> String {
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    assert!(output.status.success(), "{}{text}", stderr(output));
    text
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `coordinator data` on the configuration of `run`.
fn data(run: &Run, arguments: &[&str]) -> Output {
    let mut command = Command::new(program("coordinator"));
    command
        .arg("data")
        .arg(run.folder().join("config.toml"))
        .args(["--set", &format!("job.output={}", run.path("").display())])
        .args(arguments)
        .current_dir(workspace_root());
    command.output().expect("the coordinator starts")
}

fn generate(model: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(program("worker"));
    command
        .args(["generate", "--backend", "cpu", "--threads", "1", "--model"])
        .arg(model)
        .args(arguments)
        .current_dir(workspace_root());
    command.output().expect("the worker starts")
}

/// The only line of `generate --json` on the reference.
fn continuation(arguments: &[&str]) -> Value {
    let all = [&["--json", "--prompt", PROMPT], arguments].concat();
    serde_json::from_str(&stdout(&generate(Path::new(REFERENCE), &all))).expect("one JSON line")
}

fn refused(name: &str, output: &Output, words: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(USAGE), "{name}: {text}");
    assert!(output.stdout.is_empty(), "{name}: output besides {text}");
    for word in words {
        assert!(text.contains(word), "{name}: no `{word}` in: {text}");
    }
}

#[test]
fn the_data_report_counts_the_pairs_and_leaves_no_run_directory() {
    let quickstart = workspace_root().join("configs/quickstart.toml");
    let run = Run::new(&fs::read_to_string(quickstart).expect("a configuration"));
    let text = stdout(&data(&run, &[]));
    assert!(
        text.starts_with("training pairs\n512 pairs of 512 rows\n"),
        "{text}"
    );
    assert!(text.contains("held-out pairs\n"), "{text}");
    let reports: Value = serde_json::from_str(&stdout(&data(&run, &["--json"]))).expect("JSON");
    assert_eq!(reports["train"]["pairs"], 512);
    assert_eq!(reports["train"]["dropped"], json!([]));
    assert!(reports["eval"]["pairs"].as_u64() > Some(0), "{reports}");
    assert!(!run.path("").exists(), "a run directory");
}

#[test]
fn the_data_report_needs_no_weights_and_without_held_out_files_has_none() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_reference(
        folder.path(),
        &["config.json", "tokenizer.json", "tokenizer_config.json"],
    );
    let config = SMALL
        .replace(REFERENCE, &folder.path().display().to_string())
        .replace("eval = [\"configs/quickstart/eval.jsonl\"]", "");
    let output = data(&Run::new(&config), &["--json"]);
    let reports: Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    assert_eq!(reports["eval"], Value::Null);
    assert_eq!(reports["train"]["rows"], 512);
}

#[test]
fn data_that_training_would_refuse_is_refused_with_file_and_line() {
    let run = Run::new(SMALL);
    let file = run.folder().join("pairs.jsonl");
    let train = format!("data.train=[\"{}\"]", file.display());
    let pair = r#"{"prompt": "Invite Ben.", "chosen": " Dear Ben", "rejected": " Hi Ben"}"#;
    fs::write(&file, format!("{pair}\n{{\"prompt\": \n")).expect("write pairs");
    let output = data(&run, &["--set", &train]);
    refused("a malformed line", &output, &["pairs.jsonl:2", "JSON"]);
    fs::write(&file, format!("{pair}\n\n{{\"prompt\": \"a\"}}\n")).expect("write pairs");
    let output = data(&run, &["--set", &train]);
    refused("no chosen", &output, &["pairs.jsonl:3", "chosen"]);
    let output = data(&run, &["--set", "data.max_lenght=3"]);
    refused("an unknown key", &output, &["max_lenght", "max_length"]);
    assert!(!run.path("").exists(), "a run directory");
}

#[test]
fn the_most_likely_continuation_is_always_the_same_and_ends_with_eos() {
    let whole = continuation(&[]);
    assert_eq!(whole, continuation(&["--seed", "5"]));
    assert_eq!(whole["prompt"], PROMPT);
    assert_eq!(whole["ended"], true, "{whole}");
    let tokens = whole["tokens"].as_u64().expect("a number");
    assert!((10..128).contains(&tokens), "{whole}");
    let text = whole["text"].as_str().expect("a text");
    assert!(text.contains("concert on Friday"), "{text}");
    assert!(!text.contains("</s>"), "{text}");

    let start = continuation(&["--max-tokens", "9"]);
    assert_eq!(start["ended"], false);
    assert_eq!(start["tokens"], 9);
    assert!(text.starts_with(start["text"].as_str().expect("a text")));

    let plain = stdout(&generate(Path::new(REFERENCE), &["--prompt", PROMPT]));
    assert_eq!(plain, format!("{text}\n"));
}

#[test]
fn a_seed_repeats_its_draws_and_another_draws_others() {
    let draw = |seed| continuation(&["--temperature", "1", "--seed", seed]);
    assert_eq!(draw("7"), draw("7"));
    assert_ne!(draw("7")["text"], draw("8")["text"]);
    // Of a narrow enough nucleus every draw is the likeliest token.
    let narrow = continuation(&["--temperature", "1", "--top-p", "1e-6", "--seed", "7"]);
    assert_eq!(narrow["text"], continuation(&[])["text"]);
}

#[test]
fn prompts_of_a_file_are_continued_in_order_and_messages_through_the_chat_template() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_reference(
        folder.path(),
        &[
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors",
        ],
    );
    // What it writes for one turn is what the tokenizer makes of plain text, so that both ways must end alike.
    let template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}";
    fs::write(folder.path().join("chat_template.jinja"), template).expect("write a template");
    let messages = json!([{"role": "user", "content": PROMPT}]);
    let rows = [
        json!({"prompt": PROMPT, "chosen": "not read"}),
        json!({"prompt": messages}),
        json!({"prompt": "Thank Clara for help with the wedding on Wednesday."}),
    ];
    let file = folder.path().join("prompts.jsonl");
    let text = rows.each_ref().map(|row| format!("{row}\n")).concat();
    fs::write(&file, text).expect("write prompts");
    let file = file.to_str().expect("a path in Unicode");
    let output = stdout(&generate(folder.path(), &["--json", "--prompts", file]));
    let lines: Vec<Value> = output
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), rows.len());
    for (line, row) in lines.iter().zip(&rows) {
        assert_eq!(line["prompt"], row["prompt"]);
    }
    assert_eq!(lines[0]["text"], continuation(&[])["text"]);
    assert_eq!(lines[1]["text"], lines[0]["text"]);
    assert_ne!(lines[2]["text"], lines[0]["text"]);

    let chat = generate(folder.path(), &["--json", "--chat", "--prompt", PROMPT]);
    let chat: Value = serde_json::from_str(&stdout(&chat)).expect("JSON");
    assert_eq!(chat, lines[1]);
}

#[test]
fn prompts_that_cannot_be_continued_are_refused_with_place_and_cure() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("prompts.jsonl");
    let path = file.to_str().expect("a path in Unicode").to_owned();
    let reference = Path::new(REFERENCE);
    let rows: [(&str, &str, &[&str]); 4] = [
        (
            "no column",
            "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n",
            &["prompts.jsonl:2", "`prompt`", "add it"],
        ),
        ("malformed", "{\"prompt\": \n", &["prompts.jsonl:1", "JSON"]),
        ("no row", "\n", &["prompts.jsonl", "no row"]),
        (
            "messages without a template",
            "{\"prompt\": [{\"role\": \"user\", \"content\": \"a\"}]}\n",
            &["prompts.jsonl:1", REFERENCE, "chat_template.jinja"],
        ),
    ];
    for (name, content, words) in rows {
        fs::write(&file, content).expect("write prompts");
        refused(name, &generate(reference, &["--prompts", &path]), words);
    }
    let output = generate(reference, &["--prompts", "absent.jsonl"]);
    refused("no file", &output, &["absent.jsonl", "check the path"]);
    let output = generate(reference, &["--prompt", PROMPT, "--chat"]);
    refused("--chat", &output, &["--prompt", "chat_template.jinja"]);
    let output = generate(folder.path(), &["--prompt", PROMPT]);
    refused("no model", &output, &["tokenizer.json", "save_pretrained"]);
    let output = generate(reference, &["--prompt", PROMPT, "--temperature", "-1"]);
    refused("temperature", &output, &["--temperature", "0 or more"]);
    let output = generate(reference, &["--prompt", PROMPT, "--top-p", "0"]);
    refused("top-p", &output, &["--top-p", "above 0 and at most 1"]);
    refused("neither", &generate(reference, &[]), &["--prompt"]);
}

fn copy_reference(folder: &Path, names: &[&str]) {
    let reference = workspace_root().join(REFERENCE);
    for name in names {
        fs::copy(reference.join(name), folder.join(name)).expect("copy");
    }
}

#[test]
fn a_first_configuration_fits_model_and_pairs_and_runs_as_it_is() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("mine.toml");
    let init = |data: &str| {
        Command::new(program("coordinator"))
            .args(["config", "--model", REFERENCE, "--data", data, "--init"])
            .arg(&file)
            .current_dir(workspace_root())
            .output()
            .expect("it starts")
    };
    refused("no pairs", &init("configs"), &["--data", "train*.jsonl"]);
    assert!(!file.exists());
    let output = init("configs/quickstart");
    assert!(output.status.success(), "{}", stderr(&output));
    let written = fs::read_to_string(&file).expect("a configuration");
    // 512 letters of 49 tokens on average, the longest 62 with its prompt; held-out letters beside them.
    for line in [
        "train = [\"configs/quickstart/train.jsonl\"]",
        "eval = [\"configs/quickstart/eval.jsonl\"]",
        "beta = 0.1",
        "max_length = 64",
        "batch_pairs = 16",
    ] {
        assert!(written.contains(line), "no `{line}` in: {written}");
    }
    let run = Run::new(&written)
        .set("train.epochs=1")
        .set("data.train=[\"configs/quickstart/eval.jsonl\"]");
    run.complete();
    assert_eq!(run.metrics().len(), 8);
    refused(
        "a file that is there",
        &init("configs/quickstart"),
        &["mine.toml", "exists"],
    );
    assert_eq!(fs::read_to_string(&file).expect("unchanged"), written);
}

/// A model without a chat template: what the refusal asks for can be done with every command that refuses.
#[test]
fn a_chat_template_can_be_given_wherever_one_is_asked_for() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let template = folder.path().join("chat.jinja");
    let text = "{% for m in messages %}{{ m.content }} {% endfor %}";
    fs::write(&template, text).expect("write a template");
    let pairs = folder.path().join("pairs.jsonl");
    let row = json!({
        "prompt": [{"role": "user", "content": PROMPT}],
        "chosen": [{"role": "assistant", "content": "Dear Ben, come."}],
        "rejected": [{"role": "assistant", "content": "Hi Ben, come."}],
    });
    fs::write(&pairs, format!("{row}\n{row}\n")).expect("write pairs");
    let command = |program_name: &str, arguments: &[&str], more: &[&Path]| {
        let mut command = Command::new(program(program_name));
        command
            .args(arguments)
            .args(["--model", REFERENCE])
            .args(more)
            .current_dir(workspace_root());
        command.output().expect("it starts")
    };
    let run = Run::new(SMALL)
        .set("train.steps=1")
        .set(&format!("data.train={:?}", [&pairs]))
        .set(&format!("data.chat_template={:?}", template.display()));
    run.complete();
    let exported = fs::read_to_string(run.path("export/chat_template.jinja"));
    assert_eq!(exported.expect("the run's template"), text);

    let (flag, data, out) = (
        Path::new("--chat-template"),
        Path::new("--data"),
        folder.path().join("out"),
    );
    let init = ["config", "--init", out.to_str().expect("UTF-8")];
    let score = ["score", "--out", out.to_str().expect("UTF-8")];
    let bench = ["bench", "--steps", "1", "--batch-pairs", "2"];
    let generate = [
        "generate",
        "--chat",
        "--prompt",
        PROMPT,
        "--max-tokens",
        "2",
    ];
    for (program_name, arguments, files) in [
        ("coordinator", &init[..], &[data, pairs.as_path()][..]),
        ("worker", &score, &[data, &pairs]),
        ("worker", &bench, &[data, &pairs]),
        ("worker", &generate, &[]),
    ] {
        let name = arguments[0];
        // `score` writes where `config` wrote.
        drop(fs::remove_file(&out));
        let output = command(program_name, arguments, files);
        refused(name, &output, &["no chat template", "--chat-template"]);
        assert!(!out.exists(), "{name} left something");
        let output = command(
            program_name,
            arguments,
            &[files, &[flag, template.as_path()]].concat(),
        );
        stdout(&output);
        if name == "config" {
            let written = fs::read_to_string(&out).expect("a configuration");
            let line = format!("chat_template = {:?}", template.display().to_string());
            assert!(written.contains(&line), "no `{line}` in: {written}");
        }
    }
}

#[test]
fn the_schema_is_printed_alone() {
    let schema = |arguments: &[&str]| {
        Command::new(program("coordinator"))
            .args(["config", "--schema"])
            .args(arguments)
            .output()
            .expect("it starts")
    };
    let printed: Value = serde_json::from_str(&stdout(&schema(&[]))).expect("JSON");
    assert_eq!(
        printed["properties"]["objective"]["oneOf"][0]["properties"]["beta"]["exclusiveMinimum"],
        0
    );
    let output = schema(&["configs/quickstart.toml"]);
    refused("--schema with a file", &output, &["--schema", "FILES"]);
}
