//! The reference form of every operation over burn tensors: on any device, and under burn's autodiff (the forwards), where
//! they are the oracle of the fused forms. Written to be checked by eye, not to be fast.
//!
//! Shapes as in the functions of the same name at the crate's root.

mod attention;
mod head;

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::precision::result;
use crate::{Activation, Gradients, RotaryTable, Slot};

pub use attention::{segment_attention, segment_attention_backward};
pub use head::{logprob_head, logprob_head_backward, token_logprobs};

/// Rows `ids` of the table, f32.
pub fn embedding(weight: &Tensor<2>, ids: &[u32]) -> Tensor<2> {
    result(weight.clone().select(
        0,
        indices(ids.iter().map(|&id| i64::from(id)), &weight.device()),
    ))
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

/// dx = inverse · (w·dy − x · inverse² · mean(w·dy·x)).
pub fn rms_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    inverse: &Tensor<2>,
) -> Tensor<2> {
    let normal = x.clone() * inverse.clone();
    let scaled = dy.clone() * weight.clone().unsqueeze::<2>();
    let shared = (scaled.clone() * normal.clone()).mean_dim(1);
    (scaled - normal * shared) * inverse.clone()
}

/// Adds Σ dy · x · inverse over rows.
pub fn rms_norm_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    inverse: &Tensor<2>,
    gradients: &mut Gradients,
    slot: &Slot,
) {
    let products = dy.clone() * x.clone() * inverse.clone();
    gradients.accumulate(slot, products.sum_dim(0).reshape([slot.len]));
}

/// x Wᵀ.
pub fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    result(x.clone().matmul(weight.clone().transpose()))
}

/// dy W.
pub fn linear_backward(dy: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    result(dy.clone().matmul(weight.clone()))
}

/// Adds dyᵀ x.
pub fn linear_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    gradients: &mut Gradients,
    slot: &Slot,
) {
    let product = result(dy.clone().transpose().matmul(x.clone()));
    gradients.accumulate(slot, product.reshape([slot.len]));
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
    let cos = table.cos.burn().reshape([rows, 1, half]);
    let sin = table.sin.burn().reshape([rows, 1, half]).mul_scalar(sign);
    let mut parts = vec![
        low.clone() * cos.clone() - high.clone() * sin.clone(),
        high * cos + low * sin,
    ];
    if 2 * half < head_dim {
        parts.push(x.narrow(2, 2 * half, head_dim - 2 * half));
    }
    Tensor::cat(parts, 2).reshape([rows, width])
}

/// f(gate) · up.
pub fn gated(gate: &Tensor<2>, up: &Tensor<2>, activation: Activation) -> Tensor<2> {
    activate(gate, activation) * up.clone()
}

/// The gradients of gate and up.
pub fn gated_backward(
    dy: &Tensor<2>,
    gate: &Tensor<2>,
    up: &Tensor<2>,
    activation: Activation,
) -> (Tensor<2>, Tensor<2>) {
    (
        activate_backward(&(dy.clone() * up.clone()), gate, activation),
        dy.clone() * activate(gate, activation),
    )
}

/// f(x).
pub fn activate(x: &Tensor<2>, activation: Activation) -> Tensor<2> {
    let x = x.clone();
    match activation {
        Activation::Silu => x.clone() * sigmoid(x),
        Activation::GeluTanh => x.clone().mul_scalar(0.5) * gelu_tanh(&x).add_scalar(1.0),
        Activation::Gelu => {
            x.clone().mul_scalar(0.5) * x.mul_scalar(FRAC_1_SQRT_2).erf().add_scalar(1.0)
        }
    }
}

