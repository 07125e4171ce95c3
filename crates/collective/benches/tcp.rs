//! Two ranks as threads on loopback, beside what loopback itself carries: `cargo bench -p collective`.
//!
//! Throughput counts the bytes that one rank sends, so every figure stands beside the raw ones: two plain connections' worth
//! of traffic, one each way at once, written and read by four threads as the operations' are. `raw/cached` moves one small
//! buffer again and again, as iperf3 does; `raw/memory` moves a region from and to memory, as an operation has to.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream},
    sync::Barrier,
    time::{Duration, Instant},
};

use collective::{
    Collective, Op, Region,
    tcp::{Rendezvous, Tcp},
};
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group,
    criterion_main, measurement::WallTime,
};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const MIB: usize = 1 << 20;
const RAW_BYTES: usize = 64 * MIB;
/// iperf3's default.
const CACHED_BYTES: usize = 128 * 1024;
/// The middle layers' buckets of a small model, and the largest bucket that a layout makes.
const REGION_MIB: [usize; 2] = [14, 64];

criterion_group!(benches, raw, operations);
criterion_main!(benches);

fn raw(criterion: &mut Criterion) {
    let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    for end in [&near, &far] {
        end.set_nodelay(true).unwrap();
    }
    let mut group = criterion.benchmark_group("raw");
    shorten(&mut group);
    group.throughput(Throughput::Bytes(RAW_BYTES as u64));
    for (name, buffer_bytes) in [("cached", CACHED_BYTES), ("memory", RAW_BYTES)] {
        let buffer = vec![1; buffer_bytes];
        let mut sinks = [vec![1; buffer_bytes], vec![1; buffer_bytes]];
        group.bench_function(name, |bencher| {
            bencher.iter(|| both_ways(&near, &far, &buffer, &mut sinks));
        });
    }
    group.finish();
}

/// Sends `RAW_BYTES` each way at once.
fn both_ways(near: &TcpStream, far: &TcpStream, buffer: &[u8], sinks: &mut [Vec<u8>; 2]) {
    std::thread::scope(|scope| {
        for (mut end, sink) in [near, far].into_iter().zip(sinks) {
            scope.spawn(move || {
                for _ in 0..RAW_BYTES / buffer.len() {
                    end.write_all(buffer).unwrap();
                }
            });
            scope.spawn(move || {
                for _ in 0..RAW_BYTES / sink.len() {
                    end.read_exact(sink).unwrap();
                }
            });
        }
    });
}

fn operations(criterion: &mut Criterion) {
    let mut ranks = connect();
    for (name, op, halves_sent) in [
        ("reduce-scatter", Op::ReduceScatterSum, 1),
        ("all-gather", Op::AllGather, 1),
        ("all-reduce", Op::AllReduceSum, 2),
    ] {
        let mut group = criterion.benchmark_group(name);
        shorten(&mut group);
        for mib in REGION_MIB {
            let mut regions = [(); 2].map(|()| vec![0f32; mib * MIB / size_of::<f32>()]);
            group.throughput(Throughput::Bytes((halves_sent * mib * MIB / 2) as u64));
            let id = BenchmarkId::from_parameter(format!("{mib} MiB"));
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|count| repeat(&mut ranks, &mut regions, op, count));
            });
        }
        group.finish();
    }
}

/// The time in which both ranks run `op` on their regions `count` times.
fn repeat(ranks: &mut [Tcp; 2], regions: &mut [Vec<f32>; 2], op: Op, count: u64) -> Duration {
    let gate = Barrier::new(2);
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter_mut()
            .zip(regions)
            .map(|(rank, region)| {
                let gate = &gate;
                scope.spawn(move || {
                    gate.wait();
                    let started = Instant::now();
                    for _ in 0..count {
                        let whole = Region::HostF32(std::mem::take(region));
                        *region = rank.run(op, whole, soon()).unwrap().into_f32();
                    }
                    started.elapsed()
                })
            })
            .collect();
        let times = threads.into_iter().map(|thread| thread.join().unwrap());
        times.max().unwrap()
    })
}

fn connect() -> [Tcp; 2] {
    let [zero, one] = [(); 2].map(|()| Rendezvous::bind(LOOPBACK).unwrap());
    let addresses = [zero.address(), one.address()];
    std::thread::scope(|scope| {
        let addresses = &addresses;
        let zero = scope.spawn(|| zero.connect(0, addresses, 1, [7; 32], soon()).unwrap());
        let one = one.connect(1, addresses, 1, [7; 32], soon()).unwrap();
        [zero.join().unwrap(), one]
    })
}

fn soon() -> Instant {
    Instant::now() + Duration::from_mins(1)
}

/// Eight figures within half a minute.
fn shorten(group: &mut BenchmarkGroup<'_, WallTime>) {
    group
        // Linear sampling would take more than the measurement time where one pass takes tens of milliseconds.
        .sampling_mode(SamplingMode::Flat)
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_millis(2500));
}
