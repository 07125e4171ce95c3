//! Five steps of Cal-DPO with AdamW against transformers and torch in f64, from their files to their numbers.

use std::fs;

use crate::support::{Script, fixture, relative_error, run};
use serde_json::Value;
use spec::Spec;

/// f32 against f64 over five steps.
const TOLERANCE: f64 = 1e-4;

fn check(name: &str) {
    let Some(dir) = fixture(name) else { return };
    let golden: Value =
        serde_json::from_str(&fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
    let store = tempfile::tempdir().unwrap();
    for (title, trajectory) in golden["trajectories_f64"].as_object().unwrap() {
        let pairs = dir.join("pairs.jsonl");
        let number = |key: &str| trajectory[key].as_f64();
        let text = format!(
            "model.path = {dir:?}\nreference.store = {:?}\ndata.train = [{pairs:?}]\ndata.eval = [{pairs:?}]\n\
             data.shuffle = false\nobjective = {{ kind = \"cal_dpo\", beta = {:?}, calibration_weight = {:?} }}\n\
             optimizer = {{ learning_rate = {:?}, max_grad_norm = {:?}, weight_decay = {:?}, eps = {:?} }}\n\
             schedule = {{ kind = \"constant\", warmup_steps = 0 }}\ntrain = {{ steps = 5, batch_pairs = 6 }}\n",
            store.path(),
            number("beta").unwrap(),
            number("calibration_weight").unwrap(),
            number("lr").unwrap(),
            number("max_grad_norm").unwrap_or(0.0),
            number("weight_decay").unwrap(),
            number("eps").unwrap(),
        );
        let spec: Spec = toml::from_str(&text).unwrap();
        let script = Script {
            evaluate: true,
            ..Script::default()
        };
        let run = run(&spec, 1, &script);
        let mut worst = 0f64;
        let mut compare = |what: &str, found: f64, expected: &Value| {
            let error = relative_error(found, expected.as_f64().unwrap());
            assert!(
                error < TOLERANCE,
                "{name} {title} {what}: {found}, golden {expected}"
            );
            worst = worst.max(error);
        };
        let steps = trajectory["steps"].as_array().unwrap();
        for (report, golden) in run.reports.iter().zip(steps) {
            let step = report.step;
            compare(
                &format!("loss of step {step}"),
                report.loss,
                &golden["loss"],
            );
            let calibration = report.loss_calibration;
            compare(
                &format!("calibration of step {step}"),
                calibration,
                &golden["calibration"],
            );
            let (chosen, rejected) = (
                report.rewards.log_ratios_chosen,
                report.rewards.log_ratios_rejected,
            );
            compare(
                &format!("r_chosen of step {step}"),
                chosen,
                &golden["r_chosen"],
            );
            compare(
                &format!("r_rejected of step {step}"),
                rejected,
                &golden["r_rejected"],
            );
            compare(
                &format!("norm of step {step}"),
                report.grad_norm,
                &golden["grad_norm"],
            );
            // Exponentially small later on, so that r's own error shows in its relative one.
            let pairwise = golden["pairwise"].as_f64().unwrap();
            assert!((report.loss_pairwise - pairwise).abs() < 1e-6 + 1e-3 * pairwise);
        }
        let last = &run.evaluations.last().unwrap().0;
        let finals = trajectory["final_logps"].as_array().unwrap();
        let mean = |key: &str| {
            let sum: f64 = finals.iter().map(|pair| pair[key].as_f64().unwrap()).sum();
            Value::from(sum / finals.len() as f64)
        };
        compare(
            "final log π(chosen)",
            last.rewards.logps_chosen,
            &mean("chosen"),
        );
        compare(
            "final log π(rejected)",
            last.rewards.logps_rejected,
            &mean("rejected"),
        );
        println!("{name} {title}: largest relative error {worst:.1e}");
    }
}

#[test]
fn five_steps_of_llama_follow_the_golden_trajectories() {
    check("llama");
}

#[test]
fn five_steps_of_tied_llama3_follow_the_golden_trajectories() {
    check("llama3-tied");
}

#[test]
fn five_steps_of_windowed_mistral_follow_the_golden_trajectories() {
    check("mistral-window");
}
