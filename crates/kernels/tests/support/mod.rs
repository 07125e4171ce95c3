//! What the tests share: reproducible values, comparisons that name the first difference, thread pools.

#![allow(dead_code)]

use burn::tensor::Tensor as BurnTensor;
use kernels::{AttentionPlan, AttentionSegment, Device, Gradients, Slot, Tensor};

/// A fixed stream of numbers in [−1, 1).
pub fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

pub fn matrix(rows: usize, columns: usize, seed: u32) -> Tensor<2> {
    on(
        &Device::flex(),
        rows,
        columns,
        &values(rows * columns, seed),
    )
}

pub fn vector(len: usize, seed: u32) -> Tensor<1> {
    Tensor::new(values(len, seed), [len], &Device::flex())
}

pub fn on(device: &Device, rows: usize, columns: usize, values: &[f32]) -> Tensor<2> {
    Tensor::new(values.to_vec(), [rows, columns], device)
}

/// burn's autodiff over flex: nothing is fused here, everything takes its composition.
pub fn autodiff() -> burn::tensor::Device {
    burn::tensor::Device::flex().autodiff()
}

/// The same values as a constant of an autodiff graph.
pub fn tracked<const D: usize>(tensor: &Tensor<D>) -> BurnTensor<D> {
    BurnTensor::from_data(tensor.burn().to_data(), &autodiff())
}

/// The same values as a leaf of an autodiff graph.
pub fn leaf<const D: usize>(tensor: &Tensor<D>) -> BurnTensor<D> {
    tracked(tensor).require_grad()
}

/// The elements of a tensor of this crate or of burn's.
pub fn host<const D: usize>(tensor: &(impl Clone + Into<Tensor<D>>)) -> Vec<f32> {
    tensor.clone().into().into_vec()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// |got − want| ≤ tolerance · max(1, |want|) everywhere.
pub fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        assert!(
            error <= tolerance * want.abs().max(1.0),
            "{what}[{index}]: {got}, expected {want}"
        );
    }
}

pub fn whole(len: usize) -> Slot {
    Slot {
        bucket: 0,
        offset: 0,
        len,
    }
}

pub fn gradients(len: usize) -> Gradients {
    Gradients::zeros(&[len], &Device::flex())
}

/// `work` in a pool of `threads`.
pub fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(work)
}

pub fn segment(start: usize, prompt: usize, chosen: usize, rejected: usize) -> AttentionSegment {
    let (a, b) = (start + prompt, start + prompt + chosen);
    AttentionSegment {
        prompt: start..a,
        completions: [a..b, b..b + rejected],
    }
}

pub fn plan(
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
) -> AttentionPlan {
    AttentionPlan {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f64).sqrt(),
        window,
        soft_cap: None,
    }
}
