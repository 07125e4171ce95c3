//! A device's memory as one range of addresses that is backed as far as it is needed. What is freed may be used at once by what
//! is asked for next, because all work runs on one stream in order; so no call of the driver is needed for either, and parts of any
//! size grow together again, which keeps a pack of another length from needing memory of its own. Between two jobs the device gets
//! back what is free at the end of the range ([`Arena::trim`]): libraries allocate memory of their own.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;

use crate::GpuError;
use crate::spans::Spans;

/// The range grows by at least this.
const GROWTH_BYTES: usize = 64 << 20;

/// The memory of a device that this process has taken.
pub(crate) struct Arena {
    base: sys::CUdeviceptr,
    place: sys::CUmemLocation,
    /// What the driver hands out at a time.
    granularity: usize,
    range: Mutex<Range>,
}

/// What is behind the addresses, and who has it.
#[derive(Default)]
struct Range {
    spans: Spans,
    /// What the driver put behind them, in order: it takes back a whole one at a time.
    backing: Vec<Backing>,
}

struct Backing {
    size: usize,
    handle: sys::CUmemGenericAllocationHandle,
}

impl Arena {
    /// A range for a device with `memory` bytes, none of them taken yet.
    pub fn new(device: sys::CUdevice, memory: usize) -> Result<Self, GpuError> {
        let place = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: device,
        };
        let properties = properties(place);
        let (mut granularity, mut base) = (0, 0);
        // SAFETY: both calls write a number each. The range is kept for good.
        unsafe {
            sys::cuMemGetAllocationGranularity(
                &raw mut granularity,
                &raw const properties,
                sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
            )
            .result()
            .map_err(GpuError::of("cuMemGetAllocationGranularity"))?;
            let size = memory.next_multiple_of(granularity);
            sys::cuMemAddressReserve(&raw mut base, size, granularity, 0, 0)
                .result()
                .map_err(GpuError::of("cuMemAddressReserve"))?;
        }
        Ok(Self {
            base,
            place,
            granularity,
            range: Mutex::default(),
        })
    }

    /// The address and size of a part of at least `bytes`. `None` when the device has no more memory.
    pub fn take(&self, bytes: usize) -> Result<Option<(u64, usize)>, GpuError> {
        let size = Spans::rounded(bytes);
        let range = &mut *self.range();
        let spans = &mut range.spans;
        if let Some(offset) = spans.take(size) {
            return Ok(Some((self.base + offset as u64, size)));
        }
        let missing = spans.missing(size);
        let wished = missing.max(GROWTH_BYTES).next_multiple_of(self.granularity);
        // Near the end of a device's memory less than a comfortable step may be left, and enough.
        let least = missing.next_multiple_of(self.granularity);
        for growth in [wished, least] {
            if let Some(backing) = self.back(spans.end(), growth)? {
                range.backing.push(backing);
                spans.grow(growth);
                let offset = spans.take(size).expect("the range has grown by enough");
                return Ok(Some((self.base + offset as u64, size)));
            }
        }
        Ok(None)
    }

    /// Gives a part back.
    pub fn give(&self, pointer: u64, size: usize) {
        let offset = (pointer - self.base) as usize;
        self.range().spans.give(offset, size);
    }

    /// Gives the device back what is free at the end of the range. All work that used it must be done.
    pub fn trim(&self) -> Result<(), GpuError> {
        let range = &mut *self.range();
        while let Some(last) = range.backing.last()
            && last.size <= range.spans.free_end()
        {
            let Backing { size, handle } = *last;
            let at = self.base + (range.spans.end() - size) as u64;
            // From here on it is not used, whatever the driver says.
            range.backing.pop();
            range.spans.shrink(size);
            // SAFETY: one whole mapping, of which no part is in use, and its handle, which nothing else has.
            unsafe {
                sys::cuMemUnmap(at, size)
                    .result()
                    .map_err(GpuError::of("cuMemUnmap"))?;
                sys::cuMemRelease(handle)
                    .result()
                    .map_err(GpuError::of("cuMemRelease"))?;
            }
        }
        Ok(())
    }

    /// Bytes that are taken of the device and not in use.
    pub fn idle(&self) -> usize {
        let range = self.range();
        range.spans.end() - range.spans.used()
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.range().spans.used()
    }

    /// The most bytes in use at one time.
    pub fn peak(&self) -> usize {
        self.range().spans.peak()
    }

    /// As [`Spans::forget_peak`].
    pub fn forget_peak(&self) {
        self.range().spans.forget_peak();
    }

    fn range(&self) -> MutexGuard<'_, Range> {
        self.range.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts memory behind `size` bytes of the range from `offset`. None when the device has none left.
    fn back(&self, offset: usize, size: usize) -> Result<Option<Backing>, GpuError> {
        let properties = properties(self.place);
        let access = sys::CUmemAccessDesc {
            location: self.place,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let at = self.base + offset as u64;
        let mut handle = 0;
        // SAFETY: the part of the range is reserved and not backed yet; what is mapped stays so until `trim`, and the handle with it.
        unsafe {
            let created = sys::cuMemCreate(&raw mut handle, size, &raw const properties, 0);
            if created == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Ok(None);
            }
            created.result().map_err(GpuError::of("cuMemCreate"))?;
            // Past the reserved range: more than the device has.
            if sys::cuMemMap(at, size, 0, handle, 0).result().is_err() {
                let _ = sys::cuMemRelease(handle);
                return Ok(None);
            }
            sys::cuMemSetAccess(at, size, &raw const access, 1)
                .result()
                .map_err(GpuError::of("cuMemSetAccess"))?;
        }
        Ok(Some(Backing { size, handle }))
    }
}

fn properties(place: sys::CUmemLocation) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: place,
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}
