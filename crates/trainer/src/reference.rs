//! The reference pass: log-probs of the frozen model, one per distinct (prompt, completion), computed once by whichever rank
//! owns its place in the list, kept in the store for every later run (R1).

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use collective::shard_range;
use data::Pair;
use model::{Model, Pack, PairTokens};
use refcache::{Compaction, EntryKey, Store, StoreError, sample, shared_folder};
use serde::Serialize;
use spec::Spec;

use crate::error::TrainError;
use crate::lanes::Lanes;
use crate::scope::scope;
use crate::setup::{Progress, Setup, model_digest};

/// The phase's name in progress reports.
const PHASE: &str = "reference pass";
/// Computed values are made durable after so many of them, or so long: what a crash may cost against the price of a sync.
const APPEND_ENTRIES: usize = 256;
const APPEND_SECONDS: u64 = 5;

/// What this rank's part of the reference pass came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReferenceCounts {
    /// Values found in the store.
    pub reused: u64,
    /// Values computed.
    pub computed: u64,
}

/// The opened store of a run that needs a reference.
pub(crate) struct References {
    store: Store,
    folder: PathBuf,
    /// `reference.shared`.
    shared: Option<PathBuf>,
}

/// One completion that needs a value.
#[derive(Clone, Copy)]
struct Entry<'a> {
    pair: &'a Pair,
    completion: &'a [u32],
    key: EntryKey,
}

impl References {
    /// Opens the store of `setup`'s reference model and computes what is missing of this rank's slice, durably.
    pub fn make(
        setup: &Setup,
        rank: usize,
        world: usize,
        progress: Progress<'_>,
    ) -> Result<(Self, ReferenceCounts), TrainError> {
        let loaded = load_reference(setup)?;
        let (model, digest) = match &loaded {
            Some(model) => (model, model_digest(model)),
            None => (&setup.model, setup.digest),
        };
        let folder = setup.spec.reference.store.clone();
        let (store, torn) = Store::open(&folder, &scope(&setup.spec, digest, &setup.device))?;
        for tail in torn {
            tracing::warn!(store = %folder.display(), "{tail}");
        }
        let mut references = Self {
            store,
            folder,
            shared: setup.spec.reference.shared.clone(),
        };
        references.pull();
        let entries = entries(&[
            &setup.train.pairs,
            setup.held_out(),
            &setup.mismatched.train,
            &setup.mismatched.eval,
        ]);
        let slice = &entries[shard_range(entries.len(), world, rank)];
        let (mut found, mut missing) = (Vec::new(), Vec::new());
        for &entry in slice {
            match references.store.get(&entry.key)? {
                Some(value) => found.push((entry, value)),
                None => missing.push(entry),
            }
        }
        let micro_batch_tokens = setup.spec.train.micro_batch_tokens;
        references.verify(&found, setup.spec.reference.verify_samples, model)?;
        references.compute(&missing, micro_batch_tokens, model, progress)?;
        references.push();
        let counts = ReferenceCounts {
            reused: found.len() as u64,
            computed: missing.len() as u64,
        };
        Ok((references, counts))
    }

    /// Fetches what others have sent to `reference.shared`. It saves work and is no reason to stop: what is not there is computed.
    fn pull(&mut self) {
        let Some(shared) = &self.shared else {
            return;
        };
        let pulled = shared_folder(shared).and_then(|shared| self.store.pull(&shared));
        match pulled {
            Ok(pulled) => {
                for error in &pulled.refused {
                    tracing::warn!("reference.shared: {error}; remove it there");
                }
                if pulled.segments > 0 {
                    let (segments, bytes) = (pulled.segments, pulled.bytes);
                    tracing::info!(segments, bytes, "reference values were fetched");
                }
            }
            Err(error) => {
                tracing::warn!("reference.shared: {error}; nothing is fetched from there");
            }
        }
    }

    /// Sends what is sorted here to `reference.shared`, where too many segments become few.
    fn push(&mut self) {
        let Some(shared) = &self.shared else {
            return;
        };
        let pushed = shared_folder(shared).and_then(|shared| self.store.push(&shared));
        match pushed {
            Ok(pushed) if pushed.segments == 0 => {}
            Ok(pushed) => {
                let (segments, bytes) = (pushed.segments, pushed.bytes);
                tracing::info!(segments, bytes, "reference values were sent");
                match pushed.compaction {
                    Some(Ok(Compaction::Merged { segments, .. })) => {
                        tracing::info!(segments, "segments of reference.shared were merged");
                    }
                    Some(Err(error)) => {
                        tracing::warn!("reference.shared: {error}; its segments stay as many");
                    }
                    Some(Ok(_)) | None => {}
                }
            }
            Err(error) => {
                tracing::warn!("reference.shared: {error}; others compute these values again");
            }
        }
    }

