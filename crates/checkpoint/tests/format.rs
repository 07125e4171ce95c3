//! What is written is what is read, at any world size (C3), in files that safetensors reads.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;

use checkpoint::{
    Checkpoint, CheckpointError, CommitError, CoverageError, Kind, ManifestError, Piece, RankFile,
    TensorSpec, WriteError, commit, newest, write_rank,
};
use support::{GENERATION, elements, info, save, state, tensors, values, write};

/// Reads everything in `world` shares of every tensor.
fn read_as(checkpoint: &Checkpoint, step: u64, world: usize) {
    for kind in Kind::ALL {
        for (index, spec) in tensors().iter().enumerate() {
            let len = elements(spec);
            let expected = values(step, index, kind, len);
            for rank in 0..world {
                let range = len * rank / world..len * (rank + 1) / world;
                let mut out = vec![f32::NAN; range.len()];
                checkpoint
                    .read(&spec.name, kind, range.start, &mut out)
                    .unwrap();
                assert_eq!(out, expected[range], "{kind} of {} at {rank}", spec.name);
            }
        }
    }
}

#[test]
fn c3_a_checkpoint_of_any_world_size_loads_at_any_other() {
    for written in [1, 2, 3, 4, 7] {
        let directory = tempfile::tempdir().unwrap();
        let committed = save(directory.path(), 20, written);
        let checkpoint = Checkpoint::open(&committed.path).unwrap();
        for read in [1, 2, 3, 4, 7] {
            read_as(&checkpoint, 20, read);
        }
    }
}

#[test]
fn the_manifest_gives_back_state_digests_tensors_and_world() {
    let directory = tempfile::tempdir().unwrap();
    let committed = save(directory.path(), 20, 3);
    assert_eq!(committed.path, directory.path().join("step-00000020"));
    let checkpoint = Checkpoint::open(&committed.path).unwrap();
    let manifest = checkpoint.manifest();
    assert_eq!(manifest.state, state(20));
    assert_eq!(manifest.info, info());
    assert_eq!(manifest.tensors, tensors());
    assert_eq!((manifest.world, manifest.generation), (3, GENERATION));
    let verified = checkpoint.verify().unwrap();
    assert_eq!((verified.files, verified.bytes), (3, committed.bytes));
    assert!(verified.unlisted.is_empty());
    // Any JSON reader can look into it.
    let bytes = fs::read(committed.path.join(checkpoint::MANIFEST)).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(json["manifest"]["state"]["step"], 20);
}

#[test]
fn a_rank_file_is_a_safetensors_file_with_hugging_face_names() {
    let directory = tempfile::tempdir().unwrap();
    let committed = save(directory.path(), 20, 2);
    let name = format!("rank-00001-of-00002.generation-{GENERATION}.safetensors");
    let bytes = fs::read(committed.path.join(name)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("first/model.embed_tokens.weight@10").unwrap();
    assert_eq!(view.shape(), [10]);
    let expected: Vec<u8> = values(20, 0, Kind::FirstMoment, 20)[10..]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    assert_eq!(view.data(), expected);
    assert!(file.tensor("model/lm_head.weight@10").is_ok());
    assert!(file.tensor("second/model.norm.weight@2").is_ok());
}

#[test]
fn the_same_state_is_the_same_bytes() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, two) = (save(one.path(), 20, 2).path, save(two.path(), 20, 2).path);
    let mut names: Vec<_> = fs::read_dir(&one)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names.len(), 3);
    for name in names {
        let same = fs::read(one.join(&name)).unwrap() == fs::read(two.join(&name)).unwrap();
        assert!(same, "{name:?}");
    }
}

#[test]
fn entries_travel_as_json() {
    let directory = tempfile::tempdir().unwrap();
    let written = write(directory.path(), GENERATION, 20, 2, 1);
    let text = serde_json::to_string(&written).unwrap();
    assert_eq!(serde_json::from_str::<RankFile>(&text).unwrap(), written);
}

