//! The digests of a file in one pass: crc32c of each chunk and of each part, so that a ranged read can be checked without the
//! rest of the file, and BLAKE3 of the whole, which no accident and no swap gets past. Either as the bytes come, or of a file
//! that is there, on all cores.

use std::{
    num::NonZero,
    ops::Range,
    panic,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
};

use blake3::hazmat::{self, ChainingValue, HasherExt, Mode};

/// Bytes per checksummed chunk; the last one of a file is shorter. A power of two of BLAKE3's own chunks, so that each is a
/// subtree of the file's hash.
pub const CHUNK_BYTES: u64 = 8 << 20;

/// Bytes hashed at once: few enough that they are still in the core's cache when they are hashed.
pub(crate) const BLOCK_BYTES: usize = 256 << 10;

/// Hears how many more bytes were read, from any thread.
pub type Watch<'a> = &'a (dyn Fn(u64) + Sync);

/// The digests of what went through.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Digests {
    pub bytes: u64,
    /// Hexadecimal.
    pub blake3: String,
    pub chunks: Vec<u32>,
    /// crc32c of each part.
    pub parts: Vec<u32>,
}

/// crc32c of bytes, and how many: two of neighbours are joined without another look at the bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Checksum {
    crc32c: u32,
    bytes: u64,
}

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
        self.bytes += bytes.len() as u64;
    }

    fn join(&mut self, next: Self) {
        self.crc32c = match self.bytes {
            0 => next.crc32c,
            _ => crc32c::crc32c_combine(self.crc32c, next.crc32c, next.bytes as usize),
        };
        self.bytes += next.bytes;
    }
}

impl Digests {
    /// The digests of a file of `bytes`, read a chunk per thread on all cores. A part begins at each of `starts`, which ascend,
    /// and ends where the next one begins, or the file. `scan` hands over the file's bytes of a range.
    pub fn of<E: Send>(
        bytes: u64,
        starts: &[u64],
        scan: impl Fn(Range<u64>, &mut dyn FnMut(&[u8])) -> Result<(), E> + Sync,
        watch: Watch<'_>,
    ) -> Result<Self, E> {
        let count = bytes.div_ceil(CHUNK_BYTES);
        let mut parts = vec![Checksum::default(); starts.len()];
        if count == 0 {
            return Ok(Digester::default().finish(vec![0; parts.len()]));
        }
        let next = AtomicU64::new(0);
        let work = || -> Result<Vec<ChunkDigest>, E> {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Relaxed);
                if index >= count {
                    return Ok(done);
                }
                done.push(ChunkDigest::of(index, bytes, starts, &scan, watch)?);
            }
        };
        let mut chunks = on_all_cores(count, work)?;
        chunks.sort_by_key(|chunk| chunk.index);
        let values: Vec<ChainingValue> = chunks.iter().map(|chunk| chunk.value).collect();
        let cut = chunks.iter().flat_map(|chunk| &chunk.cut);
        for &(part, checksum) in cut {
            if let Some(part) = part {
                parts[part].join(checksum);
            }
        }
        Ok(Self {
            bytes,
            blake3: root(&values).to_hex().to_string(),
            chunks: chunks.iter().map(ChunkDigest::crc32c).collect(),
            parts: parts.iter().map(|part| part.crc32c).collect(),
        })
    }
}

/// What one chunk contributes to the digests of its file.
struct ChunkDigest {
    index: u64,
    /// What is in it of each part, in order; of none where it lies before the first.
    cut: Vec<(Option<usize>, Checksum)>,
    /// Of its subtree; of a file of one chunk, the hash itself.
    value: ChainingValue,
}

