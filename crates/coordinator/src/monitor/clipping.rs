//! Clipping that never lets a gradient through.

use protocol::MetricsRow;

use super::Watched;
use super::window::Window;
use crate::{numbers::plain, objective::both};

/// Long enough that a warm-up and a few hard batches are not taken for the rule.
const STEPS: usize = 50;
/// Of those: a few short gradients do not change what is said.
const CLIPPED_SHARE: f64 = 0.95;

#[derive(Default)]
pub(super) struct Clipping {
    norms: Window<f64, STEPS>,
    said: bool,
}

impl Clipping {
    pub(super) fn step(&mut self, watched: &Watched, row: &MetricsRow) -> Option<String> {
        let limit = watched.optimizer.max_grad_norm;
        let full = self.norms.push(row.report.grad_norm);
        if self.said || !full || limit == 0.0 {
            return None;
        }
        let clipped = self.norms.iter().filter(|norm| **norm > limit).count();
        if (clipped as f64) < CLIPPED_SHARE * STEPS as f64 {
            return None;
        }
        self.said = true;
        let mut norms: Vec<f64> = self.norms.iter().copied().collect();
        norms.sort_by(f64::total_cmp);
        let median = norms[STEPS / 2];
        let meaning = match watched.targets {
            Some(targets) => format!(
                "Usual for {} with targets of {} nats, and harmless while the loss falls",
                watched.objective.about().name,
                both(targets)
            ),
            None => {
                "Common while training begins; where it stays, the learning rate may be too high"
                    .into()
            }
        };
        Some(format!(
            "the gradient was longer than optimizer.max_grad_norm = {limit} in {clipped} of the last {STEPS} steps (median \
             {}): {} only sees its direction. {meaning}; optimizer.max_grad_norm = {} would clip only the outliers",
            plain(median),
            watched.optimizer.kind.label(),
            plain(round_up(2.0 * median))
        ))
    }
}

/// To one digit that matters.
fn round_up(value: f64) -> f64 {
    let scale = 10_f64.powf(value.log10().floor());
    (value / scale).ceil() * scale
}
