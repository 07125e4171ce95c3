//! Making a checkpoint visible: check that the ranks' files are one state, read them back, and put the manifest in place.

use std::path::{Path, PathBuf};

use storage::{Condition, FileError, Folder, Put};

use crate::{
    damage::{self, Damage, listed},
    folder::{self, MANIFEST},
    manifest::{FORMAT_VERSION, Manifest, ManifestError, ManifestInfo},
    rank_file::RankFile,
    read::{Checkpoint, CheckpointError},
};

/// How often the manifest is put in place when others do the same: every refusal is another one's success, and who is of an
/// older generation than that gives up.
const TRIES: usize = 8;

/// A checkpoint that was read back and is visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedCheckpoint {
    /// Its step.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
    /// Sum of the sizes of its rank files.
    pub bytes: u64,
}

/// Why no checkpoint was made. What was visible before still is.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Nothing to commit.
    #[error("no rank has written anything")]
    Empty,
    /// A rank is missing or there twice.
    #[error("{count} files of rank {rank} of {world}; one of each rank makes a checkpoint")]
    Rank {
        /// The rank.
        rank: u32,
        /// Number of ranks.
        world: u32,
        /// Number of files it wrote.
        count: usize,
    },
    /// Two ranks wrote different things.
    #[error("rank {rank} wrote {what} {found}, rank {first} {expected}")]
    Disagreement {
        /// The rank.
        rank: u32,
        /// The rank it is compared with.
        first: u32,
        /// In which respect.
        what: &'static str,
        /// What the first one wrote.
        expected: String,
        /// What this one wrote.
        found: String,
    },
    /// The files are not the whole model, or do not fit together.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Files that were read back differ from what the ranks wrote.
    #[error(
        "{path} was not written as the ranks say: {}; the next save may succeed",
        listed(damages)
    )]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// Where.
        damages: Vec<Damage>,
    },
    /// A later generation has committed this step already.
    #[error("{path} was committed by generation {committed}, after generation {generation}")]
    Stale {
        /// The folder.
        path: PathBuf,
        /// The generation that asked.
        generation: u64,
        /// The one that was there.
        committed: u64,
    },
    /// Others commit this step again and again.
    #[error("{path} was committed by others {TRIES} times while this commit tried to be the next")]
    Contended {
        /// The folder.
        path: PathBuf,
    },
    /// The manifest that was written is not the one that is read.
    #[error(transparent)]
    ReadBack(#[from] CheckpointError),
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Makes one checkpoint of what the ranks wrote below `dir`, a path or a URL as [`Folder::open`] takes them, in any order. It
/// is visible when this returns, and not before. Committing the same again changes nothing.
pub fn commit(
    dir: &Path,
    ranks: &[RankFile],
    info: &ManifestInfo,
) -> Result<CommittedCheckpoint, CommitError> {
    commit_in(&Folder::open(dir)?, ranks, info)
}

/// [`commit`] below a folder of any store.
pub fn commit_in(
    dir: &Folder,
    ranks: &[RankFile],
    info: &ManifestInfo,
) -> Result<CommittedCheckpoint, CommitError> {
    let manifest = join(ranks, info)?;
    manifest.check()?;
    let folder = folder::of_step(dir, manifest.state.step);
    let mut damages = Vec::new();
    for entry in &manifest.files {
        damages.extend(damage::examine(&folder, entry, &|_| ())?);
    }
    if !damages.is_empty() {
        let path = folder.path();
        return Err(CommitError::Damaged { path, damages });
    }
    publish(&folder, &manifest)?;
    let checkpoint = Checkpoint::open_in(&folder)?;
    remove_leftovers(&folder, &checkpoint);
    Ok(CommittedCheckpoint {
        step: manifest.state.step,
        bytes: checkpoint.bytes(),
        path: folder.path(),
    })
}

/// Puts the manifest in place, unless a later generation's is there. Who looks and who puts are apart in time, and in an
/// object store no lock keeps the coordinator of a dead generation out: the put holds only for what was looked at.
fn publish(folder: &Folder, manifest: &Manifest) -> Result<(), CommitError> {
    let content = manifest.encode();
    for _ in 0..TRIES {
        let present = folder.read_versioned(MANIFEST)?;
        let condition = match &present {
            None => Condition::Absent,
            Some((bytes, version)) => {
                // One that does not hold is no commit.
                if let Ok((committed, _)) = Manifest::decode(bytes)
                    && committed.generation > manifest.generation
                {
                    return Err(CommitError::Stale {
                        path: folder.path(),
                        generation: manifest.generation,
                        committed: committed.generation,
                    });
                }
                Condition::Unchanged(version)
            }
        };
        if folder.put(MANIFEST, &content, condition)? == Put::Done {
            return Ok(());
        }
    }
    let path = folder.path();
    Err(CommitError::Contended { path })
}

/// One manifest from the ranks' entries, if they agree.
fn join(ranks: &[RankFile], info: &ManifestInfo) -> Result<Manifest, CommitError> {
    let first = ranks.first().ok_or(CommitError::Empty)?;
    for rank in ranks {
        let disagreement = |what, expected: String, found: String| CommitError::Disagreement {
            rank: rank.file.rank,
            first: first.file.rank,
            what,
            expected,
            found,
        };
        if rank.generation != first.generation {
            let (expected, found) = (first.generation.to_string(), rank.generation.to_string());
            return Err(disagreement("generation", expected, found));
        }
        if rank.world != first.world {
            let (expected, found) = (first.world.to_string(), rank.world.to_string());
            return Err(disagreement("for a world of", expected, found));
        }
        if rank.state != first.state {
            let (expected, found) = (format!("{:?}", first.state), format!("{:?}", rank.state));
            return Err(disagreement("the state", expected, found));
        }
        if rank.tensors != first.tensors {
            let (expected, found) = different(first, rank);
            return Err(disagreement("the tensor list", expected, found));
        }
    }
    for rank in 0..first.world {
        let count = ranks.iter().filter(|file| file.file.rank == rank).count();
        if count != 1 {
            let world = first.world;
            return Err(CommitError::Rank { rank, world, count });
        }
    }
    let mut files: Vec<_> = ranks.iter().map(|rank| rank.file.clone()).collect();
    files.sort_by_key(|file| file.rank);
    Ok(Manifest {
        version: FORMAT_VERSION,
        state: first.state,
        generation: first.generation,
        world: first.world,
        info: info.clone(),
        tensors: first.tensors.clone(),
        files,
    })
}

/// The first entries in which two tensor lists differ.
fn different(first: &RankFile, other: &RankFile) -> (String, String) {
    let count = first.tensors.len().max(other.tensors.len());
    let index = (0..count).find(|&index| first.tensors.get(index) != other.tensors.get(index));
    let show = |file: &RankFile| {
        let spec = index.and_then(|index| file.tensors.get(index));
        spec.map_or("without it".to_owned(), |spec| {
            format!("with `{}` {:?}", spec.name, spec.shape)
        })
    };
    (show(first), show(other))
}

/// Removes what dead tries and replaced checkpoints of this step left. The new checkpoint stands without it: an error here
/// costs disk space and nothing else.
fn remove_leftovers(folder: &Folder, checkpoint: &Checkpoint) {
    for name in checkpoint.unlisted().unwrap_or_default() {
        if folder::is_remains(&name, checkpoint.manifest().generation) {
            drop(folder.remove(&name));
        }
    }
}
