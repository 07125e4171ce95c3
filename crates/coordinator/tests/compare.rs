//! Runs beside each other: the table, the notes, the plot, and folders that are no runs.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, path::PathBuf};

use coordinator::compare::{CompareError, Comparison, compare};
use serde_json::{Value, json};
use tempfile::TempDir;

const CAL_DPO: &str = "kind = 'cal_dpo'\nbeta = 0.1\ncalibration_weight = 1.0";
const DPO: &str = "kind = 'dpo'\nbeta = 0.1\nlabel_smoothing = 0.0";

/// Log-ratios of an evaluation or a step.
fn statistics(chosen: f64, rejected: f64) -> Value {
    json!({
        "loss": 1.5, "loss/pairwise": 0.25, "loss/calibration": 1.25, "rewards/chosen": 0.0,
        "rewards/rejected": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.875,
        "log_ratios/chosen": chosen, "log_ratios/rejected": rejected, "logps/chosen": -9.0,
        "logps/rejected": -9.0,
    })
}

fn merged(mut row: Value, more: &Value) -> String {
    let fields = row.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    format!("{row}\n")
}

struct Runs(TempDir);

impl Runs {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A completed run of `steps` steps whose log-ratios grow with the steps to `ends`, evaluated every other step.
    fn add(&self, folder: &str, objective: &str, steps: u64, ends: (f64, f64)) -> PathBuf {
        let path = self.path(folder);
        fs::create_dir(&path).unwrap();
        let at = |step: u64| {
            let part = step as f64 / steps as f64;
            statistics(ends.0 * part, ends.1 * part)
        };
        let metrics = (1..=steps).map(|step| {
            let row = json!({
                "step": step, "epoch": 0, "finite": true, "grad_norm": 1.0, "learning_rate": 0.1,
                "tokens": 100, "pairs": 8, "tokens_per_second": 200.0, "world_size": 2,
                "generation": 1, "seconds": 0.5,
            });
            merged(row, &at(step))
        });
        let evaluations = (0..=steps).filter(|step| step.is_multiple_of(2));
        let evaluations =
            evaluations.map(|step| merged(json!({"step": step, "pairs": 5}), &at(step)));
        let summary = json!({
            "outcome": "completed",
            "totals": {"steps": steps},
            "facts": {
                "steps_total": steps, "pairs": 8, "eval_pairs": 5, "parameters": 10,
                "model_digest": "m", "tokenizer_digest": "t", "data_digest": "d", "committed": 0,
            },
        });
        let config = format!("[job]\nname = '{folder}'\n[objective]\n{objective}\n");
        for (name, text) in [
            ("config.toml", config),
            ("run.json", "{}".into()),
            ("metrics.jsonl", metrics.collect()),
            ("eval.jsonl", evaluations.collect()),
            ("summary.json", summary.to_string()),
        ] {
            fs::write(path.join(name), text).unwrap();
        }
        path
    }

    fn try_compare(&self, directories: &[PathBuf], json: bool) -> anyhow::Result<String> {
        compare(&Comparison {
            directories: directories.to_vec(),
            json,
            out: self.path("out"),
        })
    }

    fn compare(&self, directories: &[PathBuf]) -> String {
        let text = self.try_compare(directories, false).unwrap();
        println!("{text}");
        text
    }

    fn svg(&self) -> String {
        let png = fs::read(self.path("out/compare.png")).unwrap();
        assert!(png.starts_with(b"\x89PNG"));
        fs::read_to_string(self.path("out/compare.svg")).unwrap()
    }
}

#[track_caller]
fn check(text: &str, says: &[&str], silent: &[&str]) {
    for part in says {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    for part in silent {
        assert!(!text.contains(part), "`{part}` is in:\n{text}");
    }
}

/// The cells of a run's row.
fn cells(text: &str, name: &str) -> Vec<String> {
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("│ {name} ")));
    let cells = line.unwrap().trim_matches('│').split('┆');
    cells.map(|cell| cell.trim().to_owned()).collect()
}

