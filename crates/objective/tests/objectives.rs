//! The objectives against golden values that this project did not write, the paper's start values, and wrong versions.
#![allow(missing_docs, clippy::unwrap_used)]

use objective::{GlobalCounts, ObjectiveConfig, PairLogps, pair_loss, reward_statistics};
use serde_json::Value;

const ONE: GlobalCounts = GlobalCounts {
    pairs: 1,
    chosen_tokens: 1,
};

fn cal_dpo(beta: f64, calibration_weight: f64) -> ObjectiveConfig {
    ObjectiveConfig::CalDpo {
        beta,
        calibration_weight,
    }
}

/// A pair with the given log-ratios against a reference of −20 and −25.
fn pair(r_chosen: f64, r_rejected: f64) -> PairLogps {
    PairLogps {
        chosen: r_chosen - 20.0,
        rejected: r_rejected - 25.0,
        reference_chosen: -20.0,
        reference_rejected: -25.0,
        chosen_tokens: 12,
        rejected_tokens: 15,
    }
}

fn assert_close(got: f64, expected: f64, relative: f64, what: &str) {
    let bound = relative * expected.abs().max(1.0);
    assert!(
        (got - expected).abs() <= bound,
        "{what}: got {got}, expected {expected}"
    );
}

#[test]
fn values_and_derivatives_equal_the_golden_ones() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../shared/fixtures/losses.json"
    );
    let Ok(text) = std::fs::read_to_string(path) else {
        println!("skipped: ../shared is absent");
        return;
    };
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let mut checked = 0;
    for row in &rows {
        let number = |key: &str| row[key].as_f64().unwrap();
        let config = match row["loss"].as_str().unwrap() {
            "cal_dpo" => cal_dpo(number("beta"), number("calibration_weight")),
            "dpo" => ObjectiveConfig::Dpo {
                beta: number("beta"),
                label_smoothing: 0.0,
            },
            "cdpo" => ObjectiveConfig::Dpo {
                beta: number("beta"),
                label_smoothing: number("label_smoothing"),
            },
            _ => continue,
        };
        let logps = PairLogps {
            chosen: number("policy_chosen"),
            rejected: number("policy_rejected"),
            reference_chosen: number("reference_chosen"),
            reference_rejected: number("reference_rejected"),
            chosen_tokens: row["chosen_tokens"].as_u64().unwrap() as u32,
            rejected_tokens: row["rejected_tokens"].as_u64().unwrap() as u32,
        };
        let loss = pair_loss(&config, &logps, ONE);
        assert_close(loss.loss(), number("value"), 1e-9, &format!("{row}"));
        assert_close(loss.d_chosen, number("d_policy_chosen"), 1e-9, "d_chosen");
        assert_close(
            loss.d_rejected,
            number("d_policy_rejected"),
            1e-9,
            "d_rejected",
        );
        checked += 1;
    }
    assert!(checked >= 60, "only {checked} golden rows were compared");
}

#[test]
fn at_zero_log_ratios_the_loss_has_the_papers_start_value() {
    for (beta, weight, expected) in [
        (0.1, 1.0, 50.6931),
        (0.05, 1.0, 200.6931),
        (0.01, 1.0, 5000.6931),
        (0.002, 1.0, 125000.6931),
        (0.001, 1.0, 500000.6931),
        (0.1, 0.5, 25.6931),
        (0.002, 0.5, 62500.6931),
    ] {
        let loss = pair_loss(&cal_dpo(beta, weight), &pair(0.0, 0.0), ONE);
        assert_close(loss.loss(), expected, 1e-4, &format!("β {beta} λ {weight}"));
        assert_close(loss.pairwise, 2f64.ln(), 1e-15, "pairwise");
    }
}

#[test]
fn wrong_versions_seen_in_public_code_are_not_what_is_computed() {
    let (r_w, r_l, beta) = (1.5, -1.0, 0.1);
    let t = 0.5 / beta;
    let loss = pair_loss(&cal_dpo(beta, 1.0), &pair(r_w, r_l), ONE);
    let square = |x: f64| x * x;
    for (name, wrong) in [
        ("β·r", square(beta * r_w - t) + square(beta * r_l + t)),
        ("r_w² alone", square(r_w)),
        (
            "length-averaged",
            square(r_w / 12.0 - t) + square(r_l / 15.0 + t),
        ),
    ] {
        assert!((loss.calibration - wrong).abs() > 1e-3, "{name}");
    }
    // A detached calibration term would leave only the sigmoid's slope, which is at most 1.
    assert!(loss.d_chosen.abs() > 1.0);
}

#[test]
fn derivatives_equal_central_differences() {
    let configs = [
        cal_dpo(0.1, 1.0),
        ObjectiveConfig::Dpo {
            beta: 0.3,
            label_smoothing: 0.1,
        },
        ObjectiveConfig::Sft {},
    ];
    let counts = GlobalCounts {
        pairs: 3,
        chosen_tokens: 40,
    };
    let h = 1e-5;
    for config in configs {
        let slope = |chosen: f64, rejected: f64| {
            let at = |sign: f64| {
                let moved = pair(1.3 + sign * chosen, -0.4 + sign * rejected);
                pair_loss(&config, &moved, counts).loss()
            };
            (at(h) - at(-h)) / (2.0 * h)
        };
        let loss = pair_loss(&config, &pair(1.3, -0.4), counts);
        assert_close(loss.d_chosen, slope(1.0, 0.0), 1e-7, "d_chosen");
        assert_close(loss.d_rejected, slope(0.0, 1.0), 1e-7, "d_rejected");
    }
}

#[test]
fn nothing_overflows_at_extreme_log_ratios() {
    for r in [-1000.0, -300.0, 300.0, 1000.0] {
        let loss = pair_loss(&cal_dpo(0.001, 1.0), &pair(r, -r), ONE);
        assert!(loss.loss().is_finite() && loss.d_chosen.is_finite());
    }
}

#[test]
fn ties_count_half_and_rewards_are_scaled_by_beta() {
    let pairs = [
        pair(2.0, -2.0),
        pair(1.0, 1.0),
        pair(-1.0, 3.0),
        pair(0.0, 0.0),
    ];
    let statistics = reward_statistics(&cal_dpo(0.5, 1.0), &pairs).unwrap();
    assert_eq!(statistics.rewards_accuracies, 0.5);
    assert_eq!(statistics.log_ratios_chosen, 0.5);
    assert_eq!(statistics.rewards_chosen, 0.25);
    assert_eq!(statistics.rewards_margins, 0.0);
    assert_eq!(reward_statistics(&cal_dpo(0.5, 1.0), &[]), None);
}

#[test]
fn impossible_parameters_are_refused_with_their_key() {
    for (config, key) in [
        (cal_dpo(0.0, 1.0), "objective.beta"),
        (cal_dpo(-0.1, 1.0), "objective.beta"),
        (cal_dpo(f64::NAN, 1.0), "objective.beta"),
        (cal_dpo(0.1, 0.0), "objective.calibration_weight"),
        (
            ObjectiveConfig::Dpo {
                beta: 0.1,
                label_smoothing: 0.5,
            },
            "objective.label_smoothing",
        ),
    ] {
        assert_eq!(config.validate().unwrap_err().key, key);
    }
}

#[test]
fn a_parameter_of_another_objective_is_refused() {
    let text = r#"{"kind": "dpo", "beta": 0.1, "calibration_weight": 1.0}"#;
    let error = serde_json::from_str::<ObjectiveConfig>(text).unwrap_err();
    assert!(error.to_string().contains("calibration_weight"), "{error}");
}
