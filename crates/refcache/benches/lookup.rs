//! Opening a large scope and looking up its entries. `REFCACHE_ENTRIES` sets how many; 10 million take 1 GB of disk.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{
    hint::black_box,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use criterion::{Criterion, criterion_group, criterion_main};
use refcache::{Cleaning, EntryKey, Scope, Store, clean, inspect};

/// Segments that the entries come in, as of ranks.
const WRITERS: u32 = 4;

fn scope() -> Scope {
    Scope {
        weights: [7; 32],
        truncation: "keep_start 512".into(),
        dtype: "f32".into(),
        backend: "flex".into(),
        device_class: "x86-64-v3".into(),
        kernels: "1".into(),
    }
}

fn count() -> u32 {
    std::env::var("REFCACHE_ENTRIES").map_or(10_000_000, |count| count.parse().unwrap())
}

fn key(index: u32) -> EntryKey {
    EntryKey::new(&[index], &[index, 7])
}

fn open(dir: &Path) -> Store {
    Store::open(dir, &scope()).unwrap().0
}

/// Bytes of all files of the scope, with `scope.json` and the lock.
fn disk(dir: &Path) -> u64 {
    let folder = inspect(dir, &mut |_| ()).unwrap().remove(0).folder;
    let files = std::fs::read_dir(folder).unwrap();
    files
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum()
}

fn told(what: &str, count: u32, took: Duration) {
    let rate = f64::from(count) / took.as_secs_f64() / 1e6;
    eprintln!(
        "{what}: {:.2} s, {rate:.2} million entries a second",
        took.as_secs_f64()
    );
}

/// Fills `dir` through writers that end properly, and then makes one segment of theirs.
fn fill(dir: &Path, count: u32) {
    let (mut appending, mut finishing) = (Duration::ZERO, Duration::ZERO);
    for writer in 0..WRITERS {
        let mut segment = open(dir).writer().unwrap();
        let indices: Vec<u32> = (writer..count).step_by(WRITERS as usize).collect();
        for batch in indices.chunks(1 << 16) {
            let entries: Vec<_> = batch
                .iter()
                .map(|&index| (key(index), -(index as f32)))
                .collect();
            let start = Instant::now();
            segment.append(&entries).unwrap();
            appending += start.elapsed();
        }
        let start = Instant::now();
        segment.finish().unwrap();
        finishing += start.elapsed();
    }
    told("append, durably", count, appending);
    told("finish", count, finishing);
}

fn merge(dir: &Path, count: u32) {
    let cleaning = Cleaning {
        unused_for: None,
        now: SystemTime::now(),
        dry_run: false,
    };
    let start = Instant::now();
    clean(dir, &cleaning).unwrap();
    told("merge by gc", count, start.elapsed());
}

fn store(criterion: &mut Criterion) {
    let count = count();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fill(dir.path(), count);
    for segments in [WRITERS, 1] {
        if segments == 1 {
            merge(dir.path(), count);
        }
        let bytes = disk(dir.path()) as f64 / f64::from(count);
        let name = format!("{count} entries in {segments} segments");
        eprintln!("{name}: {bytes:.2} bytes an entry, all files counted");
        let mut group = criterion.benchmark_group(name);
        group.bench_function("open", |bench| bench.iter(|| open(dir.path())));
        // Keys are made before: only lookups are timed. Keys are digests, so one is anywhere after the other.
        let keys: Vec<_> = (0..count.min(4_000_000)).map(key).collect();
        let store = open(dir.path());
        let start = Instant::now();
        for key in &keys {
            assert!(black_box(store.get(key)).unwrap().is_some());
        }
        let took = start.elapsed().as_nanos() as f64 / keys.len() as f64;
        eprintln!(
            "first {} lookups after opening, blocks checked on the way: {took:.0} ns each",
            keys.len()
        );
        let mut next = keys.iter().cycle();
        group.bench_function("hit", |bench| {
            bench.iter(|| store.get(next.next().unwrap()).unwrap());
        });
        let absent: Vec<_> = (0..1_000_000)
            .map(|index| EntryKey::new(&[index], &[]))
            .collect();
        let mut next = absent.iter().cycle();
        group.bench_function("miss", |bench| {
            bench.iter(|| store.get(next.next().unwrap()).unwrap());
        });
        group.finish();
    }
}

criterion_group!(benches, store);
criterion_main!(benches);
