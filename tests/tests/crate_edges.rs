//! Which crate may depend on which: the table of `crates/ARCHITECTURE.md`, kept by a machine.

use std::{collections::BTreeMap, process::Command};

use serde_json::Value;

/// Allowed edges inside the workspace; `worker` is an optional edge of `coordinator` (feature `local`).
const ALLOWED: &[(&str, &[&str])] = &[
    ("protocol", &[]),
    ("wire", &["protocol"]),
    ("storage", &[]),
    ("checkpoint", &["storage"]),
    ("refcache", &["storage"]),
    ("collective", &[]),
    ("data", &["storage"]),
    ("gpu", &["collective", "storage"]),
    ("kernels", &["collective", "gpu"]),
    // kernels reaches it through cubecl and [patch.crates-io]; nobody names it.
    ("cubecl-llvm", &[]),
    ("model", &["kernels"]),
    ("objective", &[]),
    ("spec", &["data", "objective"]),
    (
        "trainer",
        &[
            "checkpoint",
            "collective",
            "data",
            "kernels",
            "model",
            "objective",
            "refcache",
            "spec",
        ],
    ),
    (
        "worker",
        &[
            "collective",
            "data",
            "gpu",
            "model",
            "objective",
            "protocol",
            "spec",
            "trainer",
            "wire",
        ],
    ),
    (
        "coordinator",
        &[
            "checkpoint",
            "protocol",
            "refcache",
            "spec",
            "storage",
            "wire",
            "worker",
        ],
    ),
];

/// Crates whose promise is that the ML stack stays out.
const WITHOUT_BURN: &[&str] = &[
    "protocol",
    "wire",
    "storage",
    "checkpoint",
    "refcache",
    "collective",
    "data",
    "gpu",
    "objective",
    "spec",
    "coordinator",
];

#[test]
fn every_crate_depends_only_on_what_the_architecture_allows() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    for (name, dependencies) in workspace() {
        let Some(allowed) = allowed.get(name.as_str()) else {
            assert!(
                ["tests", "gpu_probe", "sessions"].contains(&name.as_str()),
                "crate `{name}` has no line in the table of allowed edges"
            );
            continue;
        };
        for dependency in dependencies {
            let inside = ALLOWED.iter().any(|(known, _)| *known == dependency);
            assert!(
                !inside || allowed.contains(&dependency.as_str()),
                "crate `{name}` may not depend on `{dependency}`"
            );
        }
    }
}

#[test]
fn crates_that_promise_to_stay_light_do_not_name_burn() {
    for (name, dependencies) in workspace() {
        if WITHOUT_BURN.contains(&name.as_str()) {
            let heavy: Vec<_> = dependencies
                .iter()
                .filter(|dependency| dependency.starts_with("burn"))
                .collect();
            assert!(
                heavy.is_empty(),
                "crate `{name}` promises to stay without burn, but depends on {heavy:?}"
            );
        }
    }
}

/// Each workspace crate with the names of its normal dependencies.
fn workspace() -> Vec<(String, Vec<String>)> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(tests::workspace_root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    packages
        .iter()
        .map(|package| {
            let normal = package["dependencies"]
                .as_array()
                .expect("a list of dependencies")
                .iter()
                .filter(|dependency| dependency["kind"].is_null());
            let names = normal
                .map(|dependency| dependency["name"].as_str().expect("a name").to_owned())
                .collect();
            (package["name"].as_str().expect("a name").to_owned(), names)
        })
        .collect()
}
