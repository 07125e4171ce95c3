//! What every rank does before a step: the step's pairs out of a shuffled epoch, and their packs.
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use data::{pack_plan, step_pairs};

/// Lengths like a chat set's: many short ones, few long ones, none equal for long.
fn lengths(pairs: usize) -> Vec<usize> {
    (0..pairs)
        .map(|pair| 40 + (pair * 7919) % 1009 * ((pair * 31) % 7) / 4)
        .collect()
}

fn order(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pairs of a step");
    for pairs in [1_000, 100_000, 1_000_000] {
        group.bench_with_input(
            BenchmarkId::from_parameter(pairs),
            &pairs,
            |bench, &pairs| {
                bench.iter(|| step_pairs(1, 7, pairs, 64, true));
            },
        );
    }
    group.finish();
}

fn packs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("packs of a step");
    for pairs in [8, 64, 512, 4096] {
        let lengths = lengths(pairs);
        group.throughput(Throughput::Elements(pairs as u64));
        group.bench_with_input(
            BenchmarkId::from_parameter(pairs),
            &lengths,
            |bench, lengths| {
                bench.iter(|| pack_plan(lengths, 2048));
            },
        );
    }
    group.finish();
}

criterion_group!(benches, order, packs);
criterion_main!(benches);
