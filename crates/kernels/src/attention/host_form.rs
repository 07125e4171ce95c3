//! Segment attention on host slices. One task per segment and key head: its keys and values are gathered (prompt, then
//! one completion, so that a key's index is its position), then blocks of queries of all heads of the group go through
//! scores → softmax → values as two products. The backward recomputes the probabilities from the saved log-sum-exp.
//!
//! Columns outside what a row may see are set to 0 before they meet values; a sum over them only adds zeros, and depth
//! blocks start at fixed positions, so the bits of a row depend on its own keys alone.

use std::ops::Range;

use crate::gemm::{DEPTH, Matrix, Threads, Write, multiply};
use crate::math::{dot, exp, exp_shifted, max, simd, tanh};
use crate::parallel;

use super::{AttentionBytes, AttentionPlan, AttentionSegment};

/// Query rows (tokens × heads of the group) of one block.
const BLOCK_ROWS: usize = 96;

/// Keys are padded to a multiple of this with zeros, so that a product is never too shallow for the ordinary kernel.
const KEY_MULTIPLE: usize = 4;

/// The output, `[rows, heads · head_dim]`, and the log-sum-exp, `[rows, heads]`.
pub(super) fn forward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    rows: usize,
    segments: &[AttentionSegment],
    plan: &AttentionPlan,
) -> (Vec<f32>, Vec<f32>) {
    let results = parallel::tasks(segments.len() * plan.kv_heads, |index| {
        let task = Task::new(
            &segments[index / plan.kv_heads],
            plan,
            index % plan.kv_heads,
        );
        forward_task(&task, q, k, v)
    });
    let (mut out, mut lse) = (
        vec![0.0; rows * plan.heads * plan.head_dim],
        vec![0.0; rows * plan.heads],
    );
    for (index, (task_out, task_lse)) in results.iter().enumerate() {
        let task = Task::new(
            &segments[index / plan.kv_heads],
            plan,
            index % plan.kv_heads,
        );
        task.put(
            &mut out,
            task_out,
            task.group * plan.head_dim,
            plan.kv_heads,
        );
        task.put(&mut lse, task_lse, task.group, plan.kv_heads);
    }
    (out, lse)
}

/// The inputs of a backward.
pub(super) struct Operands<'a> {
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) out: &'a [f32],
    pub(super) dy: &'a [f32],
    pub(super) lse: &'a [f32],
}

/// The gradients of q, k and v.
pub(super) fn backward(
    operands: &Operands<'_>,
    rows: usize,
    segments: &[AttentionSegment],
    plan: &AttentionPlan,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let results = parallel::tasks(segments.len() * plan.kv_heads, |index| {
        backward_task(
            &Task::new(
                &segments[index / plan.kv_heads],
                plan,
                index % plan.kv_heads,
            ),
            operands,
        )
    });
    let narrow = plan.kv_heads * plan.head_dim;
    let mut dq = vec![0.0; rows * plan.heads * plan.head_dim];
    let (mut dk, mut dv) = (vec![0.0; rows * narrow], vec![0.0; rows * narrow]);
    for (index, (task_dq, task_dk, task_dv)) in results.iter().enumerate() {
        let task = Task::new(
            &segments[index / plan.kv_heads],
            plan,
            index % plan.kv_heads,
        );
        task.put(&mut dq, task_dq, task.group * plan.head_dim, plan.kv_heads);
        task.put(&mut dk, task_dk, plan.head_dim, plan.kv_heads);
        task.put(&mut dv, task_dv, plan.head_dim, plan.kv_heads);
    }
    (dq, dk, dv)
}

/// What [`forward`] and [`backward`] hold at most: every task's results, and beside them first the scratch of the tasks that
/// run, then the whole that the results are copied into.
pub(super) fn bytes(
    rows: usize,
    longest: usize,
    threads: usize,
    plan: &AttentionPlan,
) -> AttentionBytes {
    let group = plan.heads / plan.kv_heads;
    let key_rows = longest.next_multiple_of(KEY_MULTIPLE);
    let block_rows = block_tokens(group).min(longest) * group;
    let gathered = key_rows * plan.head_dim;
    let block = block_rows * plan.head_dim;
    let scores = block_rows * key_rows;
    let (wide, narrow) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    let held = |results: usize, scratch: usize| {
        (results + results.max(threads * scratch)) * size_of::<f32>()
    };
    AttentionBytes {
        forward: held(
            rows * (wide + plan.heads),
            2 * gathered + block + scores + block_rows,
        ),
        backward: held(
            rows * (wide + 2 * narrow),
            4 * gathered + 3 * block + 2 * scores + block_rows,
        ),
    }
}

