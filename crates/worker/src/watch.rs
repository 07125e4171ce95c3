//! Watches the GPU beside training: says now and then how it fares, and stops this worker when the hardware fails, or a thread
//! stays inside its libraries.
//!
//! A thread that waits for a broken device may wait for ever, and nothing can wake it. So the watch tells the coordinator why, and
//! ends the process: a supervisor starts it again, or does not, and the job goes on without it.

use std::time::{Duration, Instant};

use gpu::{DeviceEvent, DeviceFigures, Gpu, GpuError, Health};
use protocol::GpuFigures;

use crate::presence::Presence;
use crate::session::EXIT_TEMPORARY;
use crate::watched::Watched;

/// Between two lines about how the device fares.
const SAY: Duration = Duration::from_mins(1);

/// How long one wait for an event lasts.
const WAIT: Duration = Duration::from_secs(1);

/// How long telling the coordinator may take: the network may be behind, or gone.
const TELL: Duration = Duration::from_secs(2);

/// What a watch asks of a device; a test has none.
trait Board {
    fn figures(&self) -> Result<DeviceFigures, GpuError>;
    fn wait(&self, patience: Duration) -> Result<Option<DeviceEvent>, GpuError>;
    /// Whether a thread is stuck in one of the device's libraries.
    fn has_left_a_thread(&self) -> bool;
}

impl Board for Health {
    fn figures(&self) -> Result<DeviceFigures, GpuError> {
        Health::figures(self)
    }

    fn wait(&self, patience: Duration) -> Result<Option<DeviceEvent>, GpuError> {
        Health::wait(self, patience)
    }

    fn has_left_a_thread(&self) -> bool {
        collective::nccl::has_left_a_thread()
    }
}

/// Starts to watch `gpu`. Where its management cannot be had, it says so and watches nothing.
pub(crate) fn start(gpu: &'static Gpu, presence: &Presence, watched: &Watched) {
    let health = match gpu.health() {
        Ok(Some(health)) => health,
        Ok(None) => {
            return tracing::info!(
                "the GPU is not watched: libnvidia-ml.so.1 was not found; it comes with the driver"
            );
        }
        Err(error) => return tracing::warn!("the GPU is not watched: {error}"),
    };
    let (presence, watched) = (presence.clone(), watched.clone());
    let watching = std::thread::Builder::new().name("gpu watch".into());
    let watching = watching.spawn(move || {
        let Err(reason) = watch(&health, &watched) else {
            return;
        };
        tracing::error!("{reason}");
        presence.fail(reason, TELL);
        std::process::exit(i32::from(EXIT_TEMPORARY));
    });
    if let Err(error) = watching {
        tracing::warn!("the GPU is not watched: start a thread: {error}");
    }
}

/// Watches until a fault, which is the error, or until the device's management is of no more use.
fn watch(device: &impl Board, watched: &Watched) -> Result<(), String> {
    let mut said: Option<Instant> = None;
    loop {
        let say = said.is_none_or(|said| said.elapsed() >= SAY);
        match device.figures() {
            Ok(figures) => {
                watched.tell(to_protocol(&figures));
                if say {
                    tracing::info!("GPU: {figures}");
                }
            }
            Err(error) if say => tracing::warn!("GPU: {error}"),
            Err(_) => {}
        }
        if say {
            said = Some(Instant::now());
        }
        if device.has_left_a_thread() {
            let reason = "a thread is stuck inside NCCL or CUDA, with memory of the GPU: only a new process helps";
            watched.fail(reason);
            return Err(reason.into());
        }
        match device.wait(WAIT) {
            Ok(None) => {}
            Ok(Some(DeviceEvent::Notice(text))) => tracing::warn!("{text}"),
            Ok(Some(DeviceEvent::Fault(reason))) => {
                watched.fail(&reason);
                return Err(reason);
            }
            Err(error) => {
                tracing::warn!("the GPU is not watched any more: {error}");
                return Ok(());
            }
        }
    }
}

fn to_protocol(figures: &DeviceFigures) -> GpuFigures {
    GpuFigures {
        mfu: None,
        memory_gib: Some(figures.memory_used as f64 / f64::from(1 << 30)),
        utilization: figures.utilization,
        temperature_celsius: figures.temperature_celsius,
        power_watts: figures.power_watts,
        sm_clock_mhz: figures.sm_clock_hz.map(|hertz| hertz / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What a device tells, one after the other; then it refuses, or a thread is stuck.
    #[derive(Default)]
    struct Script {
        events: RefCell<Vec<DeviceEvent>>,
        ends_stuck: bool,
    }

    impl Board for Script {
        fn figures(&self) -> Result<DeviceFigures, GpuError> {
            Ok(DeviceFigures {
                memory_used: 3 << 29,
                sm_clock_hz: Some(1.2e9),
                ..DeviceFigures::default()
            })
        }

        fn wait(&self, _: Duration) -> Result<Option<DeviceEvent>, GpuError> {
            let mut events = self.events.borrow_mut();
            if events.is_empty() {
                return Err(GpuError::NoDriver);
            }
            Ok(Some(events.remove(0)))
        }

        fn has_left_a_thread(&self) -> bool {
            self.ends_stuck && self.events.borrow().is_empty()
        }
    }

    #[test]
    fn a_fault_ends_the_watch_with_its_reason_and_a_notice_does_not() {
        let notice = || DeviceEvent::Notice("XID 31".into());
        let script = vec![
            notice(),
            DeviceEvent::Fault("XID 79".into()),
            notice(),
            DeviceEvent::Fault("XID 48".into()),
        ];
        let script = Script {
            events: RefCell::new(script),
            ends_stuck: false,
        };
        let watched = Watched::default();
        assert_eq!(watched.reason(), None);
        assert_eq!(watch(&script, &watched), Err("XID 79".into()));
        assert_eq!(watched.reason().as_deref(), Some("XID 79"));
        let figures = watched.figures();
        assert_eq!(
            (figures.memory_gib, figures.sm_clock_mhz),
            (Some(1.5), Some(1200.0))
        );
        assert_eq!(script.events.borrow().len(), 2, "nothing is heard after it");
    }

    #[test]
    fn management_that_refuses_ends_the_watch_and_nothing_else() {
        let watched = Watched::default();
        assert_eq!(watch(&Script::default(), &watched), Ok(()));
        assert_eq!(watched.reason(), None);
    }

    #[test]
    fn a_thread_that_is_stuck_in_a_library_ends_the_watch() {
        let script = Script {
            events: RefCell::new(vec![DeviceEvent::Notice("XID 31".into())]),
            ends_stuck: true,
        };
        let watched = Watched::default();
        let reason = watch(&script, &watched).expect_err("stuck");
        assert!(reason.contains("stuck inside NCCL"), "{reason}");
        assert_eq!(watched.reason(), Some(reason));
        assert!(script.events.borrow().is_empty(), "heard before");
    }
}
