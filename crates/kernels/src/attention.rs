//! Attention over packs with shared prompts: what a query may see, and the two operations. The host form is in
//! `attention/host_form.rs`, the reference in `composition`.
//!
//! A segment is a prompt and up to two completions of it. Prompt tokens attend causally to the prompt; a completion
//! attends to the whole prompt and causally to itself, never to its sibling. Positions restart with every segment and
//! both completions continue the prompt's, so a sliding window (`query position − key position < window`, as in
//! Hugging Face) counts over prompt and completion as if they stood alone.

mod host_form;

use std::ops::Range;

use crate::host::{self, Host};
use crate::{Tensor, composition};

/// Rows of a pack that belong to one pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionSegment {
    /// The shared prompt; may be empty.
    pub prompt: Range<usize>,
    /// Chosen and rejected; either may be empty.
    pub completions: [Range<usize>; 2],
}

/// The shape of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionPlan {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head h uses key head h / (heads / kv_heads).
    pub kv_heads: usize,
    /// Columns of one head.
    pub head_dim: usize,
    /// Factor on the scores, usually 1 / √head_dim.
    pub scale: f64,
    /// Sliding window in positions, `None` for full attention.
    pub window: Option<usize>,
    /// Scores s become cap · tanh(s / cap) before the softmax (Gemma 2).
    pub soft_cap: Option<f64>,
}

/// What [`segment_attention_backward`] needs beside inputs and output: the log-sum-exp of the scores of every token and
/// head on the host; nothing elsewhere, where the reference recomputes it.
pub struct AttentionSaved(pub(crate) LogSums);

/// Log-sum-exps by token and head.
#[allow(clippy::large_enum_variant, reason = "one a block")]
pub(crate) enum LogSums {
    Host(Vec<f32>),
    /// By head and token.
    #[cfg(feature = "cuda")]
    Gpu(Tensor<2>),
    /// The reference recomputes them.
    None,
}

/// Attention of `q`, `[n, heads · head_dim]`, over `k` and `v`, `[n, kv_heads · head_dim]`. Rows in no segment give 0, and
/// so does a query that may see nothing.
///
/// # Panics
/// If shapes or segments do not fit.
pub fn segment_attention(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    segments: &[AttentionSegment],
    plan: &AttentionPlan,
) -> (Tensor<2>, AttentionSaved) {
    let rows = check(q, k, v, segments, plan);
    device_form!(cuda::segment_attention(q, k, v, segments, plan));
    let (Some(q), Some(k), Some(v)) = (Host::read(q), Host::read(k), Host::read(v)) else {
        let operands = [q, k, v].map(Tensor::burn);
        let [queries, keys, values] = &operands;
        let made = composition::segment_attention(queries, keys, values, segments, plan);
        return (q.take_back(made), AttentionSaved(LogSums::None));
    };
    let (out, lse) = host_form::forward(&q, &k, &v, rows, segments, plan);
    (
        host::tensor(out, [rows, plan.heads * plan.head_dim]),
        AttentionSaved(LogSums::Host(lse)),
    )
}

/// The gradients of `q`, `k` and `v`; `out` and `saved` are what the forward returned.
pub fn segment_attention_backward(
    dy: &Tensor<2>,
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    out: &Tensor<2>,
    saved: &AttentionSaved,
    segments: &[AttentionSegment],
    plan: &AttentionPlan,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let rows = check(q, k, v, segments, plan);
    assert_eq!(dy.dims(), q.dims(), "dy and q");
    assert_eq!(out.dims(), q.dims(), "out and q");
    device_form!(cuda::segment_attention_backward(
        dy, q, k, v, out, saved, segments, plan
    ));
    let (LogSums::Host(lse), Some(dy), Some(q), Some(k), Some(v), Some(out)) = (
        &saved.0,
        Host::read(dy),
        Host::read(q),
        Host::read(k),
        Host::read(v),
        Host::read(out),
    ) else {
        let operands = [dy, q, k, v].map(Tensor::burn);
        let [dy, queries, keys, values] = &operands;
        let (dq, dk, dv) =
            composition::segment_attention_backward(dy, queries, keys, values, segments, plan);
        return (q.take_back(dq), q.take_back(dk), q.take_back(dv));
    };
    let operands = host_form::Operands {
        q: &q,
        k: &k,
        v: &v,
        out: &out,
        dy: &dy,
        lse,
    };
    let (dq, dk, dv) = host_form::backward(&operands, rows, segments, plan);
    let (wide, narrow) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    (
        host::tensor(dq, [rows, wide]),
        host::tensor(dk, [rows, narrow]),
        host::tensor(dv, [rows, narrow]),
    )
}

/// Bytes that an attention over a pack holds at most while it runs on the host, its results included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionBytes {
    /// [`segment_attention`].
    pub forward: usize,
    /// [`segment_attention_backward`].
    pub backward: usize,
}

impl AttentionBytes {
    /// For `rows` rows in segments of at most `longest` tokens (a prompt and one completion), on `threads` threads.
    pub fn new(rows: usize, longest: usize, threads: usize, plan: &AttentionPlan) -> Self {
        host_form::bytes(rows, longest, threads, plan)
    }
}

impl AttentionPlan {
    /// Positions that a query at `position` may see. Empty only with a window of 0.
    #[inline(always)]
    pub(crate) fn visible(&self, position: usize) -> Range<usize> {
        let start = self
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window));
        start..position + 1
    }
}

impl AttentionSegment {
    /// The parts in order: prompt, chosen, rejected; each with the position of its first token.
    pub(crate) fn parts(&self) -> [(Range<usize>, usize); 3] {
        let [chosen, rejected] = &self.completions;
        [
            (self.prompt.clone(), 0),
            (chosen.clone(), self.prompt.len()),
            (rejected.clone(), self.prompt.len()),
        ]
    }
}

/// The number of rows, after checking that everything fits.
fn check(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    segments: &[AttentionSegment],
    plan: &AttentionPlan,
) -> usize {
    let [rows, _] = q.dims();
    assert!(
        plan.kv_heads > 0 && plan.heads.is_multiple_of(plan.kv_heads),
        "{} heads over {} key heads",
        plan.heads,
        plan.kv_heads
    );
    assert_eq!(q.dims(), [rows, plan.heads * plan.head_dim], "queries");
    assert_eq!(k.dims(), [rows, plan.kv_heads * plan.head_dim], "keys");
    assert_eq!(v.dims(), [rows, plan.kv_heads * plan.head_dim], "values");
    let mut owned = vec![false; rows];
    for segment in segments {
        for (part, _) in segment.parts() {
            assert!(
                part.start <= part.end && part.end <= rows,
                "{segment:?} in a pack of {rows} rows"
            );
            for row in part {
                assert!(
                    !owned[row],
                    "row {row} is in two parts, again in {segment:?}"
                );
                owned[row] = true;
            }
        }
    }
    rows
}
