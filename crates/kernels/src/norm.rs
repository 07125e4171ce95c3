//! RMS normalisation as in Llama, Mistral and Qwen: y = weight · x / √(mean(x²) + ε), in f32.
//! Per-head norms are the same operation on `[tokens · heads, head_dim]`.

use burn::tensor::Tensor;

use crate::host::{self, Host};
use crate::math::{dot, simd};
use crate::{Gradients, Slot, composition, parallel};

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
    let (Some(x_host), Some(weight_host)) = (Host::read(x), Host::read(weight)) else {
        let (y, inverse) = composition::rms_norm(x, weight, epsilon);
        return (y, RmsSaved(Inverse::Device(inverse)));
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

/// The gradient of `x`; adds the gradient of the weight at `slot`.
pub fn rms_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    saved: &RmsSaved,
    gradients: &mut Gradients,
    slot: &Slot,
) -> Tensor<2> {
    let [rows, width] = x.dims();
    assert_eq!(dy.dims(), [rows, width], "dy and x");
    assert_eq!(slot.len, width, "gradient of a norm weight");
    let inverse = match &saved.0 {
        Inverse::Host(inverse) => inverse,
        Inverse::Device(inverse) => {
            return composition::rms_norm_backward(dy, x, weight, inverse, gradients, slot);
        }
    };
    let (Some(dy_host), Some(x_host), Some(weight_host), Some(sums)) = (
        Host::read(dy),
        Host::read(x),
        Host::read(weight),
        gradients.host(slot),
    ) else {
        let inverse = Tensor::from_data(
            burn::tensor::TensorData::new(inverse.clone(), [rows, 1]),
            &x.device(),
        );
        return composition::rms_norm_backward(dy, x, weight, &inverse, gradients, slot);
    };
    let (dy, x, weight): (&[f32], &[f32], &[f32]) = (&dy_host, &x_host, &weight_host);
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
