//! Memory that is lent to a collective.

use std::sync::Arc;

use collective::{DeviceRegion, EventHandle};
use cudarc::driver::result::event;
use cudarc::driver::sys;

use crate::{Element, Gpu, GpuError, View};

/// What a collective holds of a view until the device has finished with it.
struct Lent {
    _view: View,
    gpu: &'static Gpu,
    event: sys::CUevent,
}

// SAFETY: an event may be used from any thread whose context is the device's.
unsafe impl Send for Lent {}
// SAFETY: as above; it is only destroyed.
unsafe impl Sync for Lent {}

impl Drop for Lent {
    fn drop(&mut self) {
        self.gpu.bind();
        // SAFETY: made by `View::region`, destroyed once; the driver keeps what still waits for it.
        let destroyed = unsafe { event::destroy(self.event) };
        // A device that failed says so where its work is waited for.
        let _ = destroyed;
    }
}

impl View {
    /// The view as a region of a collective, which touches it after all work that was asked for before. Until the collective gives
    /// it back nobody may use these elements: this is a border like [`crate::Launch`], at which the caller has to be right.
    ///
    /// # Errors
    /// A device that stopped working.
    pub fn region(&self) -> Result<DeviceRegion, GpuError> {
        let gpu = self.gpu();
        gpu.bind();
        let event = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(GpuError::of("cuEventCreate"))?;
        let keep = Arc::new(Lent {
            _view: self.clone(),
            gpu,
            event,
        });
        // SAFETY: both are of this device, and live.
        unsafe { event::record(event, gpu.stream) }.map_err(GpuError::of("cuEventRecord"))?;
        let element = match self.element() {
            Element::F32 => collective::Element::F32,
            Element::Bf16 => collective::Element::Bf16,
        };
        let ready = Some(EventHandle(event as u64));
        // SAFETY: the view's own elements, which `keep` keeps like the event; who else touches them is the caller's business.
        Ok(unsafe { DeviceRegion::new(self.pointer(), self.len(), element, ready, keep) })
    }
}
