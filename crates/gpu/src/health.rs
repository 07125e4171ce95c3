//! How a device fares, as NVIDIA's management library (NVML) tells: memory, load, heat, power, clock, and hardware errors as they
//! happen. The library comes with the driver and is looked for when a program runs.

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;

/// What a device tells of itself. `None` is what it does not measure.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceFigures {
    /// Bytes that are taken, by this process or others.
    pub memory_used: u64,
    /// Bytes that are built in.
    pub memory_total: u64,
    /// Share of the last sampling period (up to a second) in which a kernel ran, 0 to 1. How much of the device it used is not
    /// in it.
    pub utilization: Option<f64>,
    /// Of the chip, in °C.
    pub temperature_celsius: Option<f64>,
    /// Power draw of the board, in watts.
    pub power_watts: Option<f64>,
    /// Clock of the multiprocessors, in Hz.
    pub sm_clock_hz: Option<f64>,
}

/// Something that happened to a device. Displays as a sentence with its cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// Nothing that it computes can be trusted any more, or it computes nothing any more.
    Fault(String),
    /// It goes on; somebody should know.
    Notice(String),
}

/// As [`DeviceFigures`], for which a test has no device.
trait Readings {
    /// Bytes used and in all.
    fn memory(&self) -> Result<[u64; 2], NvmlError>;
    /// Percent.
    fn utilization(&self) -> Result<u32, NvmlError>;
    /// °C.
    fn temperature(&self) -> Result<u32, NvmlError>;
    /// Milliwatts.
    fn power(&self) -> Result<u32, NvmlError>;
    /// MHz.
    fn sm_clock(&self) -> Result<u32, NvmlError>;
}

impl Readings for nvml_wrapper::Device<'_> {
    fn memory(&self) -> Result<[u64; 2], NvmlError> {
        let info = self.memory_info()?;
        Ok([info.used, info.total])
    }

    fn utilization(&self) -> Result<u32, NvmlError> {
        Ok(self.utilization_rates()?.gpu)
    }

    fn temperature(&self) -> Result<u32, NvmlError> {
        self.temperature(TemperatureSensor::Gpu)
    }

    fn power(&self) -> Result<u32, NvmlError> {
        self.power_usage()
    }

    fn sm_clock(&self) -> Result<u32, NvmlError> {
        self.clock_info(Clock::SM)
    }
}

impl DeviceFigures {
    fn read(device: &impl Readings) -> Result<Self, NvmlError> {
        let [memory_used, memory_total] = device.memory()?;
        let scaled = |reading: Result<u32, NvmlError>, unit: f64| match reading {
            Ok(value) => Ok(Some(f64::from(value) * unit)),
            // Consumer boards, virtual ones and parts of one (MIG) do not measure everything.
            Err(NvmlError::NotSupported | NvmlError::NoPermission) => Ok(None),
            Err(error) => Err(error),
        };
        Ok(Self {
            memory_used,
            memory_total,
            utilization: scaled(device.utilization(), 0.01)?,
            temperature_celsius: scaled(device.temperature(), 1.0)?,
            power_watts: scaled(device.power(), 1e-3)?,
            sm_clock_hz: scaled(device.sm_clock(), 1e6)?,
        })
    }
}

impl std::fmt::Display for DeviceFigures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let (used, total) = (gib(self.memory_used), gib(self.memory_total));
        write!(f, "{used:.1} of {total:.1} GiB taken")?;
        if let Some(share) = self.utilization {
            write!(f, ", busy {:.0} % of the time", 100.0 * share)?;
        }
        if let Some(celsius) = self.temperature_celsius {
            write!(f, ", {celsius:.0} °C")?;
        }
        if let Some(watts) = self.power_watts {
            write!(f, ", {watts:.0} W")?;
        }
        if let Some(hertz) = self.sm_clock_hz {
            write!(f, ", {:.0} MHz", hertz / 1e6)?;
        }
        Ok(())
    }
}

impl std::fmt::Display for DeviceEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::Fault(text) | Self::Notice(text)) = self;
        f.write_str(text)
    }
}

/// What an XID means, as NVIDIA's catalogue has it (docs.nvidia.com/deploy/xid-errors). Others are faults without a name.
const XIDS: &[(u64, &str)] = &[
    (48, "double-bit ECC error"),
    (61, "internal micro-controller breakpoint"),
    (62, "internal micro-controller halt"),
    (64, "row remapping failed"),
    (74, "NVLink error"),
    (79, "the GPU has fallen off the bus"),
    (94, "contained ECC error"),
    (95, "uncontained ECC error"),
    (119, "the GPU's system processor does not answer"),
    (120, "error of the GPU's system processor"),
    (140, "unrecovered ECC error"),
];

