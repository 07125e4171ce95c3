//! What an evaluation is judged by: its values by their names in `eval.jsonl`, which direction is better, and which choices
//! of `[evaluate]` cannot work.

use objective::ObjectiveConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::sections::{EvaluateSection, Spec, SpecError, refuse};

/// A value of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs, reason = "each variant is its metric's name")]
pub enum Metric {
    #[serde(rename = "loss")]
    Loss,
    #[serde(rename = "loss/pairwise")]
    LossPairwise,
    #[serde(rename = "loss/calibration")]
    LossCalibration,
    #[serde(rename = "rewards/chosen")]
    RewardsChosen,
    #[serde(rename = "rewards/rejected")]
    RewardsRejected,
    #[serde(rename = "rewards/margins")]
    RewardsMargins,
    #[serde(rename = "rewards/accuracies")]
    RewardsAccuracies,
    #[serde(rename = "log_ratios/chosen")]
    LogRatiosChosen,
    #[serde(rename = "log_ratios/rejected")]
    LogRatiosRejected,
    #[serde(rename = "logps/chosen")]
    LogpsChosen,
    #[serde(rename = "logps/rejected")]
    LogpsRejected,
}

impl Metric {
    /// Every metric, in the order of `eval.jsonl`.
    pub const ALL: [Self; 11] = [
        Self::Loss,
        Self::LossPairwise,
        Self::LossCalibration,
        Self::RewardsChosen,
        Self::RewardsRejected,
        Self::RewardsMargins,
        Self::RewardsAccuracies,
        Self::LogRatiosChosen,
        Self::LogRatiosRejected,
        Self::LogpsChosen,
        Self::LogpsRejected,
    ];

    /// Its name, such as `rewards/accuracies`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::LossPairwise => "loss/pairwise",
            Self::LossCalibration => "loss/calibration",
            Self::RewardsChosen => "rewards/chosen",
            Self::RewardsRejected => "rewards/rejected",
            Self::RewardsMargins => "rewards/margins",
            Self::RewardsAccuracies => "rewards/accuracies",
            Self::LogRatiosChosen => "log_ratios/chosen",
            Self::LogRatiosRejected => "log_ratios/rejected",
            Self::LogpsChosen => "logps/chosen",
            Self::LogpsRejected => "logps/rejected",
        }
    }

    /// Whether more is better; `None` where that is a matter of opinion: DPO wants rejected completions ever less likely,
    /// Cal-DPO at a distance.
    pub fn higher_is_better(self) -> Option<bool> {
        match self {
            Self::Loss | Self::LossPairwise | Self::LossCalibration => Some(false),
            Self::RewardsChosen
            | Self::RewardsMargins
            | Self::RewardsAccuracies
            | Self::LogRatiosChosen
            | Self::LogpsChosen => Some(true),
            Self::RewardsRejected | Self::LogRatiosRejected | Self::LogpsRejected => None,
        }
    }

    /// Why it says nothing under `objective`.
    fn silent_under(self, objective: &ObjectiveConfig) -> Option<String> {
        let kind = objective.kind();
        let log_ratio = matches!(self, Self::LogRatiosChosen | Self::LogRatiosRejected);
        let rejected_side = log_ratio
            || matches!(
                self,
                Self::LossCalibration
                    | Self::RewardsChosen
                    | Self::RewardsRejected
                    | Self::RewardsMargins
                    | Self::RewardsAccuracies
                    | Self::LogpsRejected
            );
        if !objective.needs_rejected() && rejected_side {
            return Some(format!(
                "{kind} has no reference and no rejected side; take \"loss\""
            ));
        }
        if !objective.needs_reference() && log_ratio {
            return Some(format!(
                "{kind} has no reference, so that it is always 0; take \"rewards/margins\" or \"rewards/accuracies\""
            ));
        }
        if !objective.calibrates() && self == Self::LossCalibration {
            return Some(format!(
                "{kind} has no calibration term, so that it is always 0"
            ));
        }
        let only_calibrates = matches!(objective, ObjectiveConfig::SppoHard { .. });
        (only_calibrates && self == Self::LossPairwise).then(|| {
            format!("{kind} is its calibration term alone, so that it is always 0; take \"loss\"")
        })
    }
}