impl ChunkDigest {
    fn of<E>(
        index: u64,
        bytes: u64,
        starts: &[u64],
        scan: &impl Fn(Range<u64>, &mut dyn FnMut(&[u8])) -> Result<(), E>,
        watch: Watch<'_>,
    ) -> Result<Self, E> {
        let offset = index * CHUNK_BYTES;
        let end = bytes.min(offset + CHUNK_BYTES);
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(offset);
        // The first part that begins behind the place where we are.
        let mut next = starts.partition_point(|&start| start <= offset);
        let mut at = offset;
        let mut cut = vec![(next.checked_sub(1), Checksum::default())];
        scan(offset..end, &mut |bytes| {
            // While they are in the core's cache.
            for mut block in bytes.chunks(BLOCK_BYTES) {
                hasher.update(block);
                while let Some(&start) = starts.get(next)
                    && start < at + block.len() as u64
                {
                    let (before, after) = block.split_at((start - at) as usize);
                    if let Some((_, last)) = cut.last_mut() {
                        last.add(before);
                    }
                    cut.push((Some(next), Checksum::default()));
                    (next, at, block) = (next + 1, start, after);
                }
                if let Some((_, last)) = cut.last_mut() {
                    last.add(block);
                }
                at += block.len() as u64;
            }
            watch(bytes.len() as u64);
        })?;
        let value = if bytes <= CHUNK_BYTES {
            *hasher.finalize().as_bytes()
        } else {
            hasher.finalize_non_root()
        };
        Ok(Self { index, cut, value })
    }

    fn crc32c(&self) -> u32 {
        let mut whole = Checksum::default();
        for &(_, checksum) in &self.cut {
            whole.join(checksum);
        }
        whole.crc32c
    }
}

/// What `work` gives, run by one thread per core but by at most `count`; this thread is one of them.
fn on_all_cores<T: Send, E: Send>(
    count: u64,
    work: impl Fn() -> Result<Vec<T>, E> + Sync,
) -> Result<Vec<T>, E> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let others = cores.min(count as usize) - 1;
    thread::scope(|scope| {
        let others: Vec<_> = (0..others).map(|_| scope.spawn(&work)).collect();
        let mut all = work();
        for other in others {
            let other = other.join().unwrap_or_else(|it| panic::resume_unwind(it));
            if let Ok(results) = &mut all {
                match other {
                    Ok(more) => results.extend(more),
                    error => all = error,
                }
            }
        }
        all
    })
}

/// BLAKE3 of a file from the values of its chunks, at least one.
fn root(values: &[ChainingValue]) -> blake3::Hash {
    if let [one] = values {
        return blake3::Hash::from_bytes(*one);
    }
    let (left, right) = halves(values);
    hazmat::merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash)
}

fn subtree(values: &[ChainingValue]) -> ChainingValue {
    if let [one] = values {
        return *one;
    }
    let (left, right) = halves(values);
    hazmat::merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
}

/// BLAKE3's left subtree is the largest whole one that leaves something for the right.
fn halves(values: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    let left = values.len().next_power_of_two() / 2;
    values.split_at(left)
}

/// Takes a file's bytes in order.
#[derive(Debug, Default)]
pub(crate) struct Digester {
    hasher: blake3::Hasher,
    /// Of whole chunks, and of what the last one has before `since`.
    chunks: Vec<Checksum>,
    /// Of what the part has before `since`.
    part: Checksum,
    /// Of what came since the last border of a chunk or part.
    since: Checksum,
}