/// XIDs of a program's own doing, which may be another's on the same device: if it was this one, its next call fails and says so.
/// The list is that of NVIDIA's device plugin for Kubernetes, which does not call a device unhealthy for them either.
const OF_PROGRAMS: &[u64] = &[13, 31, 43, 45, 68, 109];

/// XIDs after which a device goes on computing right values: a row that will be remapped at the next reset, and many corrected
/// errors.
const RECORDED: &[u64] = &[63, 92];

impl DeviceEvent {
    /// `device` in words; `None` for an event that says nothing.
    fn of(device: &str, kind: EventTypes, xid: Option<&XidError>) -> Option<Self> {
        if kind.contains(EventTypes::DOUBLE_BIT_ECC_ERROR) {
            return Some(Self::fault(device, "an uncorrected ECC error"));
        }
        match xid? {
            XidError::Unknown => Some(Self::fault(device, "an XID that the driver does not know")),
            XidError::Value(xid) if OF_PROGRAMS.contains(xid) => Some(Self::Notice(format!(
                "{device}: XID {xid}, an error of a program that computes on it, not necessarily of this one"
            ))),
            XidError::Value(xid) if RECORDED.contains(xid) => Some(Self::Notice(format!(
                "{device}: XID {xid}: it goes on, but reset it when it is free (nvidia-smi --gpu-reset) and watch it"
            ))),
            XidError::Value(xid) => {
                let name = XIDS.iter().find(|(known, _)| known == xid);
                let what = match name {
                    Some((_, name)) => format!("XID {xid}, {name}"),
                    None => format!("XID {xid}"),
                };
                Some(Self::fault(device, &what))
            }
        }
    }

    fn fault(device: &str, what: &str) -> Self {
        Self::Fault(format!(
            "{device}: {what}: its results cannot be trusted; look into dmesg and nvidia-smi -q, then reset or replace it \
             before a worker starts on it again"
        ))
    }
}

#[cfg(feature = "cuda")]
pub use library::Health;

#[cfg(feature = "cuda")]
mod library {
    use std::time::Duration;

    use nvml_wrapper::bitmasks::event::EventTypes;
    use nvml_wrapper::error::NvmlError;
    use nvml_wrapper::event::EventSet;
    use nvml_wrapper::{Device, Nvml};

    use super::{DeviceEvent, DeviceFigures};
    use crate::{Gpu, GpuError};

    /// A device as its management library sees it. For one thread: waiting for events is not to be done by two.
    pub struct Health {
        name: String,
        device: Device<'static>,
        /// `None` where the device tells of no errors.
        events: Option<EventSet<'static>>,
    }

    impl Gpu {
        /// Its management. `None` where the driver came without that library, as in some containers.
        ///
        /// # Errors
        /// A library that is there and refuses.
        pub fn health(&self) -> Result<Option<Health>, GpuError> {
            let nvml = match Nvml::init() {
                Ok(nvml) => nvml,
                Err(NvmlError::LibloadingError(_)) => return Ok(None),
                Err(error) => return Err(refused("initialise NVML")(error)),
            };
            // Kept for good, as the device is.
            let nvml: &'static Nvml = Box::leak(Box::new(nvml));
            // The order of CUDA's devices is not that of NVML's, which also knows those that this process does not see.
            let address = self.pci_address()?;
            let device = nvml
                .device_by_pci_bus_id(address.as_str())
                .map_err(refused("find the device in NVML"))?;
            let events = events(nvml, &device).map_err(refused("watch for errors"))?;
            Ok(Some(Health {
                name: format!("GPU {address} ({})", self.facts().name),
                device,
                events,
            }))
        }
    }

