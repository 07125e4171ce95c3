//! The same on a GPU: sums of what `block` and `model` keep and make there, with the types that `kernels::cuda` gives them. The
//! residual stream, its gradient, statistics and logits are f32, all else has the type of operands.
//!
//! Left out, because small: row numbers, sums by slices of rows, and copies of heads whose columns do not fill a tensor core's
//! tile.

use kernels::{Precision, gpu_head_rows};

use super::{FLOAT, PackBytes, PackShape, rows};
use crate::config::{Gate, NormKind, Projections, Residual};
use crate::{ModelConfig, Saving};

impl PackBytes {
    /// As [`PackBytes::scoring`], on a GPU.
    pub fn scoring_on_gpu(config: &ModelConfig, shape: &PackShape, precision: Precision) -> Self {
        let blocks = Row::of(config, precision);
        let block = blocks.iter().map(|it| it.kept() + it.forward()).max();
        let head = Head::new(config, shape, precision);
        let most = (shape.tokens * block.unwrap_or(0)).max(head.forward());
        Self {
            kept: rows(config, shape) as u64,
            workspace: most as u64,
            head: head.logits as u64,
        }
    }

    /// As [`PackBytes::training`], on a GPU.
    pub fn training_on_gpu(
        config: &ModelConfig,
        shape: &PackShape,
        saving: Saving,
        precision: Precision,
    ) -> Self {
        let stream = FLOAT * config.hidden;
        let blocks = Row::of(config, precision);
        let kept = blocks.iter().map(|block| match saving {
            Saving::Operands => block.kept(),
            Saving::BlockInputs => stream,
        });
        let kept = shape.tokens * kept.sum::<usize>();
        let busiest = blocks.iter().map(|block| match saving {
            Saving::Operands => stream + block.backward(),
            // The block's output is made again with the rest, and nobody needs it.
            Saving::BlockInputs => {
                let again = block.kept() - stream;
                stream + again + block.forward().max(block.backward())
            }
        });
        let head = Head::new(config, shape, precision);
        let blocks = shape.tokens * busiest.max().unwrap_or(0);
        Self {
            kept: (kept + head.kept() + rows(config, shape)) as u64,
            workspace: blocks.max(head.forward()).max(head.backward()) as u64,
            head: head.logits as u64,
        }
    }
}

/// The log-prob head over one pack, in bytes.
struct Head {
    /// A row of the residual stream.
    stream: usize,
    /// A row of operands of that width.
    operand: usize,
    tokens: usize,
    predictions: usize,
    /// Logits that are held at once.
    logits: usize,
    /// Their gradients.
    dlogits: usize,
}

impl Head {
    fn new(config: &ModelConfig, shape: &PackShape, precision: Precision) -> Self {
        let element = precision.gpu_bytes();
        let held = gpu_head_rows(config.vocabulary).min(shape.predictions) * config.vocabulary;
        Self {
            stream: FLOAT * config.hidden,
            operand: element * config.hidden,
            tokens: shape.tokens,
            predictions: shape.predictions,
            logits: FLOAT * held,
            dlogits: element * held,
        }
    }

    /// Rows that predict, before and after the norm, and their inverse norms.
    fn kept(&self) -> usize {
        self.predictions * (self.stream + self.operand + FLOAT)
    }

    /// Beside what is kept: the last block's output.
    fn forward(&self) -> usize {
        self.tokens * self.stream + self.logits
    }

    /// Beside what is kept: the gradient of the norm's output with logits and theirs; that of its input with both; that of all rows.
    fn backward(&self) -> usize {
        let (rows, operands) = (
            self.predictions * self.stream,
            self.predictions * self.operand,
        );
        (operands + self.logits + self.dlogits)
            .max(operands + rows)
            .max(rows + self.tokens * self.stream)
    }
}

/// One row of one block, in bytes.
struct Row {
    /// Of the residual stream.
    stream: usize,
    /// Of operands as wide as that.
    operand: usize,
    /// What a gradient of the stream takes as an operand; nothing where it is one.
    copy: usize,
    queries: usize,
    keys: usize,
    /// Statistics of attention.
    heads: usize,
    /// Of the MLP's inner product.
    intermediate: usize,
    /// Of gate and up, or of up alone.
    inner: usize,
    residual: Residual,
    /// Norms give f32, of which an operand is made.
    layer_norm: bool,
    head_norms: bool,
    projections: Projections,
}

impl Row {
    fn of(config: &ModelConfig, precision: Precision) -> Vec<Self> {
        let element = precision.gpu_bytes();
        let operand = element * config.hidden;
        let intermediate = element * config.mlp.intermediate;
        let block = |plan: &kernels::AttentionPlan| Self {
            stream: FLOAT * config.hidden,
            operand,
            copy: if element < FLOAT { operand } else { 0 },
            queries: element * plan.heads * plan.head_dim,
            keys: element * plan.kv_heads * plan.head_dim,
            heads: FLOAT * plan.heads,
            intermediate,
            inner: match config.mlp.gate {
                Gate::None => intermediate,
                Gate::Separate | Gate::Stacked => 2 * intermediate,
            },
            residual: config.residual,
            layer_norm: config.norm == NormKind::Layer,
            head_norms: config.head_norms,
            projections: config.projections,
        };
        config.attention.iter().map(block).collect()
    }

    /// `BlockSaved`.
    fn kept(&self) -> usize {
        self.stream + 2 * self.queries + 2 * self.keys + self.heads + self.kept_of_mlp()
    }

