//! Ranks as threads on loopback: sums against naive ones, order of addition, and every refusal.
#![allow(missing_docs, clippy::unwrap_used)]

mod suite;

use std::{
    net::{IpAddr, Ipv4Addr, TcpStream},
    sync::Barrier,
    time::{Duration, Instant},
};

use collective::{
    Collective, CollectiveError, Op, Region, shard_range, single,
    tcp::{Rendezvous, Tcp},
};
use suite::{Sums, bits, naive_sum, soon, values, within};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SECRET: [u8; 32] = [7; 32];

/// Runs `body` once per rank, each on its thread, connected to the others; the results in order of ranks.
fn group<R: Send>(world: usize, body: impl Fn(Tcp) -> R + Sync) -> Vec<R> {
    let listeners: Vec<Rendezvous> = (0..world)
        .map(|_| Rendezvous::bind(LOOPBACK).unwrap())
        .collect();
    let addresses: Vec<String> = listeners.iter().map(Rendezvous::address).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .into_iter()
            .enumerate()
            .map(|(rank, listener)| {
                let (addresses, body) = (&addresses, &body);
                scope.spawn(move || {
                    body(
                        listener
                            .connect(rank, addresses, 3, SECRET, soon())
                            .unwrap(),
                    )
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

#[test]
fn the_values_of_these_tests_tell_orders_of_addition_apart() {
    assert_ne!(
        bits(&naive_sum(&[0, 1, 2], 1000)),
        bits(&naive_sum(&[2, 1, 0], 1000))
    );
}

#[test]
fn sums_have_the_bits_of_adding_in_the_order_of_ranks() {
    for world in 1..=4 {
        group(world, |mut tcp| {
            suite::sums(&mut tcp, Sums::InTheOrderOfRanks);
        });
    }
}

#[test]
fn doubles_are_summed_exactly_where_only_one_rank_filled_a_slot() {
    group(3, |mut tcp| suite::doubles(&mut tcp));
}

#[test]
fn a_gather_brings_every_shard_to_every_rank() {
    for world in 1..=4 {
        group(world, |mut tcp| suite::gathers(&mut tcp));
    }
}

#[test]
fn a_mirror_brings_every_shard_to_the_next_rank() {
    for world in 1..=4 {
        group(world, |mut tcp| suite::mirrors(&mut tcp));
    }
}

#[test]
fn a_region_is_sent_from_one_rank_to_another_past_the_rest() {
    for world in 1..=4 {
        group(world, |mut tcp| suite::sends(&mut tcp));
    }
}

#[test]
fn regions_that_a_failure_left_behind_come_back_in_order_with_what_they_gave() {
    let lens = [3_000_000, 5, 0, 1000];
    let results = group(3, |mut tcp| {
        let rank = tcp.rank();
        if rank == 2 {
            // It takes part in the first operation alone, and is gone.
            let region = Region::HostF32(vec![0.0; 8]);
            drop(tcp.run(Op::AllGather, region, soon()).unwrap());
            return Vec::new();
        }
        let generation = tcp.generation();
        let region = Region::HostF32(vec![0.0; 8]);
        let first = tcp.start(Op::AllGather, region, generation).unwrap();
        let mut tickets = Vec::new();
        let mut refused = 0;
        for len in lens {
            let region = Region::HostF32(values(rank, len));
            match tcp.start(Op::AllGather, region, generation) {
                Ok(ticket) => tickets.push(ticket),
                Err(_) => refused += 1,
            }
            // Some are refused at their start, and come back all the same.
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!(refused > 0);
        if rank == 1 {
            for ticket in tickets {
                tcp.wait(ticket, soon()).unwrap_err();
            }
        }
        drop(first);
        let regions = Box::new(tcp).reclaim().into_iter();
        regions.map(Region::into_f32).collect()
    });
    for (rank, regions) in results.iter().enumerate().take(2) {
        let found: Vec<usize> = regions.iter().map(Vec::len).collect();
        assert_eq!(found, [&[8], &lens[..]].concat(), "rank {rank}");
        for region in &regions[1..] {
            let own = shard_range(region.len(), 3, rank);
            assert!(region[own.clone()] == values(rank, region.len())[own]);
        }
    }
}

#[test]
fn a_broadcast_of_bytes_has_the_roots_length_everywhere() {
    group(3, |mut tcp| suite::broadcasts(&mut tcp));
}

#[test]
fn started_operations_run_in_order_and_are_waited_for_in_any() {
    group(2, |mut tcp| suite::order(&mut tcp));
}

#[test]
fn two_ranks_send_each_other_a_quarter_of_a_gigabyte_at_once() {
    // Far more than any socket buffer: a write that waited for the own read would never end.
    let len = 125_000_000;
    group(2, |mut tcp| {
        let mut region = vec![0f32; len];
        let own = shard_range(len, 2, tcp.rank());
        region[own].fill(1.0 + tcp.rank() as f32);
        let all = tcp
            .run(Op::AllGather, Region::HostF32(region), soon())
            .unwrap()
            .into_f32();
        assert!(all[0] == 1.0 && all[len - 1] == 2.0);
        let all = tcp
            .run(Op::ReduceScatterSum, Region::HostF32(all), soon())
            .unwrap()
            .into_f32();
        let own = shard_range(len, 2, tcp.rank());
        assert!(
            all[own]
                .iter()
                .all(|&sum| sum == 2.0 + 2.0 * tcp.rank() as f32)
        );
    });
}

#[test]
fn a_lost_peer_is_named_long_before_the_deadline() {
    let started = Instant::now();
    let results = group(3, |mut tcp| {
        if tcp.rank() == 2 {
            return None; // Gone: the connections close as when a process is killed.
        }
        let region = Region::HostF32(vec![1.0; 1_000_000]);
        Some(tcp.run(Op::AllReduceSum, region, soon()).unwrap_err())
    });
    assert!(started.elapsed() < Duration::from_secs(20));
    for error in results.into_iter().flatten() {
        assert!(matches!(error, CollectiveError::Lost { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("rank 2 (127.0.0.1:"), "{text}");
        assert!(text.contains("AllReduceSum"), "{text}");
    }
}

#[test]
fn a_silent_peer_is_named_when_the_deadline_passes_and_the_group_is_over() {
    let gate = Barrier::new(2);
    let errors = group(2, |mut tcp| suite::silent_peer(&mut tcp, &gate));
    let error = errors.into_iter().flatten().next().unwrap();
    assert!(matches!(error, CollectiveError::Deadline { .. }));
    assert!(error.to_string().contains("rank 1 (127.0.0.1:"), "{error}");
}

#[test]
fn an_abort_wakes_a_waiter_with_its_reason_and_a_stale_abort_does_not() {
    let gate = Barrier::new(2);
    group(2, |mut tcp| {
        suite::abort_while_waiting(&mut tcp, &gate);
        if tcp.rank() == 1 {
            let region = Region::HostF32(vec![0.0; 10]);
            let error = tcp.run(Op::AllReduceSum, region, soon()).unwrap_err();
            assert!(matches!(error, CollectiveError::Lost { .. }), "{error}");
        }
    });
}

#[test]
fn ranks_that_run_different_operations_find_out() {
    let results = group(2, |mut tcp| {
        let len = 10 + tcp.rank();
        tcp.run(Op::AllReduceSum, Region::HostF32(vec![0.0; len]), soon())
            .unwrap_err()
    });
    let texts: Vec<String> = results.iter().map(ToString::to_string).collect();
    assert!(
        texts.iter().any(|text| text.contains("of 11 elements")),
        "{texts:?}"
    );
}

#[test]
fn impossible_starts_are_refused_without_harm_to_the_group() {
    group(2, |mut tcp| suite::refusals(&mut tcp));
}

/// Both ends of a rendezvous of two where they differ in one thing; (rank 0's error, rank 1's error).
fn failed_rendezvous(
    secrets: [[u8; 32]; 2],
    generations: [u64; 2],
) -> (CollectiveError, CollectiveError) {
    let [zero, one] = [(); 2].map(|()| Rendezvous::bind(LOOPBACK).unwrap());
    let addresses = [zero.address(), one.address()];
    std::thread::scope(|scope| {
        let addresses = &addresses;
        let zero = scope.spawn(move || {
            zero.connect(0, addresses, generations[0], secrets[0], within(300))
                .err()
        });
        let one = one.connect(1, addresses, generations[1], secrets[1], soon());
        (zero.join().unwrap().unwrap(), one.err().unwrap())
    })
}

#[test]
fn a_wrong_secret_is_refused_on_both_sides() {
    let (acceptor, dialer) = failed_rendezvous([SECRET, [8; 32]], [3, 3]);
    assert!(dialer.to_string().contains("secret"), "{dialer}");
    assert!(matches!(dialer, CollectiveError::Refused { .. }));
    let text = acceptor.to_string();
    assert!(text.contains("no connection from rank 1"), "{text}");
}

#[test]
fn a_rank_of_another_generation_is_turned_away_and_told() {
    let (acceptor, dialer) = failed_rendezvous([SECRET; 2], [4, 3]);
    assert!(
        dialer.to_string().contains("generation 4"),
        "the dialer is told: {dialer}"
    );
    assert!(acceptor.to_string().contains("generation 3"), "{acceptor}");
}

#[test]
fn strangers_at_the_door_do_not_keep_the_ranks_apart() {
    let [zero, one] = [(); 2].map(|()| Rendezvous::bind(LOOPBACK).unwrap());
    let addresses = [zero.address(), one.address()];
    // One says nothing and hangs up, one talks another language and hangs up.
    drop(TcpStream::connect(&addresses[0]).unwrap());
    let mut loud = TcpStream::connect(&addresses[0]).unwrap();
    std::io::Write::write_all(&mut loud, &[b'x'; 100]).unwrap();
    std::thread::scope(|scope| {
        let addresses = &addresses;
        let zero = scope.spawn(move || zero.connect(0, addresses, 1, SECRET, soon()).map(drop));
        let one = one.connect(1, addresses, 1, SECRET, soon());
        assert!(zero.join().unwrap().is_ok() && one.is_ok());
    });
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let zero = Rendezvous::bind(LOOPBACK).unwrap();
    let addresses = [zero.address(), "127.0.0.1:1".into()];
    let error = zero.connect(0, &addresses, 1, SECRET, within(50)).err();
    let text = error.unwrap().to_string();
    assert!(
        text.starts_with("no connection from rank 1 (127.0.0.1:1)"),
        "{text}"
    );
}

#[test]
fn a_world_of_one_keeps_the_same_rules() {
    let mut single = single(5);
    let region = Region::HostF32(vec![1.0, 2.0]);
    assert_eq!(
        single.run(Op::AllReduceSum, region.clone(), soon()),
        Ok(region.clone())
    );
    assert!(matches!(
        single.start(Op::AllGather, region.clone(), 4),
        Err(CollectiveError::Stale { .. })
    ));
    single.abort(4);
    let ticket = single.start(Op::AllGather, region.clone(), 5).unwrap();
    single.abort(5);
    assert!(single.wait(ticket, soon()).is_err());
    assert!(single.start(Op::AllGather, region, 5).is_err());
}

#[test]
fn a_rendezvous_is_ended_from_another_thread_whether_it_dials_or_accepts_and_then_serves_the_next_generation()
 {
    let doors = [(); 2].map(|()| Rendezvous::bind(LOOPBACK).unwrap());
    let addresses: Vec<String> = doors.iter().map(Rendezvous::address).collect();
    let connect = |rank: usize, generation: u64| {
        doors[rank].connect(rank, &addresses, generation, SECRET, soon())
    };
    for rank in 0..2 {
        // The other rank is bound and silent: rank 1 waits in its handshake, rank 0 for a caller.
        std::thread::scope(|scope| {
            let aborter = doors[rank].aborter();
            let waiting = scope.spawn(move || connect(rank, 4).map(|_| ()));
            std::thread::sleep(Duration::from_millis(100));
            let started = Instant::now();
            aborter.abort(4, "the test says so");
            let error = waiting.join().unwrap().unwrap_err();
            assert!(started.elapsed() < Duration::from_secs(3));
            assert!(error.to_string().contains("the test says so"), "{error}");
        });
    }
    // The caller of generation 4 is still in the backlog of rank 0.
    std::thread::scope(|scope| {
        let other = scope.spawn(|| connect(1, 5).unwrap());
        let mut tcp = connect(0, 5).unwrap();
        let other = scope.spawn(move || suite::mirrors(&mut other.join().unwrap()));
        suite::mirrors(&mut tcp);
        other.join().unwrap();
    });
}