#[test]
fn values_across_chunks_are_read_and_verified() {
    let directory = tempfile::tempdir().unwrap();
    let len = 5 << 20;
    let tensors = vec![TensorSpec {
        name: "w".to_owned(),
        shape: vec![5, 1 << 20],
    }];
    let values: Vec<f32> = (0..len).map(|index| index as f32).collect();
    let pieces = Kind::ALL.map(|kind| Piece {
        tensor: "w",
        kind,
        start: 0,
        values: &values,
    });
    let written = write_rank(
        directory.path(),
        GENERATION,
        0,
        1,
        state(1),
        &tensors,
        pieces,
    )
    .unwrap();
    assert_eq!(written.file.chunks.len(), 8);
    let committed = commit(directory.path(), &[written], &info()).unwrap();
    let checkpoint = Checkpoint::open(&committed.path).unwrap();
    for start in [0, 1, (2 << 20) - 100, (4 << 20) - 7] {
        let mut out = vec![0.0; (1 << 20) - 3];
        checkpoint
            .read("w", Kind::SecondMoment, start, &mut out)
            .unwrap();
        assert!(out == values[start..start + out.len()], "from {start}");
    }
    // One flipped byte in the fourth chunk, which only the first moments have a part of.
    let path = committed.path.join(&checkpoint.manifest().files[0].name);
    let mut bytes = fs::read(&path).unwrap();
    bytes[(24 << 20) + 12345] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let checkpoint = Checkpoint::open(&committed.path).unwrap();
    let Err(CheckpointError::Damaged { damages, .. }) = checkpoint.verify() else {
        panic!("not detected");
    };
    assert_eq!(damages.len(), 1);
    assert_eq!(damages[0].tensor.as_deref(), Some("first/w@0"));
    assert_eq!((damages[0].offset, damages[0].bytes), (24 << 20, 8 << 20));
    let mut out = vec![0.0; len];
    checkpoint.read("w", Kind::Weight, 0, &mut out).unwrap();
    let error = checkpoint
        .read("w", Kind::FirstMoment, 0, &mut out)
        .unwrap_err()
        .to_string();
    assert!(error.contains("first/w@0"), "{error}");
}

#[test]
fn a_read_outside_the_model_is_refused_with_the_tensor() {
    let directory = tempfile::tempdir().unwrap();
    let committed = save(directory.path(), 20, 2);
    let checkpoint = Checkpoint::open(&committed.path).unwrap();
    for (tensor, start, len, cure) in [
        ("model.norm.weight", 1, 4, "the tensor has 4"),
        ("model.norm.weight", usize::MAX, 4, "the tensor has 4"),
        ("model.norm.bias", 0, 1, "no such tensor"),
    ] {
        let error = checkpoint
            .read(tensor, Kind::Weight, start, &mut vec![0.0; len])
            .unwrap_err()
            .to_string();
        assert!(error.contains(tensor) && error.contains(cure), "{error}");
    }
}

#[test]
fn a_moment_that_nobody_saved_is_not_read_as_anything() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = &tensors()[1..2];
    // RMSprop has no mean of gradients.
    let piece = |kind| Piece {
        tensor: "model.norm.weight",
        kind,
        start: 0,
        values: &[1.0; 4],
    };
    let pieces = [Kind::Weight, Kind::SecondMoment].map(piece);
    let (dir, state) = (directory.path(), state(20));
    let written = write_rank(dir, GENERATION, 0, 1, state, tensors, pieces).unwrap();
    let committed = commit(dir, &[written], &info()).unwrap();
    let checkpoint = Checkpoint::open(&committed.path).unwrap();
    assert_eq!(
        Kind::ALL.map(|kind| checkpoint.has(kind)),
        [true, false, true]
    );
    let read = checkpoint.read("model.norm.weight", Kind::FirstMoment, 0, &mut [0.0; 4]);
    let error = read.unwrap_err().to_string();
    assert!(error.contains("no first moment was saved"), "{error}");
}

