//! Decoder families as data over the kernels: packs in, sequence log-probs out.
//!
//! A Hugging Face directory becomes a [`ModelConfig`] (the decoder described as data), a [`Layout`] (where every parameter
//! lies in the flat buckets) and a [`Model`]. A [`Pack`] of preference pairs goes through
//! [`Model::forward_train`] and [`Model::backward`] without an autodiff tape: every block keeps what its backward needs,
//! and blocks run backward one at a time, adding weight gradients straight into the flat [`Gradients`].
//!
//! Policy, reference, evaluation and scoring call the same forward, so equal weights give equal bits. On the CPU a pair's
//! log-prob has the same bits whichever other pairs share its pack.
//!
//! Not here: losses (`objective`), data order and tokenization (`data`), optimizer and sharding (`trainer`), checkpoints
//! (`checkpoint`), the arithmetic itself (`kernels`).

mod adapter;
mod block;
mod config;
mod cost;
mod digest;
mod error;
mod generate;
mod layout;
mod memory;
mod model;
mod operations;
mod pack;
mod random;
mod rotary;
mod slots;
mod sums;
mod weights;
mod write;

pub use adapter::{Lora, Targets, load_adapter};
pub use config::{Biases, Family, Gate, MlpPlan, ModelConfig, NormKind, Projections, Residual};
pub use cost::Operations;
pub use error::ModelError;
pub use generate::Sampler;
pub use kernels::Device;
pub use kernels::{
    Activation, AttentionPlan, EmbeddingRows, Gradients, Precision, Slot, TileSums, head_tiles,
};
pub use layout::{BUCKET_ELEMENTS_MAX, Bucket, Layout, Parameter, Stage};
pub use memory::{PackBytes, PackShape};
pub use model::{BackwardEnd, Model, PackLogps, Saved, Saving, Trace};
pub use pack::{Pack, PairTokens, Segment};
pub use random::random_weights;
pub use rotary::{RotaryPlan, RotaryScaling};
pub use sums::{InputGradient, Sums};
pub use weights::stores_bf16;
pub use write::write_safetensors;
