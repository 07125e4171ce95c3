//! What every implementation between ranks must do, as bodies that one rank runs: each rank knows the right answers by itself,
//! so that ranks may be threads or processes.
#![allow(dead_code, reason = "each test program uses its part")]

use std::{
    sync::Barrier,
    time::{Duration, Instant},
};

use collective::{Collective, CollectiveError, Op, Region, shard_range};

pub mod device;

pub fn soon() -> Instant {
    within(60_000)
}

pub fn within(milliseconds: u64) -> Instant {
    Instant::now() + Duration::from_millis(milliseconds)
}

/// What sums have to be.
#[derive(Clone, Copy, PartialEq)]
pub enum Sums {
    /// The bits of `((x₀ + x₁) + x₂) + …`.
    InTheOrderOfRanks,
    /// Equal bits at all ranks, within the rounding of any order.
    InAnyOrder,
}

/// Lengths that worlds up to four divide and do not, shorter than the world, and longer than TCP's chunk for every rank.
pub const LENS: [usize; 7] = [0, 1, 3, 7, 24, 1000, 270_001];

/// Values whose sums depend on the order of addition.
pub fn values(rank: usize, len: usize) -> Vec<f32> {
    let mut state = rank as u64 * 7919 + 17;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / 1e3 - 8e3) * 10f32.powi((state % 7) as i32 - 3)
        })
        .collect()
}

/// `((x₀ + x₁) + x₂) + …` over `ranks` in their order.
pub fn naive_sum(ranks: &[usize], len: usize) -> Vec<f32> {
    let mut sum = values(ranks[0], len);
    for &rank in &ranks[1..] {
        for (sum, value) in sum.iter_mut().zip(values(rank, len)) {
            *sum += value;
        }
    }
    sum
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Checks sums over all ranks of [`values`], of which `of` is this rank's part.
pub fn check_sums(sums: &[f32], of: std::ops::Range<usize>, len: usize, world: usize, rule: Sums) {
    let ranks: Vec<usize> = (0..world).collect();
    let naive = &naive_sum(&ranks, len)[of.clone()];
    if rule == Sums::InTheOrderOfRanks {
        assert!(bits(sums) == bits(naive), "world {world}, {len} elements");
        return;
    }
    let parts: Vec<Vec<f32>> = ranks.iter().map(|&rank| values(rank, len)).collect();
    for (sum, index) in sums.iter().zip(of) {
        let exact: f64 = parts.iter().map(|part| f64::from(part[index])).sum();
        let size: f64 = parts.iter().map(|part| f64::from(part[index].abs())).sum();
        // Any order of n - 1 additions errs by at most (n - 1) · ε/2 · Σ|x|, to first order; twice that is allowed.
        let allowed = (world - 1) as f64 * f64::from(f32::EPSILON) * size;
        let error = (f64::from(*sum) - exact).abs();
        assert!(
            error <= allowed,
            "world {world}, element {index} of {len}: {error} over {allowed}"
        );
    }
}

/// Whether all ranks hold the same bits, asked over the collective itself.
pub fn check_equal_everywhere(collective: &mut dyn Collective, values: &[f32]) {
    // FNV-1a, cut to 32 bits, which a double holds exactly.
    let digest = bits(values)
        .into_iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, word| {
            (hash ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3)
        });
    let mut slots = vec![0.0; collective.world()];
    slots[collective.rank()] = f64::from((digest >> 32) as u32);
    let slots = collective.run(Op::AllReduceSum, Region::HostF64(slots), soon());
    let slots = slots.unwrap().into_f64();
    assert!(slots.iter().all(|slot| *slot == slots[0]), "{slots:?}");
}

/// All bodies that leave the group alive.
pub fn healthy(collective: &mut dyn Collective, rule: Sums) {
    sums(collective, rule);
    doubles(collective);
    gathers(collective);
    mirrors(collective);
    broadcasts(collective);
    order(collective);
    refusals(collective);
}

