//! Bad input to the real programs: each row names the place and the cure, exits as documented, and trains nothing.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use tests::programs::{Run, SMALL, program, text};
use tests::workspace_root;

/// Bad usage or configuration: do not try again.
const USAGE: i32 = 2;

/// Runs `config`, which must be refused with `words`, and leaves no row of training behind.
fn check(name: &str, config: &str, code: i32, words: &[&str]) {
    let run = Run::new(config);
    refused(name, &run, code, words);
}

fn refused(name: &str, run: &Run, code: i32, words: &[&str]) {
    let output = run.output();
    let text = text(&output);
    assert_eq!(output.status.code(), Some(code), "{name}: {text}");
    for word in words {
        assert!(text.contains(word), "{name}: no `{word}` in: {text}");
    }
    assert!(!text.contains("panicked"), "{name}: {text}");
    assert!(run.metrics().is_empty(), "{name}: rows of training");
    for left in ["export", "checkpoints/step-00000001"] {
        assert!(!run.path(left).exists(), "{name}: {left}");
    }
}

/// SMALL with `line` replaced.
fn with(line: &str, replacement: &str) -> String {
    assert!(SMALL.contains(line), "{line}");
    SMALL.replace(line, replacement)
}

/// SMALL on a data file of these lines.
fn with_data(folder: &Path, lines: &str) -> String {
    let path = folder.join("pairs.jsonl");
    fs::write(&path, lines).expect("write pairs");
    with(
        "train = [\"configs/quickstart/train.jsonl\"]",
        &format!("train = [\"{}\"]", path.display()),
    )
}

#[test]
fn values_that_cannot_work_are_refused_with_key_and_cure() {
    let rows: [(&str, String, &[&str]); 14] = [
        (
            "an unknown key",
            with("beta = 0.1", "betta = 0.1"),
            &["objective.betta", "did you mean `beta`"],
        ),
        (
            "an unknown section",
            with("[optimizer]", "[optimiser]"),
            &["optimiser", "optimizer"],
        ),
        (
            "a beta of zero",
            with("beta = 0.1", "beta = 0.0"),
            &["objective.beta", "0"],
        ),
        (
            "a negative beta",
            with("beta = 0.1", "beta = -0.1"),
            &["objective.beta", "-0.1"],
        ),
        (
            "a batch of nothing",
            with("batch_pairs = 24", "batch_pairs = 0"),
            &["train.batch_pairs"],
        ),
        (
            "an unknown objective",
            with("cal_dpo", "caldpo"),
            &["objective", "cal_dpo"],
        ),
        (
            "a wrong type",
            with("steps = 24", "steps = \"many\""),
            &["train.steps"],
        ),
        (
            "epochs and steps",
            with("steps = 24", "steps = 24\nepochs = 1"),
            &["train.epochs", "train.steps"],
        ),
        (
            "f16",
            with("[data]", "dtype = \"f16\"\n[data]"),
            &["model.dtype", "bf16"],
        ),
        (
            "an adapter for modules that the model does not have",
            with(
                "[data]",
                "[adapter]\nkind = \"lora\"\ntargets = [\"c_attn\"]\n[data]",
            ),
            &["adapter.targets", "c_attn", "q_proj"],
        ),
        (
            "dropout",
            with(
                "[data]",
                "[adapter]\nkind = \"lora\"\ndropout = 0.1\n[data]",
            ),
            &["adapter.dropout", "0"],
        ),
        (
            "kto's weight under another objective",
            with(
                "kind = \"cal_dpo\"",
                "kind = \"cal_dpo\"\ndesirable_weight = 2.0",
            ),
            &["objective.desirable_weight"],
        ),
        (
            "no workers",
            with("workers = 2", "workers = 0"),
            &["cluster.workers"],
        ),
        (
            "text that is not TOML",
            with("[data]", "[data"),
            &["config.toml"],
        ),
    ];
    for (name, config, words) in rows {
        check(name, &config, USAGE, words);
    }
}

