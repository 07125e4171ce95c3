//! A committed checkpoint: its manifest, a check of all its bytes, and ranged reads that check the bytes they use. Any world
//! size reads what any other wrote, because a read asks for elements of a tensor and not for a rank's file.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use storage::{FileError, Folder, Object};

use crate::{
    CHUNK_BYTES,
    coverage::{Coverage, Located},
    damage::{self, Damage, listed},
    digest::{BLOCK_BYTES, Watch},
    folder::MANIFEST,
    manifest::{Manifest, ManifestError},
    parts::Kind,
    rank_file::{FileEntry, PieceEntry},
    retention::PIN,
};

/// A checkpoint whose manifest holds. Its files are checked as they are read.
#[derive(Debug)]
pub struct Checkpoint {
    folder: Folder,
    path: PathBuf,
    manifest: Manifest,
    coverage: Coverage,
    /// Whether small reads cost little, as on a disk; else every request fetches a chunk.
    direct: bool,
    /// The chunk read last: small tensors that lie side by side share one.
    chunk: Mutex<Option<Chunk>>,
}

#[derive(Debug)]
struct Chunk {
    file: usize,
    opened: Box<dyn Object>,
    index: u64,
    bytes: Vec<u8>,
}

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// No manifest: no checkpoint, or one whose writing was not completed.
    #[error(
        "{path} is not a complete checkpoint: it has no {MANIFEST}; name a folder such as step-00000100 of a finished save"
    )]
    Incomplete {
        /// The folder.
        path: PathBuf,
    },
    /// The manifest is there and does not hold.
    #[error("{path}: {source}; use another checkpoint")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ManifestError,
    },
    /// The folder's name and its content are of different steps.
    #[error("{path} holds step {step}; it was renamed or swapped with another")]
    Step {
        /// The folder.
        path: PathBuf,
        /// The step inside.
        step: u64,
    },
    /// Files that are not what was written.
    #[error("{path} is damaged: {}; use another checkpoint", listed(damages))]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// Where.
        damages: Vec<Damage>,
    },
    /// A question about elements that the model does not have.
    #[error("{path} has no elements {start}..{end} of `{tensor}`: {reason}")]
    Range {
        /// The folder.
        path: PathBuf,
        /// The tensor asked for.
        tensor: String,
        /// First element asked for.
        start: usize,
        /// First element no longer asked for.
        end: usize,
        /// Whether it is the tensor that is missing, or that it is smaller.
        reason: String,
    },
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
}

