//! The linear map x Wᵀ and, for the families that have one, its bias.

use crate::gemm::{Matrix, Threads, Write, multiply};
use crate::host::{self, Host};
use crate::math::simd;
use crate::{Gradients, Slot, Tensor, add, composition, parallel};

/// x Wᵀ: `[n, in]` by `[out, in]` → `[n, out]`.
pub fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    let ([rows, depth], [out, weight_depth]) = (x.dims(), weight.dims());
    assert_eq!(depth, weight_depth, "columns of x and of the weight");
    device_form!(cuda::linear(x, weight));
    let (Some(x), Some(weight)) = (Host::read(x), Host::read(weight)) else {
        return x.take_back(composition::linear(&x.burn(), &weight.burn()));
    };
    let mut y = vec![0.0; rows * out];
    let (lhs, rhs) = (
        Matrix::new(&x, rows, depth),
        Matrix::new(&weight, out, depth).transposed(),
    );
    multiply(&mut y, out, Write::Set, 1.0, lhs, rhs, Threads::All);
    host::tensor(y, [rows, out])
}

/// x Wᵀ + to: one product on a GPU.
pub fn linear_add(x: &Tensor<2>, weight: &Tensor<2>, to: &Tensor<2>) -> Tensor<2> {
    device_form!(cuda::linear_add(x, weight, to));
    add(linear(x, weight), to)
}

/// The gradient of an input of several linear maps, Σ dy W in their order, for their outputs' gradients and weights.
///
/// # Panics
/// If there are none.
pub fn linear_backward_sum(maps: &[(&Tensor<2>, Tensor<2>)]) -> Tensor<2> {
    device_form!(cuda::linear_backward_sum(maps));
    let parts = maps.iter().map(|(dy, weight)| linear_backward(dy, weight));
    parts
        .reduce(|sum, part| add(sum, &part))
        .expect("at least one map")
}

/// The gradient of `x`, dy W.
pub fn linear_backward(dy: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    let ([rows, out], [weight_out, depth]) = (dy.dims(), weight.dims());
    assert_eq!(out, weight_out, "columns of dy and rows of the weight");
    device_form!(cuda::linear_backward(dy, weight));
    let (Some(dy), Some(weight)) = (Host::read(dy), Host::read(weight)) else {
        return dy.take_back(composition::linear_backward(&dy.burn(), &weight.burn()));
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
    device_form!(cuda::linear_backward_weight(dy, x, gradients, slot));
    let (Some(dy), Some(x), Some(sums)) = (Host::read(dy), Host::read(x), gradients.host(slot))
    else {
        return composition::linear_backward_weight(&dy.burn(), &x.burn(), gradients, slot);
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
    device_form!(cuda::add_bias(&x, bias));
    let composed = |x: &Tensor<2>| x.take_back(composition::add_bias(x.burn(), &bias.burn()));
    let Some(bias_host) = Host::read(bias) else {
        return composed(&x);
    };
    let bias_slice: &[f32] = &bias_host;
    let mut out = match host::take(x) {
        Ok(out) => out,
        Err(x) => return composed(&x),
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
    device_form!(cuda::bias_backward(dy, gradients, slot));
    let (Some(dy), Some(sums)) = (Host::read(dy), gradients.host(slot)) else {
        return composition::bias_backward(&dy.burn(), gradients, slot);
    };
    for row in dy.chunks_exact(width) {
        for (sum, &value) in sums.iter_mut().zip(row) {
            *sum += value;
        }
    }
}
