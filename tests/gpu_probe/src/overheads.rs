//! What a call costs the host, which bounds how small the launches of a step may be.

use std::time::Instant;

use anyhow::Result;
use burn::tensor::{Device, Tensor};
use cudarc::driver::{result, sys};
use serde_json::json;

use crate::blas::Blas;
use crate::device::{Elem, Gpu, guarded};
use crate::events::{named, pointer};
use crate::report::Report;

/// Calls timed, and as many tenths before them.
const CALLS: usize = 2000;

/// Times each kind of call.
pub fn run(report: &mut Report) -> Result<()> {
    let gpu = Gpu::open()?;
    let blas = Blas::open()?;
    let device = Device::cuda(0);
    println!(
        "{:46} {:>14} {:>14}",
        "call", "us, issuing", "us, with sync"
    );
    let mut row = |name: &str, call: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let outcome = guarded(|| {
            for _ in 0..CALLS / 10 {
                call()?;
            }
            gpu.sync()?;
            let start = Instant::now();
            for _ in 0..CALLS {
                call()?;
            }
            let issued = start.elapsed().as_secs_f64();
            gpu.sync()?;
            Ok([issued, start.elapsed().as_secs_f64()].map(|seconds| seconds / CALLS as f64 * 1e6))
        });
        let label = format!("{name:46}");
        let mut row = json!({"part": "overheads", "call": name});
        match outcome {
            Ok([issued, whole]) => {
                row["us_issuing"] = issued.into();
                row["us_with_sync"] = whole.into();
                report.push(&format!("{label} {issued:14.3} {whole:14.3}"), &row)
            }
            Err(error) => report.error(&label, row, &error),
        }
    };

    row("burn Tensor::empty of 1 MiB, dropped", &mut || {
        drop(Tensor::<1>::empty([1 << 18], &device));
        Ok(())
    })?;
    let tensor = Tensor::<1>::zeros([1024], &device);
    let other = Tensor::<1>::zeros([1024], &device);
    row("get_resource of a burn tensor", &mut || {
        pointer(&gpu, &tensor).map(drop)
    })?;
    row("burn x + 1, 1024 elements", &mut || {
        drop(tensor.clone() + 1.0);
        Ok(())
    })?;
    row("burn x * y, 1024 elements", &mut || {
        drop(tensor.clone() * other.clone());
        Ok(())
    })?;
    row("burn x + 1, then get_resource of it", &mut || {
        pointer(&gpu, &(tensor.clone() + 1.0)).map(drop)
    })?;
    let ours = gpu.buffer(Elem::F32, 1024)?;
    row("cuLaunchKernel on our stream, 1024 elements", &mut || {
        gpu.add_one(ours.raw.ptr, ours.len, 0)
    })?;
    let [left, right] = [
        gpu.random(Elem::Bf16, 64 * 64)?,
        gpu.random(Elem::Bf16, 64 * 64)?,
    ];
    let out = gpu.buffer(Elem::Bf16, 64 * 64)?;
    let ptrs = [left.raw.ptr, right.raw.ptr, out.raw.ptr];
    let plan = blas.linear(Elem::Bf16, [64; 3])?;
    row("cublasLtMatmul, 64 x 64 x 64", &mut || {
        blas.launch(&gpu, &plan, ptrs)
    })?;
    row("planning a cublasLtMatmul, 64 x 64 x 64", &mut || {
        blas.linear(Elem::Bf16, [64; 3]).map(drop)
    })?;
    let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
    let (context, stream) = (gpu.ctx.cu_ctx(), gpu.stream.cu_stream());
    row("cuCtxRecordEvent + cuStreamWaitEvent", &mut || unsafe {
        named("cuCtxRecordEvent", sys::cuCtxRecordEvent(context, event))?;
        named(
            "cuStreamWaitEvent",
            sys::cuStreamWaitEvent(stream, event, 0),
        )
    })?;
    row("cuEventRecord + cuCtxWaitEvent", &mut || unsafe {
        named("cuEventRecord", sys::cuEventRecord(event, stream))?;
        named("cuCtxWaitEvent", sys::cuCtxWaitEvent(context, event))
    })?;
    row("both waits of an idle device", &mut || gpu.sync())
}
