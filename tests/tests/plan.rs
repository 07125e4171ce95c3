//! `coordinator plan` through the real programs: what it says against what a run then needs, and its refusals.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;
use tests::programs::{Run, SMALL, program, shared, text};
use tests::workspace_root;

/// Bad usage or configuration: do not try again.
const USAGE: i32 = 2;

const REFERENCE: &str = "configs/quickstart/reference";

fn plan(run: &Run, arguments: &[&str]) -> Output {
    let mut command = Command::new(program("coordinator"));
    command
        .arg("plan")
        .arg(run.folder().join("config.toml"))
        .args(["--set", &format!("job.output={}", run.path("").display())])
        .args([
            "--set",
            &format!("reference.store={}", run.folder().join("store").display()),
        ])
        .args(arguments)
        .current_dir(workspace_root());
    command.output().expect("the coordinator starts")
}

fn planned(run: &Run, arguments: &[&str]) -> Value {
    let output = plan(run, &[&["--json"], arguments].concat());
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn whole(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("no whole number: {value}"))
}

/// The highest memory of any worker of a complete run, in MiB, as the workers log it.
fn measured(run: &Run) -> u64 {
    let logs = fs::read_dir(run.path("logs")).expect("logs");
    let peaks = logs.map(|log| {
        let log = fs::read_to_string(log.expect("a log").path()).expect("text");
        let (_, peak) = log
            .rsplit_once("peak_memory_mib=")
            .expect("a worker says its peak");
        peak.split_whitespace()
            .next()
            .and_then(|it| it.parse().ok())
            .expect("a number")
    });
    peaks.max().expect("a worker")
}

#[test]
fn a_plan_says_memory_time_and_disk_and_leaves_nothing() {
    let run = Run::new(SMALL);
    let plan = planned(&run, &[]);
    assert_eq!(plan["fits"], true);
    assert_eq!(whole(&plan["run"]["steps"]), 24);
    assert_eq!(whole(&plan["run"]["pairs"]), 512);
    assert_eq!(whole(&plan["run"]["held_out_pairs"]), 32);
    let memory = &plan["memory"];
    assert_eq!(whole(&memory["workers"]), 2);
    let moments = memory["worker"]["moments"].as_array().expect("moments");
    let names: Vec<&str> = moments
        .iter()
        .filter_map(|it| it["name"].as_str())
        .collect();
    assert_eq!(
        names,
        [
            "read pairs",
            "load",
            "reference pass",
            "training step",
            "checkpoint",
            "evaluation"
        ]
    );
    for moment in moments {
        let parts = moment["parts"].as_object().expect("parts");
        assert_eq!(
            parts.values().map(whole).sum::<u64>(),
            whole(&moment["bytes"])
        );
    }
    // 114,048 parameters of 4 bytes.
    let step = &moments[3]["parts"];
    assert_eq!(whole(&step["weights"]), 456_192);
    assert_eq!(whole(&step["gradients"]), 456_192);

    let time = &plan["time"];
    assert!(
        time["total_seconds"].as_f64() > time["steps_seconds"].as_f64(),
        "{time}"
    );
    assert!(time["steps_seconds"].as_f64() > Some(0.0), "{time}");
    assert!(whole(&time["probe"]["steps"]) >= 1, "{time}");
    assert!(
        whole(&plan["disk"][0]["needed_bytes"]) > 3 * 12 * 114_048,
        "{plan}"
    );

    let quick = planned(&run, &["--no-probe"]);
    assert_eq!(quick["time"], Value::Null);
    let left = fs::read_dir(run.folder()).expect("the folder").count();
    assert_eq!(left, 1, "only the configuration is there");
}

#[test]
fn a_plan_counts_on_disk_what_this_run_lacks_and_not_what_others_have() {
    let run = Run::new(SMALL);
    run.complete();
    let bytes = |what: &str, arguments: &[&str]| {
        let plan = planned(&run, arguments);
        let disks = plan["disk"].as_array().expect("disks").iter();
        let items = disks.flat_map(|disk| disk["items"].as_array().expect("items"));
        let mut found = items.filter(|item| item["what"] == what);
        found.next().map_or(0, |item| whole(&item["bytes"]))
    };
    let elsewhere = format!("job.output={}", run.folder().join("other").display());
    let other = ["--set", &elsewhere];
    let unread = [&other[..], &["--no-probe"]].concat();
    // Two are kept, and lie there; one more while the next is written.
    let checkpoint = fs::metadata(run.checkpoint(24).join("manifest.json"));
    assert!(checkpoint.is_ok(), "{:?}", run.checkpoints());
    let kept = run.checkpoints().len() as u64;
    let all = bytes("checkpoints", &unread);
    let own = bytes("checkpoints", &["--no-probe"]);
    assert!(
        all - own > kept * 12 * 114_048,
        "{own} of {all}, with {kept} there"
    );
    assert_eq!(bytes("export", &["--no-probe"]), 0);
    assert!(bytes("export", &unread) > 4 * 114_048);
    // Whether the store has a run's values is known once it was looked into, with the weights' digest.
    let another = [&unread[..], &["--set", "data.max_length=40"]].concat();
    for arguments in [&["--no-probe"][..], &unread, &another] {
        assert!(bytes("reference log-probs", arguments) >= 40 * 2 * 512);
    }
    assert_eq!(bytes("reference log-probs", &other), 0);
    // Truncated pairs are other pairs.
    let truncated = [&other[..], &["--set", "data.max_length=40"]].concat();
    assert!(bytes("reference log-probs", &truncated) > 0);
}

