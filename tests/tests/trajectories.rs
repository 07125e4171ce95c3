//! The whole program against transformers and torch: training trajectories computed in f64, and log-probs through
//! `worker score`.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tests::programs::{Run, program, shared};
use tests::workspace_root;

const FIXTURES: [&str; 3] = ["llama", "llama3-tied", "mistral-window"];

/// Relative; f32 against f64 over five steps. Measured worst: 1e-5.
const TOLERANCE: f64 = 1e-4;

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
    let mut worst = 0f64;
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
                    let (found_value, expected_value) = (
                        row[found].as_f64().expect(found),
                        step[expected].as_f64().expect(expected),
                    );
                    let error =
                        (found_value - expected_value).abs() / expected_value.abs().max(1.0);
                    worst = worst.max(error);
                    assert!(
                        error <= TOLERANCE,
                        "{name} {kind} step {}: {found} {found_value} for {expected_value}",
                        row["step"]
                    );
                }
            }
        }
    }
    println!("largest relative error {worst:.1e}");
}

#[test]
fn scored_log_probs_and_token_ids_are_those_of_transformers() {
    let Some(shared) = shared() else { return };
    for name in FIXTURES {
        let fixture = shared.join("fixtures/hf").join(name);
        let golden = golden(&fixture);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let out = folder.path().join("scores.jsonl");
        let status = Command::new(program("worker"))
            .args(["score", "--ids", "--model"])
            .arg(&fixture)
            .arg("--data")
            .arg(fixture.join("pairs.jsonl"))
            .arg("--out")
            .arg(&out)
            .current_dir(workspace_root())
            .status()
            .expect("the worker starts");
        assert!(status.success(), "{name}: {status}");
        let text = fs::read_to_string(out).expect("scores");
        let rows: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("a row is JSON"))
            .collect();
        assert_eq!(rows.len(), 6, "{name}");
        for (index, row) in rows.iter().enumerate() {
            assert_eq!(row["index"], index);
            let ids = &golden["token_ids"][index];
            assert_eq!(row["prompt_ids"], ids["prompt"], "{name} pair {index}");
            for side in ["chosen", "rejected"] {
                assert_eq!(row[format!("{side}_ids")], ids[side], "{name} pair {index}");
                let tokens = ids[side].as_array().expect("ids").len();
                assert_eq!(row[format!("{side}_tokens")], tokens, "{name} pair {index}");
                let found = row[format!("{side}_logp")].as_f64().expect("a log-prob");
                let expected = golden["logps_f64"][index][side]
                    .as_f64()
                    .expect("a log-prob");
                let error = (found - expected).abs();
                assert!(
                    error <= 1e-4,
                    "{name} pair {index} {side}: {found} for {expected}"
                );
            }
        }
    }
}
