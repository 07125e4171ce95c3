//! The objectives against golden values that this project did not write, the paper's start values, and wrong versions.
#![allow(missing_docs, clippy::unwrap_used)]

mod batch;

use objective::{
    BatchStatistics, GlobalCounts, ObjectiveConfig, PairLogps, PairLoss, Part, RunningMean,
    Targets, pair_loss, reward_statistics,
};
use serde_json::Value;

const ONE: GlobalCounts = GlobalCounts {
    pairs: 1,
    completions: 2,
    chosen_tokens: 1,
};

/// Log-ratios of mismatched completions, with a mean of 0.75.
const MISMATCHED: [f64; 2] = [2.0, -0.5];

/// A running mean that a batch does not move: δ is held fixed, as it is when derivatives are taken.
const HELD: RunningMean = RunningMean {
    mean: 0.3,
    count: 1 << 60,
};

fn statistics(config: &ObjectiveConfig, pairs: &[PairLogps]) -> BatchStatistics {
    BatchStatistics::new(config, pairs, &MISMATCHED, &mut { HELD })
}

/// The loss of a batch that is one pair, with `counts` of a larger one.
fn alone(config: &ObjectiveConfig, pair: &PairLogps, counts: GlobalCounts) -> PairLoss {
    pair_loss(config, 0, pair, counts, &statistics(config, &[*pair]))
}

fn cal_dpo(beta: f64, calibration_weight: f64) -> ObjectiveConfig {
    ObjectiveConfig::CalDpo {
        beta,
        calibration_weight,
        calibration_shift: 0.5,
        score_scale: None,
    }
}

