//! Merging the segments of a shared folder, so that whoever pulls opens a few large objects and not hundreds of small ones.
//!
//! Others read and write the folder meanwhile, and nobody can lock it. So nothing is changed in place, and the order alone
//! keeps every entry reachable, wherever a crash cuts it:
//! ```text
//! fetch   what is not here                      every source is checked to its last byte
//! merge   X.merging, here                       read back and compared with the sources
//! send    <root>.segment                        every entry is there twice, with equal bits
//! compare it, as the folder gives it back, with X.merging
//! remove  the sources, one by one
//! ```
//! A source goes only after a segment that has all of its entries, and more, has been read back from the folder. Equal entries
//! make equal bytes and so one name, which is why a segment whose name is the result's stays. Each removal thus leads to a
//! larger segment, and the largest is never removed: any number of compactions at once, of lists as old as they like, lose
//! nothing. Who listed a source and finds it gone lists again ([`Store::pull`]).
//!
//! The claim, `compacting.json`, only spares work where several push at the same moment. It expires, it may be lost, and
//! a store that knows no conditions goes without.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use storage::{Condition, Put, create_directory, remove_directory, remove_file, rename};

use crate::{
    Folder, Store, StoreError,
    entry::hex,
    folder::{MERGING, digest_named, random_name},
    merge::Distinct,
    replace,
    segment::{Form, Segment},
    share::{There, compare, name_of, root_of, segment_name, send},
    sorted,
};

/// Segments of a scope in a shared folder above which [`Store::push`] merges some. To fetch one takes about two round trips.
pub const SHARED_SEGMENTS_MAX: usize = 32;

const CLAIM_FILE: &str = "compacting.json";
/// How long a claim lasts whose holder has died. One that takes longer has company, which is a waste and no harm.
const CLAIM: Duration = Duration::from_hours(1);

/// Which segments of a shared folder are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Where there are more than [`SHARED_SEGMENTS_MAX`], the smallest, until half as many are left; and further ones as long
    /// as each is no larger than all before it together, so that an entry is sent again only when its segment doubles.
    Crowded,
    /// All, into one.
    Whole,
}

/// What a compaction did, or on a dry run would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compaction {
    /// Nothing: there are few enough.
    Unneeded,
    /// Nothing: somebody else is at it, or died at it less than an hour ago.
    Claimed,
    /// Segments became one.
    Merged {
        /// How many.
        segments: usize,
        /// Their sizes together.
        bytes_before: u64,
        /// The size of the one; none on a dry run, which fetches nothing.
        bytes: Option<u64>,
    },
}

/// What became of one scope of a shared folder.
#[derive(Debug)]
pub struct CompactedScope {
    /// Its digest, in hexadecimal digits.
    pub digest: String,
    /// Segments that were there.
    pub segments: usize,
    /// What was done.
    pub compaction: Compaction,
    /// What is wrong there; left alone, with what it says of itself.
    pub damages: Vec<StoreError>,
}

impl Extent {
    /// How many segments are few enough.
    fn segments_max(self) -> usize {
        match self {
            Self::Crowded => SHARED_SEGMENTS_MAX,
            Self::Whole => 1,
        }
    }

    /// How many of the smallest are merged, given all sizes in ascending order; 0 where there are few enough.
    fn count(self, sizes: &[u64]) -> usize {
        if sizes.len() <= self.segments_max() {
            return 0;
        }
        let Self::Crowded = self else {
            return sizes.len();
        };
        let mut count = sizes.len() - SHARED_SEGMENTS_MAX / 2 + 1;
        let mut merged: u64 = sizes[..count].iter().sum();
        while count < sizes.len() && sizes[count] <= merged {
            merged += sizes[count];
            count += 1;
        }
        count
    }
}

impl Store {
    /// Merges segments of the folder `shared`, of which this store then has all. Others may read, push and compact meanwhile.
    ///
    /// The second value tells what in the folder is not what its name says; that is left out and left alone.
    ///
    /// # Errors
    /// The folder or the disk cannot be read or written, or segments contradict each other. Nothing is lost then, and the next
    /// call goes on.
    pub fn compact(
        &mut self,
        shared: &storage::Folder,
        extent: Extent,
        now: SystemTime,
    ) -> Result<(Compaction, Vec<StoreError>), StoreError> {
        let shared = shared.below(&hex(&self.folder.digest));
        if segments_of(&shared)?.len() <= extent.segments_max() {
            return Ok((Compaction::Unneeded, Vec::new()));
        }
        if !claim(&shared, now)? {
            return Ok((Compaction::Claimed, Vec::new()));
        }
        let merged = self.merge_shared(&shared, extent);
        // It expires.
        drop(shared.remove(CLAIM_FILE));
        merged
    }

