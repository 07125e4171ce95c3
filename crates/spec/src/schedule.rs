//! The learning rate of every step, with the values of transformers' schedules when their scheduler is stepped after the
//! optimizer: step s (from 1) runs at λ(s − 1). Only arithmetic; nothing is kept between steps, so a resume needs no state.

use std::f64::consts::PI;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::sections::{SpecError, refuse};

/// `[schedule]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("not" = { "required": ["warmup_ratio", "warmup_steps"] }))]
pub struct ScheduleSection {
    /// Shape after the warmup. Default `cosine`.
    pub kind: ScheduleKind,
    /// Share of the run's steps from 0 to the peak, in [0, 1]. Default 0.1 when `warmup_steps` is absent too.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub warmup_ratio: Option<f64>,
    /// Steps from 0 to the peak, instead of a share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
}

/// Share of the warmup where none is configured, the paper's.
const WARMUP_RATIO: f64 = 0.1;

impl ScheduleSection {
    pub(crate) fn validate(&self) -> Result<(), SpecError> {
        if self.warmup_ratio.is_some() && self.warmup_steps.is_some() {
            return refuse(
                "schedule.warmup_ratio",
                "given together with schedule.warmup_steps; keep one of them",
            );
        }
        match self.warmup_ratio {
            Some(ratio) if !(0.0..=1.0).contains(&ratio) => refuse(
                "schedule.warmup_ratio",
                &format!("must be between 0 and 1, got {ratio}"),
            ),
            _ => Ok(()),
        }
    }

    /// Steps of the warmup in a run of `steps`.
    pub fn warmup(&self, steps: u64) -> u64 {
        let ratio = self.warmup_ratio.unwrap_or(WARMUP_RATIO);
        self.warmup_steps
            .unwrap_or_else(|| warmup_steps(ratio, steps))
    }
}

/// Shape of the rate after the warmup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Stays at the peak.
    Constant,
    /// Falls to 0 in a straight line.
    Linear,
    /// Falls to 0 along half a cosine.
    #[default]
    Cosine,
}

/// A schedule over a known number of steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Shape after the warmup.
    pub kind: ScheduleKind,
    /// Rate at the peak.
    pub peak: f64,
    /// Steps from 0 to the peak.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub steps: u64,
}

impl Schedule {
    /// Rate of `step`, from 1. With a warmup the first step runs at 0, as in transformers.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let done = step.saturating_sub(1);
        self.peak * self.share(done)
    }

    fn share(&self, done: u64) -> f64 {
        if done < self.warmup_steps {
            return done as f64 / self.warmup_steps as f64;
        }
        let after = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = (done - self.warmup_steps) as f64 / after;
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => (1.0 - progress).max(0.0),
            ScheduleKind::Cosine => (0.5 * (1.0 + (PI * progress.min(1.0)).cos())).max(0.0),
        }
    }
}

/// Warmup steps for a share of the run, rounded up as in transformers.
fn warmup_steps(ratio: f64, steps: u64) -> u64 {
    (ratio * steps as f64).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::{Schedule, ScheduleKind, warmup_steps};

    fn rates(kind: ScheduleKind, warmup_steps: u64, steps: u64) -> Vec<f64> {
        let schedule = Schedule {
            kind,
            peak: 2.0,
            warmup_steps,
            steps,
        };
        (1..=steps).map(|s| schedule.learning_rate(s)).collect()
    }

    fn check(kind: ScheduleKind, expected: &[f64]) {
        let rates = rates(kind, 2, 6);
        for (rate, expected) in rates.iter().zip(expected) {
            assert!((rate - expected).abs() < 1e-12, "{kind:?}: {rates:?}");
        }
    }

    #[test]
    fn a_schedule_has_transformers_values_with_the_scheduler_stepped_after_the_optimizer() {
        check(ScheduleKind::Constant, &[0.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
        check(ScheduleKind::Linear, &[0.0, 1.0, 2.0, 1.5, 1.0, 0.5]);
        let half = 0.5f64.sqrt();
        check(
            ScheduleKind::Cosine,
            &[0.0, 1.0, 2.0, 1.0 + half, 1.0, 1.0 - half],
        );
    }

    #[test]
    fn without_a_warmup_the_first_step_runs_at_the_peak() {
        for kind in [
            ScheduleKind::Constant,
            ScheduleKind::Linear,
            ScheduleKind::Cosine,
        ] {
            assert_eq!(rates(kind, 0, 5)[0], 2.0);
        }
    }

    #[test]
    fn steps_past_the_end_run_at_zero_and_never_below() {
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            let schedule = Schedule {
                kind,
                peak: 1.0,
                warmup_steps: 1,
                steps: 4,
            };
            assert_eq!(schedule.learning_rate(50), 0.0);
        }
    }

    #[test]
    fn a_warmup_share_is_rounded_up() {
        assert_eq!(warmup_steps(0.1, 240), 24);
        assert_eq!(warmup_steps(0.1, 241), 25);
        assert_eq!(warmup_steps(0.0, 240), 0);
    }
}
