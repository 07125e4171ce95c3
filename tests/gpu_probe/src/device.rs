//! The device as this program uses it: burn's client, a stream of our own on the same context, and our kernels.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, anyhow, bail};
use cubecl::client::Client;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cubecl::server::Handle;
use cubecl_runtime::runtime::Runtime;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg as _, result, sys,
};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};

/// Our kernels: they need no header, so NVRTC alone compiles them.
const SOURCE: &str = r#"
typedef unsigned long long u64;
#define EACH(i, n) for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < (n); i += gridDim.x * (u64)blockDim.x)

// Adds one to each element after waiting `spin` clock cycles, which widens the window of a race.
extern "C" __global__ void add_one(float* x, u64 n, u64 spin) {
    long long start = clock64();
    while (clock64() - start < (long long)spin) {}
    EACH(i, n) x[i] += 1.0f;
}

__device__ float uniform(u64 i, u64 seed) {
    u64 z = (i + 1) * 0x9E3779B97F4A7C15ull + seed;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return (float)(z >> 40) * (2.0f / 16777216.0f) - 1.0f;
}
extern "C" __global__ void fill_bf16(unsigned short* x, u64 n, u64 seed) {
    EACH(i, n) x[i] = (unsigned short)(__float_as_uint(uniform(i, seed)) >> 16);
}
extern "C" __global__ void fill_f32(float* x, u64 n, u64 seed) {
    EACH(i, n) x[i] = uniform(i, seed);
}

__device__ float wide(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
__device__ float wide(float x) { return x; }
// Adds the squares of a - b to sums[0] and those of b to sums[1].
template <typename T> __device__ void distance(const T* a, const T* b, u64 n, double* sums) {
    double d = 0.0, s = 0.0;
    EACH(i, n) { double x = wide(a[i]), y = wide(b[i]); d += (x - y) * (x - y); s += y * y; }
    for (int o = 16; o > 0; o >>= 1) { d += __shfl_down_sync(~0u, d, o); s += __shfl_down_sync(~0u, s, o); }
    if (threadIdx.x % 32 == 0) { atomicAdd(&sums[0], d); atomicAdd(&sums[1], s); }
}
extern "C" __global__ void distance_bf16(const unsigned short* a, const unsigned short* b, u64 n, double* sums) {
    distance(a, b, n, sums);
}
extern "C" __global__ void distance_f32(const float* a, const float* b, u64 n, double* sums) {
    distance(a, b, n, sums);
}
"#;

/// An element type of the tensors here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Elem {
    /// bfloat16.
    Bf16,
    /// float32.
    F32,
}

impl Elem {
    /// Its name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// Its size in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// A pointer to a tensor's memory, and what keeps the pool from giving that memory to another.
pub struct Raw {
    /// The device address.
    pub ptr: u64,
    _held: Box<dyn std::any::Any>,
}

/// Memory of burn's pool with its address.
pub struct Buffer {
    /// As cubecl knows it.
    pub handle: Handle,
    /// As the driver knows it.
    pub raw: Raw,
    /// How many elements it has.
    pub len: usize,
    /// What they are.
    pub elem: Elem,
}

/// The device, opened on both sides.
pub struct Gpu {
    /// The primary context, which cubecl retains too.
    pub ctx: Arc<CudaContext>,
    /// A stream of our own beside cubecl's; neither waits for the other unless told to.
    pub stream: Arc<CudaStream>,
    /// cubecl's side, the one under burn's `Device::cuda(0)`.
    pub client: Client,
    add_one: CudaFunction,
    fill: [CudaFunction; 2],
    distance: [CudaFunction; 2],
}

impl Gpu {
    /// Opens device 0.
    pub fn open() -> Result<Self> {
        let ctx = CudaContext::new(0).context("no CUDA device")?;
        let stream = ctx.new_stream()?;
        let options = CompileOptions {
            arch: Some("compute_80"),
            ..Default::default()
        };
        let module = ctx.load_module(compile_ptx_with_opts(SOURCE, options)?)?;
        let kernel = |name: &str| module.load_function(name);
        Ok(Self {
            client: cubecl::Device::Cuda(CudaDevice { index: 0 }).client(),
            add_one: kernel("add_one")?,
            fill: [kernel("fill_bf16")?, kernel("fill_f32")?],
            distance: [kernel("distance_bf16")?, kernel("distance_f32")?],
            stream,
            ctx,
        })
    }

    /// The address of `handle`'s memory. Returns after everything submitted to cubecl before it is on its stream.
    pub fn raw(&self, handle: &Handle) -> Result<Raw> {
        let held = self
            .client
            .get_resource::<<CudaRuntime as Runtime>::Server>(handle.clone())
            .map_err(|error| anyhow!("{error:?}"))?;
        Ok(Raw {
            ptr: held.resource().ptr,
            _held: Box::new(held),
        })
    }

