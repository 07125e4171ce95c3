//! A device, opened once in a process and kept until it ends.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;

use cudarc::driver::result as driver;
use cudarc::driver::sys;

use crate::GpuError;
use crate::arena::Arena;
use crate::cache::Cache;
use crate::product::Products;
use crate::program::Programs;
use crate::trace::Trace;

/// An open device. Never closed: what it holds lives as long as the process.
pub struct Gpu {
    pub(crate) ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(crate) stream: sys::CUstream,
    pub(crate) arena: Arena,
    pub(crate) programs: Programs,
    pub(crate) products: Products,
    pub(crate) trace: Trace,
    facts: DeviceFacts,
}

// SAFETY: the handles are those of the driver, which may be used from any thread whose current context is theirs; every entry
// makes it so (`Gpu::bind`). What changes lies behind locks.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability: 90 is 9.0.
    pub capability: u32,
    /// The newest CUDA version that the driver serves: 13000 is 13.0.
    pub driver: i32,
    /// Bytes of memory.
    pub memory: usize,
    /// Most bytes of shared memory that a block can have.
    pub shared: usize,
}

/// The oldest compute capability whose instructions kernels use (Ampere: bf16 on tensor cores, copies in the background).
const OLDEST_CAPABILITY: u32 = 80;

static OPEN: Mutex<BTreeMap<usize, &'static Gpu>> = Mutex::new(BTreeMap::new());

impl Gpu {
    /// Opens device `ordinal`, or finds it open.
    ///
    /// # Errors
    /// A driver, a library, the headers or the device that is not there.
    pub fn open(ordinal: usize) -> Result<&'static Self, GpuError> {
        let mut open = OPEN
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(gpu) = open.get(&ordinal) {
            return Ok(gpu);
        }
        let gpu: &'static Self = Box::leak(Box::new(Self::new(ordinal)?));
        open.insert(ordinal, gpu);
        Ok(gpu)
    }

    fn new(ordinal: usize) -> Result<Self, GpuError> {
        // SAFETY: these only try to open the libraries. The loaders panic where one is missing, so they are asked first.
        let (has_driver, has_compiler, has_products) = unsafe {
            (
                sys::is_culib_present(),
                cudarc::nvrtc::sys::is_culib_present(),
                cudarc::cublaslt::sys::is_culib_present(),
            )
        };
        if !has_driver {
            return Err(GpuError::NoDriver);
        }
        // Whether there is a device comes first: only then is what else is missing worth a word.
        let count = match driver::init() {
            Ok(()) => driver::device::get_count().map_err(GpuError::of("cuDeviceGetCount"))?,
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => 0,
            Err(error) => return Err(GpuError::of("cuInit")(error)),
        };
        let count = usize::try_from(count).unwrap_or(0);
        if ordinal >= count {
            return Err(GpuError::NoDevice { ordinal, count });
        }
        if !has_compiler {
            let library = "libnvrtc.so";
            return Err(GpuError::NoLibrary { library });
        }
        if !has_products {
            let library = "libcublasLt.so";
            return Err(GpuError::NoLibrary { library });
        }
        let headers = headers()?;
        let device = driver::device::get(ordinal as i32).map_err(GpuError::of("cuDeviceGet"))?;
        let facts = DeviceFacts::of(device)?;
        if facts.capability < OLDEST_CAPABILITY {
            return Err(GpuError::TooOld {
                name: facts.name,
                capability: facts.capability,
            });
        }
        // SAFETY: `device` is the driver's; the primary context is kept for good and shared with burn's backend.
        let context = unsafe {
            let context = driver::primary_ctx::retain(device)
                .map_err(GpuError::of("cuDevicePrimaryCtxRetain"))?;
            driver::ctx::set_current(context).map_err(GpuError::of("cuCtxSetCurrent"))?;
            context
        };
        let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking)
            .map_err(GpuError::of("cuStreamCreate"))?;
        Ok(Self {
            ordinal,
            device,
            context,
            stream,
            arena: Arena::new(device, facts.memory)?,
            programs: Programs::new(facts.capability, headers, Cache::of_user()),
            products: Products::new()?,
            trace: Trace::default(),
            facts,
        })
    }

    /// Its number among the devices that this process sees.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What it is.
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Bytes of memory that nobody holds, and all of them.
    ///
    /// # Errors
    /// A device that stopped working.
    pub fn free_and_total(&self) -> Result<(usize, usize), GpuError> {
        self.bind();
        driver::mem_get_info().map_err(GpuError::of("cuMemGetInfo"))
    }

    /// The number that no other device of any machine has.
    ///
    /// # Errors
    /// A device that stopped working.
    pub fn uuid(&self) -> Result<u128, GpuError> {
        let uuid =
            driver::device::get_uuid(self.device).map_err(GpuError::of("cuDeviceGetUuid"))?;
        Ok(u128::from_be_bytes(uuid.bytes.map(|byte| byte as u8)))
    }

    /// Where it sits, such as `0000:3b:00.0`.
    pub(crate) fn pci_address(&self) -> Result<String, GpuError> {
        let mut text = [0u8; 32];
        // SAFETY: the driver writes at most so many bytes, the last of them 0.
        unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), 32, self.device) }
            .result()
            .map_err(GpuError::of("cuDeviceGetPCIBusId"))?;
        let end = text.iter().position(|&byte| byte == 0).unwrap_or(32);
        Ok(String::from_utf8_lossy(&text[..end]).into_owned())
    }

    /// Waits until the device has done everything asked of this crate.
    ///
    /// # Errors
    /// What any of it failed with.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.bind();
        // SAFETY: the stream lives as long as the process.
        unsafe { driver::stream::synchronize(self.stream) }
            .map_err(GpuError::of("cuStreamSynchronize"))
    }

    /// Makes the device's context the calling thread's.
    pub(crate) fn bind(&self) {
        // SAFETY: the context was retained for good.
        let bound = unsafe { driver::ctx::set_current(self.context) };
        bound.expect("a context that was current before");
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Gpu({}, {})", self.ordinal, self.facts.name)
    }
}

impl DeviceFacts {
    fn of(device: sys::CUdevice) -> Result<Self, GpuError> {
        use sys::CUdevice_attribute as Attribute;
        // SAFETY: `device` is the driver's, and the functions only read.
        let (major, minor, shared, memory, driver_version) = unsafe {
            let attribute = |attribute| {
                driver::device::get_attribute(device, attribute)
                    .map_err(GpuError::of("cuDeviceGetAttribute"))
            };
            let mut version = 0;
            sys::cuDriverGetVersion(&raw mut version)
                .result()
                .map_err(GpuError::of("cuDriverGetVersion"))?;
            (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
                driver::device::total_mem(device).map_err(GpuError::of("cuDeviceTotalMem"))?,
                version,
            )
        };
        Ok(Self {
            name: driver::device::get_name(device).map_err(GpuError::of("cuDeviceGetName"))?,
            capability: (major * 10 + minor).unsigned_abs(),
            driver: driver_version,
            memory,
            shared: usize::try_from(shared).unwrap_or(0),
        })
    }
}

/// The toolkit's headers.
fn headers() -> Result<PathBuf, GpuError> {
    let root =
        std::env::var_os("CUDA_PATH").map_or_else(|| "/usr/local/cuda".into(), PathBuf::from);
    let folder = root.join("include");
    if folder.join("cuda_bf16.h").is_file() {
        Ok(folder)
    } else {
        Err(GpuError::NoHeaders {
            folder: folder.display().to_string(),
        })
    }
}
