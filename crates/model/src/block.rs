//! One decoder block, forward and backward by hand: norm → attention → residual, norm → MLP → residual, in the order and
//! with the further norms that [`Residual`] names.
//!
//! Kept for the backward are the operands that cost a matrix product or attention to make again; norms, turns and the gated
//! product are recomputed, which costs a percent of the time and saves a third of the memory.

use kernels::{
    AttentionPlan, AttentionSaved, Gradients, RotaryTable, Tensor, activate, activate_backward,
    add, gated, gated_backward, gated_backward_inner, join_heads, rotary, rotary_backward,
    segment_attention, segment_attention_backward, split_heads,
};

use crate::ModelConfig;
use crate::config::Residual;
use crate::operations::{Norm, NormSaved, Weights};
use crate::pack::Segment;
use crate::slots::{Affine, BlockSlots, ProjectionSlots};

/// A block at its place in the model.
pub(crate) struct Block<'a> {
    pub weights: Weights<'a>,
    pub slots: &'a BlockSlots,
    pub plan: &'a AttentionPlan,
    pub config: &'a ModelConfig,
}

/// What the rows of a pack share in all blocks.
pub(crate) struct Rows<'a> {
    pub tables: &'a Tables,
    pub segments: &'a [Segment],
}

/// Turns of all rows; those of blocks with a window apart where they differ.
pub(crate) struct Tables {
    pub usual: RotaryTable,
    pub window: Option<RotaryTable>,
}

/// What a block's backward needs; all `[n, …]`.
pub(crate) struct BlockSaved {
    /// The block's input.
    x: Tensor<2>,
    /// Operands, turned to their positions; where heads are normalised, as they were before that.
    queries: Tensor<2>,
    keys: Tensor<2>,
    values: Tensor<2>,
    attended: Tensor<2>,
    attention: AttentionSaved,
    mlp: MlpSaved,
}

/// The part after attention.
struct MlpSaved {
    /// Attention's projection, where a norm follows it.
    projected: Option<Tensor<2>>,
    /// The residual stream between attention and MLP, unless the MLP reads the block's input.
    middle: Option<Tensor<2>>,
    gate: Option<Tensor<2>>,
    up: Tensor<2>,
    /// The MLP's output, where a norm follows it.
    down: Option<Tensor<2>>,
}

/// Queries, keys and values as attention's operands.
pub(crate) struct Projected {
    pub queries: Tensor<2>,
    pub keys: Tensor<2>,
    pub values: Tensor<2>,
    /// Queries and keys before the norm of their heads.
    raw: Option<[Tensor<2>; 2]>,
}

