//! The gate of a Llama MLP: silu(gate) · up, silu(g) = g · σ(g).

use burn::tensor::Tensor;

use crate::host::{self, Host};
use crate::math::{sigmoid, simd};
use crate::{composition, parallel};

/// silu(gate) · up, elementwise; both `[n, d]`.
pub fn swiglu(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    let [rows, width] = gate.dims();
    assert_eq!(up.dims(), [rows, width], "up and gate");
    let (Some(gate), Some(up)) = (Host::read(gate), Host::read(up)) else {
        return composition::swiglu(gate, up);
    };
    let (gate, up): (&[f32], &[f32]) = (&gate, &up);
    let mut out = vec![0.0; rows * width];
    parallel::row_blocks(&mut out, width, |first, block| {
        let (gate, up) = (&gate[first * width..], &up[first * width..]);
        simd(
            #[inline(always)]
            || {
                for ((out, &gate), &up) in block.iter_mut().zip(gate).zip(up) {
                    *out = gate * sigmoid(gate) * up;
                }
            },
        );
    });
    host::tensor(out, [rows, width])
}

/// The gradients of gate and up.
pub fn swiglu_backward(dy: &Tensor<2>, gate: &Tensor<2>, up: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let [rows, width] = gate.dims();
    assert_eq!(up.dims(), [rows, width], "up and gate");
    assert_eq!(dy.dims(), [rows, width], "dy and gate");
    let (Some(dy), Some(gate), Some(up)) = (Host::read(dy), Host::read(gate), Host::read(up))
    else {
        return composition::swiglu_backward(dy, gate, up);
    };
    let (dy, gate, up): (&[f32], &[f32], &[f32]) = (&dy, &gate, &up);
    let (mut dgate, mut dup) = (vec![0.0; rows * width], vec![0.0; rows * width]);
    parallel::row_blocks_of_two(&mut dgate, &mut dup, width, |first, dgate, dup| {
        let (dy, gate, up) = (
            &dy[first * width..],
            &gate[first * width..],
            &up[first * width..],
        );
        simd(
            #[inline(always)]
            || {
                for ((((dgate, dup), &dy), &gate), &up) in
                    dgate.iter_mut().zip(dup).zip(dy).zip(gate).zip(up)
                {
                    let sigmoid = sigmoid(gate);
                    *dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
                    *dup = dy * gate * sigmoid;
                }
            },
        );
    });
    (
        host::tensor(dgate, [rows, width]),
        host::tensor(dup, [rows, width]),
    )
}
