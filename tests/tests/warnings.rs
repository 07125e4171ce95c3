//! Warnings of real runs: what they say and where, what a resumed run repeats (nothing), and runs that must not be warned of.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tests::programs::{Run, SMALL, text};
use tests::workspace_root;

const TRAINED: &str = "reference-trained-on-chosen";
const BELOW_ZERO: &str = "chosen-below-zero";

/// SMALL with these replacements.
fn with(replaced: &[(&str, &str)]) -> String {
    let mut config = SMALL.to_owned();
    for (from, to) in replaced {
        assert!(config.contains(from), "{from}");
        config = config.replacen(from, to, 1);
    }
    config
}

/// Kinds and steps of the warnings in `events.jsonl`, in order.
fn warned(run: &Run) -> Vec<(String, u64)> {
    let events = run.rows("events.jsonl").into_iter();
    let warnings = events.filter(|event| event["kind"] == "warning");
    warnings
        .map(|event| {
            let kind = event["warning"].as_str().expect("a kind").to_owned();
            (kind, event["step"].as_u64().expect("a step"))
        })
        .collect()
}

/// The text of the only warning of `kind`, which console, events and summary all tell.
fn told(run: &Run, said: &str, kind: &str) -> String {
    let events = run.rows("events.jsonl");
    let of_kind = |rows: &[Value], name: &str| -> Vec<String> {
        let rows = rows.iter().filter(|row| row[name] == kind);
        rows.map(|row| row["text"].as_str().expect("a text").to_owned())
            .collect()
    };
    let warnings = of_kind(&events, "warning");
    assert_eq!(warnings.len(), 1, "{kind}: {:?}", warned(run));
    let summary = run.summary();
    let summed = summary["warnings"].as_array().expect("a list");
    assert_eq!(of_kind(summed, "kind"), warnings);
    // Wrapped on the console, once when it is seen and once at the end.
    let squeezed: String = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let times = squeezed.matches(warnings[0].as_str()).count();
    assert_eq!(times, 2, "{kind} on the console: {said}");
    println!("{}", warnings[0]);
    warnings[0].clone()
}

fn check(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in: {text}");
    }
}

/// A model that has learned 128 chosen letters by heart.
fn overfitted(folder: &Path) -> Run {
    let pairs = fs::read_to_string(workspace_root().join("configs/quickstart/train.jsonl"));
    let few: Vec<String> = pairs
        .expect("pairs")
        .lines()
        .take(128)
        .map(str::to_owned)
        .collect();
    fs::write(folder.join("few.jsonl"), few.join("\n")).expect("write pairs");
    let train = format!("data.train=[\"{}\"]", folder.join("few.jsonl").display());
    let sft = with(&[
        ("kind = \"cal_dpo\"\nbeta = 0.1", "kind = \"sft\""),
        ("learning_rate = 1e-3", "learning_rate = 5e-3"),
        (
            "steps = 24\nbatch_pairs = 24",
            "steps = 200\nbatch_pairs = 32",
        ),
        ("every_steps = 8", "samples = 0"),
        ("samples = 1\n", ""),
    ]);
    let run = Run::new(&sft).set(&train);
    run.complete();
    run
}

#[test]
fn a_reference_that_learned_the_chosen_letters_by_heart_is_told() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let reference = overfitted(folder.path());
    let config = with(&[
        (
            "steps = 24\nbatch_pairs = 24",
            "steps = 20\nbatch_pairs = 8",
        ),
        ("batch_pairs = 32\nsamples = 1", "samples = 0"),
    ]);
    let few = format!(
        "data.train=[\"{}\"]",
        folder.path().join("few.jsonl").display()
    );
    let on_it = format!("model.path={}", reference.path("export").display());
    let run = Run::new(&config).set(&few).set(&on_it);
    let said = text(&run.complete());
    let warning = told(&run, &said, TRAINED);
    check(
        &warning,
        &[
            "seems to have been trained on these chosen",
            "standard errors",
            "model.reference",
        ],
    );

    // The same pairs on the reference that has never seen them.
    let run = Run::new(&config).set(&few);
    run.complete();
    assert_eq!(warned(&run), []);
}

#[test]
fn a_run_that_goes_well_is_warned_of_nothing_but_its_clipping() {
    let run = Run::new(&with(&[("steps = 24", "steps = 60")]));
    let said = text(&run.complete());
    let warning = told(&run, &said, "gradient-always-clipped");
    check(
        &warning,
        &["in 50 of the last 50 steps", "Usual for Cal-DPO"],
    );
    assert_eq!(warned(&run).len(), 1);
}

/// DPO with a weak β drives the chosen letters below zero.
fn falling() -> String {
    with(&[
        (
            "kind = \"cal_dpo\"\nbeta = 0.1",
            "kind = \"dpo\"\nbeta = 0.01",
        ),
        ("steps = 24", "steps = 60"),
    ])
}

