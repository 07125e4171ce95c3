//! The reward plot: both formats, with and without targets, and of runs that are short of rows. The pictures stay in the
//! target's `tmp` folder to be looked at.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use coordinator::plots::{Drawing, RewardPlot, draw};
use protocol::{EvaluationRow, MetricsRow, Phases, Statistics, StepReport};

/// A run whose log-ratios end at `chosen` and `rejected`.
fn run(chosen: f64, rejected: f64, calibrated: bool) -> (Vec<MetricsRow>, Vec<EvaluationRow>) {
    let mut noise = 7_u64;
    let mut jitter = move || {
        noise = noise
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (noise >> 33) as f64 / f64::from(1_u32 << 31) - 0.5
    };
    let statistics = |step: u64, spread: f64, jitter: &mut dyn FnMut() -> f64| {
        let approach = 1.0 - (-(step as f64) / 35.0).exp();
        let (w, l) = (
            approach * chosen * (1.0 + spread * jitter()),
            approach * rejected * (1.0 + spread * jitter()),
        );
        Statistics {
            loss_pairwise: (1.0 + (l - w).exp()).ln(),
            loss_calibration: if calibrated {
                (w - 5.0).powi(2) + (l + 5.0).powi(2)
            } else {
                0.0
            },
            rewards_accuracies: 0.5 + 0.37 * approach + 0.1 * spread * jitter(),
            log_ratios_chosen: w,
            log_ratios_rejected: l,
            ..Statistics::default()
        }
    };
    let metrics = (1..=240).map(|step| MetricsRow {
        report: StepReport {
            step,
            finite: true,
            statistics: statistics(step, 0.7, &mut jitter),
            ..StepReport::default()
        },
        tokens_per_second: 900.0,
        world_size: 2,
        generation: 1,
        seconds: 0.1,
        gpu: protocol::GpuFigures::default(),
        phases: Phases::default(),
    });
    let metrics = metrics.collect();
    let evaluations = (0..=12).map(|index| EvaluationRow {
        step: index * 20,
        pairs: 123,
        statistics: statistics(index * 20, 0.06, &mut |/* quiet */| 0.3),
    });
    (metrics, evaluations.collect())
}

fn check(name: &str, plot: &RewardPlot, says: &[&str], silent: &[&str]) {
    let Drawing { png, svg } = draw(plot).unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::write(folder.join(format!("{name}.png")), &png).unwrap();
    std::fs::write(folder.join(format!("{name}.svg")), &svg).unwrap();
    let decoder = png::Decoder::new(std::io::Cursor::new(&png));
    let mut reader = decoder.read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((frame.width, frame.height), (1800, 1300));
    assert!(pixels.iter().any(|&byte| byte < 64), "{name} has no ink");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    for text in says {
        assert!(svg.contains(text), "{name} does not say `{text}`");
    }
    for text in silent {
        assert!(!svg.contains(text), "{name} says `{text}`");
    }
}

/// ±t.
fn around(t: f64) -> spec::Targets {
    spec::Targets {
        chosen: t,
        rejected: -t,
    }
}

#[test]
fn a_calibrated_run_shows_its_targets() {
    let (metrics, evaluations) = run(2.8, -4.3, true);
    let plot = RewardPlot {
        title: "stories · cal_dpo, β = 0.1",
        metrics: &metrics,
        evaluations: &evaluations,
        targets: Some(around(5.0)),
    };
    let says = [
        "chosen, held-out",
        "rejected, training",
        "= ±5",
        "calibration loss",
        "step",
        "+2.8",
    ];
    check("calibrated", &plot, &says, &["far outside"]);
}

#[test]
fn far_targets_are_told_and_do_not_flatten_the_curves() {
    let (metrics, evaluations) = run(2.8, -4.3, true);
    let plot = RewardPlot {
        title: "stories · cal_dpo, β = 0.002",
        metrics: &metrics,
        evaluations: &evaluations,
        targets: Some(around(250.0)),
    };
    check("far", &plot, &["±250, far outside this scale"], &[]);
}

#[test]
fn an_objective_without_targets_draws_none() {
    let (metrics, evaluations) = run(-48.3, -162.0, false);
    let plot = RewardPlot {
        title: "stories · dpo, β = 0.1",
        metrics: &metrics,
        evaluations: &evaluations,
        targets: None,
    };
    check(
        "dpo",
        &plot,
        &["chosen, held-out", "pairwise loss"],
        &["target", "calibration"],
    );
}

#[test]
fn a_run_with_few_or_strange_rows_is_drawn() {
    let (mut metrics, evaluations) = run(2.8, -4.3, true);
    let empty = RewardPlot {
        title: "empty",
        metrics: &[],
        evaluations: &[],
        targets: Some(around(5.0)),
    };
    check("empty", &empty, &["±5"], &["held-out", "training"]);
    let first = RewardPlot {
        title: "first",
        metrics: &[],
        evaluations: &evaluations[..1],
        targets: Some(around(5.0)),
    };
    check(
        "first",
        &first,
        &["chosen, held-out"],
        &["chosen, training"],
    );
    metrics[100].report.statistics.log_ratios_chosen = f64::NAN;
    metrics[101].report.statistics.loss_pairwise = f64::INFINITY;
    metrics[102].report.statistics.log_ratios_rejected = f64::NEG_INFINITY;
    let holes = RewardPlot {
        title: "holes",
        metrics: &metrics,
        evaluations: &[],
        targets: None,
    };
    check(
        "holes",
        &holes,
        &["chosen, training"],
        &["chosen, held-out"],
    );
}