/// An objective as TOML users write it.
fn objective(text: &str) -> ObjectiveConfig {
    toml::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Every kind, and every switch of a kind.
const KINDS: [&str; 39] = [
    "kind = 'cal_dpo'",
    "kind = 'cal_dpo'\ncalibration_shift = 0.2",
    "kind = 'cal_dpo'\nscore_scale = 0.3",
    "kind = 'dpo'",
    "kind = 'dpo'\nlabel_smoothing = 0.1",
    "kind = 'dpo'\ndivergence = 'forward_kl'",
    "kind = 'dpo'\ndivergence = 'js_divergence'",
    "kind = 'dpo'\ndivergence = 'alpha_divergence'",
    "kind = 'dpo'\ndivergence = 'alpha_divergence'\nalpha = 0.3\nlabel_smoothing = 0.2",
    "kind = 'robust'",
    "kind = 'exo_pair'",
    "kind = 'dpop'",
    "kind = 'slic'",
    "kind = 'slic'\ncalibration_weight = 0.5",
    "kind = 'ipo'",
    "kind = 'ipo'\nlength_normalized = true",
    "kind = 'ipo'\ncalibration_weight = 0.7",
    "kind = 'sigmoid_norm'",
    "kind = 'sppo_hard'",
    "kind = 'nca_pair'",
    "kind = 'apo_zero'",
    "kind = 'apo_down'",
    "kind = 'bco_pair'",
    "kind = 'aot'",
    "kind = 'aot'\nlabel_smoothing = 0.2",
    "kind = 'aot_unpaired'",
    "kind = 'aot_unpaired'\nlabel_smoothing = 0.2",
    "kind = 'kto'",
    "kind = 'kto'\ndesirable_weight = 1.3\nundesirable_weight = 0.6",
    "kind = 'discopop'",
    "kind = 'cpo'",
    "kind = 'cpo'\nnll_weight = 0.0",
    "kind = 'simpo'",
    "kind = 'orpo'",
    "kind = 'sft'",
    "kind = 'mix'\nparts = [{ kind = 'dpo' }, { kind = 'sft', weight = 0.3 }]",
    "kind = 'mix'\nparts = [{ kind = 'cal_dpo', beta = 0.2 }, { kind = 'simpo' }, { kind = 'slic', weight = 2 }]",
    "kind = 'mix'\nparts = [{ kind = 'kto' }, { kind = 'sft', weight = 0.3 }]",
    "kind = 'mix'\nparts = [{ kind = 'bco_pair' }, { kind = 'aot' }, { kind = 'aot_unpaired', weight = 2 }, { kind = 'cal_dpo', score_scale = 0.5 }]",
];

/// A pair with the given log-ratios against a reference of −20 and −25, and a gap of scores.
fn pair(r_chosen: f64, r_rejected: f64) -> PairLogps {
    PairLogps {
        chosen: r_chosen - 20.0,
        rejected: r_rejected - 25.0,
        reference_chosen: -20.0,
        reference_rejected: -25.0,
        chosen_tokens: 12,
        rejected_tokens: 15,
        scores: Some([8.5, 6.0]),
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
    for row in &rows {
        let number = |key: &str| row[key].as_f64().unwrap();
        let keys = |keys: &[(&str, &str)]| {
            let lines = keys.iter();
            let lines = lines.map(|(key, of)| format!("{key} = {:?}\n", number(of)));
            lines.collect::<String>()
        };
        let beta = keys(&[("beta", "beta")]);
        let smoothing = keys(&[("label_smoothing", "label_smoothing")]);
        let (kind, more) = match row["loss"].as_str().unwrap() {
            "cal_dpo" => (
                "cal_dpo",
                keys(&[("calibration_weight", "calibration_weight")]),
            ),
            "cdpo" => ("dpo", smoothing),
            "robust" => ("robust", smoothing),
            "f_dpo_forward_kl" => ("dpo", "divergence = 'forward_kl'".into()),
            "f_dpo_js" => ("dpo", "divergence = 'js_divergence'".into()),
            "f_dpo_alpha" => (
                "dpo",
                keys(&[("alpha", "alpha")]) + "divergence = 'alpha_divergence'",
            ),
            "ipo_length_normalized" => ("ipo", "length_normalized = true".into()),
            "cpo" => ("cpo", keys(&[("nll_weight", "nll_weight")])),
            "simpo" => ("simpo", keys(&[("target_margin", "margin")])),
            "dpop" => ("dpop", keys(&[("penalty_weight", "dpop_lambda")])),
            same => (same, String::new()),
        };
        let config = objective(&format!("kind = '{kind}'\n{beta}{more}"));
        let tokens = |key: &str| row[key].as_u64().unwrap() as u32;
        let logps = PairLogps {
            chosen: number("policy_chosen"),
            rejected: number("policy_rejected"),
            reference_chosen: number("reference_chosen"),
            reference_rejected: number("reference_rejected"),
            chosen_tokens: tokens("chosen_tokens"),
            rejected_tokens: tokens("rejected_tokens"),
            scores: None,
        };
        let counts = GlobalCounts {
            chosen_tokens: logps.chosen_tokens.into(),
            ..ONE
        };
        let loss = alone(&config, &logps, counts);
        for (name, got, expected) in [
            ("value", loss.loss(), number("value")),
            ("d_chosen", loss.d_chosen, number("d_policy_chosen")),
            ("d_rejected", loss.d_rejected, number("d_policy_rejected")),
        ] {
            // Relative to the number itself, down to the rounding of 1 − σ in the golden ones.
            let bound = 1e-9 * expected.abs() + f64::EPSILON / 2.0;
            assert!(
                (got - expected).abs() <= bound,
                "{name}: got {got:e}, expected {expected:e}\n{row}"
            );
        }
    }
    assert_eq!(rows.len(), 510);
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
        let loss = alone(&cal_dpo(beta, weight), &pair(0.0, 0.0), ONE);
        assert_close(loss.loss(), expected, 1e-4, &format!("β {beta} λ {weight}"));
        assert_close(loss.pairwise, 2f64.ln(), 1e-15, "pairwise");
    }
}

#[test]
fn wrong_versions_seen_in_public_code_are_not_what_is_computed() {
    let (r_w, r_l, beta) = (1.5, -1.0, 0.1);
    let t = 0.5 / beta;
    let loss = alone(&cal_dpo(beta, 1.0), &pair(r_w, r_l), ONE);
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

/// Compares both derivatives of `config` at `logps` with central differences.
fn check_derivatives(config: &ObjectiveConfig, logps: PairLogps, what: &str) {
    let counts = GlobalCounts {
        pairs: 3,
        completions: 6,
        chosen_tokens: 40,
    };
    let h = 1e-5;
    let slope = |chosen: f64, rejected: f64| {
        let at = |sign: f64| {
            let moved = PairLogps {
                chosen: logps.chosen + sign * chosen,
                rejected: logps.rejected + sign * rejected,
                ..logps
            };
            alone(config, &moved, counts).loss()
        };
        (at(h) - at(-h)) / (2.0 * h)
    };
    let loss = alone(config, &logps, counts);
    // The difference of two losses has lost log10(loss/h) digits of sixteen.
    let bound = |expected: f64| 1e-6 * expected.abs() + 1e-10 * loss.loss().abs() + 1e-7;
    for (name, got, expected) in [
        ("d_chosen", loss.d_chosen, slope(1.0, 0.0)),
        ("d_rejected", loss.d_rejected, slope(0.0, 1.0)),
    ] {
        assert!(
            (got - expected).abs() <= bound(expected),
            "{what}: {name} {got}, central difference {expected}\n{logps:?}"
        );
    }
}

#[test]
fn derivatives_equal_central_differences() {
    for text in KINDS {
        check_derivatives(&objective(text), pair(1.3, -0.4), text);
        check_derivatives(&objective(text), pair(-1.7, 0.9), text);
    }
}

/// Numbers in [0, 1) from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.next()
    }
}

