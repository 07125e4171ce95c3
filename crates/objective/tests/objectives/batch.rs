//! Objectives that read more than a pair's own log-probs: whole batches against golden values, differences and identities.

use objective::{RewardStatistics, Sides};
use serde::Deserialize;

use super::*;

/// Sizes of a batch that is all of `pairs`.
fn counts(pairs: &[PairLogps]) -> GlobalCounts {
    let completions = pairs
        .iter()
        .map(|pair| u64::from(pair.chosen_tokens > 0) + u64::from(pair.rejected_tokens > 0));
    GlobalCounts {
        pairs: pairs.len() as u64,
        completions: completions.sum(),
        chosen_tokens: pairs.iter().map(|pair| u64::from(pair.chosen_tokens)).sum(),
    }
}

/// The shares of all pairs.
fn shares(
    config: &ObjectiveConfig,
    pairs: &[PairLogps],
    mismatched: &[f64],
    shift: &mut RunningMean,
) -> Vec<PairLoss> {
    let statistics = BatchStatistics::new(config, pairs, mismatched, shift);
    let of_slot = |(slot, pair)| pair_loss(config, slot, pair, counts(pairs), &statistics);
    pairs.iter().enumerate().map(of_slot).collect()
}

fn total(shares: &[PairLoss]) -> f64 {
    shares.iter().map(PairLoss::loss).sum()
}

/// A pair with the given log-ratios and a reference of its own.
fn pair_of(r_chosen: f64, r_rejected: f64, reference: [f64; 2]) -> PairLogps {
    let [reference_chosen, reference_rejected] = reference;
    PairLogps {
        chosen: r_chosen + reference_chosen,
        rejected: r_rejected + reference_rejected,
        reference_chosen,
        reference_rejected,
        ..pair(0.0, 0.0)
    }
}

/// Pairs as an untrained policy might have them.
fn random_pairs(random: &mut Random, count: usize) -> Vec<PairLogps> {
    let mut next = || {
        let mut two_between = |low, high| [0; 2].map(|_| random.between(low, high));
        let [r_chosen, r_rejected] = two_between(-4.0, 4.0);
        let [chosen_tokens, rejected_tokens] = two_between(1.0, 31.0).map(|it| it as u32);
        PairLogps {
            chosen_tokens,
            rejected_tokens,
            ..pair_of(r_chosen, r_rejected, two_between(-25.0, -20.0))
        }
    };
    (0..count).map(|_| next()).collect()
}

/// A row without its rejected completion.
fn desirable(r: f64) -> PairLogps {
    PairLogps {
        rejected: 0.0,
        reference_rejected: 0.0,
        rejected_tokens: 0,
        ..pair(r, 0.0)
    }
}

/// A row without its chosen completion.
fn undesirable(r: f64) -> PairLogps {
    PairLogps {
        chosen: 0.0,
        reference_chosen: 0.0,
        chosen_tokens: 0,
        ..pair(0.0, r)
    }
}

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    objective: ObjectiveConfig,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    rows: Vec<[f64; 8]>,
    mismatched: Vec<f64>,
    value: f64,
    d_chosen: Vec<f64>,
    d_rejected: Vec<f64>,
    running_mean: f64,
}

#[test]
fn whole_batches_equal_the_golden_ones_step_by_step() {
    let golden: Golden = serde_json::from_str(include_str!("batch/golden.json")).unwrap();
    for Case { objective, steps } in &golden.cases {
        objective.validate().unwrap();
        let mut shift = RunningMean::default();
        for (index, step) in steps.iter().enumerate() {
            let pairs: Vec<PairLogps> = step.rows.iter().map(|&row| of_row(row)).collect();
            let shares = shares(objective, &pairs, &step.mismatched, &mut shift);
            let close = |got: f64, expected: f64, what: &str| {
                assert!(
                    (got - expected).abs() <= 1e-9 * expected.abs(),
                    "{what}: got {got:e}, expected {expected:e}\nstep {index} of {objective:?}"
                );
            };
            close(total(&shares), step.value, "value");
            close(shift.mean, step.running_mean, "running mean");
            for (slot, share) in shares.iter().enumerate() {
                close(share.d_chosen, step.d_chosen[slot], "d_chosen");
                close(share.d_rejected, step.d_rejected[slot], "d_rejected");
            }
        }
    }
    assert_eq!(golden.cases.len(), 19);
}

fn of_row(row: [f64; 8]) -> PairLogps {
    let [chosen, rejected, reference_chosen, reference_rejected, ..] = row;
    let [.., n_w, n_l, score_chosen, score_rejected] = row;
    PairLogps {
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        chosen_tokens: n_w as u32,
        rejected_tokens: n_l as u32,
        scores: Some([score_chosen, score_rejected]),
    }
}

