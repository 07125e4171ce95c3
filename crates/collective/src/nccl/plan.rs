//! Which calls of NCCL make an operation of this crate, in elements of the region. No library.
//!
//! NCCL's reduce-scatter and all-gather know only equal parts, laid end to end; this crate's shards differ by one element where
//! the world does not divide the region. Then every shard gets a call of its own, a reduce or a broadcast from its owner, in one
//! group, which NCCL runs together: the bytes on the wire are the same, nothing is copied, and nothing beside the region is
//! needed. Padding to equal parts was rejected, since it copies the whole region on the device and holds it twice. Regions whose
//! length the world divides take the single call, which is faster: make buckets of lengths that many worlds divide.

use std::ops::Range;

use crate::{Op, shard_range};

/// One call. All of them work in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// Sums of all elements at every rank.
    AllReduce { range: Range<usize> },
    /// Sums of `count` elements at the rank whose part they are, parts laid end to end from the start.
    ReduceScatter { count: usize },
    /// Every rank's part of `count` elements at all ranks, parts laid end to end from the start.
    AllGather { count: usize },
    /// Sums of a range at one rank.
    Reduce { range: Range<usize>, root: usize },
    /// One rank's range at all ranks.
    Broadcast { range: Range<usize>, root: usize },
    /// One rank's range at another.
    Move {
        range: Range<usize>,
        from: usize,
        to: usize,
    },
}

/// The calls for `op` on `len` elements, all in one group.
pub(super) fn plan(op: Op, len: usize, world: usize) -> Vec<Call> {
    if len == 0 {
        return Vec::new();
    }
    let even = len.is_multiple_of(world);
    let count = len / world;
    let shards = || (0..world).map(|root| (shard_range(len, world, root), root));
    let filled = |(range, _): &(Range<usize>, usize)| !range.is_empty();
    match op {
        Op::AllReduceSum => vec![Call::AllReduce { range: 0..len }],
        Op::Broadcast { root } => vec![Call::Broadcast {
            range: 0..len,
            root,
        }],
        Op::ReduceScatterSum if even => vec![Call::ReduceScatter { count }],
        Op::AllGather if even => vec![Call::AllGather { count }],
        Op::Mirror if world == 1 => Vec::new(),
        // Every rank has something to do in it, as in any other operation.
        Op::Mirror if count > 0 => shards()
            .map(|(range, from)| Call::Move {
                range,
                from,
                to: (from + 1) % world,
            })
            .collect(),
        Op::ReduceScatterSum => shards()
            .filter(filled)
            .map(|(range, root)| Call::Reduce { range, root })
            .collect(),
        Op::AllGather | Op::Mirror => shards()
            .filter(filled)
            .map(|(range, root)| Call::Broadcast { range, root })
            .collect(),
        Op::Send { .. } => unreachable!("start refuses it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORLDS: Range<usize> = 1..9;
    const LENS: Range<usize> = 0..70;

    /// The elements that `rank` holds the result of after `calls`.
    fn results(calls: &[Call], rank: usize, world: usize) -> Vec<usize> {
        let mut held: Vec<usize> = calls
            .iter()
            .flat_map(|call| match call {
                Call::AllReduce { range } | Call::Broadcast { range, .. } => range.clone(),
                Call::ReduceScatter { count } => rank * count..(rank + 1) * count,
                Call::AllGather { count } => 0..world * count,
                Call::Reduce { range, root } if *root == rank => range.clone(),
                Call::Move { range, to, .. } if *to == rank => range.clone(),
                Call::Reduce { .. } | Call::Move { .. } => 0..0,
            })
            .collect();
        held.sort_unstable();
        held
    }

    #[test]
    fn a_scatter_leaves_every_rank_exactly_its_shard() {
        for world in WORLDS {
            for len in LENS {
                let calls = plan(Op::ReduceScatterSum, len, world);
                for rank in 0..world {
                    let shard: Vec<usize> = shard_range(len, world, rank).collect();
                    assert_eq!(results(&calls, rank, world), shard, "{len} over {world}");
                }
            }
        }
    }

    #[test]
    fn a_gather_brings_every_element_once_and_from_its_owner() {
        for world in WORLDS {
            for len in LENS {
                let calls = plan(Op::AllGather, len, world);
                let all: Vec<usize> = (0..len).collect();
                assert_eq!(results(&calls, 0, world), all, "{len} over {world}");
                for call in calls {
                    if let Call::Broadcast { range, root } = call {
                        assert_eq!(range, shard_range(len, world, root));
                    }
                }
            }
        }
    }

    #[test]
    fn a_mirror_brings_every_rank_the_shard_of_the_one_before_it() {
        for world in WORLDS {
            for len in world..70 {
                let calls = plan(Op::Mirror, len, world);
                for rank in 0..world {
                    let before = shard_range(len, world, (rank + world - 1) % world);
                    let before = if world == 1 { 0..0 } else { before };
                    let before: Vec<usize> = before.collect();
                    assert_eq!(results(&calls, rank, world), before, "{len} over {world}");
                }
            }
        }
    }

    #[test]
    fn lengths_that_the_world_divides_take_one_call_and_no_elements_take_none() {
        for world in WORLDS {
            for op in [Op::ReduceScatterSum, Op::AllGather] {
                assert_eq!(plan(op, 60 * world, world).len(), 1);
                assert!(plan(op, 0, world).is_empty());
            }
        }
        assert_eq!(
            plan(Op::AllGather, 3, 4).len(),
            3,
            "an empty shard needs no call"
        );
    }
}
