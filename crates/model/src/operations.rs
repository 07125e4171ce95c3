//! Linear maps and norms at their slots: with or without a bias, with or without an adapter, in every kind of norm.

use kernels::{
    Flat, Gradients, LayerSaved, RmsSaved, Tensor, add, add_bias, bias_backward, layer_norm,
    layer_norm_backward, layer_norm_backward_weight, linear, linear_add, linear_backward,
    linear_backward_sum, linear_backward_weight, rms_norm, rms_norm_backward,
    rms_norm_backward_add, rms_norm_backward_weight, rms_norm_operand,
};

use crate::config::NormKind;
use crate::slots::{Affine, LowRank};

/// What a model computes with: its own weights, which are trained unless an adapter is.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub base: &'a Flat,
    pub adapter: Option<AdapterWeights<'a>>,
}

/// An adapter's weights, and the factor on what they add.
#[derive(Clone, Copy)]
pub(crate) struct AdapterWeights<'a> {
    pub flat: &'a Flat,
    pub scale: f32,
}

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

impl Weights<'_> {
    /// `x` as an operand of products with these weights.
    pub fn operand(&self, x: &Tensor<2>) -> Tensor<2> {
        self.base.precision().operand(x)
    }

    /// Whether the model's own weights are trained.
    fn train(&self) -> bool {
        self.adapter.is_none()
    }
}

impl Affine {
    /// x Wᵀ + b of the operand `x`, `[n, out]`, and what the adapter adds.
    pub fn linear(&self, weights: Weights<'_>, x: &Tensor<2>) -> Tensor<2> {
        let [_, columns] = x.dims();
        let shape = [self.weight.len / columns, columns];
        let y = linear(x, &weights.base.operand(&self.weight, shape));
        let y = match &self.bias {
            Some(bias) => add_bias(y, &weights.base.view(bias, [bias.len])),
            None => y,
        };
        match (&self.adapter, weights.adapter) {
            (Some(low_rank), Some(adapter)) => add(y, &low_rank.linear(adapter, x)),
            _ => y,
        }
    }

    /// As [`Affine::linear`], and `to`.
    pub fn linear_add(&self, weights: Weights<'_>, x: &Tensor<2>, to: &Tensor<2>) -> Tensor<2> {
        if self.bias.is_some() {
            return add(self.linear(weights, x), to);
        }
        let [_, columns] = x.dims();
        let shape = [self.weight.len / columns, columns];
        let sum = linear_add(x, &weights.base.operand(&self.weight, shape), to);
        // What an adapter adds comes after what there is without it, which keeps the bits that the reference saw.
        match (&self.adapter, weights.adapter) {
            (Some(low_rank), Some(adapter)) => linear_add(
                &low_rank.narrow(adapter, x),
                &low_rank.matrix_b(adapter),
                &sum,
            ),
            _ => sum,
        }
    }

    /// The gradient of what several maps read, the operand `x`, for those of their outputs; adds those of what is trained.
    pub fn linear_backward_sum(
        maps: &[(&Self, &Tensor<2>)],
        weights: Weights<'_>,
        x: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        if !weights.train() {
            let parts = maps
                .iter()
                .map(|(map, dy)| map.linear_backward(weights, dy, x, gradients));
            let sum = parts.reduce(|sum, part| add(sum, &part));
            return sum.expect("at least one map");
        }
        let [_, columns] = x.dims();
        let dys: Vec<_> = maps
            .iter()
            .map(|(map, dy)| map.weight_backward(weights, dy, x, gradients))
            .collect();
        let weight = |map: &Self| {
            let shape = [map.weight.len / columns, columns];
            weights.base.operand(&map.weight, shape)
        };
        let parts = dys.iter().zip(maps).map(|(dy, (map, _))| (dy, weight(map)));
        linear_backward_sum(&parts.collect::<Vec<_>>())
    }

    /// The gradient of what it reads, `[n, columns]`, alone; `dy` is an operand. `None` where an adapter has its part in it.
    pub fn input_backward(
        &self,
        weights: Weights<'_>,
        dy: &Tensor<2>,
        columns: usize,
    ) -> Option<Tensor<2>> {
        if self.adapter.is_some() {
            return None;
        }
        let [_, out] = dy.dims();
        let weight = weights.base.operand(&self.weight, [out, columns]);
        Some(linear_backward(dy, &weight))
    }

    /// Adds the gradients of weight and bias where they are trained. Returns `dy` as an operand.
    pub fn weight_backward(
        &self,
        weights: Weights<'_>,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        self.bias_backward(weights, dy, gradients);
        let dy = weights.operand(dy);
        self.matrix_backward(weights, &dy, x, gradients);
        dy
    }

    /// Adds the gradient of the bias where there is one that is trained.
    pub fn bias_backward(&self, weights: Weights<'_>, dy: &Tensor<2>, gradients: &mut Gradients) {
        if let (Some(bias), true) = (&self.bias, weights.train()) {
            bias_backward(dy, gradients, bias);
        }
    }

    /// Adds the gradient of the matrix where it is trained; both are operands.
    pub fn matrix_backward(
        &self,
        weights: Weights<'_>,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        gradients: &mut Gradients,
    ) {
        if weights.train() {
            linear_backward_weight(dy, x, gradients, &self.weight);
        }
    }