pub fn sums(collective: &mut dyn Collective, rule: Sums) {
    let (rank, world) = (collective.rank(), collective.world());
    for len in LENS {
        let region = || Region::HostF32(values(rank, len));
        let all = collective.run(Op::AllReduceSum, region(), soon());
        let all = all.unwrap().into_f32();
        check_sums(&all, 0..len, len, world, rule);
        check_equal_everywhere(collective, &all);
        let own = collective.run(Op::ReduceScatterSum, region(), soon());
        let shard = shard_range(len, world, rank);
        let own = &own.unwrap().into_f32()[shard.clone()];
        check_sums(own, shard, len, world, rule);
    }
}

pub fn doubles(collective: &mut dyn Collective) {
    // Exact in any order, since only one rank fills a slot.
    let (rank, world) = (collective.rank(), collective.world());
    let mut slots = vec![0.0; 10];
    for slot in shard_range(10, world, rank) {
        slots[slot] = -(slot as f64) / 3.0;
    }
    let sum = collective.run(Op::AllReduceSum, Region::HostF64(slots), soon());
    let expected: Vec<f64> = (0..10).map(|slot| -f64::from(slot) / 3.0).collect();
    assert_eq!(sum.unwrap().into_f64(), expected);
}

pub fn gathers(collective: &mut dyn Collective) {
    for len in LENS {
        let mut region = vec![f32::NAN; len];
        let own = shard_range(len, collective.world(), collective.rank());
        region[own.clone()].copy_from_slice(&values(9, len)[own]);
        let all = collective.run(Op::AllGather, Region::HostF32(region), soon());
        assert!(all.unwrap().into_f32() == values(9, len), "{len} elements");
    }
    // Bits of bf16, every pattern, those of NaNs included.
    for len in [0, 1, 3, 70_001] {
        let expected: Vec<u16> = (0..len).map(|at| (at % 65_536) as u16).collect();
        let mut region = vec![0x7fc1; len];
        let own = shard_range(len, collective.world(), collective.rank());
        region[own.clone()].copy_from_slice(&expected[own]);
        let all = collective.run(Op::AllGather, Region::HostBf16(region), soon());
        assert!(all.unwrap().into_bf16() == expected, "{len} elements");
    }
}

pub fn mirrors(collective: &mut dyn Collective) {
    let (rank, world) = (collective.rank(), collective.world());
    for len in LENS {
        let mut region = vec![f32::NAN; len];
        let own = shard_range(len, world, rank);
        region[own.clone()].copy_from_slice(&values(9, len)[own.clone()]);
        let two = collective.run(Op::Mirror, Region::HostF32(region), soon());
        let two = two.unwrap().into_f32();
        for shard in [own, shard_range(len, world, (rank + world - 1) % world)] {
            assert!(
                two[shard.clone()] == values(9, len)[shard],
                "{len} elements"
            );
        }
    }
}

/// Every rank to every rank, itself included; the others bring nothing.
pub fn sends(collective: &mut dyn Collective) {
    let (rank, world) = (collective.rank(), collective.world());
    for from in 0..world {
        for to in 0..world {
            let len = [0, 1, 270_001][(from + to) % 3];
            let region = match rank {
                rank if rank == from => values(from, len),
                rank if rank == to => vec![f32::NAN; len],
                _ => Vec::new(),
            };
            let got = collective.run(Op::Send { from, to }, Region::HostF32(region), soon());
            let got = got.unwrap().into_f32();
            let expected = if rank == from || rank == to { len } else { 0 };
            assert!(got == values(from, len)[..expected], "from {from} to {to}");
        }
    }
}

