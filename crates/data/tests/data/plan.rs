//! T1: order and packs are pure functions of (seed, epoch, step), whatever the world size.

use data::{deal, epoch_steps, pack_plan, step_pairs, steps_per_epoch};

/// Small numbers that differ from seed to seed (a linear congruential generator by Knuth).
fn lengths(seed: u64, count: usize, below: usize) -> Vec<usize> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % below + 1
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn t1_an_epoch_visits_every_pair_once_and_each_epoch_in_another_order() {
    let (pairs, batch) = (53, 8);
    let steps = steps_per_epoch(pairs, batch);
    assert_eq!(steps, 7);
    let epoch = |epoch: u64| -> Vec<usize> {
        (1..=steps)
            .flat_map(|step| {
                let got = step_pairs(3, epoch * steps + step, pairs, batch, true);
                assert_eq!(got.epoch, epoch);
                got.pairs
            })
            .collect()
    };
    let (first, second) = (epoch(0), epoch(1));
    assert_ne!(first, second);
    for mut order in [first, second] {
        order.sort_unstable();
        assert_eq!(order, (0..pairs).collect::<Vec<_>>());
    }
}

#[test]
fn t1_an_epoch_as_a_whole_is_its_steps_one_by_one() {
    for shuffle in [true, false] {
        for epoch in 0..3 {
            let steps = epoch_steps(5, epoch, 53, 8, shuffle);
            assert_eq!(steps.len(), 7);
            for (step, pairs) in (epoch * 7 + 1..).zip(steps) {
                assert_eq!(pairs, step_pairs(5, step, 53, 8, shuffle).pairs);
            }
        }
    }
}

#[test]
fn t1_the_order_never_changes_between_versions() {
    // Computed apart, by a Python program from the definition in `order`; another value here breaks the resumption of every run.
    let first = step_pairs(0, 1, 10, 10, true).pairs;
    assert_eq!(first, [8, 5, 6, 1, 0, 3, 4, 9, 7, 2]);
    let fourth = step_pairs(7, 4, 10, 10, true);
    assert_eq!(
        (fourth.epoch, fourth.pairs),
        (3, vec![6, 0, 1, 4, 8, 5, 2, 3, 9, 7])
    );
}

#[test]
fn t1_without_shuffle_the_files_order_is_kept() {
    assert_eq!(step_pairs(9, 2, 5, 2, false).pairs, [2, 3]);
    assert_eq!(step_pairs(9, 3, 5, 2, false).pairs, [4]);
    assert_eq!(step_pairs(9, 4, 5, 2, false).pairs, [0, 1]);
}

#[test]
fn t1_packs_hold_every_pair_once_within_capacity() {
    for seed in 0..200 {
        let capacity = 100;
        let lengths = lengths(seed, (seed as usize % 40) + 1, 120);
        let plan = pack_plan(&lengths, capacity);
        let mut pairs: Vec<usize> = plan.concat();
        pairs.sort_unstable();
        assert_eq!(pairs, (0..lengths.len()).collect::<Vec<_>>(), "seed {seed}");
        for pack in &plan {
            let tokens: usize = pack.iter().map(|&pair| lengths[pair]).sum();
            assert!(
                tokens <= capacity || pack.len() == 1,
                "seed {seed}: {pack:?} has {tokens} tokens"
            );
            assert!(pack.is_sorted(), "seed {seed}: {pack:?}");
        }
        assert!(plan.is_sorted(), "seed {seed}: {plan:?}");
    }
}

#[test]
fn t1_small_steps_are_cut_into_packs_for_four_ranks() {
    assert_eq!(pack_plan(&[10, 10, 10, 10, 10], 1000).len(), 4);
    assert_eq!(pack_plan(&[10, 10], 1000).len(), 2);
    assert_eq!(pack_plan(&[], 1000), Vec::<Vec<usize>>::new());
}

#[test]
fn t1_deal_is_a_partition_at_every_world_size_so_packs_do_not_depend_on_it() {
    for seed in 0..200 {
        let packs = lengths(seed, seed as usize % 23, 500);
        for world in 1..=9 {
            let slices: Vec<_> = (0..world).map(|rank| deal(&packs, rank, world)).collect();
            let dealt: Vec<usize> = slices.iter().cloned().flatten().collect();
            assert_eq!(
                dealt,
                (0..packs.len()).collect::<Vec<_>>(),
                "seed {seed}, world {world}"
            );
            let idle = slices.iter().any(std::ops::Range::is_empty);
            let crowded = slices.iter().any(|slice| slice.len() > 1);
            assert!(!(idle && crowded), "seed {seed}, world {world}: {slices:?}");
        }
    }
}

#[test]
fn the_most_loaded_rank_has_as_few_tokens_as_contiguous_slices_allow() {
    for seed in 0..100 {
        let packs = lengths(seed, seed as usize % 9 + 1, 50);
        for world in 1..=4 {
            let most = (0..world)
                .map(|rank| packs[deal(&packs, rank, world)].iter().sum::<usize>())
                .max();
            assert_eq!(
                most,
                Some(lightest(&packs, world)),
                "seed {seed}, world {world}"
            );
        }
    }
}

/// By trying every cut.
fn lightest(packs: &[usize], world: usize) -> usize {
    if world == 1 {
        return packs.iter().sum();
    }
    let cuts = (0..=packs.len()).map(|cut| {
        let first: usize = packs[..cut].iter().sum();
        first.max(lightest(&packs[cut..], world - 1))
    });
    cuts.min().expect("there is always the empty cut")
}
