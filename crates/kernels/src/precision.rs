//! The arithmetic of matrix products, chosen by their operands: [`Precision::operand`] makes them, the products take what
//! they are given. Sums, results, norms, softmax and log-sum-exp are f32 in both.

use burn::tensor::{DType, Tensor as BurnTensor};

use crate::host::{self, Host};
use crate::{Rounding, Tensor};

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

    /// `x` as an operand. Weights that are trained are rounded by their [`Rounding`].
    pub fn operand<const D: usize>(self, x: &Tensor<D>) -> Tensor<D> {
        match (self, Host::read(x)) {
            (Self::F32, _) => x.clone(),
            (Self::Bf16, None) => {
                device_form!(cuda::to_bf16(x));
                x.take_back(x.burn().cast(DType::BF16))
            }
            (Self::Bf16, Some(values)) => {
                let mut rounded = values.to_vec();
                Rounding::Nearest.round(&mut rounded);
                host::tensor(rounded, x.dims())
            }
        }
    }
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
