//! The functions of NCCL and of the CUDA driver that are used, and owners of what they make. The only file of the crate that
//! calls foreign code.
//!
//! - Tables of function pointers, looked up when a program runs. cudarc has such tables, but does not look for the file names
//!   that NCCL is shipped under, panics where a library is missing, and reads result codes as enums, for which a code that a
//!   newer library adds is undefined behaviour. Here every result is an `i32`.
//! - Handles are numbers in types of their own, so that no safe code can make one up; owners free what they made.
//! - Libraries stay loaded for good: threads of their own run inside them.
//!
//! What this file cannot see to, its callers in `engine` do: a region that NCCL was given stays untouched until the event behind
//! it has happened.

#![expect(unsafe_code, reason = "calls into NCCL and the CUDA driver")]

use std::{
    error::Error,
    ffi::{CStr, c_char, c_void},
    marker::PhantomData,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::id::UNIQUE_ID_BYTES;
use crate::{DeviceRegion, Element, EventHandle};

/// `ncclSuccess` and `CUDA_SUCCESS`.
pub(super) const SUCCESS: i32 = 0;
/// `ncclInProgress`.
pub(super) const IN_PROGRESS: i32 = 7;
/// `CUDA_ERROR_NOT_READY`.
pub(super) const NOT_READY: i32 = 600;

const SUM: i32 = 0;
const STREAM_NON_BLOCKING: u32 = 1;
const EVENT_DISABLE_TIMING: u32 = 2;

/// Why a library cannot be used.
#[derive(Debug)]
pub(super) enum Unusable {
    /// It cannot be loaded, in the loader's words.
    NotLoaded(String),
    /// It has no such function.
    Without(&'static str),
}

/// `ncclUniqueId`, which C passes by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawId([u8; UNIQUE_ID_BYTES]);

/// `ncclConfig_t` as of 2.18, whose number is in `version`: newer libraries read `size` bytes of it, and take their defaults for
/// fields that are younger than `version`.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: i32,
    cga_cluster_size: i32,
    min_ctas: i32,
    max_ctas: i32,
    net_name: usize,
    split_share: i32,
}

impl Config {
    const UNDEFINED: i32 = i32::MIN;

    fn non_blocking() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: super::version::OLDEST.code(),
            blocking: 0,
            cga_cluster_size: Self::UNDEFINED,
            min_ctas: Self::UNDEFINED,
            max_ctas: Self::UNDEFINED,
            net_name: 0,
            split_share: Self::UNDEFINED,
        }
    }
}

/// A table of the named functions of a library. Handles are `usize`, which is passed like the pointers they are.
macro_rules! table {
    ($name:ident { $($field:ident = $symbol:literal ($($argument:ty),*) -> $result:ty;)* }) => {
        pub(super) struct $name {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl $name {
            fn load(library: &'static libloading::Library) -> Result<Self, Unusable> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is the one that the library's header gives the function of this name, with enums
                        // as the `int` that they are in C and pointers as numbers of their size.
                        let symbol = unsafe { library.get($symbol) };
                        *symbol.map_err(|_| Unusable::Without($symbol))?
                    },)*
                })
            }
        }
    };
}

table! { NcclTable {
    get_version = "ncclGetVersion" (*mut i32) -> i32;
    get_unique_id = "ncclGetUniqueId" (*mut RawId) -> i32;
    comm_init = "ncclCommInitRankConfig" (*mut usize, i32, RawId, i32, *mut Config) -> i32;
    comm_get_async_error = "ncclCommGetAsyncError" (usize, *mut i32) -> i32;
    comm_abort = "ncclCommAbort" (usize) -> i32;
    comm_finalize = "ncclCommFinalize" (usize) -> i32;
    comm_destroy = "ncclCommDestroy" (usize) -> i32;
    all_reduce = "ncclAllReduce" (u64, u64, usize, i32, i32, usize, usize) -> i32;
    reduce_scatter = "ncclReduceScatter" (u64, u64, usize, i32, i32, usize, usize) -> i32;
    all_gather = "ncclAllGather" (u64, u64, usize, i32, usize, usize) -> i32;
    reduce = "ncclReduce" (u64, u64, usize, i32, i32, i32, usize, usize) -> i32;
    broadcast = "ncclBroadcast" (u64, u64, usize, i32, i32, usize, usize) -> i32;
    send = "ncclSend" (u64, usize, i32, i32, usize, usize) -> i32;
    receive = "ncclRecv" (u64, usize, i32, i32, usize, usize) -> i32;
    group_start = "ncclGroupStart" () -> i32;
    group_end = "ncclGroupEnd" () -> i32;
    get_error_string = "ncclGetErrorString" (i32) -> *const c_char;
    get_last_error = "ncclGetLastError" (usize) -> *const c_char;
} }

