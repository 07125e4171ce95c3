//! Ties: pairs with equal log-ratios, which the accuracy counts half.
//!
//! A row has the accuracy's mean and no count of ties. Twice the accuracy times the pairs is a whole number of halves; where
//! it is odd, at least one pair was tied. Even numbers of ties do not show, so that what is counted is a lower bound: pairs
//! that are tied at random show in half of the steps at most.

use protocol::MetricsRow;

use super::window::Window;

const STEPS: usize = 40;
/// A tie in every fourth step that can show one: about one pair in forty at 32 pairs a step, or more.
const TIED_SHARE: f64 = 0.25;

#[derive(Default)]
pub(super) struct Ties {
    rows: Window<Row, STEPS>,
    said: bool,
}

enum Row {
    /// All log-ratios are 0.
    Unmoved,
    /// An odd number of pairs is tied.
    Tied,
    /// No tie shows.
    Untied,
}

impl Ties {
    pub(super) fn step(&mut self, row: &MetricsRow) -> Option<String> {
        // Before the first update all pairs are tied, as they should be.
        if row.report.step <= 1 {
            return None;
        }
        let full = self.rows.push(Row::of(row));
        if self.said || !full {
            return None;
        }
        let count = |what: fn(&Row) -> bool| self.rows.iter().filter(|row| what(row)).count();
        let unmoved = count(|row| matches!(row, Row::Unmoved));
        let tied = count(|row| matches!(row, Row::Tied));
        let text = if unmoved == STEPS {
            format!(
                "every log-ratio has been exactly 0 for {STEPS} steps, so that all pairs are tied: the weights do not move; \
                 look at optimizer.learning_rate"
            )
        } else if tied as f64 >= TIED_SHARE * STEPS as f64 {
            format!(
                "at least one pair was tied in {tied} of the last {STEPS} steps (an even number of ties does not show), and \
                 rewards/accuracies counts each as half; chosen and rejected are the same for such pairs, or differ only \
                 in what data.max_length cuts off: see the data report"
            )
        } else {
            return None;
        };
        self.said = true;
        Some(text)
    }
}

impl Row {
    fn of(row: &MetricsRow) -> Self {
        let of = &row.report.statistics;
        if of.log_ratios_chosen == 0.0 && of.log_ratios_rejected == 0.0 {
            return Self::Unmoved;
        }
        let halves = (2.0 * of.rewards_accuracies * row.report.pairs as f64).round() as u64;
        if halves.is_multiple_of(2) {
            Self::Untied
        } else {
            Self::Tied
        }
    }
}