/// The gradient of x.
pub fn activate_backward(dy: &Tensor<2>, x: &Tensor<2>, activation: Activation) -> Tensor<2> {
    let x = x.clone();
    let slope = match activation {
        Activation::Silu => {
            let s = sigmoid(x.clone());
            s.clone() * (x * (-s).add_scalar(1.0)).add_scalar(1.0)
        }
        Activation::GeluTanh => {
            let tanh = gelu_tanh(&x);
            let inner = (x.clone() * x.clone())
                .mul_scalar(3.0 * 0.044_715)
                .add_scalar(1.0)
                .mul_scalar((2.0 / PI).sqrt());
            let bend = (-(tanh.clone() * tanh.clone())).add_scalar(1.0) * inner * x;
            (tanh.add_scalar(1.0) + bend).mul_scalar(0.5)
        }
        Activation::Gelu => {
            let below = x
                .clone()
                .mul_scalar(FRAC_1_SQRT_2)
                .erf()
                .add_scalar(1.0)
                .mul_scalar(0.5);
            let density = (x.clone() * x.clone())
                .mul_scalar(-0.5)
                .exp()
                .mul_scalar((0.5 / PI).sqrt());
            below + x * density
        }
    };
    dy.clone() * slope
}

/// tanh(√(2/π) · (x + 0.044715 x³)).
fn gelu_tanh(x: &Tensor<2>) -> Tensor<2> {
    let cube = x.clone() * x.clone() * x.clone();
    (x.clone() + cube.mul_scalar(0.044_715))
        .mul_scalar((2.0 / PI).sqrt())
        .tanh()
}

/// cap · tanh(x / cap).
pub fn soft_cap(x: Tensor<2>, cap: f64) -> Tensor<2> {
    x.div_scalar(cap).tanh().mul_scalar(cap)
}

/// (x − mean) / √(variance + ε) · w + b of every row, with the mean and the inverse deviation, `[n, 1]` each.
pub fn layer_norm(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    bias: &Tensor<1>,
    epsilon: f64,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let mean = x.clone().mean_dim(1);
    let centered = x.clone() - mean.clone();
    let variance = (centered.clone() * centered.clone()).mean_dim(1);
    let inverse = variance.add_scalar(epsilon).sqrt().recip();
    let normal = centered * inverse.clone();
    let y = normal * weight.clone().unsqueeze::<2>() + bias.clone().unsqueeze::<2>();
    (y, mean, inverse)
}

/// dx = inverse · (w·dy − mean(w·dy) − normal · mean(w·dy·normal)).
pub fn layer_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    mean: &Tensor<2>,
    inverse: &Tensor<2>,
) -> Tensor<2> {
    let normal = (x.clone() - mean.clone()) * inverse.clone();
    let scaled = dy.clone() * weight.clone().unsqueeze::<2>();
    let shared = (scaled.clone() * normal.clone()).mean_dim(1);
    let level = scaled.clone().mean_dim(1);
    (scaled - level - normal * shared) * inverse.clone()
}

/// Adds Σ dy · normal to the weight's gradient and Σ dy to the bias's.
pub fn layer_norm_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    mean: &Tensor<2>,
    inverse: &Tensor<2>,
    gradients: &mut Gradients,
    [weight_slot, bias_slot]: [&Slot; 2],
) {
    let normal = (x.clone() - mean.clone()) * inverse.clone();
    let dweight = (dy.clone() * normal).sum_dim(0);
    gradients.accumulate(weight_slot, dweight.reshape([weight_slot.len]));
    bias_backward(dy, gradients, bias_slot);
}

/// Columns of queries, keys and values that lie head by head (q₀ k₀ v₀ q₁ k₁ v₁ …), apart.
pub fn split_heads(x: &Tensor<2>, heads: usize) -> [Tensor<2>; 3] {
    let [rows, width] = x.dims();
    let head_dim = width / (3 * heads);
    let x = x.clone().reshape([rows, heads, 3, head_dim]);
    [0, 1, 2].map(|part| {
        x.clone()
            .narrow(2, part, 1)
            .reshape([rows, heads * head_dim])
    })
}

/// The inverse of [`split_heads`].
pub fn join_heads(parts: &[Tensor<2>; 3], heads: usize) -> Tensor<2> {
    let [rows, width] = parts[0].dims();
    let parts = parts
        .iter()
        .map(|part| part.clone().reshape([rows, heads, 1, width / heads]));
    Tensor::cat(parts.collect(), 2).reshape([rows, 3 * width])
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