/// Every kind with parameters of `random`.
fn random_kinds(random: &mut Random) -> Vec<String> {
    let beta = format!("beta = {:?}\n", random.between(0.02, 2.0));
    let weight = format!("calibration_weight = {:?}\n", random.between(0.1, 2.0));
    let shift = format!("calibration_shift = {:?}\n", random.next());
    let smoothing = format!("label_smoothing = {:?}\n", random.between(0.01, 0.49));
    let alpha = format!("alpha = {:?}\n", random.next());
    let penalty = format!("penalty_weight = {:?}\n", random.between(0.0, 60.0));
    let margin = format!("target_margin = {:?}\n", random.between(0.0, 2.0));
    let nll = format!("nll_weight = {:?}\n", random.between(0.0, 2.0));
    let tau = format!("tau = {:?}\n", random.between(0.02, 2.0));
    let scale = format!("score_scale = {:?}\n", random.between(0.1, 3.0));
    let desirable = format!("desirable_weight = {:?}\n", random.between(0.1, 3.0));
    let undesirable = format!("undesirable_weight = {:?}\n", random.between(0.1, 3.0));
    let mut all = vec![
        format!("kind = 'cal_dpo'\n{beta}{weight}{shift}"),
        format!("kind = 'cal_dpo'\n{beta}{weight}{shift}{scale}"),
        format!("kind = 'aot'\n{beta}{smoothing}"),
        format!("kind = 'aot_unpaired'\n{beta}{smoothing}"),
        format!("kind = 'kto'\n{beta}{desirable}{undesirable}"),
        format!("kind = 'dpo'\n{beta}{smoothing}"),
        format!("kind = 'dpo'\ndivergence = 'forward_kl'\n{beta}{smoothing}"),
        format!("kind = 'dpo'\ndivergence = 'js_divergence'\n{beta}{smoothing}"),
        format!("kind = 'dpo'\ndivergence = 'alpha_divergence'\n{beta}{smoothing}{alpha}"),
        format!("kind = 'robust'\n{beta}{smoothing}"),
        format!("kind = 'exo_pair'\n{beta}{smoothing}"),
        format!("kind = 'dpop'\n{beta}{penalty}"),
        format!("kind = 'slic'\n{beta}{weight}"),
        format!("kind = 'ipo'\n{beta}{weight}"),
        format!("kind = 'ipo'\nlength_normalized = true\n{beta}{weight}"),
        format!("kind = 'discopop'\n{beta}{tau}"),
        format!("kind = 'cpo'\n{beta}{nll}"),
        format!("kind = 'simpo'\n{beta}{margin}"),
    ];
    for kind in [
        "sigmoid_norm",
        "sppo_hard",
        "nca_pair",
        "apo_zero",
        "apo_down",
        "bco_pair",
        "orpo",
    ] {
        all.push(format!("kind = '{kind}'\n{beta}"));
    }
    let parts: Vec<String> = all
        .iter()
        .map(|text| format!("{{ weight = 0.5, {} }}", text.trim().replace('\n', ", ")))
        .collect();
    all.push(format!("kind = 'mix'\nparts = [{}]", parts.join(", ")));
    all
}

#[test]
fn derivatives_equal_central_differences_for_random_parameters() {
    for seed in 0..200 {
        let mut random = Random(seed);
        let kinds = random_kinds(&mut random);
        let mut logps = pair(random.between(-4.0, 4.0), random.between(-4.0, 4.0));
        logps.chosen_tokens = 1 + random.between(0.0, 30.0) as u32;
        logps.rejected_tokens = 1 + random.between(0.0, 30.0) as u32;
        for text in kinds {
            let config = objective(&text);
            config
                .validate()
                .unwrap_or_else(|error| panic!("{text}: {error}"));
            check_derivatives(&config, logps, &format!("seed {seed}: {text}"));
        }
    }
}

fn numbers(loss: &PairLoss) -> [f64; 4] {
    [
        loss.pairwise,
        loss.calibration,
        loss.d_chosen,
        loss.d_rejected,
    ]
}

