//! RMS norm and layer norm.

use gpu::{Arg, Element};

use super::{Normal, column_sums, empty, int, kernel, launch, warps};
use crate::{Gradients, LayerSaved, Precision, RmsSaved, Slot, Tensor};

/// The normalised rows in the type of `x`.
pub(crate) fn rms_norm(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    epsilon: f64,
) -> Option<(Tensor<2>, RmsSaved)> {
    let element = x.array()?.element();
    rms_norm_into(x, weight, epsilon, element)
}

/// The normalised rows as operands.
pub(crate) fn rms_norm_operand(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    epsilon: f64,
    precision: Precision,
) -> Option<(Tensor<2>, RmsSaved)> {
    let element = match precision {
        Precision::F32 => x.array()?.element(),
        Precision::Bf16 => Element::Bf16,
    };
    rms_norm_into(x, weight, epsilon, element)
}

fn rms_norm_into(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    epsilon: f64,
    element: Element,
) -> Option<(Tensor<2>, RmsSaved)> {
    let (x, weight) = (x.array()?, weight.array()?);
    let ([rows, width], gpu) = (x.shape, x.gpu());
    if !(x.in_fours() && weight.in_fours()) {
        return None;
    }
    let (y, inverse) = (x.like(element), empty(gpu, [rows, 1], Element::F32));
    launch(
        gpu,
        &kernel("rms_norm", x.element(), element),
        warps(rows),
        &[
            Arg::View(&x.view),
            Arg::View(&weight.view),
            Arg::View(&y.view),
            Arg::View(&inverse.view),
            int(rows),
            int(width),
            Arg::Float(epsilon as f32),
        ],
    );
    Some((y.into(), RmsSaved::device(inverse.into())))
}

/// The gradient of `x`, in its type, and `plus`.
pub(crate) fn rms_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    saved: &RmsSaved,
    plus: Option<&Tensor<2>>,
) -> Option<Tensor<2>> {
    let inverse = saved.tensor(x);
    let (dy, x, weight) = (dy.array()?, x.array()?, weight.array()?);
    let plus = match plus {
        Some(plus) => Some(plus.array()?),
        None => None,
    };
    if plus.is_some_and(|plus| plus.element() != Element::F32 || !plus.in_fours()) {
        return None;
    }
    let ([rows, width], inverse) = (x.shape, inverse.array()?);
    if !(x.in_fours() && dy.in_fours() && weight.in_fours()) {
        return None;
    }
    let dx = x.like(x.element());
    launch(
        x.gpu(),
        &kernel("rms_norm_backward", x.element(), dy.element()),
        warps(rows),
        &[
            Arg::View(&dy.view),
            Arg::View(&x.view),
            Arg::View(&weight.view),
            Arg::View(&inverse.view),
            plus.map_or(Arg::Null, |plus| Arg::View(&plus.view)),
            Arg::View(&dx.view),
            int(rows),
            int(width),
        ],
    );
    Some(dx.into())
}

/// Adds Σ dy · x · inverse.
pub(crate) fn rms_norm_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    saved: &RmsSaved,
    gradients: &mut Gradients,
    slot: &Slot,
) -> Option<()> {
    let inverse = saved.tensor(x);
    let normal = Normal {
        x: x.array()?,
        mean: None,
        inverse: inverse.array()?,
    };
    column_sums(dy.array()?, Some(&normal), gradients, slot)
}

/// The normalised rows, f32.
pub(crate) fn layer_norm(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    bias: &Tensor<1>,
    epsilon: f64,
) -> Option<(Tensor<2>, LayerSaved)> {
    let (x, weight, bias) = (x.array()?, weight.array()?, bias.array()?);
    let ([rows, width], gpu) = (x.shape, x.gpu());
    if ![x.in_fours(), weight.in_fours(), bias.in_fours()]
        .iter()
        .all(|&it| it)
    {
        return None;
    }
    let y = x.like(Element::F32);
    let [mean, inverse] = [0, 1].map(|_| empty(gpu, [rows, 1], Element::F32));
    launch(
        gpu,
        &kernel("layer_norm", x.element(), Element::F32),
        warps(rows),
        &[
            Arg::View(&x.view),
            Arg::View(&weight.view),
            Arg::View(&bias.view),
            Arg::View(&y.view),
            Arg::View(&mean.view),
            Arg::View(&inverse.view),
            int(rows),
            int(width),
            Arg::Float(epsilon as f32),
        ],
    );
    let saved = LayerSaved::device([mean, inverse].map(Tensor::from));
    Some((y.into(), saved))
}

/// The gradient of `x`, in its type.
pub(crate) fn layer_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    saved: &LayerSaved,
) -> Option<Tensor<2>> {
    let moments = saved.tensors(x);
    let (dy, x, weight) = (dy.array()?, x.array()?, weight.array()?);
    let ([rows, width], [mean, inverse]) = (x.shape, moments.each_ref().map(Tensor::array));
    if ![x.in_fours(), dy.in_fours(), weight.in_fours()]
        .iter()
        .all(|&it| it)
    {
        return None;
    }
    let dx = x.like(x.element());
    launch(
        x.gpu(),
        &kernel("layer_norm_backward", x.element(), dy.element()),
        warps(rows),
        &[
            Arg::View(&dy.view),
            Arg::View(&x.view),
            Arg::View(&weight.view),
            Arg::View(&mean?.view),
            Arg::View(&inverse?.view),
            Arg::View(&dx.view),
            int(rows),
            int(width),
        ],
    );
    Some(dx.into())
}

/// Adds the gradients of weight and bias.
pub(crate) fn layer_norm_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    saved: &LayerSaved,
    gradients: &mut Gradients,
    [weight, bias]: [&Slot; 2],
) -> Option<()> {
    let moments = saved.tensors(x);
    let [mean, inverse] = moments.each_ref().map(Tensor::array);
    let (dy, x) = (dy.array()?, x.array()?);
    gradients.array(bias)?;
    let normal = Normal {
        x,
        mean: Some(mean?),
        inverse: inverse?,
    };
    column_sums(dy, Some(&normal), gradients, weight)?;
    column_sums(dy, None, gradients, bias)
}
