//! How a rank's work moves, for whoever wonders whether it still does: written by training, read by another thread at any time.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// Kinds of work, by whose fault it is when it stands still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Work {
    /// Of no known length, such as writing to a disk.
    #[default]
    Untold,
    /// Its own: nobody else holds it up.
    Computes,
    /// A collective: any peer may hold it up.
    Exchanges,
    /// It waits to be told what is next.
    Waits,
}

/// A rank's pulse. Parts are read one by one, so a reader may see a new step with the work before it for a moment.
#[derive(Debug, Default)]
pub struct Pulse {
    step: AtomicU64,
    work: AtomicU8,
    moves: AtomicU64,
}

impl Pulse {
    /// The step that it is about, 0 outside of steps; the kind of work; and a count that goes up as it moves on: packs, buckets.
    pub fn read(&self) -> (u64, Work, u64) {
        let work = match self.work.load(Relaxed) {
            1 => Work::Computes,
            2 => Work::Exchanges,
            3 => Work::Waits,
            _ => Work::Untold,
        };
        (self.step.load(Relaxed), work, self.moves.load(Relaxed))
    }

    pub(crate) fn about(&self, step: u64) {
        self.step.store(step, Relaxed);
    }

    pub(crate) fn turn_to(&self, work: Work) {
        self.work.store(work as u8, Relaxed);
        self.tick();
    }

    pub(crate) fn tick(&self) {
        self.moves.fetch_add(1, Relaxed);
    }
}