impl EvaluateSection {
    /// Whether more of its metric is better.
    pub fn higher_is_better(&self) -> bool {
        let known = self.metric.and_then(Metric::higher_is_better);
        known.or(self.higher_is_better).unwrap_or(true)
    }
}

/// Checks what `[evaluate]` compares and what follows from it.
pub(crate) fn validate(spec: &Spec) -> Result<(), SpecError> {
    let evaluate = &spec.evaluate;
    let Some(metric) = evaluate.metric else {
        return without_metric(evaluate);
    };
    let name = metric.name();
    if let Some(reason) = metric.silent_under(&spec.objective) {
        return refuse("evaluate.metric", &format!("{name}: {reason}"));
    }
    if spec.data.eval.is_empty() {
        let reason = format!("{name} is measured on held-out pairs; name their files in data.eval");
        return refuse("evaluate.metric", &reason);
    }
    if evaluate.every_steps.is_none() {
        return refuse(
            "evaluate.metric",
            "only the last step would be evaluated, and there is nothing to choose from; set evaluate.every_steps",
        );
    }
    match (metric.higher_is_better(), evaluate.higher_is_better) {
        (None, None) => {
            let reason = format!(
                "which direction of {name} is better depends on what you look for; set it to true or false"
            );
            return refuse("evaluate.higher_is_better", &reason);
        }
        (Some(known), Some(given)) if known != given => {
            let better = if known { "higher" } else { "lower" };
            let reason = format!("{name} is better when it is {better}; leave this key out");
            return refuse("evaluate.higher_is_better", &reason);
        }
        _ => {}
    }
    stopping(evaluate)
}

fn without_metric(evaluate: &EvaluateSection) -> Result<(), SpecError> {
    let given = [
        (
            "evaluate.early_stopping_patience",
            evaluate.early_stopping_patience.is_some(),
        ),
        (
            "evaluate.early_stopping_min_delta",
            evaluate.early_stopping_min_delta.is_some(),
        ),
        (
            "evaluate.higher_is_better",
            evaluate.higher_is_better.is_some(),
        ),
    ];
    match given.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((key, _)) => refuse(
            key,
            "needs evaluate.metric, which says what is compared, such as evaluate.metric = \"rewards/accuracies\"",
        ),
    }
}

