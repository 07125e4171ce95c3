//! How a step's pairs are cut into packs, and how packs are dealt to ranks: packs are cut first, from the pairs alone, so that
//! the world size changes who computes a pack and never what is in it.

use std::ops::Range;

/// A step is cut into at least this many packs (pairs permitting), so that small worlds have work for every rank without the
/// plan knowing them.
const PACKS_MIN: usize = 4;

/// Cuts pairs into packs of at most `capacity` tokens; `lengths` are a pair's packed tokens, prompt + chosen + rejected.
///
/// Longest first into the least loaded pack that has room. A pair over `capacity` gets a pack alone. Every pack is non-empty
/// and its pairs ascend; packs are ordered by their first pair.
pub fn pack_plan(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let (oversized, mut fitting): (Vec<usize>, Vec<usize>) =
        (0..lengths.len()).partition(|&pair| lengths[pair] > capacity);
    fitting.sort_by_key(|&pair| (std::cmp::Reverse(lengths[pair]), pair));

    let tokens: usize = fitting.iter().map(|&pair| lengths[pair]).sum();
    let wanted = lengths.len().min(PACKS_MIN).saturating_sub(oversized.len());
    let bins = tokens
        .div_ceil(capacity.max(1))
        .max(wanted)
        .min(fitting.len());

    let mut packs: Vec<Pack> = (0..bins).map(|_| Pack::default()).collect();
    for pair in fitting {
        let length = lengths[pair];
        // Fewer pairs breaks ties, so that pairs of no tokens cannot leave a pack empty.
        let open = packs
            .iter_mut()
            .filter(|pack| pack.tokens + length <= capacity)
            .min_by_key(|pack| (pack.tokens, pack.pairs.len()));
        if let Some(pack) = open {
            pack.push(pair, length);
        } else {
            let mut pack = Pack::default();
            pack.push(pair, length);
            packs.push(pack);
        }
    }

    let mut plan: Vec<Vec<usize>> = packs.into_iter().map(|pack| pack.pairs).collect();
    plan.extend(oversized.into_iter().map(|pair| vec![pair]));
    for pairs in &mut plan {
        pairs.sort_unstable();
    }
    plan.sort_unstable();
    plan
}

#[derive(Default)]
struct Pack {
    tokens: usize,
    pairs: Vec<usize>,
}

impl Pack {
    fn push(&mut self, pair: usize, length: usize) {
        self.tokens += length;
        self.pairs.push(pair);
    }
}

/// The packs of `rank`: a contiguous slice, such that the most loaded of `world` ranks has as few tokens as contiguous slices
/// allow, and no rank is idle while another has two packs. Every pack belongs to exactly one rank.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn deal(pack_tokens: &[usize], rank: usize, world: usize) -> Range<usize> {
    assert!(rank < world, "rank {rank} of a world of {world}");
    let limit = lightest_limit(pack_tokens, world);
    let mut start = 0;
    for current in 0..=rank {
        let end = take(pack_tokens, start, world - current - 1, limit);
        if current == rank {
            return start..end;
        }
        start = end;
    }
    unreachable!("the loop ends at rank {rank}")
}

/// End of the slice that starts at `start`: as much as `limit` allows, leaving a pack for each of `ranks_after` while any are left.
fn take(pack_tokens: &[usize], start: usize, ranks_after: usize, limit: usize) -> usize {
    let mut end = start;
    let mut tokens = 0;
    while end < pack_tokens.len() && tokens + pack_tokens[end] <= limit {
        if end > start && pack_tokens.len() - end <= ranks_after {
            break;
        }
        tokens += pack_tokens[end];
        end += 1;
    }
    end
}

/// The smallest most-loaded rank over all ways to cut `pack_tokens` into at most `world` slices, by bisection.
fn lightest_limit(pack_tokens: &[usize], world: usize) -> usize {
    let mut low = pack_tokens.iter().copied().max().unwrap_or(0);
    let mut high = pack_tokens.iter().sum();
    while low < high {
        let middle = low + (high - low) / 2;
        if slices_needed(pack_tokens, middle) <= world {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

fn slices_needed(pack_tokens: &[usize], limit: usize) -> usize {
    let mut slices = 0;
    let mut start = 0;
    while start < pack_tokens.len() {
        start = take(pack_tokens, start, 0, limit);
        slices += 1;
    }
    slices
}