#[test]
fn files_that_cannot_be_used_are_named_with_line_or_tensor() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pair = r#"{"prompt": "Invite Ben.", "chosen": " Dear Ben", "rejected": " Hi Ben"}"#;
    check(
        "a malformed line",
        &with_data(folder.path(), &format!("{pair}\n{{\"prompt\": \n")),
        USAGE,
        &["pairs.jsonl:2", "JSON"],
    );
    check(
        "a row without rejected",
        &with_data(folder.path(), "{\"prompt\": \"a\", \"chosen\": \"b\"}\n"),
        USAGE,
        &["pairs.jsonl:1", "rejected"],
    );
    check(
        "a data file that is not there",
        &with(
            "configs/quickstart/train.jsonl",
            "configs/quickstart/trian.jsonl",
        ),
        USAGE,
        &["trian.jsonl", "data.train"],
    );
    check(
        "a model folder that is not there",
        &with(
            "configs/quickstart/reference",
            "configs/quickstart/referenze",
        ),
        USAGE,
        &[
            "model.path: there is no folder /",
            "/configs/quickstart/referenze",
            "every worker sees",
        ],
    );
    check(
        "a pattern that nothing matches",
        &with(
            "configs/quickstart/train.jsonl",
            "configs/quickstart/none-*.jsonl",
        ),
        USAGE,
        &["none-*.jsonl"],
    );
    check(
        "a data set of the hub",
        &with("configs/quickstart/train.jsonl", "hf://datasets/a/b"),
        USAGE,
        &["hf://datasets/a/b", "download"],
    );
    let table = folder.path().join("pairs.parquet");
    let mut bytes = b"PAR1".to_vec();
    bytes.extend([7; 100]);
    bytes.extend([40, 0, 0, 0]);
    bytes.extend(b"PAR1");
    fs::write(&table, bytes).expect("write a table");
    check(
        "a Parquet file with a damaged footer",
        &with(
            "configs/quickstart/train.jsonl",
            &table.display().to_string(),
        ),
        USAGE,
        &["pairs.parquet", "Parquet"],
    );
    check(
        "a model that is not there",
        &with(
            "configs/quickstart/reference",
            "configs/quickstart/referense",
        ),
        USAGE,
        &["referense"],
    );

    let model = folder.path().join("model");
    fs::create_dir(&model).expect("a folder");
    let reference = workspace_root().join("configs/quickstart/reference");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(reference.join(name), model.join(name)).expect("copy");
    }
    let config = with("configs/quickstart/reference", &model.display().to_string());
    check("no weights", &config, USAGE, &["model.safetensors"]);
    let weights = fs::read(reference.join("model.safetensors")).expect("weights");
    fs::write(
        model.join("model.safetensors"),
        &weights[..weights.len() - 100],
    )
    .expect("write");
    check(
        "cut weights",
        &config,
        USAGE,
        &["model.safetensors", "truncated"],
    );
    fs::remove_file(model.join("tokenizer.json")).expect("remove");
    check(
        "no tokenizer",
        &config,
        USAGE,
        &["tokenizer.json", "a model folder needs tokenizer.json"],
    );
    fs::copy(
        reference.join("tokenizer.json"),
        model.join("tokenizer.json"),
    )
    .expect("copy");
    fs::write(model.join("config.json"), "{\"model_type\": \"mamba\"}").expect("write");
    check(
        "another architecture",
        &config,
        USAGE,
        &["config.json", "mamba"],
    );
}

#[test]
fn pairs_that_cannot_be_trained_on_are_refused_with_row_and_cure() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    check(
        "no pair left after truncation",
        &with("max_length = 128", "max_length = 2"),
        USAGE,
        &[
            "no pairs left of",
            "every row was dropped",
            "raise data.max_length",
        ],
    );
    let template = folder.path().join("template.jinja");
    fs::write(
        &template,
        "{{ raise_exception('this model takes no system turn') }}",
    )
    .expect("write");
    let chat = r#"{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}]}"#;
    let config = with_data(folder.path(), &format!("{}\n", chat.replace('\n', "")));
    let config = config.replace(
        "[data]",
        &format!("[data]\nchat_template = \"{}\"", template.display()),
    );
    check(
        "a chat template that raises",
        &config,
        USAGE,
        &["pairs.jsonl:1", "this model takes no system turn"],
    );
}

