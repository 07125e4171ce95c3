//! Where a worker's time goes, by phase.

use std::time::Instant;

use serde::Serialize;

/// Seconds by phase; together the wall time of what they cover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Phases {
    /// Choosing pairs and packing them.
    pub data: f64,
    /// Forward through the blocks.
    pub forward: f64,
    /// The log-prob head, both ways.
    pub head: f64,
    /// Loss derivatives and backward through the blocks.
    pub backward: f64,
    /// Log-probs and gradients over the ranks, as far as they are not hidden behind the backward; the gradient's norm.
    pub reduce: f64,
    /// The optimizer, and weights over the ranks.
    pub update: f64,
    /// Scoring held-out pairs, writing samples.
    pub evaluate: f64,
    /// What training waits for a snapshot.
    pub checkpoint: f64,
    /// Waiting for the job's control.
    pub wait: f64,
}

impl Phases {
    /// Means over so many steps.
    pub(crate) fn over(self, steps: f64) -> Self {
        Self {
            data: self.data / steps,
            forward: self.forward / steps,
            head: self.head / steps,
            backward: self.backward / steps,
            reduce: self.reduce / steps,
            update: self.update / steps,
            evaluate: self.evaluate / steps,
            checkpoint: self.checkpoint / steps,
            wait: self.wait / steps,
        }
    }

    /// Adds the wall time of packs that went through the model side by side, divided as `packs` were busy.
    pub(crate) fn add_packs(&mut self, wall: f64, packs: &PackTimes) {
        let busy = packs.forward + packs.head + packs.backward;
        if busy <= 0.0 {
            self.forward += wall;
            return;
        }
        self.forward += wall * packs.forward / busy;
        self.head += wall * packs.head / busy;
        self.backward += wall * packs.backward / busy;
    }
}

/// Seconds that packs were on their way, summed over packs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PackTimes {
    pub forward: f64,
    pub head: f64,
    pub backward: f64,
}

impl PackTimes {
    /// Adds another pack's.
    pub fn add(&mut self, other: &Self) {
        self.forward += other.forward;
        self.head += other.head;
        self.backward += other.backward;
    }
}

/// Adds the time of `work` to `phase`.
pub(crate) fn timed<R>(phase: &mut f64, work: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = work();
    *phase += start.elapsed().as_secs_f64();
    result
}
