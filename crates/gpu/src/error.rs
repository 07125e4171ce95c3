//! What can go wrong between this process and a GPU, with its cure.

use cudarc::driver::DriverError;

/// Why a CUDA device cannot be used, or stopped working.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// libcuda is not installed.
    #[error(
        "no CUDA driver: libcuda.so was not found; install the NVIDIA driver, or use the CPU backend"
    )]
    NoDriver,
    /// A library of the CUDA toolkit is not installed.
    #[error(
        "{library} was not found; install the CUDA toolkit's run-time libraries, and name their folder in LD_LIBRARY_PATH if \
         the system's loader does not know it"
    )]
    NoLibrary {
        /// Its file name.
        library: &'static str,
    },
    /// The toolkit's headers are not installed.
    #[error(
        "the CUDA headers were not found in {folder}: kernels are compiled at run time and include cuda_bf16.h; set CUDA_PATH"
    )]
    NoHeaders {
        /// Where they were looked for.
        folder: String,
    },
    /// There is no such device.
    #[error(
        "no CUDA device {ordinal}: this process sees {count}; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    )]
    NoDevice {
        /// The device that was asked for, counted from 0.
        ordinal: usize,
        /// How many the driver shows.
        count: usize,
    },
    /// A device without the instructions that kernels use.
    #[error(
        "{name} has compute capability {}.{}, and the kernels need 8.0 (Ampere) or later",
        capability / 10,
        capability % 10
    )]
    TooOld {
        /// What it is called.
        name: String,
        /// Its compute capability: 75 is 7.5.
        capability: u32,
    },
    /// A kernel does not compile.
    #[error("NVRTC refuses {entry}: {log}")]
    Compile {
        /// The kernel's name.
        entry: String,
        /// The compiler's words.
        log: String,
    },
    /// Not enough memory.
    #[error(
        "the GPU has no {bytes} bytes left ({free} of {total} are free); lower train.micro_batch_tokens, or set \
         model.gradient_checkpointing"
    )]
    Memory {
        /// What was asked for.
        bytes: usize,
        /// What the driver still has.
        free: usize,
        /// What the device has.
        total: usize,
    },
    /// The driver refused a call, or reports an earlier failure.
    #[error("{call}: {reason}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its answer.
        reason: String,
    },
    /// cuBLASLt refused a product.
    #[error("cuBLASLt, {shape}: {reason}")]
    Product {
        /// The product.
        shape: String,
        /// cuBLASLt's answer.
        reason: String,
    },
}

impl GpuError {
    /// Whether this machine simply has no such device, rather than one that cannot be used.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::NoDriver | Self::NoDevice { count: 0, .. })
    }

    /// For `map_err`: what a call of the driver answered.
    pub(crate) fn of(call: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| {
            let name = error
                .error_name()
                .map(|name| name.to_string_lossy().into_owned());
            let text = error
                .error_string()
                .map(|text| text.to_string_lossy().into_owned());
            Self::Driver {
                call,
                reason: match (name, text) {
                    (Ok(name), Ok(text)) => format!("{name}: {text}"),
                    _ => format!("{error:?}"),
                },
            }
        }
    }
}
