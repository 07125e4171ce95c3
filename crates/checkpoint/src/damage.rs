//! Comparing a file with its entry in the manifest, and saying which tensor suffers when it differs.

use std::{
    fmt::{self, Write},
    ops::Range,
};

use serde::Serialize;
use storage::{FileError, Folder, Object};

use crate::{
    CHUNK_BYTES,
    digest::{Digests, Watch},
    rank_file::{FileEntry, PieceEntry},
};

/// How many damages an error lists before it only counts.
const LISTED_MAX: usize = 8;

/// Bytes that are not what was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The file, within the checkpoint's folder.
    pub file: String,
    /// The piece that the bytes belong to, as `model/NAME@START`; none where it is the file's header or the whole file.
    pub tensor: Option<String>,
    /// First byte of the region that does not hold.
    pub offset: u64,
    /// Size of the region.
    pub bytes: u64,
    /// What is wrong.
    pub reason: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ", self.file)?;
        if let Some(tensor) = &self.tensor {
            write!(formatter, "in {tensor} ")?;
        }
        let end = self.offset + self.bytes;
        write!(
            formatter,
            "at bytes {}..{end}: {}",
            self.offset, self.reason
        )
    }
}

/// The first of `damages` as a sentence, and how many there are besides.
pub(crate) fn listed(damages: &[Damage]) -> String {
    let mut text = String::new();
    for (index, damage) in damages.iter().take(LISTED_MAX).enumerate() {
        let separator = if index == 0 { "" } else { "; " };
        write!(text, "{separator}{damage}").expect("writing to a string succeeds");
    }
    if damages.len() > LISTED_MAX {
        let more = damages.len() - LISTED_MAX;
        write!(text, "; and {more} more").expect("writing to a string succeeds");
    }
    text
}

/// Opens a file of the manifest if it is there and has its size.
pub(crate) fn open(
    folder: &Folder,
    entry: &FileEntry,
) -> Result<Result<Box<dyn Object>, Damage>, FileError> {
    let Some(file) = folder.object(&entry.name)? else {
        return Ok(Err(whole(entry, "the file is missing".into())));
    };
    let found = file.bytes();
    if found == entry.bytes {
        return Ok(Ok(file));
    }
    let expected = entry.bytes;
    let offset = found.min(expected);
    let cut = entry.pieces.iter().find(|piece| offset < piece.end());
    Ok(Err(Damage {
        file: entry.name.clone(),
        tensor: cut
            .filter(|piece| piece.offset <= offset)
            .map(PieceEntry::name),
        offset,
        bytes: found.max(expected) - offset,
        reason: format!("the file has {found} bytes, the manifest says {expected}"),
    }))
}

/// Reads all of a file and compares it with its entry.
pub(crate) fn examine(
    folder: &Folder,
    entry: &FileEntry,
    watch: Watch<'_>,
) -> Result<Vec<Damage>, FileError> {
    let file = match open(folder, entry)? {
        Ok(file) => file,
        Err(damage) => return Ok(vec![damage]),
    };
    let scan = |range, sink: &mut dyn FnMut(&[u8])| file.scan(range, sink);
    let starts: Vec<u64> = entry.pieces.iter().map(|piece| piece.offset).collect();
    let found = Digests::of(entry.bytes, &starts, scan, watch)?;
    let chunks = found.chunks.iter().zip(&entry.chunks).enumerate();
    let bad = chunks.filter(|(_, (found, expected))| found != expected);
    let bad: Vec<u64> = bad.map(|(chunk, _)| chunk as u64).collect();
    let mut damages = Vec::new();
    for chunk in bad {
        damages.extend(locate(&*file, entry, chunk)?);
    }
    // Bytes that are as written, under a checksum that was not: a read of this piece would be refused.
    for (piece, _) in
        (entry.pieces.iter().zip(&found.parts)).filter(|(it, found)| it.crc32c != **found)
    {
        let bytes = piece.end() - piece.offset;
        let known = |damage: &Damage| damage.tensor.as_ref().is_some_and(|it| *it == piece.name());
        if !damages.iter().any(known) {
            damages.push(Damage {
                file: entry.name.clone(),
                tensor: Some(piece.name()),
                offset: piece.offset,
                bytes,
                reason: "the checksum does not hold".into(),
            });
        }
    }
    if damages.is_empty() && found.blake3 != entry.blake3 {
        let reason = format!("BLAKE3 is {}, not {}", found.blake3, entry.blake3);
        damages.push(whole(entry, reason));
    }
    Ok(damages)
}

/// The bytes of a chunk.
pub(crate) fn chunk_range(entry: &FileEntry, chunk: u64) -> Range<u64> {
    let start = chunk * CHUNK_BYTES;
    start..entry.bytes.min(start + CHUNK_BYTES)
}

/// What in a chunk does not hold: its pieces whose own checksum fails, or else the header.
pub(crate) fn locate(
    file: &dyn Object,
    entry: &FileEntry,
    chunk: u64,
) -> Result<Vec<Damage>, FileError> {
    let range = chunk_range(entry, chunk);
    let damage = |tensor: Option<String>, part: Range<u64>, reason: &str| Damage {
        file: entry.name.clone(),
        tensor,
        offset: part.start,
        bytes: part.end - part.start,
        reason: reason.to_owned(),
    };
    let mut damages = Vec::new();
    for piece in &entry.pieces {
        let part = range.start.max(piece.offset)..range.end.min(piece.end());
        if !part.is_empty() && checksum(file, piece)? != piece.crc32c {
            damages.push(damage(
                Some(piece.name()),
                part,
                "the checksum does not hold",
            ));
        }
    }
    if damages.is_empty() {
        let header = entry.pieces.first().map_or(entry.bytes, |it| it.offset);
        let reason = if range.start < header {
            "the checksum of the file's header does not hold"
        } else {
            "the checksum does not hold"
        };
        let end = range.end.min(header.max(range.start + 1));
        damages.push(damage(None, range.start..end, reason));
    }
    Ok(damages)
}

fn checksum(file: &dyn Object, piece: &PieceEntry) -> Result<u32, FileError> {
    let mut checksum = 0;
    file.scan(piece.offset..piece.end(), &mut |bytes| {
        checksum = crc32c::crc32c_append(checksum, bytes);
    })?;
    Ok(checksum)
}

fn whole(entry: &FileEntry, reason: String) -> Damage {
    Damage {
        file: entry.name.clone(),
        tensor: None,
        offset: 0,
        bytes: entry.bytes,
        reason,
    }
}
