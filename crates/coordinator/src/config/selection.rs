//! What follows from comparing evaluations: `[evaluate]`, which the training sections define, beside `checkpoint.keep_best`.

use protocol::{Metric, Selection};
use spec::EvaluateSection;
use toml::Table;

use super::{layers::Merged, refusal::ConfigError, sections::refuse};

/// `checkpoint.keep_best`, by default on where training may stop early: the weights before the last improvement are the ones
/// that such a run is about.
pub(super) fn keep_best(
    asked: Option<bool>,
    training: &Table,
    merged: &Merged,
) -> Result<bool, ConfigError> {
    let evaluate = section(training);
    let stops = evaluate
        .as_ref()
        .is_some_and(|it| it.early_stopping_patience.is_some());
    let keep = asked.unwrap_or(stops);
    if keep && evaluate.is_none_or(|it| it.metric.is_none()) {
        let reason = "needs evaluate.metric and evaluate.every_steps, which say what is best, such as \
                      evaluate.metric = \"rewards/accuracies\"";
        return Err(refuse(merged, "checkpoint.keep_best", reason));
    }
    Ok(keep)
}

/// What the protocol compares evaluations by.
pub(super) fn selection(training: &Table, keep_best: bool) -> Option<Selection> {
    let evaluate = section(training)?;
    let name = evaluate.metric?.name();
    Some(Selection {
        metric: Metric::named(name).expect("rows have every metric that can be configured"),
        higher_is_better: evaluate.higher_is_better(),
        patience: evaluate.early_stopping_patience,
        min_delta: evaluate.early_stopping_min_delta.unwrap_or(0.0),
        keep_best,
    })
}

fn section(training: &Table) -> Option<EvaluateSection> {
    let section = training.get("evaluate")?.clone().try_into();
    Some(section.expect("a resolved [evaluate] reads back"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_that_can_be_configured_is_one_of_the_rows() {
        for metric in spec::Metric::ALL {
            let known = Metric::named(metric.name());
            assert_eq!(known.map(Metric::name), Some(metric.name()));
        }
    }
}
