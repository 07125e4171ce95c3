//! Measures, on one CUDA device, what the design of the GPU path rests on.
//!
//! - `matmul`: which of cubek's matmul strategies comes close to cuBLASLt at the shapes of a training step.
//! - `events`: whether events on the primary context order a stream of our own with burn's private one.
//! - `overheads`: what a call costs the host: allocations, raw pointers, launches.
//! - `attention`: how fast cubek's attention is, forward and backward.
//!
//! `gpu_probe PART [--json FILE]`, where PART is one of these, `versions`, or `all`. Each measurement runs in a
//! process of its own with a time limit: a kernel that faults or hangs takes its context with it, and the others
//! go on.

// Raw device pointers, driver calls and kernel launches are what is measured here.
#![allow(unsafe_code)]

#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod blas;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod events;
#[cfg(feature = "cuda")]
mod matmul;
#[cfg(feature = "cuda")]
mod overheads;
#[cfg(feature = "cuda")]
mod report;
#[cfg(feature = "cuda")]
mod run;

use std::process::ExitCode;

#[cfg(feature = "cuda")]
fn main() -> ExitCode {
    run::main()
}

#[cfg(not(feature = "cuda"))]
fn main() -> ExitCode {
    eprintln!("gpu_probe measures a CUDA device; build it with --features cuda");
    ExitCode::from(2)
}
