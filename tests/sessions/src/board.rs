//! What all sessions write down: when generations reached whom, how long heartbeats took, what went wrong.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::bail;

/// Shared by all sessions.
#[derive(Default)]
pub(crate) struct Board(Mutex<Notes>);

/// What is known so far.
#[derive(Default)]
pub(crate) struct Notes {
    /// When the last worker said Join.
    pub(crate) joined: Option<Instant>,
    /// By generation, who has its Form.
    formed: BTreeMap<u64, Reached>,
    /// By generation, who has its Go.
    gone: BTreeMap<u64, Reached>,
    /// The last commit that anybody heard of.
    pub(crate) committed: u64,
    /// Times from Beat to its answer.
    beats: Vec<Duration>,
    /// What no session should see.
    pub(crate) wrong: Vec<String>,
}

/// How many workers something has reached.
#[derive(Clone, Copy)]
pub(crate) struct Reached {
    /// So many.
    workers: usize,
    /// The last of them then.
    pub(crate) at: Instant,
}

impl Board {
    pub(crate) fn notes(&self) -> MutexGuard<'_, Notes> {
        // Plain values: a task that panicked while it held them leaves them usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn joined(&self) {
        self.notes().joined = Some(Instant::now());
    }

    pub(crate) fn formed(&self, generation: u64) {
        reach(&mut self.notes().formed, generation);
    }

    pub(crate) fn gone(&self, generation: u64) {
        reach(&mut self.notes().gone, generation);
    }

    pub(crate) fn committed(&self, step: u64) {
        let mut notes = self.notes();
        notes.committed = notes.committed.max(step);
    }

    pub(crate) fn heard(&self, after: Duration) {
        self.notes().beats.push(after);
    }

    pub(crate) fn wrong(&self, what: String) {
        self.notes().wrong.push(what);
    }

    /// The heartbeats since this was last asked.
    pub(crate) fn take_beats(&self) -> Vec<Duration> {
        std::mem::take(&mut self.notes().beats)
    }

    /// Waits until a generation has reached `world` workers from `from` on; the generation, and when they had its Form and its Go.
    ///
    /// # Errors
    /// Not within `patience`.
    pub(crate) async fn generation(
        &self,
        from: u64,
        world: usize,
        patience: Duration,
    ) -> anyhow::Result<(u64, Reached, Reached)> {
        let start = Instant::now();
        loop {
            {
                let notes = self.notes();
                let whole = |(_, it): &(&u64, &Reached)| it.workers >= world;
                if let Some((generation, gone)) = notes.gone.range(from..).find(whole)
                    && let Some(formed) = notes.formed.get(generation)
                {
                    return Ok((*generation, *formed, *gone));
                }
                if start.elapsed() > patience {
                    let count = |reached: &BTreeMap<u64, Reached>| {
                        let last = reached.last_key_value();
                        last.map(|(generation, it)| (*generation, it.workers))
                    };
                    bail!(
                        "no generation of {world} workers began within {} s; the last Form (generation, workers): {:?}, the \
                         last Go: {:?}; {:?}",
                        patience.as_secs(),
                        count(&notes.formed),
                        count(&notes.gone),
                        notes.wrong.first(),
                    );
                }
            }
            // Times are taken where messages arrive: this only notices.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn reach(by_generation: &mut BTreeMap<u64, Reached>, generation: u64) {
    let at = Instant::now();
    let reached = by_generation
        .entry(generation)
        .or_insert(Reached { workers: 0, at });
    reached.workers += 1;
    reached.at = at;
}
