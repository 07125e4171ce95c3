//! A checkpoint of format version 1 as it was written when the version was made: it stays readable, and today's program
//! writes the same bytes.
//!
//! `golden/version-1` is what `support::save(dir, 20, 2)` wrote. A change that needs other bytes is a new version, with a
//! folder of its own beside this one; the old one stays readable.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
};

use checkpoint::{Checkpoint, FORMAT_VERSION, Kind, newest, reshard};
use support::{GENERATION, elements, info, save, state, tensors, values};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/version-1")
}

/// Whether all three values of each tensor are those of the test model.
fn check(checkpoint: &Checkpoint) {
    assert_eq!(checkpoint.manifest().state, state(20));
    assert_eq!(checkpoint.manifest().info, info());
    assert_eq!(checkpoint.manifest().tensors, tensors());
    for kind in Kind::ALL {
        for (index, spec) in tensors().iter().enumerate() {
            let mut out = vec![f32::NAN; elements(spec)];
            checkpoint.read(&spec.name, kind, 0, &mut out).unwrap();
            assert_eq!(
                out,
                values(20, index, kind, out.len()),
                "{kind} of {}",
                spec.name
            );
        }
    }
}

#[test]
fn version_1_is_read_and_cut_anew() {
    let (_, path) = newest(&golden()).unwrap().found.unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let manifest = checkpoint.manifest();
    assert_eq!(
        (manifest.version, manifest.world, manifest.generation),
        (1, 2, GENERATION)
    );
    assert_eq!(checkpoint.verify().unwrap().files, 2);
    check(&checkpoint);
    let directory = tempfile::tempdir().unwrap();
    let resharded = reshard(&checkpoint, directory.path(), 3, &|_| ()).unwrap();
    check(&Checkpoint::open(&resharded.path).unwrap());
}

#[test]
fn the_bytes_of_version_1_have_not_changed() {
    assert_eq!(
        FORMAT_VERSION, 1,
        "keep version 1 readable, and this test for the new version"
    );
    let directory = tempfile::tempdir().unwrap();
    let written = save(directory.path(), 20, 2).path;
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let golden = golden().join("step-00000020");
    assert_eq!(names(&golden), names(&written));
    for name in names(&golden) {
        let (then, now) = (fs::read(golden.join(&name)), fs::read(written.join(&name)));
        let same = then.unwrap() == now.unwrap();
        assert!(same, "{name:?}: other bytes are another format version");
    }
}
