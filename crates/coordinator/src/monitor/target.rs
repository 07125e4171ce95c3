//! Calibration targets that the log-ratios never come near: their gradient is a constant push, and nothing is calibrated.

use protocol::{EvaluationRow, MetricsRow, Statistics};
use spec::Targets;

use super::Watched;
use super::window::Window;
use crate::{numbers::plain, objective::both};

/// Times the largest log-ratio. At ten times, the calibration's gradient 2λ(t − r) is within a tenth of the constant 2λt
/// (Cal-DPO, equation 10), and reported runs at such β lose the method's effect.
const TARGET_TIMES_MAX: f64 = 10.0;
/// Of the schedule: by then the steps with the highest learning rate are done, and log-ratios move little after them.
const LOOK_AFTER: f64 = 0.5;
/// One batch is noisy. Shorter runs than this say nothing about reach.
const STEPS: usize = 10;

#[derive(Default)]
pub(super) struct Target {
    chosen: Window<f64, STEPS>,
    rejected: Window<f64, STEPS>,
    evaluated: bool,
    said: bool,
}

impl Target {
    /// Looks at training rows where nothing is held out.
    pub(super) fn step(
        &mut self,
        watched: &Watched,
        row: &MetricsRow,
        steps_total: u64,
    ) -> Option<String> {
        let of = &row.report.statistics;
        self.chosen.push(of.log_ratios_chosen);
        let full = self.rejected.push(of.log_ratios_rejected);
        let targets = watched.targets?;
        if self.said || self.evaluated || !full || !is_late(row.report.step, steps_total) {
            return None;
        }
        let means = Statistics {
            log_ratios_chosen: self.chosen.mean(),
            log_ratios_rejected: self.rejected.mean(),
            ..Statistics::default()
        };
        let text = out_of_reach(targets, &means, "training");
        self.said = text.is_some();
        text
    }

    pub(super) fn evaluation(
        &mut self,
        watched: &Watched,
        row: &EvaluationRow,
        steps_total: u64,
    ) -> Option<String> {
        self.evaluated = true;
        let targets = watched.targets?;
        if self.said || row.step == 0 || !is_late(row.step, steps_total) {
            return None;
        }
        let text = out_of_reach(targets, &row.statistics, "held-out");
        self.said = text.is_some();
        text
    }
}

/// Whether so much of the schedule is done that log-ratios show how far they go.
pub(super) fn is_late(step: u64, steps_total: u64) -> bool {
    steps_total > 0 && step as f64 >= LOOK_AFTER * steps_total as f64
}

/// What to say of targets that are too far for `means`.
pub(super) fn out_of_reach(targets: Targets, means: &Statistics, which: &str) -> Option<String> {
    let farthest = targets.chosen.max(-targets.rejected);
    let reach = means
        .log_ratios_chosen
        .abs()
        .max(means.log_ratios_rejected.abs());
    let times = farthest / reach;
    if reach == 0.0 || times.is_nan() || times <= TARGET_TIMES_MAX {
        return None;
    }
    Some(format!(
        "the targets {} are {times:.0} times the largest {which} log-ratio, {} nats, so that calibration only pushes; \
         objective.beta = {} would put them within reach",
        both(targets),
        plain(reach),
        // The targets are 1/β apart, wherever they lie.
        plain(farthest / (targets.chosen - targets.rejected) / reach)
    ))
}
