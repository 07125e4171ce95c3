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
    let incomplete = "is not a complete checkpoint";
    let absent = ": there is no such folder; name a checkpoint such as step-00000100";
    for (dir, words) in [
        (directory.path(), incomplete),
        (&*unfinished, incomplete),
        (&*directory.path().join("absent"), absent),
        (&*directory.path().join("step-00000300"), absent),
    ] {
        for command in ["inspect", "verify"] {
            let (code, _, err) = run(&[command], &[dir]);
            assert_eq!(code, 2, "{command} {dir:?}");
            assert!(err.contains(words), "{err}");
            assert!(err.contains(&dir.display().to_string()), "{err}");
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

/// Names of the entries of a directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn reshard_writes_another_world_size_and_diff_says_that_it_is_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (directory.path().join("old"), directory.path().join("new"));
    let path = save(&old, 20, 2).path;
    let out = new.to_str().unwrap();
    let (code, text, _) = run(
        &["reshard", "--world", "3", "--out", out, "--json"],
        &[&old],
    );
    assert_eq!(code, 0);
    assert_eq!(
        (&json(&text)["from_world"], &json(&text)["world"]),
        (&2.into(), &3.into())
    );
    assert_eq!(run(&["verify"], &[&new]).0, 0);
    let (code, text, _) = run(&["diff", "--all", "--exit-code"], &[&path, &new]);
    assert_eq!(code, 0, "{text}");
    assert!(text.ends_with("the same to the bit\n"), "{text}");
    // It is there now; another directory or the checkpoint's own must be meant.
    let (code, _, err) = run(&["reshard", "--world", "3", "--out", out], &[&old]);
    assert_eq!(code, 2);
    assert!(err.contains("is there already"), "{err}");
    let (code, _, err) = run(
        &["reshard", "--world", "1", "--out", old.to_str().unwrap()],
        &[&path],
    );
    assert_eq!(code, 2);
    assert!(err.contains("--in-place"), "{err}");
    for wrong in [
        &["--world", "0", "--in-place"][..],
        &["--world", "1"],
        &["--in-place"],
    ] {
        assert_eq!(
            run(&[&["reshard"], wrong].concat(), &[&path]).0,
            2,
            "{wrong:?}"
        );
    }
    let (code, text, _) = run(&["reshard", "--world", "1", "--in-place"], &[&path]);
    assert_eq!(code, 0);
    assert!(text.contains("step 20, 1 rank instead of 2"), "{text}");
    assert_eq!(
        names(&path),
        [
            "manifest.json",
            "rank-00000-of-00001.generation-5.safetensors"
        ]
    );
    assert_eq!(run(&["diff", "--all", "--exit-code"], &[&path, &new]).0, 0);
}

#[test]
fn diff_prints_norms_and_its_exit_code_says_different_when_asked() {
    let directory = tempfile::tempdir().unwrap();
    let a = save(directory.path(), 10, 2).path;
    let b = save(directory.path(), 20, 3).path;
    let (code, text, err) = run(&["diff"], &[&a, &b]);
    assert_eq!((code, err.as_str()), (0, ""));
    let line = text
        .lines()
        .find(|line| line.starts_with("model.norm.weight "))
        .unwrap();
    // Weights of step s and tensor t are s·10⁵ + t·10⁴ + index + 1/8.
    for part in [
        "2.0200e6",
        "4.0200e6",
        "2.0000e6",
        "9.9010e-1",
        "1.0000e6",
        "4 of 4",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(
        text.contains("all (weight) ") && !text.contains("moment"),
        "{text}"
    );
    let (code, text, _) = run(&["diff", "--all", "--json", "--exit-code"], &[&a, &b]);
    assert_eq!(code, 1);
    let found = json(&text);
    assert_eq!(
        (&found["a"]["world"], &found["b"]["step"]),
        (&2.into(), &20.into())
    );
    assert_eq!(found["diff"]["totals"][2]["kind"], "second_moment");
    assert_eq!(found["diff"]["tensors"][0]["max_abs"], 1e6);
    assert_eq!(run(&["diff"], &[&a, &directory.path().join("absent")]).0, 2);
}

/// Runs gc and gives back what it printed.
fn gc(dir: &Path, args: &[&str]) -> String {
    let (code, out, err) = run(&[&["gc"], args].concat(), &[dir]);
    assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
    out
}

#[test]
fn gc_removes_what_the_options_do_not_keep_and_says_so_before() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().join("checkpoints");
    for step in [10, 20, 30, 40, 50, 60] {
        save(&dir, step, 1);
    }
    write(&dir, 4, 35, 2, 0);
    write(&dir, 4, 70, 2, 0);
    let evaluations = "{\"step\":0,\"loss\":0.1}\n{\"step\":20,\"loss\":0.2,\"rewards/rejected\":null}\n\
                       {\"step\":50,\"loss\":0.5}\n{\"step\":60,\"lo";
    fs::write(directory.path().join("eval.jsonl"), evaluations).unwrap();
    let pinned = dir.join("step-00000010");
    let (code, text, _) = run(&["pin", "--note", "table 2"], &[&pinned]);
    assert_eq!(code, 0, "{text}");
    assert!(
        run(&["inspect"], &[&pinned])
            .1
            .contains("pinned       table 2")
    );

    // Without options only remains go.
    let text = gc(&dir, &["--dry-run"]);
    assert!(
        text.contains("step-00000035") && text.contains("1 of 8 would be removed"),
        "{text}"
    );
    let options = [
        "--keep-last",
        "1",
        "--keep-every",
        "30",
        "--keep-best",
        "loss",
    ];
    let text = gc(&dir, &[&options[..], &["--dry-run"]].concat());
    for (step, why) in [
        (70, "stays: unfinished"),
        (60, "stays: the newest"),
        (50, "goes: nothing keeps it"),
        (40, "goes: nothing keeps it"),
        (35, "goes: a save that was cut short"),
        (30, "stays: every so many steps"),
        (20, "stays: the best"),
        (10, "stays: pinned"),
    ] {
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("step-{step:08}")));
        assert!(
            line.is_some_and(|line| line.contains(why)),
            "{step} {why} in {text}"
        );
    }
    assert_eq!(names(&dir).len(), 8, "a dry run");
    let text = gc(&dir, &[&options[..], &["--json"]].concat());
    assert_eq!(json(&text)["removed"].as_array().unwrap().len(), 3);
    assert_eq!(json(&text)["folders"][2]["fate"], "old");
    let step = |step: u64| format!("step-{step:08}");
    assert_eq!(names(&dir), [10, 20, 30, 60, 70].map(step));
    let (code, _, _) = run(&["unpin"], &[&pinned]);
    assert_eq!(code, 0);
    gc(&dir, &["--keep-last", "1", "--unfinished"]);
    assert_eq!(names(&dir), [60].map(step));
}

