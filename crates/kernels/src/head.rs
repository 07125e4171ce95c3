//! The log-prob head: log softmax(hidden Wᵀ) at one target per row, without ever holding rows × vocabulary.
//!
//! The host form walks tiles of at most [`ROWS`] × [`TILE`] logits and keeps a running maximum and sum of every row, so
//! each part of the weight is read once for many rows. The backward computes every tile again from the saved
//! log-sum-exp. Tile borders lie at fixed multiples, so a row's bits do not depend on its neighbours.
//! Log-sum-exp in f32 with the sum carried from tile to tile in f64.

use std::ops::Range;

use crate::gemm::{Matrix, Threads, Write, multiply};
use crate::host::{self, Host};
use crate::math::{exp, exp_shifted, max, simd, tanh};
use crate::{Gradients, Slot, Tensor, composition, parallel};

/// Most rows whose logits are held at once.
const ROWS: usize = 512;
/// Most columns of logits held at once: rows of the weight, whose gradient is added to together.
const TILE: usize = 1024;

/// Sums of the gradient of a head's weight that several backwards add to side by side, tile by tile.
pub trait TileSums {
    /// Calls `add` with the sums of these rows of the weight, `[rows · d]`: one of [`head_tiles`].
    fn tile(&mut self, rows: Range<usize>, add: &mut dyn FnMut(&mut [f32]));
}

/// The tiles of a weight of `vocabulary` rows, in the order in which a backward adds to them.
pub fn head_tiles(vocabulary: usize) -> impl Iterator<Item = Range<usize>> {
    (0..vocabulary)
        .step_by(TILE)
        .map(move |start| start..vocabulary.min(start + TILE))
}

/// cap · tanh(x / cap).
pub fn soft_cap(x: &Tensor<2>, cap: f64) -> Tensor<2> {
    x.take_back(composition::soft_cap(x.burn(), cap))
}

/// What [`logprob_head_backward`] needs beside the inputs: the log-sum-exp of every row.
pub struct HeadSaved {
    pub(crate) lse: Vec<f32>,
}

/// The log-probability of `targets[i]` under softmax(`hidden[i]` Wᵀ); `hidden` is `[n, d]`, `weight` `[vocabulary, d]`.
/// With a `soft_cap` the logits l are cap · tanh(l / cap) first (Gemma 2).
///
/// # Panics
/// If a target is not below the vocabulary size.
pub fn logprob_head(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    soft_cap: Option<f64>,
) -> (Vec<f32>, HeadSaved) {
    let shape = check(hidden, weight, targets);
    device_form!(cuda::logprob_head(hidden, weight, targets, soft_cap));
    let (Some(hidden), Some(weight)) = (Host::read(hidden), Host::read(weight)) else {
        let (hidden, weight) = (hidden.burn(), weight.burn());
        let (logps, lse) = composition::logprob_head(&hidden, &weight, targets, soft_cap);
        return (logps, HeadSaved { lse });
    };
    let mut running = vec![
        Running {
            max: f32::NEG_INFINITY,
            sum: 0.0,
            target: 0.0
        };
        shape.rows
    ];
    let mut logits = scratch(&shape);
    let tiles = head_tiles(shape.vocabulary).flat_map(|columns| shape.tiles(&columns));
    for tile in tiles {
        tile.logits(&hidden, &weight, &shape, soft_cap, &mut logits);
        let running = &mut running[tile.row..tile.row + tile.rows];
        absorb(
            &mut logits[..tile.rows * tile.columns],
            running,
            &targets[tile.row..],
            &tile,
        );
    }
    let lse = |running: &Running| f64::from(running.max) + running.sum.ln();
    let logps = running
        .iter()
        .map(|row| (f64::from(row.target) - lse(row)) as f32)
        .collect();
    let lse = running.iter().map(|row| lse(row) as f32).collect();
    (logps, HeadSaved { lse })
}

/// The gradient of `hidden` for dL/d(log-prob) `dlogps` of every row; adds the gradient of the weight where `sums` says,
/// unless the weight is frozen.
pub fn logprob_head_backward(
    dlogps: &[f32],
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    soft_cap: Option<f64>,
    saved: &HeadSaved,
    sums: Option<(&mut Gradients, &Slot)>,
) -> Tensor<2> {
    let shape = check_backward(dlogps, hidden, weight, targets, saved);
    if let Some((_, slot)) = &sums {
        let len = shape.vocabulary * shape.width;
        assert_eq!(slot.len, len, "gradient of the head's weight");
    }
    #[cfg(feature = "cuda")]
    let sums = match crate::cuda::logprob_head_backward(
        dlogps, hidden, weight, targets, soft_cap, saved, sums,
    ) {
        Ok(dhidden) => return dhidden,
        Err(sums) => sums,
    };
    let (Some(hidden), Some(weight)) = (Host::read(hidden), Host::read(weight)) else {
        let (burns, weight) = (hidden.burn(), weight.burn());
        let made = composition::logprob_head_backward(
            dlogps, &burns, &weight, targets, soft_cap, &saved.lse, sums,
        );
        return hidden.take_back(made);
    };
    let rows = RowGradients {
        dlogps,
        targets,
        lse: &saved.lse,
        soft_cap,
    };
    match sums {
        Some((gradients, slot)) => {
            let sums = gradients.host(slot);
            let mut sums = WholeSums {
                sums: sums.expect("gradients lie where the weight lies"),
                width: shape.width,
            };
            backward_host(&hidden, &weight, &shape, &rows, Some(&mut sums))
        }
        None => backward_host(&hidden, &weight, &shape, &rows, None),
    }
}