#[test]
fn nothing_overflows_at_extreme_log_ratios() {
    let extremes = [-300.0, -100.0, -1e-9, 0.0, 1e-9, 100.0, 300.0];
    for text in KINDS {
        for beta in [0.001, 0.1, 1.0] {
            let mut config = text.to_owned();
            if !text.contains("sft") && !text.contains("mix") {
                config = format!("{text}\nbeta = {beta}");
            }
            let config = objective(&config);
            for (r_w, r_l) in extremes.iter().flat_map(|&w| extremes.map(|l| (w, l))) {
                let logps = PairLogps {
                    chosen: r_w - 300.0,
                    rejected: r_l - 300.0,
                    reference_chosen: -300.0,
                    reference_rejected: -300.0,
                    ..pair(0.0, 0.0)
                };
                let loss = alone(&config, &logps, ONE);
                assert!(
                    numbers(&loss).iter().all(|it| it.is_finite()),
                    "{text}, β {beta}, r_w {r_w}, r_l {r_l}: {loss:?}"
                );
            }
        }
    }
}

#[test]
fn beyond_what_f64_holds_a_loss_is_infinite_and_never_a_wrong_number() {
    let config = objective("kind = 'dpo'\ndivergence = 'forward_kl'");
    let at = |r_w, r_l| alone(&config, &pair(r_w, r_l), ONE);
    let e300 = 300f64.exp();
    let loss = at(-300.0, 0.0);
    assert_close(loss.pairwise / (0.1 * e300), 1.0, 1e-9, "value");
    assert_close(loss.d_chosen / (-0.1 * e300), 1.0, 1e-9, "d_chosen");
    assert_eq!(at(-1000.0, 0.0).pairwise, f64::INFINITY);
    // The other way round the loss is solved, and so it is where both scores are out of range.
    for solved in [at(0.0, -1000.0), at(-900.0, -1000.0)] {
        assert_eq!(solved, PairLoss::default(), "{solved:?}");
    }
    let equal = at(-1000.0, -1000.0);
    assert_close(equal.pairwise, 2f64.ln(), 1e-15, "equal");
    for kind in [
        "cal_dpo", "dpo", "robust", "exo_pair", "slic", "ipo", "nca_pair", "apo_zero",
    ] {
        for (r_w, r_l) in [(-1e6, 1e6), (1e6, -1e6)] {
            let loss = alone(
                &objective(&format!("kind = '{kind}'")),
                &pair(r_w, r_l),
                ONE,
            );
            assert!(
                numbers(&loss).iter().all(|it| it.is_finite()),
                "{kind}: {loss:?}"
            );
        }
    }
    let low = alone(&objective("kind = 'discopop'"), &pair(-1e5, 1e5), ONE);
    assert_close(
        low.pairwise,
        2e4,
        1e-9,
        "discopop far below is the logistic loss",
    );
}

#[test]
fn a_completion_without_tokens_gives_numbers_and_no_push() {
    for text in KINDS {
        let config = objective(text);
        let mut none = pair(0.0, 0.0);
        for logps in [
            &mut none.chosen,
            &mut none.rejected,
            &mut none.reference_chosen,
            &mut none.reference_rejected,
        ] {
            *logps = 0.0;
        }
        (none.chosen_tokens, none.rejected_tokens) = (0, 0);
        let counts = GlobalCounts {
            completions: 0,
            chosen_tokens: 0,
            ..ONE
        };
        let loss = alone(&config, &none, counts);
        assert!(
            numbers(&loss).iter().all(|it| it.is_finite()),
            "{text}: {loss:?}"
        );
        let by_length = ["simpo", "orpo", "sigmoid_norm", "sft"];
        if by_length.contains(&config.kind()) {
            assert_eq!((loss.d_chosen, loss.d_rejected), (0.0, 0.0), "{text}");
        }
    }
}

#[test]
fn a_completion_that_the_policy_is_sure_of_has_finite_odds() {
    let config = objective("kind = 'orpo'");
    for (chosen, rejected) in [
        (0.0, 0.0),
        (0.0, -5.0),
        (-5.0, 0.0),
        (1e-7, 0.0),
        (-1e-9, -1e5),
    ] {
        let logps = PairLogps {
            chosen,
            rejected,
            ..pair(0.0, 0.0)
        };
        let loss = alone(&config, &logps, ONE);
        assert!(numbers(&loss).iter().all(|it| it.is_finite()), "{loss:?}");
        assert!(loss.d_rejected >= 0.0 && loss.d_chosen < 0.0, "{loss:?}");
    }
}

