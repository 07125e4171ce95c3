//! Linear maps and norms at their slots: with or without a bias, in every kind of norm.

use burn::tensor::Tensor;
use kernels::{
    Flat, Gradients, LayerSaved, RmsSaved, add_bias, bias_backward, layer_norm,
    layer_norm_backward, linear, linear_backward, rms_norm, rms_norm_backward,
};

use crate::config::NormKind;
use crate::slots::Affine;

/// What a norm computes, and its ε.
#[derive(Clone, Copy)]
pub(crate) struct Norm {
    pub kind: NormKind,
    pub epsilon: f64,
}

/// What a norm's backward needs beside its input.
#[allow(clippy::large_enum_variant, reason = "a handful live at a time")]
pub(crate) enum NormSaved {
    Rms(RmsSaved),
    Layer(LayerSaved),
}

impl Affine {
    /// x Wᵀ + b, `[n, out]`.
    pub fn linear(&self, weights: &Flat, x: &Tensor<2>) -> Tensor<2> {
        let [_, columns] = x.dims();
        let weight = weights.view(&self.weight, [self.weight.len / columns, columns]);
        let y = linear(x, &weight);
        match &self.bias {
            Some(bias) => add_bias(y, &weights.view(bias, [bias.len])),
            None => y,
        }
    }

    /// The gradient of `x`; adds those of weight and bias.
    pub fn linear_backward(
        &self,
        weights: &Flat,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let ([_, out], [_, columns]) = (dy.dims(), x.dims());
        if let Some(bias) = &self.bias {
            bias_backward(dy, gradients, bias);
        }
        let weight = weights.view(&self.weight, [out, columns]);
        linear_backward(dy, x, &weight, gradients, &self.weight)
    }

    /// The rows of `x`, normalised.
    pub fn norm(&self, weights: &Flat, x: &Tensor<2>, norm: Norm) -> (Tensor<2>, NormSaved) {
        let weight = self.norm_weight(weights, norm.kind);
        if let Some(bias) = &self.bias {
            let bias = weights.view(bias, [bias.len]);
            let (y, saved) = layer_norm(x, &weight, &bias, norm.epsilon);
            (y, NormSaved::Layer(saved))
        } else {
            let (y, saved) = rms_norm(x, &weight, norm.epsilon);
            (y, NormSaved::Rms(saved))
        }
    }

    /// The gradient of `x`; adds those of weight and bias.
    pub fn norm_backward(
        &self,
        weights: &Flat,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        saved: &NormSaved,
        kind: NormKind,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let weight = self.norm_weight(weights, kind);
        match (saved, &self.bias) {
            (NormSaved::Layer(saved), Some(bias)) => {
                let slots = [&self.weight, bias];
                layer_norm_backward(dy, x, &weight, saved, gradients, slots)
            }
            (NormSaved::Rms(saved), None) => {
                rms_norm_backward(dy, x, &weight, saved, gradients, &self.weight)
            }
            _ => unreachable!("layer norms have a bias, and no others"),
        }
    }

    /// What the kernel multiplies by; its gradient is the weight's in every kind.
    fn norm_weight(&self, weights: &Flat, kind: NormKind) -> Tensor<1> {
        let weight = weights.view(&self.weight, [self.weight.len]);
        match kind {
            NormKind::RmsPlusOne => weight.add_scalar(1.0),
            NormKind::Rms | NormKind::Layer => weight,
        }
    }
}
