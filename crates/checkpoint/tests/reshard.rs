//! Any world size becomes any other, bit for bit (C3), and a crash on the way leaves what was there (C1).
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{
    fs,
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use checkpoint::{
    Checkpoint, Kind, Piece, RankFile, ReshardError, SOURCE, TensorSpec, commit, newest, reshard,
    write_rank,
};
use proptest::{collection::vec, prelude::*, test_runner::Config};
use support::{GENERATION, elements, info, save, state, tensors};

/// Any bits: numbers, zeros of both signs, infinities, every kind of NaN.
fn bits(seed: u64, tensor: usize, kind: Kind, index: usize) -> u32 {
    let mut bytes = blake3::Hasher::new();
    for part in [seed, tensor as u64, kind as u64, index as u64] {
        bytes.update(&part.to_le_bytes());
    }
    let hash = bytes.finalize();
    u32::from_le_bytes(hash.as_bytes()[..4].try_into().unwrap())
}

/// Saves `tensors` as `world` ranks, each with its share of every tensor.
fn save_random(dir: &Path, seed: u64, tensors: &[TensorSpec], kinds: &[Kind], world: u32) {
    let write = |rank: u32| -> RankFile {
        let mut owned = Vec::new();
        for &kind in kinds {
            for (index, spec) in tensors.iter().enumerate() {
                let len = elements(spec);
                let cut = |rank: u32| len * rank as usize / world as usize;
                let range = cut(rank)..cut(rank + 1);
                let values = range
                    .clone()
                    .map(|at| f32::from_bits(bits(seed, index, kind, at)));
                owned.push((kind, spec, range.start, values.collect::<Vec<f32>>()));
            }
        }
        let pieces: Vec<_> = owned
            .iter()
            .map(|(kind, spec, start, values)| Piece {
                tensor: &spec.name,
                kind: *kind,
                start: *start,
                values,
            })
            .collect();
        write_rank(dir, GENERATION, rank, world, state(20), tensors, pieces).unwrap()
    };
    let ranks: Vec<RankFile> = (0..world).map(write).collect();
    commit(dir, &ranks, &info()).unwrap();
}

/// All bits of a checkpoint.
fn all_bits(checkpoint: &Checkpoint) -> Vec<u32> {
    let mut all = Vec::new();
    for kind in Kind::ALL.into_iter().filter(|&kind| checkpoint.has(kind)) {
        for spec in &checkpoint.manifest().tensors {
            let mut out = vec![0.0; elements(spec)];
            checkpoint.read(&spec.name, kind, 0, &mut out).unwrap();
            all.extend(out.into_iter().map(f32::to_bits));
        }
    }
    all
}

proptest! {
    #![proptest_config(Config { cases: 2, failure_persistence: None, ..Config::default() })]

    #[test]
    fn c3_any_world_size_becomes_any_other_bit_for_bit(
        shapes in vec(vec(0..6usize, 0..4), 1..6),
        seed in any::<u64>(),
        first in any::<bool>(),
    ) {
        let tensors: Vec<TensorSpec> = shapes
            .into_iter()
            .enumerate()
            .map(|(index, shape)| TensorSpec { name: format!("layers.{index}.weight"), shape })
            .collect();
        // An update rule such as RMSprop has no first moment.
        let kinds: Vec<Kind> =
            Kind::ALL.into_iter().filter(|&kind| first || kind != Kind::FirstMoment).collect();
        let mut expected = Vec::new();
        for &kind in &kinds {
            for (index, spec) in tensors.iter().enumerate() {
                expected.extend((0..elements(spec)).map(|at| bits(seed, index, kind, at)));
            }
        }
        for from in 1..=8 {
            let old = tempfile::tempdir().unwrap();
            save_random(old.path(), seed, &tensors, &kinds, from);
            let checkpoint = Checkpoint::open(&old.path().join("step-00000020")).unwrap();
            for to in 1..=8 {
                let new = tempfile::tempdir().unwrap();
                let seen = AtomicU64::new(0);
                let watch = |bytes| { seen.fetch_add(bytes, Relaxed); };
                let done = reshard(&checkpoint, new.path(), to, &watch).unwrap();
                let resharded = Checkpoint::open(&done.path).unwrap();
                resharded.verify().unwrap();
                prop_assert_eq!(resharded.manifest().world, to);
                prop_assert_eq!(resharded.manifest().files.len(), to as usize);
                prop_assert_eq!(resharded.manifest().state, checkpoint.manifest().state);
                prop_assert_eq!(&resharded.manifest().info, &checkpoint.manifest().info);
                prop_assert!(all_bits(&resharded) == expected, "{} to {}", from, to);
                prop_assert_eq!(seen.into_inner(), 4 * expected.len() as u64);
            }
        }
    }
}

#[test]
fn shares_are_equal_and_what_exports_need_comes_along() {
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = save(old.path(), 20, 2).path;
    fs::create_dir(old.path().join(SOURCE)).unwrap();
    fs::write(old.path().join(SOURCE).join("config.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let done = reshard(&checkpoint, new.path(), 9, &|_| ()).unwrap();
    // 45 parameters, each with two moments.
    for entry in &Checkpoint::open(&done.path).unwrap().manifest().files {
        let values: usize = entry.pieces.iter().map(|piece| piece.len).sum();
        assert_eq!(values, 15, "{}", entry.name);
    }
    let copied = fs::read(new.path().join(SOURCE).join("config.json")).unwrap();
    assert_eq!(copied, b"{}");
    // More ranks than parameters: some hold nothing.
    let done = reshard(&checkpoint, &new.path().join("many"), 50, &|_| ()).unwrap();
    assert_eq!(
        all_bits(&Checkpoint::open(&done.path).unwrap()),
        all_bits(&checkpoint)
    );
}

#[test]
fn another_checkpoint_of_the_step_is_not_replaced() {
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let checkpoint = Checkpoint::open(&save(old.path(), 20, 2).path).unwrap();
    let other = save(new.path(), 20, 3).path;
    let refused = reshard(&checkpoint, new.path(), 4, &|_| ()).unwrap_err();
    assert!(
        matches!(&refused, ReshardError::Occupied { path } if *path == other),
        "{refused}"
    );
    assert_eq!(Checkpoint::open(&other).unwrap().manifest().world, 3);
    let refused = reshard(&checkpoint, &new.path().join("new"), 0, &|_| ());
    assert!(matches!(refused, Err(ReshardError::World)));
    assert!(!new.path().join("new").exists());
}

#[test]
fn damage_is_found_before_a_new_checkpoint_has_it() {
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let checkpoint = Checkpoint::open(&save(old.path(), 20, 2).path).unwrap();
    let file = checkpoint.path().join(&checkpoint.manifest().files[1].name);
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let error = reshard(&checkpoint, new.path(), 3, &|_| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("second/scale@0"), "{error}");
    assert_eq!(newest(new.path()).unwrap().found, None);
}

/// In its own directory, stopped after every read: what was there is there, and the next try ends it.
#[test]
fn c1_a_reshard_cut_short_anywhere_leaves_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), 20, 2).path;
    let expected = all_bits(&Checkpoint::open(&path).unwrap());
    let mut stops = 0;
    loop {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let left = AtomicU64::new(stops);
        let watch = |_| {
            let before = left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
            // Not a panic's message: it is what is expected.
            before.unwrap_or_else(|_| panic::resume_unwind(Box::new("stopped")));
        };
        let tried = panic::catch_unwind(AssertUnwindSafe(|| {
            reshard(&checkpoint, directory.path(), 3, &watch)
        }));
        let opened = Checkpoint::open(&path).unwrap();
        opened.verify().unwrap();
        assert!(all_bits(&opened) == expected, "after {stops} reads");
        let Ok(done) = tried else {
            assert_eq!(opened.manifest().world, 2);
            stops += 1;
            continue;
        };
        assert_eq!(done.unwrap().path, path);
        assert_eq!(opened.manifest().world, 3);
        assert_eq!(opened.manifest().generation, GENERATION + 1);
        assert_eq!(opened.verify().unwrap().unlisted, Vec::<String>::new());
        break;
    }
    // A read at least for every tensor and kind.
    assert!(stops >= tensors().len() as u64 * 3, "{stops}");
}
