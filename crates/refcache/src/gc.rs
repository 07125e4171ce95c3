//! Cleaning up: scopes that nobody has used for long go, segments of the others become one sorted segment.
//!
//! Each scope is taken alone, which no run that has it open allows, and then changed in an order that a crash may cut
//! anywhere:
//! ```text
//! merge   write and sync  X.merging, all entries, sorted         not read by anybody
//!         read it back
//!         rename          X.merging -> X.segment, durably        every entry is there twice, with equal bits
//!         remove          the old segments, one by one
//! remove  rename          SCOPE -> SCOPE.removed, durably        the scope is gone
//!         remove          SCOPE.removed with all it holds
//! ```
//! Segments that are shared with other machines (`share.rs`) are not merged here but there (`compact.rs`). One whose entries
//! another shared one has all is what such a merge leaves, and goes.
//!
//! What a crash leaves behind (`*.merging`, `*.tmp`, `*.removed`) the next clean-up removes.

use std::{
    cmp::Reverse,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use storage::{remove_directory, remove_file, rename};

use crate::{
    Folder, ScopeReport, StoreError,
    inspect::examine,
    merge::Distinct,
    replace,
    segment::{Form, Segment},
    share::root_of,
    sorted,
};

/// What to clean up.
#[derive(Clone, Copy, Debug)]
pub struct Cleaning {
    /// Remove scopes that were last used so long before `now`; without it none.
    pub unused_for: Option<Duration>,
    /// The present.
    pub now: SystemTime,
    /// Tell what would be done; only the locks are taken.
    pub dry_run: bool,
}

/// What a clean-up did, or on a dry run would do.
#[derive(Debug)]
pub struct Cleaned {
    /// Scopes that were looked at.
    pub scopes: Vec<CleanedScope>,
    /// Scopes that somebody uses, untouched: a [`StoreError::InUse`] each.
    pub in_use: Vec<StoreError>,
    /// Traces of interrupted writes and clean-ups, removed.
    pub leftovers: Vec<PathBuf>,
}

/// What became of one scope.
#[derive(Debug)]
pub struct CleanedScope {
    /// The scope as it was found.
    pub before: ScopeReport,
    /// What was done.
    pub action: Action,
    /// Number of its segments now.
    pub segments: usize,
    /// Bytes of its segments now.
    pub bytes: u64,
}

/// What a clean-up does to a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// There was nothing to do.
    Kept,
    /// All entries that are not shared are in one sorted segment now, and unfinished appends are gone; shared segments whose
    /// entries a larger one has are gone, too.
    Merged,
    /// Gone, because nobody had used it for so long.
    Removed,
    /// Untouched, because something in it is wrong; the report says what.
    Damaged,
}

/// Cleans up all scopes under `store`. Scopes in use are left alone; runs that open one meanwhile wait for their turn.
///
/// # Errors
/// What could not be read, written or removed. What was done before stays, and the next call goes on.
pub fn clean(store: &Path, cleaning: &Cleaning) -> Result<Cleaned, StoreError> {
    let (folders, leftovers) = Folder::all(store)?;
    let mut cleaned = Cleaned {
        scopes: Vec::new(),
        in_use: Vec::new(),
        leftovers,
    };
    if !cleaning.dry_run {
        for path in &cleaned.leftovers {
            remove_directory(path)?;
        }
    }
    for folder in folders {
        let _alone = match folder.lock_alone() {
            Ok(lock) => lock,
            Err(error @ StoreError::InUse { .. }) => {
                cleaned.in_use.push(error);
                continue;
            }
            // Another clean-up has just removed it.
            Err(_) if !folder.path.exists() => continue,
            Err(error) => return Err(error),
        };
        let leftovers = folder.leftovers()?;
        if !cleaning.dry_run {
            for path in &leftovers {
                remove_file(path)?;
            }
        }
        cleaned.leftovers.extend(leftovers);
        cleaned.scopes.push(clean_scope(&folder, cleaning)?);
    }
    Ok(cleaned)
}

