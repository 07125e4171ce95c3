//! An optimizer's arithmetic where weights, moments and gradient lie on a GPU: one pass over them a step, and the sum of
//! squares for the global norm. The rules, their factors and the arithmetic on the host are the caller's.

use std::ops::Range;

use crate::{Device, Flat, Tensor};

/// A rule with its factors of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum UpdateRule {
    /// m ← keep_first·m + add_first·g, v ← keep_second·v + add_second·g²,
    /// w ← keep_weight·w − step_size · m / (√v · root_correction + eps).
    AdamW {
        /// β₁.
        keep_first: f32,
        /// 1 − β₁.
        add_first: f32,
        /// β₂.
        keep_second: f32,
        /// 1 − β₂.
        add_second: f32,
        /// Learning rate over the first moment's bias correction.
        step_size: f32,
        /// One over the root of the second moment's bias correction.
        root_correction: f32,
        /// ε.
        eps: f32,
        /// 1 − learning rate · weight decay; 1 where nothing decays.
        keep_weight: f32,
    },
    /// v ← keep·v + add·g², w ← w − step_size · g / (√v + eps).
    RmsProp {
        /// α.
        keep: f32,
        /// 1 − α.
        add: f32,
        /// Learning rate.
        step_size: f32,
        /// ε.
        eps: f32,
    },
}

/// Has a GPU make the optimizer's kernels ready, so that the first update need not; elsewhere nothing.
///
/// # Panics
/// If the device fails.
pub fn prepare_update(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.gpu() {
        crate::cuda::prepare_update(gpu);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}

/// Σx² over `parts` of a gradient, in f64: finite exactly when every element is. `None` when `device` is no GPU.
///
/// # Panics
/// If the device fails, or a part does not lie there.
pub fn sum_of_squares(device: &Device, parts: impl IntoIterator<Item = Tensor<1>>) -> Option<f64> {
    #[cfg(feature = "cuda")]
    return crate::cuda::sum_of_squares(device, parts);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (device, parts);
        None
    }
}

/// Adds `part` to `sums`, of as many elements, in place.
///
/// # Panics
/// If not both lie on one GPU, or it fails.
pub fn add_to(sums: &Tensor<1>, part: &Tensor<1>) {
    #[cfg(feature = "cuda")]
    let added = crate::cuda::add_to(sums, part);
    #[cfg(not(feature = "cuda"))]
    let added = {
        let _ = (sums, part);
        None::<()>
    };
    added.expect("both parts of a sum lie on one GPU");
}

/// What an update keeps of some elements, as many values of each.
#[derive(Clone, Copy)]
pub struct Kept<'a> {
    /// Their masters, where the weights' own are elsewhere.
    pub masters: Option<&'a Tensor<1>>,
    /// First moments, where the rule has them.
    pub first: Option<&'a Tensor<1>>,
    /// Second moments.
    pub second: &'a Tensor<1>,
}

/// Moves elements `range` of bucket `bucket` of `weights` by `rule` and their gradient times `clip`, together with what they are as
/// operands.
///
/// # Panics
/// If not all of them lie on one GPU.
pub fn update(
    weights: &Flat,
    bucket: usize,
    range: Range<usize>,
    gradient: &Tensor<1>,
    kept: Kept<'_>,
    clip: f32,
    rule: &UpdateRule,
) {
    #[cfg(feature = "cuda")]
    let moved = crate::cuda::update(weights, bucket, &range, gradient, kept, clip, rule);
    #[cfg(not(feature = "cuda"))]
    let moved = {
        let _ = (weights, bucket, range, gradient, kept, clip, rule);
        None::<()>
    };
    moved.expect("weights, moments and gradient lie on one GPU");
}
