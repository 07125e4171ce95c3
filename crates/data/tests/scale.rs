//! What a million pairs cost. In a program of its own, since it reads this process's peak memory:
//! `cargo test --release -p data --test scale -- --ignored --nocapture`.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use data::{DataConfig, Needs, Sides, Tokenizer, load_cached};
use serde_json::json;

const PAIRS: usize = 1_000_000;
const PEAK_MIB_MAX: u64 = 2048;

/// Distinct rows of about a hundred tokens.
fn write_pairs(file: &Path) {
    let mut file = BufWriter::new(fs::File::create(file).unwrap());
    for index in 0..PAIRS {
        let row = json!({
            "prompt": format!("Story {index}. Once upon a time there was a little girl who liked to play in the park with a big red ball."),
            "chosen": format!(" She saw the cat number {index} and gave it some milk, and they were happy all day."),
            "rejected": format!(" The dog ran away {index} times. It was sad and she went home to her mom."),
        });
        writeln!(file, "{row}").unwrap();
    }
}

/// The most memory that this process held since it was last asked.
fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    // Starts the count anew (proc(5)).
    fs::write("/proc/self/clear_refs", "5").unwrap();
    kib.unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
#[ignore = "takes minutes; run by name"]
fn a_million_pairs_fit_into_2_gib_and_are_tokenized_once() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let model = shared.join("models/stories260k");
    if !model.is_dir() {
        println!("skipped: ../shared is absent");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pairs.jsonl");
    write_pairs(&file);
    let tokenizer = Tokenizer::load(&model, None).unwrap();
    let config: DataConfig = serde_json::from_value(json!({ "train": [file] })).unwrap();
    let needs = Needs {
        sides: Sides::Both,
        scores: false,
    };
    let cache = folder.path().join("cache");
    let mut digests = Vec::new();
    for from_cache in [false, true] {
        // The second peak has what the allocator keeps of the first; a process that only reads the cache needs half of it.
        peak_mib();
        let start = Instant::now();
        let mut quiet = |_, _| ();
        let files = &config.train;
        let loaded = load_cached(files, &config, &tokenizer, needs, Some(&cache), &mut quiet);
        let (loaded, seconds, peak) = (loaded.unwrap(), start.elapsed().as_secs_f64(), peak_mib());
        let pairs = &loaded.dataset.pairs;
        println!(
            "{} pairs, {} tokens in packs, from the cache {from_cache}: {seconds:.1} s, peak {peak} MiB",
            pairs.len(),
            pairs.iter().map(data::Pair::packed_tokens).sum::<usize>(),
        );
        assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
        assert_eq!((pairs.len(), loaded.from_cache), (PAIRS, from_cache));
        assert!(peak < PEAK_MIB_MAX, "{peak} MiB");
        digests.push(loaded.dataset.digest);
    }
    assert_eq!(digests[0], digests[1]);
}
