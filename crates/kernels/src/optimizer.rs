//! An optimizer's arithmetic where weights, moments and gradient lie on a GPU: one pass over them a step, and the sum of
//! squares for the global norm. The rules, their factors and the arithmetic on the host are the caller's.

use std::ops::Range;

use crate::{Device, Flat, Gradients, Tensor};

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

/// Σx² over a range of each bucket of the gradients, in f64: finite exactly when every element is. `None` when they do not lie on
/// a GPU.
pub fn sum_of_squares(
    gradients: &Gradients,
    ranges: impl IntoIterator<Item = Range<usize>>,
) -> Option<f64> {
    #[cfg(feature = "cuda")]
    return crate::cuda::sum_of_squares(gradients, ranges);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (gradients, ranges);
        None
    }
}

/// Moves elements `range` of bucket `bucket` of `weights` by `rule` and their gradient times `clip`, together with what they are as
/// operands. `moments` are those elements' first ones, where the rule has them, and second ones.
///
/// # Panics
/// If not all of them lie on one GPU.
pub fn update(
    weights: &Flat,
    bucket: usize,
    range: Range<usize>,
    gradients: &Gradients,
    moments: (Option<&Tensor<1>>, &Tensor<1>),
    clip: f32,
    rule: &UpdateRule,
) {
    #[cfg(feature = "cuda")]
    let moved = crate::cuda::update(weights, bucket, range, gradients, moments, clip, rule);
    #[cfg(not(feature = "cuda"))]
    let moved = {
        let _ = (weights, bucket, range, gradients, moments, clip, rule);
        None::<()>
    };
    moved.expect("weights, moments and gradient lie on one GPU");
}
