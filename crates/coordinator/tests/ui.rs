//! What a person sees: the banner, the lines without a terminal, the table at the end; and the summary behind it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::Write,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant, UNIX_EPOCH},
};

use coordinator::{
    config::{Config, Sources},
    monitor::Warning,
    run_directory::SampleRow,
    summary::{Artifacts, Ending, ReferenceCounts, Summary},
    ui::{Banner, Console, Report},
};
use protocol::{
    Cause, EvaluationRow, MetricsRow, Outcome, Phases, RunFacts, Sample, Statistics, Step,
    StepReport,
};
use serde_json::Value;

fn config(set: &[&str]) -> Config {
    let least = [
        "model.path=m",
        "data.train=['train.jsonl']",
        "objective.kind=cal_dpo",
    ];
    let sources = Sources {
        set: least.iter().chain(set).map(|text| (*text).into()).collect(),
        ..Sources::default()
    };
    Config::load(&sources).unwrap()
}

fn calibrated() -> Config {
    config(&[
        "job.name=stories",
        "model.path=models/stories260k",
        "data.train=['train.jsonl']",
        "data.eval=['test.jsonl']",
        "objective.kind=cal_dpo",
        "objective.beta=0.1",
        "cluster.threads=1",
    ])
}

fn statistics(chosen: f64, rejected: f64) -> Statistics {
    Statistics {
        loss: 12.25,
        loss_pairwise: 0.25,
        loss_calibration: 12.0,
        log_ratios_chosen: chosen,
        log_ratios_rejected: rejected,
        rewards_accuracies: 0.87,
        ..Statistics::default()
    }
}

fn row(step: u64) -> MetricsRow {
    MetricsRow {
        report: StepReport {
            step,
            finite: step != 3,
            statistics: statistics(2.8, -4.3),
            grad_norm: 123.4,
            tokens: 1000,
            pairs: 8,
            ..StepReport::default()
        },
        tokens_per_second: 2000.0,
        world_size: 2,
        generation: 1,
        seconds: 0.5,
        gpu: protocol::GpuFigures::default(),
        phases: Phases {
            forward: 0.25,
            head: 0.001,
            backward: 0.5,
            wait: 0.25 * step as f64,
            ..Phases::default()
        },
    }
}

fn evaluation(step: u64, chosen: f64, rejected: f64) -> EvaluationRow {
    EvaluationRow {
        step,
        pairs: 1230,
        statistics: statistics(chosen, rejected),
    }
}

fn samples(step: u64, text: &str) -> SampleRow {
    let sample = Sample {
        prompt: "Once upon a time".into(),
        text: text.into(),
    };
    SampleRow {
        step,
        samples: vec![sample],
    }
}

fn summary(outcome: &Outcome, evaluations: &[EvaluationRow]) -> Summary {
    let metrics: Vec<_> = (1..=4).map(row).collect();
    let facts = RunFacts {
        steps_total: 240,
        ..RunFacts::default()
    };
    let ending = Ending {
        outcome,
        facts: Some(&facts),
        metrics: &metrics,
        evaluations,
        early_stop: None,
        warnings: &[],
        reference: ReferenceCounts {
            reused: 3,
            computed: 9,
        },
        artifacts: Artifacts {
            export: Some("runs/stories/export".into()),
            ..Artifacts::default()
        },
    };
    Summary::new(&calibrated(), ending, UNIX_EPOCH)
}

