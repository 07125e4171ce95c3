//! `[objective]` as people read it, in tables, legends and model cards.

use serde::Serialize;
use spec::{Divergence, ObjectiveConfig, Targets};
use toml::Value;

use crate::numbers::{plain, signed};

/// The objective of a resolved configuration.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub(crate) struct Objective(ObjectiveConfig);

impl Objective {
    /// Reads a resolved `[objective]`.
    pub(crate) fn from_section(section: &Value) -> Result<Self, toml::de::Error> {
        section.clone().try_into().map(Self)
    }

    /// Such as `cal_dpo, β 0.1`; parameters at their usual values are left out.
    pub(crate) fn label(&self) -> String {
        label(&self.0, " ")
    }

    /// Whether its rows carry log-ratios against a reference.
    pub(crate) fn has_rewards(&self) -> bool {
        self.0.needs_reference()
    }

    /// Whether the pairwise terms of both are the same function. β is inside DPO's sigmoid, not inside Cal-DPO's.
    pub(crate) fn same_pairwise(&self, other: &Self) -> bool {
        use ObjectiveConfig::{CalDpo, Ipo, Slic, SppoHard};
        match (&self.0, &other.0) {
            (CalDpo { .. }, CalDpo { .. }) => true,
            (SppoHard { .. }, _) => false,
            (Slic { beta: one, .. }, Slic { beta: other, .. }) => one == other,
            (
                Ipo {
                    beta: one,
                    length_normalized: by_length,
                    ..
                },
                Ipo {
                    beta: other,
                    length_normalized: other_by_length,
                    ..
                },
            ) => (one, by_length) == (other, other_by_length),
            (one, other) => one == other,
        }
    }

    /// Whether both have calibration terms, and these are the same function.
    pub(crate) fn same_calibration(&self, other: &Self) -> bool {
        let same = match (calibration(&self.0), calibration(&other.0)) {
            (Some(one), Some(other)) => one == other,
            _ => self == other,
        };
        self.0.calibrates() && same
    }
}

/// Where calibration pulls to, and its weight; `None` for a mix, which may have several.
fn calibration(objective: &ObjectiveConfig) -> Option<(Targets, f64)> {
    let weight = match *objective {
        ObjectiveConfig::CalDpo {
            calibration_weight, ..
        }
        | ObjectiveConfig::Slic {
            calibration_weight, ..
        }
        | ObjectiveConfig::Ipo {
            calibration_weight, ..
        } => calibration_weight,
        ObjectiveConfig::SppoHard { .. } => 1.0,
        _ => return None,
    };
    objective.targets().map(|targets| (targets, weight))
}

/// Kind and parameters, such as `cal_dpo, β 0.1`, with `between` a letter and its number. β is always there, other parameters
/// where they are unusual.
pub(crate) fn label(objective: &ObjectiveConfig, between: &str) -> String {
    let mut words = vec![objective.kind().to_owned()];
    match objective {
        ObjectiveConfig::Mix { parts } => {
            let parts = parts.iter().map(|part| {
                let label = label(&part.objective, between);
                if part.weight == 1.0 {
                    return label;
                }
                format!("{} · {label}", part.weight)
            });
            let parts: Vec<_> = parts.collect();
            return format!("mix of {}", parts.join(" + "));
        }
        ObjectiveConfig::Dpo { divergence, .. } if *divergence != Divergence::ReverseKl => {
            words.push(divergence.name().into());
        }
        ObjectiveConfig::Ipo {
            length_normalized: true,
            ..
        } => words.push("length-normalized".into()),
        _ => {}
    }
    let parameters = objective.parameters().into_iter();
    words.extend(
        parameters
            .filter(|it| it.key == "beta" || Some(it.value) != it.usual)
            .map(|it| format!("{}{between}{}", it.symbol, it.value)),
    );
    words.join(", ")
}

/// t of targets ±t; `None` of others.
pub(crate) fn symmetric(targets: Targets) -> Option<f64> {
    (targets.chosen == -targets.rejected).then_some(targets.chosen)
}

/// Such as `±5`, or `+7.5 and −2.5`.
pub(crate) fn both(targets: Targets) -> String {
    match symmetric(targets) {
        Some(target) => format!("±{}", plain(target)),
        None => format!(
            "{} and {}",
            signed(targets.chosen),
            signed(targets.rejected)
        ),
    }
}

/// Whether rows of this kind carry log-ratios, where the kind is all that is known. A mix may have parts with a reference.
pub(crate) fn kind_has_rewards(kind: &str) -> bool {
    !matches!(kind, "sft" | "cpo" | "simpo" | "orpo")
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
        check(
            "kind='dpo'\ndivergence='forward_kl'",
            "dpo, forward_kl, β 0.1",
        );
        check(
            "kind='ipo'\nlength_normalized=true\ncalibration_weight=2.0",
            "ipo, length-normalized, β 0.1, λ 2",
        );
        check("kind='simpo'\ntarget_margin=1.5", "simpo, β 2, γ 1.5");
        check(
            "kind='mix'\nparts=[{kind='dpo'}, {kind='sft', weight=0.5}]",
            "mix of dpo, β 0.1 + 0.5 · sft",
        );
    }

    #[test]
    fn a_kind_alone_says_whether_it_has_rewards() {
        for kind in [
            "cal_dpo",
            "dpo",
            "robust",
            "exo_pair",
            "dpop",
            "slic",
            "ipo",
            "sigmoid_norm",
            "sppo_hard",
            "nca_pair",
            "apo_zero",
            "apo_down",
            "discopop",
            "cpo",
            "simpo",
            "orpo",
            "sft",
        ] {
            let objective = objective(&format!("kind='{kind}'"));
            assert_eq!(objective.has_rewards(), kind_has_rewards(kind), "{kind}");
        }
    }

    #[test]
    fn targets_are_written_with_their_signs() {
        let targets = |text: &str| objective(text).0.targets().expect("targets");
        assert_eq!(both(targets("kind='cal_dpo'")), "±5");
        let moved = targets("kind='cal_dpo'\ncalibration_shift=0.25");
        assert_eq!(both(moved), "+7.5 and −2.5");
        assert_eq!(symmetric(moved), None);
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
        let slic = |weight: f64| objective(&format!("kind='slic'\ncalibration_weight={weight:?}"));
        assert!(slic(0.0).same_pairwise(&slic(1.0)));
        assert!(!slic(0.0).same_calibration(&slic(0.0)));
        assert!(slic(1.0).same_calibration(&cal(0.1)));
        assert!(objective("kind='sppo_hard'").same_calibration(&cal(0.1)));
    }
}
