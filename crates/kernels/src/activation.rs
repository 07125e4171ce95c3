//! The non-linear part of an MLP: f(gate) · up where the MLP is gated, f(x) where it is not.

use crate::host::{self, Host};
use crate::math::{erf, exp, sigmoid, simd, tanh};
use crate::{Tensor, composition, parallel};

/// The function f.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// silu(x) = x · σ(x) (Llama and most others).
    Silu,
    /// x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))) (Gemma).
    GeluTanh,
    /// x · Φ(x) = x/2 · (1 + erf(x/√2)) (GPT-NeoX).
    Gelu,
}

/// √(2/π).
const GELU_SLOPE: f32 = 0.797_884_6;
/// The cubic term of the tanh form.
const GELU_CUBE: f32 = 0.044_715;

/// f with its slope; one type for each function, so that loops over it vectorise.
trait Curve: Copy + Send + Sync {
    fn value(self, x: f32) -> f32;
    /// (f(x), f′(x)).
    fn slope(self, x: f32) -> (f32, f32);
}

#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct GeluTanh;
#[derive(Clone, Copy)]
struct Gelu;

impl Curve for Silu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn slope(self, x: f32) -> (f32, f32) {
        let sigmoid = sigmoid(x);
        (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
    }
}

impl Curve for GeluTanh {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        0.5 * x * (1.0 + tanh(GELU_SLOPE * (x + GELU_CUBE * x * x * x)))
    }

    #[inline(always)]
    fn slope(self, x: f32) -> (f32, f32) {
        let tanh = tanh(GELU_SLOPE * (x + GELU_CUBE * x * x * x));
        let inner = GELU_SLOPE * (1.0 + 3.0 * GELU_CUBE * x * x);
        let slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner;
        (0.5 * x * (1.0 + tanh), slope)
    }
}

impl Curve for Gelu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
    }

    #[inline(always)]
    fn slope(self, x: f32) -> (f32, f32) {
        /// 1/√(2π).
        const DENSITY: f32 = 0.398_942_3;
        let below = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
        (x * below, below + x * DENSITY * exp(-0.5 * x * x))
    }
}

/// f(gate) · up, elementwise; both `[n, d]`.
pub fn gated(gate: &Tensor<2>, up: &Tensor<2>, activation: Activation) -> Tensor<2> {
    assert_eq!(up.dims(), gate.dims(), "up and gate");
    device_form!(cuda::gated(gate, Some(up), activation));
    let (Some(gate_host), Some(up_host)) = (Host::read(gate), Host::read(up)) else {
        return gate.take_back(composition::gated(&gate.burn(), &up.burn(), activation));
    };
    let out = match activation {
        Activation::Silu => gated_host(&gate_host, &up_host, gate.dims(), Silu),
        Activation::GeluTanh => gated_host(&gate_host, &up_host, gate.dims(), GeluTanh),
        Activation::Gelu => gated_host(&gate_host, &up_host, gate.dims(), Gelu),
    };
    host::tensor(out, gate.dims())
}

/// The gradients of gate and up.
pub fn gated_backward(
    dy: &Tensor<2>,
    gate: &Tensor<2>,
    up: &Tensor<2>,
    activation: Activation,
) -> (Tensor<2>, Tensor<2>) {
    let shape = gate.dims();
    assert_eq!(up.dims(), shape, "up and gate");
    assert_eq!(dy.dims(), shape, "dy and gate");
    device_form!(cuda::gated_backward(dy, gate, up, activation));
    let (Some(dy_host), Some(gate_host), Some(up_host)) =
        (Host::read(dy), Host::read(gate), Host::read(up))
    else {
        let operands = [dy, gate, up].map(Tensor::burn);
        let (dgate, dup) =
            composition::gated_backward(&operands[0], &operands[1], &operands[2], activation);
        return (gate.take_back(dgate), gate.take_back(dup));
    };
    let operands = [&dy_host[..], &gate_host, &up_host];
    let (dgate, dup) = match activation {
        Activation::Silu => gated_backward_host(operands, shape, Silu),
        Activation::GeluTanh => gated_backward_host(operands, shape, GeluTanh),
        Activation::Gelu => gated_backward_host(operands, shape, Gelu),
    };
    (host::tensor(dgate, shape), host::tensor(dup, shape))
}