#[test]
fn a_run_takes_about_the_memory_that_was_planned() {
    let check = |name: &str, run: &Run, arguments: &[&str]| {
        let plan = planned(run, &[&["--no-probe"], arguments].concat());
        let planned = whole(&plan["memory"]["worker"]["peak_bytes"]) as f64 / f64::from(1 << 20);
        run.complete();
        let measured = measured(run) as f64;
        println!("{name}: planned {planned:.1} MiB, measured {measured} MiB");
        let ratio = planned / measured;
        assert!(
            (0.7..1.4).contains(&ratio),
            "{name}: planned {planned}, measured {measured}"
        );
    };
    check("quickstart", &Run::new(SMALL), &[]);
    let Some(shared) = shared() else {
        return;
    };
    let data = shared.join("data/stories-preferences");
    let stories = SMALL
        .replace(
            REFERENCE,
            &shared.join("models/stories260k").display().to_string(),
        )
        .replace(
            "configs/quickstart/train.jsonl",
            &data.join("train.jsonl").display().to_string(),
        )
        .replace(
            "configs/quickstart/eval.jsonl",
            &data.join("test.jsonl").display().to_string(),
        )
        .replace("max_length = 128", "max_length = 512")
        .replace("steps = 24", "steps = 6")
        .replace("batch_pairs = 24", "batch_pairs = 64");
    check("stories", &Run::new(&stories), &[]);
    for setting in [
        "model.gradient_checkpointing=true",
        "train.micro_batch_tokens=512",
    ] {
        let run = Run::new(&stories).set(setting);
        check(setting, &run, &["--set", setting]);
    }
}

#[test]
fn a_model_that_no_machine_holds_is_refused_before_its_weights_are_read() {
    let run = Run::new(SMALL);
    let model = run.folder().join("model");
    fs::create_dir(&model).expect("a folder");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(
            workspace_root().join(REFERENCE).join(name),
            model.join(name),
        )
        .expect("copy");
    }
    let config = fs::read_to_string(workspace_root().join(REFERENCE).join("config.json"));
    let mut config: Value = serde_json::from_str(&config.expect("a config")).expect("JSON");
    config["intermediate_size"] = (1_u64 << 30).into();
    config["num_hidden_layers"] = 400.into();
    fs::write(model.join("config.json"), config.to_string()).expect("write");
    let set = format!("model.path={}", model.display());
    let output = plan(&run, &["--set", &set]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(USAGE), "{said}");
    for part in [
        "memory of each worker",
        "it does not fit",
        "error: 2 workers",
        "no setting makes it fit",
        "time: not measured, because it does not fit",
    ] {
        assert!(said.contains(part), "no `{part}` in: {said}");
    }
    let output = plan(&run, &["--set", &set, "--json"]);
    assert_eq!(output.status.code(), Some(USAGE));
    let plan: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(plan["fits"], false);
    assert!(whole(&plan["memory"]["least_bytes"]) > 1 << 40, "{plan}");
}

#[test]
fn what_training_would_refuse_a_plan_refuses() {
    let run = Run::new(SMALL);
    for (set, words) in [
        (
            "data.train=[\"absent.jsonl\"]",
            ["absent.jsonl", "data.train"],
        ),
        (
            "train.micro_batch_tokenz=3",
            ["micro_batch_tokenz", "did you mean"],
        ),
        (
            "model.path=configs",
            ["configs/tokenizer.json", "save_pretrained"],
        ),
        (
            "cluster.workers=1000000",
            ["cluster.workers is 1,000,000", "this machine has"],
        ),
    ] {
        let output = plan(&run, &["--set", set]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(USAGE), "{set}: {said}");
        assert!(output.stdout.is_empty(), "{set}: {said}");
        for word in words {
            assert!(said.contains(word), "{set}: no `{word}` in: {said}");
        }
    }
}