fn stopping(evaluate: &EvaluateSection) -> Result<(), SpecError> {
    if evaluate.early_stopping_patience == Some(0) {
        return refuse(
            "evaluate.early_stopping_patience",
            "must be at least 1, got 0; leave it out to train to the end",
        );
    }
    let Some(delta) = evaluate.early_stopping_min_delta else {
        return Ok(());
    };
    let key = "evaluate.early_stopping_min_delta";
    if evaluate.early_stopping_patience.is_none() {
        return refuse(
            key,
            "says what counts as an improvement for evaluate.early_stopping_patience, which is not set",
        );
    }
    if !delta.is_finite() || delta < 0.0 {
        return refuse(
            key,
            &format!("must be a finite number of at least 0, got {delta}"),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::Metric;
    use crate::resolve;

    /// Resolves a job with `[evaluate]` and says what is refused.
    fn check(objective: &str, eval: &str, evaluate: &str) -> Result<crate::Resolved, String> {
        let text = format!(
            "[model]\npath = 'm'\n[data]\ntrain = ['t']\neval = [{eval}]\n[objective]\nkind = '{objective}'\n\
             [evaluate]\n{evaluate}"
        );
        resolve(&text.parse().unwrap()).map_err(|error| error.to_string())
    }

    #[track_caller]
    fn refused(objective: &str, eval: &str, evaluate: &str, parts: &[&str]) {
        let error = check(objective, eval, evaluate).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "`{part}` is missing in: {error}");
        }
    }

    #[test]
    fn names_are_those_of_the_rows_and_read_back() {
        for metric in Metric::ALL {
            let value = toml::Value::try_from(metric).unwrap();
            assert_eq!(value.as_str(), Some(metric.name()));
            assert_eq!(value.try_into::<Metric>().unwrap(), metric);
        }
    }

    #[test]
    fn early_stopping_resolves_to_itself() {
        let text = "every_steps = 10\nmetric = 'rewards/accuracies'\nearly_stopping_patience = 3\n\
                    early_stopping_min_delta = 0";
        let resolved = check("cal_dpo", "'e'", text).unwrap();
        let section = resolved.spec.evaluate;
        assert_eq!(section.metric, Some(Metric::RewardsAccuracies));
        assert!(section.higher_is_better());
        assert_eq!(section.early_stopping_min_delta, Some(0.0));
        let again = resolve(&resolved.resolved).unwrap();
        assert_eq!(again.resolved, resolved.resolved);
        assert!(
            resolved.identity.get("evaluate").is_none(),
            "it may change between starts"
        );
    }

    #[test]
    fn directions_are_known_or_given() {
        let higher = |text: &str| {
            let text = format!("every_steps = 10\n{text}");
            let resolved = check("cal_dpo", "'e'", &text).unwrap();
            resolved.spec.evaluate.higher_is_better()
        };
        assert!(!higher("metric = 'loss'"));
        assert!(higher(
            "metric = 'log_ratios/chosen'\nhigher_is_better = true"
        ));
        assert!(!higher(
            "metric = 'log_ratios/rejected'\nhigher_is_better = false"
        ));
        let every = "every_steps = 10\nmetric = 'rewards/rejected'";
        refused(
            "cal_dpo",
            "'e'",
            every,
            &["evaluate.higher_is_better: ", "rewards/rejected"],
        );
        let against = "every_steps = 10\nmetric = 'loss'\nhigher_is_better = true";
        refused(
            "cal_dpo",
            "'e'",
            against,
            &["loss is better when it is lower"],
        );
    }

    #[test]
    fn what_cannot_work_is_refused_with_the_cure() {
        let accuracy = "metric = 'rewards/accuracies'\nevery_steps = 10\n";
        let with = |more: &str| format!("{accuracy}{more}");
        let needs = ["needs evaluate.metric"];
        for key in [
            "early_stopping_patience = 2",
            "early_stopping_min_delta = 0.1",
            "higher_is_better = true",
        ] {
            refused("dpo", "'e'", key, &needs);
        }
        refused("dpo", "", accuracy, &["evaluate.metric: ", "data.eval"]);
        let once = "metric = 'rewards/accuracies'";
        refused("dpo", "'e'", once, &["set evaluate.every_steps"]);
        let zero = with("early_stopping_patience = 0");
        refused(
            "dpo",
            "'e'",
            &zero,
            &["early_stopping_patience: must be at least 1"],
        );
        let alone = with("early_stopping_min_delta = 0.1");
        refused(
            "dpo",
            "'e'",
            &alone,
            &["early_stopping_patience, which is not set"],
        );
        for delta in ["-0.1", "nan", "inf"] {
            let text = with(&format!(
                "early_stopping_patience = 1\nearly_stopping_min_delta = {delta}"
            ));
            refused(
                "dpo",
                "'e'",
                &text,
                &["early_stopping_min_delta: must be a finite number"],
            );
        }
        refused("sft", "'e'", accuracy, &["take \"loss\""]);
        let calibration = "metric = 'loss/calibration'\nevery_steps = 10";
        refused("dpo", "'e'", calibration, &["no calibration term"]);
        assert!(check("cal_dpo", "'e'", calibration).is_ok());
        let pairwise = "metric = 'loss/pairwise'\nevery_steps = 10";
        refused("sppo_hard", "'e'", pairwise, &["calibration term alone"]);
        let ratio = "metric = 'log_ratios/chosen'\nevery_steps = 10";
        refused("simpo", "'e'", ratio, &["no reference", "rewards/margins"]);
        assert!(check("simpo", "'e'", accuracy).is_ok());
        let typo = "metric = 'rewards/accuracy'\nevery_steps = 10";
        refused(
            "dpo",
            "'e'",
            typo,
            &["evaluate.metric: ", "did you mean `rewards/accuracies`"],
        );
    }
}
