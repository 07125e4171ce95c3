//! The device that a worker computes on.

use clap::ValueEnum;
use model::Device;

/// Which backend to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// CUDA when this program has it and a device is there, else the CPU. A device that is there and cannot be used is an error:
    /// the CPU in its place would only look like a slow GPU.
    #[default]
    Auto,
    /// burn's flex backend.
    Cpu,
    /// A GPU.
    Cuda,
}

/// A backend that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(String);

/// The device for `backend`, the GPU of number `gpu` if it is one.
///
/// # Errors
/// If CUDA is asked for and cannot be had.
pub fn device(backend: Backend, gpu: usize) -> Result<Device, BackendError> {
    match backend {
        Backend::Cpu => Ok(Device::flex()),
        Backend::Auto => auto(gpu),
        Backend::Cuda => cuda(gpu),
    }
}

#[cfg(feature = "cuda")]
fn cuda(gpu: usize) -> Result<Device, BackendError> {
    Device::cuda(gpu).map_err(|error| unusable(&error))
}

#[cfg(feature = "cuda")]
fn auto(gpu: usize) -> Result<Device, BackendError> {
    match Device::cuda(gpu) {
        Err(error) if !error.is_absence() => Err(unusable(&error)),
        found => Ok(found.unwrap_or_else(|_| Device::flex())),
    }
}

#[cfg(feature = "cuda")]
fn unusable(error: &gpu::GpuError) -> BackendError {
    let cure = match error {
        gpu::GpuError::NoDevice { count: 1.., .. } => {
            "each worker has a GPU of its own: start fewer (cluster.workers), or name those that they share (cluster.gpus)"
        }
        _ => "or use --backend cpu",
    };
    BackendError(format!("{error}; {cure}"))
}

#[cfg(not(feature = "cuda"))]
#[allow(clippy::unnecessary_wraps, reason = "as with the feature")]
fn auto(_: usize) -> Result<Device, BackendError> {
    Ok(Device::flex())
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Device, BackendError> {
    let cure = "build with --features cuda, or use --backend cpu";
    Err(BackendError(format!(
        "this program was built without CUDA; {cure}"
    )))
}

#[cfg(all(test, not(feature = "cuda")))]
mod tests {
    use super::{Backend, device};

    #[test]
    fn a_build_without_cuda_says_so_and_auto_falls_back_to_the_cpu() {
        let error = device(Backend::Cuda, 0).expect_err("no CUDA in this build");
        assert!(error.to_string().contains("--features cuda"));
        assert!(device(Backend::Auto, 3).is_ok());
    }
}
