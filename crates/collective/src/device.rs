//! Regions of device memory, as numbers: this file knows no library, so that it is there in every build.

use std::{any::Any, fmt, sync::Arc};

/// What a device region holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Gradients, weights, moments.
    F32,
    /// Norms, counts.
    F64,
    /// Weights to gather or to broadcast; sums are made in f32 or wider.
    Bf16,
    /// Opaque bytes, for [`crate::Op::Broadcast`] alone.
    Byte,
}

impl Element {
    /// Size of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
            Self::Bf16 => 2,
            Self::Byte => 1,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "device f32",
            Self::F64 => "device f64",
            Self::Bf16 => "device bf16",
            Self::Byte => "device bytes",
        }
    }
}

/// A `CUevent` of the device's primary context, as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventHandle(pub u64);

/// Memory of one GPU that an operation takes over and gives back.
///
/// # Order
/// The communicator has a stream of its own. Before it touches the region it waits, on the device, for the region's `ready`
/// event: record one after the kernels that fill the region, or leave it out if the host has already waited for them.
/// When [`crate::Collective::wait`] gives the region back, the operation has finished on the device as seen by the host, so
/// anything that is launched from then on sees its result, and `ready` is gone. Who wants to launch work behind an operation
/// without waiting for it on the host takes the operation's own event (`nccl::Nccl::event`).
///
/// # Lifetime
/// `keep` is whatever owns the memory. The operation holds it until the device has finished with the region, also after an
/// error, which may be long after `wait` has returned that error; if the device never lets go, `keep` is never dropped.
#[derive(Clone)]
pub struct DeviceRegion {
    address: u64,
    elements: usize,
    element: Element,
    ready: Option<EventHandle>,
    #[expect(dead_code, reason = "its drop is what it is for")]
    keep: Arc<dyn Any + Send + Sync>,
}

impl DeviceRegion {
    /// `elements` of device memory from `address` on, which an operation touches once `ready` has happened.
    ///
    /// # Safety
    /// `address` must be that of at least `elements` elements of memory of the device that the collective belongs to, aligned
    /// for them, which stay allocated as long as `keep` lives. Nothing else may access them while an operation has them:
    /// not even reads, since operations write in place. `ready` must be an event of the same device, which has been recorded
    /// and lives as long as `keep`.
    #[expect(unsafe_code, reason = "nobody can check an address of a device")]
    pub unsafe fn new(
        address: u64,
        elements: usize,
        element: Element,
        ready: Option<EventHandle>,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            address,
            elements,
            element,
            ready,
            keep,
        }
    }

    /// The first byte's address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// What the elements are.
    pub fn element(&self) -> Element {
        self.element
    }

    /// What must happen before the region may be touched.
    pub fn ready(&self) -> Option<EventHandle> {
        self.ready
    }

    #[cfg(feature = "nccl")]
    pub(crate) fn finished(self) -> Self {
        Self {
            ready: None,
            ..self
        }
    }
}

impl PartialEq for DeviceRegion {
    fn eq(&self, other: &Self) -> bool {
        (self.address, self.elements, self.element)
            == (other.address, other.elements, other.element)
    }
}

impl fmt::Debug for DeviceRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} at {:#x}",
            self.elements,
            self.element.name(),
            self.address
        )
    }
}
