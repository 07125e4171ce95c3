//! Where time went, as shares of what was measured.

use protocol::Phases;

/// What each phase has of all phases' time, by name; `None` where nobody measured.
pub(crate) fn shares(phases: &Phases) -> Option<[(&'static str, f64); 9]> {
    let total = phases.total();
    (total > 0.0).then(|| phases.values().map(|(name, value)| (name, value / total)))
}

/// Such as `forward 31 %, backward 55 %, wait 14 %`, in the order of a step, without what rounds to 0 %; `None` where nobody
/// measured.
pub(crate) fn text(phases: &Phases) -> Option<String> {
    let mut words = Vec::new();
    for (name, share) in shares(phases)? {
        let percent = (100.0 * share).round();
        if percent > 0.0 {
            words.push(format!("{name} {percent} %"));
        }
    }
    Some(words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_what_was_measured() {
        let phases = Phases {
            data: 0.008,
            forward: 0.62,
            backward: 1.1,
            wait: 0.272,
            ..Phases::default()
        };
        let shares = shares(&phases).expect("it was measured");
        assert_eq!((shares[1], shares[2]), (("forward", 0.31), ("head", 0.0)));
        let expected = "forward 31 %, backward 55 %, wait 14 %";
        assert_eq!(text(&phases).as_deref(), Some(expected));
    }

    #[test]
    fn where_nobody_measured_there_is_nothing_to_say() {
        assert_eq!(shares(&Phases::default()), None);
        assert_eq!(text(&Phases::default()), None);
    }
}
