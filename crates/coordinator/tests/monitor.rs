//! Warnings: each rule where it speaks and where it must not, and a resumed run that says nothing twice.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use coordinator::{
    config::{Config, Sources},
    monitor::{Monitor, Warning, of_data_report, of_the_end},
};
use protocol::{EvaluationRow, MetricsRow, Phases, Statistics, StepReport};

fn config(set: &[&str]) -> Config {
    let least = ["model.path=m", "data.train=['train.jsonl']"];
    let sources = Sources {
        set: least.iter().chain(set).map(|text| (*text).into()).collect(),
        ..Sources::default()
    };
    Config::load(&sources).unwrap()
}

/// Targets ±5 nats; nothing is clipped.
fn cal_dpo(more: &[&str]) -> Config {
    config(&[&["objective.kind=cal_dpo", "objective.beta=0.1"], more].concat())
}

fn dpo() -> Config {
    config(&["objective.kind=dpo", "objective.beta=0.1"])
}

/// Log-ratios of a batch or of held-out pairs; the reference gives either side −50 nats.
fn statistics(chosen: f64, rejected: f64) -> Statistics {
    Statistics {
        loss: 1.0,
        log_ratios_chosen: chosen,
        log_ratios_rejected: rejected,
        logps_chosen: chosen - 50.0,
        logps_rejected: rejected - 50.0,
        rewards_chosen: 0.1 * chosen,
        rewards_rejected: 0.1 * rejected,
        rewards_margins: 0.1 * (chosen - rejected),
        rewards_accuracies: 0.75,
        ..Statistics::default()
    }
}

fn row(step: u64, chosen: f64, rejected: f64) -> MetricsRow {
    MetricsRow {
        report: StepReport {
            step,
            finite: true,
            statistics: statistics(chosen, rejected),
            grad_norm: 0.5,
            pairs: 32,
            ..StepReport::default()
        },
        tokens_per_second: 0.0,
        world_size: 2,
        generation: 1,
        seconds: 0.5,
        gpu: protocol::GpuFigures::default(),
        phases: Phases::default(),
    }
}

fn evaluation(step: u64, chosen: f64, rejected: f64) -> EvaluationRow {
    EvaluationRow {
        step,
        pairs: 128,
        statistics: statistics(chosen, rejected),
    }
}

/// A run of 100 steps whose rows a test makes, evaluated every 20.
struct Run {
    metrics: Vec<MetricsRow>,
    evaluations: Vec<EvaluationRow>,
}

const STEPS: u64 = 100;

impl Run {
    fn of(training: impl Fn(u64) -> MetricsRow, held_out: impl Fn(u64) -> EvaluationRow) -> Self {
        Self {
            metrics: (1..=STEPS).map(training).collect(),
            evaluations: (0..=STEPS).step_by(20).map(held_out).collect(),
        }
    }

    /// Log-ratios that move in a straight line to `chosen` and `rejected`.
    fn to(chosen: f64, rejected: f64) -> Self {
        let at = |step: u64, end: f64| end * step as f64 / STEPS as f64;
        Self::of(
            |step| row(step, at(step - 1, chosen), at(step - 1, rejected)),
            |step| evaluation(step, at(step, chosen), at(step, rejected)),
        )
    }

    /// The same with each training row changed.
    fn with(mut self, change: impl Fn(&mut MetricsRow)) -> Self {
        self.metrics.iter_mut().for_each(change);
        self
    }

    fn without_held_out(mut self) -> Self {
        self.evaluations.clear();
        self
    }

    fn warnings(&self, config: &Config) -> Vec<Warning> {
        let mut monitor = Monitor::new(config);
        monitor.replay(&self.metrics, &self.evaluations, STEPS)
    }
}

