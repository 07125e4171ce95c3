//! How fast cubek's attention is, causal, 32 heads of 64, and whether a row of it is right.
//!
//! Two of its limits can be read in its source (0.3.1). The forward pass does not return the log-sum-exp of each row,
//! which a backward pass needs. The backward pass computes in float32 with one thread a row and no tensor cores,
//! whatever types are named. So forward is measured in bfloat16 (float16 if that fails), backward in float32.

use anyhow::{Result, anyhow, ensure};
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::TensorBinding;
use cubecl::std::tensor::TensorHandle;
use cubek::attention::backward::{BackwardConfig, flash_attention_backward};
use cubek::attention::forward::definition::{AttentionGlobalTypes, AttentionOptions};
use cubek::attention::forward::launch::{BlueprintStrategy, Strategy, launch_ref};
use cubek::attention::forward::routines::blackbox_accelerated::BlackboxAcceleratedStrategy;
use cudarc::driver::result::{memcpy_dtoh_sync, memcpy_htod_sync};
use serde_json::json;

use crate::device::{Buffer, Elem, Gpu, Timing, guarded, time};
use crate::report::Report;

const HEADS: usize = 32;
const DIM: usize = 64;
/// Batch and sequence length.
const SIZES: [[usize; 2]; 2] = [[16, 1024], [4, 4096]];
const SCALE: f32 = 0.125;

/// The heading of the table.
pub const HEADING: &str = "attention                          batch   seq  type  TFLOP/s       ms  first ms  rel. err. of a row";

/// Measures `which`: `forward` or `backward`.
pub fn run(which: &str, report: &mut Report) -> Result<()> {
    let gpu = Gpu::open()?;
    for size in SIZES {
        if which == "backward" {
            let outcome = guarded(|| backward(&gpu, size));
            push(report, ("backward", "f32"), size, 2.5, outcome)?;
            gpu.sync()?;
            continue;
        }
        for (name, planes, seq_q, seq_kv) in [
            ("forward, 4 planes 1-1", 4, 1, 1),
            ("forward, 8 planes 1-1", 8, 1, 1),
            ("forward, 4 planes 1-4", 4, 1, 4),
            ("forward, 4 planes 2-4", 4, 2, 4),
        ] {
            let strategy = BlackboxAcceleratedStrategy {
                num_planes: planes,
                seq_q,
                seq_kv,
            };
            let outcome = guarded(|| forward(&gpu, &strategy, FloatKind::BF16, size));
            let failed = outcome.is_err();
            push(report, (name, "bf16"), size, 1.0, outcome)?;
            gpu.sync()?;
            if failed {
                let outcome = guarded(|| forward(&gpu, &strategy, FloatKind::F16, size));
                push(report, (name, "f16"), size, 1.0, outcome)?;
                gpu.sync()?;
            }
        }
    }
    Ok(())
}

/// The binding of a contiguous tensor.
fn tensor(buffer: &Buffer, shape: impl Into<Vec<usize>>, kind: FloatKind) -> TensorBinding {
    TensorHandle::new_contiguous(shape.into(), buffer.handle.clone(), ElemType::Float(kind))
        .binding()
}

fn types(gpu: &Gpu, kind: FloatKind) -> AttentionGlobalTypes {
    let mask = AttentionGlobalTypes::mask_dtype(&gpu.client);
    AttentionGlobalTypes::from_single_float_dtype(ElemType::Float(kind), mask)
}

fn forward(
    gpu: &Gpu,
    strategy: &BlackboxAcceleratedStrategy,
    kind: FloatKind,
    [batch, seq]: [usize; 2],
) -> Result<(Timing, Option<f64>)> {
    let shape = [batch, HEADS, seq, DIM];
    let random = || gpu.random(Elem::Bf16, batch * HEADS * seq * DIM);
    let (q, k, v, out) = (random()?, random()?, random()?, random()?);
    let launch = || {
        launch_ref(
            Strategy::BlackboxAccelerated(BlueprintStrategy::Inferred(strategy.clone())),
            &gpu.client,
            tensor(&q, shape, kind),
            tensor(&k, shape, kind),
            tensor(&v, shape, kind),
            None,
            tensor(&out, shape, kind),
            &types(gpu, kind),
            AttentionOptions {
                causal: true,
                ..AttentionOptions::default()
            },
        )
        .map_err(|error| anyhow!("{error:?}"))
    };
    let timing = timed(gpu, &out, launch)?;
    // The random bits are those of bfloat16, so as float16 they are other numbers: timed, but not compared.
    if kind != FloatKind::BF16 {
        return Ok((timing, None));
    }
    let (head, row) = (batch * HEADS - 1, seq - 3);
    let start = head * seq * DIM;
    let [keys, values] = [read(&k, start, seq * DIM)?, read(&v, start, seq * DIM)?];
    let (p, _) = weights(&read(&q, start + row * DIM, DIM)?, &keys, row);
    let expected: Vec<f32> = (0..DIM)
        .map(|d| (0..=row).map(|j| p[j] * values[j * DIM + d]).sum())
        .collect();
    Ok((
        timing,
        Some(distance(&read(&out, start + row * DIM, DIM)?, &expected)),
    ))
}

