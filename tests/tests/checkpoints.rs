//! Checkpoints of a real run through the `checkpoint` program: invariants C1 and C2 as a person meets them.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tests::programs::{Run, SMALL, assert_same_rows, program, text};

fn checkpoint(command: &str, path: &Path, more: &[&str]) -> Output {
    let output = Command::new(program("checkpoint"))
        .current_dir(tests::workspace_root())
        .arg(command)
        .arg(path)
        .args(more)
        .output();
    output.expect("the program starts")
}

/// A run without faults, and the same killed when it had two checkpoints.
fn whole_and_killed() -> (Run, Run) {
    let whole = Run::new(SMALL);
    whole.complete();
    let run = Run::new(SMALL);
    let mut coordinator = run.start();
    coordinator.wait_until("two checkpoints", || run.checkpoints().len() >= 2);
    coordinator.kill_everything();
    (whole, run)
}

#[test]
fn c2_a_flipped_byte_is_named_and_the_next_start_steps_back_to_what_holds() {
    let (whole, run) = whole_and_killed();
    let steps = run.checkpoints();
    let newest = run.checkpoint(steps[steps.len() - 1]);
    let output = checkpoint("verify", &run.path("checkpoints"), &[]);
    assert!(output.status.success(), "{}", text(&output));
    let file = flip(&newest);

    let output = checkpoint("verify", &newest, &[]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&file) && said.contains("model.layers."),
        "{said}"
    );

    let output = run.complete();
    let said = text(&output);
    let name = newest.display().to_string();
    assert!(said.contains(&name), "why {name} was not used: {said}");
    assert!(said.contains(&file), "what of {name} does not hold: {said}");
    assert!(
        !said.contains('\u{1b}'),
        "colours without a terminal: {said:?}"
    );
    assert_same_rows("metrics.jsonl", &run.training(), &whole.training());
    assert!(run.exported() == whole.exported(), "the exports differ");
}

#[test]
fn a_folder_of_checkpoints_is_one_runs_alone() {
    let first = Run::new(SMALL).set("train.steps=2");
    let checkpoints = first.folder().join("kept");
    let path = format!("checkpoint.path={}", checkpoints.display());
    let first = first.set(&path);
    first.complete();
    let last = checkpoints.join("step-00000002/manifest.json");
    let manifest = fs::read(&last).expect("a checkpoint");

    let second = Run::new(SMALL).set("job.seed=5").set(&path);
    let refuse = |says: &[&str]| {
        let output = second.output();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        for part in says {
            assert!(said.contains(part), "no `{part}` in: {said}");
        }
        let now = fs::read(&last).expect("the checkpoint");
        assert!(now == manifest, "the other run's checkpoint changed");
    };
    let begun = first.folder().join("run").display().to_string();
    refuse(&["checkpoint.path", "belongs to another run", &begun]);
    // As an earlier version would have left it.
    fs::remove_file(checkpoints.join("owner.json")).expect("the claim");
    refuse(&["checkpoint.path", "holds step 2 of another run"]);
    // Its own run still finds all in order.
    first.complete();
}

#[test]
fn checkpoints_that_are_not_where_they_were_are_asked_for_and_nothing_is_rewound() {
    let (whole, run) = whole_and_killed();
    let journal = fs::read(run.path("journal.log")).expect("a journal");
    let moved = run.folder().join("moved");
    fs::rename(run.path("checkpoints"), &moved).expect("move");
    let output = run.output();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    for part in [
        "knows a checkpoint of step",
        "checkpoint.path",
        "there is none",
        "job.output",
    ] {
        assert!(said.contains(part), "no `{part}` in: {said}");
    }
    assert!(
        !run.path("checkpoints").exists(),
        "an empty folder in its place"
    );
    let now = fs::read(run.path("journal.log")).expect("a journal");
    assert!(now == journal, "the journal changed");

    // The place that it was moved to is as good.
    let run = run.set(&format!("checkpoint.path={}", moved.display()));
    run.complete();
    assert_same_rows("metrics.jsonl", &run.training(), &whole.training());
    assert!(run.exported() == whole.exported(), "the exports differ");
}

/// Flips one bit in the middle of a rank's file and returns the file's name.
fn flip(checkpoint: &Path) -> String {
    let file = fs::read_dir(checkpoint)
        .expect("files")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.extension().is_some_and(|it| it == "safetensors"))
        .expect("a rank's file");
    let mut bytes = fs::read(&file).expect("bytes");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&file, &bytes).expect("write");
    let name = file.file_name().expect("a name");
    name.to_string_lossy().into_owned()
}