/// As [`logprob_head_backward`], to the bit, for sums that are shared with other backwards. On the host alone.
///
/// # Panics
/// If an operand lies elsewhere.
pub fn logprob_head_backward_shared(
    dlogps: &[f32],
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    soft_cap: Option<f64>,
    saved: &HeadSaved,
    sums: &mut dyn TileSums,
) -> Tensor<2> {
    let shape = check_backward(dlogps, hidden, weight, targets, saved);
    let hidden = Host::read(hidden).expect("sums are shared on the host");
    let weight = Host::read(weight).expect("sums are shared on the host");
    let rows = RowGradients {
        dlogps,
        targets,
        lse: &saved.lse,
        soft_cap,
    };
    backward_host(&hidden, &weight, &shape, &rows, Some(sums))
}

/// The whole gradient, with nobody else.
struct WholeSums<'a> {
    sums: &'a mut [f32],
    width: usize,
}

impl TileSums for WholeSums<'_> {
    fn tile(&mut self, rows: Range<usize>, add: &mut dyn FnMut(&mut [f32])) {
        add(&mut self.sums[rows.start * self.width..rows.end * self.width]);
    }
}

/// What the rows bring into a backward.
struct RowGradients<'a> {
    dlogps: &'a [f32],
    targets: &'a [u32],
    lse: &'a [f32],
    soft_cap: Option<f64>,
}

fn backward_host(
    hidden: &[f32],
    weight: &[f32],
    shape: &Shape,
    rows: &RowGradients<'_>,
    mut sums: Option<&mut dyn TileSums>,
) -> Tensor<2> {
    let width = shape.width;
    let mut dhidden = vec![0.0; shape.rows * width];
    let mut logits = scratch(shape);
    for columns in head_tiles(shape.vocabulary) {
        let mut add = |mut sums: Option<&mut [f32]>| {
            for tile in shape.tiles(&columns) {
                tile.logits(hidden, weight, shape, rows.soft_cap, &mut logits);
                let dlogits = &mut logits[..tile.rows * tile.columns];
                let own = tile.row..tile.row + tile.rows;
                differentiate(
                    dlogits,
                    &rows.lse[own.clone()],
                    &rows.dlogps[own.clone()],
                    &rows.targets[own],
                    rows.soft_cap,
                    &tile,
                );
                let dlogits = Matrix::new(dlogits, tile.rows, tile.columns);
                let weight = Matrix::new(&weight[tile.column * width..], tile.columns, width);
                let hidden = Matrix::new(&hidden[tile.row * width..], tile.rows, width);
                multiply(
                    &mut dhidden[tile.row * width..],
                    width,
                    Write::Add,
                    1.0,
                    dlogits,
                    weight,
                    Threads::All,
                );
                if let Some(sums) = &mut sums {
                    multiply(
                        sums,
                        width,
                        Write::Add,
                        1.0,
                        dlogits.transposed(),
                        hidden,
                        Threads::All,
                    );
                }
            }
        };
        match &mut sums {
            Some(sums) => sums.tile(columns.clone(), &mut |sums| add(Some(sums))),
            None => add(None),
        }
    }
    host::tensor(dhidden, [shape.rows, width])
}

/// Bytes that the head's host form holds at most beside `[rows, d]` tensors and the saved values: one tile of logits, and
/// what it knows of every row.
pub fn logprob_head_bytes(rows: usize, vocabulary: usize) -> usize {
    let tile = rows.min(ROWS) * vocabulary.min(TILE) * size_of::<f32>();
    tile + rows * size_of::<Running>()
}

/// Most bytes of logits that a GPU holds at once.
const GPU_LOGITS_BYTES: usize = 512 << 20;
/// A GPU's rows are cut at multiples of this.
const GPU_ROWS: usize = 128;

/// Rows whose logits a GPU holds at once.
pub fn gpu_head_rows(vocabulary: usize) -> usize {
    let fitting = GPU_LOGITS_BYTES / (size_of::<f32>() * vocabulary.max(1));
    (fitting / GPU_ROWS * GPU_ROWS).max(GPU_ROWS)
}

struct Shape {
    rows: usize,
    width: usize,
    vocabulary: usize,
}