impl Digester {
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.hasher.update(bytes);
        while !bytes.is_empty() {
            let filled = self.chunks.last().map_or(CHUNK_BYTES, |it| it.bytes) + self.since.bytes;
            if filled == CHUNK_BYTES {
                self.settle();
                self.chunks.push(Checksum::default());
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min((CHUNK_BYTES - filled) as usize));
            self.since.add(now);
            bytes = later;
        }
    }

    /// Ends a part: crc32c of what came since the last one ended.
    pub fn end_part(&mut self) -> u32 {
        self.settle();
        std::mem::take(&mut self.part).crc32c
    }

    fn settle(&mut self) {
        let since = std::mem::take(&mut self.since);
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.join(since);
        }
        self.part.join(since);
    }

    pub fn finish(mut self, parts: Vec<u32>) -> Digests {
        self.settle();
        Digests {
            bytes: self.chunks.iter().map(|chunk| chunk.bytes).sum(),
            blake3: self.hasher.finalize().to_hex().to_string(),
            chunks: self.chunks.iter().map(|chunk| chunk.crc32c).collect(),
            parts,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn chunks_are_cut_at_their_size_however_the_bytes_arrive() {
        let bytes: Vec<u8> = (0..CHUNK_BYTES as usize * 2 + 5)
            .map(|index| (index % 251) as u8)
            .collect();
        let mut whole = Digester::default();
        whole.update(&bytes);
        let mut pieces = Digester::default();
        for piece in bytes.chunks(1_000_003) {
            pieces.update(piece);
        }
        let whole = whole.finish(Vec::new());
        assert_eq!(whole, pieces.finish(Vec::new()));
        let expected: Vec<u32> = bytes
            .chunks(CHUNK_BYTES as usize)
            .map(crc32c::crc32c)
            .collect();
        assert_eq!(whole.chunks, expected);
        assert_eq!(whole.blake3, blake3::hash(&bytes).to_hex().to_string());
    }

    #[test]
    fn chunks_hashed_side_by_side_are_the_hash_of_the_whole() {
        let chunk = CHUNK_BYTES as usize;
        let bytes: Vec<u8> = (0..=chunk * 7).map(|it| (it % 251) as u8).collect();
        // None, less than one, one, a power of two, one more byte, an odd number of them.
        for len in [
            0,
            1,
            chunk - 1,
            chunk,
            chunk * 4,
            chunk * 4 + 1,
            chunk * 7,
            chunk * 7 + 1,
        ] {
            let bytes = &bytes[..len];
            let scan = |range: Range<u64>, sink: &mut dyn FnMut(&[u8])| {
                let range = range.start as usize..range.end as usize;
                bytes[range].chunks(1_000_003).for_each(sink);
                Ok::<(), io::Error>(())
            };
            let seen = AtomicU64::new(0);
            let watch = |count| {
                seen.fetch_add(count, Relaxed);
            };
            // Parts that end in a chunk, cross one, begin with one, are many chunks, one byte or none.
            let starts = [
                3,
                9,
                9,
                chunk,
                chunk + 1,
                chunk * 3,
                chunk * 3 + 7,
                chunk * 7,
            ];
            let starts = starts.map(|it| it.min(len) as u64);
            let found = Digests::of(len as u64, &starts, scan, &watch).expect("memory can be read");
            let mut expected = Digester::default();
            expected.update(&bytes[..starts[0] as usize]);
            expected.end_part();
            let ends = starts.iter().skip(1).copied().chain([len as u64]);
            let parts = starts.iter().zip(ends).map(|(&start, end)| {
                let part = &bytes[start as usize..end as usize];
                part.chunks(1_000_003).for_each(|it| expected.update(it));
                assert_eq!(expected.end_part(), crc32c::crc32c(part));
                crc32c::crc32c(part)
            });
            let parts = parts.collect();
            assert_eq!(found, expected.finish(parts), "{len} bytes");
            let chunks: Vec<u32> = bytes.chunks(chunk).map(crc32c::crc32c).collect();
            assert_eq!(found.chunks, chunks, "{len} bytes");
            assert_eq!(seen.into_inner(), len as u64);
        }
    }

    #[test]
    fn a_block_that_cannot_be_read_is_an_error_whoever_reads_it() {
        let bad = 5 * CHUNK_BYTES;
        let scan = |range: Range<u64>, sink: &mut dyn FnMut(&[u8])| {
            sink(&[0]);
            match range.start {
                start if start == bad => Err(io::Error::other("bad sector")),
                _ => Ok(()),
            }
        };
        let error = Digests::of(8 * CHUNK_BYTES, &[], scan, &|_| ()).expect_err("refused");
        assert_eq!(error.to_string(), "bad sector");
    }
}
