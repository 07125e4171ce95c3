//! The linear map x Wᵀ and, for the families that have one, its bias.

use burn::tensor::Tensor;

use crate::gemm::{Matrix, Threads, Write, multiply};
use crate::host::{self, Host};
use crate::math::simd;
use crate::{Gradients, Slot, composition, parallel};

/// x Wᵀ: `[n, in]` by `[out, in]` → `[n, out]`.
pub fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    let ([rows, depth], [out, weight_depth]) = (x.dims(), weight.dims());
    assert_eq!(depth, weight_depth, "columns of x and of the weight");
    let (Some(x), Some(weight)) = (Host::read(x), Host::read(weight)) else {
        return composition::linear(x, weight);
    };
    let mut y = vec![0.0; rows * out];
    let (lhs, rhs) = (
        Matrix::new(&x, rows, depth),
        Matrix::new(&weight, out, depth).transposed(),
    );
    multiply(&mut y, out, Write::Set, 1.0, lhs, rhs, Threads::All);
    host::tensor(y, [rows, out])
}

/// The gradient of `x`, dy W.
pub fn linear_backward(dy: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    let ([rows, out], [weight_out, depth]) = (dy.dims(), weight.dims());
    assert_eq!(out, weight_out, "columns of dy and rows of the weight");
    let (Some(dy), Some(weight)) = (Host::read(dy), Host::read(weight)) else {
        return composition::linear_backward(dy, weight);
    };
    let mut dx = vec![0.0; rows * depth];
    let (lhs, rhs) = (
        Matrix::new(&dy, rows, out),
        Matrix::new(&weight, out, depth),
    );
    multiply(&mut dx, depth, Write::Set, 1.0, lhs, rhs, Threads::All);
    host::tensor(dx, [rows, depth])
}

/// Adds dyᵀ x to the gradient of the weight at `slot`.
pub fn linear_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    gradients: &mut Gradients,
    slot: &Slot,
) {
    let ([rows, depth], [dy_rows, out]) = (x.dims(), dy.dims());
    assert_eq!(dy_rows, rows, "rows of dy and x");
    assert_eq!(
        slot.len,
        out * depth,
        "gradient of a {out} × {depth} weight"
    );
    let (Some(dy), Some(x), Some(sums)) = (Host::read(dy), Host::read(x), gradients.host(slot))
    else {
        return composition::linear_backward_weight(dy, x, gradients, slot);
    };
    let (lhs, rhs) = (
        Matrix::new(&dy, rows, out).transposed(),
        Matrix::new(&x, rows, depth),
    );
    multiply(sums, depth, Write::Add, 1.0, lhs, rhs, Threads::All);
}

/// Adds `bias`, `[d]`, to every row of `x`, `[n, d]`; in place when nothing else holds `x`.
pub fn add_bias(x: Tensor<2>, bias: &Tensor<1>) -> Tensor<2> {
    let [rows, width] = x.dims();
    assert_eq!(bias.dims(), [width], "bias for rows of {width}");
    let Some(bias_host) = Host::read(bias) else {
        return composition::add_bias(x, bias);
    };
    let bias_slice: &[f32] = &bias_host;
    let mut out = match host::take(x) {
        Ok(out) => out,
        Err(x) => return composition::add_bias(x, bias),
    };
    parallel::row_blocks(&mut out, width, |_, block| {
        simd(
            #[inline(always)]
            || {
                for row in block.chunks_exact_mut(width) {
                    for (value, &bias) in row.iter_mut().zip(bias_slice) {
                        *value += bias;
                    }
                }
            },
        );
    });
    host::tensor(out, [rows, width])
}

/// Adds the column sums of `dy`, `[n, d]`, to the gradient of the bias at `slot`.
pub fn bias_backward(dy: &Tensor<2>, gradients: &mut Gradients, slot: &Slot) {
    let [_, width] = dy.dims();
    assert_eq!(slot.len, width, "gradient of a bias");
    let (Some(dy), Some(sums)) = (Host::read(dy), gradients.host(slot)) else {
        return composition::bias_backward(dy, gradients, slot);
    };
    for row in dy.chunks_exact(width) {
        for (sum, &value) in sums.iter_mut().zip(row) {
            *sum += value;
        }
    }
}
