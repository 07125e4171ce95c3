//! RMS normalisation as in Llama, Mistral and Qwen: y = weight · x / √(mean(x²) + ε), in f32.
//! Per-head norms are the same operation on `[tokens · heads, head_dim]`; for Gemma's the caller passes 1 + weight, whose
//! gradient is the weight's. Layer normalisation as in GPT-NeoX: y = weight · (x − mean(x)) / √(variance(x) + ε) + bias.

use crate::host::{self, Host};
use crate::math::{dot, simd, sum_of};
use crate::{Gradients, Precision, Slot, Tensor, add, composition, parallel};

/// What [`rms_norm_backward`] needs beside the inputs: 1 / √(mean(x²) + ε) of every row.
pub struct RmsSaved(Inverse);

#[allow(clippy::large_enum_variant, reason = "a handful live at a time")]
enum Inverse {
    Host(Vec<f32>),
    Device(Tensor<2>),
}

/// Normalises the rows of `x`, `[n, d]`, with `weight`, `[d]`.
pub fn rms_norm(x: &Tensor<2>, weight: &Tensor<1>, epsilon: f64) -> (Tensor<2>, RmsSaved) {
    let [rows, width] = x.dims();
    assert_eq!(weight.dims(), [width], "norm weight for rows of {width}");
    device_form!(cuda::rms_norm(x, weight, epsilon));
    let (Some(x_host), Some(weight_host)) = (Host::read(x), Host::read(weight)) else {
        let (y, inverse) = composition::rms_norm(&x.burn(), &weight.burn(), epsilon);
        return (x.take_back(y), RmsSaved::device(x.take_back(inverse)));
    };
    let (x, weight): (&[f32], &[f32]) = (&x_host, &weight_host);
    let mut inverse = vec![0.0; rows];
    parallel::row_blocks(&mut inverse, 1, |first, block| {
        simd(
            #[inline(always)]
            || {
                for (inverse, x) in block.iter_mut().zip(x[first * width..].chunks_exact(width)) {
                    *inverse = 1.0 / (dot(x, x) / width as f32 + epsilon as f32).sqrt();
                }
            },
        );
    });
    let mut out = vec![0.0; rows * width];
    parallel::row_blocks(&mut out, width, |first, block| {
        simd(
            #[inline(always)]
            || {
                let rows = block
                    .chunks_exact_mut(width)
                    .zip(x[first * width..].chunks_exact(width));
                for ((y, x), inverse) in rows.zip(&inverse[first..]) {
                    for ((y, &x), &weight) in y.iter_mut().zip(x).zip(weight) {
                        *y = weight * (x * inverse);
                    }
                }
            },
        );
    });
    (
        host::tensor(out, [rows, width]),
        RmsSaved(Inverse::Host(inverse)),
    )
}

/// As [`rms_norm`], with the rows as operands of products: one pass on a GPU.
pub fn rms_norm_operand(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    epsilon: f64,
    precision: Precision,
) -> (Tensor<2>, RmsSaved) {
    device_form!(cuda::rms_norm_operand(x, weight, epsilon, precision));
    let (y, saved) = rms_norm(x, weight, epsilon);
    (precision.operand(&y), saved)
}

/// The gradient of `x`.
pub fn rms_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    saved: &RmsSaved,
) -> Tensor<2> {
    let [rows, width] = x.dims();
    assert_eq!(dy.dims(), [rows, width], "dy and x");
    device_form!(cuda::rms_norm_backward(dy, x, weight, saved, None));
    let (Inverse::Host(inverse), Some(dy_host), Some(x_host), Some(weight_host)) =
        (&saved.0, Host::read(dy), Host::read(x), Host::read(weight))
    else {
        let [dy, inverse] = [dy, &saved.tensor(x)].map(Tensor::burn);
        let made = composition::rms_norm_backward(&dy, &x.burn(), &weight.burn(), &inverse);
        return x.take_back(made);
    };
    let (dy, x, weight): (&[f32], &[f32], &[f32]) = (&dy_host, &x_host, &weight_host);
    let mut out = vec![0.0; rows * width];
    parallel::row_blocks(&mut out, width, |first, block| {
        simd(
            #[inline(always)]
            || {
                let operands = dy[first * width..]
                    .chunks_exact(width)
                    .zip(x[first * width..].chunks_exact(width));
                for ((dx, (dy, x)), &inverse) in block
                    .chunks_exact_mut(width)
                    .zip(operands)
                    .zip(&inverse[first..])
                {
                    // dx = inverse · (weight·dy − x · inverse² · mean(weight·dy·x))
                    for ((dx, &dy), &weight) in dx.iter_mut().zip(dy).zip(weight) {
                        *dx = weight * dy;
                    }
                    let shared = dot(dx, x) / width as f32 * inverse * inverse;
                    for (dx, &x) in dx.iter_mut().zip(x) {
                        *dx = inverse * (*dx - x * shared);
                    }
                }
            },
        );
    });
    host::tensor(out, [rows, width])
}

