//! Saves and loads a model's state on demand and tells how long it took; `tests/bench_checkpoint.py` asks, and times other
//! programs in turn.
//!
//! ```text
//! timed WORLD '{"NAME": [SIZE, ..], ..}'  the model's tensors and their shapes; values are random
//! save DIR      -> STALL WRITTEN COMMITTED
//!                                       seconds until the state was copied and training could go on, until all files were
//!                                       durable, and until the checkpoint was read back and visible
//! load STEP     -> SECONDS              into memory that is there, every byte checked
//! ```
//! WORLD threads stand for as many workers: each copies its share of every tensor, a weight and two moments, into memory of
//! the save before, and writes it in a thread of its own. That is what the trainer's snapshot does between two steps.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    env,
    io::{self, BufRead, Write},
    ops::Range,
    path::Path,
    sync::Mutex,
    thread,
    time::Instant,
};

use checkpoint::{
    Checkpoint, Kind, ManifestInfo, Piece, RankFile, TensorSpec, TrainState, commit, write_rank,
};

/// The tensors of a JSON object of names and shapes.
fn tensors(shapes: &str) -> Vec<TensorSpec> {
    let shapes: BTreeMap<String, Vec<usize>> = serde_json::from_str(shapes).unwrap();
    let specs = shapes
        .into_iter()
        .map(|(name, shape)| TensorSpec { name, shape });
    specs.collect()
}

/// A worker: its elements of every tensor, and the memory that a save copies them into.
struct Worker {
    rank: u32,
    ranges: Vec<Range<usize>>,
    /// Of each kind, all ranges one behind the other.
    state: [Vec<f32>; 3],
    copy: [Vec<f32>; 3],
}

impl Worker {
    fn new(rank: u32, world: u32, tensors: &[TensorSpec]) -> Self {
        let cut = |len: usize, rank: u32| len * rank as usize / world as usize;
        let ranges: Vec<Range<usize>> = tensors
            .iter()
            .map(|spec| spec.elements().unwrap())
            .map(|len| cut(len, rank)..cut(len, rank + 1))
            .collect();
        let len = ranges.iter().map(ExactSizeIterator::len).sum();
        let mut random = 0x9e37_79b9_7f4a_7c15_u64 + u64::from(rank);
        let state = [(); 3].map(|()| {
            let values = (0..len).map(|_| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                (random >> 40) as f32 / (1 << 24) as f32 - 0.5
            });
            values.collect()
        });
        Self {
            rank,
            ranges,
            state,
            copy: Default::default(),
        }
    }

    /// Copies all of the state.
    fn snapshot(&mut self) {
        for (copy, state) in self.copy.iter_mut().zip(&self.state) {
            copy.clear();
            copy.extend_from_slice(state);
        }
    }

    fn write(&self, dir: &Path, world: u32, step: u64, tensors: &[TensorSpec]) -> RankFile {
        let mut pieces = Vec::new();
        for (kind, values) in Kind::ALL.into_iter().zip(&self.copy) {
            let mut rest = &values[..];
            for (spec, range) in tensors.iter().zip(&self.ranges) {
                let (values, others) = rest.split_at(range.len());
                rest = others;
                pieces.push(Piece {
                    tensor: &spec.name,
                    kind,
                    start: range.start,
                    values,
                });
            }
        }
        let state = TrainState {
            step,
            epoch: 0,
            updates: step,
            seed: 0,
            shift: None,
        };
        write_rank(dir, 1, self.rank, world, state, tensors, &pieces).unwrap()
    }
}

fn save(dir: &Path, ranks: &mut [Worker], step: u64, tensors: &[TensorSpec]) -> [f64; 3] {
    let world = ranks.len() as u32;
    let start = Instant::now();
    thread::scope(|scope| {
        for rank in ranks.iter_mut() {
            scope.spawn(|| rank.snapshot());
        }
    });
    let stall = start.elapsed().as_secs_f64();
    let files: Vec<RankFile> = thread::scope(|scope| {
        let writing = ranks
            .iter()
            .map(|rank| scope.spawn(move || rank.write(dir, world, step, tensors)));
        let writing: Vec<_> = writing.collect();
        let files = writing.into_iter().map(|it| it.join().unwrap());
        files.collect()
    });
    let written = start.elapsed().as_secs_f64();
    let info = ManifestInfo {
        model_digest: String::new(),
        tokenizer_digest: String::new(),
        data_digest: String::new(),
        run_digest: String::new(),
        tool_version: String::new(),
    };
    commit(dir, &files, &info).unwrap();
    [stall, written, start.elapsed().as_secs_f64()]
}

/// Reads a checkpoint into the workers' state, each its own, on all cores.
fn load(folder: &Path, ranks: &mut [Worker], tensors: &[TensorSpec]) -> f64 {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut wanted = Vec::new();
    for rank in ranks {
        for (kind, values) in Kind::ALL.into_iter().zip(&mut rank.state) {
            let mut rest = &mut values[..];
            for (spec, range) in tensors.iter().zip(&rank.ranges) {
                let (values, others) = rest.split_at_mut(range.len());
                rest = others;
                wanted.push((&spec.name, kind, range.start, values));
            }
        }
    }
    let left = Mutex::new(wanted.into_iter());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap().next();
                    let Some((tensor, kind, start, out)) = next else {
                        break;
                    };
                    checkpoint.read(tensor, kind, start, out).unwrap();
                }
            });
        }
    });
    start.elapsed().as_secs_f64()
}

fn main() {
    let given: Vec<String> = env::args().skip(1).collect();
    let world: u32 = given[0].parse().unwrap();
    let tensors = tensors(&given[1]);
    let mut ranks: Vec<Worker> = (0..world)
        .map(|rank| Worker::new(rank, world, &tensors))
        .collect();
    println!("ready");
    io::stdout().flush().unwrap();
    for (step, line) in (1..).zip(io::stdin().lock().lines()) {
        let line = line.unwrap();
        let (what, dir) = line.split_once(' ').unwrap();
        let seconds = match what {
            "save" => save(Path::new(dir), &mut ranks, step, &tensors).to_vec(),
            "load" => vec![load(Path::new(dir), &mut ranks, &tensors)],
            _ => panic!("`{what}` is neither save nor load"),
        };
        let told: Vec<String> = seconds.iter().map(f64::to_string).collect();
        println!("{}", told.join(" "));
        io::stdout().flush().unwrap();
    }
}