/// The run is warned of once, at this step, with these words.
#[track_caller]
fn check(run: &Run, config: &Config, kind: &str, step: u64, says: &[&str]) {
    let warnings = run.warnings(config);
    let [warning] = warnings.as_slice() else {
        panic!("{warnings:#?}");
    };
    println!("{}", warning.text);
    assert_eq!((warning.kind.as_str(), warning.step), (kind, step));
    for part in says {
        assert!(
            warning.text.contains(part),
            "`{part}` is missing in: {}",
            warning.text
        );
    }
}

#[track_caller]
fn check_quiet(run: &Run, config: &Config) {
    assert_eq!(run.warnings(config), []);
}

#[test]
fn a_run_that_goes_well_is_not_spoken_of() {
    check_quiet(&Run::to(3.8, -5.3), &cal_dpo(&[]));
    check_quiet(&Run::to(2.5, -4.0), &dpo());
    check_quiet(&Run::to(3.8, -5.3).without_held_out(), &cal_dpo(&[]));
}

#[test]
fn targets_far_beyond_the_log_ratios_are_told_at_half_of_the_schedule_with_the_beta_that_fits() {
    let far = cal_dpo(&["objective.beta=0.002"]);
    let says = [
        "the targets ±250 are 104 times the largest held-out log-ratio, 2.4 nats",
        "objective.beta = 0.21",
    ];
    check(&Run::to(1.0, -4.0), &far, "target-out-of-reach", 60, &says);
    let says = ["140 times the largest training log-ratio, 1.78 nats"];
    let alone = Run::to(1.0, -4.0).without_held_out();
    check(&alone, &far, "target-out-of-reach", 50, &says);
    // Ten times the log-ratio is still within reach.
    check_quiet(&Run::to(20.0, -50.0), &far);
    check_quiet(&Run::to(1.0, -4.0), &dpo());
}

#[test]
fn a_run_that_ends_before_its_half_is_told_of_its_targets_at_its_end() {
    let far = cal_dpo(&["objective.beta=0.002"]);
    let last = evaluation(30, 2.0, -4.0);
    let warning = of_the_end(&far, Some(&last), &[]).unwrap();
    assert_eq!(
        (warning.kind.as_str(), warning.step),
        ("target-out-of-reach", 30)
    );
    assert_eq!(
        of_the_end(&far, Some(&last), &[warning]),
        None,
        "it is said already"
    );
    assert_eq!(of_the_end(&far, Some(&evaluation(0, 0.0, 0.0)), &[]), None);
    assert_eq!(of_the_end(&far, None, &[]), None);
    assert_eq!(of_the_end(&cal_dpo(&[]), Some(&last), &[]), None);
    assert_eq!(of_the_end(&dpo(), Some(&last), &[]), None);
}

#[test]
fn a_chosen_log_ratio_below_zero_for_many_steps_is_told_again_at_growing_distances() {
    let falls = Run::to(-10.0, -20.0);
    let warnings = falls.warnings(&dpo());
    let said: Vec<_> = warnings
        .iter()
        .map(|it| (it.kind.as_str(), it.step))
        .collect();
    // The first row is the reference's own.
    assert_eq!(said, [("chosen-below-zero", 26)]);
    let says = [
        "for 25 steps, −1.3 nats on average",
        "objective.kind = \"cal_dpo\"",
    ];
    check(&falls, &dpo(), "chosen-below-zero", 26, &says);
    let mut longer = Monitor::new(&dpo());
    let steps = (1..=500).flat_map(|step| longer.step(&row(step, -0.2, -1.0), 1000));
    let steps: Vec<_> = steps.map(|it| it.step).collect();
    assert_eq!(steps, [25, 100, 400]);
    // By chance below zero, or hardly below it.
    let noise = Run::of(
        |step| row(step, if step % 20 == 0 { 0.1 } else { -3.0 }, -4.0),
        |step| evaluation(step, 1.0, -4.0),
    );
    check_quiet(&noise, &dpo());
    check_quiet(&Run::to(-0.1, -4.0), &dpo());
}

