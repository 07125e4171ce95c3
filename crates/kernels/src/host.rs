//! The border between burn tensors and host slices: how a fused form sees the memory of a flex tensor, and how its
//! result becomes a tensor again. Nothing here computes.

use std::ops::Deref;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, TensorData};

use crate::Tensor;
use crate::tensor::Place;

/// A flex tensor held for reading as one contiguous f32 slice, row-major.
#[derive(Clone)]
pub(crate) struct Host(FlexTensor);

impl Host {
    /// The tensor's memory (shared, not copied, when it is contiguous), or `None` when it lives on another backend, is
    /// tracked by autodiff, or is not f32.
    pub(crate) fn read<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        let tensor = match &tensor.0 {
            Place::Burn(tensor) => tensor.clone(),
            #[cfg(feature = "cuda")]
            Place::Gpu(_) => return None,
        };
        let primitive = tensor.try_into_primitive::<Flex>().ok()?;
        if primitive.dtype() != DType::F32 {
            return None;
        }
        Some(Self(if primitive.is_contiguous() {
            primitive
        } else {
            primitive.to_contiguous()
        }))
    }

    fn into_tensor(self) -> Tensor<1> {
        burn::tensor::Tensor::from_primitive::<Flex>(self.0).into()
    }
}

impl Deref for Host {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.0
            .as_slice()
            .expect("`read` keeps contiguous f32 tensors only")
    }
}

/// A flex tensor as its only holder has it: itself, or a copy, in the memory of `before` if nobody holds that any more. What was copied
/// is `before` then.
pub(crate) fn unshared(tensor: Tensor<1>, before: &mut Option<Tensor<1>>) -> Tensor<1> {
    let Some(held) = Host::read(&tensor) else {
        return tensor;
    };
    drop(tensor);
    if held.0.is_unique() {
        return held.into_tensor();
    }
    let mut copy = Vec::new();
    if let Some(before) = before.take()
        && let Some(host) = Host::read(&before)
    {
        drop(before);
        if host.0.is_unique() {
            copy = host.into_tensor().into_vec();
        }
    }
    copy.clear();
    copy.extend_from_slice(&held);
    *before = Some(held.into_tensor());
    let len = copy.len();
    self::tensor(copy, [len])
}

/// A flex tensor that takes over `data`.
pub(crate) fn tensor<const D: usize>(data: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    let primitive = FlexTensor::from_data(TensorData::new(data, shape));
    burn::tensor::Tensor::from_primitive::<Flex>(primitive).into()
}

/// The elements of one of burn's tensors, row-major; without a copy when a flex tensor is the only one to its memory.
///
/// # Panics
/// If the tensor is not f32 or the device fails.
pub(crate) fn into_vec<const D: usize>(tensor: burn::tensor::Tensor<D>) -> Vec<f32> {
    tensor
        .into_data()
        .try_into_vec()
        .expect("tensors of this crate are f32")
}

/// `tensor`'s elements for writing in place when it is a flex tensor; the tensor itself otherwise.
#[allow(
    clippy::result_large_err,
    reason = "the error is the operand, handed back"
)]
pub(crate) fn take<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, Tensor<D>> {
    let host = Host::read(&tensor).is_some();
    if host {
        Ok(tensor.into_vec())
    } else {
        Err(tensor)
    }
}