/// What [`Checkpoint::verify`] has read.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Verified {
    /// Rank files.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Other files in the folder. They are no part of the checkpoint and never read; a save cut short leaves such.
    pub unlisted: Vec<String>,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `path`, a path or a URL as [`Folder::open`] takes them, and checks its manifest.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_in(&Folder::open(path)?)
    }

    /// [`Checkpoint::open`] of a folder of any store.
    pub fn open_in(folder: &Folder) -> Result<Self, CheckpointError> {
        let path = folder.path();
        let Some(bytes) = folder.read(MANIFEST)? else {
            return Err(CheckpointError::Incomplete { path });
        };
        let (manifest, coverage) =
            Manifest::decode(&bytes).map_err(|source| CheckpointError::Manifest {
                path: path.join(MANIFEST),
                source,
            })?;
        Ok(Self {
            folder: folder.clone(),
            direct: !storage::is_remote(&path),
            path,
            manifest,
            coverage,
            chunk: Mutex::new(None),
        })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its manifest says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Reads every byte of every file and compares it with the manifest.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] with all that differs, by file, tensor and offset.
    pub fn verify(&self) -> Result<Verified, CheckpointError> {
        self.verify_watched(&|_| ())
    }

    /// [`Checkpoint::verify`]; `watch` hears of every byte once.
    pub fn verify_watched(&self, watch: Watch<'_>) -> Result<Verified, CheckpointError> {
        let mut damages = Vec::new();
        for entry in &self.manifest.files {
            damages.extend(damage::examine(&self.folder, entry, watch)?);
        }
        if !damages.is_empty() {
            return Err(self.damaged(damages));
        }
        Ok(Verified {
            files: self.manifest.files.len(),
            bytes: self.bytes(),
            unlisted: self.unlisted()?,
        })
    }

    /// Fills `out` with the elements of `tensor` from `start` on, whoever wrote them, and checks the bytes it uses. On disks
    /// whole pieces and whole chunks go straight into `out`; several threads may read then.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] or [`CheckpointError::Range`]; `out` may then be filled in part.
    pub fn read(
        &self,
        tensor: &str,
        kind: Kind,
        start: usize,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let end = start.saturating_add(out.len());
        let range = |reason| CheckpointError::Range {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
            start,
            end,
            reason,
        };
        let (Some(pieces), Some(elements)) = (
            self.coverage.pieces(tensor, kind),
            self.coverage.elements(tensor),
        ) else {
            return Err(range("there is no such tensor".into()));
        };
        if end > elements {
            return Err(range(format!("the tensor has {elements}")));
        }
        if pieces.is_empty() && elements > 0 {
            return Err(range(format!("no {kind} was saved")));
        }
        let first = pieces.partition_point(|piece| piece.end() <= start);
        for piece in &pieces[first..] {
            let (from, to) = (piece.start.max(start), piece.end().min(end));
            if from >= to {
                break;
            }
            let offset = piece.offset + 4 * (from - piece.start) as u64;
            let out = &mut out[from - start..to - start];
            if self.direct && out.len() == piece.len {
                self.read_whole(piece, out)?;
            } else {
                self.read_part(piece, offset, out)?;
            }
        }
        Ok(())
    }

    /// Whether it has values of this kind: an optimizer without a moment writes none of it.
    pub fn has(&self, kind: Kind) -> bool {
        let mut pieces = self.manifest.files.iter().flat_map(|it| &it.pieces);
        kind == Kind::Weight || pieces.any(|piece| piece.kind == kind)
    }

    /// Sum of the sizes of its rank files.
    pub fn bytes(&self) -> u64 {
        self.manifest.files.iter().map(|entry| entry.bytes).sum()
    }

    /// Whether all files are there with their sizes: what can be known without reading them.
    pub(crate) fn has_files(&self) -> Result<bool, FileError> {
        for entry in &self.manifest.files {
            if damage::open(&self.folder, entry)?.is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Names in the folder that the manifest does not list.
    pub(crate) fn unlisted(&self) -> Result<Vec<String>, FileError> {
        let mut names = self.folder.list()?;
        let files = &self.manifest.files;
        names.retain(|name| {
            name != MANIFEST && name != PIN && !files.iter().any(|entry| entry.name == *name)
        });
        Ok(names)
    }

    /// Reads all of a piece, which has a checksum of its own.
    fn read_whole(&self, piece: &Located, out: &mut [f32]) -> Result<(), CheckpointError> {
        let entry = &self.manifest.files[piece.file];
        let file = self.open_file(entry)?;
        if Self::read_checked(&*file, piece.offset, out, piece.crc32c)? {
            return Ok(());
        }
        let name = entry.pieces.iter().find(|it| it.offset == piece.offset);
        let bytes = 4 * piece.len as u64;
        let reason = "the checksum does not hold".to_owned();
        Err(self.damaged(vec![Damage {
            file: entry.name.clone(),
            tensor: name.map(PieceEntry::name),
            offset: piece.offset,
            bytes,
            reason,
        }]))
    }

    /// Reads values that lie side by side in one file, from byte `offset` on.
    fn read_part(
        &self,
        piece: &Located,
        mut offset: u64,
        mut out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let entry = &self.manifest.files[piece.file];
        while !out.is_empty() {
            let index = offset / CHUNK_BYTES;
            let range = damage::chunk_range(entry, index);
            let count = (range.end - range.start) as usize / 4;
            if self.direct && offset == range.start && count <= out.len() {
                let (now, later) = out.split_at_mut(count);
                let file = self.open_file(entry)?;
                let checksum = entry.chunks[index as usize];
                if !Self::read_checked(&*file, offset, now, checksum)? {
                    return Err(self.located(&*file, entry, index)?);
                }
                (out, offset) = (later, range.end);
                continue;
            }
            let mut cached = self.chunk.lock().unwrap_or_else(PoisonError::into_inner);
            let chunk = match cached.take() {
                Some(chunk) if chunk.file == piece.file && chunk.index == index => chunk,
                other => self.load(piece.file, index, other)?,
            };
            // Offsets of values and sizes of chunks are multiples of 4: no value straddles two chunks.
            let (elements, _) = chunk.bytes[(offset % CHUNK_BYTES) as usize..].as_chunks::<4>();
            let count = elements.len().min(out.len());
            let (now, later) = out.split_at_mut(count);
            for (value, &bytes) in now.iter_mut().zip(elements) {
                *value = f32::from_le_bytes(bytes);
            }
            out = later;
            offset += 4 * count as u64;
            *cached = Some(chunk);
        }
        Ok(())
    }

    /// Reads and checks a chunk, through the file and into the memory of one that is no longer needed.
    fn load(
        &self,
        file: usize,
        index: u64,
        reused: Option<Chunk>,
    ) -> Result<Chunk, CheckpointError> {
        let entry = &self.manifest.files[file];
        let (opened, mut bytes) = match reused {
            Some(chunk) if chunk.file == file => (Some(chunk.opened), chunk.bytes),
            Some(chunk) => (None, chunk.bytes),
            None => (None, Vec::new()),
        };
        let opened = match opened {
            Some(opened) => opened,
            None => self.open_file(entry)?,
        };
        let range = damage::chunk_range(entry, index);
        bytes.resize((range.end - range.start) as usize, 0);
        opened.read_at(range.start, &mut bytes)?;
        if crc32c::crc32c(&bytes) != entry.chunks[index as usize] {
            return Err(self.located(&*opened, entry, index)?);
        }
        Ok(Chunk {
            file,
            opened,
            index,
            bytes,
        })
    }

    /// Fills `out` with what lies at byte `offset`; whether these bytes have that checksum.
    fn read_checked(
        file: &dyn Object,
        mut offset: u64,
        out: &mut [f32],
        checksum: u32,
    ) -> Result<bool, CheckpointError> {
        let mut found = 0;
        for values in out.chunks_mut(BLOCK_BYTES / 4) {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
            file.read_at(offset, bytes)?;
            found = crc32c::crc32c_append(found, bytes);
            offset += bytes.len() as u64;
            if cfg!(target_endian = "big") {
                for value in values {
                    *value = f32::from_bits(u32::from_le(value.to_bits()));
                }
            }
        }
        Ok(found == checksum)
    }

    /// What does not hold in a chunk whose checksum does not.
    fn located(
        &self,
        file: &dyn Object,
        entry: &FileEntry,
        chunk: u64,
    ) -> Result<CheckpointError, CheckpointError> {
        let damages = damage::locate(file, entry, chunk)?;
        Ok(self.damaged(damages))
    }

    fn open_file(&self, entry: &FileEntry) -> Result<Box<dyn Object>, CheckpointError> {
        damage::open(&self.folder, entry)?.map_err(|damage| self.damaged(vec![damage]))
    }

    fn damaged(&self, damages: Vec<Damage>) -> CheckpointError {
        CheckpointError::Damaged {
            path: self.path.clone(),
            damages,
        }
    }
}
