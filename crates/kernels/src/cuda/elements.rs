//! Element by element, and the ways between element types, burn and this device.

use std::ops::Range;

use burn::tensor::TensorData;
use gpu::{Arg, Element, Gpu, View};

use super::{done, each, kernel, launch, long};
use crate::Tensor;
use crate::tensor::Array;

/// x · factor + term.
pub(crate) fn affine<const D: usize>(x: &Array<D>, factor: f32, term: f32) -> Array<D> {
    convert(x, x.element(), factor, term)
}

fn convert<const D: usize>(x: &Array<D>, element: Element, factor: f32, term: f32) -> Array<D> {
    let out = x.like(element);
    let len = x.view.len();
    launch(
        x.gpu(),
        &kernel("affine", x.element(), element),
        each(len),
        &[
            Arg::View(&x.view),
            Arg::View(&out.view),
            long(len),
            Arg::Float(factor),
            Arg::Float(term),
        ],
    );
    out
}

/// The same values as f32.
pub(crate) fn as_f32<const D: usize>(x: &Array<D>) -> Array<D> {
    typed(x, Element::F32)
}

pub(super) fn typed<const D: usize>(x: &Array<D>, element: Element) -> Array<D> {
    if x.element() == element {
        x.clone()
    } else {
        convert(x, element, 1.0, 0.0)
    }
}

/// The values rounded to bf16.
pub(crate) fn to_bf16<const D: usize>(x: &Tensor<D>) -> Option<Tensor<D>> {
    Some(typed(x.array()?, Element::Bf16).into())
}

/// A copy on burn's CUDA backend, f32.
pub(crate) fn to_burn<const D: usize>(array: &Array<D>) -> burn::tensor::Tensor<D> {
    let values: Vec<f32> = done(as_f32(array).view.download());
    let device = burn::tensor::Device::cuda(array.gpu().ordinal());
    burn::tensor::Tensor::from_data(TensorData::new(values, array.shape), &device)
}

/// A copy of a tensor of burn's, f32.
pub(crate) fn from_burn<const D: usize>(
    gpu: &'static Gpu,
    tensor: burn::tensor::Tensor<D>,
) -> Array<D> {
    let shape = tensor.dims();
    let values = crate::host::into_vec(tensor);
    let view = done(View::upload(gpu, &values, Element::F32));
    Array { view, shape }
}

/// Adds `gradient` to elements `range` of `bucket`.
pub(crate) fn accumulate(
    bucket: &Tensor<1>,
    range: Range<usize>,
    gradient: &Tensor<1>,
) -> Option<()> {
    let sums = bucket.slice(range);
    let sums = sums.array()?;
    // A composition's gradient comes from burn's backend.
    let gradient = match gradient.array() {
        Some(gradient) => gradient.clone(),
        None => from_burn(sums.gpu(), gradient.burn()),
    };
    add_into(sums, &gradient)
}

/// Adds `b` to `a`, f32.
fn add_into<const D: usize>(a: &Array<D>, b: &Array<D>) -> Option<()> {
    sum(a, b, a)
}

fn sum<const D: usize>(a: &Array<D>, b: &Array<D>, out: &Array<D>) -> Option<()> {
    if !(a.in_fours() && b.in_fours() && out.in_fours()) {
        return None;
    }
    let quarter = a.view.len() / 4;
    launch(
        a.gpu(),
        &kernel("add", a.element(), b.element()),
        each(quarter),
        &[
            Arg::View(&a.view),
            Arg::View(&b.view),
            Arg::View(&out.view),
            long(quarter),
        ],
    );
    Some(())
}

/// a + b, f32; in place when `a` is f32 and nothing else holds it.
pub(crate) fn add(a: &Tensor<2>, b: &Tensor<2>) -> Option<Tensor<2>> {
    let (a, b) = (a.array()?, b.array()?);
    let out = if a.element() == Element::F32 && a.view.is_unique() {
        a.clone()
    } else {
        a.like(Element::F32)
    };
    sum(a, b, &out)?;
    Some(out.into())
}

/// `x` itself when nothing else holds it, else a copy.
pub(super) fn own<const D: usize>(x: &Array<D>) -> Array<D> {
    if x.view.is_unique() {
        return x.clone();
    }
    let out = x.like(x.element());
    done(out.view.copy(&x.view));
    out
}
