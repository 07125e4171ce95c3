//! The systemd units. `tests/deploy.sh` has systemd itself read them.

use std::fs;

use tests::workspace_root;

use crate::image::Dockerfile;
use crate::pods::leaving_seconds;

/// Both units.
pub const UNITS: [&str; 2] = ["caldpo-coordinator.service", "caldpo-worker@.service"];

/// A file of `deploy/systemd`.
pub fn read(name: &str) -> String {
    let path = workspace_root().join("deploy/systemd").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The only value of a key in a unit.
pub fn value<'a>(unit: &'a str, key: &str) -> &'a str {
    let values: Vec<_> = unit
        .lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        .collect();
    assert_eq!(values.len(), 1, "{key} in {unit}");
    values[0]
}

#[test]
fn failures_are_tried_again_bad_usage_is_not_and_a_signal_is_no_failure() {
    for name in UNITS {
        let unit = read(name);
        assert_eq!(value(&unit, "Restart"), "on-failure", "{name}");
        assert_eq!(value(&unit, "RestartPreventExitStatus"), "2", "{name}");
        assert_eq!(value(&unit, "SuccessExitStatus"), "130 143", "{name}");
        let seconds: u64 = value(&unit, "TimeoutStopSec").parse().expect("seconds");
        assert!(seconds >= leaving_seconds(), "{name}: {seconds} seconds");
    }
}

#[test]
fn units_run_as_the_user_of_the_images() {
    let users = read("caldpo.sysusers.conf");
    let line = users
        .lines()
        .find(|line| line.starts_with("u "))
        .expect("a user");
    let fields: Vec<_> = line.split_whitespace().collect();
    assert_eq!(fields[2], Dockerfile::read().user().to_string());
    for name in UNITS {
        let unit = read(name);
        assert_eq!(value(&unit, "User"), fields[1], "{name}");
        assert_eq!(value(&unit, "NoNewPrivileges"), "yes", "{name}");
        assert_eq!(value(&unit, "ProtectSystem"), "strict", "{name}");
        // Runs are written there, and nowhere else but in folders of the unit's own.
        assert_eq!(
            value(&unit, "ReadWritePaths"),
            value(&unit, "WorkingDirectory"),
            "{name}"
        );
        assert_eq!(
            value(&unit, "RequiresMountsFor"),
            value(&unit, "WorkingDirectory"),
            "{name}"
        );
    }
}

#[test]
fn variables_of_the_units_are_in_the_example() {
    let example = read("worker.env.example");
    let unit = read("caldpo-worker@.service");
    let start = value(&unit, "ExecStart");
    let named: Vec<_> = start
        .split("${")
        .skip(1)
        .map(|rest| rest.split_once('}').expect("a closing brace").0)
        .collect();
    assert!(!named.is_empty());
    for name in named {
        let given = example
            .lines()
            .any(|line| line.split_once('=').is_some_and(|(key, _)| key == name));
        assert!(given, "worker.env.example does not give {name}");
        // The coordinator refuses variables that begin like its configuration and are none.
        assert!(!name.starts_with("CALDPO__"), "{name}");
    }
}