table! { CudaTable {
    init = "cuInit" (u32) -> i32;
    device_get_count = "cuDeviceGetCount" (*mut i32) -> i32;
    device_get = "cuDeviceGet" (*mut i32, i32) -> i32;
    primary_context_retain = "cuDevicePrimaryCtxRetain" (*mut usize, i32) -> i32;
    context_push = "cuCtxPushCurrent_v2" (usize) -> i32;
    context_pop = "cuCtxPopCurrent_v2" (*mut usize) -> i32;
    stream_priority_range = "cuCtxGetStreamPriorityRange" (*mut i32, *mut i32) -> i32;
    stream_create = "cuStreamCreateWithPriority" (*mut usize, u32, i32) -> i32;
    stream_destroy = "cuStreamDestroy_v2" (usize) -> i32;
    stream_wait_event = "cuStreamWaitEvent" (usize, u64, u32) -> i32;
    stream_synchronize = "cuStreamSynchronize" (usize) -> i32;
    event_create = "cuEventCreate" (*mut u64, u32) -> i32;
    event_destroy = "cuEventDestroy_v2" (u64) -> i32;
    event_record = "cuEventRecord" (u64, usize) -> i32;
    event_query = "cuEventQuery" (u64) -> i32;
    memory_allocate = "cuMemAlloc_v2" (*mut u64, usize) -> i32;
    memory_free = "cuMemFree_v2" (u64) -> i32;
    copy_to_device = "cuMemcpyHtoDAsync_v2" (u64, *const c_void, usize, usize) -> i32;
    copy_to_host = "cuMemcpyDtoHAsync_v2" (*mut c_void, u64, usize, usize) -> i32;
    get_error_string = "cuGetErrorString" (i32, *mut *const c_char) -> i32;
} }

/// Loads a library by path or by a name that the system's loader looks for. It stays loaded.
fn open(name: &Path) -> Result<&'static libloading::Library, Unusable> {
    // SAFETY: loading runs the library's initialisers; those of NCCL and of the CUDA driver may run on any thread.
    let library = unsafe { libloading::Library::new(name) };
    // Only the source has the loader's words.
    let library = library.map_err(|error| {
        Unusable::NotLoaded(match error.source() {
            Some(source) => source.to_string(),
            None => error.to_string(),
        })
    })?;
    Ok(Box::leak(Box::new(library)))
}

/// A C string that a library lent, or nothing.
fn text(string: *const c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: not null, and both libraries lend strings that end in a zero and stay as they are until the next call of the same
    // thread into them at least; it is copied before.
    unsafe { CStr::from_ptr(string) }
        .to_string_lossy()
        .trim()
        .into()
}

impl NcclTable {
    pub(super) fn open(name: &Path) -> Result<&'static Self, Unusable> {
        Ok(Box::leak(Box::new(Self::load(open(name)?)?)))
    }

    /// NCCL's number of its version, or the code of the error.
    pub(super) fn version(&self) -> Result<i32, i32> {
        let mut version = 0;
        // SAFETY: writes one int.
        done(unsafe { (self.get_version)(&raw mut version) }).map(|()| version)
    }

    pub(super) fn unique_id(&self) -> Result<[u8; UNIQUE_ID_BYTES], i32> {
        let mut id = RawId([0; UNIQUE_ID_BYTES]);
        // SAFETY: writes one id.
        done(unsafe { (self.get_unique_id)(&raw mut id) }).map(|()| id.0)
    }

    /// NCCL's words for a code.
    pub(super) fn error_string(&self, code: i32) -> String {
        // SAFETY: takes any number.
        text(unsafe { (self.get_error_string)(code) })
    }
}