/// Values worked out from the papers' equations with 40 digits.
#[test]
fn kinds_without_golden_rows_have_their_papers_values() {
    let logps = pair(1.5, -1.0);
    let at = |text: &str| alone(&objective(text), &logps, ONE).loss();
    for (text, expected) in [
        ("kind = 'exo_pair'", 2.339544750387834),
        (
            "kind = 'exo_pair'\nbeta = 1.0\nlabel_smoothing = 0.2",
            0.059770134176818736,
        ),
        (
            "kind = 'discopop'\nbeta = 0.1\ntau = 0.05",
            0.7774430622092598,
        ),
        (
            "kind = 'discopop'\nbeta = 0.05\ntau = 1.5",
            0.7627511637592972,
        ),
        ("kind = 'sigmoid_norm'\nbeta = 5.0", 0.3246393410009358),
        ("kind = 'sigmoid_norm'\nbeta = 0.1", 0.6836097666626317),
        ("kind = 'orpo'\nbeta = 0.1", 18.558118108921636),
        ("kind = 'orpo'\nbeta = 1.0", 19.081181089216383),
        ("kind = 'slic'\nbeta = 0.2\ncalibration_weight = 0.5", 2.125),
        ("kind = 'ipo'\nbeta = 0.2\ncalibration_weight = 0.5", 1.625),
        (
            "kind = 'cal_dpo'\ncalibration_shift = 0.3",
            34.32888973429255,
        ),
    ] {
        assert_close(at(text), expected, 1e-12, text);
    }
}

#[test]
fn cal_dpo_is_dpo_at_beta_one_and_sppo_hard_in_a_mix() {
    let mixed = objective(
        "kind = 'mix'\nparts = [{ kind = 'dpo', beta = 1.0 }, { kind = 'sppo_hard', beta = 0.05, weight = 0.5 }]",
    );
    for (r_w, r_l) in [(0.0, 0.0), (3.0, -8.0), (-250.0, 40.0)] {
        let expected = alone(&cal_dpo(0.05, 0.5), &pair(r_w, r_l), ONE);
        let got = alone(&mixed, &pair(r_w, r_l), ONE);
        for (got, expected) in numbers(&got).into_iter().zip(numbers(&expected)) {
            assert_close(got, expected, 1e-14, "mix");
        }
    }
}

#[test]
fn limits_of_parameters_are_the_kinds_that_they_should_be() {
    let same = |one: &str, other: &str| {
        for (r_w, r_l) in [(0.0, 0.0), (3.0, -2.0), (-2.5, 1.0)] {
            let one = alone(&objective(one), &pair(r_w, r_l), ONE);
            let other = alone(&objective(other), &pair(r_w, r_l), ONE);
            for (one, other) in numbers(&one).into_iter().zip(numbers(&other)) {
                assert_close(one, other, 1e-12, &format!("{r_w} {r_l}"));
            }
        }
    };
    let alpha =
        |alpha: &str| format!("kind = 'dpo'\ndivergence = 'alpha_divergence'\nalpha = {alpha}");
    same(&alpha("1.0"), "kind = 'dpo'");
    same(&alpha("0.9999999999999"), "kind = 'dpo'");
    same(&alpha("0.0"), "kind = 'dpo'\ndivergence = 'forward_kl'");
    same(
        &alpha("0.5"),
        "kind = 'dpo'\ndivergence = 'alpha_divergence'",
    );
    same("kind = 'robust'\nlabel_smoothing = 0.0", "kind = 'dpo'");
    same("kind = 'dpop'\npenalty_weight = 0.0", "kind = 'dpo'");
    same("kind = 'mix'\nparts = [{ kind = 'ipo' }]", "kind = 'ipo'");
    // In a batch of one pair every quantile is its own; of the scores' gap of 2.5 this κ makes 1.
    same("kind = 'aot'", "kind = 'dpo'");
    same("kind = 'aot_unpaired'", "kind = 'dpo'");
    same("kind = 'cal_dpo'\nscore_scale = 0.4", "kind = 'cal_dpo'");
}

#[test]
fn shares_add_up_to_the_mean_over_the_global_batch() {
    let pairs = [
        pair(1.0, -2.0),
        PairLogps {
            chosen_tokens: 4,
            ..pair(-3.0, 0.5)
        },
    ];
    let both = GlobalCounts {
        pairs: 2,
        completions: 4,
        chosen_tokens: 16,
    };
    // All counts halved: each share is double what it was.
    let half = GlobalCounts {
        pairs: 1,
        completions: 2,
        chosen_tokens: 8,
    };
    for text in KINDS {
        let config = objective(text);
        let statistics = statistics(&config, &pairs);
        let shares = |counts| {
            [0, 1].map(|slot| pair_loss(&config, slot, &pairs[slot], counts, &statistics).loss())
        };
        let (sum, [one, other]) = (shares(both).iter().sum(), shares(half));
        assert_close(sum, f64::midpoint(one, other), 1e-14, text);
    }
}