    /// Reads what the other ranks stored and looks up all values of `pairs`, one list per list.
    pub fn collect<const N: usize>(
        mut self,
        pairs: [&[Pair]; N],
    ) -> Result<[Vec<[f64; 2]>; N], TrainError> {
        // Ranks on other machines may have sent theirs.
        self.pull();
        for tail in self.store.reload()? {
            tracing::warn!(store = %self.folder.display(), "{tail}");
        }
        let (mut missing, mut total) = (0, 0);
        let mut value = |pair: &Pair, completion: &[u32]| -> Result<f64, StoreError> {
            // Nothing is scored of an empty completion, as in the policy's log-probs.
            if completion.is_empty() {
                return Ok(0.0);
            }
            total += 1;
            let value = self.store.get(&EntryKey::new(&pair.prompt, completion))?;
            missing += usize::from(value.is_none());
            Ok(f64::from(value.unwrap_or(f32::NAN)))
        };
        let mut lists = [const { Vec::new() }; N];
        for (values, pairs) in lists.iter_mut().zip(pairs) {
            values.reserve_exact(pairs.len());
            for pair in pairs {
                values.push([value(pair, &pair.chosen)?, value(pair, &pair.rejected)?]);
            }
        }
        if missing > 0 {
            return Err(TrainError::ReferenceMissing {
                store: self.folder,
                missing,
                total,
            });
        }
        Ok(lists)
    }