#[test]
fn a_row_per_run_and_a_hue_per_run() {
    let runs = Runs::new();
    let cal = runs.add("calibrated", CAL_DPO, 4, (2.5, -4.25));
    let dpo = runs.add("plain", DPO, 6, (-52.9, -173.0));
    let text = runs.compare(&[cal.clone(), dpo, cal]);
    assert_eq!(
        cells(&text, "calibrated"),
        [
            "calibrated",
            "cal_dpo, β 0.1",
            "4",
            "held-out, step 4",
            "+2.5",
            "−4.25",
            "+6.75",
            "0.875",
            "16",
            "completed"
        ]
    );
    assert_eq!(cells(&text, "plain")[4..7], ["−52.9", "−173", "+120"]);
    assert_eq!(
        text.matches("│ calibrated").count(),
        1,
        "given twice, shown once"
    );
    check(
        &text,
        &[
            "left out, because the objectives define it differently: pairwise loss",
            "compare.png",
        ],
        &["training", "other data"],
    );
    let says = [
        "calibrated · cal_dpo, β 0.1",
        "plain · dpo, β 0.1",
        "signed log scale",
        "−173",
        "held-out pairs",
        "#0072B2",
        "#D55E00",
    ];
    check(&runs.svg(), &says, &["#009E73", "training"]);
}

#[test]
fn loss_terms_are_shown_where_they_compare() {
    let runs = Runs::new();
    let one = runs.add("one", CAL_DPO, 4, (2.5, -4.25));
    let two = runs.add("two", &CAL_DPO.replace("0.1", "0.05"), 4, (3.0, -5.0));
    let both = runs.compare(&[one.clone(), two]);
    check(
        &both,
        &["pairwise loss", "differently: calibration loss"],
        &[],
    );
    assert_eq!(cells(&both, "one")[8], "0.25");
    let alone = runs.compare(&[one]);
    assert_eq!(cells(&alone, "one")[8..10], ["0.25", "1.25"]);
    check(&alone, &[], &["left out"]);
    check(&runs.svg(), &["(nats)"], &["signed log"]);
}

#[test]
fn runs_without_evaluations_show_training_rows_and_say_so() {
    let runs = Runs::new();
    let none = runs.add("none", CAL_DPO, 4, (2.0, -4.0));
    fs::remove_file(none.join("eval.jsonl")).unwrap();
    let only_before = runs.add("before", CAL_DPO, 20, (2.0, -4.0));
    let rows = fs::read_to_string(only_before.join("eval.jsonl")).unwrap();
    let first = format!("{}\n", rows.lines().next().unwrap());
    fs::write(only_before.join("eval.jsonl"), first).unwrap();
    let text = runs.compare(&[none, only_before]);
    // Means of steps 1 to 4 and of the last 10 steps.
    assert_eq!(
        cells(&text, "none")[3..6],
        ["training, 1 – 4", "+1.25", "−2.5"]
    );
    assert_eq!(
        cells(&text, "before")[3..6],
        ["training, 11 – 20", "+1.55", "−3.1"]
    );
    check(
        &text,
        &["last training batches: none, before"],
        &["held-out"],
    );
    check(
        &runs.svg(),
        &["none · cal_dpo, β 0.1 · training", "training pairs"],
        &[],
    );
}

#[test]
fn a_run_that_goes_on_is_read_as_it_stands() {
    let runs = Runs::new();
    let path = runs.add("on", CAL_DPO, 4, (2.0, -4.0));
    let metrics = fs::read_to_string(path.join("metrics.jsonl")).unwrap();
    let kept: String = metrics.split_inclusive('\n').take(3).collect();
    // A fourth row that is being written, and a summary of another time.
    fs::write(path.join("metrics.jsonl"), format!("{kept}{{\"step\": 4")).unwrap();
    let text = runs.compare(std::slice::from_ref(&path));
    assert_eq!(cells(&text, "on")[2], "3 of 4");
    assert_eq!(cells(&text, "on").last().unwrap(), "unfinished");
    fs::remove_file(path.join("summary.json")).unwrap();
    assert_eq!(cells(&runs.compare(&[path]), "on")[2], "3");
}