    /// Memory for `len` elements, unset.
    pub fn buffer(&self, elem: Elem, len: usize) -> Result<Buffer> {
        let handle = self.client.empty(len * elem.size());
        Ok(Buffer {
            raw: self.raw(&handle)?,
            handle,
            len,
            elem,
        })
    }

    /// Memory for `len` elements, each random in [-1, 1).
    pub fn random(&self, elem: Elem, len: usize) -> Result<Buffer> {
        let buffer = self.buffer(elem, len)?;
        self.sync()?;
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let (n, seed) = (len as u64, clock.as_nanos() as u64 ^ buffer.raw.ptr);
        let mut launch = self.stream.launch_builder(&self.fill[elem as usize]);
        launch.arg(&buffer.raw.ptr).arg(&n).arg(&seed);
        unsafe { launch.launch(grid(len))? };
        self.sync()?;
        Ok(buffer)
    }

    /// Launches `x += 1` on our stream, each thread spinning `spin` clock cycles before.
    pub fn add_one(&self, ptr: u64, len: usize, spin: u64) -> Result<()> {
        let n = len as u64;
        let mut launch = self.stream.launch_builder(&self.add_one);
        launch.arg(&ptr).arg(&n).arg(&spin);
        unsafe { launch.launch(grid(len))? };
        Ok(())
    }

    /// `|a - b| / |b|` in the Frobenius norm.
    pub fn distance(&self, a: &Buffer, b: &Buffer) -> Result<f64> {
        let n = a.len as u64;
        let mut sums = [0f64; 2];
        unsafe {
            let ptr = result::malloc_sync(16)?;
            result::memset_d8_sync(ptr, 0, 16)?;
            self.sync()?;
            let mut launch = self.stream.launch_builder(&self.distance[a.elem as usize]);
            launch.arg(&a.raw.ptr).arg(&b.raw.ptr).arg(&n).arg(&ptr);
            launch.launch(grid(a.len))?;
            self.stream.synchronize()?;
            result::memcpy_dtoh_sync(&mut sums, ptr)?;
            result::free_sync(ptr)?;
        }
        Ok((sums[0] / sums[1]).sqrt())
    }

    /// Waits for all that was submitted on either side; a fault on the device comes back from here.
    pub fn sync(&self) -> Result<()> {
        cubecl::future::block_on(self.client.sync()).map_err(|error| anyhow!("{error:?}"))?;
        self.ctx.bind_to_thread()?;
        unsafe { sys::cuCtxSynchronize().result()? };
        Ok(())
    }

    /// Waits as [`Gpu::sync`], and says why if what should have written `handle` did not.
    pub fn written(&self, handle: &Handle) -> Result<()> {
        let waited = cubecl::future::block_on(self.client.sync_buffers([handle]));
        waited.map_err(|error| anyhow!("{error:?}"))
    }
}

fn grid(len: usize) -> LaunchConfig {
    let blocks = len.div_ceil(256).clamp(1, 2048) as u32;
    LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// Runs `task`; a panic in it becomes an error.
pub fn guarded<T>(task: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(task)) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            bail!(
                "panic: {}",
                text.or(panic.downcast_ref::<&str>().copied())
                    .unwrap_or("(no text)")
            )
        }
    }
}

/// How long a launch takes.
pub struct Timing {
    /// Seconds a launch, the median of the samples.
    pub median: f64,
    /// Seconds that the first launch took beyond that: mostly the kernel's compilation.
    pub first: f64,
    /// How many samples, and launches in each.
    pub samples: (usize, usize),
}

/// Times `launch` by the host's clock, from an idle device to one that is idle again. A sample has as many launches
/// as fill 10 ms, at least one, so that the wait at its end does not count. `budget` seconds bound the samples: of a launch that
/// takes longer there is one.
pub fn time(gpu: &Gpu, budget: f64, mut launch: impl FnMut() -> Result<()>) -> Result<Timing> {
    let mut sample = |launches: usize| -> Result<f64> {
        gpu.sync()?;
        let start = Instant::now();
        for _ in 0..launches {
            launch()?;
        }
        gpu.sync()?;
        Ok(start.elapsed().as_secs_f64() / launches as f64)
    };
    let first = sample(1)?;
    let warm = sample(if first < 0.2 { 3 } else { 1 })?;
    if warm > budget {
        let first = (first - warm).max(0.0);
        return Ok(Timing {
            median: warm,
            first,
            samples: (1, 1),
        });
    }
    let launches = ((0.01 / warm) as usize).clamp(1, 1000);
    let count = ((budget / warm / launches as f64) as usize).clamp(3, 10);
    let mut samples = (0..count)
        .map(|_| sample(launches))
        .collect::<Result<Vec<_>>>()?;
    samples.sort_by(f64::total_cmp);
    let median = samples[count / 2];
    Ok(Timing {
        median,
        first: (first - median).max(0.0),
        samples: (count, launches),
    })
}
