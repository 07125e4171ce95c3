//! Values that each rank holds a part of, made whole on every rank without rounding: an all-reduce over a buffer of zeros
//! in which each rank fills its own slots. x + 0 is exact, so all ranks hold the same bits whatever the world size.

use std::time::Instant;

use collective::{Collective, CollectiveError, Op, Region};

/// Log-probs (chosen, rejected) of `pairs` pairs, of which this rank has `own` by index.
///
/// # Errors
/// What the collective says.
pub fn share_logps(
    collective: &mut dyn Collective,
    pairs: usize,
    own: &[(usize, [f32; 2])],
    deadline: Instant,
) -> Result<Vec<[f64; 2]>, CollectiveError> {
    let mut slots = vec![0.0; 2 * pairs];
    for &(pair, [chosen, rejected]) in own {
        slots[2 * pair] = f64::from(chosen);
        slots[2 * pair + 1] = f64::from(rejected);
    }
    let slots = collective
        .run(Op::AllReduceSum, Region::HostF64(slots), deadline)?
        .into_f64();
    Ok(slots
        .chunks_exact(2)
        .map(|pair| [pair[0], pair[1]])
        .collect())
}
