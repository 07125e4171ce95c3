//! Saves and loads a model's state on demand and tells how long it took; `tests/bench_checkpoint.py` asks, and times other
//! programs in turn.
//!
//! ```text
//! timed WORLD '{"NAME": [SIZE, ..], ..}'  the model's tensors and their shapes; values are random
//! save DIR STEP  -> STALL WRITTEN COMMITTED
//!                                       seconds that training waited if it updates the state STEP seconds after the save
//!                                       began, and seconds until all files were durable, and until the checkpoint was read
//!                                       back and visible
//! load FOLDER    -> SECONDS             into memory that is there, every byte checked
//! ```
//! WORLD threads stand for as many workers: each shares its part of every tensor, a weight and two moments, with a thread of its
//! own that writes it, and copies what is not written yet when the update comes. That is what the trainer's snapshot does.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    env,
    io::{self, BufRead, Write},
    ops::Range,
    path::Path,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use checkpoint::{
    Checkpoint, Kind, ManifestInfo, Piece, RankFile, Spares, TensorSpec, TrainState, commit,
    write_rank,
};

/// The tensors of a JSON object of names and shapes.
fn tensors(shapes: &str) -> Vec<TensorSpec> {
    let shapes: BTreeMap<String, Vec<usize>> = serde_json::from_str(shapes).unwrap();
    let specs = shapes
        .into_iter()
        .map(|(name, shape)| TensorSpec { name, shape });
    specs.collect()
}

/// A worker: its elements of every tensor.
struct Worker {
    rank: u32,
    ranges: Vec<Range<usize>>,
    /// Of each kind, by bucket.
    state: [Vec<Arc<Vec<f32>>>; 3],
    /// The tensors of each bucket.
    buckets: Vec<Range<usize>>,
    spares: Spares,
}

/// Values of a bucket, held until they are written.
#[derive(Clone)]
struct Part {
    bucket: Arc<Vec<f32>>,
    range: Range<usize>,
}

impl AsRef<[f32]> for Part {
    fn as_ref(&self) -> &[f32] {
        &self.bucket[self.range.clone()]
    }
}

impl Worker {
    fn new(rank: u32, world: u32, tensors: &[TensorSpec]) -> Self {
        let cut = |len: usize, rank: u32| len * rank as usize / world as usize;
        let ranges: Vec<Range<usize>> = tensors
            .iter()
            .map(|spec| spec.elements().unwrap())
            .map(|len| cut(len, rank)..cut(len, rank + 1))
            .collect();
        // A block has nine tensors.
        let starts: Vec<usize> = (0..tensors.len()).step_by(9).collect();
        let ends = starts.iter().skip(1).copied().chain([tensors.len()]);
        let buckets: Vec<Range<usize>> = starts
            .iter()
            .copied()
            .zip(ends)
            .map(|(a, b)| a..b)
            .collect();
        let mut random = 0x9e37_79b9_7f4a_7c15_u64 + u64::from(rank);
        let state = [(); 3].map(|()| {
            let buckets = buckets.iter().map(|tensors| {
                let len = ranges[tensors.clone()]
                    .iter()
                    .map(ExactSizeIterator::len)
                    .sum();
                let values = (0..len).map(|_| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    (random >> 40) as f32 / (1 << 24) as f32 - 0.5
                });
                Arc::new(values.collect())
            });
            buckets.collect()
        });
        Self {
            rank,
            ranges,
            state,
            buckets,
            spares: Spares::default(),
        }
    }

    /// The pieces of the file, weights first.
    fn pieces<'a>(&self, tensors: &'a [TensorSpec]) -> Vec<Piece<'a, Part>> {
        let mut pieces = Vec::new();
        for (kind, state) in Kind::ALL.into_iter().zip(&self.state) {
            for (bucket, within) in state.iter().zip(&self.buckets) {
                let mut end = 0;
                for tensor in within.clone() {
                    let start = end;
                    end += self.ranges[tensor].len();
                    pieces.push(Piece {
                        tensor: &tensors[tensor].name,
                        kind,
                        start: self.ranges[tensor].start,
                        values: Part {
                            bucket: Arc::clone(bucket),
                            range: start..end,
                        },
                    });
                }
            }
        }
        pieces
    }

    /// Makes the state ready for an update, on so many threads; what is written last comes first.
    fn unshare(&mut self, threads: usize) {
        let left = Mutex::new(self.state.iter_mut().flatten().rev());
        let spares = &self.spares;
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let next = left.lock().unwrap().next();
                        let Some(bucket) = next else {
                            break;
                        };
                        spares.unshare(bucket);
                    }
                });
            }
        });
    }
}

