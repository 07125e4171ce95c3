//! Attention over segments by the kernels of `attention.cu`, which describes its launches and work lists.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use gpu::{Arg, Element, Gpu, Launch, Program, View};

use super::{empty, int, launch, upload_ints};
use crate::attention::LogSums;
use crate::tensor::Array;
use crate::{AttentionPlan, AttentionSaved, AttentionSegment, Tensor};

const SOURCE: &str = include_str!("attention.cu");
const MACROS: &[&str] = &["HD", "WINDOW", "CAP", "ROOM"];
/// Most columns of a head.
const HEAD_DIM_MAX: usize = 256;

/// The tiles of `attention.cu` for a head of so many columns.
struct Tiles {
    /// Which row of the table there: the more, the more shared memory.
    room: i32,
    query_rows: usize,
    key_rows: usize,
    forward: Block,
    query: Block,
    key: Block,
    splits: usize,
    delta_lanes: usize,
}

/// A block of threads with its shared memory.
struct Block {
    warps: usize,
    shared: usize,
}

impl Tiles {
    /// The largest whose blocks have `shared` bytes of shared memory each at most; the smallest if none have.
    fn of(head_dim: usize, shared: usize) -> Self {
        let [small, larger @ ..] = [0, 1, 2].map(|room| Self::with_room(head_dim, room));
        let fitting = larger.into_iter().rev().find(|it| it.shared() <= shared);
        fitting.unwrap_or(small)
    }

    fn with_room(head_dim: usize, room: i32) -> Self {
        // Warps of the three kernels, and what their tiles hold.
        let ([forward, query, key], query_rows, forward_keys, query_keys, key_rows, key_queries) =
            match (head_dim, room) {
                (..=64, _) => ([4, 8, 4], 128, 64, 64, 128, 32),
                (65..=128, 1..) => ([4, 4, 4], 128, 64, 32, 64, 64),
                (65..=128, _) => ([4, 4, 4], 128, 32, 16, 64, 32),
                (_, 2..) => ([8, 8, 8], 128, 32, 32, 128, 32),
                (_, 1) => ([4, 4, 4], 64, 32, 32, 64, 32),
                _ => ([4, 4, 2], 64, 16, 16, 32, 16),
            };
        let pitch = 2 * head_dim + 16;
        let block = |warps, shared| Block { warps, shared };
        Self {
            room,
            query_rows,
            key_rows,
            forward: block(forward, (query_rows + 4 * forward_keys) * pitch),
            query: block(query, (2 * query_rows + 4 * query_keys) * pitch),
            key: block(
                key,
                (2 * key_rows + 4 * key_queries) * pitch + 16 * key_queries,
            ),
            splits: if head_dim <= 128 { 1 } else { 2 },
            delta_lanes: (head_dim / 8).next_power_of_two().max(2),
        }
    }

    /// Bytes of shared memory of the block with most.
    fn shared(&self) -> usize {
        let blocks = [&self.forward, &self.query, &self.key];
        blocks
            .map(|block| block.shared)
            .into_iter()
            .max()
            .unwrap_or(0)
    }
}

/// Which tiles a pack has, on the device. All layers of a model ask for the same ones in a row.
#[derive(Clone)]
struct Lists {
    segments: Vec<AttentionSegment>,
    tile_rows: [usize; 2],
    device: usize,
    queries: View,
    query_tiles: usize,
    keys: View,
    key_tiles: usize,
}

static LAST: Mutex<Option<Lists>> = Mutex::new(None);

fn lists(gpu: &'static Gpu, segments: &[AttentionSegment], tiles: &Tiles) -> Lists {
    let tile_rows = [tiles.query_rows, tiles.key_rows];
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(last) = last.as_ref()
        && last.tile_rows == tile_rows
        && last.device == gpu.ordinal()
        && last.segments == segments
    {
        return last.clone();
    }
    let (queries, keys) = work(segments, tile_rows);
    let made = Lists {
        segments: segments.to_vec(),
        tile_rows,
        device: gpu.ordinal(),
        query_tiles: queries.len(),
        queries: upload_ints(gpu, queries.as_flattened()),
        key_tiles: keys.len(),
        keys: upload_ints(gpu, keys.as_flattened()),
    };
    *last = Some(made.clone());
    made
}

