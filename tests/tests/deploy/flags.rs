//! Arguments that manifests and units pass, against `--help` of the real programs.

use std::collections::BTreeSet;
use std::process::Command;

use tests::programs::{program, text};

use crate::manifest::{command, container, name, overlays};
use crate::units;

/// Flags that `program` (and its subcommand) says it takes.
fn known(program_name: &str, subcommand: Option<&str>) -> BTreeSet<String> {
    let output = Command::new(program(program_name))
        .args(subcommand)
        .arg("--help")
        .output()
        .expect("it starts");
    let help = text(&output);
    assert!(
        output.status.success(),
        "{program_name} {subcommand:?}: {help}"
    );
    let lines = help.lines().map(str::trim_start);
    let flags = lines
        .filter(|line| line.starts_with('-'))
        .flat_map(|line| line.split(|c: char| c.is_whitespace() || c == ',' || c == '='))
        .filter(|word| word.starts_with("--"));
    flags.map(str::to_owned).collect()
}

/// Refuses a command line with a flag that its program does not know.
fn check(what: &str, words: &[&str]) {
    let (path, arguments) = words.split_first().expect("a program");
    let (_, program_name) = path.rsplit_once('/').unwrap_or(("", path));
    let subcommand = arguments.first().filter(|word| !word.starts_with('-'));
    let known = known(program_name, subcommand.copied());
    for word in arguments.iter().filter(|word| word.starts_with("--")) {
        let flag = word.split_once('=').map_or(*word, |(flag, _)| flag);
        assert!(
            known.contains(flag),
            "{what}: `{program_name}` does not know {flag}, only {known:?}"
        );
    }
}

#[test]
fn every_flag_of_the_manifests_is_one_of_the_programs() {
    for overlay in overlays() {
        for workload in overlay.workloads() {
            let what = format!("{}: {}", overlay.name, name(workload));
            check(&what, &command(container(workload)));
        }
    }
}

#[test]
fn every_flag_of_the_units_is_one_of_the_programs() {
    for unit in units::UNITS {
        let text = units::read(unit);
        let start = units::value(&text, "ExecStart");
        check(unit, &start.split_whitespace().collect::<Vec<_>>());
    }
}
