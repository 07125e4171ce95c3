//! Segment attention with a mask per part: scores of prompt and completion side by side, softmax in f32.

use std::ops::Range;

use burn::tensor::{Tensor, TensorData};

use crate::precision::{like, result};
use crate::{AttentionPlan, AttentionSegment};

use super::scatter_add_rows;

/// What a masked score is: far below any real one, yet finite, so that a fully masked row gives no NaN.
const MASKED: f32 = -1e30;

/// The output, `[n, heads · head_dim]`.
pub fn segment_attention(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    segments: &[AttentionSegment],
    plan: &AttentionPlan,
) -> Tensor<2> {
    let [rows, width] = q.dims();
    let mut outs = Vec::new();
    let mut owners = Vec::new();
    for part in parts(segments) {
        let heads = part.heads(q, k, v, plan);
        let probabilities = like(heads.probabilities, &heads.values);
        let out = result(probabilities.matmul(heads.values));
        outs.push(from_heads(out));
        owners.extend(part.queries);
    }
    if outs.is_empty() {
        return Tensor::zeros([rows, width], &q.device());
    }
    scatter_add_rows(&Tensor::cat(outs, 0), &owners, rows)
}

/// The gradients of q, k and v, everything recomputed.
pub fn segment_attention_backward(
    dy: &Tensor<2>,
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    segments: &[AttentionSegment],
    plan: &AttentionPlan,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let [rows, _] = q.dims();
    let zeros = |x: &Tensor<2>| result(x.zeros_like());
    let mut sums = (zeros(q), zeros(k), zeros(v));
    for part in parts(segments) {
        let Heads {
            queries,
            keys,
            values,
            probabilities,
            slopes,
        } = part.heads(q, k, v, plan);
        let dy = to_heads(&super::gather_rows(dy, &part.queries), plan.heads);
        let dprobabilities = result(dy.clone().matmul(values.swap_dims(1, 2)));
        let shared = (dprobabilities.clone() * probabilities.clone()).sum_dim(2);
        let dscores = probabilities.clone() * (dprobabilities - shared).mul_scalar(plan.scale);
        let dscores = match slopes {
            Some(slopes) => dscores * slopes,
            None => dscores,
        };
        let (dscores, probabilities) = (like(dscores, &keys), like(probabilities, &dy));
        let dqueries = result(dscores.clone().matmul(keys));
        let dkeys = sum_groups(result(dscores.swap_dims(1, 2).matmul(queries)), plan);
        let dvalues = sum_groups(result(probabilities.swap_dims(1, 2).matmul(dy)), plan);
        sums.0 = sums.0 + scatter_add_rows(&from_heads(dqueries), &part.queries, rows);
        sums.1 = sums.1 + scatter_add_rows(&from_heads(dkeys), &part.keys, rows);
        sums.2 = sums.2 + scatter_add_rows(&from_heads(dvalues), &part.keys, rows);
    }
    sums
}

/// Queries of one part and all keys up to its end, as rows of the pack; the keys' positions are their places.
struct Part {
    queries: Vec<usize>,
    keys: Vec<usize>,
}

/// Per-head operands: `[heads, queries, head_dim]`, `[heads, keys, head_dim]` and `[heads, queries, keys]`.
struct Heads {
    queries: Tensor<3>,
    keys: Tensor<3>,
    values: Tensor<3>,
    probabilities: Tensor<3>,
    /// What soft-capping leaves of a score's derivative, where it is capped.
    slopes: Option<Tensor<3>>,
}

fn parts(segments: &[AttentionSegment]) -> Vec<Part> {
    let mut parts = Vec::new();
    for segment in segments {
        for (queries, first_position) in segment.parts() {
            if queries.is_empty() {
                continue;
            }
            let before = segment.prompt.start..segment.prompt.start + first_position;
            parts.push(Part {
                queries: queries.clone().collect(),
                keys: before.chain(queries).collect(),
            });
        }
    }
    parts
}