    fn events(
        nvml: &'static Nvml,
        device: &Device<'static>,
    ) -> Result<Option<EventSet<'static>>, NvmlError> {
        let wanted = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
        let wanted = match device.supported_event_types() {
            Ok(supported) => wanted & supported,
            Err(NvmlError::NotSupported) => EventTypes::empty(),
            Err(error) => return Err(error),
        };
        if wanted.is_empty() {
            return Ok(None);
        }
        let registered = device.register_events(wanted, nvml.create_event_set()?);
        registered.map(Some).map_err(|refusal| refusal.error)
    }

    impl Health {
        /// What it tells now.
        ///
        /// # Errors
        /// A device that does not answer.
        pub fn figures(&self) -> Result<DeviceFigures, GpuError> {
            DeviceFigures::read(&self.device).map_err(refused("ask NVML"))
        }

        /// The next thing that happens to the device; `None` after `patience`.
        ///
        /// # Errors
        /// As [`Health::figures`].
        pub fn wait(&self, patience: Duration) -> Result<Option<DeviceEvent>, GpuError> {
            let Some(events) = &self.events else {
                std::thread::sleep(patience);
                return Ok(None);
            };
            let milliseconds = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
            match events.wait(milliseconds) {
                Ok(event) => Ok(DeviceEvent::of(
                    &self.name,
                    event.event_type,
                    event.event_data.as_ref(),
                )),
                Err(NvmlError::Timeout) => Ok(None),
                Err(NvmlError::GpuLost) => {
                    let what = "it has fallen off the bus";
                    Ok(Some(DeviceEvent::fault(&self.name, what)))
                }
                Err(error) => Err(refused("wait for NVML's events")(error)),
            }
        }
    }

    fn refused(call: &'static str) -> impl Fn(NvmlError) -> GpuError {
        move |error| GpuError::Driver {
            call,
            reason: error.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Readings of a device; `None` refuses as `refusal` says.
    struct Board {
        memory: Option<[u64; 2]>,
        others: [Option<u32>; 4],
        refusal: fn() -> NvmlError,
    }

    impl Board {
        fn other(&self, index: usize) -> Result<u32, NvmlError> {
            self.others[index].ok_or_else(self.refusal)
        }
    }

    impl Readings for Board {
        fn memory(&self) -> Result<[u64; 2], NvmlError> {
            self.memory.ok_or_else(self.refusal)
        }
        fn utilization(&self) -> Result<u32, NvmlError> {
            self.other(0)
        }
        fn temperature(&self) -> Result<u32, NvmlError> {
            self.other(1)
        }
        fn power(&self) -> Result<u32, NvmlError> {
            self.other(2)
        }
        fn sm_clock(&self) -> Result<u32, NvmlError> {
            self.other(3)
        }
    }

    #[test]
    fn figures_are_in_base_units() {
        let board = Board {
            memory: Some([3 << 30, 80 << 30]),
            others: [Some(97), Some(64), Some(612_345), Some(1755)],
            refusal: || NvmlError::Unknown,
        };
        let figures = DeviceFigures::read(&board).expect("figures");
        let expected = DeviceFigures {
            memory_used: 3 << 30,
            memory_total: 80 << 30,
            utilization: Some(0.97),
            temperature_celsius: Some(64.0),
            power_watts: Some(612.345),
            sm_clock_hz: Some(1.755e9),
        };
        assert_eq!(figures, expected);
        let text = "3.0 of 80.0 GiB taken, busy 97 % of the time, 64 °C, 612 W, 1755 MHz";
        assert_eq!(figures.to_string(), text);
    }

    #[test]
    fn what_a_board_does_not_measure_is_left_out_and_one_that_is_gone_is_an_error() {
        let mut board = Board {
            memory: Some([1 << 30, 8 << 30]),
            others: [None, Some(50), None, None],
            refusal: || NvmlError::NotSupported,
        };
        let figures = DeviceFigures::read(&board).expect("figures");
        assert_eq!(figures.to_string(), "1.0 of 8.0 GiB taken, 50 °C");
        board.refusal = || NvmlError::GpuLost;
        assert!(DeviceFigures::read(&board).is_err());
        board.others = [Some(0); 4];
        board.memory = None;
        assert!(DeviceFigures::read(&board).is_err());
    }

    #[test]
    fn hardware_errors_are_faults_and_those_of_programs_are_not() {
        let of = |xid: u64| {
            let xid = XidError::Value(xid);
            DeviceEvent::of("GPU 0", EventTypes::CRITICAL_XID_ERROR, Some(&xid)).expect("an event")
        };
        for xid in [48, 62, 64, 74, 79, 94, 95, 119, 140, 12_345] {
            let event = of(xid);
            assert!(matches!(event, DeviceEvent::Fault(_)), "{xid}: {event:?}");
            assert!(event.to_string().contains(&format!("XID {xid}")), "{event}");
        }
        for xid in OF_PROGRAMS.iter().chain(RECORDED) {
            let event = of(*xid);
            assert!(matches!(event, DeviceEvent::Notice(_)), "{xid}: {event:?}");
        }
        assert!(of(79).to_string().contains("fallen off the bus"));
        let unknown = DeviceEvent::of(
            "GPU 0",
            EventTypes::CRITICAL_XID_ERROR,
            Some(&XidError::Unknown),
        );
        assert!(matches!(unknown, Some(DeviceEvent::Fault(_))));
    }

    #[test]
    fn an_uncorrected_ecc_error_is_a_fault_without_an_xid_and_a_clock_change_is_nothing() {
        let ecc = DeviceEvent::of("GPU 0", EventTypes::DOUBLE_BIT_ECC_ERROR, None);
        assert!(matches!(ecc, Some(DeviceEvent::Fault(_))));
        let clock = DeviceEvent::of("GPU 0", EventTypes::CLOCK_CHANGE, None);
        assert_eq!(clock, None);
    }
}