/// Query tokens of one block, for so many heads to a key head.
fn block_tokens(group: usize) -> usize {
    (BLOCK_ROWS / group).max(1)
}

/// One segment and one key head with the query heads that use it. Task memory is in token order: prompt, chosen,
/// rejected, `[tokens, group · head_dim]` for queries, which is the same memory as `[tokens · group, head_dim]`.
struct Task<'a> {
    segment: &'a AttentionSegment,
    plan: &'a AttentionPlan,
    kv_head: usize,
    group: usize,
    tokens: usize,
    /// Rows of gathered keys: prompt and the longer completion, padded.
    key_rows: usize,
}

impl<'a> Task<'a> {
    fn new(segment: &'a AttentionSegment, plan: &'a AttentionPlan, kv_head: usize) -> Self {
        let [chosen, rejected] = [segment.completions[0].len(), segment.completions[1].len()];
        let prompt = segment.prompt.len();
        Self {
            segment,
            plan,
            kv_head,
            group: plan.heads / plan.kv_heads,
            tokens: prompt + chosen + rejected,
            key_rows: (prompt + chosen.max(rejected)).next_multiple_of(KEY_MULTIPLE),
        }
    }

    /// Copies this task's columns of the rows `part` of `source` into `target`, without gaps. `columns` belong to one task;
    /// the source has them for every key head.
    fn gather(&self, target: &mut [f32], source: &[f32], part: Range<usize>, columns: usize) {
        let stride = columns * self.plan.kv_heads;
        for (target, row) in target.chunks_exact_mut(columns).zip(part) {
            target.copy_from_slice(&source[row * stride + self.kv_head * columns..][..columns]);
        }
    }

    /// Copies task memory into this task's columns of the whole.
    fn put(&self, whole: &mut [f32], task: &[f32], columns: usize, kv_heads: usize) {
        let rows = self.segment.parts().into_iter().flat_map(|(part, _)| part);
        for (row, values) in rows.zip(task.chunks_exact(columns)) {
            whole[(row * kv_heads + self.kv_head) * columns..][..columns].copy_from_slice(values);
        }
    }

    /// The parts of the segment in order, each with the position of its first token and its blocks of queries.
    fn parts(&self) -> impl Iterator<Item = (Range<usize>, usize, Vec<Block>)> + use<'_> {
        let mut token = 0;
        self.segment
            .parts()
            .into_iter()
            .map(move |(part, first_position)| {
                let blocks = (0..part.len()).step_by(self.block_tokens());
                let blocks = blocks
                    .map(|start| self.block(token, &part, first_position, start))
                    .collect();
                token += part.len();
                (part, first_position, blocks)
            })
    }

    /// The block from token `start` of a part whose first token is `token` in task memory.
    fn block(
        &self,
        token: usize,
        part: &Range<usize>,
        first_position: usize,
        start: usize,
    ) -> Block {
        let tokens = self.block_tokens().min(part.len() - start);
        let position = first_position + start;
        // With a window of 0 nothing is visible; `min` keeps the start inside.
        let key_start = self.plan.visible(position).start.min(position) / DEPTH * DEPTH;
        let key_end = (position + tokens).next_multiple_of(KEY_MULTIPLE);
        Block {
            token: token + start,
            row: part.start + start,
            tokens,
            position,
            key_start,
            keys: key_end - key_start,
        }
    }

    fn block_tokens(&self) -> usize {
        block_tokens(self.group)
    }

    /// Scores of `queries` against gathered `keys`, `[rows of the block, keys of the block]`.
    fn scores(&self, out: &mut [f32], queries: &[f32], keys: &[f32], block: &Block, scale: f32) {
        let width = self.plan.head_dim;
        let queries = Matrix::new(queries, block.tokens * self.group, width);
        let keys = Matrix::new(&keys[block.key_start * width..], block.keys, width);
        multiply(
            out,
            block.keys,
            Write::Set,
            scale,
            queries,
            keys.transposed(),
            Threads::One,
        );
    }

    fn block_rows_max(&self) -> usize {
        self.block_tokens().min(self.tokens) * self.group
    }
}

/// A run of queries of one part and the keys that any of them may see.
struct Block {
    /// First token in task memory.
    token: usize,
    /// First row in the pack.
    row: usize,
    tokens: usize,
    /// Position of the first token.
    position: usize,
    key_start: usize,
    keys: usize,
}

impl Block {
    /// The columns of the block that its row `row` may see.
    #[inline(always)]
    fn visible(&self, row: usize, group: usize, plan: &AttentionPlan) -> Range<usize> {
        let visible = plan.visible(self.position + row / group);
        // An empty range (window 0) may start behind the block's last key.
        if visible.is_empty() {
            0..0
        } else {
            visible.start - self.key_start..visible.end - self.key_start
        }
    }
}