    fn merge_shared(
        &mut self,
        shared: &storage::Folder,
        extent: Extent,
    ) -> Result<(Compaction, Vec<StoreError>), StoreError> {
        let (pulled, names) = self.fetch_all(shared)?;
        let sources = self.sources(&names, extent);
        if sources.len() < 2 {
            return Ok((Compaction::Unneeded, pulled.refused));
        }
        let unfinished = self.folder.new_segment()?.with_extension(MERGING);
        let merged = self.folder.merge_and_send(&sources, &unfinished, shared);
        if !matches!(merged, Ok(Some(_))) {
            // The first error is the one to tell.
            drop(remove_file(&unfinished));
        }
        let Some((name, bytes)) = merged? else {
            return Ok((Compaction::Claimed, pulled.refused));
        };
        for source in &sources {
            if name_of(&source.path) != Some(&name) {
                shared.remove(name_of(&source.path).expect("it was listed as text"))?;
            }
        }
        self.reload()?;
        let compaction = Compaction::Merged {
            segments: sources.len(),
            bytes_before: sources.iter().map(|source| source.bytes).sum(),
            bytes: Some(bytes),
        };
        Ok((compaction, pulled.refused))
    }

    /// The segments to merge of those that are named, which are here.
    fn sources(&self, names: &[String], extent: Extent) -> Vec<Arc<Segment>> {
        let named = |segment: &&Arc<Segment>| {
            name_of(&segment.path).is_some_and(|it| names.iter().any(|name| name == it))
        };
        let mut sources: Vec<_> = self.segments.iter().filter(named).cloned().collect();
        sources.sort_by_key(|segment| segment.bytes);
        let sizes: Vec<u64> = sources.iter().map(|segment| segment.bytes).collect();
        sources.truncate(extent.count(&sizes));
        sources
    }
}

impl Folder {
    /// Makes one segment of all `sources`, here and in the folder `shared`; gives its name and size. None where another
    /// compaction has it removed again already.
    fn merge_and_send(
        &self,
        sources: &[Arc<Segment>],
        unfinished: &Path,
        shared: &storage::Folder,
    ) -> Result<Option<(String, u64)>, StoreError> {
        let entries = || Distinct::new(sources.iter().map(Arc::as_ref));
        let mut count = 0;
        for entry in entries() {
            entry?;
            count += 1;
        }
        sorted::write(unfinished, &self.digest, count, entries())?;
        replace::read_back(unfinished, &self.digest, count, entries())?;
        let merged = Segment::open(unfinished, &self.digest)?;
        let Form::Sorted(sorted) = &merged.form else {
            unreachable!("{} was written in sorted form", unfinished.display());
        };
        let name = segment_name(&sorted.root());
        // It may be there: another compaction's, or the largest of the sources.
        if compare(shared, &name, sorted.bytes())? != There::Same {
            send(shared, &name, sorted.bytes())?;
            match compare(shared, &name, sorted.bytes())? {
                There::Same => {}
                There::Absent => return Ok(None),
                There::Different(offset) => {
                    return Err(StoreError::Damaged {
                        path: shared.path().join(&name),
                        offset,
                        reason: "it was just written and reads back differently",
                    });
                }
            }
        }
        rename(unfinished, &self.path.join(&name))?;
        Ok(Some((name, merged.bytes)))
    }
}

/// Merges the segments of every scope of the folder `shared` into one each. `scratch` is a folder of a disk with room for the
/// largest scope twice; what is made there is removed.
///
/// # Errors
/// The folder or the disk cannot be read or written. Nothing is lost then, and the next call goes on.
pub fn compact(
    shared: &storage::Folder,
    scratch: &Path,
    now: SystemTime,
    dry_run: bool,
) -> Result<Vec<CompactedScope>, StoreError> {
    let mut scopes = Vec::new();
    for digest in shared.list()?.iter().filter_map(|name| digest_named(name)) {
        let there = shared.below(&hex(&digest));
        let segments = segments_of(&there)?;
        let (compaction, damages) = if segments.len() <= 1 {
            (Compaction::Unneeded, Vec::new())
        } else if dry_run {
            let mut bytes_before = 0;
            for name in &segments {
                bytes_before += there.object(name)?.map_or(0, |object| object.bytes());
            }
            let would = Compaction::Merged {
                segments: segments.len(),
                bytes_before,
                bytes: None,
            };
            (would, Vec::new())
        } else {
            compact_in(scratch, digest, shared, now)?
        };
        scopes.push(CompactedScope {
            digest: hex(&digest),
            segments: segments.len(),
            compaction,
            damages,
        });
    }
    Ok(scopes)
}