    /// `MlpSaved`.
    fn kept_of_mlp(&self) -> usize {
        self.inner
            + match self.residual {
                Residual::Sequential => self.stream,
                Residual::Sandwich => self.stream + 2 * self.operand,
                Residual::Parallel => 0,
            }
    }

    /// Normalised rows as operands, and on their way there.
    fn normed(&self) -> usize {
        let on_the_way = if self.layer_norm && self.copy > 0 {
            self.stream
        } else {
            0
        };
        self.operand + on_the_way + FLOAT
    }

    /// Queries and keys once more, where they are kept as they were before the norm of their heads.
    fn turned(&self) -> usize {
        if self.head_norms {
            self.queries + self.keys
        } else {
            0
        }
    }

    /// Beside what is kept: the MLP's norm and inner product, and the output.
    fn forward(&self) -> usize {
        let joining = match self.residual {
            Residual::Sequential => 0,
            Residual::Sandwich => self.operand,
            // The stream between attention and MLP, which nobody keeps, and a projection before it joins.
            Residual::Parallel => self.stream + self.operand,
        };
        self.normed() + self.intermediate + self.stream + joining
    }

    /// Beside what was kept and the output's gradient.
    fn backward(&self) -> usize {
        // In the attention's part what was kept for the MLP's is gone.
        let attention = self.backward_of_attention();
        self.backward_of_mlp()
            .max(attention.saturating_sub(self.kept_of_mlp()))
    }

    fn backward_of_mlp(&self) -> usize {
        let outer = match self.residual {
            Residual::Sandwich => self.operand,
            Residual::Sequential | Residual::Parallel => 0,
        };
        // The product's gradient and the product itself beside those of gate and up.
        let products = self.copy + 2 * self.intermediate + self.inner;
        // They, the norm, and the gradient of its output.
        let sum = self.inner + self.normed() + self.stream;
        // Of them the last, and the gradient of the stream.
        let norm = self.intermediate + self.normed() + 2 * self.stream;
        outer + products.max(sum).max(norm)
    }

    fn backward_of_attention(&self) -> usize {
        let all = self.queries + 2 * self.keys;
        let output = self.copy + self.queries;
        let attention = self.heads + all + self.turned().max(self.copy_of_heads());
        let projections = match self.projections {
            Projections::Separate | Projections::Stacked => all + self.normed() + self.stream,
            // All gradients once more as one.
            Projections::HeadByHead => 2 * all + self.normed(),
        };
        let norm = 2 * self.stream;
        // The gradient of what attention made stays to the end, as does that of the stream.
        let later = attention.max(projections).max(norm);
        self.stream + output.max(self.queries + later)
    }

    /// Queries normalised once more and their gradient, where heads are normalised.
    fn copy_of_heads(&self) -> usize {
        if self.head_norms { 2 * self.queries } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn llama(shape: [usize; 6], tied: bool) -> ModelConfig {
        let [hidden, layers, heads, kv_heads, intermediate, vocabulary] = shape;
        let text = format!(
            r#"{{"model_type": "llama", "hidden_size": {hidden}, "intermediate_size": {intermediate},
                 "num_hidden_layers": {layers}, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
                 "vocab_size": {vocabulary}, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
                 "tie_word_embeddings": {tied}, "max_position_embeddings": 8192}}"#
        );
        ModelConfig::parse(&text, Path::new("config.json")).expect("a config")
    }

    #[test]
    fn a_row_of_a_block_is_the_sum_of_its_tensors() {
        let config = llama([8, 1, 4, 2, 16, 100], true);
        let row = |precision| Row::of(&config, precision).remove(0);
        // Input and middle f32; queries and attended, keys and values, gate and up as operands; log-sum-exps f32.
        assert_eq!(row(Precision::F32).kept(), 4 * (8 + 8 + 16 + 8 + 32 + 4));
        assert_eq!(
            row(Precision::Bf16).kept(),
            4 * (8 + 8 + 4) + 2 * (16 + 8 + 32)
        );
        // Product, its gradient, and those of gate and up; in bf16 the stream's gradient as an operand.
        assert_eq!(row(Precision::F32).backward(), 4 * 4 * 16);
        assert_eq!(row(Precision::Bf16).backward(), 2 * (4 * 16 + 8));
    }

    #[test]
    fn the_head_holds_no_more_logits_than_its_chunk() {
        let config = llama([8, 1, 4, 2, 16, 50_000], true);
        let bytes = |predictions| {
            let shape = PackShape {
                tokens: 100_000,
                predictions,
                longest: 100,
            };
            PackBytes::training_on_gpu(&config, &shape, Saving::Operands, Precision::Bf16).head
        };
        assert_eq!(bytes(10), 10 * 50_000 * 4);
        let chunk = gpu_head_rows(50_000);
        assert_eq!(bytes(chunk), bytes(90_000));
        assert!(bytes(90_000) <= 512 << 20);
    }

    #[test]
    fn checkpointing_trades_what_is_kept_for_one_blocks_worth() {
        let config = llama([64, 12, 4, 2, 172, 512], true);
        let shape = PackShape {
            tokens: 1000,
            predictions: 600,
            longest: 100,
        };
        let bytes = |saving| PackBytes::training_on_gpu(&config, &shape, saving, Precision::Bf16);
        let (all, inputs) = (bytes(Saving::Operands), bytes(Saving::BlockInputs));
        assert!(inputs.kept < all.kept && inputs.workspace > all.workspace);
        assert!(inputs.total() < all.total());
    }
}