fn clean_scope(folder: &Folder, cleaning: &Cleaning) -> Result<CleanedScope, StoreError> {
    let (before, segments) = examine(folder, &mut |_| ())?;
    // What is shared stays what its name says.
    let is_shared = |segment: &Segment| root_of(&segment.path).is_some();
    let (shared, segments): (Vec<_>, Vec<_>) = segments.into_iter().partition(is_shared);
    let merges = !matches!(
        &segments[..],
        [] | [Segment {
            form: Form::Sorted(_),
            ..
        }]
    );
    let covered = if before.damages.is_empty() {
        covered(&shared)?
    } else {
        Vec::new()
    };
    // A date in the future is a clock's fault, and no long time ago.
    let unused_for = cleaning.now.duration_since(before.used).unwrap_or_default();
    let action = if cleaning.unused_for.is_some_and(|least| unused_for >= least) {
        Action::Removed
    } else if !before.damages.is_empty() {
        Action::Damaged
    } else if merges || !covered.is_empty() {
        Action::Merged
    } else {
        Action::Kept
    };
    let kept = shared.iter().filter(|it| !covered.contains(&it.path));
    let kept: Vec<u64> = kept.map(|segment| segment.bytes).collect();
    let merged = match (action, merges) {
        (Action::Merged, true) if shared.is_empty() => Some(before.entries),
        (Action::Merged, true) => Some(Distinct::new(&segments).count()),
        _ => None,
    };
    let (count, bytes) = match (action, merged) {
        (Action::Kept | Action::Damaged, _) => (before.segments, before.bytes),
        (Action::Merged, Some(entries)) => (1, sorted::bytes(entries)),
        (Action::Merged, None) => (segments.len(), segments.iter().map(|it| it.bytes).sum()),
        (Action::Removed, _) => (0, 0),
    };
    let (count, bytes) = match action {
        Action::Merged => (count + kept.len(), bytes + kept.iter().sum::<u64>()),
        _ => (count, bytes),
    };
    if !cleaning.dry_run {
        if action == Action::Removed {
            rename(&folder.path, &folder.removed())?;
            remove_directory(&folder.removed())?;
        }
        if let Some(entries) = merged {
            let path = folder.new_segment()?;
            let all = || Distinct::new(&segments);
            // Cleaning up is no use, so the date stays.
            let used = Some(before.used);
            replace::write(&path, &folder.digest, entries, all, used)?;
            for segment in &segments {
                remove_file(&segment.path)?;
            }
        }
        if action == Action::Merged {
            for path in &covered {
                remove_file(path)?;
            }
        }
    }
    Ok(CleanedScope {
        before,
        action,
        segments: count,
        bytes,
    })
}

/// The segments all of whose entries a larger one of `shared` has, and not only others together.
fn covered(shared: &[Segment]) -> Result<Vec<PathBuf>, StoreError> {
    let mut largest_first: Vec<&Segment> = shared.iter().collect();
    largest_first.sort_by_key(|segment| Reverse(segment.len()));
    let (mut kept, mut covered) = (Vec::<&Segment>::new(), Vec::new());
    for segment in largest_first {
        let mut is_covered = false;
        for larger in &kept {
            is_covered = is_covered || has_all(larger, segment)?;
        }
        if is_covered {
            covered.push(segment.path.clone());
        } else {
            kept.push(segment);
        }
    }
    Ok(covered)
}

/// Whether `larger` has every entry of `segment`, with its value. Of unrelated ones the first entry tells.
fn has_all(larger: &Segment, segment: &Segment) -> Result<bool, StoreError> {
    for index in 0..segment.len() {
        let (key, value) = segment.entry(index)?;
        let found = larger.find(&key)?;
        if found.is_none_or(|(found, _)| found.to_bits() != value.to_bits()) {
            return Ok(false);
        }
    }
    Ok(true)
}