#[test]
fn a_configuration_that_is_not_utf8_is_refused_with_the_byte() {
    let run = Run::new(SMALL);
    let mut bytes = SMALL.as_bytes().to_vec();
    bytes.extend(b"# caf\xe9\n");
    fs::write(run.folder().join("config.toml"), bytes).expect("write");
    refused("not UTF-8", &run, USAGE, &["config.toml", "UTF-8"]);
}

#[test]
fn a_port_in_use_is_refused_with_the_key() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let run = Run::new(SMALL).set(&format!("cluster.listen={address}"));
    refused(
        "a port in use",
        &run,
        1,
        &[&address, "cluster.listen", "choose another port"],
    );
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = Command::new(program("coordinator"))
        .args(["--cluster", "--set", &format!("cluster.listen={address}")])
        .args([
            "--set",
            &format!("cluster.state={}", folder.path().join("state").display()),
        ])
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(
        text(&output).contains("choose another port"),
        "{}",
        text(&output)
    );
}

/// The disk is a file system of its own in a mount namespace of its own, too small for a third checkpoint.
#[test]
fn a_disk_that_is_full_while_saving_is_told_and_what_was_saved_stays() {
    let run = Run::new(SMALL)
        .set("checkpoint.keep_last=9")
        .set("cluster.heartbeat_timeout_seconds=2");
    fs::create_dir(run.path("")).expect("a run directory");
    let command = run.command();
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words
        .map(|it| format!("'{}'", it.to_string_lossy()))
        .collect();
    // Seen from inside, because the mount ends with the shell.
    let script = format!(
        "mount -t tmpfs -o size=3m tmpfs {} && {}; echo exit $?; ls {}",
        run.path("").display(),
        words.join(" "),
        run.path("checkpoints/*").display()
    );
    let output = Command::new("unshare")
        .args(["--mount", "--map-root-user", "sh", "-c", &script])
        .current_dir(workspace_root())
        .output();
    let output = match output {
        Ok(output) if !text(&output).contains("Operation not permitted") => output,
        _ => return eprintln!("skipped: this user may not make a mount namespace"),
    };
    let said = text(&output);
    for word in [
        "checkpoint of step 15 could not be written",
        "No space left on device",
        "make room there or see that it can be reached, or move the folder elsewhere and set checkpoint.path to that",
        "exit 1",
        "step-00000010",
    ] {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
    // A step whose save failed has no manifest, so that nothing half-written is taken for a checkpoint.
    let last = said.rsplit("step-00000024").next().expect("the listing");
    assert!(!last.contains("manifest.json"), "{said}");
}

#[test]
fn a_run_that_a_misspelled_path_ended_leaves_its_directory_to_the_one_that_mends_it() {
    let run = Run::new(SMALL).set("train.steps=1");
    let output = run
        .command()
        .args(["--set", "data.train=[\"pears.jsonl\"]"])
        .output()
        .expect("the coordinator starts");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(USAGE), "{said}");
    assert!(said.contains("pears.jsonl"), "{said}");
    let said = text(&run.complete());
    assert!(said.contains("had not committed a step"), "{said}");
    assert!(said.contains("data.train"), "{said}");
    // What it did then stands.
    run.complete();
}

#[test]
fn an_output_that_cannot_be_written_is_refused_with_its_key() {
    let run = Run::new(SMALL);
    let file = run.folder().join("file");
    fs::write(&file, "").expect("write");
    for output in [file.clone(), file.join("run")] {
        let output = output.display();
        let run = Run::new(SMALL).set(&format!("job.output={output}"));
        let place = format!("job.output: create directory {output}");
        refused(
            "an output that is no folder",
            &run,
            USAGE,
            &[&place, "name a folder"],
        );
    }
}

