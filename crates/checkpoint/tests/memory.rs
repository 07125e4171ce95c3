//! Loading, verifying, exporting, comparing and cutting anew take little memory, however large the checkpoint is.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../storage/tests/fuzz/mod.rs"]
mod fuzz;

use std::{fs, path::Path};

use checkpoint::{
    Checkpoint, ExportDtype, Kind, ManifestInfo, Piece, RankFile, Side, TensorSpec, TrainState,
    commit, diff, export, reshard, write_rank,
};
use fuzz::{Counting, peak};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: usize = 1 << 20;

/// A chunk of 8 MiB, of each side where there are two, and blocks of 4 or less beside it.
const MOST: usize = 19 * MIB;

/// Saves `tensors` of `rows` × 1024 as `world` ranks.
fn save(dir: &Path, tensors: usize, rows: usize, world: u32) -> Checkpoint {
    let spec = |index| TensorSpec {
        name: format!("layers.{index}.weight"),
        shape: vec![rows, 1024],
    };
    let specs: Vec<TensorSpec> = (0..tensors).map(spec).collect();
    let state = TrainState {
        step: 20,
        epoch: 1,
        updates: 20,
        seed: 0,
        shift: None,
    };
    let info = ManifestInfo {
        model_digest: String::new(),
        tokenizer_digest: String::new(),
        data_digest: String::new(),
        run_digest: String::new(),
        tool_version: String::new(),
    };
    let len = rows * 1024 / world as usize;
    let values: Vec<f32> = (0..len).map(|index| index as f32).collect();
    let ranks: Vec<RankFile> = (0..world)
        .map(|rank| {
            let mut pieces = Vec::new();
            for kind in Kind::ALL {
                pieces.extend(specs.iter().map(|spec| Piece {
                    tensor: &spec.name,
                    kind,
                    start: len * rank as usize,
                    values: &values,
                }));
            }
            write_rank(dir, 1, rank, world, state, &specs, pieces).unwrap()
        })
        .collect();
    let committed = commit(dir, &ranks, &info).unwrap();
    Checkpoint::open(&committed.path).unwrap()
}

/// One test: the counters are the process's.
#[test]
fn memory_does_not_grow_with_the_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    // 24 and 96 MiB; in the second a piece is as large as a chunk.
    for (name, tensors, rows) in [("small", 4, 512), ("large", 2, 4096)] {
        let dir = directory.path().join(name);
        let checkpoint = save(&dir, tensors, rows, 2);
        let size = checkpoint.bytes() as usize;
        assert!(size > 12 * tensors * rows * 1024, "{size}");
        let check = |what: &'static str, peak: usize| {
            println!(
                "{what} of {} MiB: {:.1} MiB",
                size / MIB,
                peak as f64 / MIB as f64
            );
            assert!(peak < MOST, "{what} of {size} bytes took {peak}");
        };
        let mut out = vec![0.0; rows * 1024];
        let (load, ()) = peak(|| {
            for kind in Kind::ALL {
                for spec in &checkpoint.manifest().tensors {
                    checkpoint.read(&spec.name, kind, 0, &mut out).unwrap();
                }
            }
        });
        check("load", load);
        // A chunk that was read before would not be counted.
        let checkpoint = Checkpoint::open(checkpoint.path()).unwrap();
        // As another world size would: parts of pieces and of chunks.
        let (load, ()) = peak(|| {
            for start in (0..out.len()).step_by(100_003) {
                let end = out.len().min(start + 100_003);
                let part = &mut out[start..end];
                let name = &checkpoint.manifest().tensors[0].name;
                checkpoint.read(name, Kind::Weight, start, part).unwrap();
            }
        });
        check("load in parts", load);
        let (verify, verified) = peak(|| checkpoint.verify());
        verified.unwrap();
        check("verify", verify);
        let checkpoint = Checkpoint::open(checkpoint.path()).unwrap();
        let out = dir.join("export");
        let (exporting, exported) =
            peak(|| export(checkpoint.path(), &model, &out, ExportDtype::Bf16, u64::MAX));
        exported.unwrap();
        check("export", exporting);
        let (resharding, resharded) =
            peak(|| reshard(&checkpoint, &dir.join("resharded"), 3, &|_| ()));
        let resharded = resharded.unwrap();
        check("reshard", resharding);
        let (a, b) = (
            Side::open(checkpoint.path()).unwrap(),
            Side::open(&resharded.path).unwrap(),
        );
        let (comparing, compared) = peak(|| diff(&a, &b, &Kind::ALL, &|_| ()));
        assert!(compared.unwrap().identical);
        check("diff", comparing);
    }
}
