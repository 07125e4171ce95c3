//! Whether pieces of all files together are every tensor exactly once, and where each element lies. Pure.

use std::collections::HashMap;

use crate::{
    parts::{Kind, TensorSpec},
    rank_file::FileEntry,
};

/// Where a run of elements lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    pub start: usize,
    pub len: usize,
    /// Index into the files.
    pub file: usize,
    /// Byte of the first element in that file.
    pub offset: u64,
    /// Of all its bytes.
    pub crc32c: u32,
}

impl Located {
    /// First element after it.
    pub fn end(&self) -> usize {
        self.start + self.len
    }
}

/// Of each tensor and kind the pieces in order, without gap or overlap; of a moment that was not written, none.
#[derive(Debug)]
pub(crate) struct Coverage {
    tensors: HashMap<String, usize>,
    pieces: Vec<[Vec<Located>; 3]>,
}

/// Why files are not a whole checkpoint.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoverageError {
    /// Two tensors have one name.
    #[error("tensor `{tensor}` is listed twice")]
    Twice {
        /// Its name.
        tensor: String,
    },
    /// A shape that no memory can hold.
    #[error("the shape {shape:?} of tensor `{tensor}` is impossible")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A piece of no tensor, or outside its tensor, or not where the file's pieces leave room for it.
    #[error("{file}: piece {piece} {reason}")]
    Piece {
        /// The file.
        file: String,
        /// The piece.
        piece: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The size or number of chunks of a file does not fit its pieces.
    #[error("{file}: its pieces end at byte {end}, but it has {bytes} bytes in {chunks} chunks")]
    Size {
        /// The file.
        file: String,
        /// Where its last piece ends.
        end: u64,
        /// Its size.
        bytes: u64,
        /// Its number of checksums.
        chunks: usize,
    },
    /// Elements that no file holds.
    #[error("{kind} of `{tensor}`: no rank wrote elements {from}..{to}")]
    Gap {
        /// The tensor.
        tensor: String,
        /// Which of its values.
        kind: Kind,
        /// First missing element.
        from: usize,
        /// First one that is there again, or the tensor's end.
        to: usize,
    },
    /// Elements that are there twice.
    #[error("{kind} of `{tensor}`: {first} and {second} both hold element {at}")]
    Overlap {
        /// The tensor.
        tensor: String,
        /// Which of its values.
        kind: Kind,
        /// First such element.
        at: usize,
        /// A file that holds it.
        first: String,
        /// Another one, or the same.
        second: String,
    },
}

impl Coverage {
    pub fn of(tensors: &[TensorSpec], files: &[FileEntry]) -> Result<Self, CoverageError> {
        let mut coverage = Self {
            tensors: HashMap::with_capacity(tensors.len()),
            pieces: vec![Default::default(); tensors.len()],
        };
        let mut lens = Vec::with_capacity(tensors.len());
        for (index, spec) in tensors.iter().enumerate() {
            let tensor = spec.name.clone();
            // An eighth of what can be counted, so that bytes and sums of a start and a length cannot overflow either.
            let Some(elements) = spec.elements().filter(|&len| len <= usize::MAX / 8) else {
                let shape = spec.shape.clone();
                return Err(CoverageError::Shape { tensor, shape });
            };
            lens.push(elements);
            if coverage.tensors.insert(tensor.clone(), index).is_some() {
                return Err(CoverageError::Twice { tensor });
            }
        }
        for (index, file) in files.iter().enumerate() {
            coverage.place(index, file, &lens)?;
        }
        // An update rule without a moment writes none of it; then no tensor has it.
        let kinds = Kind::ALL.into_iter().filter(|&kind| {
            let absent = |pieces: &[Vec<Located>; 3]| pieces[kind as usize].is_empty();
            kind == Kind::Weight || !coverage.pieces.iter().all(absent)
        });
        let kinds: Vec<Kind> = kinds.collect();
        for (index, spec) in tensors.iter().enumerate() {
            for &kind in &kinds {
                let pieces = &mut coverage.pieces[index][kind as usize];
                pieces.sort_by_key(|piece| piece.start);
                seamless(&spec.name, kind, lens[index], pieces, files)?;
            }
        }
        Ok(coverage)
    }

    /// The pieces of a tensor, in order; nothing if there is no such tensor.
    pub fn pieces(&self, tensor: &str, kind: Kind) -> Option<&[Located]> {
        let index = *self.tensors.get(tensor)?;
        Some(&self.pieces[index][kind as usize])
    }

    /// Number of elements of a tensor; nothing if there is no such tensor.
    pub fn elements(&self, tensor: &str) -> Option<usize> {
        let pieces = self.pieces(tensor, Kind::Weight)?;
        Some(pieces.last().map_or(0, Located::end))
    }

    /// Takes in one file's pieces, which follow each other to the end of the file.
    fn place(
        &mut self,
        index: usize,
        file: &FileEntry,
        lens: &[usize],
    ) -> Result<(), CoverageError> {
        let mut end = file.pieces.first().map_or(file.bytes, |first| first.offset);
        for piece in &file.pieces {
            let refused = |reason| CoverageError::Piece {
                file: file.name.clone(),
                piece: piece.name(),
                reason,
            };
            let Some(&tensor) = self.tensors.get(&piece.tensor) else {
                return Err(refused("belongs to none of the tensors"));
            };
            if piece.len == 0
                || piece.start > lens[tensor]
                || piece.len > lens[tensor] - piece.start
            {
                return Err(refused("is empty or exceeds its tensor"));
            }
            // Before any sum: a manifest can say any offset.
            if piece.len as u64 > file.bytes.saturating_sub(piece.offset) / 4 {
                return Err(refused("ends behind its file"));
            }
            if piece.offset % 4 != 0 {
                return Err(refused("does not begin at a multiple of 4 bytes"));
            }
            if piece.offset != end {
                return Err(refused("does not follow the piece before it"));
            }
            end = piece.end();
            self.pieces[tensor][piece.kind as usize].push(Located {
                start: piece.start,
                len: piece.len,
                file: index,
                offset: piece.offset,
                crc32c: piece.crc32c,
            });
        }
        let chunks = file.bytes.div_ceil(crate::CHUNK_BYTES);
        if end != file.bytes || chunks != file.chunks.len() as u64 {
            return Err(CoverageError::Size {
                file: file.name.clone(),
                end,
                bytes: file.bytes,
                chunks: file.chunks.len(),
            });
        }
        Ok(())
    }
}

/// Checks that sorted `pieces` are the elements `0..len`, each once.
fn seamless(
    tensor: &str,
    kind: Kind,
    len: usize,
    pieces: &[Located],
    files: &[FileEntry],
) -> Result<(), CoverageError> {
    let gap = |from, to| CoverageError::Gap {
        tensor: tensor.to_owned(),
        kind,
        from,
        to,
    };
    let mut end = 0;
    let mut last = 0;
    for piece in pieces {
        if piece.start > end {
            return Err(gap(end, piece.start));
        }
        if piece.start < end {
            return Err(CoverageError::Overlap {
                tensor: tensor.to_owned(),
                kind,
                at: piece.start,
                first: files[last].name.clone(),
                second: files[piece.file].name.clone(),
            });
        }
        end = piece.end();
        last = piece.file;
    }
    if end < len {
        return Err(gap(end, len));
    }
    Ok(())
}