#[test]
fn targets_are_told_where_log_ratios_are_pulled_to_them() {
    let check = |text: &str, expected: Option<(f64, f64)>| {
        let expected = expected.map(|(chosen, rejected)| Targets { chosen, rejected });
        assert_eq!(objective(text).targets(), expected, "{text}");
        assert!(expected.is_none() || objective(text).calibrates());
    };
    check("kind = 'cal_dpo'", Some((5.0, -5.0)));
    check(
        "kind = 'cal_dpo'\ncalibration_shift = 0.25",
        Some((7.5, -2.5)),
    );
    check("kind = 'sppo_hard'\nbeta = 0.05", Some((10.0, -10.0)));
    check("kind = 'slic'", None);
    check("kind = 'slic'\ncalibration_weight = 1.0", Some((5.0, -5.0)));
    check(
        "kind = 'ipo'\nbeta = 0.25\ncalibration_weight = 0.1",
        Some((2.0, -2.0)),
    );
    check("kind = 'ipo'", None);
    check("kind = 'kto'", None);
    check(
        "kind = 'mix'\nparts = [{ kind = 'sft' }, { kind = 'cal_dpo' }]",
        Some((5.0, -5.0)),
    );
    let disagree =
        "kind = 'mix'\nparts = [{ kind = 'cal_dpo' }, { kind = 'sppo_hard', beta = 1.0 }]";
    check(disagree, None);
    assert!(objective(disagree).calibrates());
    let of_scores = "kind = 'cal_dpo'\nscore_scale = 0.4";
    check(of_scores, None);
    assert!(objective(of_scores).calibrates());
    for part in ["{ kind = 'sppo_hard' }", "{ kind = 'sft' }"] {
        let with_scores = "{ kind = 'cal_dpo', score_scale = 0.4 }";
        for parts in [[part, with_scores], [with_scores, part]] {
            let mixed = format!("kind = 'mix'\nparts = [{}]", parts.join(", "));
            check(&mixed, None);
            assert!(objective(&mixed).calibrates(), "{mixed}");
        }
    }
}