fn report(summary: &Summary, steps_total: u64, samples: &[SampleRow]) -> String {
    let report = Report {
        summary,
        steps_total: Some(steps_total),
        samples,
        summary_path: Path::new("runs/stories/summary.json"),
        next: "coordinator --config dpo.toml",
    };
    report.to_string()
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

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn lines(&self) -> Vec<String> {
        let bytes = self.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

#[test]
fn the_banner_says_what_will_run_on_what_and_where() {
    let text = Banner::new(&calibrated(), None).to_string();
    print!("{text}");
    let says = [
        "stories, seed 0",
        "cal_dpo, β = 0.1: chosen to +5, rejected to −5 nats",
        "models/stories260k",
        "train.jsonl; held out: test.jsonl",
        "2 × 1 thread on",
        "runs/stories/checkpoints, every 100 steps",
    ];
    check(&text, &says, &["continued"]);
    for (set, says) in [
        (
            &["objective.kind=cal_dpo", "objective.calibration_shift=0.25"][..],
            "cal_dpo, β = 0.1, s = 0.25: chosen to +7.5, rejected to −2.5 nats",
        ),
        (&["objective.kind=simpo"], "simpo, β = 2\n"),
        (
            &["objective.kind=slic", "objective.calibration_weight=0.5"],
            "slic, β = 0.1, λ = 0.5: chosen to +5, rejected to −5 nats",
        ),
        (
            &[
                "objective.kind=mix",
                "objective.parts=[{kind=\"dpo\"},{kind=\"sft\",weight=0.5}]",
            ],
            "mix of dpo, β = 0.1 + 0.5 · sft\n",
        ),
    ] {
        check(&Banner::new(&config(set), None).to_string(), &[says], &[]);
    }
    let continued = Banner::new(&calibrated(), Some(40)).to_string();
    check(&continued, &["stories, continued after step 40"], &[]);
    let dpo = config(&[
        "model.path=m",
        "data.train=['train.jsonl']",
        "objective.kind=dpo",
        "objective.beta=0.1",
    ]);
    check(
        &Banner::new(&dpo, None).to_string(),
        &["dpo, β = 0.1", "train.jsonl; none held out"],
        &["nats"],
    );
}

#[test]
fn without_a_terminal_there_is_at_most_a_line_a_second_and_the_last_one() {
    let out = Shared::default();
    let mut console = Console::lines(Box::new(out.clone()));
    let start = Instant::now();
    for step in 1..=25 {
        console.step(start + Duration::from_millis(100 * step), &row(step), 25);
    }
    console.finish(start + Duration::from_secs(3));
    let lines = out.lines();
    let steps: Vec<_> = lines
        .iter()
        .map(|line| line.split(':').next().unwrap())
        .collect();
    assert_eq!(
        steps,
        ["step 1/25", "step 11/25", "step 21/25", "step 25/25"]
    );
    check(
        &lines[0],
        &[
            "loss 12.2 (0.25 pairwise + 12 calibration)",
            "chosen +2.8",
            "rejected −4.3",
            "accuracy 0.87",
            "grad norm 123",
            "16 pairs/s",
            "2,000 tokens/s",
        ],
        &[],
    );
}

#[test]
fn a_run_that_stops_early_still_shows_its_last_step() {
    let out = Shared::default();
    let mut console = Console::lines(Box::new(out.clone()));
    let now = Instant::now();
    console.step(now, &row(1), 100);
    console.step(now, &row(2), 100);
    console.step(now, &row(3), 100);
    console.finish(now);
    console.finish(now);
    let lines = out.lines();
    assert_eq!(lines.len(), 2, "{lines:?}");
    check(
        &lines[1],
        &["step 3/100: skipped, the gradient is not finite"],
        &["loss", "grad norm"],
    );
}

#[test]
fn the_time_left_is_that_of_this_process() {
    let out = Shared::default();
    let mut console = Console::lines(Box::new(out.clone()));
    let start = Instant::now();
    console.step(start, &row(100), 200);
    console.step(start + Duration::from_secs(4), &row(102), 200);
    let lines = out.lines();
    check(&lines[0], &["50.0 s left"], &[]);
    check(&lines[1], &["3 min 16 s left"], &[]);
}

#[test]
fn ranks_add_up_in_a_phase() {
    let out = Shared::default();
    let mut console = Console::lines(Box::new(out.clone()));
    let start = Instant::now();
    let after = |seconds| start + Duration::from_secs(seconds);
    console.say("banner");
    console.phase(after(0), 0, "reference pass", 0, 600);
    console.phase(after(2), 1, "reference pass", 500, 600);
    console.phase(after(2), 0, "reference pass", 1, 600);
    console.phase(after(2), 0, "load model", 1, 2);
    console.evaluation(&evaluation(0, 0.0, 0.0));
    let expected = [
        "banner",
        "reference pass 0/600",
        "reference pass 500/1,200",
        "reference pass 501/1,200",
    ];
    assert_eq!(out.lines()[..4], expected);
    check(
        &out.lines()[4],
        &["step 0 held-out (1,230 pairs): chosen 0, rejected 0, accuracy 0.87"],
        &[],
    );
}

#[test]
fn the_end_shows_before_and_after_and_where_things_are() {
    let evaluations = [
        evaluation(0, 0.0, 0.0),
        evaluation(2, 1.0, -1.0),
        evaluation(4, 2.812, -42.04),
    ];
    let summary = summary(&Outcome::Completed, &evaluations);
    let long = "word ".repeat(200);
    let text = report(&summary, 4, &[samples(0, "there was."), samples(4, &long)]);
    print!("{text}");
    let says = [
        "stories is complete",
        "4 steps in 2.0 s, 16 pairs/s, 2,000 tokens/s, 1 skipped because the gradient was not finite\n\
         time by phase: forward 18 %, backward 36 %, wait 45 %\n\n",
        "held-out, 1,230 pairs",
        "step 0",
        "step 4",
        "+2.81",
        "−42",
        "+44.9",
        "0.870",
        "Once upon a time",
        "there was.",
        "runs/stories/export",
        "runs/stories/summary.json",
        "coordinator --config dpo.toml",
        "…",
    ];
    check(&text, &says, &["step 2", "plot"]);
    let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest <= 100, "{widest} columns");
}

#[test]
fn a_run_that_did_not_complete_says_why_and_what_to_do() {
    let committed = Step(4);
    let stopped = summary(&Outcome::Interrupted { committed }, &[]);
    check(
        &report(&stopped, 240, &[]),
        &["stories was stopped after step 4 of 240; the same command continues it"],
        &["held-out"],
    );
    let outcome = Outcome::Failed {
        cause: Cause::Temporary,
        reason: "rank 1 was lost".into(),
    };
    let failed = summary(&outcome, &[evaluation(0, 0.0, 0.0)]);
    let text = report(&failed, 240, &[samples(0, "one")]);
    assert!(!text.contains("objective.beta"));
    check(
        &text,
        &[
            "stories failed after step 4 of 240: rank 1 was lost",
            "step 0",
        ],
        &["before"],
    );
}

fn warning(kind: &str, step: u64, text: &str) -> Warning {
    Warning {
        kind: kind.into(),
        step,
        text: text.into(),
    }
}

#[test]
fn warnings_are_listed_the_latest_of_each_rule() {
    let warnings = [
        warning("data", 0, "training pairs: 7 of 100 are cut"),
        warning("data", 0, "held-out pairs: 3 of 10 are cut"),
        warning("chosen-below-zero", 25, "below zero for 25 steps"),
        warning("many-ties", 41, &"tied ".repeat(60)),
        warning("chosen-below-zero", 100, "below zero for 100 steps"),
    ];
    let mut summary = summary(&Outcome::Completed, &[]);
    check(&report(&summary, 4, &[]), &[], &["warning"]);
    summary.warnings = coordinator::summary::latest(&warnings);
    let json = serde_json::to_value(&summary).unwrap();
    let kinds: Vec<_> = json["warnings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| &it["kind"])
        .collect();
    assert_eq!(kinds, ["data", "data", "chosen-below-zero", "many-ties"]);
    assert_eq!(json["warnings"][2]["step"], 100);
    let text = report(&summary, 4, &[]);
    let says = [
        "\nwarning     training pairs: 7 of 100 are cut\n",
        "\nwarning     held-out pairs: 3 of 10 are cut\n",
        "\nwarning     below zero for 100 steps\n",
        "\n            tied tied",
    ];
    check(&text, &says, &["25 steps"]);
    let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest <= 100, "{widest} columns");
}

#[test]
fn a_warning_is_shown_while_it_runs() {
    let out = Shared::default();
    let mut console = Console::lines(Box::new(out.clone()));
    console.warn(&"far ".repeat(40));
    let lines = out.lines();
    assert!(lines[0].starts_with("warning: far far"), "{lines:?}");
    assert!(lines[1].starts_with("         far"), "{lines:?}");
}

/// A run of 4 steps that compares its evaluations by their accuracy, and stopped early where `early`.
fn compared(export_step: u64, early: bool) -> Summary {
    let config = config(&[
        "job.name=stories",
        "data.eval=['test.jsonl']",
        "objective.kind=dpo",
        "evaluate.metric=rewards/accuracies",
        "evaluate.every_steps=2",
        "evaluate.early_stopping_patience=1",
    ]);
    let accuracies = [(0, 0.5), (2, 0.75), (3, 0.7), (4, 0.625)];
    let evaluations = accuracies.map(|(step, accuracy)| {
        let mut row = evaluation(step, step as f64, -1.0);
        row.statistics.rewards_accuracies = accuracy;
        row
    });
    let selection = config.selection().unwrap();
    let decision = selection.early_stop(&evaluations[..3]).unwrap();
    let metrics: Vec<_> = (1..=4).map(row).collect();
    let facts = RunFacts {
        steps_total: 240,
        ..RunFacts::default()
    };
    let ending = Ending {
        outcome: &Outcome::Completed,
        facts: Some(&facts),
        metrics: &metrics,
        evaluations: &evaluations,
        early_stop: early.then_some(&decision),
        warnings: &[],
        reference: ReferenceCounts::default(),
        artifacts: Artifacts {
            export: Some("runs/stories/export".into()),
            export_step: Some(export_step),
            ..Artifacts::default()
        },
    };
    Summary::new(&config, ending, UNIX_EPOCH)
}

#[test]
fn a_run_that_stopped_early_says_when_and_why_and_what_is_exported() {
    let summary = compared(2, true);
    let samples = [samples(0, "before"), samples(2, "best"), samples(4, "last")];
    let text = report(&summary, 240, &samples);
    print!("{text}");
    let says = [
        "stories ended early, with step 4 of 240: rewards/accuracies has not come above its 0.7500 of step 2\n\
         in 1 evaluation (0.7000 at step 3)\n",
        "┆ step 0 ┆ step 2 ┆ step 4 │",
        "0.500 ┆  0.750 ┆  0.625",
        "exported: the weights of step 2, the best evaluated one (rewards/accuracies 0.7500, 0.5000 before\ntraining)",
        "after       best",
    ];
    check(&text, &says, &["complete", "last"]);
    let json = serde_json::to_value(&summary).unwrap();
    assert_eq!(json["outcome"], "completed");
    assert_eq!(json["early_stop"]["step"], 4);
    assert_eq!(json["early_stop"]["decision"]["step"], 3);
    assert_eq!(json["early_stop"]["decision"]["improved"]["value"], 0.75);
    assert_eq!(json["best"]["step"], 2);
    assert_eq!(json["best"]["start"], 0.5);
    assert_eq!(json["export_step"], 2);
    assert_eq!(json["facts"]["steps_total"], 240);
}

#[test]
fn a_run_that_exports_its_last_step_says_that_another_was_better() {
    let text = report(&compared(4, false), 4, &[]);
    let says = [
        "stories is complete",
        "exported: the weights of step 4; those of step 2 were better",
        "┆ step 0 ┆ step 4 │",
    ];
    check(&text, &says, &["early", "step 2 ┆"]);
}

#[test]
fn the_banner_says_what_evaluations_are_compared_by() {
    let config = config(&[
        "data.eval=['test.jsonl']",
        "evaluate.metric=loss",
        "evaluate.every_steps=20",
        "evaluate.early_stopping_patience=3",
        "evaluate.early_stopping_min_delta=0.5",
    ]);
    let says = [
        "every 20 steps by loss (lower is better); training ends after 3 evaluations without a gain of more than 0.5",
        "every 100 steps, and at evaluations; the best stays and is exported",
    ];
    check(&Banner::new(&config, None).to_string(), &says, &[]);
    check(
        &Banner::new(&calibrated(), None).to_string(),
        &[],
        &["evaluation"],
    );
}

#[test]
fn where_all_phases_took_time_the_line_is_wrapped_and_where_nobody_measured_there_is_none() {
    let ended = |phases: Phases| {
        let metrics = [MetricsRow { phases, ..row(1) }];
        let ending = Ending {
            outcome: &Outcome::Completed,
            facts: None,
            metrics: &metrics,
            evaluations: &[],
            early_stop: None,
            warnings: &[],
            reference: ReferenceCounts::default(),
            artifacts: Artifacts::default(),
        };
        Summary::new(&calibrated(), ending, UNIX_EPOCH)
    };
    let all = ended(Phases::from_values([
        10.0, 20.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0,
    ]));
    let text = report(&all, 1, &[]);
    let says = [
        "\ntime by phase: data 10 %, forward 20 %, head 10 %",
        "wait 10 %\n",
    ];
    check(&text, &says, &[]);
    let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest <= 100, "{widest} columns");

    let none = ended(Phases::default());
    check(&report(&none, 1, &[]), &["1 step in"], &["time by phase"]);
    let json = serde_json::to_value(&none).unwrap();
    assert_eq!(json.get("phase_shares"), None);
    assert_eq!(json["totals"]["seconds/forward"], 0.0);
}

