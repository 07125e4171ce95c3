//! A reference that was trained on the chosen completions.
//!
//! Every row tells the mean log-probs of its pairs under the reference: `logps − log_ratios`. A reference that has never seen
//! the training pairs treats them like held-out ones of the same kind; one that was trained on their chosen side gives
//! exactly those more. So the test is a difference of differences,
//!
//! ```text
//! (chosen − rejected on training pairs) − (chosen − rejected on held-out pairs)
//! ```
//!
//! in which lengths and difficulty of the texts cancel, because the rejected completions answer the same prompts. Its noise is
//! known from the rows: batches of n pairs scatter around the mean with s, so that a mean over B of them and one over m
//! held-out pairs differ by s·√(1/B + n/m) for no reason. Only the first epoch counts: later ones show the same pairs again.
//!
//! What it cannot see: a reference that was fitted to *other* samples of the same kind, or fitted without remembering single
//! ones, which lifts held-out pairs as much (`no-room-for-chosen` sees what follows from it); and runs without held-out pairs.
//! What it takes for training: held-out pairs of another kind than the training pairs.

use protocol::{EvaluationRow, MetricsRow, Statistics};

use crate::numbers::{plain, signed};

/// Batches from which their scatter is known to a fifth; looked at again each time their number has doubled.
const BATCHES_FIRST: usize = 16;
/// The same for a first epoch that is shorter; below, chance is not told from training.
const BATCHES_MIN: usize = 8;
/// Standard errors. Looking a few times, at a scatter that is known from few batches, chance reaches 5 less than once in a
/// thousand runs.
const ERRORS_MIN: f64 = 5.0;
/// Nats: less takes no room that matters from targets of some nats.
const EXCESS_MIN: f64 = 1.0;

#[derive(Default)]
pub(super) struct Reference {
    held_out: Option<(Sides, u64)>,
    batches: Vec<Sides>,
    pairs: u64,
    closed: bool,
}

/// Mean log-probs of the two sides under the reference.
#[derive(Clone, Copy, Debug)]
struct Sides {
    chosen: f64,
    rejected: f64,
}

impl Sides {
    fn of(statistics: &Statistics) -> Self {
        Self {
            chosen: statistics.logps_chosen - statistics.log_ratios_chosen,
            rejected: statistics.logps_rejected - statistics.log_ratios_rejected,
        }
    }

    fn gap(&self) -> f64 {
        self.chosen - self.rejected
    }
}

impl Reference {
    pub(super) fn evaluation(&mut self, row: &EvaluationRow) {
        let sides = Sides::of(&row.statistics);
        self.held_out.get_or_insert((sides, row.pairs));
    }

    pub(super) fn step(&mut self, row: &MetricsRow) -> Option<String> {
        if self.closed {
            return None;
        }
        if row.report.epoch > 0 {
            self.closed = true;
            return (self.batches.len() >= BATCHES_MIN)
                .then(|| self.judge())
                .flatten();
        }
        if self.batches.is_empty() {
            self.pairs = row.report.pairs;
        }
        // An epoch's last batch may be smaller and scatters more.
        if row.report.pairs != self.pairs {
            return None;
        }
        self.batches.push(Sides::of(&row.report.statistics));
        let count = self.batches.len();
        let due = count.is_multiple_of(BATCHES_FIRST) && (count / BATCHES_FIRST).is_power_of_two();
        let text = due.then(|| self.judge()).flatten();
        self.closed = text.is_some();
        text
    }

    fn judge(&self) -> Option<String> {
        let (held_out, held_out_pairs) = self.held_out?;
        let count = self.batches.len() as f64;
        let mean = |side: fn(&Sides) -> f64| self.batches.iter().map(side).sum::<f64>() / count;
        let training = Sides {
            chosen: mean(|it| it.chosen),
            rejected: mean(|it| it.rejected),
        };
        let gap = training.gap();
        let squares = self.batches.iter().map(|it| (it.gap() - gap).powi(2));
        let scatter = (squares.sum::<f64>() / (count - 1.0)).sqrt();
        let error = scatter * (1.0 / count + self.pairs as f64 / held_out_pairs as f64).sqrt();
        let excess = gap - held_out.gap();
        // Trained on, the chosen side is what differs.
        let by_chosen = training.chosen - held_out.chosen >= 0.5 * excess;
        // Without scatter (one pair repeated) nothing can be told.
        if !(error > 0.0 && excess >= EXCESS_MIN && excess >= ERRORS_MIN * error && by_chosen) {
            return None;
        }
        Some(format!(
            "the reference seems to have been trained on these chosen completions: it gives chosen minus rejected {} nats \
             on training pairs and {} on held-out ones, {} nats more ({:.0} standard errors), {} of them on the chosen side. \
             What it has learned by heart the policy cannot raise, and held-out chosen log-ratios stay near zero or \
             below; take the model from before that training as model.reference, or train on other pairs",
            signed(gap),
            signed(held_out.gap()),
            plain(excess),
            excess / error,
            plain(training.chosen - held_out.chosen)
        ))
    }
}
