//! Objectives that read the whole batch, rows without a pair, and targets from scores: the same on any number of ranks and
//! however pairs are packed.

use std::fmt::Write as _;

use crate::support::{Folder, Run, Script, relative_error, run, try_run};
use trainer::Cause;

fn training(folder: &Folder, objective: &str, more: &str) -> spec::Spec {
    folder.spec(&format!(
        "objective = {{ {objective} }}\noptimizer.learning_rate = 1e-3\n\
         train = {{ steps = 10, batch_pairs = 8, micro_batch_tokens = 96 }}\n{more}"
    ))
}

/// Ten rows of an unpaired file, desirable ones first.
fn unpaired(folder: &Folder) {
    let mut rows = String::new();
    for row in 0..10 {
        let (prompt, word) = (2 + row % 3, 10 + row);
        let label = row < 6;
        writeln!(
            rows,
            "{{\"prompt\": \"w{prompt} w3\", \"completion\": \" w{word} w4\", \"label\": {label}}}"
        )
        .unwrap();
    }
    folder.write("train.jsonl", &rows);
    folder.write("eval.jsonl", &rows);
}

#[test]
fn t2_statistics_of_the_batch_are_those_of_all_ranks() {
    for objective in [
        "kind = \"bco_pair\"",
        "kind = \"aot\", label_smoothing = 0.1",
        "kind = \"aot_unpaired\"",
        "kind = \"kto\"",
        "kind = \"mix\", parts = [{ kind = \"bco_pair\" }, { kind = \"sft\", weight = 0.1 }]",
    ] {
        let folder = Folder::new(20);
        let spec = training(&folder, objective, "");
        let script = Script {
            evaluate: true,
            ..Script::default()
        };
        let alone = run(&spec, 1, &script);
        let moved = |run: &Run| {
            run.reports
                .iter()
                .map(|report| report.loss)
                .collect::<Vec<_>>()
        };
        assert_ne!(moved(&alone)[0], moved(&alone)[9], "{objective}");
        for world in 2..=3 {
            let run = run(&spec, world, &script);
            for (report, expected) in run.reports.iter().zip(&alone.reports) {
                let drift = relative_error(report.loss, expected.loss);
                assert!(drift < 1e-5, "{objective}, world of {world}: {drift}");
            }
            let last = |run: &Run| run.evaluations.last().unwrap().0.loss;
            assert!(
                relative_error(last(&run), last(&alone)) < 1e-5,
                "{objective}"
            );
        }
        // One pair at a time.
        let mut spec = spec;
        spec.train.micro_batch_tokens = 1;
        for (split, whole) in run(&spec, 1, &Script::default())
            .reports
            .iter()
            .zip(&alone.reports)
        {
            assert!(relative_error(split.loss, whole.loss) < 1e-5, "{objective}");
        }
    }
}

#[test]
fn t5_kto_starts_at_one_half_and_raises_desirable_rows() {
    let folder = Folder::new(4);
    unpaired(&folder);
    let mut spec = training(
        &folder,
        "kind = \"kto\", beta = 0.5",
        "schedule.warmup_steps = 0",
    );
    spec.train.steps = Some(40);
    spec.train.batch_pairs = 10;
    for world in [1, 2] {
        let run = run(&spec, world, &Script::default());
        let (first, last) = (&run.reports[0], run.reports.last().unwrap());
        // σ(0) for every completion, z = 0.
        assert!((first.loss - 0.5).abs() < 1e-12, "{}", first.loss);
        assert_eq!(first.rewards.log_ratios_chosen.to_bits(), 0);
        assert_eq!(first.rewards.rewards_accuracies, 0.5);
        assert!(last.loss < 0.4, "{}", last.loss);
        assert!(last.rewards.rewards_chosen > last.rewards.rewards_rejected);
        assert!(last.rewards.rewards_accuracies > 0.7);
        // Reference values of mismatched completions are there as well.
        let computed: u64 = run.counts.iter().map(|counts| counts.computed).sum();
        assert!(world == 2 || computed > 10, "{computed}");
    }
}

#[test]
fn unpaired_rows_are_refused_where_two_completions_are_compared() {
    let folder = Folder::new(4);
    unpaired(&folder);
    let spec = training(&folder, "kind = \"dpo\"", "");
    let error = try_run(&spec, 1, &Script::default())
        .err()
        .expect("refused");
    assert_eq!(error.cause(), Cause::Config);
    assert!(error.to_string().contains("kto"), "{error}");
    let sft = training(&folder, "kind = \"sft\"", "");
    let run = run(&sft, 1, &Script::default());
    assert_eq!(run.reports[0].pairs, 6, "undesirable rows are left out");
}

#[test]
fn targets_follow_the_scores_of_a_pair() {
    let folder = Folder::new(4);
    let row = |gap: f64| {
        format!(
            "{{\"prompt\": \"w2\", \"chosen\": \" w3 w4\", \"rejected\": \" w5\", \"score_chosen\": {gap}, \
             \"score_rejected\": 0}}\n"
        )
    };
    let loss = |gap: f64, objective: &str| {
        folder.write("train.jsonl", &row(gap).repeat(8));
        folder.write("eval.jsonl", &row(gap));
        let spec = training(&folder, objective, "");
        run(&spec, 1, &Script::default()).reports[0].loss
    };
    let scored = "kind = \"cal_dpo\", score_scale = 0.5";
    // ln 2 + 2 t² with t = κ·g/(2β).
    for (gap, target) in [(1.0, 2.5), (2.0, 5.0), (4.0, 10.0)] {
        let expected = 2f64.ln() + 2.0 * target * target;
        assert!((loss(gap, scored) - expected).abs() < 1e-9, "{gap}");
    }
    assert!((loss(9.0, "kind = \"cal_dpo\"") - (2f64.ln() + 50.0)).abs() < 1e-9);
    folder.write(
        "train.jsonl",
        "{\"prompt\": \"w2\", \"chosen\": \" w3\", \"rejected\": \" w5\"}\n",
    );
    let error = try_run(&training(&folder, scored, ""), 1, &Script::default())
        .err()
        .expect("refused");
    assert!(error.to_string().contains("score_chosen"), "{error}");
}
