//! The reference form of every operation over burn tensors: on any device, and under burn's autodiff (the forwards), where
//! they are the oracle of the fused forms. Written to be checked by eye, not to be fast.
//!
//! Shapes as in the functions of the same name at the crate's root.

mod attention;
mod head;

use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::{Gradients, RotaryTable, Slot};

pub use attention::{segment_attention, segment_attention_backward};
pub use head::{logprob_head, logprob_head_backward, token_logprobs};

/// Rows `ids` of the table.
pub fn embedding(weight: &Tensor<2>, ids: &[u32]) -> Tensor<2> {
    weight.clone().select(
        0,
        indices(ids.iter().map(|&id| i64::from(id)), &weight.device()),
    )
}

/// Adds the rows of `dy` to the table's gradient.
pub fn embedding_backward(dy: &Tensor<2>, ids: &[u32], gradients: &mut Gradients, slot: &Slot) {
    let ([_, width], device) = (dy.dims(), dy.device());
    let ids = indices(ids.iter().map(|&id| i64::from(id)), &device);
    let table = Tensor::<2>::zeros([slot.len / width, width], &device);
    let table = table.select_assign(0, ids, dy.clone(), IndexingUpdateOp::Add);
    gradients.accumulate(slot, table.reshape([slot.len]));
}

/// The normalised rows and 1 / √(mean(x²) + ε), `[n, 1]`.
pub fn rms_norm(x: &Tensor<2>, weight: &Tensor<1>, epsilon: f64) -> (Tensor<2>, Tensor<2>) {
    let mean = (x.clone() * x.clone()).mean_dim(1);
    let inverse = mean.add_scalar(epsilon).sqrt().recip();
    (
        x.clone() * inverse.clone() * weight.clone().unsqueeze::<2>(),
        inverse,
    )
}

/// dx = inverse · (w·dy − x · inverse² · mean(w·dy·x)); the weight's gradient is Σ dy · x · inverse over rows.
pub fn rms_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    inverse: &Tensor<2>,
    gradients: &mut Gradients,
    slot: &Slot,
) -> Tensor<2> {
    let normal = x.clone() * inverse.clone();
    gradients.accumulate(
        slot,
        (dy.clone() * normal.clone()).sum_dim(0).reshape([slot.len]),
    );
    let scaled = dy.clone() * weight.clone().unsqueeze::<2>();
    let shared = (scaled.clone() * normal.clone()).mean_dim(1);
    (scaled - normal * shared) * inverse.clone()
}

/// x Wᵀ.
pub fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.clone().matmul(weight.clone().transpose())
}

/// dy W; adds dyᵀ x.
pub fn linear_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<2>,
    gradients: &mut Gradients,
    slot: &Slot,
) -> Tensor<2> {
    gradients.accumulate(
        slot,
        dy.clone().transpose().matmul(x.clone()).reshape([slot.len]),
    );
    dy.clone().matmul(weight.clone())
}

/// x + bias in every row.
pub fn add_bias(x: Tensor<2>, bias: &Tensor<1>) -> Tensor<2> {
    x + bias.clone().unsqueeze::<2>()
}

/// Adds the column sums of `dy`.
pub fn bias_backward(dy: &Tensor<2>, gradients: &mut Gradients, slot: &Slot) {
    gradients.accumulate(slot, dy.clone().sum_dim(0).reshape([slot.len]));
}

/// The rotation of every head.
pub fn rotary(x: Tensor<2>, table: &RotaryTable, heads: usize) -> Tensor<2> {
    turn(x, table, heads, 1.0)
}

/// The opposite rotation.
pub fn rotary_backward(dy: Tensor<2>, table: &RotaryTable, heads: usize) -> Tensor<2> {
    turn(dy, table, heads, -1.0)
}

pub(crate) fn turn(x: Tensor<2>, table: &RotaryTable, heads: usize, sign: f32) -> Tensor<2> {
    let ([rows, width], [_, half]) = (x.dims(), table.cos.dims());
    let head_dim = width / heads;
    let x = x.reshape([rows, heads, head_dim]);
    let (low, high) = (
        x.clone().narrow(2, 0, half),
        x.clone().narrow(2, half, half),
    );
    let cos = table.cos.clone().reshape([rows, 1, half]);
    let sin = table.sin.clone().reshape([rows, 1, half]).mul_scalar(sign);
    let mut parts = vec![
        low.clone() * cos.clone() - high.clone() * sin.clone(),
        high * cos + low * sin,
    ];
    if 2 * half < head_dim {
        parts.push(x.narrow(2, 2 * half, head_dim - 2 * half));
    }
    Tensor::cat(parts, 2).reshape([rows, width])
}

/// silu(gate) · up.
pub fn swiglu(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    gate.clone() * sigmoid(gate.clone()) * up.clone()
}

/// The gradients of gate and up.
pub fn swiglu_backward(dy: &Tensor<2>, gate: &Tensor<2>, up: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let s = sigmoid(gate.clone());
    let dsilu = s.clone() * (gate.clone() * (-s.clone()).add_scalar(1.0)).add_scalar(1.0);
    (
        dy.clone() * up.clone() * dsilu,
        dy.clone() * gate.clone() * s,
    )
}

/// Rows `rows` of x.
pub fn gather_rows(x: &Tensor<2>, rows: &[usize]) -> Tensor<2> {
    x.clone()
        .select(0, indices(rows.iter().map(|&row| row as i64), &x.device()))
}

/// Row i of `dy` added to row `rows[i]` of zeros.
pub fn scatter_add_rows(dy: &Tensor<2>, rows: &[usize], total: usize) -> Tensor<2> {
    let ([_, width], device) = (dy.dims(), dy.device());
    let rows = indices(rows.iter().map(|&row| row as i64), &device);
    Tensor::zeros([total, width], &device).select_assign(0, rows, dy.clone(), IndexingUpdateOp::Add)
}

fn indices(values: impl Iterator<Item = i64>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.collect();
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), device)
}
