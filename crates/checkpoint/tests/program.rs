//! The program's words and exit codes.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{fs, path::Path, process::Command};

use serde_json::Value;
use support::{save, write};

/// Runs the program; gives back exit code, standard output and standard error.
fn run(args: &[&str], paths: &[&Path]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_checkpoint"))
        .args(args)
        .args(paths)
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn inspect_tells_what_a_checkpoint_holds() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), 20, 2).path;
    // The folder, or the directory it lies in.
    for dir in [&*path, directory.path()] {
        let (code, out, _) = run(&["inspect", "--tensors"], &[dir]);
        assert_eq!(code, 0);
        for part in [
            "step         20 (epoch 1, 19 updates",
            "generation 4, 2 ranks",
            "45 parameters",
            "model.embed_tokens.weight [5, 4]",
        ] {
            assert!(out.contains(part), "{part} in {out}");
        }
        let (code, out, _) = run(&["inspect", "--json"], &[dir]);
        assert_eq!(code, 0);
        assert_eq!(json(&out)["manifest"]["state"]["step"], 20);
        assert_eq!(json(&out)["parameters"], 45);
    }
}

#[test]
fn verify_names_file_tensor_and_offset_and_exits_with_1() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), 10, 2);
    let path = save(directory.path(), 20, 2).path;
    let (code, out, _) = run(&["verify"], &[&path]);
    assert_eq!(code, 0);
    assert!(out.contains("every byte verified"), "{out}");

    let name = "rank-00001-of-00002.generation-4.safetensors";
    let mut bytes = fs::read(path.join(name)).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(path.join(name), &bytes).unwrap();
    let (code, out, err) = run(&["verify"], &[&path]);
    assert_eq!((code, out.as_str()), (1, ""));
    let offset = bytes.len() - 4;
    let expected = format!("damaged: {name} in second/scale@0 at bytes {offset}..");
    assert!(err.contains(&expected), "{err}");
    let (code, out, _) = run(&["verify", "--json"], &[&path]);
    assert_eq!(code, 1);
    let damage = &json(&out)["damages"][0];
    assert_eq!(damage["file"], name);
    assert_eq!(damage["tensor"], "second/scale@0");
    assert_eq!(damage["offset"], offset);

    let (code, out, err) = run(&["verify"], &[directory.path()]);
    assert_eq!(code, 1);
    assert!(out.contains("step-00000010: every byte verified"), "{out}");
    assert!(err.contains("step-00000020 is damaged"), "{err}");
}

#[test]
fn where_there_is_no_checkpoint_the_exit_code_is_2() {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), 4, 20, 2, 0);
    let unfinished = directory.path().join("step-00000020");
    for dir in [
        directory.path(),
        &*unfinished,
        &*directory.path().join("absent"),
    ] {
        for command in ["inspect", "verify"] {
            let (code, _, err) = run(&[command], &[dir]);
            assert_eq!(code, 2, "{command} {dir:?}");
            assert!(err.contains("is not a complete checkpoint"), "{err}");
        }
    }
    assert_eq!(run(&["inspect"], &[]).0, 2);
    assert_eq!(run(&["reshape"], &[&unfinished]).0, 2);
    assert_eq!(run(&["--help"], &[]).0, 0);
}

#[test]
fn export_writes_a_model_directory_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    save(&directory.path().join("checkpoints"), 20, 2);
    let checkpoints = directory.path().join("checkpoints");
    let export = |flags: &[&str]| {
        let mut args = vec!["export", "--model", model.to_str().unwrap()];
        args.extend(["--out", out.to_str().unwrap()]);
        args.extend(flags);
        run(&args, &[&checkpoints])
    };
    let (code, _, err) = export(&[]);
    assert_eq!(code, 2);
    assert!(err.contains("has no config.json"), "{err}");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    let (code, text, _) = export(&["--dtype", "bf16", "--json"]);
    assert_eq!(code, 0);
    assert_eq!(json(&text)["dtype"], "bf16");
    assert_eq!(json(&text)["parameters"], 45);
    assert!(out.join("model.safetensors").exists());
    let (code, text, _) = export(&["--max-shard-size", "0.1KB"]);
    assert_eq!((code, text.as_str()), (2, ""));
    let (code, text, _) = export(&["--max-shard-size", "96", "--json"]);
    assert_eq!(code, 0);
    // The source has no weights, so that their type is the checkpoint's.
    assert_eq!(json(&text)["dtype"], "f32");
    assert_eq!(
        json(&text)["weights"][1],
        "model-00002-of-00002.safetensors"
    );
    let (code, text, _) = export(&["--max-shard-size", "1KiB"]);
    assert_eq!(code, 0);
    assert!(text.contains("bytes in model.safetensors;"), "{text}");
    fs::remove_file(out.join("model.safetensors")).unwrap();
    let (code, _, err) = export(&[]);
    assert_eq!(code, 2);
    assert!(err.contains("not an earlier export"), "{err}");
}
