//! Gated products and activations.

use gpu::{Arg, Element, Program};

use super::{each, kernel, kind, launch, long};
use crate::tensor::Array;
use crate::{Activation, Tensor};

fn curve(entry: &'static str, x: Element, d: Element, activation: Activation) -> Program {
    let number = match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
    };
    Program {
        values: [kind(x), kind(d), number, 0],
        ..kernel(entry, x, d)
    }
}

/// f(gate) · up, or f(gate).
pub(crate) fn gated(
    gate: &Tensor<2>,
    up: Option<&Tensor<2>>,
    activation: Activation,
) -> Option<Tensor<2>> {
    let gate = gate.array()?;
    let up = match up {
        Some(up) => Some(up.array()?),
        None => None,
    };
    let alike = |up: &&Array<2>| up.element() == gate.element() && up.in_fours();
    if !(gate.in_fours() && up.as_ref().is_none_or(alike)) {
        return None;
    }
    let (y, quarter) = (gate.like(gate.element()), gate.view.len() / 4);
    launch(
        gate.gpu(),
        &curve("gated", gate.element(), gate.element(), activation),
        each(quarter),
        &[
            Arg::View(&gate.view),
            up.map_or(Arg::Null, |up| Arg::View(&up.view)),
            Arg::View(&y.view),
            long(quarter),
        ],
    );
    Some(y.into())
}

/// The gradients of gate and up.
pub(crate) fn gated_backward(
    dy: &Tensor<2>,
    gate: &Tensor<2>,
    up: &Tensor<2>,
    activation: Activation,
) -> Option<(Tensor<2>, Tensor<2>)> {
    let (gate, up) = (gate.array()?, up.array()?);
    if up.element() != gate.element() || !up.in_fours() {
        return None;
    }
    let dup = up.like(up.element());
    let dgate = curve_backward(dy.array()?, gate, Some((up, &dup)), None, activation)?;
    Some((dgate.into(), dup.into()))
}

/// As [`gated_backward`], and f(gate) · up.
pub(crate) fn gated_backward_inner(
    dy: &Tensor<2>,
    gate: &Tensor<2>,
    up: &Tensor<2>,
    activation: Activation,
) -> Option<(Tensor<2>, Tensor<2>, Tensor<2>)> {
    let (gate, up) = (gate.array()?, up.array()?);
    if up.element() != gate.element() || !up.in_fours() {
        return None;
    }
    let [dup, inner] = [0, 1].map(|_| up.like(up.element()));
    let dgate = curve_backward(
        dy.array()?,
        gate,
        Some((up, &dup)),
        Some(&inner),
        activation,
    )?;
    Some((dgate.into(), dup.into(), inner.into()))
}

/// The gradient of x.
pub(crate) fn activate_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    activation: Activation,
) -> Option<Tensor<2>> {
    Some(curve_backward(dy.array()?, x.array()?, None, None, activation)?.into())
}

fn curve_backward(
    dy: &Array<2>,
    gate: &Array<2>,
    up: Option<(&Array<2>, &Array<2>)>,
    inner: Option<&Array<2>>,
    activation: Activation,
) -> Option<Array<2>> {
    if !(dy.in_fours() && gate.in_fours()) {
        return None;
    }
    let (dgate, quarter) = (gate.like(gate.element()), gate.view.len() / 4);
    launch(
        gate.gpu(),
        &curve("gated_backward", gate.element(), dy.element(), activation),
        each(quarter),
        &[
            Arg::View(&dy.view),
            Arg::View(&gate.view),
            up.map_or(Arg::Null, |(up, _)| Arg::View(&up.view)),
            Arg::View(&dgate.view),
            up.map_or(Arg::Null, |(_, dup)| Arg::View(&dup.view)),
            inner.map_or(Arg::Null, |inner| Arg::View(&inner.view)),
            long(quarter),
        ],
    );
    Some(dgate)
}