#[test]
fn a_run_directory_of_another_run_is_refused_with_the_keys_that_differ() {
    let run = Run::new(SMALL).set("train.steps=1");
    run.complete();
    let journal = fs::read(run.path("journal.log")).expect("a journal");
    let output = run
        .command()
        .args(["--set", "objective.beta=0.2"])
        .output()
        .expect("the coordinator starts");
    let text = text(&output);
    assert_eq!(output.status.code(), Some(USAGE), "{text}");
    assert!(text.contains("objective.beta"), "{text}");
    assert!(text.contains("0.1") && text.contains("0.2"), "{text}");
    assert_eq!(
        fs::read(run.path("journal.log")).expect("a journal"),
        journal
    );
}

#[test]
fn a_second_coordinator_on_one_run_directory_is_refused_with_the_first_ones_process() {
    let run = Run::new(SMALL).set("train.steps=2000");
    let mut first = run.start();
    first.wait_until("rows of metrics", || !run.metrics().is_empty());
    let output = run.output();
    let second = text(&output);
    assert_eq!(output.status.code(), Some(1), "{second}");
    assert!(second.contains(&first.id().to_string()), "{second}");
    // The first is not disturbed.
    let rows = run.metrics().len();
    first.wait_until("one more row", || run.metrics().len() > rows);
}

#[test]
fn c2_a_flipped_byte_in_journal_or_reference_store_is_refused_with_file_and_place() {
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).expect("bytes");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x04;
        fs::write(path, &bytes).expect("write");
        bytes
    };
    let whole = Run::new(SMALL).set("train.steps=3");
    whole.complete();

    // The same pairs again, in a run directory of its own.
    let again = Run::new(SMALL).set("train.steps=3").set(&format!(
        "reference.store={}",
        whole.folder().join("store").display()
    ));
    let scope = fs::read_dir(whole.folder().join("store"))
        .expect("a store")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.is_dir())
        .expect("a scope");
    let segment = fs::read_dir(scope)
        .expect("a scope")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.extension().is_some_and(|it| it == "segment"))
        .expect("a segment");
    flip(&segment);
    let name = segment.display().to_string();
    refused("a reference store", &again, 1, &[&name, "damaged at byte"]);

    let journal = whole.path("journal.log");
    let damaged = flip(&journal);
    let output = whole.output();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in ["journal.log", "damaged at byte"] {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
    // It is left as it is for whoever restores it.
    assert!(fs::read(&journal).expect("a journal") == damaged);
}

#[test]
fn no_configuration_is_answered_with_what_to_type() {
    let output = Command::new(program("coordinator"))
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(USAGE));
    assert!(text(&output).contains("coordinator configs/quickstart.toml"));
}

#[test]
fn every_configuration_of_this_repository_resolves() {
    let folder = workspace_root().join("configs");
    let mut seen = 0;
    for entry in fs::read_dir(folder).expect("configs") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let output = Command::new(program("coordinator"))
            .arg("config")
            .arg(&path)
            .current_dir(workspace_root())
            .output()
            .expect("it starts");
        assert!(
            output.status.success(),
            "{}: {}",
            path.display(),
            text(&output)
        );
        // What is printed is a whole configuration and resolves to itself; its first line names the sources.
        let again = tempfile::tempdir().expect("a temporary folder");
        let file = again.path().join("again.toml");
        fs::write(&file, &output.stdout).expect("write");
        let twice = Command::new(program("coordinator"))
            .arg("config")
            .arg(&file)
            .output()
            .expect("it starts");
        let keys = |output: &Output| {
            let text = text(output);
            text.split_once('\n').map(|(_, keys)| keys.to_owned())
        };
        assert_eq!(keys(&twice), keys(&output), "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 7, "{seen} configurations");
}

#[test]
fn more_workers_than_a_machine_has_room_for_are_refused_before_any_is_started() {
    let run = Run::new(&with("workers = 2", "workers = 1000000"));
    let words = [
        "cluster.workers is 1,000,000",
        "set cluster.workers to at most",
    ];
    refused("a million workers", &run, USAGE, &words);
    assert!(!run.path("logs").exists(), "a worker was started");
    // With fewer the same run goes on.
    run.set("cluster.workers=1").complete();
}
