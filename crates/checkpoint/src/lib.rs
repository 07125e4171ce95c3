//! Sharded training checkpoints: format, commit, verification, reading and cutting anew at any world size, comparison, retention,
//! export. Needs no ML stack.
//!
//! ```text
//! every rank                     coordinator                         whoever resumes
//! write_rank ──RankFile (JSON)──► commit ──manifest.json──►  newest ► Checkpoint::read(tensor, kind, range)
//!                                   then retain                       export ► a Hugging Face model directory
//!                                                                     reshard ► another world size, by the same commit
//! ```
//!
//! # What is promised
//! - **C1** A checkpoint is visible only when its manifest is in place, and the manifest is put there only after every file
//!   was read back. A crash anywhere leaves the previous checkpoint; so does saving a step a second time, because file names
//!   carry the generation and the new manifest replaces the old one at once. [`retain`] removes older checkpoints only
//!   after it has read the newest one whole, and spares the last so many, those of every so many steps, the best of those that
//!   are there by an order that it is given, and pinned ones. It removes a manifest before the files.
//! - **C2** Every byte is covered: of a rank file by crc32c of its chunk and of its piece and by BLAKE3 of the file, of the
//!   manifest by its own BLAKE3 and by comparison with fixed bytes. What differs is named by file, tensor and offset, before
//!   any value of it is handed out.
//! - **C3** A read asks for elements of a tensor and not for a rank, so any world size reads what any other wrote.
//! - Reading, verifying, exporting, comparing and cutting anew take a few MiB, however large the checkpoint is.
//!
//! # Layout
//! ```text
//! DIR/step-00000100/                                        step, at least 8 digits
//!     rank-00000-of-00002.generation-3.safetensors          one per rank
//!     rank-00001-of-00002.generation-3.safetensors
//!     manifest.json                                         last
//!     pinned                                                where somebody pinned it: why, for people
//! ```
//! Other files in the folder are never read. `*.tmp` and rank files that the manifest does not list are remains of saves that
//! were cut short; the next commit of the step by the same or a later generation, or [`retain`], removes them.
//!
//! # A rank file, byte by byte
//! ```text
//! 0    8   length n of the header, u64 little endian, a multiple of 8
//! 8    n   header: JSON, padded with spaces at the end
//!            {"__metadata__": {"format": "caldpo-checkpoint", "step": "100", "generation": "3", "rank": "0", "world": "2"},
//!             "model/NAME@START":  {"dtype": "F32", "shape": [LEN], "data_offsets": [BEGIN, END]},   the weight
//!             "first/NAME@START":  ..                                                                 its first moment
//!             "second/NAME@START": ..}                                                                its second moment
//!          An update rule without one of the moments (RMSprop has no first) leaves all pieces of it out.
//! 8+n      data: the pieces in the header's order without gaps, f32 little endian
//! ```
//! NAME is the tensor's Hugging Face name, START the piece's first element in the tensor's row-major order, LEN its number of
//! elements. It is a safetensors file like any other; only the manifest says whether it belongs to a checkpoint.
//!
//! # The manifest, byte by byte
//! ```text
//! 0    11  {"blake3":"
//! 11   64  BLAKE3 of the content, hexadecimal
//! 75   14  ","manifest":␊
//! 89   m   content: JSON on one line
//!            {"version": 1,
//!             "state": {"step", "epoch", "updates", "seed", and "shift": {"mean", "count"} where an objective keeps one},
//!             "generation", "world",
//!             "info": {"model_digest", "tokenizer_digest", "data_digest", "run_digest", "tool_version"},
//!             "tensors": [{"name", "shape"}, ..],
//!             "files": [{"rank", "name", "bytes", "blake3", "chunks": [crc32c of each 8 MiB, ..],
//!                        "pieces": [{"tensor", "kind": "weight" | "first_moment" | "second_moment",
//!                                    "start", "len", "offset", "crc32c"}, ..]}, ..]}
//! 89+m 3   ␊}␊
//! ```
//! The envelope never changes; `version` counts changes of the content and of the rank files.
//!
//! # Where it lies
//! Every path may be a URL (`s3://bucket/prefix`, `gs://`, `az://`; [`storage::open`]), where the program is built with the
//! feature `object-store`; the functions whose names end in `_in` take a folder of any [`storage::Store`]. The manifest is put
//! in place on the condition that nobody has put another one there since it was looked at, so that the coordinator of a dead
//! generation cannot replace a later one's. In an object store rank files are sent in parts that become an object at once;
//! an export still goes to a local directory.
//!
//! Deliberately absent: a thread that writes in the background (the trainer's), and any opinion on which run a
//! checkpoint may resume (the digests are compared by whoever resumes).

mod commit;
mod coverage;
mod damage;
mod diff;
mod digest;
mod export;
mod folder;
mod history;
mod manifest;
mod parts;
mod rank_file;
mod read;
mod reshard;
mod retention;
mod spares;

pub use commit::{CommitError, CommittedCheckpoint, commit, commit_in};
pub use coverage::CoverageError;
pub use damage::Damage;
pub use diff::{Compared, Diff, DiffError, Difference, Shapes, Side, Total, diff};
pub use digest::{CHUNK_BYTES, Watch};
pub use export::{
    ExportDtype, ExportError, ExportSummary, Exported, SHARD_BYTES_MAX, SOURCE, WeightDtype,
    export, export_adapter, export_watched, exported, fetch_source, has_weights, is_adapter,
    keep_adapter, keep_source,
};
pub use folder::MANIFEST;
pub use history::{Newest, newest, newest_in, newest_watched, visible, visible_in};
pub use manifest::{FORMAT_VERSION, Manifest, ManifestError, ManifestInfo};
pub use parts::{Kind, MeanState, Piece, TensorSpec, TrainState};
pub use rank_file::{FileEntry, PieceEntry, RankFile, WriteError, write_rank, write_rank_in};
pub use read::{Checkpoint, CheckpointError, Verified};
pub use reshard::{ReshardError, reshard, reshard_in};
pub use retention::{
    Condition, Fate, PIN, Planned, Retention, apply, pin, pinned, plan, plan_in, retain, retain_in,
    unpin,
};
pub use spares::Spares;
pub use storage::is_remote;