/// Keys or values of prompt and one completion at a time.
struct Gathered {
    data: Vec<f32>,
}

impl Gathered {
    fn new(task: &Task<'_>) -> Self {
        Self {
            data: vec![0.0; task.key_rows * task.plan.head_dim],
        }
    }

    /// Places `part` behind the tokens before it; what a longer sibling left behind becomes 0.
    fn place(
        &mut self,
        task: &Task<'_>,
        source: &[f32],
        part: Range<usize>,
        first_position: usize,
    ) {
        let width = task.plan.head_dim;
        let own = &mut self.data[first_position * width..];
        let (own, rest) = own.split_at_mut(part.len() * width);
        task.gather(own, source, part, width);
        rest.fill(0.0);
    }
}

fn forward_task(task: &Task<'_>, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (plan, group, width) = (task.plan, task.group, task.plan.head_dim);
    let mut out = vec![0.0; task.tokens * group * width];
    let mut lse = vec![0.0; task.tokens * group];
    let (mut keys, mut values) = (Gathered::new(task), Gathered::new(task));
    let mut queries = vec![0.0; task.block_rows_max() * width];
    let mut scores = vec![0.0; task.block_rows_max() * task.key_rows];
    let mut inverse = vec![0.0; task.block_rows_max()];
    for (part, first_position, blocks) in task.parts() {
        keys.place(task, k, part.clone(), first_position);
        values.place(task, v, part, first_position);
        for block in blocks {
            let rows = block.tokens * group;
            let queries = &mut queries[..rows * width];
            task.gather(
                queries,
                q,
                block.row..block.row + block.tokens,
                group * width,
            );
            let scores = &mut scores[..rows * block.keys];
            task.scores(scores, queries, &keys.data, &block, plan.scale as f32);
            let inverse = &mut inverse[..rows];
            let lse = &mut lse[block.token * group..][..rows];
            simd(
                #[inline(always)]
                || {
                    for (row, scores) in scores.chunks_exact_mut(block.keys).enumerate() {
                        let visible = block.visible(row, group, plan);
                        if let Some(cap) = plan.soft_cap {
                            soft_cap(&mut scores[visible.clone()], cap as f32);
                        }
                        (lse[row], inverse[row]) = softmax(scores, visible);
                    }
                },
            );
            let out = &mut out[block.token * group * width..][..rows * width];
            let probabilities = Matrix::new(scores, rows, block.keys);
            let values = Matrix::new(&values.data[block.key_start * width..], block.keys, width);
            multiply(
                out,
                width,
                Write::Set,
                1.0,
                probabilities,
                values,
                Threads::One,
            );
            for (out, inverse) in out.chunks_exact_mut(width).zip(inverse.iter()) {
                for value in out {
                    *value *= inverse;
                }
            }
        }
    }
    (out, lse)
}

/// Replaces every score s by cap · tanh(s / cap).
#[inline(always)]
fn soft_cap(scores: &mut [f32], cap: f32) {
    for score in scores {
        *score = cap * tanh(*score / cap);
    }
}

/// Replaces the visible scores by e^(score − max) and all others by 0. Returns the log-sum-exp and 1 / sum.
#[inline(always)]
fn softmax(scores: &mut [f32], visible: Range<usize>) -> (f32, f32) {
    scores[..visible.start].fill(0.0);
    scores[visible.end..].fill(0.0);
    if visible.is_empty() {
        return (f32::NEG_INFINITY, 0.0);
    }
    let scores = &mut scores[visible];
    let largest = max(scores);
    let sum = exp_shifted(scores, largest);
    (largest + sum.ln(), 1.0 / sum)
}

