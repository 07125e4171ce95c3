//! The newest generation that each worker has spoken in: what it said in an older one is stale (invariant M1).
//!
//! The network may deliver a worker's words late, those of a former life of it among them. Members and spares are remembered,
//! and so are some that were either: names come and go for as long as a job runs. Of a worker that was forgotten an old word is
//! taken for a new one; it is not believed for that, since whoever is named for what it does not hold refuses the Form.

use std::collections::BTreeMap;

use crate::{Generation, Incarnation};

/// Workers that are remembered although the job does not have them any more.
pub(super) const GONE_MAX: usize = 1024;

#[derive(Default)]
pub(super) struct Spoken {
    newest: BTreeMap<Incarnation, Generation>,
}

impl Spoken {
    pub(super) fn new(newest: BTreeMap<Incarnation, Generation>) -> Self {
        Self { newest }
    }

    /// Whether a worker has said newer things than what it says in `generation`; otherwise this is now the newest.
    pub(super) fn is_stale(&mut self, incarnation: Incarnation, generation: Generation) -> bool {
        let newest = self.newest.get(&incarnation).copied().unwrap_or_default();
        // Nothing is older than 0, and most who come and go never get further: they are not kept.
        if generation > newest {
            self.newest.insert(incarnation, generation);
        }
        generation < newest
    }

    /// How many are remembered.
    pub(super) fn len(&self) -> usize {
        self.newest.len()
    }

    /// Forgets those who spoke in the oldest generations of all that are not `here`, down to half of [`GONE_MAX`].
    pub(super) fn forget(&mut self, here: impl Fn(&Incarnation) -> bool) {
        let gone = self.newest.iter().filter(|(it, _)| !here(it));
        let mut gone: Vec<_> = gone.map(|(it, generation)| (*generation, *it)).collect();
        gone.sort_unstable();
        gone.truncate(gone.len().saturating_sub(GONE_MAX / 2));
        for (_, incarnation) in gone {
            self.newest.remove(&incarnation);
        }
    }
}
