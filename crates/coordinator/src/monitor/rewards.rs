//! Log-ratios that go where they should not.

use protocol::{EvaluationRow, MetricsRow};
use spec::{ObjectiveConfig, Targets};

use super::Watched;
use super::target::is_late;
use super::window::{Mark, Window};
use crate::numbers::{plain, signed};

/// One batch is noisy.
const MEAN_STEPS: usize = 10;

/// A batch may fall below zero by chance; so many in a row do not.
const BELOW_ZERO_STEPS: f64 = 25.0;
/// Nats, over those steps: a tenth of the probability. Less is noise around the reference.
const BELOW_ZERO_MEAN: f64 = -0.1;
/// Said again after so many times the steps.
const BELOW_ZERO_AGAIN: f64 = 4.0;

/// Chosen completions lose probability.
pub(super) struct BelowZero {
    steps: u64,
    sum: f64,
    mark: Mark,
}

impl Default for BelowZero {
    fn default() -> Self {
        Self {
            steps: 0,
            sum: 0.0,
            mark: Mark::new(BELOW_ZERO_STEPS, BELOW_ZERO_AGAIN),
        }
    }
}

impl BelowZero {
    pub(super) fn step(&mut self, watched: &Watched, row: &MetricsRow) -> Option<String> {
        // It lowers chosen on purpose.
        if matches!(watched.objective, ObjectiveConfig::ApoDown { .. }) {
            return None;
        }
        let chosen = row.report.statistics.log_ratios_chosen;
        if chosen >= 0.0 {
            (self.steps, self.sum) = (0, 0.0);
            return None;
        }
        self.steps += 1;
        self.sum += chosen;
        let mean = self.sum / self.steps as f64;
        if mean > BELOW_ZERO_MEAN || !self.mark.reached(self.steps as f64) {
            return None;
        }
        let cure = if watched.targets.is_some() {
            "the pull towards the target should lift it: lower optimizer.learning_rate, and see whether the reference was \
             trained on such data"
        } else if matches!(watched.objective, ObjectiveConfig::Dpo { .. }) {
            "DPO only asks that rejected falls further; objective.kind = \"cal_dpo\" gives chosen a target above zero, a \
             higher objective.beta holds both back"
        } else {
            "this objective has no target for it; objective.kind = \"cal_dpo\" gives chosen one above zero"
        };
        Some(format!(
            "the chosen log-ratio has been below zero for {} steps, {} nats on average: the policy gives chosen completions \
             less probability than the reference does; {cure}",
            self.steps,
            signed(mean)
        ))
    }
}

/// Of the target: rejected has arrived.
const ARRIVED: f64 = 0.5;
/// Of the target: chosen has not left.
const NOT_LEFT: f64 = 0.05;

/// Rejected falls to its target and chosen does not rise. On held-out pairs the mean chosen log-ratio cannot exceed
/// KL(chosen data ‖ reference), whatever the policy is, so that a reference which is fitted to such data leaves no room. Where
/// training pulls both sides with the same force and one follows, this is the reason to think of first.
#[derive(Default)]
pub(super) struct NoRoom {
    said: bool,
}

impl NoRoom {
    pub(super) fn evaluation(
        &mut self,
        watched: &Watched,
        row: &EvaluationRow,
        steps_total: u64,
    ) -> Option<String> {
        // A shift may put one of them at zero, where there is no way to go.
        let on_both_sides = |it: &Targets| it.chosen > 0.0 && it.rejected < 0.0;
        let targets = watched.targets.filter(on_both_sides)?;
        let of = &row.statistics;
        let (chosen, rejected) = (of.log_ratios_chosen, of.log_ratios_rejected);
        let arrived = rejected <= ARRIVED * targets.rejected && chosen <= NOT_LEFT * targets.chosen;
        if self.said || !is_late(row.step, steps_total) || !arrived {
            return None;
        }
        self.said = true;
        Some(format!(
            "held-out rejected is at {} of {} nats, chosen at {} of {}: its mean cannot exceed \
             KL(chosen data ‖ reference), so the reference seems to write like the chosen completions already; take one that \
             was not trained on such data (model.reference), or expect no more of this one",
            signed(rejected),
            signed(targets.rejected),
            signed(chosen),
            signed(targets.chosen),
        ))
    }
}

/// β·(r_w − r_l): there DPO's weight σ(−βD) of a pair is below 5e-5, and what grows on is not preference.
const SCALED_MARGIN_MAX: f64 = 10.0;
/// Times the distance of the two targets, for an objective that has them.
const TARGET_MARGIN_TIMES_MAX: f64 = 3.0;
/// Said again at so many times the margin.
const MARGIN_AGAIN: f64 = 4.0;

/// The two log-ratios run away from each other.
pub(super) struct Margin {
    margins: Window<f64, MEAN_STEPS>,
    scaled: Window<f64, MEAN_STEPS>,
    /// Log-prob of both completions of a pair under the reference, positive.
    surprise: Window<f64, MEAN_STEPS>,
    mark: Mark,
}

impl Default for Margin {
    fn default() -> Self {
        Self {
            margins: Window::default(),
            scaled: Window::default(),
            surprise: Window::default(),
            mark: Mark::new(0.0, MARGIN_AGAIN),
        }
    }
}

impl Margin {
    pub(super) fn step(&mut self, watched: &Watched, row: &MetricsRow) -> Option<String> {
        let of = &row.report.statistics;
        self.margins
            .push(of.log_ratios_chosen - of.log_ratios_rejected);
        self.scaled.push(of.rewards_margins);
        let reference =
            of.logps_chosen - of.log_ratios_chosen + of.logps_rejected - of.log_ratios_rejected;
        let full = self.surprise.push(-reference);
        let margin = self.margins.mean();
        if !full {
            return None;
        }
        let why = self.explodes(watched, margin)?;
        self.mark.reached(margin).then(|| {
            format!(
                "the margin is {} nats (mean of {MEAN_STEPS} steps): {why}",
                signed(margin)
            )
        })
    }

    /// What is wrong with a margin, if something is.
    fn explodes(&self, watched: &Watched, margin: f64) -> Option<String> {
        if let Some(targets) = watched.targets {
            let distance = targets.chosen - targets.rejected;
            return (margin > TARGET_MARGIN_TIMES_MAX * distance).then(|| {
                format!(
                    "{:.1} times the {} nats that lie between the targets; lower optimizer.learning_rate",
                    margin / distance,
                    plain(distance)
                )
            });
        }
        let cure = "stop earlier (evaluate.early_stopping_patience), raise objective.beta, lower optimizer.learning_rate, \
                    or calibrate with objective.kind = \"cal_dpo\"";
        let surprise = self.surprise.mean();
        if surprise > 0.0 && margin > surprise {
            return Some(format!(
                "more than the whole log-prob of a pair under the reference, {} nats, so that the policy leaves the \
                 reference's language; {cure}",
                plain(surprise)
            ));
        }
        // Of other losses the gradient is another, and β may be one per token.
        let logistic = matches!(
            watched.objective,
            ObjectiveConfig::Dpo { .. }
                | ObjectiveConfig::Robust { .. }
                | ObjectiveConfig::Dpop { .. }
        );
        let scaled = self.scaled.mean();
        (logistic && scaled > SCALED_MARGIN_MAX).then(|| {
            format!(
                "scaled by β it is {}, where pairs weigh less than 5e-5 in the gradient and what still grows is not \
                 preference; {cure}",
                plain(scaled)
            )
        })
    }
}