#[test]
fn rejected_at_its_target_and_chosen_at_zero_is_a_reference_that_leaves_no_room() {
    let says = [
        "held-out rejected is at −2.88 of −5 nats, chosen at +0.12 of +5",
        "KL(chosen data ‖ reference)",
        "model.reference",
    ];
    check(
        &Run::to(0.2, -4.8),
        &cal_dpo(&[]),
        "no-room-for-chosen",
        60,
        &says,
    );
    check_quiet(&Run::to(1.0, -4.8), &cal_dpo(&[]));
    check_quiet(&Run::to(0.2, -2.0), &cal_dpo(&[]));
    check_quiet(&Run::to(0.2, -4.8), &dpo());
}

#[test]
fn a_margin_that_leaves_the_targets_behind_is_told() {
    let says = [
        "+30",
        "times the 10 nats that lie between the targets",
        "learning_rate",
    ];
    check(
        &Run::to(20.0, -25.0),
        &cal_dpo(&[]),
        "margin-explosion",
        73,
        &says,
    );
    check_quiet(&Run::to(10.0, -19.0), &cal_dpo(&[]));
}

#[test]
fn a_margin_beyond_what_the_pairs_are_about_is_told() {
    // The reference gives a pair −100 nats; β = 0.1.
    let says = ["more than the whole log-prob of a pair under the reference, 100 nats"];
    check(&Run::to(40.0, -75.0), &dpo(), "margin-explosion", 93, &says);
    check_quiet(&Run::to(40.0, -60.0), &dpo());
    let sharper = config(&["objective.kind=dpo", "objective.beta=0.5"]);
    let scaled = |beta: f64| {
        Run::to(10.0, -20.0).with(|row| {
            let of = &mut row.report.statistics;
            of.rewards_margins = beta * (of.log_ratios_chosen - of.log_ratios_rejected);
        })
    };
    let says = ["scaled by β it is 10.", "raise objective.beta"];
    check(&scaled(0.5), &sharper, "margin-explosion", 73, &says);
    check_quiet(&scaled(0.3), &sharper);
}

#[test]
fn a_gradient_that_is_always_clipped_is_told_with_what_it_means() {
    let clip = "optimizer.max_grad_norm=1.0";
    let norm = |long: f64, every: u64| {
        Run::to(3.8, -5.3).with(|row| {
            row.report.grad_norm = if row.report.step % every == 0 {
                0.5
            } else {
                long
            };
        })
    };
    let says = [
        "max_grad_norm = 1 in 50 of the last 50 steps (median 34.5): AdamW only sees",
        "Usual for Cal-DPO with targets of ±5 nats",
        "max_grad_norm = 70 would clip only the outliers",
    ];
    check(
        &norm(34.5, 1000),
        &cal_dpo(&[clip]),
        "gradient-always-clipped",
        50,
        &says,
    );
    let says = [
        "in 48 of the last 50",
        "RMSprop only sees its direction",
        "learning rate may be too high",
    ];
    let sft = config(&["objective.kind=sft", "optimizer.kind=rmsprop", clip]);
    check(&norm(34.5, 25), &sft, "gradient-always-clipped", 50, &says);
    check_quiet(&norm(34.5, 10), &cal_dpo(&[clip]));
    check_quiet(&norm(0.9, 1000), &cal_dpo(&[clip]));
    check_quiet(
        &norm(34.5, 1000),
        &cal_dpo(&["optimizer.max_grad_norm=0.0"]),
    );
}

#[test]
fn ties_are_told_where_the_accuracy_counts_halves() {
    let halves = |every: u64| {
        Run::to(3.8, -5.3).with(|row| {
            let odd = row.report.step % every == 0;
            row.report.statistics.rewards_accuracies = if odd { 23.5 / 32.0 } else { 24.0 / 32.0 };
        })
    };
    let says = ["tied in 13 of the last 40 steps", "counts each as half"];
    check(&halves(3), &cal_dpo(&[]), "many-ties", 41, &says);
    check_quiet(&halves(5), &cal_dpo(&[]));
}

