//! Whether events on the primary context order our stream with burn's private one, both ways, and at what cost.
//!
//! A round trip: burn writes a new tensor (x + 1) on its stream; our kernel adds 1 in place on ours; burn copies
//! (x * 1) and drops the tensor, whose memory the pool gives to the next trip. So after n trips every element is 2n,
//! unless somewhere a kernel ran before what it depends on or memory was reused under one that still ran.

use std::time::Instant;

use anyhow::{Result, anyhow};
use burn::tensor::{Device, Tensor};
use burn_cubecl::Cube;
use cudarc::driver::{result, sys};
use serde_json::json;

use crate::device::{Gpu, Raw, guarded};
use crate::report::Report;

/// How a trip orders the two streams.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// `cuCtxRecordEvent`, `cuStreamWaitEvent`; `cuEventRecord`, `cuCtxWaitEvent`.
    Events,
    /// The host waits for burn's stream, then for ours.
    Host,
    /// Not at all, to see that the trips would notice.
    Nothing,
    /// Without our kernel: what burn's two operations and the pointer cost by themselves.
    BurnOnly,
}

/// Trips between two checks; few enough for float32 to count exactly.
const BATCH: usize = 100;

/// Makes the trips in several settings.
pub fn run(report: &mut Report) -> Result<()> {
    let gpu = Gpu::open()?;
    let device = Device::cuda(0);
    println!(
        "{:42} {:>9} {:>7} {:>12} {:>13}",
        "round trips", "elements", "trips", "us a trip", "wrong values"
    );
    let settings = [
        ("events", Order::Events, 1 << 10, 10_000, 0),
        ("events", Order::Events, 1 << 22, 10_000, 0),
        (
            "events, our kernel 40,000 cycles late",
            Order::Events,
            1 << 16,
            2_000,
            40_000,
        ),
        ("host waits", Order::Host, 1 << 10, 2_000, 0),
        ("host waits", Order::Host, 1 << 22, 1_000, 0),
        ("burn's part alone", Order::BurnOnly, 1 << 10, 10_000, 0),
        ("burn's part alone", Order::BurnOnly, 1 << 22, 2_000, 0),
        (
            "no order (should be wrong)",
            Order::Nothing,
            1 << 22,
            500,
            0,
        ),
        (
            "no order, our kernel late (should be wrong)",
            Order::Nothing,
            1 << 16,
            500,
            40_000,
        ),
    ];
    for (name, order, len, trips, spin) in settings {
        let label = format!("{name:42} {len:9} {trips:7}");
        let mut row =
            json!({"part": "events", "order": name, "elements": len, "trips": trips, "spin": spin});
        match guarded(|| round_trips(&gpu, &device, order, len, trips, spin)) {
            Ok((seconds, wrong)) => {
                let us = seconds / trips as f64 * 1e6;
                row["us"] = us.into();
                row["wrong"] = wrong.into();
                report.push(&format!("{label} {us:12.2} {wrong:13}"), &row)?;
            }
            Err(error) => report.error(&label, row, &error)?,
        }
        gpu.sync()?;
    }
    Ok(())
}

/// The seconds that `trips` trips took, checks left out, and how many values the checks found wrong.
fn round_trips(
    gpu: &Gpu,
    device: &Device,
    order: Order,
    len: usize,
    trips: usize,
    spin: u64,
) -> Result<(f64, usize)> {
    gpu.ctx.bind_to_thread()?;
    let (context, ours) = (gpu.ctx.cu_ctx(), gpu.stream.cu_stream());
    let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
    let (burn_done, ours_done) = (event()?, event()?);
    let (mut seconds, mut wrong) = (0.0, 0);
    // The first batch compiles burn's kernels and fills the pool; only its time is left out.
    for batch in 0..=trips.div_ceil(BATCH) {
        let mut state = Tensor::<1>::zeros([len], device);
        gpu.sync()?;
        let start = Instant::now();
        for _ in 0..BATCH {
            // `clone` keeps burn from working in place, so that each result takes memory from the pool.
            let tensor = state.clone() + 1.0;
            drop(state);
            let raw = pointer(gpu, &tensor)?;
            match order {
                Order::Events => unsafe {
                    named(
                        "cuCtxRecordEvent",
                        sys::cuCtxRecordEvent(context, burn_done),
                    )?;
                    named(
                        "cuStreamWaitEvent",
                        sys::cuStreamWaitEvent(ours, burn_done, 0),
                    )?;
                    gpu.add_one(raw.ptr, len, spin)?;
                    named("cuEventRecord", sys::cuEventRecord(ours_done, ours))?;
                    named("cuCtxWaitEvent", sys::cuCtxWaitEvent(context, ours_done))?;
                },
                Order::Host => {
                    cubecl::future::block_on(gpu.client.sync())
                        .map_err(|error| anyhow!("{error:?}"))?;
                    gpu.add_one(raw.ptr, len, spin)?;
                    gpu.stream.synchronize()?;
                }
                Order::Nothing => gpu.add_one(raw.ptr, len, spin)?,
                Order::BurnOnly => {}
            }
            drop(raw);
            state = tensor.clone() * 1.0;
        }
        gpu.sync()?;
        if batch > 0 {
            seconds += start.elapsed().as_secs_f64();
        }
        let expected = if order == Order::BurnOnly {
            BATCH
        } else {
            2 * BATCH
        } as f32;
        let values = state
            .into_data()
            .try_to_vec::<f32>()
            .map_err(|error| anyhow!("{error:?}"))?;
        wrong += values.iter().filter(|value| **value != expected).count();
    }
    unsafe {
        result::event::destroy(burn_done)?;
        result::event::destroy(ours_done)?;
    }
    Ok((seconds, wrong))
}

/// The address of a burn tensor's memory.
pub fn pointer(gpu: &Gpu, tensor: &Tensor<1>) -> Result<Raw> {
    let primitive = tensor
        .clone()
        .try_into_primitive::<Cube>()
        .map_err(|error| anyhow!("{error:?}"))?;
    gpu.raw(&primitive.handle)
}

/// The driver's status with the call it came from.
pub fn named(call: &str, status: sys::CUresult) -> Result<()> {
    status
        .result()
        .map_err(|error| anyhow!("{call}: {error:?}"))
}
