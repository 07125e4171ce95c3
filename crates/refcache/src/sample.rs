//! Which of many entries are looked at again.

/// Distinct indices below `count`, ascending: one at random of each of `samples` runs of equal length, or all when there are
/// no more. The same `seed` gives the same ones, and every index has the same chance, up to rounding.
pub fn sample(count: usize, samples: usize, seed: u64) -> impl Iterator<Item = usize> {
    let samples = samples.min(count);
    (0..samples).map(move |run| {
        let [start, end] =
            [run, run + 1].map(|run| (run as u128 * count as u128 / samples as u128) as usize);
        start + (random(seed, run as u64) % (end - start) as u64) as usize
    })
}

/// 64 bits that depend on all of both.
fn random(seed: u64, run: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&seed.to_le_bytes())
        .update(&run.to_le_bytes());
    let digest = hasher.finalize();
    let (first, _) = digest
        .as_bytes()
        .split_first_chunk()
        .expect("a digest has 32 bytes");
    u64::from_le_bytes(*first)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn samples_are_distinct_within_bounds_and_as_many_as_there_are() {
        for count in 0..30 {
            for samples in 0..35 {
                let chosen: Vec<_> = sample(count, samples, 7).collect();
                assert_eq!(chosen.len(), samples.min(count));
                assert!(chosen.is_sorted_by(|a, b| a < b), "{chosen:?}");
                assert!(chosen.iter().all(|index| *index < count), "{chosen:?}");
            }
        }
    }

    #[test]
    fn a_seed_repeats_its_choice_and_other_seeds_reach_every_entry() {
        let chosen = |seed| sample(100, 4, seed);
        assert!(chosen(1).eq(chosen(1)));
        let reached: BTreeSet<_> = (0..1000).flat_map(chosen).collect();
        assert_eq!(reached.len(), 100);
    }
}