    /// The gradient of the operand `x`; adds those of what is trained.
    pub fn linear_backward(
        &self,
        weights: Weights<'_>,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let ([_, out], [_, columns]) = (dy.dims(), x.dims());
        let dy = &self.weight_backward(weights, dy, x, gradients);
        let dx = linear_backward(dy, &weights.base.operand(&self.weight, [out, columns]));
        match (&self.adapter, weights.adapter) {
            (Some(low_rank), Some(adapter)) => {
                add(dx, &low_rank.linear_backward(adapter, dy, x, gradients))
            }
            _ => dx,
        }
    }

    /// The rows of `x`, normalised.
    pub fn norm(&self, weights: Weights<'_>, x: &Tensor<2>, norm: Norm) -> (Tensor<2>, NormSaved) {
        let weight = self.norm_weight(weights, norm.kind);
        if let Some(bias) = &self.bias {
            let bias = weights.base.view(bias, [bias.len]);
            let (y, saved) = layer_norm(x, &weight, &bias, norm.epsilon);
            (y, NormSaved::Layer(saved))
        } else {
            let (y, saved) = rms_norm(x, &weight, norm.epsilon);
            (y, NormSaved::Rms(saved))
        }
    }

    /// As [`Affine::norm`], with the rows as operands.
    pub fn norm_operand(
        &self,
        weights: Weights<'_>,
        x: &Tensor<2>,
        norm: Norm,
    ) -> (Tensor<2>, NormSaved) {
        if self.bias.is_some() {
            let (y, saved) = self.norm(weights, x, norm);
            return (weights.operand(&y), saved);
        }
        let weight = self.norm_weight(weights, norm.kind);
        let precision = weights.base.precision();
        let (y, saved) = rms_norm_operand(x, &weight, norm.epsilon, precision);
        (y, NormSaved::Rms(saved))
    }

    /// The gradient of `x`, and `plus`; adds those of weight and bias where they are trained.
    pub fn norm_backward_add(
        &self,
        weights: Weights<'_>,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        saved: &NormSaved,
        kind: NormKind,
        plus: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let NormSaved::Rms(saved) = saved else {
            let dx = self.norm_backward(weights, dy, x, saved, kind, gradients);
            return add(dx, plus);
        };
        if weights.train() {
            rms_norm_backward_weight(dy, x, saved, gradients, &self.weight);
        }
        rms_norm_backward_add(dy, x, &self.norm_weight(weights, kind), saved, plus)
    }

    /// The gradient of `x`; adds those of weight and bias where they are trained.
    pub fn norm_backward(
        &self,
        weights: Weights<'_>,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        saved: &NormSaved,
        kind: NormKind,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let weight = self.norm_weight(weights, kind);
        match (saved, &self.bias) {
            (NormSaved::Layer(saved), Some(bias)) => {
                if weights.train() {
                    let slots = [&self.weight, bias];
                    layer_norm_backward_weight(dy, x, saved, gradients, slots);
                }
                layer_norm_backward(dy, x, &weight, saved)
            }
            (NormSaved::Rms(saved), None) => {
                if weights.train() {
                    rms_norm_backward_weight(dy, x, saved, gradients, &self.weight);
                }
                rms_norm_backward(dy, x, &weight, saved)
            }
            _ => unreachable!("layer norms have a bias, and no others"),
        }
    }

    /// What the kernel multiplies by; its gradient is the weight's in every kind.
    fn norm_weight(&self, weights: Weights<'_>, kind: NormKind) -> Tensor<1> {
        let weight = weights.base.view(&self.weight, [self.weight.len]);
        match kind {
            NormKind::RmsPlusOne => weight.add_scalar(1.0),
            NormKind::Rms | NormKind::Layer => weight,
        }
    }
}

impl LowRank {
    /// s·(x Aᵀ) Bᵀ.
    fn linear(&self, adapter: AdapterWeights<'_>, x: &Tensor<2>) -> Tensor<2> {
        linear(&self.narrow(adapter, x), &self.matrix_b(adapter))
    }

    /// The gradient of `x`; adds those of A and B.
    fn linear_backward(
        &self,
        adapter: AdapterWeights<'_>,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        linear_backward_weight(dy, &self.narrow(adapter, x), gradients, &self.b);
        let dnarrow = linear_backward(dy, &self.matrix_b(adapter)).scale(adapter.scale);
        let dnarrow = adapter.flat.precision().operand(&dnarrow);
        linear_backward_weight(&dnarrow, x, gradients, &self.a);
        linear_backward(&dnarrow, &self.matrix_a(adapter, x))
    }

    /// s·x Aᵀ as an operand, `[n, rank]`.
    fn narrow(&self, adapter: AdapterWeights<'_>, x: &Tensor<2>) -> Tensor<2> {
        let narrow = linear(x, &self.matrix_a(adapter, x)).scale(adapter.scale);
        adapter.flat.precision().operand(&narrow)
    }

    fn matrix_a(&self, adapter: AdapterWeights<'_>, x: &Tensor<2>) -> Tensor<2> {
        let [_, columns] = x.dims();
        adapter.flat.operand(&self.a, [self.rank, columns])
    }

    fn matrix_b(&self, adapter: AdapterWeights<'_>) -> Tensor<2> {
        let shape = [self.b.len / self.rank, self.rank];
        adapter.flat.operand(&self.b, shape)
    }
}
