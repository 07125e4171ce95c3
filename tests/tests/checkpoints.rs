//! Checkpoints of a real run through the `checkpoint` program: invariants C1 and C2 as a person meets them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;
use tests::programs::{Run, SMALL, program};

fn checkpoint(command: &str, path: &PathBuf, more: &[&str]) -> Output {
    let output = Command::new(program("checkpoint"))
        .current_dir(tests::workspace_root())
        .arg(command)
        .arg(path)
        .args(more)
        .output();
    output.expect("the program starts")
}

fn text(output: &Output) -> String {
    let streams = [&output.stdout, &output.stderr];
    streams
        .map(|stream| String::from_utf8_lossy(stream))
        .concat()
}

#[test]
fn c2_a_flipped_byte_is_named_and_the_next_start_steps_back_to_what_holds() {
    let whole = Run::new(SMALL);
    whole.complete();

    let run = Run::new(SMALL);
    let mut coordinator = run.start();
    while run.metrics().len() < 12 {
        assert!(
            coordinator.try_wait().expect("a child").is_none(),
            "it ended"
        );
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let group = format!("-{}", coordinator.id());
    let killed = Command::new("kill")
        .args(["-s", "KILL", "--", &group])
        .status();
    assert!(killed.expect("kill runs").success());
    coordinator.wait().expect("it was started");

    let folder = run.path("checkpoints");
    let output = checkpoint("inspect", &folder, &["--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let output = checkpoint("verify", &folder, &[]);
    assert!(output.status.success(), "{}", text(&output));

    let mut visible: Vec<PathBuf> = fs::read_dir(&folder)
        .expect("checkpoints")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.join("manifest.json").exists())
        .collect();
    visible.sort();
    let newest = visible.last().expect("a checkpoint").clone();
    let file = fs::read_dir(&newest)
        .expect("files")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| {
            path.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .expect("a rank's file");
    let mut bytes = fs::read(&file).expect("bytes");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&file, &bytes).expect("write");

    let output = checkpoint("verify", &newest, &[]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let name = file
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    assert!(
        said.contains(&name) && said.contains("model.layers."),
        "{said}"
    );

    let output = run.complete();
    let said = text(&output);
    let step = newest
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    assert!(said.contains(&step), "why {step} was not used: {said}");
    assert_eq!(run.training(), whole.training());
    assert!(run.exported() == whole.exported(), "the exports differ");
}

#[test]
fn an_export_by_hand_is_the_runs_own_and_has_what_transformers_reads() {
    let run = Run::new(SMALL).set("train.steps=2");
    run.complete();
    let out = run.folder().join("by-hand");
    let output = checkpoint(
        "export",
        &run.path("checkpoints"),
        &[
            "--model",
            "configs/quickstart/reference",
            "--out",
            &out.display().to_string(),
        ],
    );
    assert!(output.status.success(), "{}", text(&output));
    let weights = fs::read(out.join("model.safetensors")).expect("weights");
    assert!(weights == run.exported(), "the exports differ");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        assert!(run.path("export").join(name).exists(), "{name}");
    }
    let config = fs::read_to_string(run.path("export/config.json")).expect("a config");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(config["architectures"][0], "LlamaForCausalLM");
}
