//! `[objective]` as people read it, in tables, legends and model cards.

use serde::{Deserialize, Serialize};
use toml::Value;

/// The objective of a resolved configuration. Parameters that it does not have are absent.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub(crate) struct Objective {
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration_weight: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label_smoothing: Option<f64>,
}

impl Objective {
    /// Reads a resolved `[objective]`.
    pub(crate) fn from_section(section: &Value) -> Result<Self, toml::de::Error> {
        section.clone().try_into()
    }

    /// Such as `cal_dpo, β 0.1`; parameters at their usual values are left out.
    pub(crate) fn label(&self) -> String {
        let mut text = self.kind.clone();
        let unusual = |value: Option<f64>, usual| value.filter(|value| *value != usual);
        let parameters = [
            ("β", self.beta),
            ("λ", unusual(self.calibration_weight, 1.0)),
            ("ε", unusual(self.label_smoothing, 0.0)),
        ];
        for (name, value) in parameters {
            if let Some(value) = value {
                text = format!("{text}, {name} {value}");
            }
        }
        text
    }

    /// Whether its rows carry rewards: log-ratios against a reference.
    pub(crate) fn has_rewards(&self) -> bool {
        self.kind != "sft"
    }

    /// Whether the pairwise terms of both are the same function. β is inside DPO's sigmoid, not inside Cal-DPO's.
    pub(crate) fn same_pairwise(&self, other: &Self) -> bool {
        self.kind == other.kind && (self.kind == "cal_dpo" || self == other)
    }

    /// Whether both have calibration terms, and these are the same function.
    pub(crate) fn same_calibration(&self, other: &Self) -> bool {
        self.kind == "cal_dpo" && self == other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objective(text: &str) -> Objective {
        let section = toml::from_str(text).expect("TOML");
        Objective::from_section(&Value::Table(section)).expect("an objective")
    }

    #[test]
    fn labels_name_the_parameters_that_matter() {
        let check = |text: &str, label: &str| assert_eq!(objective(text).label(), label);
        check(
            "kind='cal_dpo'\nbeta=0.1\ncalibration_weight=1.0",
            "cal_dpo, β 0.1",
        );
        check(
            "kind='cal_dpo'\nbeta=1\ncalibration_weight=0.5",
            "cal_dpo, β 1, λ 0.5",
        );
        check(
            "kind='dpo'\nbeta=0.1\nlabel_smoothing=0.2",
            "dpo, β 0.1, ε 0.2",
        );
        check("kind='sft'", "sft");
    }

    #[test]
    fn loss_terms_compare_where_they_are_the_same_function() {
        let cal = |beta| {
            objective(&format!(
                "kind='cal_dpo'\nbeta={beta}\ncalibration_weight=1.0"
            ))
        };
        let dpo = |beta| objective(&format!("kind='dpo'\nbeta={beta}\nlabel_smoothing=0.0"));
        assert!(cal(0.1).same_pairwise(&cal(0.05)));
        assert!(!cal(0.1).same_calibration(&cal(0.05)));
        assert!(cal(0.1).same_calibration(&cal(0.1)));
        assert!(dpo(0.1).same_pairwise(&dpo(0.1)));
        assert!(!dpo(0.1).same_pairwise(&dpo(0.05)));
        assert!(!dpo(0.1).same_calibration(&dpo(0.1)));
        assert!(!cal(0.1).same_pairwise(&dpo(0.1)));
    }
}
