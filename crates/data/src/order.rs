//! Which pairs a step trains on: a pure function of (seed, step, pairs, batch), the same on every rank and after every restart.
//!
//! Nothing here knows the world size; ranks get their share of a step's packs from [`crate::deal`].
//!
//! # The generator, which never changes
//! A changed order would break the resumption of every run, so the order depends on nothing outside this file but BLAKE3:
//! - state: the 32 bytes of BLAKE3("caldpo data order v1" ‖ seed u64 LE ‖ epoch u64 LE), as four u64 LE;
//! - numbers: xoshiro256** (Blackman and Vigna 2021, arXiv 1805.01407);
//! - below n: Lemire's multiply-shift with rejection (arXiv 1805.10941), which is exactly uniform;
//! - shuffle: Fisher–Yates from the last position down, swapping i with a number below i + 1.

/// The pairs of one optimizer step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPairs {
    /// Epoch of this step, from 0.
    pub epoch: u64,
    /// Positions in `Dataset::pairs`, in training order; shorter than a batch at an epoch's end.
    pub pairs: Vec<usize>,
}

/// Optimizer steps of one epoch: the last one takes what is left.
///
/// # Panics
/// If `batch_pairs` is 0.
pub fn steps_per_epoch(pairs: usize, batch_pairs: usize) -> u64 {
    assert!(batch_pairs > 0, "a batch of 0 pairs");
    pairs.div_ceil(batch_pairs) as u64
}

/// The pairs of `step`, counted from 1 over all epochs.
///
/// # Panics
/// If `step`, `pairs` or `batch_pairs` is 0.
pub fn step_pairs(
    seed: u64,
    step: u64,
    pairs: usize,
    batch_pairs: usize,
    shuffle: bool,
) -> StepPairs {
    assert!(step > 0, "steps count from 1");
    assert!(pairs > 0, "an order of 0 pairs");
    let steps = steps_per_epoch(pairs, batch_pairs);
    let epoch = (step - 1) / steps;
    let start = ((step - 1) % steps) as usize * batch_pairs;
    let end = pairs.min(start + batch_pairs);
    let pairs = if shuffle {
        epoch_order(seed, epoch, pairs)[start..end].to_vec()
    } else {
        (start..end).collect()
    };
    StepPairs { epoch, pairs }
}

/// The pairs of every step of `epoch` (from 0), in order: what [`step_pairs`] says of each, with one shuffle for all of them.
///
/// # Panics
/// If `batch_pairs` is 0.
pub fn epoch_steps(
    seed: u64,
    epoch: u64,
    pairs: usize,
    batch_pairs: usize,
    shuffle: bool,
) -> Vec<Vec<usize>> {
    let order = if shuffle {
        epoch_order(seed, epoch, pairs)
    } else {
        (0..pairs).collect()
    };
    order.chunks(batch_pairs).map(<[usize]>::to_vec).collect()
}

/// The permutation of one epoch.
fn epoch_order(seed: u64, epoch: u64, pairs: usize) -> Vec<usize> {
    let mut numbers = Numbers::new(seed, epoch);
    let mut order: Vec<usize> = (0..pairs).collect();
    for i in (1..pairs).rev() {
        order.swap(i, numbers.below(i as u64 + 1) as usize);
    }
    order
}

/// xoshiro256**.
struct Numbers {
    state: [u64; 4],
}

impl Numbers {
    fn new(seed: u64, epoch: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"caldpo data order v1");
        hasher.update(&seed.to_le_bytes());
        hasher.update(&epoch.to_le_bytes());
        let digest = hasher.finalize();
        let mut state = [0; 4];
        for (word, bytes) in state.iter_mut().zip(digest.as_bytes().chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("chunks of 8 bytes"));
        }
        Self { state }
    }

    fn next(&mut self) -> u64 {
        let [s0, s1, s2, s3] = &mut self.state;
        let result = s1.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = *s1 << 17;
        *s2 ^= *s0;
        *s3 ^= *s1;
        *s1 ^= *s2;
        *s0 ^= *s3;
        *s2 ^= shifted;
        *s3 = s3.rotate_left(45);
        result
    }

    /// A uniform number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        // Low halves under 2^64 mod bound are the surplus that would make some results likelier.
        let surplus = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= surplus {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_xoshiro256_starstar() {
        // First outputs from the state 1, 2, 3, 4: the vector that rand_xoshiro and numpy test against.
        let mut numbers = Numbers {
            state: [1, 2, 3, 4],
        };
        let got: Vec<u64> = (0..5).map(|_| numbers.next()).collect();
        assert_eq!(
            got,
            [
                11520,
                0,
                1509978240,
                1215971899390074240,
                1216172134540287360
            ]
        );
    }

    #[test]
    fn numbers_below_a_bound_are_uniform() {
        let mut numbers = Numbers::new(7, 0);
        let mut counts = [0_u32; 6];
        for _ in 0..60_000 {
            counts[numbers.below(6) as usize] += 1;
        }
        // Five standard deviations of a binomial with n = 60000, p = 1/6.
        assert!(
            counts.iter().all(|&count| count.abs_diff(10_000) < 457),
            "{counts:?}"
        );
    }
}
