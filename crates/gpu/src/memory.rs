//! Memory of a device, allocated and freed in the order of its stream.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result as driver;

use crate::{Gpu, GpuError};

/// The type of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// IEEE single precision.
    F32,
    /// The upper half of a single.
    Bf16,
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Bytes of a device. Freed when dropped, after all work that was asked for before.
pub struct Memory {
    gpu: &'static Gpu,
    pointer: u64,
    bytes: usize,
    /// What it takes of the arena.
    size: usize,
}

/// Elements of a [`Memory`], which it keeps alive. Views of one memory may overlap; who writes is up to the caller.
#[derive(Clone)]
pub struct View {
    memory: Arc<Memory>,
    /// In bytes.
    offset: usize,
    len: usize,
    element: Element,
}

impl Gpu {
    /// `bytes` of memory that nothing was written to; at least one.
    ///
    /// # Errors
    /// A device without so much memory.
    pub fn allocate(&'static self, bytes: usize) -> Result<Memory, GpuError> {
        self.bind();
        let Some((pointer, size)) = self.arena.take(bytes)? else {
            let (free, total) = self.free_and_total()?;
            return Err(GpuError::Memory { bytes, free, total });
        };
        Ok(Memory {
            gpu: self,
            pointer,
            bytes,
            size,
        })
    }

    /// Bytes that can still be allocated, those that this process has taken and does not use included, and all that the device has.
    ///
    /// # Errors
    /// A device that stopped working.
    pub fn available_and_total(&self) -> Result<(usize, usize), GpuError> {
        let (free, total) = self.free_and_total()?;
        Ok((free + self.arena.idle(), total))
    }

    /// Gives the device back memory that this process does not use, as far as it lies together, when the device has come so far.
    ///
    /// # Errors
    /// What any work asked for before failed with.
    pub fn trim(&self) -> Result<(), GpuError> {
        self.synchronize()?;
        self.arena.trim()
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> usize {
        self.arena.used()
    }

    /// The most bytes that were in use at one time since [`Gpu::forget_peak`].
    pub fn peak_bytes(&self) -> usize {
        self.arena.peak()
    }

    /// Begins to look for the most bytes in use anew.
    pub fn forget_peak(&self) {
        self.arena.forget_peak();
    }
}

impl Memory {
    /// The device that has it.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// All of it as elements.
    pub fn view(self, element: Element) -> View {
        View {
            len: self.bytes / element.bytes(),
            memory: Arc::new(self),
            offset: 0,
            element,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.gpu.arena.give(self.pointer, self.size);
    }
}

impl View {
    /// Elements that nothing was written to.
    ///
    /// # Errors
    /// A device without so much memory.
    pub fn empty(gpu: &'static Gpu, len: usize, element: Element) -> Result<Self, GpuError> {
        Ok(gpu.allocate(len * element.bytes())?.view(element))
    }

    /// A copy of `values`; what they are is up to `element`.
    ///
    /// # Errors
    /// A device without so much memory, or that stopped working.
    pub fn upload<T: Copy>(
        gpu: &'static Gpu,
        values: &[T],
        element: Element,
    ) -> Result<Self, GpuError> {
        let view = gpu.allocate(size_of_val(values))?.view(element);
        view.write(values)?;
        Ok(view)
    }

    /// Copies `values` here. They may be dropped at once: the driver has read pageable memory when the call returns.
    ///
    /// # Errors
    /// A device that stopped working.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn write<T: Copy>(&self, values: &[T]) -> Result<(), GpuError> {
        let gpu = self.memory.gpu;
        assert_eq!(size_of_val(values), self.bytes(), "bytes to write");
        if values.is_empty() {
            return Ok(());
        }
        gpu.bind();
        // SAFETY: as many bytes as the view has, in memory that it keeps alive.
        unsafe { driver::memcpy_htod_async(self.pointer(), values, gpu.stream) }
            .map_err(GpuError::of("cuMemcpyHtoDAsync"))
    }

    /// The values, when the device has come so far.
    ///
    /// # Errors
    /// What any work asked for before failed with.
    ///
    /// # Panics
    /// If the view is not made of whole `T`.
    pub fn download<T: Copy + Default>(&self) -> Result<Vec<T>, GpuError> {
        let gpu = self.memory.gpu;
        assert!(self.bytes().is_multiple_of(size_of::<T>()), "whole values");
        let mut values = vec![T::default(); self.bytes() / size_of::<T>()];
        if values.is_empty() {
            return Ok(values);
        }
        gpu.bind();
        // SAFETY: as many bytes as the view has; the wait keeps the vector from being read or moved before.
        unsafe { driver::memcpy_dtoh_async(&mut values, self.pointer(), gpu.stream) }
            .map_err(GpuError::of("cuMemcpyDtoHAsync"))?;
        gpu.synchronize()?;
        Ok(values)
    }

    /// Sets every byte to 0, which is 0 in every element type.
    ///
    /// # Errors
    /// A device that stopped working.
    pub fn clear(&self) -> Result<(), GpuError> {
        let gpu = self.memory.gpu;
        gpu.bind();
        if self.len == 0 {
            return Ok(());
        }
        // SAFETY: the view's own bytes.
        unsafe { driver::memset_d8_async(self.pointer(), 0, self.bytes(), gpu.stream) }
            .map_err(GpuError::of("cuMemsetD8Async"))
    }

    /// Copies `from`, of the same size, here.
    ///
    /// # Errors
    /// A device that stopped working.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn copy(&self, from: &Self) -> Result<(), GpuError> {
        assert_eq!(from.bytes(), self.bytes(), "bytes to copy");
        let gpu = self.memory.gpu;
        gpu.bind();
        if self.len == 0 {
            return Ok(());
        }
        // SAFETY: both have as many bytes, and outlive the copy in stream order.
        unsafe {
            driver::memcpy_dtod_async(self.pointer(), from.pointer(), self.bytes(), gpu.stream)
        }
        .map_err(GpuError::of("cuMemcpyDtoDAsync"))
    }

    /// Elements `range` of it.
    ///
    /// # Panics
    /// If it has fewer.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {} elements",
            self.len
        );
        Self {
            memory: self.memory.clone(),
            offset: self.offset + range.start * self.element.bytes(),
            len: range.len(),
            element: self.element,
        }
    }

    /// Its address on the device.
    pub fn pointer(&self) -> u64 {
        self.memory.pointer + self.offset as u64
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether nothing else holds its memory.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.memory) == 1
    }

    /// The type of its elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// The device that has it.
    pub fn gpu(&self) -> &'static Gpu {
        self.memory.gpu
    }

    fn bytes(&self) -> usize {
        self.len * self.element.bytes()
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { len, element, .. } = self;
        write!(
            formatter,
            "View({len} {element:?} at {:#x})",
            self.pointer()
        )
    }
}
