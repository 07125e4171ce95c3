//! Rotary position embedding in the rotate-half form of Hugging Face (not burn's interleaved one), f32 angles.
//! Frequency scaling rules are the model's: it passes the final inverse frequencies.

use crate::host::{self, Host};
use crate::math::simd;
use crate::{Device, Tensor, composition, parallel};

/// cos and sin of every position and frequency, `[n, rotated / 2]` each.
///
/// With fewer frequencies than half the head, only the first `2 · frequencies` columns of a head turn (GPT-NeoX).
pub struct RotaryTable {
    pub(crate) cos: Tensor<2>,
    pub(crate) sin: Tensor<2>,
}

impl RotaryTable {
    /// The table for one row per position.
    pub fn new(positions: &[u32], inverse_frequencies: &[f32], device: &Device) -> Self {
        let columns = inverse_frequencies.len();
        Self::by_row(positions, columns, |_| inverse_frequencies, 1.0, device)
    }

    /// As [`RotaryTable::new`], with cos and sin multiplied by `factor` (yarn's and longrope's attention factor) and
    /// `frequencies(row)`, `columns` of them, for every row (longrope chooses them by the sequence's length).
    pub fn by_row<'a>(
        positions: &[u32],
        columns: usize,
        frequencies: impl Fn(usize) -> &'a [f32],
        factor: f32,
        device: &Device,
    ) -> Self {
        device_form!(cuda::rotary_table(
            positions,
            columns,
            &frequencies,
            factor,
            device
        ));
        let table = |function: fn(f32) -> f32| {
            let mut values = Vec::with_capacity(positions.len() * columns);
            for (row, &position) in positions.iter().enumerate() {
                let frequencies = frequencies(row);
                assert_eq!(frequencies.len(), columns, "frequencies of row {row}");
                let angles = frequencies.iter().map(|&f| position as f32 * f);
                values.extend(angles.map(|angle| function(angle) * factor));
            }
            Tensor::new(values, [positions.len(), columns], device)
        };
        Self {
            cos: table(f32::cos),
            sin: table(f32::sin),
        }
    }
}

/// Turns every head of `x`, `[n, heads · head_dim]`; in place when nothing else holds `x`.
pub fn rotary(x: Tensor<2>, table: &RotaryTable, heads: usize) -> Tensor<2> {
    turn(x, table, heads, 1.0)
}

/// The gradient of `x`: the opposite turn of `dy`.
pub fn rotary_backward(dy: Tensor<2>, table: &RotaryTable, heads: usize) -> Tensor<2> {
    turn(dy, table, heads, -1.0)
}

fn turn(x: Tensor<2>, table: &RotaryTable, heads: usize, sign: f32) -> Tensor<2> {
    let ([rows, width], [positions, half]) = (x.dims(), table.cos.dims());
    assert_eq!(rows, positions, "rows of x and positions of the table");
    assert_eq!(width % heads, 0, "{heads} heads in {width} columns");
    let head_dim = width / heads;
    assert!(
        2 * half <= head_dim,
        "{half} frequencies for heads of {head_dim}"
    );
    device_form!(cuda::rotary(&x, table, heads, sign));
    let composed = |x: &Tensor<2>| x.take_back(composition::turn(x.burn(), table, heads, sign));
    let (Some(cos), Some(sin)) = (Host::read(&table.cos), Host::read(&table.sin)) else {
        return composed(&x);
    };
    let mut out = match host::take(x) {
        Ok(out) => out,
        Err(x) => return composed(&x),
    };
    let (cos, sin): (&[f32], &[f32]) = (&cos, &sin);
    parallel::row_blocks(&mut out, width, |first, block| {
        simd(
            #[inline(always)]
            || {
                for (row, values) in block.chunks_exact_mut(width).enumerate() {
                    let cos = &cos[(first + row) * half..][..half];
                    let sin = &sin[(first + row) * half..][..half];
                    for head in values.chunks_exact_mut(head_dim) {
                        let (low, high) = head[..2 * half].split_at_mut(half);
                        for i in 0..half {
                            let (a, b, turn) = (low[i], high[i], sign * sin[i]);
                            low[i] = a * cos[i] - b * turn;
                            high[i] = b * cos[i] + a * turn;
                        }
                    }
                }
            },
        );
    });
    host::tensor(out, [rows, width])
}
