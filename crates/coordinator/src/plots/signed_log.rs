//! An axis for runs whose log-ratios differ by orders of magnitude: linear around zero, logarithmic farther out.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};

/// `asinh(value / scale)`: both signs, zero in its place. Below `scale` it is nearly linear.
#[derive(Clone, Debug)]
pub(super) struct SignedLog {
    range: Range<f64>,
    scale: f64,
}

/// Labels closer together than this part of the axis would touch.
const TICK_DISTANCE: f64 = 0.05;

impl SignedLog {
    /// # Panics
    /// If the range is empty or `scale` is not above 0.
    pub(super) fn new(range: Range<f64>, scale: f64) -> Self {
        assert!(range.start < range.end, "{range:?} is empty");
        assert!(scale > 0.0, "scale {scale}");
        Self { range, scale }
    }

    fn position(&self, value: f64) -> f64 {
        let of = |value: f64| (value / self.scale).asinh();
        let (low, high) = (of(self.range.start), of(self.range.end));
        (of(value) - low) / (high - low)
    }
}

impl Ranged for SignedLog {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let length = f64::from(limit.1 - limit.0);
        limit.0 + (self.position(*value) * length).round() as i32
    }

    /// Zero and 1, 2, 5, 10, … of both signs, as far as they stay apart.
    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        let reach = self.range.end.max(-self.range.start);
        let mut taken = vec![0.0];
        // The coarse ones first: where two are too close, 100 is better than 50.
        for mantissa in [1.0, 5.0, 2.0] {
            for exponent in (-3..=(reach.log10().ceil() as i32)).rev() {
                let size = mantissa * 10_f64.powi(exponent);
                for value in [size, -size] {
                    let near = |other: &f64| {
                        (self.position(value) - self.position(*other)).abs() < TICK_DISTANCE
                    };
                    if self.range.contains(&value) && !taken.iter().any(near) {
                        taken.push(value);
                    }
                }
            }
        }
        taken.sort_by(f64::total_cmp);
        taken
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_values_of_both_signs_have_room() {
        let axis = SignedLog::new(-180.0..10.0, 2.0);
        let at = |value: f64| axis.map(&value, (1000, 0));
        assert_eq!((at(-180.0), at(10.0)), (1000, 0));
        assert!(at(-4.3) - at(2.7) > 150, "{} {}", at(-4.3), at(2.7));
        assert!(at(-173.0) - at(-53.0) > 100, "{} {}", at(-173.0), at(-53.0));
    }

    #[test]
    fn ticks_are_round_and_stay_apart() {
        let axis = SignedLog::new(-180.0..10.0, 2.0);
        let ticks = axis.key_points(10_usize);
        assert!(ticks.contains(&0.0) && ticks.contains(&-100.0), "{ticks:?}");
        assert!((6..=16).contains(&ticks.len()), "{ticks:?}");
        let apart = ticks
            .windows(2)
            .all(|pair| axis.position(pair[1]) - axis.position(pair[0]) >= TICK_DISTANCE);
        assert!(apart, "{ticks:?}");
    }
}