/// As [`rms_norm_backward`], and `plus`: one pass on a GPU.
pub fn rms_norm_backward_add(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    saved: &RmsSaved,
    plus: &Tensor<2>,
) -> Tensor<2> {
    device_form!(cuda::rms_norm_backward(dy, x, weight, saved, Some(plus)));
    add(rms_norm_backward(dy, x, weight, saved), plus)
}

/// Adds Σ dy · x / √(mean(x²) + ε) over rows to the gradient of the weight at `slot`.
pub fn rms_norm_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    saved: &RmsSaved,
    gradients: &mut Gradients,
    slot: &Slot,
) {
    let [rows, width] = x.dims();
    assert_eq!(dy.dims(), [rows, width], "dy and x");
    assert_eq!(slot.len, width, "gradient of a norm weight");
    device_form!(cuda::rms_norm_backward_weight(
        dy, x, saved, gradients, slot
    ));
    let (Inverse::Host(inverse), Some(dy_host), Some(x_host), Some(sums)) = (
        &saved.0,
        Host::read(dy),
        Host::read(x),
        gradients.host(slot),
    ) else {
        let [dy, x, inverse] = [dy, x, &saved.tensor(x)].map(Tensor::burn);
        return composition::rms_norm_backward_weight(&dy, &x, &inverse, gradients, slot);
    };
    let (dy, x): (&[f32], &[f32]) = (&dy_host, &x_host);
    simd(
        #[inline(always)]
        || {
            for ((dy, x), inverse) in dy
                .chunks_exact(width)
                .zip(x.chunks_exact(width))
                .zip(inverse)
            {
                for ((sum, &dy), &x) in sums.iter_mut().zip(dy).zip(x) {
                    *sum += dy * (x * inverse);
                }
            }
        },
    );
}

impl RmsSaved {
    /// What a device keeps, `[n, 1]`.
    pub(crate) fn device(inverse: Tensor<2>) -> Self {
        Self(Inverse::Device(inverse))
    }

    /// `[n, 1]`, where `x` is.
    pub(crate) fn tensor(&self, x: &Tensor<2>) -> Tensor<2> {
        match &self.0 {
            Inverse::Host(inverse) => column(inverse.clone(), x),
            Inverse::Device(inverse) => inverse.clone(),
        }
    }
}

/// A value per row of `x`, `[n, 1]`, where `x` is.
fn column(values: Vec<f32>, x: &Tensor<2>) -> Tensor<2> {
    let rows = values.len();
    Tensor::new(values, [rows, 1], &x.device())
}

/// What [`layer_norm_backward`] needs beside the inputs: mean and 1 / √(variance + ε) of every row.
pub struct LayerSaved(Moments);

enum Moments {
    Host(Vec<[f32; 2]>),
    Device(Box<[Tensor<2>; 2]>),
}

/// Normalises the rows of `x`, `[n, d]`, to mean 0 and variance 1, then applies `weight` and `bias`, `[d]`.
pub fn layer_norm(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    bias: &Tensor<1>,
    epsilon: f64,
) -> (Tensor<2>, LayerSaved) {
    let [rows, width] = x.dims();
    assert_eq!(weight.dims(), [width], "norm weight for rows of {width}");
    assert_eq!(bias.dims(), [width], "norm bias for rows of {width}");
    device_form!(cuda::layer_norm(x, weight, bias, epsilon));
    let (Some(x_host), Some(weight_host), Some(bias_host)) =
        (Host::read(x), Host::read(weight), Host::read(bias))
    else {
        let [weight, bias] = [weight, bias].map(Tensor::burn);
        let (y, mean, inverse) = composition::layer_norm(&x.burn(), &weight, &bias, epsilon);
        let moments = [mean, inverse].map(|values| x.take_back(values));
        return (
            x.take_back(y),
            LayerSaved(Moments::Device(Box::new(moments))),
        );
    };
    let (x, weight, bias): (&[f32], &[f32], &[f32]) = (&x_host, &weight_host, &bias_host);
    let mut moments = vec![[0.0; 2]; rows];
    simd(
        #[inline(always)]
        || {
            for (moments, x) in moments.iter_mut().zip(x.chunks_exact(width)) {
                let mean = sum_of(x, x, |x, _| x) / width as f32;
                let variance = sum_of(x, x, |x, _| (x - mean) * (x - mean)) / width as f32;
                *moments = [mean, 1.0 / (variance + epsilon as f32).sqrt()];
            }
        },
    );
    let mut out = vec![0.0; rows * width];
    parallel::row_blocks(&mut out, width, |first, block| {
        simd(
            #[inline(always)]
            || {
                let rows = block
                    .chunks_exact_mut(width)
                    .zip(x[first * width..].chunks_exact(width));
                for ((y, x), [mean, inverse]) in rows.zip(&moments[first..]) {
                    let weights = weight.iter().zip(bias);
                    for ((y, &x), (&weight, &bias)) in y.iter_mut().zip(x).zip(weights) {
                        *y = (x - mean) * inverse * weight + bias;
                    }
                }
            },
        );
    });
    (
        host::tensor(out, [rows, width]),
        LayerSaved(Moments::Host(moments)),
    )
}

