//! The log-prob head in chunks of rows: the logits of at most [`CHUNK`] rows exist at once.

use burn::tensor::{Int, Tensor, TensorData};

use crate::precision::result;
use crate::{Gradients, Slot, host};

/// Rows whose logits are held at once.
const CHUNK: usize = 64;

/// The log-probability of every target, `[n]`, and the log-sum-exp, `[n, 1]`, of all rows at once. Differentiable.
pub fn token_logprobs(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    soft_cap: Option<f64>,
) -> (Tensor<1>, Tensor<2>) {
    let logits = logits(hidden, weight, soft_cap);
    let max = logits.clone().max_dim(1).detach();
    let lse = (logits.clone() - max.clone()).exp().sum_dim(1).log() + max;
    let ids = ids(targets, hidden);
    (
        (logits.gather(1, ids) - lse.clone()).reshape([targets.len()]),
        lse,
    )
}

/// The log-probabilities and log-sum-exps on the host.
pub fn logprob_head(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    soft_cap: Option<f64>,
) -> (Vec<f32>, Vec<f32>) {
    let (mut logps, mut lses) = (Vec::new(), Vec::new());
    for (index, targets) in targets.chunks(CHUNK).enumerate() {
        let hidden = hidden.clone().narrow(0, index * CHUNK, targets.len());
        let (logp, lse) = token_logprobs(&hidden, weight, targets, soft_cap);
        logps.extend(host::into_vec(logp));
        lses.extend(host::into_vec(lse));
    }
    (logps, lses)
}

/// dL/dlogits = dlogp · (1 at the target − softmax), chunk by chunk; returns dhidden and adds the weight's gradient where
/// it is asked for.
pub fn logprob_head_backward(
    dlogps: &[f32],
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    soft_cap: Option<f64>,
    lse: &[f32],
    mut sums: Option<(&mut Gradients, &Slot)>,
) -> Tensor<2> {
    let device = hidden.device();
    let weight = &result(weight.clone());
    let mut parts = Vec::new();
    for (index, targets) in targets.chunks(CHUNK).enumerate() {
        let (start, rows) = (index * CHUNK, targets.len());
        let column = |values: &[f32]| {
            Tensor::<2>::from_data(
                TensorData::new(values[start..start + rows].to_vec(), [rows, 1]),
                &device,
            )
        };
        let hidden = result(hidden.clone().narrow(0, start, rows));
        let (dlogp, lse) = (column(dlogps), column(lse));
        let logits = logits(&hidden, weight, soft_cap);
        let softmax = (logits.clone() - lse).exp();
        let dlogits = (softmax * dlogp.clone()).neg();
        let dlogits = dlogits.scatter(
            1,
            ids(targets, &hidden),
            dlogp,
            burn::tensor::IndexingUpdateOp::Add,
        );
        let dlogits = match soft_cap {
            Some(cap) => {
                let tanh = logits.div_scalar(cap);
                dlogits * (-(tanh.clone() * tanh)).add_scalar(1.0)
            }
            None => dlogits,
        };
        if let Some((gradients, slot)) = &mut sums {
            let product = dlogits.clone().transpose().matmul(hidden);
            gradients.accumulate(slot, product.reshape([slot.len]));
        }
        parts.push(dlogits.matmul(weight.clone()));
    }
    if parts.is_empty() {
        result(hidden.zeros_like())
    } else {
        Tensor::cat(parts, 0)
    }
}

fn logits(hidden: &Tensor<2>, weight: &Tensor<2>, soft_cap: Option<f64>) -> Tensor<2> {
    // A product of bf16 tensors would have bf16 results, and logits need more than that. As f32 the operands multiply exactly.
    let (hidden, weight) = (result(hidden.clone()), result(weight.clone()));
    let logits = hidden.matmul(weight.transpose());
    match soft_cap {
        Some(cap) => super::soft_cap(logits, cap),
        None => logits,
    }
}

/// The targets as a column of indices beside `hidden`.
fn ids(targets: &[u32], hidden: &Tensor<2>) -> Tensor<2, Int> {
    let ids: Vec<i64> = targets.iter().map(|&id| i64::from(id)).collect();
    Tensor::from_data(TensorData::new(ids, [targets.len(), 1]), &hidden.device())
}
