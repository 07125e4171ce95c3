//! The stand-in fits one version of cubecl, and the lock file must name that one.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

const VERSION: &str = "0.11.3";

/// What the lock file says of a package.
struct Locked {
    version: String,
    from_registry: bool,
}

fn locked(name: &str) -> Vec<Locked> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.lock");
    let lock: toml::Table = fs::read_to_string(path).unwrap().parse().unwrap();
    let packages = lock["package"].as_array().unwrap();
    packages
        .iter()
        .filter(|package| package["name"].as_str() == Some(name))
        .map(|package| Locked {
            version: package["version"].as_str().unwrap().to_owned(),
            from_registry: package.get("source").is_some(),
        })
        .collect()
}

#[test]
fn cubecl_is_the_version_that_the_stand_in_was_written_for() {
    for name in [
        "cubecl",
        "cubecl-core",
        "cubecl-cuda",
        "cubecl-environment",
        "cubecl-runtime",
    ] {
        let versions: Vec<String> = locked(name)
            .into_iter()
            .map(|found| found.version)
            .collect();
        assert_eq!(
            versions,
            [VERSION],
            "{name} has moved: the head of crates/cubecl-llvm/src/lib.rs says what to do"
        );
    }
}

#[test]
fn the_stand_in_is_the_only_cubecl_llvm_and_nothing_fetches_llvm() {
    let found = locked("cubecl-llvm");
    assert_eq!(
        found.len(),
        1,
        "[patch.crates-io] no longer replaces cubecl-llvm"
    );
    assert_eq!(found[0].version, VERSION);
    assert_eq!(found[0].version, env!("CARGO_PKG_VERSION"));
    assert!(
        !found[0].from_registry,
        "cubecl-llvm comes from the registry"
    );
    for name in ["tracel-llvm-bundler", "llvm-sys"] {
        assert!(locked(name).is_empty(), "{name} is back in Cargo.lock");
    }
}