#[test]
fn derivatives_equal_central_differences_of_the_whole_batchs_loss() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let kinds = random_kinds(&mut random);
        let pairs = random_pairs(&mut random, 5);
        for text in kinds {
            check_batch(&objective(&text), &pairs, &format!("seed {seed}: {text}"));
        }
    }
}

/// Compares the derivatives by every log-prob with central differences. δ and z are held; ranks are found anew.
fn check_batch(config: &ObjectiveConfig, pairs: &[PairLogps], what: &str) {
    let h = 1e-6;
    let shares_of = |pairs: &[PairLogps]| shares(config, pairs, &MISMATCHED, &mut { HELD });
    let all = shares_of(pairs);
    let slope = |slot: usize, by: fn(&mut PairLogps) -> &mut f64| {
        let at = |h: f64| {
            let mut moved = pairs.to_vec();
            *by(&mut moved[slot]) += h;
            total(&shares_of(&moved))
        };
        (at(h) - at(-h)) / (2.0 * h)
    };
    for (slot, share) in all.iter().enumerate() {
        for (name, got, expected) in [
            ("d_chosen", share.d_chosen, slope(slot, |it| &mut it.chosen)),
            (
                "d_rejected",
                share.d_rejected,
                slope(slot, |it| &mut it.rejected),
            ),
        ] {
            // The difference of two losses has lost log10(loss/h) digits of sixteen.
            let bound = 1e-6 * expected.abs() + 1e-9 * total(&all).abs() + 1e-7;
            assert!(
                (got - expected).abs() <= bound,
                "{what}: slot {slot}: {name} {got}, central difference {expected}\n{pairs:?}"
            );
        }
    }
}

#[test]
fn a_kind_says_what_it_reads_of_the_batch() {
    let pairs = [
        pair_of(1.3, -0.4, [-20.0, -25.0]),
        pair_of(-0.7, 2.0, [-30.0, -28.0]),
    ];
    let others = [pairs[0], pair_of(6.0, -5.0, [-21.0, -23.0])];
    for text in KINDS {
        let config = objective(text);
        let first = |pairs: &[PairLogps], mismatched: &[f64]| {
            shares(&config, pairs, mismatched, &mut RunningMean::default())[0]
        };
        let loss = first(&pairs, &[2.0]);
        assert_eq!(
            first(&others, &[2.0]) != loss,
            config.reads_batch(),
            "{text}"
        );
        assert_eq!(
            first(&pairs, &[3.0]) != loss,
            config.reads_mismatched(),
            "{text}"
        );
        if !config.reads_batch() && !config.reads_mismatched() {
            let none = BatchStatistics::default();
            assert_eq!(
                pair_loss(&config, 0, &pairs[0], counts(&pairs), &none),
                loss,
                "{text}"
            );
        }
    }
}

#[test]
fn a_kind_says_which_completions_it_reads() {
    let check = |text: &str, sides: Sides| {
        let config = objective(text);
        assert_eq!(config.sides(), sides, "{text}");
        assert_eq!(config.needs_rejected(), sides != Sides::Chosen, "{text}");
    };
    let parts = |parts: &str| format!("kind = 'mix'\nparts = [{parts}]");
    check("kind = 'sft'", Sides::Chosen);
    check("kind = 'kto'", Sides::Either);
    check("kind = 'bco_pair'", Sides::Both);
    check("kind = 'aot_unpaired'", Sides::Both);
    check("kind = 'cpo'", Sides::Both);
    check(&parts("{ kind = 'sft' }, { kind = 'sft' }"), Sides::Chosen);
    check(&parts("{ kind = 'kto' }, { kind = 'sft' }"), Sides::Either);
    check(&parts("{ kind = 'sft' }, { kind = 'dpo' }"), Sides::Both);
    check(&parts("{ kind = 'dpo' }, { kind = 'kto' }"), Sides::Both);
}

#[test]
fn the_running_mean_is_of_batches_and_survives_a_broken_one() {
    let config = objective("kind = 'bco_pair'");
    let mut shift = RunningMean::default();
    let mut step = |pairs: &[PairLogps]| {
        shares(&config, pairs, &[], &mut shift);
        shift
    };
    let mean = |mean, count| RunningMean { mean, count };
    assert_eq!(step(&[pair(3.0, 1.0)]), mean(2.0, 1));
    // Two pairs with a mean of 4 weigh as much as one pair.
    assert_eq!(step(&[pair(5.0, 5.0), pair(4.0, 2.0)]), mean(3.0, 2));
    for broken in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert_eq!(step(&[pair(broken, 1.0), pair(0.0, 0.0)]), mean(3.0, 2));
    }
    assert_eq!(step(&[pair(0.0, -6.0)]), mean(1.0, 3));
    let written = serde_json::to_string(&shift).unwrap();
    assert_eq!(
        serde_json::from_str::<RunningMean>(&written).unwrap(),
        shift
    );
}

