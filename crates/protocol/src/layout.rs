//! Who holds which optimizer shard. A generation of `n` members cuts the optimizer into `n` shards: the member of rank `r` owns
//! shard `r`, and the next one on the ring holds its mirror, from two members on.

use std::collections::BTreeSet;

use crate::{Generation, Rank, Step};

/// The shards that a worker holds of one generation's cut: its own and the one that it mirrors.
///
/// A worker keeps those of its last complete generation until it hears Go of the next: only then are all parts of the new cut
/// in place. In between it holds both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Whose cut.
    pub generation: Generation,
    /// Its rank there.
    pub rank: Rank,
    /// Members there.
    pub world: u32,
    /// The last step that is applied to both.
    pub applied: Step,
    /// Whether it has the reduced gradient of the step after for both.
    pub gradient: bool,
}

/// Where a new generation finds the state it goes on from: every shard of an earlier one's cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Whose cut.
    pub generation: Generation,
    /// By shard, which is the rank of its owner then.
    pub shards: Vec<Copies>,
}

/// Members of the new generation that hold a shard; one of them at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copies {
    /// Who owned it.
    pub owner: Option<Rank>,
    /// Who mirrored it.
    pub mirror: Option<Rank>,
}

impl Copies {
    /// Who is to send it: the owner, or else the mirror.
    pub fn source(&self) -> Option<Rank> {
        self.owner.or(self.mirror)
    }
}

/// Who mirrors the shard of `owner`: its neighbour on the ring, when it has one.
pub fn mirror_of(owner: Rank, world: u32) -> Option<Rank> {
    (world > 1).then(|| Rank((owner.0 + 1) % world))
}

/// The newest cut of which those who hold something have every shard at `committed`, or one step before it with its gradient.
///
/// `since` is the generation that committed `committed`. What older ones cut cannot be at this commit, except by another
/// history, which a rewind ended; and only that generation's own gradient of it counts.
pub(crate) fn newest_layout<'a>(
    committed: Step,
    since: Generation,
    mirror: bool,
    holders: impl Iterator<Item = (Rank, &'a [Held])>,
) -> Option<Layout> {
    let usable = |it: &Held| {
        let is_at = it.applied == committed;
        let can_apply = it.gradient && it.applied.next() == committed && it.generation == since;
        it.generation >= since && it.rank.0 < it.world && (is_at || can_apply)
    };
    let all = holders.flat_map(|(rank, held)| held.iter().map(move |it| (rank, *it)));
    let all: Vec<(Rank, Held)> = all.filter(|(_, it)| usable(it)).collect();
    let generations: BTreeSet<Generation> = all.iter().map(|(_, it)| it.generation).collect();
    let cut = |generation: Generation| {
        let of = || {
            all.iter()
                .filter(move |(_, it)| it.generation == generation)
        };
        let world = of().next()?.1.world;
        if world as usize > 2 * of().count() {
            return None; // each holds two shards at most
        }
        let mut shards = vec![Copies::default(); world as usize];
        for (rank, it) in of().filter(|(_, it)| it.world == world) {
            shards[it.rank.0 as usize].owner.get_or_insert(*rank);
            if mirror && world > 1 {
                let mirrored = (it.rank.0 + world - 1) % world;
                shards[mirrored as usize].mirror.get_or_insert(*rank);
            }
        }
        let complete = shards.iter().all(|it| it.source().is_some());
        complete.then_some(Layout { generation, shards })
    };
    generations.into_iter().rev().find_map(cut)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]
mod tests {
    use super::*;

    fn held(generation: u64, rank: u32, world: u32, applied: u64, gradient: bool) -> Vec<Held> {
        vec![Held {
            generation: Generation(generation),
            rank: Rank(rank),
            world,
            applied: Step(applied),
            gradient,
        }]
    }

    type Ranks = (Option<u32>, Option<u32>);

    /// Owner and mirror by shard, of the newest layout at commit 7 of generation 3.
    fn check(holders: &[Vec<Held>]) -> Option<(u64, Vec<Ranks>)> {
        check_with(true, holders)
    }

