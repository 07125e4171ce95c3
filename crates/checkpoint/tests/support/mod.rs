//! A small model, written as any number of ranks.

use std::path::Path;

use checkpoint::{
    CommittedCheckpoint, Kind, ManifestInfo, MeanState, Piece, RankFile, TensorSpec, TrainState,
    WriteError, commit, write_rank_in,
};
use storage::Folder;

pub const GENERATION: u64 = 4;

pub fn tensors() -> Vec<TensorSpec> {
    [
        ("model.embed_tokens.weight", vec![5, 4]),
        ("model.norm.weight", vec![4]),
        ("lm_head.weight", vec![5, 4]),
        ("scale", vec![]),
    ]
    .into_iter()
    .map(|(name, shape)| TensorSpec {
        name: name.to_owned(),
        shape,
    })
    .collect()
}

pub fn state(step: u64) -> TrainState {
    TrainState {
        step,
        epoch: 1,
        updates: step - 1,
        seed: u64::MAX,
        shift: Some(MeanState {
            mean: 0.1 + 0.2,
            count: step,
        }),
    }
}

pub fn info() -> ManifestInfo {
    ManifestInfo {
        model_digest: "m".repeat(64),
        tokenizer_digest: "t".repeat(64),
        data_digest: "d".repeat(64),
        run_digest: "r".repeat(64),
        tool_version: "0.1.0".to_owned(),
    }
}

/// The values of a tensor: each element of each kind, tensor and step is another number.
pub fn values(step: u64, tensor: usize, kind: Kind, len: usize) -> Vec<f32> {
    (0..len)
        .map(|index| {
            (step * 100_000 + tensor as u64 * 10_000) as f32
                + (kind as usize * 1000 + index) as f32
                + 0.125
        })
        .collect()
}

pub fn elements(spec: &TensorSpec) -> usize {
    spec.elements().unwrap()
}

/// Writes rank `rank`'s contiguous share of every tensor.
pub fn write(dir: &Path, generation: u64, step: u64, world: u32, rank: u32) -> RankFile {
    write_in(&Folder::open(dir).unwrap(), generation, step, world, rank).unwrap()
}

pub fn write_in(
    dir: &Folder,
    generation: u64,
    step: u64,
    world: u32,
    rank: u32,
) -> Result<RankFile, WriteError> {
    let tensors = tensors();
    let mut owned = Vec::new();
    for kind in Kind::ALL {
        for (index, spec) in tensors.iter().enumerate() {
            let len = elements(spec);
            let start = len * rank as usize / world as usize;
            let end = len * (rank as usize + 1) / world as usize;
            let whole = values(step, index, kind, len);
            owned.push((index, kind, start, whole[start..end].to_vec()));
        }
    }
    let pieces = owned.iter().map(|(index, kind, start, values)| Piece {
        tensor: &tensors[*index].name,
        kind: *kind,
        start: *start,
        values,
    });
    write_rank_in(dir, generation, rank, world, state(step), &tensors, pieces)
}

/// A whole checkpoint.
pub fn save(dir: &Path, step: u64, world: u32) -> CommittedCheckpoint {
    let ranks: Vec<RankFile> = (0..world)
        .map(|rank| write(dir, GENERATION, step, world, rank))
        .collect();
    commit(dir, &ranks, &info()).unwrap()
}
