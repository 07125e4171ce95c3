//! A GPU as the communicators of this crate use it, and memory for callers who have no CUDA library of their own.

use std::sync::Arc;

use super::{
    ffi::{Context, Event, Memory, Stream},
    load::Driver,
};
use crate::{CollectiveError, DeviceRegion, Element};

/// The primary context of one GPU, which all libraries of a process share.
#[derive(Clone)]
pub struct Device {
    driver: Driver,
    ordinal: usize,
    context: Context,
}

impl Device {
    /// Device number `ordinal` among those that this process sees (`CUDA_VISIBLE_DEVICES`).
    ///
    /// # Errors
    /// The driver's, such as no such device.
    pub fn open(driver: Driver, ordinal: usize) -> Result<Self, CollectiveError> {
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let context = Context::retain(driver.table(), number);
        let context = context.map_err(|code| CollectiveError::Local {
            what: format!("open CUDA device {ordinal}"),
            cause: driver.explain(code),
        })?;
        Ok(Self {
            driver,
            ordinal,
            context,
        })
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Memory for `bytes`, whose content is unspecified.
    ///
    /// # Errors
    /// The driver's, such as too little memory.
    pub fn allocate(&self, bytes: usize) -> Result<Buffer, CollectiveError> {
        let failed = |code| self.failed("allocate device memory", code);
        Ok(Buffer {
            device: self.clone(),
            stream: Stream::new(&self.context).map_err(failed)?,
            memory: Arc::new(Memory::new(&self.context, bytes).map_err(failed)?),
        })
    }

    pub(super) fn context(&self) -> &Context {
        &self.context
    }

    pub(super) fn explain(&self, code: i32) -> String {
        self.driver.explain(code)
    }

    fn failed(&self, what: &str, code: i32) -> CollectiveError {
        CollectiveError::Local {
            what: format!("{what} on CUDA device {}", self.ordinal),
            cause: self.explain(code),
        }
    }
}

/// Device memory with a stream to fill and to read it. Its accesses wait for the host, so it serves tests and small values; the
/// order of its own accesses and of operations on its regions is the caller's to keep: no access between `start` and `wait`.
pub struct Buffer {
    device: Device,
    stream: Stream,
    memory: Arc<Memory>,
}

impl Buffer {
    /// Writes the first bytes, and waits for it.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If there are more bytes than memory.
    pub fn write(&self, bytes: &[u8]) -> Result<(), CollectiveError> {
        let written = self.stream.write(&self.memory, bytes);
        written.map_err(|code| self.device.failed("write memory", code))
    }

    /// Reads the first bytes, and waits for it.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If there are more bytes than memory.
    pub fn read(&self, bytes: &mut [u8]) -> Result<(), CollectiveError> {
        let read = self.stream.read(&self.memory, bytes);
        read.map_err(|code| self.device.failed("read memory", code))
    }

    /// The first `elements` as a region, which keeps the memory.
    ///
    /// # Panics
    /// If the memory is smaller than that.
    pub fn region(&self, elements: usize, element: Element) -> DeviceRegion {
        self.memory.region(elements, element, None)
    }

    /// As [`Buffer::region`], to be touched once everything that is on the buffer's stream now has happened.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the memory is smaller than that.
    pub fn region_when_ready(
        &self,
        elements: usize,
        element: Element,
    ) -> Result<DeviceRegion, CollectiveError> {
        let event = Event::new(self.device.context()).and_then(|event| {
            event.record(&self.stream)?;
            Ok(event)
        });
        let event = event.map_err(|code| self.device.failed("record an event", code))?;
        let event = Some(Arc::new(event));
        Ok(self.memory.region(elements, element, event))
    }
}