#[test]
fn gc_refuses_what_it_cannot_decide() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().join("checkpoints");
    let path = save(&dir, 10, 1).path;
    save(&dir, 20, 1);
    let file = directory.path().join("eval.jsonl");
    fs::write(&file, "{\"step\":10,\"loss\":0.5}\n").unwrap();
    for (dir, args, cure) in [
        (&path, &[][..], "is not a directory of checkpoints"),
        (
            &dir.join("absent"),
            &[],
            "is not a directory of checkpoints",
        ),
        (&dir, &["--keep-every", "10"], "--keep-last"),
        (&dir, &["--keep-last", "0"], "--keep-last"),
        (
            &dir,
            &[
                "--keep-last",
                "1",
                "--keep-best",
                "lost",
                "--better",
                "lower",
            ],
            "they have: step, loss",
        ),
        (
            &dir,
            &["--keep-last", "1", "--keep-best", "logps/rejected"],
            "--better",
        ),
    ] {
        let (code, out, err) = run(&[&["gc"], args].concat(), &[dir]);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}");
        assert!(err.contains(cure), "{args:?}: {err}");
    }
    fs::write(&file, "{\"step\":10,\"loss\":0.5}\n{\"step\":10,\n{}\n").unwrap();
    let best = ["gc", "--keep-last", "1", "--keep-best", "loss"];
    let (code, _, err) = run(&best, &[&dir]);
    assert_eq!(code, 1);
    assert!(err.contains("line 2"), "{err}");
    fs::remove_file(&file).unwrap();
    let (code, _, err) = run(&best, &[&dir]);
    assert_eq!(code, 1);
    assert!(
        err.contains("eval.jsonl") && err.contains("--evaluations"),
        "{err}"
    );
    // A run that is at work there.
    let lock = storage::Lock::acquire(&directory.path().join(".lock")).unwrap();
    for args in [
        &["gc", "--keep-last", "1"][..],
        &["reshard", "--world", "3", "--in-place"],
    ] {
        let (code, _, err) = run(args, &[&dir]);
        assert_eq!(code, 75, "{err}");
        assert!(err.contains("held by process"), "{err}");
    }
    gc(&dir, &["--keep-last", "1", "--dry-run"]);
    drop(lock);
    assert_eq!(names(&dir).len(), 2, "nothing went");
    gc(&dir, &["--keep-last", "1"]);
    assert_eq!(names(&dir), ["step-00000020"]);
}

#[test]
fn a_pin_names_a_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), 20, 2).path;
    write(directory.path(), 4, 30, 2, 0);
    for command in ["pin", "unpin"] {
        let (code, _, err) = run(&[command], &[directory.path()]);
        assert_eq!(code, 2);
        assert!(err.contains("step-00000100"), "{err}");
        assert_eq!(
            run(&[command], &[&directory.path().join("step-00000030")]).0,
            2
        );
        assert_eq!(run(&[command], &[&path]).0, 0);
    }
    let (code, text, _) = run(&["inspect", "--json"], &[&path]);
    assert_eq!((code, &json(&text)["pinned"]), (0, &Value::Null));
}

/// Scripts branch on these.
#[test]
fn help_states_the_exit_codes() {
    let (code, text, _) = run(&["--help"], &[]);
    assert_eq!(code, 0);
    for part in ["0 done", "1 damaged", "2 bad usage", "75 a run"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn an_error_of_a_file_tells_its_cause_once() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (code, _, err) = run(&["verify"], &[file.path()]);
    assert_eq!(code, 1);
    assert_eq!(err.matches("Not a directory").count(), 1, "{err}");
}