#[test]
fn a_batch_enters_the_running_mean_once_and_only_for_objectives_that_have_it() {
    for (text, count) in [
        ("kind = 'kto'", 0),
        ("kind = 'aot'", 0),
        (
            "kind = 'mix'\nparts = [{ kind = 'bco_pair' }, { kind = 'bco_pair', beta = 0.5 }]",
            1,
        ),
    ] {
        let mut shift = RunningMean::default();
        shares(&objective(text), &[pair(1.0, 2.0)], &[1.0], &mut shift);
        assert_eq!(shift.count, count, "{text}");
    }
}

#[test]
fn kto_weighs_completions_and_not_rows() {
    let config = objective("kind = 'kto'\ndesirable_weight = 1.5");
    let of = |pairs: &[PairLogps]| total(&shares(&config, pairs, &MISMATCHED, &mut { HELD }));
    let rows = [pair(2.0, -1.0), desirable(0.5), undesirable(-3.0)];
    let taken_apart = [
        desirable(2.0),
        undesirable(-1.0),
        desirable(0.5),
        undesirable(-3.0),
    ];
    assert_close(of(&rows), of(&taken_apart), 1e-15, "rows");
    let sum: f64 = taken_apart.iter().map(|&row| of(&[row])).sum();
    assert_close(of(&rows), sum / 4.0, 1e-15, "mean");
}

#[test]
fn a_completion_that_is_not_there_gets_no_push() {
    let rows = [desirable(0.5), undesirable(-3.0)];
    for text in [
        "kind = 'kto'",
        "kind = 'sft'",
        "kind = 'mix'\nparts = [{ kind = 'kto' }, { kind = 'sft' }]",
    ] {
        let config = objective(text);
        let shares = shares(&config, &rows, &MISMATCHED, &mut { HELD });
        assert_eq!(shares[0].d_rejected, 0.0, "{text}");
        assert_eq!(shares[1].d_chosen, 0.0, "{text}");
        assert!(shares[0].d_chosen < 0.0, "{text}");
        assert_eq!(
            shares[1].d_rejected > 0.0,
            config.needs_rejected(),
            "{text}"
        );
    }
}

#[test]
fn ktos_baseline_is_at_least_zero_and_does_not_hide_a_broken_model() {
    let config = objective("kind = 'kto'");
    let of = |mismatched: &[f64]| {
        let shares = shares(&config, &[pair(1.0, -1.0)], mismatched, &mut { HELD });
        total(&shares)
    };
    assert_eq!(of(&[-3.0, 1.0]), of(&[]));
    assert_eq!(of(&[-3.0, 1.0]), of(&[0.0]));
    assert!(of(&[3.0, 1.0]) != of(&[]));
    assert!(of(&[f64::NAN, 1.0]).is_nan());
}

#[test]
fn quantiles_do_not_depend_on_who_is_in_which_slot() {
    let pairs = random_pairs(&mut Random(7), 9);
    let reversed: Vec<PairLogps> = pairs.iter().rev().copied().collect();
    for text in ["kind = 'aot'", "kind = 'aot_unpaired'"] {
        let config = objective(text);
        let of = |pairs: &[PairLogps]| shares(&config, pairs, &[], &mut { HELD });
        let (there, back) = (of(&pairs), of(&reversed));
        for (one, other) in there.iter().zip(back.iter().rev()) {
            assert_eq!(one, other, "{text}");
        }
    }
}

/// All chosen dominate all rejected by the same, whoever is paired with whom: what a pair's own difference cannot see.
#[test]
fn unpaired_quantiles_see_the_distributions_alone() {
    let config = objective("kind = 'aot_unpaired'");
    let of = |pairs: &[PairLogps]| total(&shares(&config, pairs, &[], &mut { HELD }));
    let paired = of(&[pair(3.0, 1.0), pair(10.0, 8.0), pair(-4.0, -6.0)]);
    let crossed = of(&[pair(3.0, 8.0), pair(10.0, -6.0), pair(-4.0, 1.0)]);
    assert_close(crossed, paired, 1e-15, "crossed");
    let expected = -(1.0 / (1.0 + (-0.2f64).exp())).ln();
    assert_close(paired, expected, 1e-15, "−log σ(β·2)");
}