fn done(code: i32) -> Result<(), i32> {
    if code == SUCCESS { Ok(()) } else { Err(code) }
}

/// A communicator. Dropping it does nothing: its owner aborts or destroys it.
pub(super) struct Comm {
    nccl: &'static NcclTable,
    handle: usize,
}

impl Comm {
    /// Begins to connect; [`Comm::state`] says how far it is. The device of the thread's current context is the rank's.
    pub(super) fn begin(
        nccl: &'static NcclTable,
        world: i32,
        id: &[u8; UNIQUE_ID_BYTES],
        rank: i32,
    ) -> Result<Self, i32> {
        // Leaked: some releases write it once more when they are connected, or have given up, on a thread of theirs.
        let slot: &'static AtomicUsize = Box::leak(Box::new(AtomicUsize::new(0)));
        let mut config = Config::non_blocking();
        // SAFETY: `slot` lives for ever; the configuration is read before the call returns, and says which of its fields exist.
        let code =
            unsafe { (nccl.comm_init)(slot.as_ptr(), world, RawId(*id), rank, &raw mut config) };
        let handle = slot.load(Ordering::Acquire);
        if handle == 0 {
            return Err(if code == SUCCESS { IN_PROGRESS } else { code });
        }
        let comm = Self { nccl, handle };
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(comm);
        }
        comm.abort();
        Err(code)
    }

    /// [`SUCCESS`], [`IN_PROGRESS`], or what has gone wrong meanwhile.
    pub(super) fn state(&self) -> i32 {
        let mut state = SUCCESS;
        // SAFETY: the handle is alive until `abort` or `destroy` take it; writes one int.
        let code = unsafe { (self.nccl.comm_get_async_error)(self.handle, &raw mut state) };
        if code == SUCCESS { state } else { code }
    }

    /// What NCCL has logged last for this communicator.
    pub(super) fn last_error(&self) -> String {
        // SAFETY: the handle is alive.
        text(unsafe { (self.nccl.get_last_error)(self.handle) })
    }

    /// Stops what runs, also on the device, and frees the communicator.
    pub(super) fn abort(self) -> i32 {
        // SAFETY: the handle is alive, and nobody can use it after this.
        unsafe { (self.nccl.comm_abort)(self.handle) }
    }

    /// Begins to leave in order; [`Comm::state`] says how far it is.
    pub(super) fn finalize(&self) -> i32 {
        // SAFETY: the handle is alive.
        unsafe { (self.nccl.comm_finalize)(self.handle) }
    }

    /// Frees the communicator after [`Comm::finalize`].
    pub(super) fn destroy(self) -> i32 {
        // SAFETY: the handle is alive, and nobody can use it after this.
        unsafe { (self.nccl.comm_destroy)(self.handle) }
    }

    pub(super) fn group_start(&self) -> i32 {
        // SAFETY: a counter of this thread.
        unsafe { (self.nccl.group_start)() }
    }

    pub(super) fn group_end(&self) -> i32 {
        // SAFETY: this thread's group; its communicator is alive.
        unsafe { (self.nccl.group_end)() }
    }

    /// In-place sums of a range at every rank.
    pub(super) fn all_reduce(
        &self,
        on: &Stream,
        region: &DeviceRegion,
        range: &Range<usize>,
    ) -> i32 {
        let (at, count, kind) = span(region, range);
        // SAFETY: the range lies in the region, whose memory its maker vouched for; handles are alive. So for the next four.
        unsafe { (self.nccl.all_reduce)(at, at, count, kind, SUM, self.handle, on.handle) }
    }

    /// In-place sums of parts of `count` elements, of which rank `rank` gets its own.
    pub(super) fn reduce_scatter(
        &self,
        on: &Stream,
        region: &DeviceRegion,
        rank: usize,
        count: usize,
    ) -> i32 {
        let (all, _, _) = span(region, &(0..region.elements()));
        let (own, count, kind) = span(region, &(rank * count..(rank + 1) * count));
        // SAFETY: as above; the parts of all ranks together are the region, which the plan divides by the world.
        unsafe { (self.nccl.reduce_scatter)(all, own, count, kind, SUM, self.handle, on.handle) }
    }

    /// In-place gather of parts of `count` elements, of which rank `rank` gives its own.
    pub(super) fn all_gather(
        &self,
        on: &Stream,
        region: &DeviceRegion,
        rank: usize,
        count: usize,
    ) -> i32 {
        let (all, _, _) = span(region, &(0..region.elements()));
        let (own, count, kind) = span(region, &(rank * count..(rank + 1) * count));
        // SAFETY: as for reduce-scatter.
        unsafe { (self.nccl.all_gather)(own, all, count, kind, self.handle, on.handle) }
    }

    /// In-place sums of a range at `root`.
    pub(super) fn reduce(
        &self,
        on: &Stream,
        region: &DeviceRegion,
        range: &Range<usize>,
        root: usize,
    ) -> i32 {
        let (at, count, kind) = span(region, range);
        let root = root as i32;
        // SAFETY: as for all-reduce.
        unsafe { (self.nccl.reduce)(at, at, count, kind, SUM, root, self.handle, on.handle) }
    }

    /// `root`'s range at all ranks.
    pub(super) fn broadcast(
        &self,
        on: &Stream,
        region: &DeviceRegion,
        range: &Range<usize>,
        root: usize,
    ) -> i32 {
        let (at, count, kind) = span(region, range);
        let root = root as i32;
        // SAFETY: as for all-reduce.
        unsafe { (self.nccl.broadcast)(at, at, count, kind, root, self.handle, on.handle) }
    }

    /// A range to rank `to`, which receives as many elements from this one in the same group.
    pub(super) fn send(
        &self,
        on: &Stream,
        region: &DeviceRegion,
        range: &Range<usize>,
        to: usize,
    ) -> i32 {
        let (at, count, kind) = span(region, range);
        // SAFETY: as for all-reduce.
        unsafe { (self.nccl.send)(at, count, kind, to as i32, self.handle, on.handle) }
    }

    /// A range from rank `from`, which sends as many elements to this one in the same group.
    pub(super) fn receive(
        &self,
        on: &Stream,
        region: &DeviceRegion,
        range: &Range<usize>,
        from: usize,
    ) -> i32 {
        let (at, count, kind) = span(region, range);
        // SAFETY: as for all-reduce.
        unsafe { (self.nccl.receive)(at, count, kind, from as i32, self.handle, on.handle) }
    }
}