#[test]
fn the_last_checkpoint_of_a_run_verifies_and_says_what_it_holds() {
    let run = Run::new(SMALL).set("train.steps=6");
    run.complete();
    assert_eq!(run.checkpoints().last(), Some(&6));
    let folder = run.checkpoint(6);
    let output = checkpoint("verify", &folder, &[]);
    assert!(output.status.success(), "{}", text(&output));
    let output = checkpoint("inspect", &folder, &["--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let (facts, manifest) = (run.summary()["facts"].clone(), &said["manifest"]);
    assert_eq!(manifest["state"]["step"], 6);
    assert_eq!(manifest["world"], 2);
    assert_eq!(said["parameters"], facts["parameters"]);
    for digest in ["model_digest", "tokenizer_digest", "data_digest"] {
        assert_eq!(manifest["info"][digest], facts[digest], "{digest}");
    }
}

#[test]
fn c2_a_finished_run_with_a_damaged_last_checkpoint_keeps_its_export_and_makes_no_other() {
    let run = Run::new(SMALL).set("train.steps=6");
    run.complete();
    assert_eq!(run.checkpoints(), [5, 6]);
    let exported = run.exported();
    let file = flip(&run.checkpoint(6));
    let said = text(&run.complete());
    assert!(said.contains(&file), "no `{file}` in: {said}");
    assert!(run.exported() == exported, "the export changed");

    // Step 5 verifies, but it is not what the run ended with.
    fs::remove_dir_all(run.path("export")).expect("remove the export");
    let output = run.output();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("holds its last step, 6"), "{said}");
    assert!(!run.path("export").exists(), "an export of other weights");
}

#[test]
fn an_export_by_hand_is_the_runs_own_and_has_what_transformers_reads() {
    let run = Run::new(SMALL).set("train.steps=2");
    run.complete();
    let out = run.folder().join("by-hand");
    let output = checkpoint(
        "export",
        &run.path("checkpoints"),
        &["--out", &out.display().to_string()],
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

#[test]
fn a_runs_adapter_is_that_of_peft_and_its_merged_export_scores_the_same() {
    let run = Run::new(SMALL)
        .set("adapter.kind=lora")
        .set("adapter.rank=4")
        .set("adapter.targets=[\"q_proj\", \"down_proj\"]");
    run.complete();
    let config = fs::read_to_string(run.path("adapter/adapter_config.json")).expect("an adapter");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(
        (&config["peft_type"], &config["r"]),
        (&"LORA".into(), &4.into())
    );
    assert_eq!(
        config["target_modules"],
        serde_json::json!(["q_proj", "down_proj"])
    );
    let card = fs::read_to_string(run.path("export/README.md")).expect("a card");
    assert!(card.contains("(LoRA) of rank 4"), "{card}");

    let score = |model: &Path, adapter: &[&str]| -> Vec<Value> {
        let out = run.folder().join("scores.jsonl");
        let output = Command::new(program("worker"))
            .current_dir(tests::workspace_root())
            .args([
                "score",
                "--data",
                "configs/quickstart/eval.jsonl",
                "--model",
            ])
            .arg(model)
            .args(adapter)
            .arg("--out")
            .arg(&out)
            .output()
            .expect("the program starts");
        assert!(output.status.success(), "{}", text(&output));
        let lines = fs::read_to_string(&out).expect("scores");
        let rows = lines
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"));
        rows.collect()
    };
    let base = Path::new("configs/quickstart/reference");
    let adapter = run.path("adapter").display().to_string();
    let merged = score(&run.path("export"), &[]);
    let beside = score(base, &["--adapter", &adapter]);
    let (mut apart, mut moved) = (0f64, 0f64);
    let alone = score(base, &[]);
    for ((merged, beside), alone) in merged.iter().zip(&beside).zip(&alone) {
        for key in ["chosen_logp", "rejected_logp"] {
            let of = |row: &Value| row[key].as_f64().expect("a number");
            // Relative to the log-prob, whose f32 has no more than 7 digits.
            apart = apart.max((of(merged) - of(beside)).abs() / of(beside).abs().max(1.0));
            moved = moved.max((of(merged) - of(alone)).abs());
        }
    }
    println!("merged and unmerged differ by {apart:.1e}, the adapter moved {moved:.2} nats");
    assert!(apart <= 1e-5 && moved > 0.5, "{apart} {moved}");

    // The same command again leaves both alone; by hand the same adapter comes out of the checkpoint.
    let weights = || fs::read(run.path("adapter/adapter_model.safetensors")).expect("weights");
    let (before, exported) = (weights(), run.exported());
    run.complete();
    assert!(weights() == before && run.exported() == exported);
    let by_hand = run.folder().join("by-hand");
    let out = by_hand.to_str().expect("a path in Unicode");
    let output = checkpoint(
        "export",
        &run.path("checkpoints"),
        &["--adapter", "--out", out],
    );
    assert!(output.status.success(), "{}", text(&output));
    let by_hand = fs::read(by_hand.join("adapter_model.safetensors")).expect("an adapter");
    assert!(by_hand == before, "another adapter");
}