fn backward(gpu: &Gpu, [batch, seq]: [usize; 2]) -> Result<(Timing, Option<f64>)> {
    let (rows, shape) = (batch * HEADS * seq, [batch, HEADS, seq, DIM]);
    let random = || gpu.random(Elem::F32, rows * DIM);
    let (q, k, v, out, dout) = (random()?, random()?, random()?, random()?, random()?);
    let (dq, dk, dv) = (random()?, random()?, random()?);
    let lse = gpu.random(Elem::F32, rows)?;

    // Any saved output and log-sum-exp take the same time; the row that is compared gets its true ones.
    let (head, row) = (batch * HEADS - 1, seq - 3);
    let (start, at) = (head * seq * DIM, (head * seq + row) * DIM);
    let [keys, values] = [read(&k, start, seq * DIM)?, read(&v, start, seq * DIM)?];
    let (p, log_sum) = weights(&read(&q, at, DIM)?, &keys, row);
    let output: Vec<f32> = (0..DIM)
        .map(|d| (0..=row).map(|j| p[j] * values[j * DIM + d]).sum())
        .collect();
    unsafe {
        memcpy_htod_sync(out.raw.ptr + at as u64 * 4, &output)?;
        memcpy_htod_sync(lse.raw.ptr + (head * seq + row) as u64 * 4, &[log_sum])?;
    }

    let launch = || {
        let bind = |buffer: &Buffer| tensor(buffer, shape, FloatKind::F32);
        flash_attention_backward(
            &gpu.client,
            bind(&q),
            bind(&k),
            bind(&v),
            bind(&out),
            tensor(&lse, [batch, HEADS, seq], FloatKind::F32),
            bind(&dout),
            bind(&dq),
            bind(&dk),
            bind(&dv),
            &types(gpu, FloatKind::F32),
            BackwardConfig {
                scale: SCALE,
                causal: true,
                dq_tile: None,
                dkdv_tile: None,
            },
        )
        .map_err(|error| anyhow!("{error:?}"))
    };
    let timing = timed(gpu, &dk, launch)?;
    gpu.written(&dq.handle)?;

    let upstream = read(&dout, at, DIM)?;
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let delta = dot(&upstream, &output);
    let mut expected = vec![0f32; DIM];
    for j in 0..=row {
        let ds = SCALE * p[j] * (dot(&upstream, &values[j * DIM..][..DIM]) - delta);
        expected
            .iter_mut()
            .zip(&keys[j * DIM..][..DIM])
            .for_each(|(sum, key)| *sum += ds * key);
    }
    Ok((timing, Some(distance(&read(&dq, at, DIM)?, &expected))))
}

/// Times `launch` after a first one, whose failure to compile shows on `written`.
fn timed(gpu: &Gpu, written: &Buffer, launch: impl Fn() -> Result<()>) -> Result<Timing> {
    let start = std::time::Instant::now();
    launch()?;
    gpu.written(&written.handle)?;
    let first = start.elapsed().as_secs_f64();
    ensure!(first < 15.0, "the first launch took {first:.1} s");
    let mut timing = time(gpu, 1.0, launch)?;
    timing.first = (first - timing.median).max(0.0);
    Ok(timing)
}

/// `len` elements from `start` on, as float32.
fn read(buffer: &Buffer, start: usize, len: usize) -> Result<Vec<f32>> {
    let at = buffer.raw.ptr + (start * buffer.elem.size()) as u64;
    if buffer.elem == Elem::F32 {
        let mut values = vec![0f32; len];
        unsafe { memcpy_dtoh_sync(&mut values, at)? };
        return Ok(values);
    }
    let mut bits = vec![0u16; len];
    unsafe { memcpy_dtoh_sync(&mut bits, at)? };
    Ok(bits
        .into_iter()
        .map(|bits| f32::from_bits(u32::from(bits) << 16))
        .collect())
}

/// The attention of one query to keys 0 to `row`, and the log-sum-exp of its scores.
fn weights(query: &[f32], keys: &[f32], row: usize) -> (Vec<f32>, f32) {
    let score = |key: &[f32]| SCALE * query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>();
    let scores: Vec<f32> = keys.chunks(DIM).take(row + 1).map(score).collect();
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let log_sum = most
        + scores
            .iter()
            .map(|score| (score - most).exp())
            .sum::<f32>()
            .ln();
    (
        scores
            .into_iter()
            .map(|score| (score - log_sum).exp())
            .collect(),
        log_sum,
    )
}

/// `|a - b| / |b|`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares =
        |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
    (squares(&mut a.iter().zip(b).map(|(a, b)| a - b)) / squares(&mut b.iter().copied())).sqrt()
}

/// Counts as is usual: a forward pass has two products of 2 b h s s d operations, halved by the causal mask; backward
/// `times` as many, 2.5.
fn push(
    report: &mut Report,
    (name, elem): (&str, &str),
    [batch, seq]: [usize; 2],
    times: f64,
    outcome: Result<(Timing, Option<f64>)>,
) -> Result<()> {
    let label = format!("{name:34} {batch:5} {seq:5}  {elem:4}");
    let mut row =
        json!({"part": "attention", "by": name, "batch": batch, "seq": seq, "type": elem});
    let (timing, distance) = match outcome {
        Ok(outcome) => outcome,
        Err(error) => return report.error(&label, row, &error),
    };
    let flops = times * 2.0 * (batch * HEADS * seq * seq * DIM) as f64;
    let (tflops, ms, first) = (
        flops / timing.median / 1e12,
        timing.median * 1e3,
        timing.first * 1e3,
    );
    row["tflops"] = tflops.into();
    row["ms"] = ms.into();
    row["first_ms"] = first.into();
    row["samples"] = json!([timing.samples.0, timing.samples.1]);
    row["relative_error"] = json!(distance);
    let distance = distance.map_or_else(|| "-".into(), |distance| format!("{distance:.1e}"));
    report.push(
        &format!("{label}  {tflops:7.2} {ms:8.2} {first:9.0}  {distance}"),
        &row,
    )
}