/// Address, number of elements and `ncclDataType_t` of a range of a region.
fn span(region: &DeviceRegion, range: &Range<usize>) -> (u64, usize, i32) {
    let elements = region.elements();
    assert!(
        range.start <= range.end && range.end <= elements,
        "{range:?} of a region of {elements}"
    );
    let element = region.element();
    let kind = match element {
        Element::Byte => 1,
        Element::F32 => 7,
        Element::F64 => 8,
        Element::Bf16 => 9,
    };
    let offset = (range.start * element.bytes()) as u64;
    (region.address() + offset, range.len(), kind)
}

/// A device's primary context, which is everybody's in this process. It is kept for good, as others may use it too.
#[derive(Clone)]
pub(super) struct Context {
    cuda: &'static CudaTable,
    handle: usize,
}

impl CudaTable {
    pub(super) fn open(name: &Path) -> Result<&'static Self, Unusable> {
        Ok(Box::leak(Box::new(Self::load(open(name)?)?)))
    }

    /// The driver's words for a code.
    pub(super) fn error_string(&self, code: i32) -> String {
        let mut string = std::ptr::null();
        // SAFETY: writes one pointer, to a constant or null.
        if unsafe { (self.get_error_string)(code, &raw mut string) } != SUCCESS {
            return String::new();
        }
        text(string)
    }

    /// Number of devices.
    pub(super) fn devices(&self) -> Result<i32, i32> {
        let mut count = 0;
        // SAFETY: initialising twice is allowed; writes one int.
        done(unsafe { (self.init)(0) })?;
        done(unsafe { (self.device_get_count)(&raw mut count) }).map(|()| count)
    }
}