/// As [`gated_backward`], and [`gated`] once more: one pass on a GPU. What a down projection's weight needs, made again when its
/// gradient is.
pub fn gated_backward_inner(
    dy: &Tensor<2>,
    gate: &Tensor<2>,
    up: &Tensor<2>,
    activation: Activation,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    device_form!(cuda::gated_backward_inner(dy, gate, up, activation));
    let (dgate, dup) = gated_backward(dy, gate, up, activation);
    (dgate, dup, gated(gate, up, activation))
}

/// f(x), elementwise.
pub fn activate(x: &Tensor<2>, activation: Activation) -> Tensor<2> {
    device_form!(cuda::gated(x, None, activation));
    let Some(x_host) = Host::read(x) else {
        return x.take_back(composition::activate(&x.burn(), activation));
    };
    let out = match activation {
        Activation::Silu => activate_host(&x_host, x.dims(), Silu),
        Activation::GeluTanh => activate_host(&x_host, x.dims(), GeluTanh),
        Activation::Gelu => activate_host(&x_host, x.dims(), Gelu),
    };
    host::tensor(out, x.dims())
}

/// The gradient of x.
pub fn activate_backward(dy: &Tensor<2>, x: &Tensor<2>, activation: Activation) -> Tensor<2> {
    assert_eq!(dy.dims(), x.dims(), "dy and x");
    device_form!(cuda::activate_backward(dy, x, activation));
    let (Some(dy_host), Some(x_host)) = (Host::read(dy), Host::read(x)) else {
        let made = composition::activate_backward(&dy.burn(), &x.burn(), activation);
        return x.take_back(made);
    };
    let out = match activation {
        Activation::Silu => activate_backward_host(&dy_host, &x_host, x.dims(), Silu),
        Activation::GeluTanh => activate_backward_host(&dy_host, &x_host, x.dims(), GeluTanh),
        Activation::Gelu => activate_backward_host(&dy_host, &x_host, x.dims(), Gelu),
    };
    host::tensor(out, x.dims())
}

fn gated_host(gate: &[f32], up: &[f32], [rows, width]: [usize; 2], curve: impl Curve) -> Vec<f32> {
    let mut out = vec![0.0; rows * width];
    parallel::row_blocks(&mut out, width, |first, block| {
        let (gate, up) = (&gate[first * width..], &up[first * width..]);
        simd(
            #[inline(always)]
            || {
                for ((out, &gate), &up) in block.iter_mut().zip(gate).zip(up) {
                    *out = curve.value(gate) * up;
                }
            },
        );
    });
    out
}

fn gated_backward_host(
    [dy, gate, up]: [&[f32]; 3],
    [rows, width]: [usize; 2],
    curve: impl Curve,
) -> (Vec<f32>, Vec<f32>) {
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
                    let (value, slope) = curve.slope(gate);
                    *dgate = dy * up * slope;
                    *dup = dy * value;
                }
            },
        );
    });
    (dgate, dup)
}

fn activate_host(x: &[f32], [rows, width]: [usize; 2], curve: impl Curve) -> Vec<f32> {
    let mut out = vec![0.0; rows * width];
    parallel::row_blocks(&mut out, width, |first, block| {
        simd(
            #[inline(always)]
            || {
                for (out, &x) in block.iter_mut().zip(&x[first * width..]) {
                    *out = curve.value(x);
                }
            },
        );
    });
    out
}

fn activate_backward_host(
    dy: &[f32],
    x: &[f32],
    [rows, width]: [usize; 2],
    curve: impl Curve,
) -> Vec<f32> {
    let mut out = vec![0.0; rows * width];
    parallel::row_blocks(&mut out, width, |first, block| {
        let operands = dy[first * width..].iter().zip(&x[first * width..]);
        simd(
            #[inline(always)]
            || {
                for (out, (&dy, &x)) in block.iter_mut().zip(operands) {
                    *out = dy * curve.slope(x).1;
                }
            },
        );
    });
    out
}
