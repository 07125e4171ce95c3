//! f32 to bf16, of operands and of weights.
//!
//! Rounding to the nearest fits values that lie anywhere between two neighbours of bf16. Weights of a bf16 file all lie on its grid:
//! there, an update shows only once several have added up to half a step of the grid, and a model of many small updates computes as
//! if it had been trained less (by a third after 20 steps of SmolLM2-135M with a learning rate of 1e-4). Their rounding is dithered:
//! every element has a threshold of its own between its neighbours, at which it goes from one to the other. Over many elements the
//! mean of what is rounded is the exact one, as with stochastic rounding (Gupta et al. 2015, arXiv:1502.02551); but as a threshold
//! stays the same, equal weights are equal operands, on every device and rank, in every step, and after every restart. What lies on
//! the grid stays what it is.

use crate::Tensor;
use crate::math::simd;
use crate::parallel;

/// How the f32 weights of a bucket become operands of bf16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest, and to even in a tie.
    #[default]
    Nearest,
    /// Away from zero where an element is beyond its threshold, else towards it.
    Dithered {
        /// Place of the first element; thresholds follow from places.
        first: u32,
    },
}

/// Elements that are counted in 32 bits.
const COUNTED_ELEMENTS: usize = 1 << 20;

impl Rounding {
    /// What fits a bucket with such values: dithered where at least half of those that are not 0 are of bf16.
    pub(crate) fn fitting(bucket: usize, values: &[f32]) -> Self {
        let (mut even, mut all) = (0u64, 0u64);
        for piece in values.chunks(COUNTED_ELEMENTS) {
            let counted = simd(
                #[inline(always)]
                || {
                    piece.iter().fold([0u32; 2], |[even, all], value| {
                        let bits = value.to_bits();
                        let counts = u32::from(bits << 1 != 0);
                        [even + (counts & u32::from(bits << 16 == 0)), all + counts]
                    })
                },
            );
            even += u64::from(counted[0]);
            all += u64::from(counted[1]);
        }
        if all > 0 && 2 * even >= all {
            // Buckets begin far from each other.
            let first = (bucket as u32).wrapping_mul(0x9e37_79b9);
            Self::Dithered { first }
        } else {
            Self::Nearest
        }
    }

    /// That of the elements from `offset` on.
    #[must_use]
    pub fn after(self, offset: usize) -> Self {
        match self {
            Self::Nearest => Self::Nearest,
            Self::Dithered { first } => Self::Dithered {
                first: first.wrapping_add(offset as u32),
            },
        }
    }

    /// `weights` as operands of bf16.
    pub(crate) fn operand(self, weights: &Tensor<1>) -> Tensor<1> {
        device_form!(cuda::rounded(weights, self));
        let mut values = weights.clone().into_vec();
        self.round(&mut values);
        Tensor::new(values, weights.dims(), &weights.device())
    }

    /// Replaces every value by one of bf16.
    pub(crate) fn round(self, values: &mut [f32]) {
        parallel::row_blocks(values, 1, |start, block| match self.after(start) {
            Self::Nearest => simd(
                #[inline(always)]
                || {
                    for value in block {
                        *value = f32::from_bits(u32::from(nearest(*value)) << 16);
                    }
                },
            ),
            Self::Dithered { first } => simd(
                #[inline(always)]
                || {
                    for (place, value) in (0u32..).zip(block) {
                        let bits = dithered(*value, first.wrapping_add(place));
                        *value = f32::from_bits(u32::from(bits) << 16);
                    }
                },
            ),
        });
    }

    /// Writes the bits of bf16 that the values become.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn to_bf16(self, values: &[f32], bits: &mut [u16]) {
        assert_eq!(values.len(), bits.len(), "as many bits as values");
        parallel::of_elements(values, bits, |start, values, bits| {
            let values = values.iter();
            match self.after(start) {
                Self::Nearest => values
                    .zip(bits)
                    .for_each(|(value, bits)| *bits = nearest(*value)),
                Self::Dithered { first } => {
                    for ((place, value), bits) in (0u32..).zip(values).zip(bits) {
                        *bits = dithered(*value, first.wrapping_add(place));
                    }
                }
            }
        });
    }
}

/// The values of bits of bf16.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn from_bf16(bits: &[u16], values: &mut [f32]) {
    assert_eq!(values.len(), bits.len(), "as many values as bits");
    parallel::of_elements(bits, values, |_, bits, values| {
        for (bits, value) in bits.iter().zip(values) {
            *value = f32::from_bits(u32::from(*bits) << 16);
        }
    });
}

/// NaN stays one: adding to its bits could make another value of them, and their upper half alone might be an infinity's.
#[inline(always)]
fn nearest(value: f32) -> u16 {
    let bits = value.to_bits();
    let even = (bits >> 16) & 1;
    let rounded = (bits.wrapping_add(0x7fff + even) >> 16) as u16;
    if value.is_nan() {
        (bits >> 16) as u16 | 0x40
    } else {
        rounded
    }
}

/// What is added to the bits that bf16 does not have reaches the next value for as many of 65,536 thresholds as the value has passed
/// of the way there. `optimizer.cu` has the same.
#[inline(always)]
fn dithered(value: f32, place: u32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(threshold(place)) >> 16) as u16;
    if value.is_nan() {
        (bits >> 16) as u16 | 0x40
    } else {
        rounded
    }
}

