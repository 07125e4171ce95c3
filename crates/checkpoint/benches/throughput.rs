//! How fast a checkpoint of random values is verified and loaded, beside how fast its bytes come out of the page cache.
//!
//! ```text
//! cargo bench -p checkpoint --bench throughput -- [MEGABYTES [WORLD [DIRECTORY]]]        default 1600, 2, the system's for temporary files
//! ```
//!
//! Every figure is the median of rounds in which all of them take turns, in bytes of files per second. `cat` is the program with
//! its output to /dev/null; `read` the same in this process. Loading goes into memory that is there, as a resuming run's is.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{
    env,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::Instant,
};

use checkpoint::{
    Checkpoint, Kind, ManifestInfo, Piece, RankFile, TensorSpec, TrainState, commit, write_rank,
};

const ROUNDS: usize = 7;

/// The tensors of a small model, as many blocks of it as `parameters` give.
fn tensors(parameters: usize) -> Vec<TensorSpec> {
    let spec = |name: String, shape: &[usize]| TensorSpec {
        name,
        shape: shape.to_vec(),
    };
    let mut tensors = vec![spec("model.embed_tokens.weight".into(), &[49152, 576])];
    let mut left = parameters.saturating_sub(49152 * 576);
    for block in 0..usize::MAX {
        for (name, shape) in [
            ("self_attn.q_proj", &[576, 576][..]),
            ("self_attn.k_proj", &[192, 576]),
            ("self_attn.v_proj", &[192, 576]),
            ("self_attn.o_proj", &[576, 576]),
            ("mlp.gate_proj", &[1536, 576]),
            ("mlp.up_proj", &[1536, 576]),
            ("mlp.down_proj", &[576, 1536]),
            ("input_layernorm", &[576]),
            ("post_attention_layernorm", &[576]),
        ] {
            let spec = spec(format!("model.layers.{block}.{name}.weight"), shape);
            let elements = spec.elements().unwrap();
            if elements > left {
                return tensors;
            }
            left -= elements;
            tensors.push(spec);
        }
    }
    tensors
}

fn save(dir: &Path, parameters: usize, world: u32) -> Checkpoint {
    let tensors = tensors(parameters);
    let state = TrainState {
        step: 1,
        epoch: 0,
        updates: 1,
        seed: 0,
        shift: None,
    };
    let info = ManifestInfo {
        model_digest: String::new(),
        tokenizer_digest: String::new(),
        data_digest: String::new(),
        run_digest: String::new(),
        tool_version: String::new(),
    };
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut ranks: Vec<RankFile> = Vec::new();
    for rank in 0..world {
        let mut owned = Vec::new();
        for kind in Kind::ALL {
            for spec in &tensors {
                let cut = |rank: u32| spec.elements().unwrap() * rank as usize / world as usize;
                let values = (cut(rank)..cut(rank + 1)).map(|_| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    (random >> 40) as f32 / (1 << 24) as f32 - 0.5
                });
                owned.push((kind, spec, cut(rank), values.collect::<Vec<f32>>()));
            }
        }
        let pieces: Vec<_> = owned
            .iter()
            .map(|(kind, spec, start, values)| Piece {
                tensor: &spec.name,
                kind: *kind,
                start: *start,
                values,
            })
            .collect();
        ranks.push(write_rank(dir, 1, rank, world, state, &tensors, pieces).unwrap());
    }
    Checkpoint::open(&commit(dir, &ranks, &info).unwrap().path).unwrap()
}

/// Reads files as `cat` does, the first by the first thread and so on.
fn read(paths: &[PathBuf], threads: usize) {
    thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut buffer = vec![0; 128 << 10];
                for path in paths.iter().skip(thread).step_by(threads) {
                    let mut file = File::open(path).unwrap();
                    while file.read(&mut buffer).unwrap() > 0 {}
                }
            });
        }
    });
}

fn cat(paths: &[PathBuf]) {
    let mut cat = Command::new("cat");
    let status = cat.args(paths).stdout(Stdio::null()).status().unwrap();
    assert!(status.success());
}

/// Reads every tensor into its own memory; threads take the next one that is left.
fn load(checkpoint: &Checkpoint, memory: &mut [Vec<f32>], threads: usize) {
    let tensors = &checkpoint.manifest().tensors;
    let wanted = Kind::ALL
        .into_iter()
        .flat_map(|kind| tensors.iter().map(move |it| (kind, it)));
    let left = Mutex::new(wanted.zip(memory));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap().next();
                    let Some(((kind, spec), out)) = next else {
                        break;
                    };
                    checkpoint.read(&spec.name, kind, 0, out).unwrap();
                }
            });
        }
    });
}

fn main() {
    let given: Vec<String> = env::args()
        .skip(1)
        .filter(|it| !it.starts_with("--"))
        .collect();
    let number = |index: usize, default| given.get(index).map_or(default, |it| it.parse().unwrap());
    let (megabytes, world): (usize, usize) = (number(0, 1600), number(1, 2));
    let folder = given.get(2).map_or_else(env::temp_dir, PathBuf::from);
    let directory = tempfile::tempdir_in(folder).unwrap();
    let start = Instant::now();
    let checkpoint = save(directory.path(), megabytes * 1_000_000 / 12, world as u32);
    let bytes = checkpoint.bytes();
    let seconds = start.elapsed().as_secs_f64();
    let threads = thread::available_parallelism().unwrap().get();
    println!(
        "{:.2} GB, {world} ranks, {threads} cores; made, written and committed in {seconds:.1} s",
        bytes as f64 / 1e9
    );
    let files = &checkpoint.manifest().files;
    let paths: Vec<PathBuf> = files
        .iter()
        .map(|it| checkpoint.path().join(&it.name))
        .collect();
    let tensors = &checkpoint.manifest().tensors;
    let elements = Kind::ALL
        .iter()
        .flat_map(|_| tensors.iter().map(|it| it.elements().unwrap()));
    let mut memory: Vec<Vec<f32>> = elements.map(|len| vec![1.0; len]).collect();

    let mut figures: Vec<(String, Vec<f64>)> = Vec::new();
    for round in 0..=ROUNDS {
        let mut figure = 0;
        let mut measure = |what: String, work: &mut dyn FnMut()| {
            let start = Instant::now();
            work();
            let rate = bytes as f64 / 1e9 / start.elapsed().as_secs_f64();
            // The first round warms the page cache and the memory.
            match round {
                0 => figures.push((what, Vec::new())),
                _ => figures[figure].1.push(rate),
            }
            figure += 1;
        };
        measure("cat > /dev/null".into(), &mut || cat(&paths));
        measure("read, 1 thread".into(), &mut || read(&paths, 1));
        measure(format!("read, {threads} threads"), &mut || {
            read(&paths, threads);
        });
        measure("verify".into(), &mut || drop(checkpoint.verify().unwrap()));
        measure("load, 1 thread".into(), &mut || {
            load(&checkpoint, &mut memory, 1);
        });
        measure(format!("load, {threads} threads"), &mut || {
            load(&checkpoint, &mut memory, threads);
        });
    }
    let median = |rates: &[f64]| {
        let mut rates = rates.to_vec();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    let cat = median(&figures[0].1);
    for (what, rates) in figures {
        let rate = median(&rates);
        println!(
            "{what:20} {rate:6.2} GB/s  {:4.0} % of cat",
            100.0 * rate / cat
        );
    }
}
