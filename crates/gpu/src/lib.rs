//! A CUDA device for the fused forms of `kernels`: memory, a stream, kernels compiled at run time, cuBLASLt.
//!
//! Everything of one device runs on one stream of this crate, in the order in which it was asked for. So a [`Memory`] can be
//! dropped while work that uses it is still under way: whoever gets its bytes next comes later in that order. No call here waits for
//! the device but [`View::download`] and [`Gpu::synchronize`].
//!
//! burn's CUDA backend stands beside it and shares the device's context: what has no fused form goes there and back by copies
//! (`kernels`). Its own stream is private and its memory pool moves what it holds, which is why the hot path does not live in it.
//!
//! All of the crate's `unsafe` is calls of the driver, NVRTC and cuBLASLt, whose libraries (and NVML's) are loaded at run time: a
//! program that holds this crate starts on machines without them. What a launched kernel does with its arguments nobody checks, so
//! [`Launch`], [`Gpu::product`] and [`View::region`], which lends memory to a collective, are the borders at which callers have to be
//! right.
//!
//! Without the feature `cuda` the crate is empty.

#![cfg_attr(
    feature = "cuda",
    allow(unsafe_code, reason = "calls of the CUDA libraries; see above")
)]

#[cfg(feature = "cuda")]
mod arena;
#[cfg(any(feature = "cuda", test))]
mod cache;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod error;
#[cfg(any(feature = "cuda", test))]
mod health;
#[cfg(feature = "cuda")]
mod memory;
#[cfg(feature = "cuda")]
mod product;
#[cfg(feature = "cuda")]
mod program;
#[cfg(feature = "cuda")]
mod region;
#[cfg(any(feature = "cuda", test))]
mod spans;
#[cfg(feature = "cuda")]
mod trace;

#[cfg(feature = "cuda")]
pub use {
    device::{DeviceFacts, Gpu},
    error::GpuError,
    health::{DeviceEvent, DeviceFigures, Health},
    memory::{Element, Memory, View},
    product::{Operand, Product},
    program::{Arg, KernelReport, Launch, Program},
    trace::Traced,
};