#[test]
fn pieces_that_do_not_fit_their_tensor_are_refused_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    for (tensor, start) in [("model.norm.weight", 2), ("model.norm.bias", 0)] {
        let piece = Piece {
            tensor,
            kind: Kind::Weight,
            start,
            values: &[1.0; 3],
        };
        let result = write_rank(
            directory.path(),
            GENERATION,
            0,
            1,
            state(1),
            &tensors(),
            [piece],
        );
        let error = result.unwrap_err();
        assert!(matches!(error, WriteError::Piece { .. }));
        let name = format!("model/{tensor}@{start}");
        assert!(error.to_string().contains(&name), "{error}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// Commits two ranks of step 20 after `change`, which must be refused; returns why.
fn refused(change: impl Fn(&mut [RankFile])) -> CommitError {
    let directory = tempfile::tempdir().unwrap();
    let mut ranks = [0, 1].map(|rank| write(directory.path(), GENERATION, 20, 2, rank));
    change(&mut ranks);
    let error = commit(directory.path(), &ranks, &info()).unwrap_err();
    assert_eq!(
        newest(directory.path()).unwrap(),
        checkpoint::Newest::default()
    );
    error
}

#[test]
fn gaps_overlaps_and_disagreeing_ranks_are_not_committed() {
    let gap = refused(|ranks| {
        let norm =
            ranks[1].file.pieces.iter_mut().find(|piece| {
                piece.tensor == "model.norm.weight" && piece.kind == Kind::FirstMoment
            });
        norm.unwrap().start = 0;
    });
    assert!(
        matches!(
            &gap,
            CommitError::Manifest(ManifestError::Coverage(CoverageError::Overlap { tensor, at: 0, .. }))
                if tensor == "model.norm.weight"
        ),
        "{gap}"
    );
    let text = refused(|ranks| ranks[1].generation += 1).to_string();
    assert!(text.contains("generation 5"), "{text}");
    let text = refused(|ranks| ranks[1].state.step += 1).to_string();
    assert!(text.contains("step: 21"), "{text}");
    let text = refused(|ranks| ranks[1].world = 3).to_string();
    assert!(text.contains("world of 3"), "{text}");
    let text = refused(|ranks| ranks[1] = ranks[0].clone()).to_string();
    assert!(text.contains("2 files of rank 0 of 2"), "{text}");
    let text = refused(|ranks| ranks[1].tensors[1].name = "other".into()).to_string();
    assert!(
        text.contains("`model.norm.weight`") && text.contains("`other`"),
        "{text}"
    );
    let text = refused(|ranks| ranks[0].file.name = "../escape".into()).to_string();
    assert!(text.contains("../escape"), "{text}");
    let text = refused(|ranks| ranks[0].file.chunks.push(7)).to_string();
    assert!(text.contains("2 chunks"), "{text}");
    let text = refused(|ranks| ranks[0].file.blake3 = "0".repeat(64)).to_string();
    assert!(text.contains("BLAKE3"), "{text}");
}

/// Bytes as written and a checksum that is not theirs: the manifest would be visible, and the piece could not be read.
#[test]
fn c1_a_piece_whose_checksum_a_rank_tells_wrongly_is_not_committed() {
    for piece in [0, 5] {
        let error = refused(|ranks| ranks[1].file.pieces[piece].crc32c ^= 1);
        let CommitError::Damaged { damages, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(damages.len(), 1);
        let ranks = write(tempfile::tempdir().unwrap().path(), GENERATION, 20, 2, 1);
        let told = &ranks.file.pieces[piece];
        assert_eq!(damages[0].tensor, Some(told.name()));
        assert_eq!(damages[0].offset, told.offset);
    }
}

#[test]
fn a_missing_rank_or_missing_elements_are_not_committed() {
    let directory = tempfile::tempdir().unwrap();
    let one = write(directory.path(), GENERATION, 20, 2, 0);
    let text = commit(directory.path(), &[one], &info())
        .unwrap_err()
        .to_string();
    assert!(text.contains("0 files of rank 1 of 2"), "{text}");
    assert!(matches!(
        commit(directory.path(), &[], &info()),
        Err(CommitError::Empty)
    ));
    // Rank 0 of a world of one that wrote only its half.
    let half = [0.5; 2];
    let piece = Piece {
        tensor: "model.norm.weight",
        kind: Kind::Weight,
        start: 2,
        values: &half,
    };
    let tensors = &tensors()[1..2];
    let part = write_rank(
        directory.path(),
        GENERATION,
        0,
        1,
        state(20),
        tensors,
        [piece],
    );
    let text = commit(directory.path(), &[part.unwrap()], &info())
        .unwrap_err()
        .to_string();
    let expected = "weight of `model.norm.weight`: no rank wrote elements 0..2";
    assert!(text.contains(expected), "{text}");
}
