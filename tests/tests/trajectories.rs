//! The whole program against transformers and torch: training trajectories computed in f64, and log-probs through
//! `worker score`.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tests::programs::{Run, program, shared, text};
use tests::workspace_root;

/// All but qwen2, whose golden token ids are not what its tokenizer.json gives; `model` tests it on those ids.
const FIXTURES: [&str; 7] = [
    "llama",
    "llama3-tied",
    "mistral-window",
    "qwen3",
    "gemma3",
    "phi3",
    "gpt-neox",
];

/// Relative; f32 against f64 over five steps. Measured worst: 1e-5.
const TOLERANCE: f64 = 1e-4;

/// Relative difference, by which an expected zero must be found to `TOLERANCE` itself.
fn error(found: &Value, expected: &Value) -> f64 {
    let (found, expected) = (
        found.as_f64().expect("a number"),
        expected.as_f64().expect("a number"),
    );
    (found - expected).abs() / expected.abs().max(1.0)
}

/// What `worker score` says of the fixture's pairs under `model`.
fn scores(model: &Path, fixture: &Path, more: &[&str]) -> Vec<Value> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("scores.jsonl");
    let output = Command::new(program("worker"))
        .args(["score", "--model"])
        .arg(model)
        .arg("--data")
        .arg(fixture.join("pairs.jsonl"))
        .arg("--out")
        .arg(&out)
        .args(more)
        .current_dir(workspace_root())
        .output()
        .expect("the worker starts");
    assert!(output.status.success(), "{}", text(&output));
    let text = fs::read_to_string(out).expect("scores");
    let rows: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("a row is JSON"))
        .collect();
    assert_eq!(rows.len(), 6);
    rows
}

fn golden(fixture: &Path) -> Value {
    let text = fs::read_to_string(fixture.join("golden.json")).expect("a golden file");
    serde_json::from_str(&text).expect("JSON")
}

fn config(fixture: &Path, trajectory: &Value) -> String {
    let dir = fixture.display();
    let clip = trajectory["max_grad_norm"].as_f64().unwrap_or(0.0);
    let number = |key: &str| trajectory[key].as_f64().expect(key);
    assert_eq!(trajectory["schedule"], "constant");
    format!(
        "[model]\npath = \"{dir}\"\n\
         [data]\ntrain = [\"{dir}/pairs.jsonl\"]\neval = [\"{dir}/pairs.jsonl\"]\nshuffle = false\n\
         [objective]\nkind = \"cal_dpo\"\nbeta = {:?}\ncalibration_weight = {:?}\n\
         [optimizer]\nlearning_rate = {:?}\nbetas = {}\neps = {:?}\nweight_decay = {:?}\nmax_grad_norm = {clip:?}\n\
         [schedule]\nkind = \"constant\"\nwarmup_steps = 0\n\
         [train]\nsteps = {}\nbatch_pairs = {}\nmicro_batch_tokens = 64\n\
         [evaluate]\nsamples = 0\n\
         [cluster]\nworkers = 2\n",
        number("beta"),
        number("calibration_weight"),
        number("lr"),
        trajectory["betas"],
        number("eps"),
        number("weight_decay"),
        trajectory["steps"].as_array().expect("steps").len(),
        trajectory["batch"],
    )
}

#[test]
fn a_job_follows_the_trajectories_of_transformers_and_torch() {
    let Some(shared) = shared() else { return };
    let (mut worst, mut worst_export) = (0f64, 0f64);
    for name in FIXTURES {
        let fixture = shared.join("fixtures/hf").join(name);
        let golden = golden(&fixture);
        let trajectories = golden["trajectories_f64"]
            .as_object()
            .expect("trajectories");
        assert_eq!(trajectories.len(), 3, "{name}");
        for (kind, trajectory) in trajectories {
            let run = Run::new(&config(&fixture, trajectory));
            run.complete();
            let rows = run.metrics();
            let steps = trajectory["steps"].as_array().expect("steps");
            assert_eq!(rows.len(), steps.len(), "{name} {kind}");
            for (row, step) in rows.iter().zip(steps) {
                // The pairwise term shrinks exponentially, so its own relative error says little; the loss holds it.
                for (found, expected) in [
                    ("loss", "loss"),
                    ("loss/calibration", "calibration"),
                    ("log_ratios/chosen", "r_chosen"),
                    ("log_ratios/rejected", "r_rejected"),
                    ("grad_norm", "grad_norm"),
                ] {
                    let error = error(&row[found], &step[expected]);
                    worst = worst.max(error);
                    assert!(
                        error <= TOLERANCE,
                        "{name} {kind} step {}: {found} {} for {}",
                        row["step"],
                        row[found],
                        step[expected]
                    );
                }
                assert_eq!(row["learning_rate"], trajectory["lr"], "{name} {kind}");
            }
            // The weights after the last update are the ones that are exported.
            let rows = scores(&run.path("export"), &fixture, &[]);
            for (index, row) in rows.iter().enumerate() {
                for side in ["chosen", "rejected"] {
                    let (found, expected) = (
                        &row[format!("{side}_logp")],
                        &trajectory["final_logps"][index][side],
                    );
                    let error = error(found, expected);
                    worst_export = worst_export.max(error);
                    assert!(
                        error <= TOLERANCE,
                        "{name} {kind} export, pair {index}: {side} {found} for {expected}"
                    );
                }
            }
        }
    }
    println!("largest relative error {worst:.1e}, of the export's log-probs {worst_export:.1e}");
}

#[test]
fn scored_log_probs_and_token_ids_are_those_of_transformers() {
    let Some(shared) = shared() else { return };
    let mut worst = 0f64;
    for name in FIXTURES {
        let fixture = shared.join("fixtures/hf").join(name);
        let golden = golden(&fixture);
        let rows = scores(&fixture, &fixture, &["--ids"]);
        for (index, row) in rows.iter().enumerate() {
            assert_eq!(row["index"], index);
            let ids = &golden["token_ids"][index];
            assert_eq!(row["prompt_ids"], ids["prompt"], "{name} pair {index}");
            for side in ["chosen", "rejected"] {
                assert_eq!(row[format!("{side}_ids")], ids[side], "{name} pair {index}");
                let tokens = ids[side].as_array().expect("ids").len();
                assert_eq!(row[format!("{side}_tokens")], tokens, "{name} pair {index}");
                let (found, expected) = (
                    &row[format!("{side}_logp")],
                    &golden["logps_f64"][index][side],
                );
                let error = error(found, expected);
                worst = worst.max(error);
                assert!(
                    error <= TOLERANCE,
                    "{name} pair {index} {side}: {found} for {expected}"
                );
            }
        }
    }
    println!("largest relative error of a log-prob {worst:.1e}");
}
