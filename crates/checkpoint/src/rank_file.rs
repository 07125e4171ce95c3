//! One rank's part of a checkpoint: a safetensors file, streamed to disk, and the entry that describes it to the
//! coordinator. Not here: whether the parts together are a checkpoint (`commit`).

use std::{
    ops::Range,
    panic,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use storage::{FileError, Folder, Upload};

use crate::{
    digest::{BLOCK_BYTES, Digester, Digests},
    folder,
    parts::{Kind, Piece, TensorSpec, TrainState},
};

/// Elements hashed and written at once: their bytes are still in the core's cache when the system copies them.
const RUN: usize = BLOCK_BYTES / 4;

/// A durable rank file as the manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// The rank that wrote it.
    pub rank: u32,
    /// Its name within the folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of all its bytes, hexadecimal.
    pub blake3: String,
    /// crc32c of each [`crate::CHUNK_BYTES`] of it.
    pub chunks: Vec<u32>,
    /// What it holds, in the order of its bytes, without gaps after the header.
    pub pieces: Vec<PieceEntry>,
}

/// A piece in a rank file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PieceEntry {
    /// The tensor's name.
    pub tensor: String,
    /// Which of its values.
    pub kind: Kind,
    /// First element.
    pub start: usize,
    /// Number of elements, at least one.
    pub len: usize,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// crc32c of its bytes, so that damage is named by tensor.
    pub crc32c: u32,
}

impl PieceEntry {
    /// Its name in the rank file.
    pub fn name(&self) -> String {
        format!("{}/{}@{}", self.kind.prefix(), self.tensor, self.start)
    }

    /// First byte after it.
    pub(crate) fn end(&self) -> u64 {
        self.offset + 4 * self.len as u64
    }
}

/// What a rank tells the coordinator about the file it has written; travels as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankFile {
    /// Number of ranks that write this checkpoint.
    pub world: u32,
    /// The generation they belong to.
    pub generation: u64,
    /// Where the training stands.
    pub state: TrainState,
    /// All tensors of the model, not only the ones in this file.
    pub tensors: Vec<TensorSpec>,
    /// The file.
    pub file: FileEntry,
}

/// Why a rank file was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The caller's pieces do not fit the caller's tensors.
    #[error("piece {piece} {reason}")]
    Piece {
        /// Its name, as it would be in the file.
        piece: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No such rank.
    #[error("rank {rank} in a world of {world}; ranks count from 0")]
    Rank {
        /// The rank.
        rank: u32,
        /// Number of ranks.
        world: u32,
    },
    /// The file could not be written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Writes the pieces of rank `rank` below `dir`, a path or a URL as [`Folder::open`] takes them, and makes them durable. They
/// are part of no checkpoint until [`crate::commit`] has all ranks' entries. Empty pieces are left out. `tensors` are all
/// tensors of the model.
///
/// Each piece is dropped as soon as it is written, so that values which are shared with a training that goes on can be written to
/// there without a copy, in the order of the pieces.
///
/// What an earlier, uncommitted try left under the same name is replaced; a committed checkpoint of the same step by another
/// generation is not touched, because file names carry the generation.
pub fn write_rank<'a, V: AsRef<[f32]> + Clone + Send>(
    dir: &Path,
    generation: u64,
    rank: u32,
    world: u32,
    state: TrainState,
    tensors: &[TensorSpec],
    pieces: impl IntoIterator<Item = Piece<'a, V>>,
) -> Result<RankFile, WriteError> {
    write_rank_in(
        &Folder::open(dir)?,
        generation,
        rank,
        world,
        state,
        tensors,
        pieces,
    )
}

/// [`write_rank`] below a folder of any store.
pub fn write_rank_in<'a, V: AsRef<[f32]> + Clone + Send>(
    dir: &Folder,
    generation: u64,
    rank: u32,
    world: u32,
    state: TrainState,
    tensors: &[TensorSpec],
    pieces: impl IntoIterator<Item = Piece<'a, V>>,
) -> Result<RankFile, WriteError> {
    let (mut extents, mut values) = (Vec::new(), Vec::new());
    for piece in pieces {
        let len = piece.values.as_ref().len();
        if len > 0 {
            extents.push(Extent {
                tensor: piece.tensor.to_owned(),
                kind: piece.kind,
                start: piece.start,
                len,
            });
            values.push(piece.values);
        }
    }
    let file = NewRankFile {
        generation,
        rank,
        world,
        state,
        tensors,
        extents,
    };
    file.write_from_memory(dir, values)
}