#[test]
fn t3_warnings_of_a_run_killed_and_resumed_are_those_of_an_uninterrupted_one_each_once() {
    let whole = Run::new(&falling());
    let said = text(&whole.complete());
    let expected = warned(&whole);
    println!("{expected:?}");
    let warning = told(&whole, &said, BELOW_ZERO);
    check(&warning, &["for 25 steps", "objective.kind = \"cal_dpo\""]);
    let kinds: Vec<_> = expected.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds, ["margin-explosion", BELOW_ZERO, "margin-explosion"]);

    let run = Run::new(&falling());
    for warnings in [1, 2] {
        let mut coordinator = run.start();
        coordinator.wait_until("a warning", || warned(&run).len() >= warnings);
        coordinator.kill_everything();
    }
    run.complete();
    assert_eq!(warned(&run), expected);
    // A finished run that is started again says what it was warned of.
    let again = text(&run.complete());
    assert_eq!(warned(&run), expected);
    assert!(again.contains("below zero for 25 steps"), "{again}");
}

#[test]
fn what_is_wrong_with_the_data_is_told_before_training_with_numbers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("pairs.jsonl");
    let pairs = fs::read_to_string(workspace_root().join("configs/quickstart/train.jsonl"));
    let pairs = pairs.expect("pairs");
    let mut lines: Vec<&str> = pairs.lines().take(96).collect();
    lines.extend_from_within(..4);
    let same = r#"{"prompt": "Invite Ben.", "chosen": " Dear Ben", "rejected": " Dear Ben"}"#;
    lines.extend([
        same,
        same.replace("Ben", "Anna").leak(),
        same.replace("Ben", "Emma").leak(),
    ]);
    fs::write(&path, lines.join("\n")).expect("write pairs");
    let train = format!("data.train=[\"{}\"]", path.display());
    let run = Run::new(SMALL)
        .set(&train)
        .set("train.steps=1")
        .set("data.max_length=60");
    let output = run.complete();
    let warnings: Vec<_> = run
        .rows("events.jsonl")
        .into_iter()
        .filter(|event| event["kind"] == "warning")
        .map(|event| event["text"].as_str().expect("a text").to_owned())
        .collect();
    println!("{warnings:#?}");
    let report = fs::read_to_string(run.path("data-report.txt")).expect("a report");
    for words in [
        "training pairs: 4 of 103 (3.9 %) pairs repeat an earlier one",
        "training pairs: 3 of 103 (2.9 %) pairs have the same tokens in chosen and rejected",
        "pairs lost the end of a completion to data.max_length",
    ] {
        let found = warnings.iter().find(|warning| warning.contains(words));
        let found = found.unwrap_or_else(|| panic!("no `{words}` in {warnings:#?}"));
        let (_, line) = found.split_once(": ").expect("whose pairs, and what");
        assert!(report.contains(&format!("warning: {line}")), "{report}");
    }
    assert!(
        warnings.iter().any(|it| it.starts_with("held-out pairs: ")),
        "{warnings:#?}"
    );
    let said = text(&output);
    let listed = run.summary()["warnings"].as_array().expect("a list").len();
    assert_eq!(listed, warnings.len());
    assert!(
        said.contains("\nwarning: 4 of 103"),
        "the report on the console: {said}"
    );
}

#[test]
fn workers_without_a_pair_are_told_of_before_the_first_step() {
    let few = "steps = 5\nbatch_pairs = 1";
    let run = Run::new(&with(&[("steps = 24\nbatch_pairs = 24", few)]));
    let output = run.complete();
    let warning = told(&run, &text(&output), "idle-workers");
    check(
        &warning,
        &[
            "1 pair (train.batch_pairs) for 2 workers (cluster.workers)",
            "set cluster.workers to at most 1",
        ],
    );
    assert_eq!(warned(&run)[0], ("idle-workers".to_owned(), 0));
}

#[test]
fn the_log_of_a_run_without_a_console_has_its_warnings() {
    let run = Run::new(&falling());
    let mut command = run.command();
    let output = command.args(["--log", "json"]).output().expect("it starts");
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    let warning = said
        .lines()
        .find(|line| line.contains(BELOW_ZERO))
        .unwrap_or_else(|| panic!("{said}"));
    let line: Value = serde_json::from_str(warning).expect("JSON");
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["fields"]["kind"], BELOW_ZERO);
    check(
        line["fields"]["message"].as_str().expect("a text"),
        &["for 25 steps"],
    );
}

#[test]
fn the_stories_are_warned_of_for_what_dpo_does_to_them_and_never_of_their_reference() {
    let Some(shared) = tests::programs::shared() else {
        return;
    };
    for (name, expected) in [
        ("stories-cal-dpo-0.1", vec![]),
        ("stories-dpo-0.1", vec![BELOW_ZERO]),
    ] {
        let path = workspace_root().join(format!("configs/{name}.toml"));
        let config = fs::read_to_string(path).expect("a configuration");
        let config = config.replace("../shared", &shared.display().to_string());
        // The first epoch is what the reference is judged by.
        let run = Run::new(&config)
            .set("train.steps=40")
            .set("evaluate.every_steps=20")
            .set("evaluate.samples=0");
        run.complete();
        let kinds: Vec<_> = warned(&run).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, expected, "{name}");
    }
}
