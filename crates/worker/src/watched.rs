//! What is known of this worker's GPU: how it fares, and whether it has failed. On the CPU nothing ever is.

use std::sync::{Arc, Mutex, PoisonError};
#[cfg(any(feature = "cuda", test))]
use std::time::{Duration, Instant};

use protocol::GpuFigures;

/// Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watched(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    #[cfg(any(feature = "cuda", test))]
    fault: Option<String>,
    figures: GpuFigures,
}

impl Watched {
    /// The newest figures.
    pub(crate) fn figures(&self) -> GpuFigures {
        self.known(|known| known.figures)
    }

    fn known<T>(&self, look: impl FnOnce(&mut Known) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(any(feature = "cuda", test))]
impl Watched {
    pub(crate) fn tell(&self, figures: GpuFigures) {
        self.known(|known| known.figures = figures);
    }

    /// The device cannot be used any more. The first reason counts.
    pub(crate) fn fail(&self, reason: &str) {
        self.known(|known| known.fault.get_or_insert_with(|| reason.to_owned()).clone());
    }

    /// Why the device cannot be used any more, if it cannot.
    pub(crate) fn reason(&self) -> Option<String> {
        self.known(|known| known.fault.clone())
    }

    /// As [`Watched::reason`], for an error that may be the device's: its own word may come a moment later than what it broke.
    pub(crate) fn reason_of(&self, patience: Duration) -> Option<String> {
        let start = Instant::now();
        loop {
            let reason = self.reason();
            if reason.is_some() || start.elapsed() >= patience {
                return reason;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_that_comes_after_its_consequence_is_still_its_reason() {
        let watched = Watched::default();
        assert_eq!(watched.reason_of(Duration::ZERO), None);
        let later = watched.clone();
        let telling = std::thread::spawn(move || later.fail("XID 95"));
        let reason = watched.reason_of(Duration::from_secs(30));
        assert_eq!(reason.as_deref(), Some("XID 95"));
        telling.join().expect("told");
        watched.fail("XID 31");
        assert_eq!(watched.reason().as_deref(), Some("XID 95"));
    }

    #[test]
    fn the_newest_figures_count() {
        let watched = Watched::default();
        assert_eq!(watched.figures(), GpuFigures::default());
        let figures = GpuFigures {
            power_watts: Some(300.0),
            ..GpuFigures::default()
        };
        watched.clone().tell(figures);
        assert_eq!(watched.figures(), figures);
    }
}