#[test]
fn the_summary_is_for_scripts() {
    let evaluations = [evaluation(0, 0.0, 0.0), evaluation(4, 2.8, -4.3)];
    let completed = serde_json::to_value(summary(&Outcome::Completed, &evaluations)).unwrap();
    assert_eq!(completed["outcome"], "completed");
    assert_eq!(completed["time"], "1970-01-01T00:00:00.000Z");
    assert_eq!(completed["target"], 5.0);
    assert_eq!(completed["target_rejected"], -5.0);
    assert_eq!(completed["totals"]["steps"], 4);
    assert_eq!(completed["totals"]["skipped_steps"], 1);
    assert_eq!(completed["totals"]["pairs_per_second"], 16.0);
    assert_eq!(completed["totals"]["seconds/forward"], 1.0);
    assert_eq!(completed["totals"]["seconds/wait"], 2.5);
    let shares = completed["phase_shares"].as_object().unwrap();
    assert_eq!(shares.len(), 9);
    let of = |phase: &str| shares[phase].as_f64().unwrap();
    assert!((of("backward") - 2.0 / 5.504).abs() < 1e-12, "{shares:?}");
    let sum: f64 = shares.values().map(|share| share.as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-12, "{shares:?}");
    assert_eq!(completed["reference"]["computed"], 9);
    assert_eq!(completed["before"]["step"], 0);
    assert_eq!(completed["after"]["log_ratios/chosen"], 2.8);
    assert_eq!(completed["last_step"]["step"], 4);
    assert_eq!(completed["export"], "runs/stories/export");
    assert_eq!(completed["plot"], Value::Null);
    let outcome = Outcome::Failed {
        cause: Cause::Temporary,
        reason: "rank 1 was lost".into(),
    };
    let failed = serde_json::to_value(summary(&outcome, &evaluations[..1])).unwrap();
    assert_eq!(failed["outcome"], "failed");
    assert_eq!(failed["cause"], "temporary");
    assert_eq!(failed["reason"], "rank 1 was lost");
    assert_eq!(failed["after"], Value::Null);
}