#[test]
fn runs_of_one_name_and_of_other_inputs_are_told_apart() {
    let runs = Runs::new();
    let one = runs.add("one", CAL_DPO, 4, (2.0, -4.0));
    let two = runs.add("two", CAL_DPO, 4, (2.0, -4.0));
    let summary = fs::read_to_string(two.join("summary.json")).unwrap();
    fs::write(
        two.join("summary.json"),
        summary.replace("\"d\"", "\"other\""),
    )
    .unwrap();
    let text = runs.compare(&[one.clone(), two.clone()]);
    check(
        &text,
        &["other data than one: two"],
        &["other starting weights"],
    );
    fs::copy(one.join("config.toml"), two.join("config.toml")).unwrap();
    let text = runs.compare(&[one.clone(), two.clone()]);
    for path in [one, two] {
        check(&text, &[&format!("one ({})", path.display())], &[]);
    }
}

#[test]
fn json_has_the_numbers_unrounded() {
    let runs = Runs::new();
    let path = runs.add("one", CAL_DPO, 4, (2.0 / 3.0, -4.0));
    let text = runs.try_compare(&[path], true).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let run = &value["runs"][0];
    assert_eq!(run["objective"]["beta"], 0.1);
    assert_eq!(run["measured"]["on"], "held_out");
    assert_eq!(
        run["measured"]["statistics"]["log_ratios/chosen"],
        2.0 / 3.0
    );
    assert_eq!(run["totals"]["pairs_per_second"], 16.0);
    assert!(value["plot"].as_str().unwrap().ends_with("compare.png"));
}

#[test]
fn completions_without_rejected_sides_are_rows_without_a_plot() {
    let runs = Runs::new();
    let path = runs.add("letters", "kind = 'sft'", 4, (0.0, 0.0));
    let text = runs.compare(&[path]);
    assert_eq!(cells(&text, "letters")[4..8], ["–"; 4]);
    check(&text, &["no plot"], &["compare.png"]);
    assert!(!runs.path("out").exists());
}

#[test]
fn folders_that_are_no_runs_are_refused_together() {
    let runs = Runs::new();
    let good = runs.add("good", CAL_DPO, 4, (2.0, -4.0));
    let directories = [
        good.clone(),
        runs.path("nowhere"),
        runs.path(""),
        good.join("metrics.jsonl"),
        runs.path("empty"),
    ];
    fs::create_dir(runs.path("empty")).unwrap();
    let error = runs.try_compare(&directories, false).unwrap_err();
    let says = [
        "nowhere does not exist",
        "is no run directory, but holds 1",
        "metrics.jsonl is a file",
        "empty is no run directory: it has no run.json and config.toml",
    ];
    check(&error.to_string(), &says, &["good "]);
    assert!(error.downcast_ref::<CompareError>().unwrap().is_usage());
    assert!(!runs.path("out").exists());
}

#[test]
fn a_reference_store_beside_the_runs_is_passed_over() {
    let runs = Runs::new();
    let run = runs.add("one", CAL_DPO, 4, (2.0, -4.0));
    let store = runs.path("reference-store");
    fs::create_dir_all(store.join("0f".repeat(32))).unwrap();
    let tokens = runs.path("data-cache");
    fs::create_dir_all(&tokens).unwrap();
    fs::write(tokens.join(format!("{}.pairs", "a1".repeat(32))), "tokens").unwrap();
    let text = runs.compare(&[store.clone(), tokens, run]);
    check(&text, &["│ one"], &["reference-store", "data-cache"]);
    let error = runs.try_compare(&[store], false).unwrap_err();
    check(
        &error.to_string(),
        &["reference-store is a store of reference values or tokens, not a run"],
        &[],
    );
    assert!(error.downcast_ref::<CompareError>().unwrap().is_usage());
}

#[test]
fn damage_is_named_with_its_line() {
    let runs = Runs::new();
    let path = runs.add("one", CAL_DPO, 4, (2.0, -4.0));
    let rows = fs::read_to_string(path.join("eval.jsonl")).unwrap();
    fs::write(
        path.join("eval.jsonl"),
        rows.replacen("\"step\":2", "\"step\":x", 1),
    )
    .unwrap();
    let error = runs
        .try_compare(std::slice::from_ref(&path), false)
        .unwrap_err();
    check(&error.to_string(), &["eval.jsonl:2: not a row"], &[]);
    assert!(!error.downcast_ref::<CompareError>().unwrap().is_usage());
    fs::write(path.join("config.toml"), "[job]\nname = 'one'\n").unwrap();
    let error = runs.try_compare(&[path], false).unwrap_err();
    check(
        &error.to_string(),
        &["config.toml: [objective] is missing"],
        &[],
    );
}
