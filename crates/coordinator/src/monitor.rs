//! Watches a run's rows for what tends to go wrong, and says it with the numbers and the cure.
//!
//! Pure: rows in, warnings out, so that a resumed run, which hands in the rows that are there, says the same again; who has
//! said it already (`events.jsonl`) says it once. Each rule has a file; its limits are constants with their reasons. Nothing
//! here stops a run.
//!
//! | kind | says |
//! |---|---|
//! | `target-out-of-reach` | calibration targets far beyond the log-ratios; the β that fits |
//! | `chosen-below-zero` | chosen completions have lost probability for many steps |
//! | `no-room-for-chosen` | rejected reaches its target, chosen does not rise: the reference writes like the chosen data |
//! | `margin-explosion` | log-ratios far apart for the objective |
//! | `gradient-always-clipped` | nearly every step is cut to `optimizer.max_grad_norm` |
//! | `many-ties` | accuracies that count halves |
//! | `reference-trained-on-chosen` | the reference knows chosen training completions better than held-out ones |
//! | `no-better-than-start` | by `evaluate.metric` no evaluation beats the starting weights |
//! | `idle-workers` | a step has fewer pairs than the job has workers |
//! | `data` | what the data report warns of: truncated, dropped, identical, repeated rows |

mod clipping;
mod idle;
mod reference;
mod rewards;
mod selection;
mod target;
mod ties;
mod window;

use protocol::{EvaluationRow, MetricsRow, Selection};
use serde::{Deserialize, Serialize};
use spec::{ObjectiveConfig, OptimizerSection, Targets};

use crate::config::Config;

/// Kind of the data report's warnings.
pub const DATA: &str = "data";
/// Kind of the warning that a run may end with.
const TARGET: &str = "target-out-of-reach";
/// What begins a line of the data report that is a warning.
const DATA_WARNING: &str = "warning: ";
/// What heads the second part of the data report.
const HELD_OUT: &str = "held-out pairs";

/// Something that a person should look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// The rule, such as `chosen-below-zero`.
    pub kind: String,
    /// The step whose row showed it; 0 before training.
    pub step: u64,
    /// What was seen, with numbers, and what to do.
    pub text: String,
}

/// What of a configuration the rules read.
#[derive(Clone, Debug, PartialEq)]
struct Watched {
    /// What is trained.
    objective: ObjectiveConfig,
    /// Where it calibrates to.
    targets: Option<Targets>,
    /// What clips gradients.
    optimizer: OptimizerSection,
    /// What evaluations are compared by.
    selection: Option<Selection>,
}

/// The rules with what they have seen. Rows without log-ratios (no reference) are watched for clipping alone.
pub struct Monitor {
    watched: Watched,
    shares: idle::Shares,
    has_rewards: bool,
    clipping: clipping::Clipping,
    ties: ties::Ties,
    target: target::Target,
    below_zero: rewards::BelowZero,
    no_room: rewards::NoRoom,
    margin: rewards::Margin,
    reference: reference::Reference,
    start: selection::Start,
}

impl Monitor {
    /// A monitor that has seen nothing.
    pub fn new(config: &Config) -> Self {
        Self {
            watched: Watched {
                objective: config.objective_config.clone(),
                targets: config.targets(),
                optimizer: config.optimizer,
                selection: config.selection(),
            },
            shares: idle::Shares {
                workers: config.cluster.workers,
                workers_max: config.cluster.max_workers,
                batch_pairs: batch_pairs(config),
            },
            has_rewards: config.has_rewards(),
            clipping: clipping::Clipping::default(),
            ties: ties::Ties::default(),
            target: target::Target::default(),
            below_zero: rewards::BelowZero::default(),
            no_room: rewards::NoRoom::default(),
            margin: rewards::Margin::default(),
            reference: reference::Reference::default(),
            start: selection::Start::default(),
        }
    }

    /// What the configuration alone tells, before anything is trained.
    pub fn start(&self) -> Vec<Warning> {
        warnings(0, vec![("idle-workers", self.shares.start())])
    }

    /// Takes a committed step in. A skipped one changed nothing and its numbers are none.
    pub fn step(&mut self, row: &MetricsRow, steps_total: u64) -> Vec<Warning> {
        if !row.report.finite {
            return Vec::new();
        }
        let watched = &self.watched;
        let mut said = vec![("gradient-always-clipped", self.clipping.step(watched, row))];
        if self.has_rewards {
            said.extend([
                ("many-ties", self.ties.step(row)),
                (TARGET, self.target.step(watched, row, steps_total)),
                ("chosen-below-zero", self.below_zero.step(watched, row)),
                ("margin-explosion", self.margin.step(watched, row)),
                ("reference-trained-on-chosen", self.reference.step(row)),
            ]);
        }
        warnings(row.report.step, said)
    }

    /// Takes an evaluation in.
    pub fn evaluation(&mut self, row: &EvaluationRow, steps_total: u64) -> Vec<Warning> {
        let watched = &self.watched;
        let mut said = vec![("no-better-than-start", self.start.evaluation(watched, row))];
        if self.has_rewards {
            self.reference.evaluation(row);
            said.extend([
                (TARGET, self.target.evaluation(watched, row, steps_total)),
                (
                    "no-room-for-chosen",
                    self.no_room.evaluation(watched, row, steps_total),
                ),
            ]);
        }
        warnings(row.step, said)
    }

    /// Takes the rows of an earlier start in, in the order in which they came.
    pub fn replay(
        &mut self,
        metrics: &[MetricsRow],
        evaluations: &[EvaluationRow],
        steps_total: u64,
    ) -> Vec<Warning> {
        let mut said = Vec::new();
        let mut evaluations = evaluations.iter().peekable();
        for row in metrics {
            while let Some(evaluation) = evaluations.next_if(|it| it.step < row.report.step) {
                said.extend(self.evaluation(evaluation, steps_total));
            }
            said.extend(self.step(row, steps_total));
        }
        for evaluation in evaluations {
            said.extend(self.evaluation(evaluation, steps_total));
        }
        said
    }
}

/// The warnings in a data report.
pub fn of_data_report(text: &str) -> Vec<Warning> {
    let mut pairs = "training pairs";
    let mut found = Vec::new();
    for line in text.lines() {
        if line == HELD_OUT {
            pairs = HELD_OUT;
        }
        if let Some(text) = line.strip_prefix(DATA_WARNING) {
            found.push(Warning {
                kind: DATA.into(),
                step: 0,
                text: format!("{pairs}: {text}"),
            });
        }
    }
    found
}

/// What a run that ended should say of its targets, unless it has: some end before the rule has looked.
pub fn of_the_end(
    config: &Config,
    last: Option<&EvaluationRow>,
    said: &[Warning],
) -> Option<Warning> {
    let row = last.filter(|row| row.step > 0 && said.iter().all(|it| it.kind != TARGET))?;
    let text = target::out_of_reach(config.targets()?, &row.statistics, "held-out")?;
    Some(Warning {
        kind: TARGET.into(),
        step: row.step,
        text,
    })
}

fn batch_pairs(config: &Config) -> u64 {
    let pairs = config.training_value("train", "batch_pairs");
    let pairs = pairs.and_then(toml::Value::as_integer);
    // A configuration resolves to a number that is at least 1.
    pairs.map_or(u64::MAX, |pairs| pairs as u64)
}

fn warnings(step: u64, said: Vec<(&'static str, Option<String>)>) -> Vec<Warning> {
    let said = said.into_iter();
    said.filter_map(|(kind, text)| {
        let kind = kind.into();
        text.map(|text| Warning { kind, step, text })
    })
    .collect()
}