/// Elements of a tensor that one file holds side by side.
pub(crate) struct Extent {
    pub tensor: String,
    pub kind: Kind,
    pub start: usize,
    pub len: usize,
}

/// Where the values of extents come from, a run at a time.
pub(crate) trait Values {
    type Error: From<WriteError>;

    /// The values of `range` within `piece`, the file's `index`th.
    fn run(
        &mut self,
        index: usize,
        piece: &PieceEntry,
        range: Range<usize>,
    ) -> Result<&[f32], Self::Error>;
}

/// A rank file that is to be written.
pub(crate) struct NewRankFile<'a> {
    pub generation: u64,
    pub rank: u32,
    pub world: u32,
    pub state: TrainState,
    /// All tensors of the model.
    pub tensors: &'a [TensorSpec],
    /// What goes into the file, in its order; none is empty.
    pub extents: Vec<Extent>,
}

/// A rank file that was begun: its header is there.
struct Begun {
    name: String,
    header: Vec<u8>,
    /// Without checksums.
    entries: Vec<PieceEntry>,
    writing: Box<dyn Upload>,
}

impl NewRankFile<'_> {
    /// Writes it below `dir` and makes it durable.
    pub fn write<V: Values>(mut self, dir: &Folder, mut values: V) -> Result<RankFile, V::Error> {
        let mut file = self.begin(dir)?;
        let mut digester = Digester::default();
        digester.update(&file.header);
        digester.end_part();
        let mut swapped = Vec::new();
        let mut checksums = Vec::with_capacity(file.entries.len());
        for (index, entry) in file.entries.iter().enumerate() {
            for start in (0..entry.len).step_by(RUN) {
                let range = start..entry.len.min(start + RUN);
                let bytes = little_endian(values.run(index, entry, range)?, &mut swapped);
                digester.update(bytes);
                file.writing.append(bytes).map_err(WriteError::from)?;
            }
            checksums.push(digester.end_part());
        }
        Ok(self.finish(file, digester.finish(checksums))?)
    }

    /// The same of values that are all there: another thread makes the digests, which take about as long as the writing. Values are
    /// dropped by whichever of the two is done with them last.
    fn write_from_memory<V: AsRef<[f32]> + Clone + Send>(
        mut self,
        dir: &Folder,
        values: Vec<V>,
    ) -> Result<RankFile, WriteError> {
        let mut file = self.begin(dir)?;
        let (header, failed) = (&file.header, AtomicBool::new(false));
        let to_digest = values.clone();
        let digest = || {
            let mut digester = Digester::default();
            digester.update(header);
            digester.end_part();
            let mut swapped = Vec::new();
            let mut checksums = Vec::with_capacity(to_digest.len());
            for values in to_digest {
                for run in values.as_ref().chunks(RUN) {
                    if failed.load(Relaxed) {
                        break;
                    }
                    digester.update(little_endian(run, &mut swapped));
                }
                checksums.push(digester.end_part());
            }
            digester.finish(checksums)
        };
        let mut swapped = Vec::new();
        let digests = thread::scope(|scope| {
            let digests = scope.spawn(digest);
            let mut write = |values: V| {
                let mut runs = values.as_ref().chunks(RUN);
                runs.try_for_each(|run| file.writing.append(little_endian(run, &mut swapped)))
            };
            let written = values.into_iter().try_for_each(&mut write);
            failed.store(written.is_err(), Relaxed);
            let digests = digests.join();
            written.map(|()| digests.unwrap_or_else(|it| panic::resume_unwind(it)))
        })?;
        self.finish(file, digests)
    }

    fn begin(&mut self, dir: &Folder) -> Result<Begun, WriteError> {
        let (rank, world) = (self.rank, self.world);
        if rank >= world {
            return Err(WriteError::Rank { rank, world });
        }
        let mut entries = place(self.tensors, std::mem::take(&mut self.extents))?;
        let header = header(self.generation, rank, world, self.state, &entries);
        for entry in &mut entries {
            entry.offset += header.len() as u64;
        }
        let name = folder::file_name(rank, world, self.generation);
        let bytes = entries.last().map_or(header.len() as u64, PieceEntry::end);
        let folder = folder::of_step(dir, self.state.step);
        let mut writing = folder.create(&name, bytes)?;
        writing.append(&header)?;
        Ok(Begun {
            name,
            header,
            entries,
            writing,
        })
    }

    /// Makes the file durable; `digests` have its pieces as parts.
    fn finish(self, file: Begun, digests: Digests) -> Result<RankFile, WriteError> {
        file.writing.commit()?;
        let mut pieces = file.entries;
        for (piece, &crc32c) in pieces.iter_mut().zip(&digests.parts) {
            piece.crc32c = crc32c;
        }
        Ok(RankFile {
            world: self.world,
            generation: self.generation,
            state: self.state,
            tensors: self.tensors.to_vec(),
            file: FileEntry {
                rank: self.rank,
                name: file.name,
                bytes: digests.bytes,
                blake3: digests.blake3,
                chunks: digests.chunks,
                pieces,
            },
        })
    }
}