fn check(hidden: &Tensor<2>, weight: &Tensor<2>, targets: &[u32]) -> Shape {
    let ([rows, width], [vocabulary, weight_width]) = (hidden.dims(), weight.dims());
    assert_eq!(
        width, weight_width,
        "columns of hidden and of the head's weight"
    );
    assert_eq!(rows, targets.len(), "rows and targets");
    if let Some(id) = targets.iter().find(|&&id| id as usize >= vocabulary) {
        panic!("target {id} in a vocabulary of {vocabulary}");
    }
    Shape {
        rows,
        width,
        vocabulary,
    }
}

fn check_backward(
    dlogps: &[f32],
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    saved: &HeadSaved,
) -> Shape {
    let shape = check(hidden, weight, targets);
    assert_eq!(dlogps.len(), shape.rows, "derivatives and rows");
    assert_eq!(saved.lse.len(), shape.rows, "saved rows and rows");
    shape
}

/// Room for the logits of one tile: never more than [`ROWS`] × [`TILE`].
fn scratch(shape: &Shape) -> Vec<f32> {
    vec![0.0; shape.rows.min(ROWS) * shape.vocabulary.min(TILE)]
}

/// A rectangle of logits.
struct Tile {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
}

impl Shape {
    /// All rows of these columns, cut into tiles.
    fn tiles(&self, columns: &Range<usize>) -> impl Iterator<Item = Tile> + use<> {
        let (rows, column, columns) = (self.rows, columns.start, columns.len());
        (0..rows).step_by(ROWS).map(move |row| Tile {
            row,
            rows: ROWS.min(rows - row),
            column,
            columns,
        })
    }
}

impl Tile {
    fn logits(
        &self,
        hidden: &[f32],
        weight: &[f32],
        shape: &Shape,
        soft_cap: Option<f64>,
        logits: &mut [f32],
    ) {
        let hidden = Matrix::new(&hidden[self.row * shape.width..], self.rows, shape.width);
        let weight = Matrix::new(
            &weight[self.column * shape.width..],
            self.columns,
            shape.width,
        );
        multiply(
            logits,
            self.columns,
            Write::Set,
            1.0,
            hidden,
            weight.transposed(),
            Threads::All,
        );
        if let Some(cap) = soft_cap {
            let logits = &mut logits[..self.rows * self.columns];
            parallel::row_blocks(logits, self.columns, |_, block| {
                simd(
                    #[inline(always)]
                    || {
                        for logit in block {
                            *logit = cap as f32 * tanh(*logit / cap as f32);
                        }
                    },
                );
            });
        }
    }

    /// The place of `target` within the tile's columns, if it is in them.
    #[inline(always)]
    fn place(&self, target: u32) -> Option<usize> {
        (target as usize)
            .checked_sub(self.column)
            .filter(|&place| place < self.columns)
    }
}

/// A row's log-sum-exp so far, as max + ln(sum), and its target's logit once seen.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f64,
    target: f32,
}

/// Takes a tile of logits into the running sums. The logits are spent.
fn absorb(logits: &mut [f32], running: &mut [Running], targets: &[u32], tile: &Tile) {
    let columns = tile.columns;
    let mut states: Vec<_> = logits
        .chunks_exact_mut(columns)
        .zip(running)
        .zip(targets)
        .collect();
    let one = |((logits, running), target): &mut ((&mut [f32], &mut Running), &u32)| {
        simd(
            #[inline(always)]
            || {
                if let Some(place) = tile.place(**target) {
                    running.target = logits[place];
                }
                let largest = max(logits);
                let new_max = if largest > running.max {
                    largest
                } else {
                    running.max
                };
                let sum = f64::from(exp_shifted(logits, new_max));
                running.sum = if running.sum > 0.0 {
                    running.sum * f64::from(exp(running.max - new_max))
                } else {
                    0.0
                } + sum;
                running.max = new_max;
            },
        );
    };
    parallel::each(&mut states, one);
}

/// Turns a tile of (capped) logits into dL/dlogits = dlogp · (1 at the target − softmax), times the cap's slope.
fn differentiate(
    logits: &mut [f32],
    lse: &[f32],
    dlogps: &[f32],
    targets: &[u32],
    soft_cap: Option<f64>,
    tile: &Tile,
) {
    parallel::row_blocks(logits, tile.columns, |first, block| {
        simd(
            #[inline(always)]
            || {
                for (index, row) in block.chunks_exact_mut(tile.columns).enumerate() {
                    let (lse, dlogp) = (lse[first + index], dlogps[first + index]);
                    let place = tile.place(targets[first + index]);
                    let slope = |logit: f32| {
                        soft_cap.map_or(1.0, |cap| {
                            let tanh = logit / cap as f32;
                            1.0 - tanh * tanh
                        })
                    };
                    let at_target = place.map(|place| dlogp * slope(row[place]));
                    if soft_cap.is_some() {
                        for logit in row.iter_mut() {
                            *logit = -dlogp * exp(*logit - lse) * slope(*logit);
                        }
                    } else {
                        for logit in row.iter_mut() {
                            *logit = -dlogp * exp(*logit - lse);
                        }
                    }
                    if let (Some(place), Some(at_target)) = (place, at_target) {
                        row[place] += at_target;
                    }
                }
            },
        );
    });
}