impl Context {
    /// The primary context of device number `ordinal`.
    pub(super) fn retain(cuda: &'static CudaTable, ordinal: i32) -> Result<Self, i32> {
        let (mut device, mut handle) = (0, 0);
        // SAFETY: each writes one value; the driver checks the number.
        unsafe {
            done((cuda.init)(0))?;
            done((cuda.device_get)(&raw mut device, ordinal))?;
            done((cuda.primary_context_retain)(&raw mut handle, device))?;
        }
        Ok(Self { cuda, handle })
    }

    /// Makes it this thread's until the answer is dropped. Threads of other libraries come back as they were.
    pub(super) fn enter(&self) -> Result<Entered, i32> {
        // SAFETY: the context is never released.
        done(unsafe { (self.cuda.context_push)(self.handle) })?;
        Ok(Entered {
            cuda: self.cuda,
            thread: PhantomData,
        })
    }

    /// Gives something back in the context; the code of whatever failed.
    fn leave(&self, give_back: impl FnOnce(&CudaTable) -> i32) -> i32 {
        match self.enter() {
            Ok(_entered) => give_back(self.cuda),
            Err(code) => code,
        }
    }
}

/// A thread's stay in a context, which no other thread can end.
pub(super) struct Entered {
    cuda: &'static CudaTable,
    thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut left = 0;
        // SAFETY: takes what `enter` put on this thread's stack of contexts.
        log_leak("context", unsafe { (self.cuda.context_pop)(&raw mut left) });
    }
}

/// A stream that waits for no other unless it is told to, of the highest priority.
pub(super) struct Stream {
    context: Context,
    handle: usize,
}

impl Stream {
    pub(super) fn new(context: &Context) -> Result<Self, i32> {
        let _entered = context.enter()?;
        let cuda = context.cuda;
        let (mut least, mut greatest, mut handle) = (0, 0, 0);
        // SAFETY: each writes its values; the context is current.
        unsafe {
            done((cuda.stream_priority_range)(
                &raw mut least,
                &raw mut greatest,
            ))?;
            done((cuda.stream_create)(
                &raw mut handle,
                STREAM_NON_BLOCKING,
                greatest,
            ))?;
        }
        Ok(Self {
            context: context.clone(),
            handle,
        })
    }

    /// Nothing that is put on the stream from now on begins before `event`.
    pub(super) fn wait_for(&self, event: EventHandle) -> Result<(), i32> {
        // SAFETY: the stream is alive; the event is ours, or its maker vouched for it.
        done(unsafe { (self.context.cuda.stream_wait_event)(self.handle, event.0, 0) })
    }

    /// Blocks until everything on the stream has happened.
    pub(super) fn synchronize(&self) -> Result<(), i32> {
        let _entered = self.context.enter()?;
        // SAFETY: the stream is alive.
        done(unsafe { (self.context.cuda.stream_synchronize)(self.handle) })
    }

    /// Copies to the start of `memory`, and waits for it.
    pub(super) fn write(&self, memory: &Memory, bytes: &[u8]) -> Result<(), i32> {
        assert!(
            bytes.len() <= memory.bytes,
            "{} in {}",
            bytes.len(),
            memory.bytes
        );
        let _entered = self.context.enter()?;
        let (from, copy) = (bytes.as_ptr().cast(), self.context.cuda.copy_to_device);
        // SAFETY: both sides have that many bytes and live until the copy has happened.
        done(unsafe { copy(memory.address, from, bytes.len(), self.handle) })?;
        self.synchronize()
    }

    /// Copies from the start of `memory`, and waits for it.
    pub(super) fn read(&self, memory: &Memory, bytes: &mut [u8]) -> Result<(), i32> {
        assert!(
            bytes.len() <= memory.bytes,
            "{} of {}",
            bytes.len(),
            memory.bytes
        );
        let _entered = self.context.enter()?;
        let (to, copy) = (bytes.as_mut_ptr().cast(), self.context.cuda.copy_to_host);
        // SAFETY: as for `write`.
        done(unsafe { copy(to, memory.address, bytes.len(), self.handle) })?;
        self.synchronize()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let code = self.context.leave(|cuda| {
            // SAFETY: alive, and nobody can use it after this. The driver keeps what is still on it.
            unsafe { (cuda.stream_destroy)(self.handle) }
        });
        log_leak("stream", code);
    }
}