fn backward_task(task: &Task<'_>, operands: &Operands<'_>) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (plan, group, width) = (task.plan, task.group, task.plan.head_dim);
    let scale = plan.scale as f32;
    let mut dq = vec![0.0; task.tokens * group * width];
    let (mut dk, mut dv) = (
        vec![0.0; task.tokens * width],
        vec![0.0; task.tokens * width],
    );
    let (mut keys, mut values) = (Gathered::new(task), Gathered::new(task));
    let (mut dkeys, mut dvalues) = (Gathered::new(task), Gathered::new(task));
    let block_len = task.block_rows_max() * width;
    let (mut queries, mut outs, mut dys) = (
        vec![0.0; block_len],
        vec![0.0; block_len],
        vec![0.0; block_len],
    );
    let score_len = task.block_rows_max() * task.key_rows;
    let (mut scores, mut dscores) = (vec![0.0; score_len], vec![0.0; score_len]);
    let mut lse = vec![0.0; task.block_rows_max()];
    let mut token = 0;
    for (part, first_position, blocks) in task.parts() {
        keys.place(task, operands.k, part.clone(), first_position);
        values.place(task, operands.v, part.clone(), first_position);
        dkeys.data[first_position * width..].fill(0.0);
        dvalues.data[first_position * width..].fill(0.0);
        for block in blocks {
            let rows = block.tokens * group;
            let pack_rows = block.row..block.row + block.tokens;
            let (queries, outs, dys) = (
                &mut queries[..rows * width],
                &mut outs[..rows * width],
                &mut dys[..rows * width],
            );
            task.gather(queries, operands.q, pack_rows.clone(), group * width);
            task.gather(outs, operands.out, pack_rows.clone(), group * width);
            task.gather(dys, operands.dy, pack_rows.clone(), group * width);
            let lse = &mut lse[..rows];
            task.gather(lse, operands.lse, pack_rows, group);
            let (scores, dscores) = (
                &mut scores[..rows * block.keys],
                &mut dscores[..rows * block.keys],
            );
            task.scores(scores, queries, &keys.data, &block, scale);
            task.scores(dscores, dys, &values.data, &block, 1.0);
            simd(
                #[inline(always)]
                || {
                    let operands = outs
                        .chunks_exact(width)
                        .zip(dys.chunks_exact(width))
                        .zip(lse.iter());
                    let grids = scores
                        .chunks_exact_mut(block.keys)
                        .zip(dscores.chunks_exact_mut(block.keys));
                    for (row, ((scores, dscores), ((out, dy), &lse))) in
                        grids.zip(operands).enumerate()
                    {
                        let shift = dot(out, dy);
                        let visible = block.visible(row, group, plan);
                        let mut shift = shift;
                        if let Some(cap) = plan.soft_cap {
                            let scores = &mut scores[visible.clone()];
                            soft_cap(scores, cap as f32);
                            // The cap's slope, 1 − tanh², lies between p·(dy·v − shift) and the raw score.
                            let capped = scores.iter().zip(&mut dscores[visible.clone()]);
                            for (score, dscore) in capped {
                                let tanh = score / cap as f32;
                                *dscore = (*dscore - shift) * (1.0 - tanh * tanh);
                            }
                            shift = 0.0;
                        }
                        differentiate(scores, dscores, visible, lse, shift, scale);
                    }
                },
            );
            let (probabilities, dscores) = (
                Matrix::new(scores, rows, block.keys),
                Matrix::new(dscores, rows, block.keys),
            );
            let (queries, dys) = (
                Matrix::new(queries, rows, width),
                Matrix::new(dys, rows, width),
            );
            let from = block.key_start * width;
            let block_keys = Matrix::new(&keys.data[from..], block.keys, width);
            let dq = &mut dq[block.token * group * width..];
            multiply(
                dq,
                width,
                Write::Set,
                1.0,
                dscores,
                block_keys,
                Threads::One,
            );
            multiply(
                &mut dkeys.data[from..],
                width,
                Write::Add,
                1.0,
                dscores.transposed(),
                queries,
                Threads::One,
            );
            multiply(
                &mut dvalues.data[from..],
                width,
                Write::Add,
                1.0,
                probabilities.transposed(),
                dys,
                Threads::One,
            );
        }
        // A completion's own rows are final now; the prompt's collect from all three parts and are copied after.
        let own = first_position * width..(first_position + part.len()) * width;
        dk[token * width..][..own.len()].copy_from_slice(&dkeys.data[own.clone()]);
        dv[token * width..][..own.len()].copy_from_slice(&dvalues.data[own]);
        token += part.len();
    }
    let prompt = task.segment.prompt.len() * width;
    dk[..prompt].copy_from_slice(&dkeys.data[..prompt]);
    dv[..prompt].copy_from_slice(&dvalues.data[..prompt]);
    (dq, dk, dv)
}

/// Turns scores into probabilities and dy·v into the gradients of the raw scores q·k; 0 outside the visible columns.
/// `shift` is Σ out·dy, which equals Σ p·(dy·v).
#[inline(always)]
fn differentiate(
    scores: &mut [f32],
    dscores: &mut [f32],
    visible: Range<usize>,
    lse: f32,
    shift: f32,
    scale: f32,
) {
    for grid in [&mut *scores, &mut *dscores] {
        grid[..visible.start].fill(0.0);
        grid[visible.end..].fill(0.0);
    }
    for (score, dscore) in scores[visible.clone()]
        .iter_mut()
        .zip(&mut dscores[visible])
    {
        let probability = exp(*score - lse);
        *score = probability;
        *dscore = probability * (*dscore - shift) * scale;
    }
}
