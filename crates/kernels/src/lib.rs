//! The operations of a decoder, each as a forward that saves and a backward that accumulates.
//!
//! There is no autodiff tape here. A forward returns its output and, where its backward needs more than the inputs, a
//! `…Saved` value; a backward returns the gradients of its inputs. The gradient of a weight is added straight into the
//! flat [`Gradients`] by a function of its own (`…_backward_weight`), which is not called for a frozen weight.
//!
//! Every operation has two forms with one signature:
//! - the **reference composition** ([`composition`]) over burn tensors, for any device, and the oracle of the tests;
//! - the **fused host form** on the slices of burn's flex backend, taken whenever all operands live there.
//!
//! # Shapes
//! `Tensor<2>` is always `[rows, columns]`, one row per token; weights are `[out, in]` as Hugging Face stores them. Elements
//! are f32; operands of products may be what [`Precision::operand`] makes of them.
//!
//! # What the host forms promise
//! - A row of a forward result has the same bits whichever other rows share the call (the `gemm` module says how).
//! - All results have the same bits with any number of rayon threads: work is cut by outputs, never by summands.
//!
//! Shapes that do not fit are a bug of the caller, so they panic with both values.
//!
//! Not here: decoder families and packs (`model`), losses (`objective`), files.

// Loops vectorise only where they are inlined into a function compiled for the machine's instruction set (`math::simd`).
#![allow(clippy::inline_always)]

/// Returns what the fused form of a GPU makes of operands that lie there.
macro_rules! device_form {
    ($form:expr) => {
        #[cfg(feature = "cuda")]
        {
            use crate::cuda;
            if let Some(made) = $form {
                return made;
            }
        }
    };
}

mod activation;
mod attention;
pub mod composition;
#[cfg(feature = "cuda")]
mod cuda;
mod embedding;
mod flat;
mod gemm;
mod gradients;
mod head;
mod heads;
mod host;
mod linear;
mod math;
mod norm;
mod optimizer;
mod parallel;
mod precision;
mod residual;
mod rotary;
mod rounding;
mod rows;
mod speed;
mod tensor;
mod values;

pub use activation::{
    Activation, activate, activate_backward, gated, gated_backward, gated_backward_inner,
};
pub use attention::{
    AttentionBytes, AttentionPlan, AttentionSaved, AttentionSegment, segment_attention,
    segment_attention_backward,
};
pub use embedding::{EmbeddingRows, embedding, embedding_backward};
pub use flat::{Flat, Slot};
pub use gradients::Gradients;
pub use head::{
    HeadSaved, TileSums, gpu_head_rows, head_tiles, logprob_head, logprob_head_backward,
    logprob_head_backward_shared, logprob_head_bytes, soft_cap,
};
pub use heads::{join_heads, split_heads};
pub use linear::{
    add_bias, bias_backward, linear, linear_add, linear_backward, linear_backward_sum,
    linear_backward_weight,
};
pub use norm::{
    LayerSaved, RmsSaved, layer_norm, layer_norm_backward, layer_norm_backward_weight, rms_norm,
    rms_norm_backward, rms_norm_backward_add, rms_norm_backward_weight, rms_norm_operand,
};
pub use optimizer::{Kept, UpdateRule, add_to, prepare_update, sum_of_squares, update};
pub use precision::Precision;
pub use residual::add;
pub use rotary::{RotaryTable, rotary, rotary_backward};
pub use rounding::Rounding;
pub use rows::{gather_rows, scatter_add_rows};
pub use speed::product_speed;
pub use tensor::{Device, DeviceKernels, DeviceTime, Tensor};
pub use values::Values;

/// Changes whenever the bits of a forward result may change, so that values computed by another version are not reused.
pub const KERNEL_VERSION: u32 = 3;