/// 16 bits of a mix of `place` ("lowbias32" of C. Wellons' hash prospector) in which neighbours have nothing in common.
#[inline(always)]
fn threshold(place: u32) -> u32 {
    let mut mixed = place ^ place >> 16;
    mixed = mixed.wrapping_mul(0x7feb_352d);
    mixed ^= mixed >> 15;
    mixed = mixed.wrapping_mul(0x846c_a68b);
    (mixed ^ mixed >> 16) & 0xffff
}

#[cfg(test)]
mod tests {
    use super::{Rounding, from_bf16};

    /// All kinds of f32.
    fn all_kinds() -> Vec<f32> {
        let mut state = 1u32;
        let mut values = vec![
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            1.0 + 1.0 / 256.0,
            f32::MAX,
            f32::MIN_POSITIVE / 3.0,
        ];
        for _ in 0..200_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            values.push(f32::from_bits(state));
        }
        values
    }

    /// `values` rounded in place, which are those of the bits.
    fn rounded(values: &[f32], rounding: Rounding) -> Vec<f32> {
        let mut rounded = values.to_vec();
        rounding.round(&mut rounded);
        let mut bits = vec![0; values.len()];
        rounding.to_bf16(values, &mut bits);
        let mut again = vec![0.0; values.len()];
        from_bf16(&bits, &mut again);
        for (again, rounded) in again.iter().zip(&rounded) {
            assert_eq!(again.to_bits(), rounded.to_bits(), "{again} {rounded}");
        }
        rounded
    }

    #[test]
    fn rounding_to_the_nearest_is_that_of_bf16_to_even_in_a_tie() {
        let values = all_kinds();
        let rounded = rounded(&values, Rounding::Nearest);
        for (value, rounded) in values.into_iter().zip(rounded) {
            let expected = half::bf16::from_f32(value).to_f32();
            assert!(
                rounded.to_bits() == expected.to_bits() || value.is_nan() && rounded.is_nan(),
                "{value} became {rounded}, not {expected}"
            );
        }
    }

    #[test]
    fn dithered_values_are_neighbours_and_what_bf16_has_stays() {
        let values = all_kinds();
        let rounded = rounded(&values, Rounding::Dithered { first: 77 });
        for (value, rounded) in values.iter().zip(&rounded) {
            let towards_zero = f32::from_bits(value.to_bits() & 0xffff_0000);
            let away = f32::from_bits(towards_zero.to_bits().wrapping_add(0x1_0000));
            assert!(
                *rounded == towards_zero
                    || *value != towards_zero && *rounded == away
                    || value.is_nan() && rounded.is_nan(),
                "{value} became {rounded}"
            );
        }
        let mut again = rounded.clone();
        Rounding::Dithered { first: 5 }.round(&mut again);
        let same = again.iter().zip(&rounded);
        assert!(
            same.clone()
                .all(|(one, other)| one.to_bits() == other.to_bits())
        );
    }

    #[test]
    fn the_mean_of_dithered_values_is_the_exact_one_for_every_share_of_a_step() {
        let count = 1 << 16;
        for share in [0.01, 0.25, 0.5, 0.9] {
            let exact = 1.0 + share / 128.0;
            let values = vec![exact; count];
            let rounded = rounded(&values, Rounding::Dithered { first: 0 });
            let up = rounded.iter().filter(|value| **value > 1.0).count();
            let found = up as f32 / count as f32;
            let spread = (share * (1.0 - share) / count as f32).sqrt();
            assert!((found - share).abs() < 4.0 * spread, "{found} of {share}");
            // No pattern along a row: as many neighbours go up together as chance has it.
            let pairs = rounded
                .windows(2)
                .filter(|two| two[0] > 1.0 && two[1] > 1.0);
            let together = pairs.count() as f32 / count as f32;
            assert!(
                (together - share * share).abs() < 4.0 * spread,
                "{together} of {share}²"
            );
        }
    }

    #[test]
    fn a_part_is_rounded_as_it_is_within_the_whole() {
        let values: Vec<f32> = (0..300_000).map(|at| 1.0 + at as f32 * 1e-6).collect();
        let whole = Rounding::Dithered {
            first: u32::MAX - 9,
        };
        let all = rounded(&values, whole);
        for range in [0..7, 5..300_000, 123_457..234_567] {
            let part = rounded(&values[range.clone()], whole.after(range.start));
            assert_eq!(part, all[range]);
        }
    }

    #[test]
    fn weights_on_the_grid_are_dithered_and_others_are_not() {
        let even: Vec<f32> = (1..100).map(|at| at as f32 / 64.0).collect();
        let uneven: Vec<f32> = (1..100).map(|at| 1.0 / at as f32 + 1e-6).collect();
        let dithered = |values: &[f32]| {
            let fitting = Rounding::fitting(3, values);
            matches!(fitting, Rounding::Dithered { .. })
        };
        assert!(dithered(&even) && !dithered(&uneven));
        // Norms in f32 among matrices in bf16.
        assert!(dithered(&[&even[..], &uneven[..20]].concat()));
        // Zeros tell nothing: an adapter's second matrix begins as them.
        assert!(!dithered(&[&uneven[..], &[0.0; 500]].concat()));
        assert!(!dithered(&[0.0; 5]) && !dithered(&[]));
    }
}
