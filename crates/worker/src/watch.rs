//! Watches the GPU beside training: says now and then how it fares, and stops this worker when the hardware fails.
//!
//! A thread that waits for a broken device may wait for ever, and nothing can wake it. So the watch tells the coordinator why, and
//! ends the process: a supervisor starts it again, or does not, and the job goes on without it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use gpu::{DeviceEvent, DeviceFigures, Gpu, GpuError, Health};

use crate::presence::Presence;
use crate::session::EXIT_TEMPORARY;

/// Between two lines about how the device fares.
const SAY: Duration = Duration::from_mins(1);

/// How long one wait for an event lasts.
const WAIT: Duration = Duration::from_secs(1);

/// How long telling the coordinator may take: the network may be behind, or gone.
const TELL: Duration = Duration::from_secs(2);

/// What a watch asks of a device; a test has none.
trait Watched {
    fn figures(&self) -> Result<DeviceFigures, GpuError>;
    fn wait(&self, patience: Duration) -> Result<Option<DeviceEvent>, GpuError>;
}

impl Watched for Health {
    fn figures(&self) -> Result<DeviceFigures, GpuError> {
        Health::figures(self)
    }

    fn wait(&self, patience: Duration) -> Result<Option<DeviceEvent>, GpuError> {
        Health::wait(self, patience)
    }
}

/// Whether the device has failed. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fault(Arc<Mutex<Option<String>>>);

impl Fault {
    /// Why the device cannot be used any more, if it cannot.
    pub(crate) fn reason(&self) -> Option<String> {
        let reason = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        reason.clone()
    }

    /// As [`Fault::reason`], for an error that may be the device's: its own word may come a moment later than what it broke.
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

    fn set(&self, reason: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert_with(|| reason.to_owned());
    }
}

/// Starts to watch `gpu`. Where its management cannot be had, it says so and watches nothing.
pub(crate) fn start(gpu: &'static Gpu, presence: &Presence, fault: &Fault) {
    let health = match gpu.health() {
        Ok(Some(health)) => health,
        Ok(None) => {
            return tracing::info!(
                "the GPU is not watched: libnvidia-ml.so.1 was not found; it comes with the driver"
            );
        }
        Err(error) => return tracing::warn!("the GPU is not watched: {error}"),
    };
    let (presence, fault) = (presence.clone(), fault.clone());
    let watching = std::thread::Builder::new().name("gpu watch".into());
    let watching = watching.spawn(move || {
        let Err(reason) = watch(&health, &fault) else {
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
fn watch(device: &impl Watched, fault: &Fault) -> Result<(), String> {
    let mut said: Option<Instant> = None;
    loop {
        if said.is_none_or(|said| said.elapsed() >= SAY) {
            said = Some(Instant::now());
            match device.figures() {
                Ok(figures) => tracing::info!("GPU: {figures}"),
                Err(error) => tracing::warn!("GPU: {error}"),
            }
        }
        match device.wait(WAIT) {
            Ok(None) => {}
            Ok(Some(DeviceEvent::Notice(text))) => tracing::warn!("{text}"),
            Ok(Some(DeviceEvent::Fault(reason))) => {
                fault.set(&reason);
                return Err(reason);
            }
            Err(error) => {
                tracing::warn!("the GPU is not watched any more: {error}");
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What a device tells, one after the other; then it refuses.
    struct Script(RefCell<Vec<DeviceEvent>>);

    impl Watched for Script {
        fn figures(&self) -> Result<DeviceFigures, GpuError> {
            Ok(DeviceFigures::default())
        }

        fn wait(&self, _: Duration) -> Result<Option<DeviceEvent>, GpuError> {
            let mut events = self.0.borrow_mut();
            if events.is_empty() {
                return Err(GpuError::NoDriver);
            }
            Ok(Some(events.remove(0)))
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
        let (script, fault) = (Script(RefCell::new(script)), Fault::default());
        assert_eq!(fault.reason(), None);
        assert_eq!(watch(&script, &fault), Err("XID 79".into()));
        assert_eq!(fault.reason().as_deref(), Some("XID 79"));
        assert_eq!(script.0.borrow().len(), 2, "nothing is heard after it");
    }

    #[test]
    fn management_that_refuses_ends_the_watch_and_nothing_else() {
        let fault = Fault::default();
        assert_eq!(watch(&Script(RefCell::default()), &fault), Ok(()));
        assert_eq!(fault.reason_of(Duration::ZERO), None);
    }

    #[test]
    fn a_fault_that_comes_after_its_consequence_is_still_its_reason() {
        let fault = Fault::default();
        let later = fault.clone();
        let telling = std::thread::spawn(move || later.set("XID 95"));
        assert_eq!(
            fault.reason_of(Duration::from_secs(30)).as_deref(),
            Some("XID 95")
        );
        telling.join().expect("told");
    }
}
