//! One decoder block, forward and backward by hand: norm → attention → residual, norm → SwiGLU → residual.
//!
//! Kept for the backward are the operands that cost a matrix product or attention to make again; norms and the gated
//! product are recomputed, which costs a percent of the time and saves a third of the memory.

use burn::tensor::Tensor;
use kernels::{
    AttentionPlan, AttentionSaved, Flat, Gradients, RotaryTable, Slot, add, linear,
    linear_backward, rms_norm, rms_norm_backward, rotary, rotary_backward, segment_attention,
    segment_attention_backward, swiglu, swiglu_backward,
};

use crate::pack::Segment;
use crate::slots::BlockSlots;

/// A block at its place in the model.
pub(crate) struct Block<'a> {
    pub weights: &'a Flat,
    pub slots: &'a BlockSlots,
    pub plan: &'a AttentionPlan,
    pub norm_epsilon: f64,
    pub hidden: usize,
    pub intermediate: usize,
}

/// What the rows of a pack share in all blocks.
pub(crate) struct Rows<'a> {
    pub table: &'a RotaryTable,
    pub segments: &'a [Segment],
}

/// What a block's backward needs; all `[n, …]`.
pub(crate) struct BlockSaved {
    /// The block's input.
    x: Tensor<2>,
    queries: Tensor<2>,
    pub keys: Tensor<2>,
    pub values: Tensor<2>,
    attended: Tensor<2>,
    attention: AttentionSaved,
    /// The residual stream between attention and MLP.
    middle: Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
}

impl Block<'_> {
    /// The block's output, `[n, hidden]`, and what its backward needs.
    pub fn forward(&self, x: Tensor<2>, rows: &Rows<'_>) -> (Tensor<2>, BlockSaved) {
        let [queries, keys, values] = self.project(&x, rows.table);
        let (attended, attention) =
            segment_attention(&queries, &keys, &values, rows.segments, self.plan);
        let Finished {
            middle,
            gate,
            up,
            y,
        } = self.finish(x.clone(), &attended);
        (
            y,
            BlockSaved {
                x,
                queries,
                keys,
                values,
                attended,
                attention,
                middle,
                gate,
                up,
            },
        )
    }

    /// Queries and keys, turned to their positions, and values.
    pub fn project(&self, x: &Tensor<2>, table: &RotaryTable) -> [Tensor<2>; 3] {
        let (normed, _) = rms_norm(
            x,
            &self.vector(&self.slots.attention_norm),
            self.norm_epsilon,
        );
        let queries = linear(
            &normed,
            &self.matrix(&self.slots.queries, self.query_columns()),
        );
        let keys = linear(&normed, &self.matrix(&self.slots.keys, self.key_columns()));
        let values = linear(
            &normed,
            &self.matrix(&self.slots.values, self.key_columns()),
        );
        [
            rotary(queries, table, self.plan.heads),
            rotary(keys, table, self.plan.kv_heads),
            values,
        ]
    }

    /// Everything after attention.
    pub fn finish(&self, x: Tensor<2>, attended: &Tensor<2>) -> Finished {
        let middle = add(
            x,
            &linear(attended, &self.matrix(&self.slots.output, self.hidden)),
        );
        let (normed, _) = rms_norm(
            &middle,
            &self.vector(&self.slots.mlp_norm),
            self.norm_epsilon,
        );
        let gate = linear(&normed, &self.matrix(&self.slots.gate, self.intermediate));
        let up = linear(&normed, &self.matrix(&self.slots.up, self.intermediate));
        let down = linear(
            &swiglu(&gate, &up),
            &self.matrix(&self.slots.down, self.hidden),
        );
        // The sum goes into the product's memory: `middle` is still needed.
        let y = add(down, &middle);
        Finished {
            middle,
            gate,
            up,
            y,
        }
    }

    /// The gradient of the block's input for that of its output; adds the gradients of its weights.
    pub fn backward(
        &self,
        dy: &Tensor<2>,
        saved: BlockSaved,
        rows: &Rows<'_>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let BlockSaved {
            x,
            queries,
            keys,
            values,
            attended,
            attention,
            middle,
            gate,
            up,
        } = saved;
        let dmiddle = self.mlp_backward(dy, &middle, &gate, &up, gradients);
        let dattended = self.linear_backward(&dmiddle, &attended, &self.slots.output, gradients);
        let (dqueries, dkeys, dvalues) = segment_attention_backward(
            &dattended,
            &queries,
            &keys,
            &values,
            &attended,
            &attention,
            rows.segments,
            self.plan,
        );
        let dqueries = rotary_backward(dqueries, rows.table, self.plan.heads);
        let dkeys = rotary_backward(dkeys, rows.table, self.plan.kv_heads);
        let norm = self.vector(&self.slots.attention_norm);
        let (normed, norm_saved) = rms_norm(&x, &norm, self.norm_epsilon);
        let dnormed = self.linear_backward(&dqueries, &normed, &self.slots.queries, gradients);
        let dnormed = add(
            dnormed,
            &self.linear_backward(&dkeys, &normed, &self.slots.keys, gradients),
        );
        let dnormed = add(
            dnormed,
            &self.linear_backward(&dvalues, &normed, &self.slots.values, gradients),
        );
        let dx = rms_norm_backward(
            &dnormed,
            &x,
            &norm,
            &norm_saved,
            gradients,
            &self.slots.attention_norm,
        );
        add(dx, &dmiddle)
    }

    fn mlp_backward(
        &self,
        dy: &Tensor<2>,
        middle: &Tensor<2>,
        gate: &Tensor<2>,
        up: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let gated = swiglu(gate, up);
        let dgated = self.linear_backward(dy, &gated, &self.slots.down, gradients);
        let (dgate, dup) = swiglu_backward(&dgated, gate, up);
        let norm = self.vector(&self.slots.mlp_norm);
        let (normed, norm_saved) = rms_norm(middle, &norm, self.norm_epsilon);
        let dnormed = self.linear_backward(&dgate, &normed, &self.slots.gate, gradients);
        let dnormed = add(
            dnormed,
            &self.linear_backward(&dup, &normed, &self.slots.up, gradients),
        );
        let dmiddle = rms_norm_backward(
            &dnormed,
            middle,
            &norm,
            &norm_saved,
            gradients,
            &self.slots.mlp_norm,
        );
        add(dmiddle, dy)
    }

    fn linear_backward(
        &self,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        slot: &Slot,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let [_, out] = dy.dims();
        linear_backward(dy, x, &self.matrix(slot, out), gradients, slot)
    }

    fn query_columns(&self) -> usize {
        self.plan.heads * self.plan.head_dim
    }

    fn key_columns(&self) -> usize {
        self.plan.kv_heads * self.plan.head_dim
    }

    /// The weight at `slot` with `out` rows; the columns follow.
    fn matrix(&self, slot: &Slot, out: usize) -> Tensor<2> {
        self.weights.view(slot, [out, slot.len / out])
    }

    fn vector(&self, slot: &Slot) -> Tensor<1> {
        self.weights.view(slot, [slot.len])
    }
}

/// The second half of a block's forward.
pub(crate) struct Finished {
    middle: Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
    /// The block's output.
    pub y: Tensor<2>,
}
