//! What a forward and a backward over a pack hold in memory on the host, from shapes alone: the sums of what `block` and
//! `model` keep and make on the way, as they are written. `tests/memory.rs` counts the allocations and compares. `gpu.rs` has the
//! same sums for a GPU.
//!
//! Not here: weights and gradients (their size is the layout's), and what an allocator makes of all this.

mod gpu;

use kernels::{AttentionBytes, AttentionPlan, Precision, logprob_head_bytes};

use crate::config::{Gate, Projections, Residual};
use crate::{ModelConfig, Saving};

/// As much of a pack as its memory depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct PackShape {
    /// Rows: prompts once, and their completions.
    pub tokens: usize,
    /// Completion tokens that are scored.
    pub predictions: usize,
    /// Most tokens of a prompt and one of its completions.
    pub longest: usize,
}

/// Bytes of one pack on its way through the model, beside weights and gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackBytes {
    /// What is kept from the forward for the backward.
    pub kept: u64,
    /// What the busiest moment holds beside it: a block's intermediate results, or the head's.
    pub workspace: u64,
    /// The head's logits and row states alone; they are part of its moment.
    pub head: u64,
}

impl PackShape {
    /// Adds a pair with so many tokens of prompt, chosen and rejected.
    #[must_use]
    pub fn and(self, prompt: usize, completions: [usize; 2]) -> Self {
        let [chosen, rejected] = completions;
        Self {
            tokens: self.tokens + prompt + chosen + rejected,
            predictions: self.predictions + chosen + rejected,
            longest: self.longest.max(prompt + chosen.max(rejected)),
        }
    }
}

impl PackBytes {
    /// Bytes of both.
    pub fn total(&self) -> u64 {
        self.kept + self.workspace
    }

    /// A forward alone, as in scoring.
    pub fn scoring(
        config: &ModelConfig,
        shape: &PackShape,
        precision: Precision,
        threads: usize,
    ) -> Self {
        let widths = Widths::of(config, shape, precision, threads);
        let blocks = widths
            .iter()
            .map(|block| shape.tokens * block.kept() + block.forward());
        let head = shape.predictions * 2 * config.hidden + shape.tokens * config.hidden;
        let logits = logprob_head_bytes(shape.predictions, config.vocabulary);
        let most = blocks.max().unwrap_or(0).max(head) * FLOAT;
        Self {
            kept: rows(config, shape) as u64,
            workspace: most.max(head * FLOAT + logits) as u64,
            head: logits as u64,
        }
    }

    /// A forward and its backward.
    pub fn training(
        config: &ModelConfig,
        shape: &PackShape,
        saving: Saving,
        precision: Precision,
        threads: usize,
    ) -> Self {
        let PackShape {
            tokens,
            predictions,
            ..
        } = *shape;
        let hidden = config.hidden;
        let widths = Widths::of(config, shape, precision, threads);
        let kept = |block: &Widths| match saving {
            Saving::Operands => block.kept(),
            Saving::BlockInputs => hidden,
        };
        let kept: usize = widths.iter().map(|block| tokens * kept(block)).sum();
        // Rows that predict before and after the norm, their inverse norms, log-sum-exps and derivatives.
        let head_rows = predictions * (2 * hidden + 3);
        // A block is made again before its backward when only its input is kept.
        let again = |block: &Widths| match saving {
            Saving::Operands => 0,
            Saving::BlockInputs => tokens * (block.kept() - hidden),
        };
        let blocks = widths
            .iter()
            .map(|block| again(block) + tokens * hidden + block.forward().max(block.backward()));
        let logits = logprob_head_bytes(predictions, config.vocabulary);
        // Going forward the last block's output is there, going back the gradients of the head's and the norm's inputs.
        let head = (predictions * hidden).max(tokens * hidden) * FLOAT + logits;
        let head_back = (2 * predictions + tokens) * hidden * FLOAT;
        Self {
            kept: ((kept + head_rows) * FLOAT + rows(config, shape)) as u64,
            workspace: (blocks.max().unwrap_or(0) * FLOAT).max(head).max(head_back) as u64,
            head: logits as u64,
        }
    }
}

const FLOAT: usize = size_of::<f32>();

/// Tokens, positions, rotary tables and targets of a pack: what a forward needs beside the residual stream.
fn rows(config: &ModelConfig, shape: &PackShape) -> usize {
    let plans = std::iter::once(&config.rotary).chain(&config.window_rotary);
    let columns: usize = plans.map(|plan| plan.columns(config.head_dim())).sum();
    let table = shape.tokens * columns * FLOAT;
    // Ids and positions, once in the caller's pack and once in the tape's.
    let ids = shape.tokens * 4 * size_of::<u32>();
    table + ids + shape.predictions * (size_of::<usize>() + size_of::<u32>())
}