#[test]
fn a_kind_says_what_it_reads() {
    for text in KINDS {
        let config = objective(text);
        let logps = pair(1.3, -0.4);
        let other = PairLogps {
            reference_chosen: -3.0,
            reference_rejected: -1.0,
            ..logps
        };
        let reads = alone(&config, &logps, ONE) != alone(&config, &other, ONE);
        assert_eq!(reads, config.needs_reference(), "{text}");
        let other = PairLogps {
            rejected: -9.0,
            ..logps
        };
        let reads = alone(&config, &logps, ONE) != alone(&config, &other, ONE);
        assert_eq!(reads, config.needs_rejected(), "{text}");
        let other = PairLogps {
            scores: Some([2.0, 7.0]),
            ..logps
        };
        let reads = alone(&config, &logps, ONE) != alone(&config, &other, ONE);
        assert_eq!(reads, config.needs_scores(), "{text}");
        let moves = alone(&config, &logps, ONE).calibration != 0.0;
        assert_eq!(moves, config.calibrates(), "{text}");
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
fn without_a_reference_rewards_are_what_the_objective_compares() {
    // Log-probs −12 and −30 of 12 and 15 tokens; the trainer gives the policy as its own reference.
    let logps = PairLogps {
        chosen: -12.0,
        rejected: -30.0,
        reference_chosen: -12.0,
        reference_rejected: -30.0,
        ..pair(0.0, 0.0)
    };
    let check = |text: &str, chosen: f64, rejected: f64, accuracy: f64| {
        let of = reward_statistics(&objective(text), &[logps]).unwrap();
        assert_eq!(
            (of.rewards_chosen, of.rewards_rejected),
            (chosen, rejected),
            "{text}"
        );
        assert_eq!(of.rewards_accuracies, accuracy, "{text}");
        assert_eq!(
            (of.log_ratios_chosen, of.log_ratios_rejected),
            (0.0, 0.0),
            "{text}"
        );
    };
    check("kind = 'cpo'\nbeta = 0.5", -6.0, -15.0, 1.0);
    check("kind = 'simpo'\nbeta = 2.0", -2.0, -4.0, 1.0);
    check("kind = 'orpo'\nbeta = 0.5", -0.5, -1.0, 1.0);
    check(
        "kind = 'mix'\nparts = [{ kind = 'sft' }, { kind = 'simpo' }]",
        -2.0,
        -4.0,
        1.0,
    );
    check("kind = 'sft'", 0.0, 0.0, 0.5);
}

#[test]
fn impossible_parameters_are_refused_with_their_key() {
    for (text, key) in [
        ("kind = 'cal_dpo'\nbeta = 0.0", "beta"),
        ("kind = 'cal_dpo'\nbeta = -0.1", "beta"),
        ("kind = 'cal_dpo'\nbeta = nan", "beta"),
        ("kind = 'cal_dpo'\nbeta = inf", "beta"),
        (
            "kind = 'cal_dpo'\ncalibration_weight = 0.0",
            "calibration_weight",
        ),
        (
            "kind = 'cal_dpo'\ncalibration_shift = 1.1",
            "calibration_shift",
        ),
        ("kind = 'dpo'\nlabel_smoothing = 0.5", "label_smoothing"),
        ("kind = 'dpo'\nalpha = 0.5", "alpha"),
        (
            "kind = 'dpo'\ndivergence = 'js_divergence'\nalpha = 0.5",
            "alpha",
        ),
        (
            "kind = 'dpo'\ndivergence = 'alpha_divergence'\nalpha = -0.1",
            "alpha",
        ),
        ("kind = 'robust'\nlabel_smoothing = 0.5", "label_smoothing"),
        (
            "kind = 'exo_pair'\nlabel_smoothing = 0.0",
            "label_smoothing",
        ),
        ("kind = 'dpop'\npenalty_weight = -1.0", "penalty_weight"),
        (
            "kind = 'slic'\ncalibration_weight = -1.0",
            "calibration_weight",
        ),
        (
            "kind = 'ipo'\ncalibration_weight = inf",
            "calibration_weight",
        ),
        ("kind = 'discopop'\ntau = 0.0", "tau"),
        ("kind = 'cal_dpo'\nscore_scale = 0.0", "score_scale"),
        ("kind = 'cal_dpo'\nscore_scale = nan", "score_scale"),
        ("kind = 'aot'\nlabel_smoothing = 0.5", "label_smoothing"),
        (
            "kind = 'aot_unpaired'\nlabel_smoothing = -0.1",
            "label_smoothing",
        ),
        ("kind = 'kto'\ndesirable_weight = 0.0", "desirable_weight"),
        (
            "kind = 'kto'\nundesirable_weight = inf",
            "undesirable_weight",
        ),
        ("kind = 'cpo'\nnll_weight = -1.0", "nll_weight"),
        ("kind = 'simpo'\ntarget_margin = -0.5", "target_margin"),
        ("kind = 'mix'\nparts = []", "parts"),
        (
            "kind = 'mix'\nparts = [{ kind = 'sft', weight = 0.0 }]",
            "parts[0].weight",
        ),
        (
            "kind = 'mix'\nparts = [{ kind = 'sft', weight = inf }]",
            "parts[0].weight",
        ),
        (
            "kind = 'mix'\nparts = [{ kind = 'sft' }, { kind = 'dpo', beta = 0.0 }]",
            "parts[1].beta",
        ),
        (
            "kind = 'mix'\nparts = [{ kind = 'mix', parts = [{ kind = 'sft' }] }]",
            "parts[0].kind",
        ),
    ] {
        let error = objective(text).validate().expect_err(text);
        assert_eq!(error.key, format!("objective.{key}"), "{error}");
    }
    for kind in KINDS {
        if kind.contains("mix") || kind.contains("sft") {
            continue;
        }
        let error = objective(&format!("{kind}\nbeta = 0.0"))
            .validate()
            .unwrap_err();
        assert_eq!(error.key, "objective.beta", "{kind}");
    }
}

#[test]
fn a_parameter_of_another_objective_is_refused() {
    let refused = |text: &str, names: &[&str]| {
        let error = toml::from_str::<ObjectiveConfig>(text)
            .expect_err(text)
            .to_string();
        for name in names {
            assert!(error.contains(name), "{text}: {error}");
        }
    };
    refused(
        "kind = 'dpo'\ncalibration_weight = 1.0",
        &["calibration_weight"],
    );
    refused(
        "kind = 'cal_dpo'\nlabel_smoothing = 0.1",
        &["label_smoothing"],
    );
    refused(
        "kind = 'sppo_hard'\ncalibration_weight = 1.0",
        &["calibration_weight"],
    );
    refused(
        "kind = 'simpo'\nlabel_smoothing = 0.1",
        &["label_smoothing"],
    );
    refused("kind = 'sft'\nbeta = 0.1", &["beta"]);
    refused(
        "kind = 'mix'\nbeta = 0.1\nparts = [{ kind = 'sft' }]",
        &["beta"],
    );
    refused("kind = 'mix'", &["parts"]);
    refused(
        "kind = 'dpo'\ndivergence = 'kl'",
        &["divergence", "reverse_kl", "alpha_divergence"],
    );
    let parts = |part: &str| format!("kind = 'mix'\nparts = [{{ kind = 'sft' }}, {part}]");
    refused(
        &parts("{ kind = 'dpo', betta = 0.1 }"),
        &["parts[1]", "betta"],
    );
    refused(&parts("{ kind = 'dpq' }"), &["parts[1]", "dpq"]);
    refused(&parts("{ beta = 0.1 }"), &["parts[1]", "kind"]);
    refused("kind = 'kto'\nlabel_smoothing = 0.1", &["label_smoothing"]);
    refused(
        "kind = 'bco_pair'\ndesirable_weight = 1.0",
        &["desirable_weight"],
    );
    refused(
        "kind = 'aot'\ncalibration_weight = 1.0",
        &["calibration_weight"],
    );
    refused("kind = 'aot_unpaired'\ntau = 1.0", &["tau"]);
    refused("kind = 'sppo_hard'\nscore_scale = 1.0", &["score_scale"]);
}

#[test]
fn every_kind_is_the_same_after_being_written_and_read() {
    for text in KINDS {
        let config = objective(text);
        config
            .validate()
            .unwrap_or_else(|error| panic!("{text}: {error}"));
        let written = toml::to_string(&config).unwrap();
        assert_eq!(objective(&written), config, "{written}");
        assert!(
            written.contains(&format!("kind = \"{}\"", config.kind())),
            "{written}"
        );
        for parameter in config.parameters() {
            assert!(
                written.contains(&format!("{} = ", parameter.key)),
                "{written}"
            );
        }
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(
            serde_json::from_str::<ObjectiveConfig>(&json).unwrap(),
            config
        );
        assert!(config.about().equation.starts_with("L = "));
    }
}

#[test]
fn defaults_are_what_parameters_call_usual() {
    for text in KINDS {
        let kind = text.lines().next().unwrap();
        if kind == "kind = 'mix'" {
            continue;
        }
        for parameter in objective(kind).parameters() {
            assert_eq!(
                Some(parameter.value),
                parameter.usual,
                "{kind}: {}",
                parameter.key
            );
        }
    }
    let part = objective("kind = 'mix'\nparts = [{ kind = 'sft' }]");
    let sft = ObjectiveConfig::Sft {};
    assert_eq!(
        part,
        ObjectiveConfig::Mix {
            parts: vec![Part {
                weight: 1.0,
                objective: sft
            }]
        }
    );
}

/// Editors and `coordinator config --schema` read it without references, so that a mix has its parts' keys in itself.
#[test]
fn the_schema_has_every_kind_and_the_parts_of_a_mix_have_weights() {
    let settings = schemars::generate::SchemaSettings::draft2020_12();
    let settings = settings.with(|settings| settings.inline_subschemas = true);
    let schema = settings
        .into_generator()
        .into_root_schema_for::<ObjectiveConfig>()
        .to_value();
    assert!(!schema.to_string().contains("$ref"), "{schema}");
    let kinds = schema["oneOf"].as_array().unwrap();
    let find = |kind: &str| {
        let is_it = |it: &&Value| it["properties"]["kind"]["const"] == kind;
        kinds.iter().find(is_it).unwrap()
    };
    for text in KINDS {
        let written = serde_json::to_value(objective(text)).unwrap();
        let properties = &find(written["kind"].as_str().unwrap())["properties"];
        for key in written.as_object().unwrap().keys() {
            assert!(properties[key].is_object(), "{text}: {key}");
            let described = properties[key]["description"].is_string();
            assert!(described || key == "kind", "{text}: {key}");
        }
    }
    let parts = &find("mix")["properties"]["parts"];
    assert_eq!(parts["minItems"], 1);
    let parts = parts["items"]["oneOf"].as_array().unwrap();
    assert_eq!(parts.len(), kinds.len() - 1);
    for part in parts {
        assert_ne!(part["properties"]["kind"]["const"], "mix");
        assert_eq!(part["properties"]["weight"]["type"], "number", "{part}");
    }
}
