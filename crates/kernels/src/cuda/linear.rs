//! Linear maps: products by cuBLASLt, and biases.

use gpu::{Arg, Element, Operand, Product, View};

use super::{done, each, empty, int, kernel, launch, long, own, typed};
use crate::tensor::Array;
use crate::{Gradients, Slot, Tensor};

/// Both operands of a product in one type: bf16 if one of them is.
pub(super) fn operands(x: &Array<2>, y: &Array<2>) -> (Array<2>, Array<2>) {
    let element = x.element().max(y.element());
    (typed(x, element), typed(y, element))
}

/// x Wᵀ.
pub(crate) fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Option<Tensor<2>> {
    let (x, weight) = operands(x.array()?, weight.array()?);
    let ([m, k], [n, _]) = (x.shape, weight.shape);
    let out = empty(x.gpu(), [m, n], x.element());
    product(
        [m, n, k],
        (&x.view, false),
        (&weight.view, true),
        &out.view,
        None,
    );
    Some(out.into())
}

/// x Wᵀ + to, f32.
pub(crate) fn linear_add(x: &Tensor<2>, weight: &Tensor<2>, to: &Tensor<2>) -> Option<Tensor<2>> {
    let (x, weight) = operands(x.array()?, weight.array()?);
    let to = to.array()?;
    if to.element() != Element::F32 {
        return None;
    }
    let ([m, k], [n, _]) = (x.shape, weight.shape);
    let (out, plus) = (to.like(Element::F32), Some(&to.view));
    product(
        [m, n, k],
        (&x.view, false),
        (&weight.view, true),
        &out.view,
        plus,
    );
    Some(out.into())
}

/// dy W.
pub(crate) fn linear_backward(dy: &Tensor<2>, weight: &Tensor<2>) -> Option<Tensor<2>> {
    let (dy, weight) = operands(dy.array()?, weight.array()?);
    let ([m, k], [_, n]) = (dy.shape, weight.shape);
    let out = empty(dy.gpu(), [m, n], dy.element());
    product(
        [m, n, k],
        (&dy.view, false),
        (&weight.view, false),
        &out.view,
        None,
    );
    Some(out.into())
}

/// Σ dy W, f32.
pub(crate) fn linear_backward_sum(maps: &[(&Tensor<2>, Tensor<2>)]) -> Option<Tensor<2>> {
    let mut sum: Option<Array<2>> = None;
    for (dy, weight) in maps {
        let (dy, weight) = operands(dy.array()?, weight.array()?);
        let ([m, k], [_, n]) = (dy.shape, weight.shape);
        let plus = sum.as_ref().map(|sum| sum.view.clone());
        let out = sum.get_or_insert_with(|| empty(dy.gpu(), [m, n], Element::F32));
        let (lhs, rhs) = ((&dy.view, false), (&weight.view, false));
        product([m, n, k], lhs, rhs, &out.view, plus.as_ref());
    }
    sum.map(Tensor::from)
}

/// Adds dyᵀ x at `slot`.
pub(crate) fn linear_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    gradients: &mut Gradients,
    slot: &Slot,
) -> Option<()> {
    let (dy, x) = operands(dy.array()?, x.array()?);
    let sums = gradients.array(slot)?;
    let ([k, m], [_, n]) = (dy.shape, x.shape);
    let plus = Some(&sums.view);
    product(
        [m, n, k],
        (&dy.view, true),
        (&x.view, false),
        &sums.view,
        plus,
    );
    Some(())
}

/// `out` = lhs · rhs + `plus`; `true` with an operand means its transpose.
pub(super) fn product(
    [m, n, k]: [usize; 3],
    (lhs, lhs_transposed): (&View, bool),
    (rhs, rhs_transposed): (&View, bool),
    out: &View,
    plus: Option<&View>,
) {
    let operand = |view, transposed| Operand { view, transposed };
    done(out.gpu().product(&Product {
        m,
        n,
        k,
        lhs: operand(lhs, lhs_transposed),
        rhs: operand(rhs, rhs_transposed),
        out,
        plus,
    }));
}

/// x + bias; in place when nothing else holds `x`.
pub(crate) fn add_bias(x: &Tensor<2>, bias: &Tensor<1>) -> Option<Tensor<2>> {
    let (x, bias) = (x.array()?, bias.array()?);
    let out = own(x);
    let len = out.view.len();
    launch(
        x.gpu(),
        &kernel("add_bias", x.element(), Element::F32),
        each(len),
        &[
            Arg::View(&out.view),
            Arg::View(&bias.view),
            long(len),
            int(x.shape[1]),
        ],
    );
    Some(out.into())
}