/// One block over one pack. Methods count f32 values.
struct Widths {
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    /// Columns of gate and up, or of up alone.
    inner: usize,
    residual: Residual,
    head_norms: bool,
    projections: Projections,
    attention: AttentionBytes,
    /// Copies of what is multiplied: 1 where operands are not the tensors themselves.
    copies: usize,
}

impl Widths {
    /// Of all blocks, last to first.
    fn of(
        config: &ModelConfig,
        shape: &PackShape,
        precision: Precision,
        threads: usize,
    ) -> Vec<Self> {
        let intermediate = config.mlp.intermediate;
        let block = |plan: &AttentionPlan| Self {
            tokens: shape.tokens,
            hidden: config.hidden,
            intermediate,
            heads: plan.heads,
            queries: plan.heads * plan.head_dim,
            keys: plan.kv_heads * plan.head_dim,
            inner: match config.mlp.gate {
                Gate::None => intermediate,
                Gate::Separate | Gate::Stacked => 2 * intermediate,
            },
            residual: config.residual,
            head_norms: config.head_norms,
            projections: config.projections,
            attention: AttentionBytes::new(shape.tokens, shape.longest, threads, plan),
            copies: usize::from(precision != Precision::F32),
        };
        config.attention.iter().rev().map(block).collect()
    }

    /// A row of `BlockSaved`: input, queries, keys, values, attended, log-sum-exps, and the MLP's part.
    fn kept(&self) -> usize {
        self.hidden + 2 * self.queries + 2 * self.keys + self.heads + self.kept_of_mlp()
    }

    /// A row of `MlpSaved`: middle, gate and up; what is before the output norms.
    fn kept_of_mlp(&self) -> usize {
        self.inner
            + match self.residual {
                Residual::Sequential => self.hidden,
                Residual::Sandwich => 3 * self.hidden,
                Residual::Parallel => 0,
            }
    }

    /// Queries and keys once more, where they are kept as they were before the norm of their heads.
    fn turned(&self) -> usize {
        if self.head_norms {
            self.queries + self.keys
        } else {
            0
        }
    }

    /// What a forward holds at most beside what it keeps.
    fn forward(&self) -> usize {
        // Attention makes `attended` and its log-sum-exps, before the MLP's part of what is kept is there.
        let later = self.kept_of_mlp() + self.queries + self.heads;
        let attention = self.tokens * self.turned() + self.attention.forward / FLOAT;
        // One product for all of queries, keys and values lies beside them.
        let projections = match self.projections {
            Projections::HeadByHead => self.hidden + 3 * self.queries,
            Projections::Separate | Projections::Stacked => 0,
        };
        let early = attention.max(self.tokens * projections);
        // Norm and its inverse, the gated product, its projection.
        let stream = match self.residual {
            Residual::Sequential | Residual::Sandwich => 2 * self.hidden,
            Residual::Parallel => 3 * self.hidden,
        };
        let mlp = self.tokens * (stream + 1 + (1 + self.copies) * self.intermediate);
        early.saturating_sub(self.tokens * later).max(mlp)
    }

    /// What a backward holds at most beside what was kept and the output's gradient.
    fn backward(&self) -> usize {
        // Gated product, its gradient, gradients of gate and up; then those two, the norm, its gradient, and one more product to add
        // to it.
        let outer = match self.residual {
            Residual::Sandwich => self.hidden,
            Residual::Sequential | Residual::Parallel => 0,
        };
        let products = (2 + self.copies) * self.intermediate;
        // Fitted: so much more is found there than these tensors account for.
        let products = products + self.hidden;
        let mlp = self.tokens * (self.inner + outer + products.max(3 * self.hidden + 1));
        // From here on the MLP's part of what was kept is gone.
        let stream = match self.residual {
            Residual::Sequential => self.hidden,
            Residual::Sandwich | Residual::Parallel => 2 * self.hidden,
        };
        let attention =
            self.tokens * (stream + self.queries + self.turned()) + self.attention.backward / FLOAT;
        // The norm's rows, with all gradients once more as one; or with the gradient of the rows and one more product to add to it.
        let products = match self.projections {
            Projections::HeadByHead => self.hidden + 3 * self.queries,
            Projections::Separate | Projections::Stacked => 3 * self.hidden,
        };
        let projections = stream + 2 * self.queries + 2 * self.keys + 1 + products;
        let late = attention.max(self.tokens * projections);
        mlp.max(late.saturating_sub(self.tokens * self.kept_of_mlp()))
    }
}