    fn check_with(mirror: bool, holders: &[Vec<Held>]) -> Option<(u64, Vec<Ranks>)> {
        let ranked = holders.iter().enumerate();
        let ranked = ranked.map(|(rank, held)| (Rank(rank as u32), held.as_slice()));
        let layout = newest_layout(Step(7), Generation(3), mirror, ranked)?;
        let rank = |it: Option<Rank>| it.map(|rank| rank.0);
        let shards = layout.shards.iter();
        let shards = shards.map(|it| (rank(it.owner), rank(it.mirror)));
        Some((layout.generation.0, shards.collect()))
    }

    #[test]
    fn one_lost_member_of_a_ring_leaves_every_shard_and_two_neighbours_do_not() {
        let member = |rank| held(3, rank, 4, 7, false);
        let three = [member(0), member(2), member(3)];
        let shards = vec![
            (Some(0), None),
            (None, Some(1)),
            (Some(1), Some(2)),
            (Some(2), Some(0)),
        ];
        assert_eq!(check(&three), Some((3, shards)));
        assert!(check(&[member(0), member(2)]).is_some(), "not neighbours");
        assert_eq!(check(&[member(0), member(3)]), None);
    }

    #[test]
    fn without_mirrors_every_owner_is_needed() {
        let member = |rank| held(3, rank, 2, 7, false);
        let both = (3, vec![(Some(0), None), (Some(1), None)]);
        assert_eq!(check_with(false, &[member(0), member(1)]), Some(both));
        assert_eq!(check_with(false, &[member(0)]), None);
        assert!(check(&[member(0)]).is_some());
    }

    #[test]
    fn what_is_ahead_of_the_commit_that_a_rewind_went_back_to_is_not_gone_on_from() {
        let holders = [held(5, 0, 2, 1, false), held(5, 1, 2, 0, false)];
        let layout = |holders: &[Vec<Held>]| {
            let ranked = holders.iter().enumerate();
            let ranked = ranked.map(|(rank, held)| (Rank(rank as u32), held.as_slice()));
            newest_layout(Step(0), Generation(0), true, ranked)
        };
        let second = Some(Rank(1));
        let [mirrored, owned] = [(None, second), (second, None)];
        let shards = [mirrored, owned].map(|(owner, mirror)| Copies { owner, mirror });
        assert_eq!(layout(&holders).unwrap().shards, shards);
        assert_eq!(layout(&holders[..1]), None);
    }

    #[test]
    fn a_single_worker_has_no_mirror() {
        let alone = (3, vec![(Some(0), None)]);
        assert_eq!(check(&[held(3, 0, 1, 7, false)]), Some(alone));
        assert_eq!(mirror_of(Rank(0), 1), None);
        assert_eq!(mirror_of(Rank(2), 3), Some(Rank(0)));
    }

    #[test]
    fn who_is_a_step_behind_counts_with_the_gradient_of_the_generation_that_committed() {
        assert!(check(&[held(3, 0, 1, 6, true)]).is_some());
        assert_eq!(check(&[held(3, 0, 1, 6, false)]), None);
        assert_eq!(check(&[held(4, 0, 1, 6, true)]), None, "of a step redone");
        assert_eq!(check(&[held(3, 0, 1, 5, true)]), None);
        assert_eq!(check(&[held(3, 0, 1, 8, false)]), None);
    }

    #[test]
    fn what_an_older_generation_cut_is_of_another_history() {
        assert_eq!(check(&[held(2, 0, 1, 7, false)]), None);
    }

    #[test]
    fn a_newer_cut_serves_once_it_is_complete() {
        let both = |old: (u32, u32), new: (u32, u32)| {
            let mut all = held(4, new.0, new.1, 7, false);
            all.extend(held(3, old.0, old.1, 7, false));
            all
        };
        let old = held(3, 2, 3, 7, false);
        let complete = [both((0, 3), (0, 3)), both((1, 3), (1, 3)), old.clone()];
        assert_eq!(check(&complete).unwrap().0, 4);
        let partly = [both((0, 3), (0, 3)), old];
        assert_eq!(check(&partly).unwrap().0, 3);
    }
}