#[test]
fn weights_that_do_not_move_are_told_as_ties() {
    let still = Run::to(0.0, 0.0).with(|row| row.report.statistics.rewards_accuracies = 0.5);
    let says = ["exactly 0 for 40 steps", "optimizer.learning_rate"];
    check(&still, &dpo(), "many-ties", 41, &says);
}

/// A run on batches of 8 pairs whose mean log-probs under the reference are `chosen` and −60 nats, with a scatter of 2 nats
/// between the batches, and −70 and −60 on 128 held-out pairs. The first epoch has `epoch` steps.
fn known(chosen: f64, epoch: u64) -> Run {
    let base = Run::to(3.8, -5.3).with(|row| {
        let report = &mut row.report;
        report.pairs = 8;
        report.epoch = (report.step - 1) / epoch;
        let of = &mut report.statistics;
        let scatter = if report.step % 2 == 0 { 2.0 } else { -2.0 };
        of.logps_chosen = of.log_ratios_chosen + chosen + scatter;
        of.logps_rejected = of.log_ratios_rejected - 60.0;
    });
    let mut run = base;
    for row in &mut run.evaluations {
        let of = &mut row.statistics;
        of.logps_chosen = of.log_ratios_chosen - 70.0;
        of.logps_rejected = of.log_ratios_rejected - 60.0;
    }
    run
}

#[test]
fn a_reference_that_knows_the_chosen_training_completions_is_told() {
    let kind = "reference-trained-on-chosen";
    let says = [
        "chosen minus rejected −5 nats on training pairs and −10 on held-out ones, 5 nats more (7 standard errors), 5 of them \
         on the chosen side",
        "model.reference",
    ];
    check(&known(-65.0, 1000), &cal_dpo(&[]), kind, 16, &says);
    // An epoch of ten steps is looked at when it is over, one of seven is too short.
    check(&known(-60.0, 10), &dpo(), kind, 11, &["10 nats more"]);
    check_quiet(&known(-60.0, 7), &dpo());
}

#[test]
fn a_reference_that_does_not_know_them_is_not_spoken_of() {
    check_quiet(&known(-70.0, 1000), &cal_dpo(&[]));
    // Four standard errors: chance, now and then.
    check_quiet(&known(-67.2, 1000), &cal_dpo(&[]));
    // Held-out pairs that it knows better than the training pairs.
    check_quiet(&known(-80.0, 1000), &cal_dpo(&[]));
    check_quiet(&known(-60.0, 1000).without_held_out(), &cal_dpo(&[]));
    // Sure, and too little to matter.
    let little = known(-69.2, 1000).with(|row| {
        let of = &mut row.report.statistics;
        let scatter = if row.report.step % 2 == 0 {
            1.99
        } else {
            -1.99
        };
        of.logps_chosen -= scatter;
    });
    check_quiet(&little, &cal_dpo(&[]));
    // The difference is the rejected side's: other held-out pairs, not a trained reference.
    let rejected = known(-70.0, 1000).with(|row| row.report.statistics.logps_rejected -= 20.0);
    check_quiet(&rejected, &cal_dpo(&[]));
}

#[test]
fn evaluations_that_never_beat_the_start_are_told_after_the_third() {
    let compared = |metric: &str| {
        let metric = format!("evaluate.metric={metric}");
        config(&[
            "objective.kind=dpo",
            "objective.beta=0.1",
            &metric,
            "data.eval=['test.jsonl']",
            "evaluate.every_steps=20",
        ])
    };
    let falls = Run::to(-0.09, -20.0);
    let says = [
        "no evaluation has beaten the starting weights by log_ratios/chosen: 0.0000 before training, -0.0180 at its best \
         (step 20)",
    ];
    check(
        &falls,
        &compared("log_ratios/chosen"),
        "no-better-than-start",
        60,
        &says,
    );
    check_quiet(&Run::to(2.5, -4.0), &compared("log_ratios/chosen"));
    check_quiet(&falls, &dpo());
    // Equal is no better.
    check(
        &falls,
        &compared("loss"),
        "no-better-than-start",
        60,
        &["1.0000 before training"],
    );
}

