//! A checkpoint cut anew for another number of ranks, streamed: no more than a few blocks are in memory. Written and committed
//! as the ranks of a run do it, so that a crash anywhere leaves what was there.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use storage::{Condition, FileError, Folder, is_remote};

use crate::{
    commit::{CommitError, CommittedCheckpoint, commit_in},
    digest::Watch,
    export::SOURCE,
    folder::at,
    history::visible_in,
    parts::{Kind, TensorSpec},
    rank_file::{Extent, NewRankFile, PieceEntry, RankFile, Values, WriteError},
    read::{Checkpoint, CheckpointError},
};

/// Why a checkpoint was not cut anew. What was visible before still is.
#[derive(Debug, thiserror::Error)]
pub enum ReshardError {
    /// No ranks.
    #[error("a world of 0 ranks holds nothing; ask for at least 1")]
    World,
    /// The target has a checkpoint of this step.
    #[error(
        "{path} is there already; name another directory, or the checkpoint's own to replace it"
    )]
    Occupied {
        /// Its folder.
        path: PathBuf,
    },
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A rank's file was not written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The files were not made visible.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Writes `checkpoint` below the directory `out` as `world` ranks would, and the folder [`SOURCE`] beside it. Below its own
/// directory it takes the place of the old one, as the next generation. `watch` hears of the bytes of values as they are read.
///
/// # Errors
/// Rank files that are part of no checkpoint may stay; the next commit of the step or [`crate::retain`] removes them.
pub fn reshard(
    checkpoint: &Checkpoint,
    out: &Path,
    world: u32,
    watch: Watch<'_>,
) -> Result<CommittedCheckpoint, ReshardError> {
    reshard_in(checkpoint, &Folder::open(out)?, world, watch)
}

/// [`reshard`] to a folder of any store.
pub fn reshard_in(
    checkpoint: &Checkpoint,
    out: &Folder,
    world: u32,
    watch: Watch<'_>,
) -> Result<CommittedCheckpoint, ReshardError> {
    if world == 0 {
        return Err(ReshardError::World);
    }
    let manifest = checkpoint.manifest();
    let step = manifest.state.step;
    let mut generation = manifest.generation;
    if let Some(path) = visible_in(out, step)? {
        if !same(&path, checkpoint.path())? {
            return Err(ReshardError::Occupied { path });
        }
        // File names carry the generation: the old files are read until the new manifest is in place.
        generation += 1;
    } else {
        copy_source(checkpoint.path(), out)?;
    }
    let kinds: Vec<Kind> = Kind::ALL
        .into_iter()
        .filter(|&kind| checkpoint.has(kind))
        .collect();
    let mut ranks: Vec<RankFile> = Vec::with_capacity(world as usize);
    for rank in 0..world {
        let extents = share(&manifest.tensors, &kinds, rank, world);
        let values = Streamed {
            checkpoint,
            buffer: Vec::new(),
            watch,
        };
        let file = NewRankFile {
            generation,
            rank,
            world,
            state: manifest.state,
            tensors: &manifest.tensors,
            extents,
        };
        ranks.push(file.write(out, values)?);
    }
    Ok(commit_in(out, &ranks, &manifest.info)?)
}

/// What rank `rank` of `world` holds: of all tensors one behind the other, an equal share, in each of its kinds.
fn share(tensors: &[TensorSpec], kinds: &[Kind], rank: u32, world: u32) -> Vec<Extent> {
    let elements = |spec: &TensorSpec| {
        spec.elements()
            .expect("an open checkpoint's shapes are checked")
    };
    let total: usize = tensors.iter().map(elements).sum();
    let cut = |rank: u32| (total as u128 * u128::from(rank) / u128::from(world)) as usize;
    let own = cut(rank)..cut(rank + 1);
    let mut extents = Vec::new();
    for &kind in kinds {
        let mut first = 0;
        for spec in tensors {
            let Range { start, end } = own.start.max(first)..own.end.min(first + elements(spec));
            if start < end {
                extents.push(Extent {
                    tensor: spec.name.clone(),
                    kind,
                    start: start - first,
                    len: end - start,
                });
            }
            first += elements(spec);
        }
    }
    extents
}

/// Values that are read as they are written.
struct Streamed<'a> {
    checkpoint: &'a Checkpoint,
    buffer: Vec<f32>,
    watch: Watch<'a>,
}

impl Values for Streamed<'_> {
    type Error = ReshardError;

    fn run(
        &mut self,
        _: usize,
        piece: &PieceEntry,
        range: Range<usize>,
    ) -> Result<&[f32], ReshardError> {
        self.buffer.resize(range.len(), 0.0);
        let start = piece.start + range.start;
        let out = &mut self.buffer;
        self.checkpoint
            .read(&piece.tensor, piece.kind, start, out)?;
        (self.watch)(4 * range.len() as u64);
        Ok(&self.buffer)
    }
}

/// Whether two paths are one folder.
fn same(one: &Path, other: &Path) -> Result<bool, FileError> {
    let real = |path: &Path| {
        if is_remote(path) {
            return Ok(path.to_owned());
        }
        fs::canonicalize(path).map_err(at("resolve", path))
    };
    Ok(real(one)? == real(other)?)
}

/// Copies what exports need beside the checkpoints, where it is; files of that name stay as they are.
fn copy_source(checkpoint: &Path, out: &Folder) -> Result<(), FileError> {
    let beside = checkpoint.parent().unwrap_or(Path::new("."));
    let (from, to) = (Folder::open(&beside.join(SOURCE))?, out.below(SOURCE));
    for name in from.list()? {
        if to.object(&name)?.is_some() {
            continue;
        }
        if let Some(content) = from.read(&name)? {
            let _ = to.put(&name, &content, Condition::Always)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_seamless_and_equal_to_one_element() {
        let spec = |(index, shape): (usize, &[usize])| TensorSpec {
            name: index.to_string(),
            shape: shape.to_vec(),
        };
        let shapes: [&[usize]; 5] = [&[5, 4], &[], &[0, 3], &[7], &[2, 1, 3]];
        let tensors: Vec<TensorSpec> = shapes.into_iter().enumerate().map(spec).collect();
        for world in 1..40 {
            let mut ends = vec![0; tensors.len()];
            let mut sizes = Vec::new();
            for rank in 0..world {
                let extents = share(&tensors, &[Kind::Weight], rank, world);
                sizes.push(extents.iter().map(|it| it.len).sum::<usize>());
                for extent in extents {
                    let end = &mut ends[extent.tensor.parse::<usize>().expect("a number")];
                    assert_eq!(extent.start, *end, "{} of {world}", extent.tensor);
                    *end += extent.len;
                }
            }
            let elements: Vec<usize> = tensors.iter().filter_map(TensorSpec::elements).collect();
            assert_eq!(ends, elements);
            let (least, most) = (sizes.iter().min(), sizes.iter().max());
            assert!(
                most.zip(least)
                    .is_some_and(|(most, least)| most - least <= 1),
                "{sizes:?}"
            );
        }
    }
}