/// The values' bytes as they are in the file; through `swapped` on a machine whose own are others.
fn little_endian<'a>(values: &'a [f32], swapped: &'a mut Vec<u8>) -> &'a [u8] {
    if cfg!(target_endian = "big") {
        encode(values, f32::to_le_bytes, swapped);
        return swapped;
    }
    bytemuck::cast_slice(values)
}

/// Entries with offsets counted from the end of the header, and the extents checked against the tensors.
fn place(tensors: &[TensorSpec], extents: Vec<Extent>) -> Result<Vec<PieceEntry>, WriteError> {
    let mut offset = 0;
    let mut entries: Vec<PieceEntry> = Vec::with_capacity(extents.len());
    for extent in extents {
        let entry = PieceEntry {
            tensor: extent.tensor,
            kind: extent.kind,
            start: extent.start,
            len: extent.len,
            offset,
            crc32c: 0,
        };
        let refused = |reason: String| WriteError::Piece {
            piece: entry.name(),
            reason,
        };
        let spec = tensors
            .iter()
            .find(|spec| spec.name == entry.tensor)
            .ok_or_else(|| refused("belongs to none of the tensors".into()))?;
        let (elements, len) = (spec.elements().unwrap_or(0), entry.len);
        if entry.start > elements || len > elements - entry.start {
            let reason = format!("has {len} elements, but the tensor ends at {elements}");
            return Err(refused(reason));
        }
        offset = entry.end();
        entries.push(entry);
    }
    Ok(entries)
}

/// The length and the JSON header of the safetensors file. `entries` count their offsets from its end.
fn header(
    generation: u64,
    rank: u32,
    world: u32,
    state: TrainState,
    entries: &[PieceEntry],
) -> Vec<u8> {
    let mut header = Map::new();
    // For a file found alone. Nothing reads it back: the manifest is what counts.
    let about = json!({
        "format": "caldpo-checkpoint",
        "step": state.step.to_string(),
        "generation": generation.to_string(),
        "rank": rank.to_string(),
        "world": world.to_string(),
    });
    header.insert("__metadata__".into(), about);
    for entry in entries {
        let tensor = json!({
            "dtype": "F32",
            "shape": [entry.len],
            "data_offsets": [entry.offset, entry.end()],
        });
        header.insert(entry.name(), tensor);
    }
    safetensors_header(header)
}

/// A safetensors header as bytes: its length, then the JSON, padded with spaces so that the data begins at a multiple of 8.
pub(crate) fn safetensors_header(header: Map<String, Value>) -> Vec<u8> {
    let json = Value::Object(header).to_string();
    let length = json.len().next_multiple_of(8);
    let mut bytes = Vec::with_capacity(8 + length);
    bytes.extend_from_slice(&(length as u64).to_le_bytes());
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(8 + length, b' ');
    bytes
}

/// Fills `bytes` with the values' bytes. Written over slots of fixed size, which compiles to a copy; extending by an iterator
/// of bytes is many times slower.
pub(crate) fn encode<const SIZE: usize>(
    values: &[f32],
    mut element: impl FnMut(f32) -> [u8; SIZE],
    bytes: &mut Vec<u8>,
) {
    bytes.resize(SIZE * values.len(), 0);
    let (slots, _) = bytes.as_chunks_mut::<SIZE>();
    for (slot, &value) in slots.iter_mut().zip(values) {
        *slot = element(value);
    }
}