/// An event without a clock.
pub(super) struct Event {
    context: Context,
    handle: u64,
}

impl Event {
    pub(super) fn new(context: &Context) -> Result<Self, i32> {
        let _entered = context.enter()?;
        let mut handle = 0;
        let create = context.cuda.event_create;
        // SAFETY: writes one handle; the context is current.
        done(unsafe { create(&raw mut handle, EVENT_DISABLE_TIMING) })?;
        Ok(Self {
            context: context.clone(),
            handle,
        })
    }

    pub(super) fn handle(&self) -> EventHandle {
        EventHandle(self.handle)
    }

    /// Happens when everything that is on `stream` now has.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), i32> {
        // SAFETY: both are alive.
        done(unsafe { (self.context.cuda.event_record)(self.handle, stream.handle) })
    }

    /// Whether it has happened.
    pub(super) fn has_happened(&self) -> Result<bool, i32> {
        // SAFETY: alive.
        match unsafe { (self.context.cuda.event_query)(self.handle) } {
            SUCCESS => Ok(true),
            NOT_READY => Ok(false),
            code => Err(code),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let code = self.context.leave(|cuda| {
            // SAFETY: alive, and nobody can use it after this. Streams that wait for it have what they need.
            unsafe { (cuda.event_destroy)(self.handle) }
        });
        log_leak("event", code);
    }
}

/// Memory of a device.
pub(super) struct Memory {
    context: Context,
    address: u64,
    bytes: usize,
}

impl Memory {
    pub(super) fn new(context: &Context, bytes: usize) -> Result<Self, i32> {
        let _entered = context.enter()?;
        let mut address = 0;
        // The driver refuses to allocate nothing.
        let allocate = context.cuda.memory_allocate;
        // SAFETY: writes one address; the context is current.
        done(unsafe { allocate(&raw mut address, bytes.max(1)) })?;
        Ok(Self {
            context: context.clone(),
            address,
            bytes,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first `elements` of it as a region that keeps it, and `ready`.
    pub(super) fn region(
        self: &Arc<Self>,
        elements: usize,
        element: Element,
        ready: Option<Arc<Event>>,
    ) -> DeviceRegion {
        let needed = elements * element.bytes();
        assert!(needed <= self.bytes, "{needed} of {} bytes", self.bytes);
        let event = ready.as_ref().map(|event| event.handle());
        let keep = Arc::new((Arc::clone(self), ready));
        // SAFETY: the memory is that large, aligned for anything, and lives as long as `keep`, and so does the event. Who holds
        // a `Memory` reads and writes it only through a stream, for which `engine` and the callers of `Buffer` see to the order.
        unsafe { DeviceRegion::new(self.address, elements, element, event, keep) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let code = self.context.leave(|cuda| {
            // SAFETY: allocated by `new`; whoever was given it as a region has finished, since regions keep it.
            unsafe { (cuda.memory_free)(self.address) }
        });
        log_leak("memory", code);
    }
}

/// A `Drop` cannot fail.
fn log_leak(what: &str, code: i32) {
    if code != SUCCESS {
        tracing::warn!(what, code, "the CUDA driver did not take something back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_has_the_layout_of_ncclconfig_t_2_18() {
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!(std::mem::offset_of!(Config, version), 12);
        assert_eq!(std::mem::offset_of!(Config, blocking), 16);
        assert_eq!(std::mem::offset_of!(Config, net_name), 32);
        assert_eq!(std::mem::offset_of!(Config, split_share), 40);
        assert_eq!(Config::non_blocking().version, 21_800);
    }

    #[test]
    fn handles_are_passed_like_pointers() {
        assert_eq!(size_of::<usize>(), size_of::<*const c_void>());
        assert_eq!(size_of::<u64>(), size_of::<*const c_void>());
        assert_eq!(size_of::<RawId>(), 128);
    }
}
