//! Evaluations that never beat the starting weights by the metric that they are compared by.

use protocol::EvaluationRow;

use super::Watched;

/// One or two may fall into a warm-up.
const EVALUATIONS: usize = 3;

#[derive(Default)]
pub(super) struct Start {
    rows: Vec<EvaluationRow>,
    said: bool,
}

impl Start {
    pub(super) fn evaluation(&mut self, watched: &Watched, row: &EvaluationRow) -> Option<String> {
        let selection = watched.selection.as_ref()?;
        self.rows.push(*row);
        let start = self.rows.first().filter(|row| row.step == 0)?;
        // Never −0, which reads like less than 0.
        let start = selection.metric.of(&start.statistics) + 0.0;
        let best = selection.best(&self.rows)?;
        let better = if selection.higher_is_better {
            best.value > start
        } else {
            best.value < start
        };
        if self.said || better || self.rows.len() <= EVALUATIONS {
            return None;
        }
        self.said = true;
        let name = selection.metric.name();
        Some(format!(
            "no evaluation has beaten the starting weights by {name}: {start:.4} before training, {:.4} at its best (step {}); \
             lower optimizer.learning_rate, or choose another evaluate.metric",
            best.value, best.step
        ))
    }
}
