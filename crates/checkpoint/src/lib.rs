//! Sharded training checkpoints: format, commit, verification, resharding, export. Needs no ML stack.

mod commit;
mod coverage;
mod damage;
mod digest;
mod folder;
mod history;
mod manifest;
mod parts;
mod rank_file;
mod read;

pub use commit::{CommitError, CommittedCheckpoint, commit};
pub use coverage::CoverageError;
pub use damage::Damage;
pub use digest::CHUNK_BYTES;
pub use folder::MANIFEST;
pub use history::{Newest, newest, retain};
pub use manifest::{FORMAT_VERSION, Manifest, ManifestError, ManifestInfo};
pub use parts::{Kind, Piece, TensorSpec, TrainState};
pub use rank_file::{FileEntry, PieceEntry, RankFile, WriteError, write_rank};
pub use read::{Checkpoint, CheckpointError, Verified};