#[test]
fn nothing_overflows_in_a_batch_of_extreme_log_ratios() {
    let pairs = [
        pair(300.0, -300.0),
        pair(-300.0, 300.0),
        pair(0.0, 0.0),
        pair(-300.0, -300.0),
    ];
    for text in KINDS {
        for mismatched in [-300.0, 300.0] {
            let config = objective(text);
            let shares = shares(&config, &pairs, &[mismatched], &mut RunningMean::default());
            for share in &shares {
                let all_finite = numbers(share).iter().all(|it| it.is_finite());
                assert!(all_finite, "{text}: {share:?}");
            }
        }
    }
}

#[test]
fn targets_from_scores_are_the_fixed_ones_times_the_scaled_gap() {
    let of = |scale: &str, scores: [f64; 2]| {
        let config = objective(&format!(
            "kind = 'cal_dpo'\ncalibration_shift = 0.25\n{scale}"
        ));
        let logps = PairLogps {
            scores: Some(scores),
            ..pair(1.5, -1.0)
        };
        alone(&config, &logps, ONE)
    };
    let fixed = of("", [0.0, 0.0]);
    let scale = "score_scale = 0.5";
    assert_eq!(of(scale, [7.0, 5.0]), fixed);
    // Only the gap enters.
    assert_eq!(of(scale, [-1.0, -3.0]), fixed);
    // κ·g = 2 has targets of 15 and −5, κ·g = 0 of 0.
    let square = |x: f64| x * x;
    let expected = square(1.5 - 15.0) + square(-1.0 + 5.0);
    assert_close(of(scale, [9.0, 5.0]).calibration, expected, 1e-15, "2");
    let expected = square(1.5) + square(-1.0);
    assert_close(of(scale, [5.0, 5.0]).calibration, expected, 1e-15, "0");
}

#[test]
fn what_an_objective_reads_and_does_not_get_is_a_panic_that_says_so() {
    let panics = |text: &str, logps: PairLogps, says: &str| {
        let config = objective(text);
        let none = BatchStatistics::default();
        let result = std::panic::catch_unwind(|| pair_loss(&config, 0, &logps, ONE, &none));
        let payload = result.expect_err(text);
        let said = payload.downcast_ref::<String>().cloned();
        let said = said.or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string));
        assert!(said.clone().unwrap().contains(says), "{text}: {said:?}");
    };
    let whole = pair(1.0, 2.0);
    panics("kind = 'kto'", whole, "mismatched");
    panics("kind = 'bco_pair'", whole, "running mean");
    panics("kind = 'aot'", whole, "rank");
    panics("kind = 'aot_unpaired'", whole, "rank");
    let unscored = PairLogps {
        scores: None,
        ..whole
    };
    panics("kind = 'cal_dpo'\nscore_scale = 1.0", unscored, "scores");
}

#[test]
fn rewards_of_rows_that_lack_a_completion_are_means_of_those_that_are_there() {
    let config = objective("kind = 'kto'\nbeta = 0.5");
    let of = |pairs: &[PairLogps]| reward_statistics(&config, pairs).unwrap();

    let mixed = of(&[
        pair(2.0, 1.0),
        pair(1.0, 4.0),
        desirable(6.0),
        undesirable(-2.0),
        undesirable(0.0),
    ]);
    assert_eq!(
        mixed,
        RewardStatistics {
            rewards_chosen: 1.5,
            rewards_rejected: 0.375,
            // Of the two pairs.
            rewards_margins: -0.5,
            // Right, wrong, right, right, tied.
            rewards_accuracies: 0.7,
            log_ratios_chosen: 3.0,
            log_ratios_rejected: 0.75,
            logps_chosen: -17.0,
            logps_rejected: -24.25,
        }
    );

    let lone = of(&[desirable(6.0), desirable(-1.0), undesirable(-2.0)]);
    assert_eq!(lone.rewards_margins, 0.5 * (2.5 + 2.0));
    assert_eq!(lone.rewards_accuracies, 2.0 / 3.0);

    let one_sided = of(&[undesirable(2.0), undesirable(-1.0)]);
    assert_eq!(one_sided.rewards_chosen, 0.0);
    assert_eq!(one_sided.log_ratios_chosen, 0.0);
    assert_eq!(one_sided.logps_chosen, 0.0);
    assert_eq!(one_sided.rewards_margins, -0.25);
    assert_eq!(one_sided.rewards_accuracies, 0.5);
}