impl Block<'_> {
    /// The block's output, `[n, hidden]`, and what its backward needs.
    pub fn forward(&self, x: Tensor<2>, rows: &Rows<'_>) -> (Tensor<2>, BlockSaved) {
        let Projected {
            queries,
            keys,
            values,
            raw,
        } = self.project(&x, rows.tables);
        let (attended, attention) =
            segment_attention(&queries, &keys, &values, rows.segments, self.plan);
        let [queries, keys] = raw.unwrap_or([queries, keys]);
        let (y, mlp) = self.finish(&x, &attended);
        (
            y,
            BlockSaved {
                x,
                queries,
                keys,
                values,
                attended,
                attention,
                mlp,
            },
        )
    }

    /// Everything before attention.
    pub fn project(&self, x: &Tensor<2>, tables: &Tables) -> Projected {
        let slots = self.slots;
        let (normed, _) = self.normed(&slots.attention_norm, x);
        let [queries, keys, values] = match &slots.projections {
            ProjectionSlots::Apart(maps) => {
                maps.each_ref().map(|map| map.linear(self.weights, &normed))
            }
            ProjectionSlots::HeadByHead(map) => {
                split_heads(&map.linear(self.weights, &normed), self.plan.heads)
            }
        };
        drop(normed);
        let (raw, [queries, keys]) = match &slots.head_norms {
            Some(norms) => {
                let raw = [queries, keys];
                let turned = [0, 1].map(|side| {
                    let (normed, _) = self.norm_heads(&norms[side], &raw[side]);
                    normed
                });
                (Some(raw), turned)
            }
            None => (None, [queries, keys]),
        };
        let table = self.table(tables);
        let operand = |x| self.weights.operand(&x);
        Projected {
            queries: operand(rotary(queries, table, self.plan.heads)),
            keys: operand(rotary(keys, table, self.plan.kv_heads)),
            values: operand(values),
            raw,
        }
    }

    /// Everything after attention.
    pub fn finish_alone(&self, x: &Tensor<2>, attended: &Tensor<2>) -> Tensor<2> {
        self.finish(x, attended).0
    }

    fn finish(&self, x: &Tensor<2>, attended: &Tensor<2>) -> (Tensor<2>, MlpSaved) {
        let slots = self.slots;
        let attended = self.weights.operand(attended);
        let norm = slots.attention_output_norm.as_ref();
        let (middle, projected) = self.join(&slots.output, &attended, norm, x);
        let parallel = self.config.residual == Residual::Parallel;
        let input = if parallel { x } else { &middle };
        let (normed, _) = self.normed(&slots.mlp_norm, input);
        let gate = slots.gate.as_ref();
        let gate = gate.map(|gate| gate.linear(self.weights, &normed));
        let up = slots.up.linear(self.weights, &normed);
        let inner = self.inner(gate.as_ref(), &up);
        let norm = slots.mlp_output_norm.as_ref();
        let (y, down) = self.join(&slots.down, &inner, norm, &middle);
        let saved = MlpSaved {
            projected,
            middle: (!parallel).then_some(middle),
            gate,
            up,
            down,
        };
        (y, saved)
    }

    /// The residual stream after what `map` makes of `x` has joined it, and what that was before the norm if there is one.
    fn join(
        &self,
        map: &Affine,
        x: &Tensor<2>,
        norm: Option<&Affine>,
        stream: &Tensor<2>,
    ) -> (Tensor<2>, Option<Tensor<2>>) {
        match norm {
            Some(norm) => {
                let y = map.linear(self.weights, x);
                let (normed, _) = norm.norm(self.weights, &y, self.norm());
                (add(normed, stream), Some(y))
            }
            None => (map.linear_add(self.weights, x, stream), None),
        }
    }

    /// The MLP between its products, as an operand.
    fn inner(&self, gate: Option<&Tensor<2>>, up: &Tensor<2>) -> Tensor<2> {
        let activation = self.config.mlp.activation;
        self.weights.operand(&match gate {
            Some(gate) => gated(gate, up, activation),
            None => activate(up, activation),
        })
    }

    /// The rows of `x`, normalised, as an operand.
    fn normed(&self, norm: &Affine, x: &Tensor<2>) -> (Tensor<2>, NormSaved) {
        norm.norm_operand(self.weights, x, self.norm())
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
            mlp,
        } = saved;
        let slots = self.slots;
        let parallel = self.config.residual == Residual::Parallel;
        // Where the MLP reads the block's input, its gradient joins at the end; else the stream's joins it in the middle.
        let joining = (!parallel).then_some(dy);
        let dinput = self.mlp_backward(dy, &x, &mlp, joining, gradients);
        let projected = mlp.projected;
        drop((mlp.middle, mlp.gate, mlp.up, mlp.down));
        let (dmiddle, dparallel) = if parallel {
            (dy.clone(), Some(dinput))
        } else {
            (dinput, None)
        };
        let dprojected = self.join_backward(
            &dmiddle,
            projected,
            slots.attention_output_norm.as_ref(),
            gradients,
        );
        let dattended = slots.output.linear_backward(
            self.weights,
            &dprojected,
            &self.weights.operand(&attended),
            gradients,
        );
        drop(dprojected);
        let (dqueries, dkeys, dvalues) = {
            let turned = self.turned(&queries, &keys, rows.tables);
            let [queries, keys] = turned
                .as_ref()
                .map_or([&queries, &keys], <[_; 2]>::each_ref);
            segment_attention_backward(
                &self.weights.operand(&dattended),
                queries,
                keys,
                &values,
                &attended,
                &attention,
                rows.segments,
                self.plan,
            )
        };
        let table = self.table(rows.tables);
        let mut dqueries = rotary_backward(dqueries, table, self.plan.heads);
        let mut dkeys = rotary_backward(dkeys, table, self.plan.kv_heads);
        if let Some([query_norm, key_norm]) = &slots.head_norms {
            dqueries = self.norm_heads_backward(query_norm, &dqueries, &queries, gradients);
            dkeys = self.norm_heads_backward(key_norm, &dkeys, &keys, gradients);
        }
        let (normed, norm_saved) = self.normed(&slots.attention_norm, &x);
        let dnormed = self.projections_backward([dqueries, dkeys, dvalues], &normed, gradients);
        drop(normed);
        let dx = slots.attention_norm.norm_backward_add(
            self.weights,
            &dnormed,
            &x,
            &norm_saved,
            self.config.norm,
            &dmiddle,
            gradients,
        );
        match dparallel {
            Some(dparallel) => add(dx, &dparallel),
            None => dx,
        }
    }

    /// The gradient of the norm's output for those of queries, keys and values.
    fn projections_backward(
        &self,
        outs: [Tensor<2>; 3],
        normed: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        match &self.slots.projections {
            ProjectionSlots::Apart(maps) => {
                let maps: Vec<_> = maps.iter().zip(&outs).collect();
                Affine::linear_backward_sum(&maps, self.weights, normed, gradients)
            }
            ProjectionSlots::HeadByHead(map) => {
                let together = join_heads(&outs, self.plan.heads);
                drop(outs);
                map.linear_backward(self.weights, &together, normed, gradients)
            }
        }
    }

    /// The gradient of the MLP's input, and `joining`.
    fn mlp_backward(
        &self,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        saved: &MlpSaved,
        joining: Option<&Tensor<2>>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let slots = self.slots;
        let (gate, up) = (saved.gate.as_ref(), &saved.up);
        let ddown = self.join_backward(
            dy,
            saved.down.clone(),
            slots.mlp_output_norm.as_ref(),
            gradients,
        );
        let (dgate, dup) = self.inner_backward(&ddown, gate, up, gradients);
        let input = saved.middle.as_ref().unwrap_or(x);
        let (normed, norm_saved) = self.normed(&slots.mlp_norm, input);
        let dnormed = match (&slots.gate, dgate) {
            (Some(map), Some(dgate)) => {
                let maps = [(map, &dgate), (&slots.up, &dup)];
                Affine::linear_backward_sum(&maps, self.weights, &normed, gradients)
            }
            _ => slots
                .up
                .linear_backward(self.weights, &dup, &normed, gradients),
        };
        let (norm, kind) = (&slots.mlp_norm, self.config.norm);
        match joining {
            Some(joining) => norm.norm_backward_add(
                self.weights,
                &dnormed,
                input,
                &norm_saved,
                kind,
                joining,
                gradients,
            ),
            None => norm.norm_backward(self.weights, &dnormed, input, &norm_saved, kind, gradients),
        }
    }

    /// The gradients of gate and up for that of the down projection's output; adds its weight's.
    fn inner_backward(
        &self,
        ddown: &Tensor<2>,
        gate: Option<&Tensor<2>>,
        up: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> (Option<Tensor<2>>, Tensor<2>) {
        let (down, activation) = (&self.slots.down, self.config.mlp.activation);
        let Some(gate) = gate else {
            let inner = self.inner(None, up);
            let dinner = down.linear_backward(self.weights, ddown, &inner, gradients);
            return (None, activate_backward(&dinner, up, activation));
        };
        let dy = self.weights.operand(ddown);
        let Some(dinner) = down.input_backward(self.weights, &dy, up.dims()[1]) else {
            let inner = self.inner(Some(gate), up);
            let dinner = down.linear_backward(self.weights, ddown, &inner, gradients);
            let (dgate, dup) = gated_backward(&dinner, gate, up, activation);
            return (Some(dgate), dup);
        };
        let (dgate, dup, inner) = gated_backward_inner(&dinner, gate, up, activation);
        let inner = self.weights.operand(&inner);
        down.bias_backward(self.weights, ddown, gradients);
        down.matrix_backward(self.weights, &dy, &inner, gradients);
        (Some(dgate), dup)
    }

    /// The gradient of what [`Block::join`] was given.
    fn join_backward(
        &self,
        dy: &Tensor<2>,
        before: Option<Tensor<2>>,
        norm: Option<&Affine>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let (Some(before), Some(norm)) = (before, norm) else {
            return dy.clone();
        };
        let (_, saved) = norm.norm(self.weights, &before, self.norm());
        let kind = self.config.norm;
        norm.norm_backward(self.weights, dy, &before, &saved, kind, gradients)
    }

    /// Queries and keys turned to their positions, where they were kept as they were before the norm of their heads.
    fn turned(
        &self,
        queries: &Tensor<2>,
        keys: &Tensor<2>,
        tables: &Tables,
    ) -> Option<[Tensor<2>; 2]> {
        let [query_norm, key_norm] = self.slots.head_norms.as_ref()?;
        let table = self.table(tables);
        let (queries, _) = self.norm_heads(query_norm, queries);
        let (keys, _) = self.norm_heads(key_norm, keys);
        Some([
            self.weights
                .operand(&rotary(queries, table, self.plan.heads)),
            self.weights
                .operand(&rotary(keys, table, self.plan.kv_heads)),
        ])
    }

    /// Every head of every row, normalised on its own.
    fn norm_heads(&self, norm: &Affine, x: &Tensor<2>) -> (Tensor<2>, NormSaved) {
        let shape = x.dims();
        let (y, saved) = norm.norm(self.weights, &self.head_rows(x), self.norm());
        (y.reshape(shape), saved)
    }

    fn norm_heads_backward(
        &self,
        norm: &Affine,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        let (_, saved) = self.norm_heads(norm, x);
        let (x_rows, dy_rows) = (self.head_rows(x), self.head_rows(dy));
        let kind = self.config.norm;
        norm.norm_backward(self.weights, &dy_rows, &x_rows, &saved, kind, gradients)
            .reshape(x.dims())
    }

    /// `[n, heads · head_dim]` as `[n · heads, head_dim]`, the same memory.
    fn head_rows(&self, x: &Tensor<2>) -> Tensor<2> {
        let ([rows, width], head_dim) = (x.dims(), self.plan.head_dim);
        x.clone().reshape([rows * width / head_dim, head_dim])
    }

    fn table<'t>(&self, tables: &'t Tables) -> &'t RotaryTable {
        match (&tables.window, self.plan.window) {
            (Some(table), Some(_)) => table,
            _ => &tables.usual,
        }
    }

    fn norm(&self) -> Norm {
        Norm {
            kind: self.config.norm,
            epsilon: self.config.norm_epsilon,
        }
    }
}