/// Compacts one scope through a store that nobody else knows.
fn compact_in(
    scratch: &Path,
    digest: [u8; 32],
    shared: &storage::Folder,
    now: SystemTime,
) -> Result<(Compaction, Vec<StoreError>), StoreError> {
    let path: PathBuf = scratch.join(format!("compacting-{}", random_name()?));
    create_directory(&path)?;
    let mut store = Store::private(Folder {
        path: path.clone(),
        digest,
    });
    let compacted = store.compact(shared, Extent::Whole, now);
    drop(store);
    remove_directory(&path)?;
    match compacted {
        // Two segments that disagree.
        Err(error) if error.place().is_some() => Ok((Compaction::Unneeded, vec![error])),
        compacted => compacted,
    }
}

/// Names of what should be segments there.
fn segments_of(shared: &storage::Folder) -> Result<Vec<String>, StoreError> {
    let mut names = shared.list()?;
    names.retain(|name| root_of(Path::new(name)).is_some());
    Ok(names)
}

/// Who compacts, and until when others leave it to them.
#[derive(Serialize, Deserialize)]
struct Claim {
    /// Random, because a put of the very same bytes counts as done.
    by: String,
    /// Seconds since 1970.
    until: u64,
}

/// Takes the compaction of a scope's folder upon oneself; false where it is somebody else's.
fn claim(shared: &storage::Folder, now: SystemTime) -> Result<bool, StoreError> {
    let now = now.duration_since(SystemTime::UNIX_EPOCH);
    let now = now.unwrap_or_default().as_secs();
    let ours = Claim {
        by: random_name()?,
        until: now + CLAIM.as_secs(),
    };
    let ours = serde_json::to_vec(&ours).expect("a claim is plain data");
    let put = match shared.read_versioned(CLAIM_FILE)? {
        None => shared.put(CLAIM_FILE, &ours, Condition::Absent),
        Some((found, version)) => {
            let holds = serde_json::from_slice::<Claim>(&found).is_ok_and(|claim| {
                // One that lasts longer than any is a clock's fault.
                (now..=now + CLAIM.as_secs()).contains(&claim.until)
            });
            if holds {
                return Ok(false);
            }
            shared.put(CLAIM_FILE, &ours, Condition::Unchanged(&version))
        }
    };
    match put {
        Ok(put) => Ok(put == Put::Done),
        Err(error) if error.source.kind() == std::io::ErrorKind::Unsupported => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(sizes: &[u64], expected: usize) {
        assert_eq!(Extent::Crowded.count(sizes), expected, "{sizes:?}");
    }

    #[test]
    fn the_smallest_are_merged_and_larger_ones_only_with_as_much() {
        check(&[], 0);
        check(&[1; SHARED_SEGMENTS_MAX], 0);
        // All of one size: each next one is smaller than those before it.
        check(&[1; SHARED_SEGMENTS_MAX + 1], SHARED_SEGMENTS_MAX + 1);
        let crowd = [1; SHARED_SEGMENTS_MAX];
        check(&[&crowd[..], &[33]].concat(), 32);
        check(&[&crowd[..], &[32, 64, 129]].concat(), 34);
        // However the sizes grow, half are left at most.
        let doubling: Vec<u64> = (0..40).map(|index| 3 << index).collect();
        check(&doubling, 40 - SHARED_SEGMENTS_MAX / 2 + 1);
        assert_eq!(Extent::Whole.count(&[1]), 0);
        assert_eq!(Extent::Whole.count(&doubling), 40);
    }

    /// A thousand pushes of one size: how often an entry is sent again, and how many segments there are at most.
    #[test]
    fn an_entry_is_sent_again_a_few_times_however_many_pushes_follow() {
        let mut sizes: Vec<u64> = Vec::new();
        let mut sent = 0;
        for _ in 0..1000 {
            sizes.push(1);
            sizes.sort_unstable();
            let merged: Vec<u64> = sizes.drain(..Extent::Crowded.count(&sizes)).collect();
            if !merged.is_empty() {
                sent += merged.iter().sum::<u64>();
                sizes.push(merged.iter().sum());
            }
            assert!(sizes.len() <= SHARED_SEGMENTS_MAX);
        }
        assert!(sent <= 6 * 1000, "{sent} sent again");
    }
}