/// `QueryTile` and `KeyTile` of `attention.cu`.
fn work(
    segments: &[AttentionSegment],
    [query_rows, key_rows]: [usize; 2],
) -> (Vec<[i32; 7]>, Vec<[i32; 12]>) {
    let (mut queries, mut keys) = (Vec::new(), Vec::new());
    for segment in segments {
        let prompt = &segment.prompt;
        let parts = segment.parts();
        for (index, (part, first)) in parts.iter().enumerate() {
            for own in cut(part, query_rows) {
                let position = first + own.start - part.start;
                queries.push(
                    [
                        own.start,
                        position,
                        own.len(),
                        prompt.start,
                        *first,
                        part.start,
                        *first,
                    ]
                    .map(|value| value as i32),
                );
            }
            // A prompt's keys are seen by all parts, a completion's by itself.
            let nobody = (0..0, 0);
            let seen_by = match index {
                0 => parts.clone(),
                _ => [(part.clone(), *first), nobody.clone(), nobody],
            };
            for own in cut(part, key_rows) {
                let position = first + own.start - part.start;
                let mut tile = [
                    own.start as i32,
                    position as i32,
                    own.len() as i32,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                ];
                for (range, (part, first)) in tile[3..].chunks_exact_mut(3).zip(&seen_by) {
                    range.copy_from_slice(
                        &[part.start, *first, part.len()].map(|value| value as i32),
                    );
                }
                keys.push(tile);
            }
        }
    }
    // The tiles with most to do first, so that the last ones to run are short.
    queries.sort_by_key(|tile| std::cmp::Reverse(tile[1] + tile[2]));
    keys.sort_by_key(|tile| {
        let queries = tile[3..].chunks_exact(3);
        std::cmp::Reverse(queries.map(|range| range[2]).sum::<i32>() - tile[1])
    });
    (queries, keys)
}

fn cut(part: &Range<usize>, rows: usize) -> impl Iterator<Item = Range<usize>> {
    let Range { start, end } = *part;
    (start..end)
        .step_by(rows)
        .map(move |first| first..end.min(first + rows))
}

/// One attention with everything its kernels ask for.
struct Call<'a> {
    gpu: &'static Gpu,
    plan: &'a AttentionPlan,
    rows: usize,
    element: Element,
    tiles: Tiles,
    lists: Lists,
}

impl<'a> Call<'a> {
    fn new(q: &Array<2>, segments: &[AttentionSegment], plan: &'a AttentionPlan) -> Option<Self> {
        let fits = plan.head_dim.is_multiple_of(4)
            && plan.head_dim <= HEAD_DIM_MAX
            && (is_whole(plan) || q.view.element() == Element::F32);
        // The kernels know no window that hides a query from itself.
        if !fits || plan.window == Some(0) {
            return None;
        }
        let gpu = q.view.gpu();
        let tiles = Tiles::of(plan.head_dim, gpu.facts().shared);
        Some(Self {
            gpu,
            plan,
            rows: q.shape[0],
            element: q.view.element(),
            lists: lists(gpu, segments, &tiles),
            tiles,
        })
    }

