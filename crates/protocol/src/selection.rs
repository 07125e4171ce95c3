//! Which evaluation of a run is its best, and when too many in a row brought nothing better.
//!
//! Pure functions of the recorded rows, so that a resumed run decides as an uninterrupted one. The evaluation before
//! training does not count: no checkpoint holds the weights that training began with. Not here: when evaluations happen
//! (`policy`), what an end of training means for the job (`job`), and which checkpoints are on disk.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::report::null_is_nan;
use crate::{EvaluationRow, Statistics, Step};

/// One of the values of [`Statistics`], by its name in `eval.jsonl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric(&'static str);

impl Metric {
    /// The metric of that name, if there is one.
    pub fn named(name: &str) -> Option<Self> {
        let mut values = Statistics::default().values().into_iter();
        values
            .find(|(known, _)| *known == name)
            .map(|(known, _)| Self(known))
    }

    /// Its name, such as `rewards/accuracies`.
    pub fn name(self) -> &'static str {
        self.0
    }

    /// Its value in `statistics`.
    pub fn of(self, statistics: &Statistics) -> f64 {
        let mut values = statistics.values().into_iter();
        let found = values.find(|(name, _)| *name == self.0);
        found.expect("a metric is one of the values").1
    }
}

/// What makes one evaluation better than another, and what follows from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// What is compared. A value that is not finite is better than none.
    pub metric: Metric,
    /// Its direction.
    pub higher_is_better: bool,
    /// So many evaluations in a row without an improvement end training; `None` never does.
    pub patience: Option<u64>,
    /// An improvement is a gain of more than this over the last one. (The best evaluation is the best by any gain.)
    pub min_delta: f64,
    /// Every evaluated step is saved, and the best one's checkpoint stays.
    pub keep_best: bool,
}

/// An evaluation's step and the value that is compared.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Committed step whose weights were evaluated.
    pub step: u64,
    /// Finite.
    pub value: f64,
}

/// Why training ended before its schedule: the step after the evaluation of `step` is the last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStop {
    /// The evaluation that decided it.
    pub step: u64,
    /// What was compared.
    pub metric: String,
    /// Its direction.
    pub higher_is_better: bool,
    /// Its value at `step`.
    #[serde(deserialize_with = "null_is_nan")]
    pub value: f64,
    /// The last improvement; absent when no evaluation had a finite value.
    pub improved: Option<Best>,
    /// Evaluations since, that of `step` included.
    pub evaluations: u64,
    /// What a gain had to exceed.
    pub min_delta: f64,
}

impl EarlyStop {
    /// Whether a run whose last commit is `committed` ended by it. A later start may have gone on under another rule.
    pub fn ended(&self, committed: Step) -> bool {
        committed.0 == self.step + 1
    }
}

impl fmt::Display for EarlyStop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            step,
            metric,
            value,
            evaluations,
            min_delta,
            ..
        } = self;
        let times = if *evaluations == 1 { "" } else { "s" };
        let Some(Best {
            step: at,
            value: mark,
        }) = self.improved
        else {
            return write!(
                f,
                "{metric} was not finite in {evaluations} evaluation{times}"
            );
        };
        let better = if self.higher_is_better {
            "above"
        } else {
            "below"
        };
        let by = if *min_delta > 0.0 {
            format!(" by more than {min_delta}")
        } else {
            String::new()
        };
        write!(
            f,
            "{metric} has not come {better} its {mark:.4} of step {at}{by} in {evaluations} evaluation{times} \
             ({value:.4} at step {step})"
        )
    }
}

impl Selection {
    /// The best evaluation; the earliest of equals.
    pub fn best(&self, rows: &[EvaluationRow]) -> Option<Best> {
        self.ranked(rows).first().copied()
    }

    /// Steps of all evaluations of trained weights with a finite value, the best first, the earlier of equals first.
    pub fn ranking(&self, rows: &[EvaluationRow]) -> Vec<Step> {
        let ranked = self.ranked(rows);
        ranked.into_iter().map(|it| Step(it.step)).collect()
    }

    /// Whether the last of `rows` is one evaluation too many without an improvement.
    pub fn early_stop(&self, rows: &[EvaluationRow]) -> Option<EarlyStop> {
        let patience = self.patience?;
        let last = rows.last().filter(|row| row.step > 0)?;
        let (mut improved, mut evaluations): (Option<Best>, u64) = (None, 0);
        for row in rows.iter().filter(|row| row.step > 0) {
            let value = self.metric.of(&row.statistics);
            // Against the last improvement and not the last value, so that a slow climb adds up.
            let improves = value.is_finite()
                && improved.is_none_or(|mark| self.gain(mark.value, value) > self.min_delta);
            if improves {
                let step = row.step;
                (improved, evaluations) = (Some(Best { step, value }), 0);
            } else {
                evaluations += 1;
            }
        }
        (evaluations >= patience).then(|| EarlyStop {
            step: last.step,
            metric: self.metric.name().into(),
            higher_is_better: self.higher_is_better,
            value: self.metric.of(&last.statistics),
            improved,
            evaluations,
            min_delta: self.min_delta,
        })
    }

    /// Whether a decision of an earlier start of the run still holds under this one's patience.
    pub(crate) fn confirms(&self, stop: &EarlyStop) -> bool {
        self.patience
            .is_some_and(|patience| stop.evaluations >= patience)
    }

    fn ranked(&self, rows: &[EvaluationRow]) -> Vec<Best> {
        let trained = rows.iter().filter(|row| row.step > 0);
        let valued = trained.map(|row| Best {
            step: row.step,
            value: self.metric.of(&row.statistics),
        });
        let mut ranked: Vec<_> = valued.filter(|it| it.value.is_finite()).collect();
        // Stable, and rows are in the order of their steps.
        ranked.sort_by(|one, other| {
            let (low, high) = if self.higher_is_better {
                (other, one)
            } else {
                (one, other)
            };
            let order = low.value.partial_cmp(&high.value);
            order.expect("finite values compare")
        });
        ranked
    }

    /// By how much `new` is better than `old`.
    fn gain(&self, old: f64, new: f64) -> f64 {
        if self.higher_is_better {
            new - old
        } else {
            old - new
        }
    }
}