    /// Computes `samples` of `found` again, other ones in each run: a store that was filled by another program or machine is
    /// refused before it spoils a run.
    fn verify(
        &self,
        found: &[(Entry<'_>, f32)],
        samples: usize,
        model: &Model,
    ) -> Result<(), TrainError> {
        // No value depends on which are chosen, and a disagreement names its pair, so the choice need not be repeatable.
        let seed = RandomState::new().hash_one(std::process::id());
        for index in sample(found.len(), samples, seed) {
            let (entry, stored) = found[index];
            let computed = model.forward(&pack(&[vec![entry]])).logps[0][0];
            if computed.to_bits() != stored.to_bits() {
                return Err(TrainError::StoreDisagrees {
                    store: self.folder.clone(),
                    place: entry.pair.place.to_string(),
                    stored,
                    computed,
                });
            }
        }
        Ok(())
    }

    fn compute(
        &self,
        missing: &[Entry<'_>],
        micro_batch_tokens: usize,
        model: &Model,
        progress: Progress<'_>,
    ) -> Result<(), TrainError> {
        let total = missing.len() as u64;
        progress(PHASE, 0, total)?;
        if missing.is_empty() {
            return Ok(());
        }
        let mut writer = self.store.writer()?;
        let (mut fresh, mut since) = (Vec::new(), Instant::now());
        let mut done = 0;
        let mut lanes = Lanes::new(model.device());
        let packs = packs(missing, lanes.pack_tokens(micro_batch_tokens));
        let tokens: Vec<usize> = packs.iter().map(|groups| pack_tokens(groups)).collect();
        let side_by_side = lanes.count(&tokens, micro_batch_tokens);
        let score = |index: usize| model.forward(&pack(&packs[index])).logps;
        let take = &mut |index: usize, logps: Vec<[f32; 2]>| {
            for (group, logps) in packs[index].iter().zip(logps) {
                for (entry, value) in group.iter().zip(logps) {
                    if !value.is_finite() {
                        return Err(TrainError::ReferenceNotFinite {
                            place: entry.pair.place.to_string(),
                            value,
                        });
                    }
                    fresh.push((entry.key, value));
                }
            }
            let due = since.elapsed() >= Duration::from_secs(APPEND_SECONDS);
            if fresh.len() >= APPEND_ENTRIES || due {
                writer.append(&fresh)?;
                done += fresh.len() as u64;
                progress(PHASE, done, total)?;
                (fresh, since) = (Vec::new(), Instant::now());
            }
            Ok(())
        };
        lanes.each(side_by_side, packs.len(), &score, take)?;
        writer.append(&fresh)?;
        if let Err(error) = writer.finish() {
            // Nothing is lost: the values are stored, but as they were appended, which takes longer to open.
            tracing::warn!(store = %self.folder.display(), "sort what was stored: {error}");
        }
        progress(PHASE, total, total)?;
        Ok(())
    }
}

/// Values that a reference pass computes, and the tokens that it reads for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReferenceAmount {
    /// Distinct completions.
    pub values: u64,
    /// Their tokens; neighbours share a prompt's.
    pub packed_tokens: u64,
}

impl ReferenceAmount {
    /// All values of a run.
    pub(crate) fn all(lists: &[&[Pair]]) -> Self {
        Self::of(&entries(lists))
    }

    /// The values of a run that its store does not have. `model` is the reference.
    ///
    /// # Errors
    /// A store that cannot be read.
    pub(crate) fn missing(
        spec: &Spec,
        model: &Model,
        lists: &[&[Pair]],
    ) -> Result<Self, StoreError> {
        let scope = scope(spec, model_digest(model), model.device());
        let store = Store::open_existing(&spec.reference.store, &scope)?;
        let mut entries = entries(lists);
        if let Some(store) = store {
            let mut missing = Vec::new();
            for entry in entries {
                if store.get(&entry.key)?.is_none() {
                    missing.push(entry);
                }
            }
            entries = missing;
        }
        Ok(Self::of(&entries))
    }

    fn of(entries: &[Entry<'_>]) -> Self {
        let groups = entries.chunk_by(|a, b| std::ptr::eq(a.pair, b.pair));
        Self {
            values: entries.len() as u64,
            packed_tokens: groups.map(tokens).sum::<usize>() as u64,
        }
    }
}

/// The reference weights, if they are not the starting weights.
fn load_reference(setup: &Setup) -> Result<Option<Model>, TrainError> {
    let Some(path) = &setup.spec.model.reference else {
        return Ok(None);
    };
    let model = Model::load_frozen(path, &setup.device, setup.model.precision())?;
    let (expected, found) = (setup.model.config().vocabulary, model.config().vocabulary);
    if expected != found {
        return Err(TrainError::ReferenceVocabulary {
            path: path.clone(),
            expected,
            found,
        });
    }
    Ok(Some(model))
}

/// Every distinct completion of the run's lists of pairs in the order of its first occurrence: the same list on all ranks.
fn entries<'a>(lists: &[&'a [Pair]]) -> Vec<Entry<'a>> {
    let mut seen = HashSet::new();
    let mut entries = Vec::new();
    for pair in lists.iter().copied().flatten() {
        for completion in [&pair.chosen, &pair.rejected] {
            let key = EntryKey::new(&pair.prompt, completion);
            if !completion.is_empty() && seen.insert(key) {
                entries.push(Entry {
                    pair,
                    completion,
                    key,
                });
            }
        }
    }
    entries
}

/// Neighbours of one pair share their prompt's rows, then groups fill packs of at most `capacity` tokens in order.
fn packs<'a>(entries: &[Entry<'a>], capacity: usize) -> Vec<Vec<Vec<Entry<'a>>>> {
    let mut packs: Vec<Vec<Vec<Entry<'a>>>> = Vec::new();
    let mut room = 0;
    for group in entries.chunk_by(|a, b| std::ptr::eq(a.pair, b.pair)) {
        let tokens = tokens(group);
        if packs.is_empty() || tokens > room {
            packs.push(Vec::new());
            room = capacity.max(tokens);
        }
        room -= tokens;
        let pack = packs.last_mut().expect("one was just opened");
        pack.push(group.to_vec());
    }
    packs
}

/// Tokens of a pack.
fn pack_tokens(groups: &[Vec<Entry<'_>>]) -> usize {
    groups.iter().map(|group| tokens(group)).sum()
}

/// Tokens of one pair's entries, which share its prompt.
fn tokens(group: &[Entry<'_>]) -> usize {
    let completions: usize = group.iter().map(|entry| entry.completion.len()).sum();
    group[0].pair.prompt.len() + completions
}

fn pack(groups: &[Vec<Entry<'_>>]) -> Pack {
    Pack::new(groups.iter().map(|group| PairTokens {
        prompt: &group[0].pair.prompt,
        chosen: group[0].completion,
        rejected: group.get(1).map_or(&[], |entry| entry.completion),
    }))
}