impl Part {
    fn heads(&self, q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, plan: &AttentionPlan) -> Heads {
        let queries = to_heads(&super::gather_rows(q, &self.queries), plan.heads);
        let keys = repeat_groups(
            to_heads(&super::gather_rows(k, &self.keys), plan.kv_heads),
            plan,
        );
        let values = repeat_groups(
            to_heads(&super::gather_rows(v, &self.keys), plan.kv_heads),
            plan,
        );
        let (mask, seen) = self.masks(plan);
        let shape = [1, self.queries.len(), self.keys.len()];
        let mask = Tensor::<3>::from_data(TensorData::new(mask, shape), &q.device());
        let seen = Tensor::<3>::from_data(TensorData::new(seen, shape), &q.device());
        let products = queries.clone().matmul(keys.clone().swap_dims(1, 2));
        let scores = result(products).mul_scalar(plan.scale);
        let (scores, slopes) = match plan.soft_cap {
            Some(cap) => {
                let tanh = scores.div_scalar(cap).tanh();
                let slopes = (-(tanh.clone() * tanh.clone())).add_scalar(1.0);
                (tanh.mul_scalar(cap), Some(slopes))
            }
            None => (scores, None),
        };
        let scores = scores + mask;
        let shifted = scores.clone() - scores.max_dim(2).detach();
        let weights = shifted.exp() * seen;
        // The tiny addend only keeps 0 / 0 away from a fully masked row: a real row sums to at least 1.
        let sum = weights.clone().sum_dim(2).add_scalar(1e-30);
        Heads {
            queries,
            keys,
            values,
            probabilities: weights / sum,
            slopes,
        }
    }

    /// What is added to each score (0 or [`MASKED`]), and 1 where it counts.
    fn masks(&self, plan: &AttentionPlan) -> (Vec<f32>, Vec<f32>) {
        let first_position = self.keys.len() - self.queries.len();
        let seen = |range: Range<usize>, key: usize| if range.contains(&key) { 1.0 } else { 0.0 };
        let mut seens = Vec::with_capacity(self.queries.len() * self.keys.len());
        for query in 0..self.queries.len() {
            let visible = plan.visible(first_position + query);
            seens.extend((0..self.keys.len()).map(|key| seen(visible.clone(), key)));
        }
        (
            seens
                .iter()
                .map(|&seen| if seen == 1.0 { 0.0 } else { MASKED })
                .collect(),
            seens,
        )
    }
}

/// `[n, heads · d]` → `[heads, n, d]`.
fn to_heads(x: &Tensor<2>, heads: usize) -> Tensor<3> {
    let [rows, width] = x.dims();
    x.clone()
        .reshape([rows, heads, width / heads])
        .swap_dims(0, 1)
}

/// `[heads, n, d]` → `[n, heads · d]`.
fn from_heads(x: Tensor<3>) -> Tensor<2> {
    let [heads, rows, width] = x.dims();
    x.swap_dims(0, 1).reshape([rows, heads * width])
}

/// `[kv_heads, n, d]` → `[heads, n, d]`, each head repeated in place.
fn repeat_groups(x: Tensor<3>, plan: &AttentionPlan) -> Tensor<3> {
    let [kv_heads, rows, width] = x.dims();
    let group = plan.heads / kv_heads;
    x.reshape([kv_heads, 1, rows, width])
        .repeat_dim(1, group)
        .reshape([plan.heads, rows, width])
}

/// The transpose of [`repeat_groups`].
fn sum_groups(x: Tensor<3>, plan: &AttentionPlan) -> Tensor<3> {
    let [heads, rows, width] = x.dims();
    let shape = [plan.kv_heads, heads / plan.kv_heads, rows, width];
    x.reshape(shape)
        .sum_dim(1)
        .reshape([plan.kv_heads, rows, width])
}
