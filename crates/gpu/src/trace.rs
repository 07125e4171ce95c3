//! Where a device's time goes: every kernel and product between two events, summed by name.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::result as driver;
use cudarc::driver::sys;

use crate::{Gpu, GpuError};

/// Off unless asked for: two events for every launch cost as much as the launch.
#[derive(Default)]
pub(crate) struct Trace {
    on: AtomicBool,
    spans: Mutex<Vec<Span>>,
}

struct Span {
    name: String,
    operations: f64,
    ends: [sys::CUevent; 2],
}

/// What all launches of one name took together.
#[derive(Clone, Debug, PartialEq)]
pub struct Traced {
    /// The kernel, or the product's shape.
    pub name: String,
    /// Launches.
    pub launches: usize,
    /// Seconds on the device.
    pub seconds: f64,
    /// Operations of products; 0 of kernels.
    pub operations: f64,
}

impl Gpu {
    /// Begins to take times, or stops.
    pub fn trace(&self, on: bool) {
        self.trace.on.store(on, Ordering::Relaxed);
    }

    /// What was launched since tracing began or was last asked for, the longest first. Waits for the device.
    ///
    /// # Errors
    /// A device that stopped working.
    pub fn traced(&self) -> Result<Vec<Traced>, GpuError> {
        self.synchronize()?;
        let spans = std::mem::take(
            &mut *self
                .trace
                .spans
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let mut sums: BTreeMap<String, Traced> = BTreeMap::new();
        for Span {
            name,
            operations,
            ends: [start, end],
        } in spans
        {
            // SAFETY: both events were recorded by `timed`, and are used nowhere else.
            let milliseconds = unsafe {
                let elapsed = driver::event::elapsed(start, end);
                for event in [start, end] {
                    driver::event::destroy(event).map_err(GpuError::of("cuEventDestroy"))?;
                }
                elapsed.map_err(GpuError::of("cuEventElapsedTime"))?
            };
            let sum = sums.entry(name.clone()).or_insert(Traced {
                name,
                launches: 0,
                seconds: 0.0,
                operations: 0.0,
            });
            sum.launches += 1;
            sum.seconds += f64::from(milliseconds) / 1e3;
            sum.operations += operations;
        }
        let mut sums: Vec<_> = sums.into_values().collect();
        sums.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(sums)
    }

    /// Runs `work`, which launches something called `name`, between two events if tracing is on.
    pub(crate) fn timed<T>(
        &self,
        name: impl FnOnce() -> (String, f64),
        work: impl FnOnce() -> Result<T, GpuError>,
    ) -> Result<T, GpuError> {
        if !self.trace.on.load(Ordering::Relaxed) {
            return work();
        }
        let record = || {
            let event = driver::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
                .map_err(GpuError::of("cuEventCreate"))?;
            // SAFETY: the event was just made, and the stream lives as long as the process.
            unsafe { driver::event::record(event, self.stream) }
                .map_err(GpuError::of("cuEventRecord"))?;
            Ok(event)
        };
        let start = record()?;
        let done = work()?;
        let (name, operations) = name();
        let span = Span {
            name,
            operations,
            ends: [start, record()?],
        };
        self.trace
            .spans
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(span);
        Ok(done)
    }
}
