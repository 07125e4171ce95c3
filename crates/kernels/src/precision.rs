//! The arithmetic of matrix products, chosen by their operands: [`Precision::operand`] makes them, the products take what
//! they are given. Sums, results, norms, softmax and log-sum-exp are f32 in both.

use burn::tensor::{DType, Tensor as BurnTensor};

use crate::Tensor;
use crate::host::{self, Host};
use crate::math::simd;
use crate::parallel;

/// Of what the operands of matrix products and of attention are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32 as it is.
    #[default]
    F32,
    /// Rounded to bf16, the nearest and to even in a tie. On flex, which multiplies f32, these are f32 tensors of bf16's
    /// values: bf16's numbers, but neither its speed nor its size. Products of two of them are exact in f32.
    Bf16,
}

impl Precision {
    /// Bytes of an operand's element on a GPU.
    pub fn gpu_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// `x` as an operand.
    pub fn operand<const D: usize>(self, x: &Tensor<D>) -> Tensor<D> {
        match (self, Host::read(x)) {
            (Self::F32, _) => x.clone(),
            (Self::Bf16, None) => {
                device_form!(cuda::to_bf16(x));
                x.take_back(x.burn().cast(DType::BF16))
            }
            (Self::Bf16, Some(values)) => {
                let mut rounded = values.to_vec();
                round(&mut rounded);
                host::tensor(rounded, x.dims())
            }
        }
    }
}

/// Replaces every value by the nearest of bf16.
pub(crate) fn round(values: &mut [f32]) {
    parallel::row_blocks(values, 1, |_, block| {
        simd(
            #[inline(always)]
            || {
                for value in block {
                    let bits = value.to_bits();
                    let even = (bits >> 16) & 1;
                    let rounded = bits.wrapping_add(0x7fff + even) & 0xffff_0000;
                    // Adding could turn a NaN into another value.
                    *value = if value.is_nan() {
                        *value
                    } else {
                        f32::from_bits(rounded)
                    };
                }
            },
        );
    });
}

/// The bits of bf16 that are nearest to `values`, even in a tie: those of [`Precision::operand`]. NaN stays one.
///
/// # Panics
/// If the lengths differ.
pub fn to_bf16(values: &[f32], bits: &mut [u16]) {
    assert_eq!(values.len(), bits.len(), "as many bits as values");
    parallel::of_elements(values, bits, |values, bits| {
        for (value, bits) in values.iter().zip(bits) {
            let exact = value.to_bits();
            let even = (exact >> 16) & 1;
            *bits = if value.is_nan() {
                // Its upper half alone might be an infinity's.
                (exact >> 16) as u16 | 0x40
            } else {
                (exact.wrapping_add(0x7fff + even) >> 16) as u16
            };
        }
    });
}

/// The values of bits of bf16.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn from_bf16(bits: &[u16], values: &mut [f32]) {
    assert_eq!(values.len(), bits.len(), "as many values as bits");
    parallel::of_elements(bits, values, |bits, values| {
        for (bits, value) in bits.iter().zip(values) {
            *value = f32::from_bits(u32::from(*bits) << 16);
        }
    });
}

/// A result in f32, whatever the operands were.
pub(crate) fn result<const D: usize>(x: BurnTensor<D>) -> BurnTensor<D> {
    if x.dtype() == DType::F32 {
        x
    } else {
        x.cast(DType::F32)
    }
}

/// `x` with elements like those of `operand`, to be multiplied with it.
pub(crate) fn like<const D: usize, const E: usize>(
    x: BurnTensor<D>,
    operand: &BurnTensor<E>,
) -> BurnTensor<D> {
    if x.dtype() == operand.dtype() {
        x
    } else {
        x.cast(operand.dtype())
    }
}

#[cfg(test)]
mod tests {
    use super::{from_bf16, round, to_bf16};

    #[test]
    fn rounding_is_that_of_bf16_to_nearest_and_even() {
        let mut state = 1u32;
        let mut values = vec![
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            1.0 + 1.0 / 256.0,
            f32::MAX,
            f32::MIN_POSITIVE / 3.0,
        ];
        for _ in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            values.push(f32::from_bits(state));
        }
        let mut rounded = values.clone();
        round(&mut rounded);
        let mut bits = vec![0; values.len()];
        to_bf16(&values, &mut bits);
        let mut again = vec![0.0; values.len()];
        from_bf16(&bits, &mut again);
        for (again, rounded) in again.iter().zip(&rounded) {
            let same = again.to_bits() == rounded.to_bits();
            assert!(
                same || again.is_nan() && rounded.is_nan(),
                "{again} {rounded}"
            );
        }
        for (value, rounded) in values.into_iter().zip(rounded) {
            let expected = half::bf16::from_f32(value).to_f32();
            assert!(
                rounded.to_bits() == expected.to_bits() || value.is_nan() && rounded.is_nan(),
                "{value} became {rounded}, not {expected}"
            );
        }
    }
}