#[test]
fn a_skipped_step_has_no_numbers_to_judge_by() {
    let skipped = Run::to(-10.0, -20.0).with(|row| {
        row.report.finite = row.report.step % 2 == 0;
        if !row.report.finite {
            row.report.grad_norm = f64::NAN;
            row.report.statistics = Statistics::from_values([f64::NAN; 11]);
        }
    });
    check(&skipped, &dpo(), "chosen-below-zero", 50, &["for 25 steps"]);
    let all = Run::to(-10.0, -20.0).with(|row| row.report.finite = false);
    check_quiet(&all.without_held_out(), &dpo());
}

#[test]
fn a_run_without_rewards_is_watched_for_clipping_alone() {
    let sft = config(&["objective.kind=sft"]);
    check_quiet(&Run::to(-10.0, -2000.0), &sft);
}

#[test]
fn t3_a_resumed_run_says_what_an_uninterrupted_one_says() {
    let config = cal_dpo(&["objective.beta=0.002", "optimizer.max_grad_norm=0.1"]);
    let run = Run::to(-10.0, -20.0);
    let whole = run.warnings(&config);
    assert!(whole.len() >= 3, "{whole:#?}");
    for cut in 0..=STEPS {
        let mut monitor = Monitor::new(&config);
        let rows = &run.metrics[..cut as usize];
        let evaluations: Vec<_> = run
            .evaluations
            .iter()
            .filter(|it| it.step <= cut)
            .copied()
            .collect();
        let mut said = monitor.replay(rows, &evaluations, STEPS);
        for row in &run.metrics[cut as usize..] {
            said.extend(monitor.step(row, STEPS));
            let evaluation = run.evaluations.iter().find(|it| it.step == row.report.step);
            said.extend(evaluation.map_or_else(Vec::new, |it| monitor.evaluation(it, STEPS)));
        }
        assert_eq!(said, whole, "cut after step {cut}");
    }
}

#[test]
fn the_data_reports_warnings_are_found_with_their_files() {
    let text = "training pairs\n3 pairs of 4 rows\nwarning: 1 of 3 is cut\n  prompt    warning: no\n\nheld-out pairs\n\
                9 pairs of 9 rows\nwarning: 2 of 9 repeat";
    let texts: Vec<_> = of_data_report(text).into_iter().map(|it| it.text).collect();
    assert_eq!(
        texts,
        [
            "training pairs: 1 of 3 is cut",
            "held-out pairs: 2 of 9 repeat"
        ]
    );
    assert_eq!(of_data_report("4 pairs of 4 rows\n"), []);
}

#[test]
fn workers_without_a_pair_are_told_of_before_training() {
    let check = |set: &[&str], words: &[&str]| {
        let said = Monitor::new(&cal_dpo(set)).start();
        let Some(warning) = said.first() else {
            return assert!(words.is_empty(), "{set:?}: nothing is said");
        };
        assert_eq!((said.len(), warning.step), (1, 0), "{set:?}: {said:?}");
        assert_eq!(warning.kind, "idle-workers");
        assert!(!words.is_empty(), "{set:?}: {}", warning.text);
        for word in words {
            assert!(
                warning.text.contains(word),
                "{set:?}: no `{word}` in {}",
                warning.text
            );
        }
    };
    check(&[], &[]);
    check(&["train.batch_pairs=4", "cluster.workers=4"], &[]);
    check(
        &["train.batch_pairs=4", "cluster.workers=6"],
        &[
            "4 pairs (train.batch_pairs) for 6 workers (cluster.workers)",
            "2 have nothing to compute",
            "set cluster.workers to at most 4",
        ],
    );
    check(
        &[
            "train.batch_pairs=1",
            "cluster.workers=1",
            "cluster.max_workers=2",
        ],
        &[
            "1 pair (",
            "2 workers (cluster.max_workers)",
            "set cluster.max_workers to at most 1",
        ],
    );
}
