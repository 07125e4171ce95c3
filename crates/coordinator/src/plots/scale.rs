//! Which part of the number line a panel shows.

use std::ops::Range;

use spec::Targets;

/// A target farther out than this many times the largest log-ratio would flatten the curves.
const TARGET_REACH: f64 = 3.0;
/// A solved pair's loss falls without end; what is smaller than this part of the largest value is at the bottom.
const LOG_DEPTH: f64 = 1e-5;
/// Free space above and below the curves, of their span.
const MARGIN: f64 = 0.08;

/// The range that shows all finite `values`, zero, and the targets when they are near enough to be seen beside the curves.
pub(super) fn reward_range(
    values: impl Iterator<Item = f64>,
    targets: Option<Targets>,
) -> Range<f64> {
    let finite = values.filter(|value| value.is_finite());
    let (mut low, mut high) = finite.fold((0.0_f64, 0.0_f64), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    if let Some(targets) = targets
        && targets_fit(low, high, targets)
    {
        (low, high) = (low.min(targets.rejected), high.max(targets.chosen));
    }
    if high - low < 1e-9 {
        (low, high) = (-1.0, 1.0);
    }
    let margin = (high - low) * MARGIN;
    low - margin..high + margin
}

/// Whether the curves are still readable with the targets in view.
pub(super) fn targets_fit(low: f64, high: f64, targets: Targets) -> bool {
    let reach = high.max(-low);
    // Before the first step everything is 0, and then the targets are all there is to see.
    reach == 0.0 || targets.chosen.max(-targets.rejected) <= TARGET_REACH * reach
}

/// Decades that hold the positive `values` that matter; one decade where there are none.
pub(super) fn log_range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let positive = values.filter(|value| value.is_finite() && *value > 0.0);
    let (low, high) = positive.fold((f64::INFINITY, 0.0_f64), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    if high <= 0.0 {
        return 0.1..1.0;
    }
    let low = low.max(high * LOG_DEPTH);
    let (low, high) = (low.log10().floor(), (high * 1.05).log10().ceil());
    10_f64.powf(low)..10_f64.powf(high.max(low + 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ±t.
    fn around(t: f64) -> Targets {
        Targets {
            chosen: t,
            rejected: -t,
        }
    }

    #[test]
    fn near_targets_are_in_view_and_far_ones_do_not_flatten_the_curves() {
        let near = reward_range([2.8, -4.3].into_iter(), Some(around(5.0)));
        assert!(near.contains(&5.0) && near.contains(&-5.0));
        let far = reward_range([2.8, -4.3].into_iter(), Some(around(250.0)));
        assert!(far.end < 4.0 && far.start > -6.0, "{far:?}");
        let none = reward_range([f64::NAN, -4.3].into_iter(), None);
        assert!(none.contains(&0.0) && none.contains(&-4.3));
    }

    #[test]
    fn a_run_without_a_row_has_a_range() {
        assert!(!reward_range(std::iter::empty(), None).is_empty());
        assert!(reward_range([0.0].into_iter(), Some(around(5.0))).contains(&5.0));
        assert!(!log_range([f64::NAN, 0.0].into_iter()).is_empty());
    }

    #[test]
    fn decades_hold_their_values() {
        assert_eq!(log_range([0.3, 50.0].into_iter()), 0.1..100.0);
        assert_eq!(log_range([0.5].into_iter()), 0.1..1.0);
        assert_eq!(log_range([50.0, 1e-200].into_iter()), 1e-4..100.0);
    }
}
