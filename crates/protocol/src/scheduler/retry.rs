//! How often a job was started, and whether it gets anywhere.

use crate::Step;

/// Attempts of one job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Attempts {
    started: u32,
    /// The furthest commit at which an attempt was lost.
    furthest: Step,
    /// Losses in a row that came no further.
    failures: u32,
}

impl Attempts {
    /// Of a job that an earlier life of the coordinator started so often.
    pub(super) fn recovered(started: u32) -> Self {
        Self {
            started,
            ..Self::default()
        }
    }

    pub(super) fn started(&mut self) {
        self.started += 1;
    }

    pub(super) fn count(self) -> u32 {
        self.started
    }

    /// An attempt was lost after `committed`. Returns how many in a row came no further: progress forgives.
    pub(super) fn failed_at(&mut self, committed: Step) -> u32 {
        if committed > self.furthest {
            self.furthest = committed;
            self.failures = 0;
        }
        self.failures += 1;
        self.failures
    }
}