fn save(
    dir: &Path,
    ranks: &mut [Worker],
    step: u64,
    until_update: Duration,
    tensors: &[TensorSpec],
) -> [f64; 3] {
    let world = ranks.len() as u32;
    let cores = thread::available_parallelism().unwrap().get();
    let threads = (cores / ranks.len()).max(1);
    let state = TrainState {
        step,
        epoch: 0,
        updates: step,
        seed: 0,
        shift: None,
    };
    let start = Instant::now();
    let (written, stall) = thread::scope(|scope| {
        let writing: Vec<_> = ranks
            .iter()
            .map(|it| {
                let (rank, pieces) = (it.rank, it.pieces(tensors));
                scope.spawn(move || {
                    let file = write_rank(dir, 1, rank, world, state, tensors, pieces).unwrap();
                    (file, start.elapsed())
                })
            })
            .collect();
        let begun = start.elapsed();
        thread::sleep(until_update);
        let update = Instant::now();
        thread::scope(|scope| {
            for rank in ranks.iter_mut() {
                scope.spawn(|| rank.unshare(threads));
            }
        });
        let stall = (begun + update.elapsed()).as_secs_f64();
        let written = writing.into_iter().map(|it| it.join().unwrap());
        (written.collect::<Vec<_>>(), stall)
    });
    let (files, ends): (Vec<RankFile>, Vec<Duration>) = written.into_iter().unzip();
    let written = ends.into_iter().max().unwrap_or_default().as_secs_f64();
    let start = Instant::now();
    let info = ManifestInfo {
        model_digest: String::new(),
        tokenizer_digest: String::new(),
        data_digest: String::new(),
        run_digest: String::new(),
        tool_version: String::new(),
    };
    commit(dir, &files, &info).unwrap();
    [stall, written, written + start.elapsed().as_secs_f64()]
}

/// Reads a checkpoint into the workers' state, each its own, on all cores.
fn load(folder: &Path, ranks: &mut [Worker], tensors: &[TensorSpec]) -> f64 {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut wanted = Vec::new();
    for rank in ranks {
        for (kind, state) in Kind::ALL.into_iter().zip(&mut rank.state) {
            for (bucket, within) in state.iter_mut().zip(&rank.buckets) {
                let mut rest = &mut Arc::get_mut(bucket).unwrap()[..];
                for tensor in within.clone() {
                    let range = &rank.ranges[tensor];
                    let (values, others) = rest.split_at_mut(range.len());
                    rest = others;
                    wanted.push((&tensors[tensor].name, kind, range.start, values));
                }
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
        let words: Vec<&str> = line.split(' ').collect();
        let seconds = match words[..] {
            ["save", dir, seconds] => {
                let until_update = Duration::from_secs_f64(seconds.parse().unwrap());
                save(Path::new(dir), &mut ranks, step, until_update, &tensors).to_vec()
            }
            ["load", folder] => vec![load(Path::new(folder), &mut ranks, &tensors)],
            _ => panic!("`{line}` is neither a save nor a load"),
        };
        let told: Vec<String> = seconds.iter().map(f64::to_string).collect();
        println!("{}", told.join(" "));
        io::stdout().flush().unwrap();
    }
}