/// The gradient of `x`.
pub fn layer_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    saved: &LayerSaved,
) -> Tensor<2> {
    let [rows, width] = x.dims();
    assert_eq!(dy.dims(), [rows, width], "dy and x");
    device_form!(cuda::layer_norm_backward(dy, x, weight, saved));
    let (Moments::Host(moments), Some(dy_host), Some(x_host), Some(weight_host)) =
        (&saved.0, Host::read(dy), Host::read(x), Host::read(weight))
    else {
        let [mean, inverse] = saved.tensors(x).map(|values| values.burn());
        let (dy, weight) = (&dy.burn(), &weight.burn());
        let made = composition::layer_norm_backward(dy, &x.burn(), weight, &mean, &inverse);
        return x.take_back(made);
    };
    let (dy, x, weight): (&[f32], &[f32], &[f32]) = (&dy_host, &x_host, &weight_host);
    let mut out = vec![0.0; rows * width];
    parallel::row_blocks(&mut out, width, |first, block| {
        simd(
            #[inline(always)]
            || {
                let operands = dy[first * width..]
                    .chunks_exact(width)
                    .zip(x[first * width..].chunks_exact(width));
                for ((dx, (dy, x)), &[mean, inverse]) in block
                    .chunks_exact_mut(width)
                    .zip(operands)
                    .zip(&moments[first..])
                {
                    for ((dx, &dy), &weight) in dx.iter_mut().zip(dy).zip(weight) {
                        *dx = weight * dy;
                    }
                    let level = sum_of(dx, dx, |dx, _| dx) / width as f32;
                    let shared =
                        sum_of(dx, x, |dx, x| dx * (x - mean)) / width as f32 * inverse * inverse;
                    for (dx, &x) in dx.iter_mut().zip(x) {
                        *dx = inverse * (*dx - level - (x - mean) * shared);
                    }
                }
            },
        );
    });
    host::tensor(out, [rows, width])
}

/// Adds the gradients of weight and bias at `slots`.
pub fn layer_norm_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    saved: &LayerSaved,
    gradients: &mut Gradients,
    slots: [&Slot; 2],
) {
    let [rows, width] = x.dims();
    assert_eq!(dy.dims(), [rows, width], "dy and x");
    for slot in slots {
        assert_eq!(slot.len, width, "gradient of a norm's weight or bias");
    }
    device_form!(cuda::layer_norm_backward_weight(
        dy, x, saved, gradients, slots
    ));
    let (Moments::Host(moments), Some(dy_host), Some(x_host), true) = (
        &saved.0,
        Host::read(dy),
        Host::read(x),
        gradients.host(slots[0]).is_some(),
    ) else {
        let [mean, inverse] = saved.tensors(x).map(|values| values.burn());
        let (dy, x) = (&dy.burn(), &x.burn());
        return composition::layer_norm_backward_weight(dy, x, &mean, &inverse, gradients, slots);
    };
    let (dy, x): (&[f32], &[f32]) = (&dy_host, &x_host);
    for (slot, of_weight) in slots.into_iter().zip([true, false]) {
        let sums = gradients.host(slot).expect("slots lie on one device");
        simd(
            #[inline(always)]
            || {
                let rows = dy.chunks_exact(width).zip(x.chunks_exact(width));
                for ((dy, x), [mean, inverse]) in rows.zip(moments) {
                    for ((sum, &dy), &x) in sums.iter_mut().zip(dy).zip(x) {
                        let factor = if of_weight { (x - mean) * inverse } else { 1.0 };
                        *sum += dy * factor;
                    }
                }
            },
        );
    }
}

impl LayerSaved {
    /// What a device keeps, `[n, 1]` each.
    #[cfg(feature = "cuda")]
    pub(crate) fn device(moments: [Tensor<2>; 2]) -> Self {
        Self(Moments::Device(Box::new(moments)))
    }

    /// Mean and inverse deviation, `[n, 1]` each, where `x` is.
    pub(crate) fn tensors(&self, x: &Tensor<2>) -> [Tensor<2>; 2] {
        match &self.0 {
            Moments::Host(moments) => [0, 1].map(|index| {
                let values = moments.iter().map(|moments| moments[index]).collect();
                column(values, x)
            }),
            Moments::Device(moments) => (**moments).clone(),
        }
    }
}