pub fn broadcasts(collective: &mut dyn Collective) {
    let (rank, root) = (collective.rank(), collective.world() - 1);
    let op = Op::Broadcast { root };
    // Bytes: the root's length counts.
    for message in [vec![], vec![42u8; 3_000_001], vec![7; 5]] {
        let own = if rank == root {
            message.clone()
        } else {
            vec![1; rank * 10]
        };
        let got = collective.run(op, Region::HostBytes(own), soon());
        assert!(got.unwrap().into_bytes() == message);
    }
    let region = Region::HostF32(values(rank, 1001));
    let got = collective.run(op, region, soon()).unwrap().into_f32();
    assert_eq!(bits(&got), bits(&values(root, 1001)));
}

pub fn order(collective: &mut dyn Collective) {
    let (world, generation) = (collective.world() as f64, collective.generation());
    let region = |value: f64| Region::HostF64(vec![value; 5]);
    let mut start = |value| {
        let ticket = collective.start(Op::AllReduceSum, region(value), generation);
        ticket.unwrap()
    };
    let (first, second) = (start(1.0), start(10.0));
    let second = collective.wait(second, soon()).unwrap().into_f64();
    let first = collective.wait(first, soon()).unwrap().into_f64();
    assert_eq!((first[0], second[4]), (world, 10.0 * world));
}

pub fn refusals(collective: &mut dyn Collective) {
    let (world, current) = (collective.world(), collective.generation());
    let asked = current - 1;
    let stale = collective.start(Op::AllGather, Region::HostF32(vec![]), asked);
    assert_eq!(stale, Err(CollectiveError::Stale { asked, current }));
    let bytes = collective.start(Op::AllReduceSum, Region::HostBytes(vec![1]), current);
    assert!(matches!(bytes, Err(CollectiveError::Unsupported { .. })));
    for op in [Op::AllReduceSum, Op::ReduceScatterSum] {
        let bits = collective.start(op, Region::HostBf16(vec![1]), current);
        assert!(matches!(bits, Err(CollectiveError::Unsupported { .. })));
    }
    let root = Op::Broadcast { root: world };
    let root = collective.start(root, Region::HostF32(vec![]), current);
    assert!(matches!(root, Err(CollectiveError::Unsupported { .. })));
    collective.abort(asked);
    // The group is not harmed.
    let sum = collective.run(Op::AllReduceSum, Region::HostF64(vec![1.0]), soon());
    assert_eq!(sum.unwrap().into_f64(), [world as f64]);
}

/// Two ranks, of which the second starts nothing until the first has given up; the first's error.
pub fn silent_peer(collective: &mut dyn Collective, gate: &Barrier) -> Option<CollectiveError> {
    if collective.rank() == 1 {
        gate.wait();
        return None;
    }
    let (region, generation) = (Region::HostF32(vec![1.0; 100]), collective.generation());
    let error = collective.run(Op::AllGather, region.clone(), within(50));
    let error = error.unwrap_err();
    gate.wait();
    let text = error.to_string();
    assert!(
        text.contains("deadline") && text.contains("AllGather"),
        "{text}"
    );
    let again = collective.start(Op::AllGather, region, generation);
    assert_eq!(again.unwrap_err(), error, "the group is over");
    Some(error)
}

/// Two ranks, of which the first aborts from another thread while it waits for the second, which starts nothing.
pub fn abort_while_waiting(collective: &mut dyn Collective, gate: &Barrier) {
    let region = || Region::HostF32(vec![0.0; 10]);
    let generation = collective.generation();
    collective.run(Op::AllGather, region(), soon()).unwrap();
    if collective.rank() == 0 {
        let ticket = collective.start(Op::AllReduceSum, region(), generation);
        let ticket = ticket.unwrap();
        let aborter = collective.aborter();
        aborter.abort(generation - 1, "stale");
        std::thread::scope(|scope| {
            scope.spawn(move || aborter.abort(generation, "rank 0 is drained"));
            let error = collective.wait(ticket, soon()).unwrap_err();
            assert!(error.to_string().contains("rank 0 is drained"), "{error}");
        });
        let again = collective.start(Op::AllReduceSum, region(), generation);
        assert!(matches!(again, Err(CollectiveError::Aborted { .. })));
    }
    gate.wait();
}
