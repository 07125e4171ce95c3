//! Five steps of Cal-DPO with AdamW against transformers and torch in f64, from their files to their numbers.

use std::fs;

use crate::support::{Script, fixture, relative_error, run};
use model::{Device, Model, Pack, PairTokens};
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

/// What is done wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Broken {
    Nothing,
    /// Every tensor is clipped by its own norm.
    ClipPerTensor,
    /// The mean over packs of their means over pairs.
    MeanOfMeans,
    /// β scales the sigmoid's argument too.
    BetaInside,
    /// Gradients are added up in bf16.
    Bf16Sums,
}

/// Largest relative error of r over the steps of the clipped trajectory, for a plain training loop that is `broken`.
fn error_of(dir: &std::path::Path, broken: Broken) -> f64 {
    let golden: Value =
        serde_json::from_str(&fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
    let trajectories = golden["trajectories_f64"].as_object().unwrap();
    let clipped = trajectories
        .values()
        .find(|it| it["max_grad_norm"].is_number());
    let golden_steps = clipped.unwrap();
    let number = |key: &str| golden_steps[key].as_f64().unwrap();
    let (beta, weight) = (number("beta"), number("calibration_weight"));
    let (rate, eps, most) = (number("lr"), number("eps"), number("max_grad_norm"));
    assert_eq!(golden_steps["weight_decay"].as_f64(), Some(0.0));
    let ids = |value: &Value| -> Vec<u32> {
        let ids = value.as_array().unwrap().iter();
        ids.map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let pairs: Vec<[Vec<u32>; 3]> = golden["token_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| ["prompt", "chosen", "rejected"].map(|key| ids(&pair[key])))
        .collect();
    let mut model = Model::load(dir, &Device::flex()).unwrap();
    // Packs of one and of five pairs.
    let packs = [&pairs[..1], &pairs[1..]].map(|pairs| {
        let tokens = pairs.iter().map(|[prompt, chosen, rejected]| PairTokens {
            prompt,
            chosen,
            rejected,
        });
        Pack::new(tokens)
    });
    let references = packs.each_ref().map(|pack| model.forward(pack).logps);
    let parameters = model.layout().parameters.clone();
    let lens = model.layout().bucket_lens();
    let zeros = || lens.iter().map(|&len| vec![0f64; len]).collect::<Vec<_>>();
    let (mut first, mut second) = (zeros(), zeros());
    let mut worst = 0f64;
    for (step, golden) in (1..).zip(golden_steps["steps"].as_array().unwrap()) {
        let mut gradients = zeros();
        let mut ratio = 0.0;
        for (pack, references) in packs.iter().zip(&references) {
            let (logps, saved) = model.forward_train(pack);
            let share = match broken {
                Broken::MeanOfMeans => 1.0 / (2.0 * references.len() as f64),
                _ => 1.0 / pairs.len() as f64,
            };
            let slopes = logps
                .logps
                .iter()
                .zip(references)
                .map(|(logps, references)| {
                    let [chosen, rejected] =
                        [0, 1].map(|side| f64::from(logps[side]) - f64::from(references[side]));
                    ratio += chosen / pairs.len() as f64;
                    let inside = if broken == Broken::BetaInside {
                        beta
                    } else {
                        1.0
                    };
                    let push = inside / (1.0 + (inside * (chosen - rejected)).exp());
                    let target = 0.5 / beta;
                    [
                        (share * (-push + 2.0 * weight * (chosen - target))) as f32,
                        (share * (push + 2.0 * weight * (rejected + target))) as f32,
                    ]
                });
            let slopes: Vec<_> = slopes.collect();
            let mut own = model.zero_gradients();
            model.backward(saved, &slopes, &mut own);
            for (sums, own) in gradients.iter_mut().flatten().zip(own.take_host().concat()) {
                *sums += f64::from(own);
                if broken == Broken::Bf16Sums {
                    let bits = (*sums as f32).to_bits();
                    *sums = f64::from(f32::from_bits((bits + 0x8000) & 0xffff_0000));
                }
            }
        }
        worst = worst.max(relative_error(ratio, golden["r_chosen"].as_f64().unwrap()));
        let norm = |values: &[f64]| values.iter().map(|g| g * g).sum::<f64>().sqrt();
        let whole = norm(&gradients.concat());
        let mut weights = model.take_weights();
        for parameter in &parameters {
            let (bucket, range) = (parameter.bucket, parameter.range());
            let length = match broken {
                Broken::ClipPerTensor => norm(&gradients[bucket][range.clone()]),
                _ => whole,
            };
            let clip = (most / (length + 1e-6)).min(1.0);
            for place in range {
                let gradient = clip * gradients[bucket][place];
                let (m, v) = (&mut first[bucket][place], &mut second[bucket][place]);
                *m = 0.9 * *m + 0.1 * gradient;
                *v = 0.999 * *v + 0.001 * gradient * gradient;
                let root = (*v / (1.0 - 0.999f64.powi(step))).sqrt() + eps;
                let moved = rate * *m / (1.0 - 0.9f64.powi(step)) / root;
                weights[bucket][place] -= moved as f32;
            }
        }
        model.put_weights(weights);
    }
    worst
}

#[test]
fn what_trainers_get_wrong_leaves_the_golden_trajectory() {
    // Negative controls: the same plain loop follows the trajectory until one thing is broken.
    let Some(dir) = fixture("llama") else { return };
    let right = error_of(&dir, Broken::Nothing);
    assert!(right < TOLERANCE, "{right}");
    for broken in [
        Broken::ClipPerTensor,
        Broken::MeanOfMeans,
        Broken::BetaInside,
        Broken::Bf16Sums,
    ] {
        let error = error_of(&dir, broken);
        println!("{broken:?}: {error:.1e}, right {right:.1e}");
        assert!(error > 3.0 * TOLERANCE, "{broken:?}: {error}");
    }
}