    fn program(&self, entry: [&'static str; 2]) -> Program {
        let [half, single] = entry;
        Program {
            source: SOURCE,
            entry: match self.element {
                Element::Bf16 => half,
                Element::F32 => single,
            },
            macros: MACROS,
            values: [
                self.plan.head_dim as i32,
                i32::from(self.plan.window.is_some()),
                i32::from(self.plan.soft_cap.is_some()),
                self.tiles.room,
            ],
        }
    }

    /// Launches a kernel of `tiles` tiles for each of `heads` heads.
    fn run(
        &self,
        entry: [&'static str; 2],
        tiles: usize,
        heads: usize,
        block: &Block,
        splits: usize,
        pointers: &[&View],
    ) {
        let plan = self.plan;
        let launched = match self.element {
            Element::Bf16 => Launch {
                blocks: [tiles * heads, splits, 1],
                threads: 32 * block.warps,
                shared: block.shared,
            },
            Element::F32 => Launch::new(tiles * heads, 128),
        };
        let mut arguments: Vec<Arg<'_>> = pointers.iter().map(|&view| Arg::View(view)).collect();
        arguments.extend([
            int(self.rows),
            int(plan.heads),
            int(plan.kv_heads),
            Arg::Float(plan.scale as f32),
            int(plan.window.unwrap_or(0)),
            Arg::Float(plan.soft_cap.unwrap_or(0.0) as f32),
        ]);
        launch(self.gpu, &self.program(entry), launched, &arguments);
    }

    /// Zeros: rows in no tile are not written.
    fn zeros(&self, width: usize) -> Array<2> {
        let out = empty(self.gpu, [self.rows, width], self.element);
        super::done(out.view.clear());
        out
    }
}

/// Whether a head's columns fill the tensor cores' tiles. Others are computed in f32.
fn is_whole(plan: &AttentionPlan) -> bool {
    plan.head_dim.is_multiple_of(16)
}

fn one_element(arrays: &[&Array<2>]) -> bool {
    arrays.iter().all(|array| {
        array.view.element() == arrays[0].view.element() && array.view.pointer().is_multiple_of(16)
    })
}

fn in_f32<const N: usize>(tensors: [&Tensor<2>; N]) -> Option<[Tensor<2>; N]> {
    let all = tensors.iter().all(|tensor| tensor.array().is_some());
    all.then(|| {
        tensors.map(|tensor| {
            let array = tensor.array().expect("all lie on the GPU");
            super::as_f32(array).into()
        })
    })
}

/// The output and the log-sum-exps.
pub(crate) fn segment_attention(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    segments: &[AttentionSegment],
    plan: &AttentionPlan,
) -> Option<(Tensor<2>, AttentionSaved)> {
    if !is_whole(plan) && q.array()?.view.element() == Element::Bf16 {
        let [q, k, v] = in_f32([q, k, v])?;
        let (out, saved) = segment_attention(&q, &k, &v, segments, plan)?;
        return Some((super::to_bf16(&out)?, saved));
    }
    let (q, k, v) = (q.array()?, k.array()?, v.array()?);
    if !one_element(&[q, k, v]) {
        return None;
    }
    let call = Call::new(q, segments, plan)?;
    let out = call.zeros(q.shape[1]);
    let lse = empty(call.gpu, [plan.heads, call.rows], Element::F32);
    let lists = &call.lists;
    call.run(
        ["attention_forward", "attention_forward_f32"],
        lists.query_tiles,
        plan.heads,
        &call.tiles.forward,
        1,
        &[
            &q.view,
            &k.view,
            &v.view,
            &out.view,
            &lse.view,
            &lists.queries,
        ],
    );
    Some((out.into(), AttentionSaved(LogSums::Gpu(lse.into()))))
}

/// The gradients of q, k and v.
pub(crate) fn segment_attention_backward(
    dy: &Tensor<2>,
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    out: &Tensor<2>,
    saved: &AttentionSaved,
    segments: &[AttentionSegment],
    plan: &AttentionPlan,
) -> Option<(Tensor<2>, Tensor<2>, Tensor<2>)> {
    let LogSums::Gpu(lse) = &saved.0 else {
        return None;
    };
    if !is_whole(plan) && q.array()?.view.element() == Element::Bf16 {
        let [dy, q, k, v, out] = in_f32([dy, q, k, v, out])?;
        let (dq, dk, dv) =
            segment_attention_backward(&dy, &q, &k, &v, &out, saved, segments, plan)?;
        return Some((
            super::to_bf16(&dq)?,
            super::to_bf16(&dk)?,
            super::to_bf16(&dv)?,
        ));
    }
    let (dy, q, k, v) = (dy.array()?, q.array()?, k.array()?, v.array()?);
    let (out, lse) = (out.array()?, lse.array()?);
    let dy = super::typed(dy, q.view.element());
    if !one_element(&[&dy, q, k, v, out]) {
        return None;
    }
    let call = Call::new(q, segments, plan)?;
    let (gpu, rows, heads) = (call.gpu, call.rows, plan.heads);
    let delta = empty(gpu, [heads, rows], Element::F32);
    let lanes = match call.element {
        Element::Bf16 => call.tiles.delta_lanes,
        Element::F32 => 32,
    };
    launch(
        gpu,
        &call.program(["attention_delta", "attention_delta_f32"]),
        Launch::new((rows * heads * lanes).div_ceil(256), 256),
        &[
            Arg::View(&dy.view),
            Arg::View(&out.view),
            Arg::View(&delta.view),
            int(rows),
            int(heads),
        ],
    );
    let [dq, dk, dv] = [q, k, v].map(|operand| call.zeros(operand.shape[1]));
    let (lists, tiles) = (&call.lists, &call.tiles);
    let operands = [&dy.view, &q.view, &k.view, &v.view, &lse.view, &delta.view];
    call.run(
        ["attention_backward_query", "attention_backward_query_f32"],
        lists.query_tiles,
        heads,
        &tiles.query,
        1,
        &[&operands[..], &[&dq.view, &lists.queries]].concat(),
    );
    call.run(
        ["attention_backward_key", "attention_backward_key_f32"],
        lists.key_tiles,
        plan.kv_heads,
        &tiles.key,
        tiles.splits,
        &[&operands[..], &[&dk.view, &dv.view, &lists.keys]].concat(),
    );
    Some((dq.into(), dk.into(), dv.into()))
}
