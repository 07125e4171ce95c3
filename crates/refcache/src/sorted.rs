//! The sorted form of a segment: written once, mapped into memory, checked block by block when first used.
//!
//! ```text
//! head       0     8    magic "CALDPREF"
//!            8     4    format version, u32 little endian, 2
//!            12    32   scope digest
//!            44    8    entries n, u64 little endian
//!            52    32   BLAKE3 of bytes 0..52
//! blocks     84    36n  entries, ascending by key, each key once; a block is 128 of them, the last one what is left
//!                       0   32  entry key
//!                       32  4   value, f32 little endian, finite
//! fences     8b         for each of the b blocks the first 8 bytes of its first key
//! digests    32b        for each of the b blocks its BLAKE3
//! root       32         BLAKE3(head ‖ fences ‖ digests)
//! ```
//! Opening reads all but the blocks, 0.31 bytes an entry. The root vouches for the digests, a digest for its block, the
//! head's digest for n and so for the size: there is no byte that nothing vouches for.

use std::{
    io::{BufWriter, Write},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use storage::{DurableFile, Mapping};

use crate::{
    EntryKey, StoreError,
    entry::prefix,
    search::partition_near,
    segment::{ENTRY_BYTES, KEY_BYTES, decode, encode},
};

/// How the file begins; a log begins otherwise.
pub const MAGIC: &[u8; 8] = b"CALDPREF";
const VERSION: u32 = 2;
const DIGEST_BYTES: usize = 32;
/// Of the head without its digest.
const FIELDS_BYTES: usize = 8 + 4 + 32 + 8;
const HEAD_BYTES: usize = FIELDS_BYTES + DIGEST_BYTES;
const FENCE_BYTES: usize = 8;

/// Large enough that fences and digests are small, small enough that hashing one at the first use of an entry takes 2 µs.
const BLOCK_ENTRIES: usize = 128;
const BLOCK_BYTES: usize = BLOCK_ENTRIES * ENTRY_BYTES;

/// Written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// A sorted segment that is open for reading.
#[derive(Debug)]
pub struct Sorted {
    mapping: Mapping,
    layout: Layout,
    /// A bit for each block that was found in order. Checking one twice is harmless.
    checked: Vec<AtomicU64>,
}

/// Where everything is.
#[derive(Clone, Copy, Debug)]
struct Layout {
    entries: usize,
    blocks: usize,
    fences: usize,
    digests: usize,
    root: usize,
    end: usize,
}

impl Layout {
    /// `None` for what no file can hold.
    fn of(entries: u64) -> Option<Self> {
        let entries = usize::try_from(entries).ok()?;
        let blocks = entries.div_ceil(BLOCK_ENTRIES);
        let fences = entries.checked_mul(ENTRY_BYTES)?.checked_add(HEAD_BYTES)?;
        // Fewer than bytes of entries, so only the sums can be too large.
        let digests = fences.checked_add(blocks * FENCE_BYTES)?;
        let root = digests.checked_add(blocks * DIGEST_BYTES)?;
        Some(Self {
            entries,
            blocks,
            fences,
            digests,
            root,
            end: root.checked_add(DIGEST_BYTES)?,
        })
    }

    /// First and last byte of a block.
    fn block(&self, index: usize) -> std::ops::Range<usize> {
        let start = HEAD_BYTES + index * BLOCK_BYTES;
        start..(start + BLOCK_BYTES).min(self.fences)
    }
}

/// Size of a file of so many entries.
pub fn bytes(entries: usize) -> u64 {
    Layout::of(entries as u64)
        .expect("so many are in memory")
        .end as u64
}

/// First byte of the block that holds the entry at a place in the order.
pub fn offset(index: usize) -> u64 {
    (HEAD_BYTES + index / BLOCK_ENTRIES * BLOCK_BYTES) as u64
}

impl Sorted {
    /// Checks all but the blocks. `path` is for errors.
    pub fn open(path: &Path, mapping: Mapping, scope: &[u8; 32]) -> Result<Self, StoreError> {
        let damaged = |offset: usize, reason| StoreError::Damaged {
            path: path.to_owned(),
            offset: offset as u64,
            reason,
        };
        let Some((head, _)) = mapping.split_first_chunk::<HEAD_BYTES>() else {
            return Err(damaged(0, "the head of the segment is cut short"));
        };
        let (fields, digest) = head.split_at(FIELDS_BYTES);
        if digest != blake3::hash(fields).as_bytes() {
            return Err(damaged(0, "the head of the segment was changed"));
        }
        let (entries, ours) = fields
            .split_last_chunk::<8>()
            .map_or((0, false), |(named, count)| {
                (u64::from_le_bytes(*count), *named == name(scope))
            });
        if !ours {
            return Err(damaged(
                0,
                "the segment belongs to another scope or another format version",
            ));
        }
        let layout =
            Layout::of(entries).ok_or_else(|| damaged(0, "no file holds so many entries"))?;
        if mapping.len() != layout.end {
            return Err(damaged(
                mapping.len().min(layout.end),
                "the segment was cut short, or something was added to it",
            ));
        }
        if mapping[layout.root..] != *root(head, &mapping[layout.fences..layout.root]).as_bytes() {
            return Err(damaged(
                layout.fences,
                "the fences or digests of the blocks were changed",
            ));
        }
        let words = layout.blocks.div_ceil(64);
        let sorted = Self {
            mapping,
            layout,
            checked: (0..words).map(|_| AtomicU64::new(0)).collect(),
        };
        if !(0..layout.blocks).is_sorted_by_key(|index| sorted.fence(index)) {
            return Err(damaged(
                layout.fences,
                "the fences of the blocks are out of order",
            ));
        }
        Ok(sorted)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.layout.entries
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.mapping
    }

    /// The digest that vouches for all of it.
    pub fn root(&self) -> [u8; 32] {
        let (_, root) = self.mapping.split_last_chunk().expect("checked at opening");
        *root
    }

    /// The entry at a place in the order, below [`Sorted::len`].
    pub fn entry(&self, path: &Path, index: usize) -> Result<(EntryKey, f32), StoreError> {
        let block = self.block(path, index / BLOCK_ENTRIES)?;
        Ok(decode(&block[index % BLOCK_ENTRIES]))
    }

    /// Value and place of `key`.
    pub fn find(&self, path: &Path, key: &EntryKey) -> Result<Option<(f32, usize)>, StoreError> {
        let (blocks, prefix) = (self.layout.blocks, key.prefix());
        let mut index = partition_near(blocks, key.place_of(blocks), |index| {
            self.fence(index) <= prefix
        });
        while index > 0 {
            index -= 1;
            let (block, fence) = (self.block(path, index)?, self.fence(index));
            // Mostly the fence decides, and where the block begins need not be fetched from memory.
            if fence < prefix || decode(&block[0]).0 <= *key {
                let last = index + 1 == blocks;
                let next = if last {
                    u64::MAX
                } else {
                    self.fence(index + 1)
                };
                let place = find_in(block, key, fence, next);
                return Ok(place.map(|place| {
                    let (_, value) = decode(&block[place]);
                    (value, index * BLOCK_ENTRIES + place)
                }));
            }
            // Keys that agree in as much as a fence holds: it is in a block before, or nowhere.
        }
        Ok(None)
    }

    /// A block, checked.
    fn block(&self, path: &Path, index: usize) -> Result<&[[u8; ENTRY_BYTES]], StoreError> {
        let range = self.layout.block(index);
        let (entries, _) = self.mapping[range.clone()].as_chunks();
        let (word, bit) = (&self.checked[index / 64], 1 << (index % 64));
        if word.load(Ordering::Relaxed) & bit == 0 {
            self.check(path, index, range.start, entries)?;
            word.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(entries)
    }

    #[cold]
    fn check(
        &self,
        path: &Path,
        index: usize,
        start: usize,
        entries: &[[u8; ENTRY_BYTES]],
    ) -> Result<(), StoreError> {
        let damaged = |reason| StoreError::Damaged {
            path: path.to_owned(),
            offset: start as u64,
            reason,
        };
        let digest = self.layout.digests + index * DIGEST_BYTES;
        let digest = &self.mapping[digest..digest + DIGEST_BYTES];
        if blake3::hash(entries.as_flattened()).as_bytes() != digest {
            return Err(damaged("a block of entries was changed"));
        }
        // What follows no damage can cause, only a faulty writer.
        let ascending = entries.is_sorted_by(|a, b| a[..KEY_BYTES] < b[..KEY_BYTES]);
        if !ascending || self.fence(index) != prefix(&entries[0]) {
            return Err(damaged("a block of entries is out of order"));
        }
        for (key, value) in entries.iter().map(decode) {
            if !value.is_finite() {
                return Err(StoreError::NotFinite {
                    path: path.to_owned(),
                    offset: start as u64,
                    key,
                    value,
                });
            }
        }
        Ok(())
    }

    fn fence(&self, index: usize) -> u64 {
        prefix(&self.mapping[self.layout.fences + index * FENCE_BYTES..])
    }
}

/// Where `key` is in a block whose keys begin with numbers from `first` up to `next`.
fn find_in(block: &[[u8; ENTRY_BYTES]], key: &EntryKey, first: u64, next: u64) -> Option<usize> {
    let (above, width) = (key.prefix() - first, (next - first).max(1));
    // Rounding is harmless in a guess.
    let guess = (above as f64 / width as f64 * block.len() as f64) as usize;
    let key = &key.as_bytes()[..];
    let place = partition_near(block.len(), guess, |index| &block[index][..KEY_BYTES] < key);
    (block.get(place)?[..KEY_BYTES] == *key).then_some(place)
}

/// Writes a file of `count` ascending entries, durably, under a name that was not there.
pub fn write(
    path: &Path,
    scope: &[u8; 32],
    count: usize,
    entries: impl Iterator<Item = Result<(EntryKey, f32), StoreError>>,
) -> Result<(), StoreError> {
    let error = |source| StoreError::at("write", path, source);
    let mut head = Vec::with_capacity(HEAD_BYTES);
    head.extend_from_slice(&name(scope));
    head.extend_from_slice(&(count as u64).to_le_bytes());
    let digest = blake3::hash(&head);
    head.extend_from_slice(digest.as_bytes());
    let mut file = BufWriter::with_capacity(BUFFER_BYTES, DurableFile::create(path)?);
    file.write_all(&head).map_err(error)?;
    let (mut fences, mut digests) = (Vec::new(), Vec::new());
    let (mut block, mut written) = (Vec::with_capacity(BLOCK_BYTES), 0);
    let mut end_block = |block: &mut Vec<u8>| {
        fences.extend_from_slice(&block[..FENCE_BYTES]);
        digests.extend_from_slice(blake3::hash(block).as_bytes());
        let written = file.write_all(block).map_err(error);
        block.clear();
        written
    };
    let mut last = None;
    for entry in entries {
        let (key, value) = entry?;
        assert!(last < Some(key), "{key} does not follow {last:?}");
        last = Some(key);
        block.extend_from_slice(&encode(key, value));
        written += 1;
        if block.len() == BLOCK_BYTES {
            end_block(&mut block)?;
        }
    }
    if !block.is_empty() {
        end_block(&mut block)?;
    }
    assert_eq!(
        written,
        count,
        "entries of {} were counted wrongly",
        path.display()
    );
    fences.append(&mut digests);
    let root = root(&head, &fences);
    file.write_all(&fences)
        .and_then(|()| file.write_all(root.as_bytes()))
        .map_err(error)?;
    let file = file
        .into_inner()
        .map_err(|failed| error(failed.into_error()))?;
    Ok(file.commit()?)
}

/// How the head begins in segments of `scope`.
fn name(scope: &[u8; 32]) -> [u8; FIELDS_BYTES - 8] {
    let mut name = [0; FIELDS_BYTES - 8];
    name[..8].copy_from_slice(MAGIC);
    name[8..12].copy_from_slice(&VERSION.to_le_bytes());
    name[12..].copy_from_slice(scope);
    name
}

/// Vouches for head, fences and digests.
fn root(head: &[u8], fences_and_digests: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(head).update(fences_and_digests);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{collections::BTreeMap, fs};

    use proptest::{collection::vec, prelude::*};
    use tempfile::TempDir;

    use super::*;
    use crate::segment::Segment;

    const SCOPE: [u8; 32] = [9; 32];

    fn key(prefix: u64, rest: u8) -> EntryKey {
        let mut bytes = [rest; 32];
        bytes[..8].copy_from_slice(&prefix.to_be_bytes());
        EntryKey::from_bytes(bytes)
    }

    fn written(entries: &BTreeMap<EntryKey, f32>) -> (TempDir, Segment) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.segment");
        let all = entries.iter().map(|(key, value)| Ok((*key, *value)));
        write(&path, &SCOPE, entries.len(), all).unwrap();
        let segment = Segment::open(&path, &SCOPE).unwrap();
        (dir, segment)
    }

    /// Keys that are spread evenly, that crowd in corners, and that agree in all of their first 8 bytes.
    fn keys() -> impl Strategy<Value = Vec<EntryKey>> {
        let prefix = prop_oneof![any::<u64>(), 0..4u64, u64::MAX - 4..=u64::MAX];
        vec((prefix, any::<u8>()), 0..700).prop_map(|keys| {
            keys.into_iter()
                .map(|(prefix, rest)| key(prefix, rest))
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_the_keys_those_written_are_found_and_no_others(keys in keys(), absent in keys()) {
            let entries: BTreeMap<_, _> = keys.into_iter().zip(0u16..).map(|(key, index)| (key, f32::from(index))).collect();
            let (_dir, segment) = written(&entries);
            prop_assert_eq!(segment.bytes, bytes(entries.len()));
            for key in entries.keys().chain(&absent) {
                let found = segment.find(key).unwrap();
                prop_assert_eq!(found.map(|(value, _)| value), entries.get(key).copied());
                if let Some((value, place)) = found {
                    prop_assert_eq!(segment.entry(place).unwrap(), (*key, value));
                }
            }
        }

        /// Not what damage does, which no digest would cover, but what a faulty or hostile writer might.
        #[test]
        fn content_that_its_digests_vouch_for_is_refused_or_read_but_never_a_panic(
            count in prop_oneof![0..600u64, any::<u64>()],
            values in vec(any::<u8>(), 0..600 * ENTRY_BYTES),
            sort in any::<bool>(),
            wanted in keys(),
        ) {
            let mut content = name(&SCOPE).to_vec();
            content.extend_from_slice(&count.to_le_bytes());
            content.extend_from_slice(blake3::hash(&content).as_bytes());
            let (head, mut body) = (content.clone(), values);
            if let Some(layout) = Layout::of(count).filter(|_| count < 600) {
                body.resize(layout.fences - HEAD_BYTES, 0x41);
                if sort {
                    body.as_chunks_mut::<ENTRY_BYTES>().0.sort_unstable();
                }
                let (mut fences, mut digests) = (Vec::new(), Vec::new());
                for block in body.chunks(BLOCK_BYTES) {
                    fences.extend_from_slice(&block[..FENCE_BYTES]);
                    digests.extend_from_slice(blake3::hash(block).as_bytes());
                }
                fences.extend_from_slice(&digests);
                body.extend_from_slice(&fences);
                body.extend_from_slice(root(&head, &fences).as_bytes());
            }
            content.extend_from_slice(&body);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.segment");
            fs::write(&path, &content).unwrap();
            if let Ok(segment) = Segment::open(&path, &SCOPE) {
                prop_assert_eq!(segment.len() as u64, count);
                for key in &wanted {
                    let _ = segment.find(key);
                }
                for index in 0..segment.len() {
                    if let Ok((key, value)) = segment.entry(index) {
                        prop_assert!(value.is_finite());
                        let _ = segment.find(&key);
                    }
                }
            }
        }
    }
}
