//! Mutation fuzzing of parsers, in seconds and on stable Rust: whole files are edited, mostly sealed again with checksums that
//! hold, and read. What the tests of several crates share: edits, a runner with a budget, an allocator that counts.
//!
//! ```text
//! FUZZ_SEED=7       another seed than the one that CI takes; a failure prints its own
//! FUZZ_SECONDS=600  go on for so long, a batch of cases with the next seed after the other
//! ```
#![allow(dead_code, missing_docs, clippy::unwrap_used, unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    env,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use proptest::{
    collection::vec,
    prelude::*,
    sample::Index,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner},
};
use storage::log::{FRAME_BYTES, HEADER_BYTES};

/// The system allocator with counts of what a process does.
pub struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to `System` unchanged; the counters touch no memory of the caller. `realloc` and `alloc_zeroed` are
// the trait's own, which call these two.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Most bytes that were live at once during `work`, beside those that were live before it. Of the whole process: a program
/// that asks has one test.
pub fn peak<R>(work: impl FnOnce() -> R) -> (usize, R) {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    (PEAK.load(Relaxed).saturating_sub(before), result)
}

/// Tries `test` on `cases` values of `strategy`, and again with other seeds while `FUZZ_SECONDS` last.
///
/// # Panics
/// With the smallest value that was found to fail, and the seed.
pub fn fuzz<S: Strategy>(
    name: &str,
    cases: u32,
    strategy: &S,
    test: impl Fn(S::Value) -> Result<(), TestCaseError>,
) {
    let number = |name: &str| env::var(name).ok().map(|it| it.parse::<u64>().unwrap());
    let budget = Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(0));
    let mut seed = number("FUZZ_SEED").unwrap_or(1);
    let (start, mut tried) = (Instant::now(), 0);
    loop {
        let config = Config {
            cases,
            failure_persistence: None,
            ..Config::default()
        };
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        if let Err(failure) = TestRunner::new_with_rng(config, rng).run(strategy, &test) {
            panic!("{name}: {failure}\nFUZZ_SEED={seed} finds it again");
        }
        tried += cases;
        if start.elapsed() >= budget {
            break;
        }
        seed += 1;
    }
    eprintln!("{name}: {tried} cases in {:.1?}", start.elapsed());
}

/// A change to a file's bytes.
#[derive(Clone, Debug)]
pub enum Edit {
    /// Bytes take the place of as many others.
    Set(Index, Vec<u8>),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    Cut(Index),
    /// A little-endian number of 4 or 8 bytes, such as a length or a count, says something else.
    Number(Index, u64, bool),
    /// The next number that is written in digits says something else.
    Decimal(Index, u64),
    /// A part is repeated elsewhere.
    Copy(Index, Index, usize),
    Zeros(usize),
}

/// Numbers that lengths, counts and offsets should not be, and any others.
fn numbers() -> impl Strategy<Value = u64> {
    let near = |number: u64| (number.saturating_sub(2)..=number.saturating_add(2)).boxed();
    let corners = [
        0,
        1 << 16,
        1 << 24,
        1 << 31,
        1 << 32,
        1 << 40,
        1 << 62,
        1 << 63,
        u64::MAX,
    ];
    let mut all: Vec<BoxedStrategy<u64>> = corners.into_iter().map(near).collect();
    all.extend([(0..300u64).boxed(), any::<u64>().boxed()]);
    prop::strategy::Union::new(all)
}

/// Some edits, applied one after the other.
pub fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let place = any::<Index>;
    let edit = prop_oneof![
        (place(), vec(any::<u8>(), 1..4)).prop_map(|(at, bytes)| Edit::Set(at, bytes)),
        (place(), vec(any::<u8>(), 1..80)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (place(), 1..80usize).prop_map(|(at, count)| Edit::Remove(at, count)),
        place().prop_map(Edit::Cut),
        (place(), numbers(), any::<bool>()).prop_map(|(at, it, wide)| Edit::Number(at, it, wide)),
        (place(), numbers()).prop_map(|(at, number)| Edit::Decimal(at, number)),
        (place(), place(), 1..200usize).prop_map(|(from, to, count)| Edit::Copy(from, to, count)),
        (1..200usize).prop_map(Edit::Zeros),
    ];
    vec(edit, 1..5)
}

/// `bytes` after the edits.
pub fn edited(bytes: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for edit in edits {
        let len = bytes.len();
        let clamp = |at: &Index, count: usize| {
            let start = at.index(len + 1);
            start..(start + count).min(len)
        };
        match edit {
            Edit::Set(at, new) => drop(bytes.splice(clamp(at, new.len()), new.iter().copied())),
            Edit::Insert(at, new) => drop(bytes.splice(clamp(at, 0), new.iter().copied())),
            Edit::Remove(at, count) => drop(bytes.drain(clamp(at, *count))),
            Edit::Cut(at) => bytes.truncate(at.index(len + 1)),
            Edit::Number(at, number, wide) => {
                let width = if *wide { 8 } else { 4 };
                // Fields lie at multiples of four bytes.
                let start = at.index(len + 1) / 4 * 4;
                let number = number.to_le_bytes();
                drop(bytes.splice(
                    start..(start + width).min(len),
                    number[..width].iter().copied(),
                ));
            }
            Edit::Decimal(at, number) => {
                let start = at.index(len + 1);
                let digits = bytes[start..].iter().position(u8::is_ascii_digit);
                if let Some(first) = digits.map(|skipped| start + skipped) {
                    let rest = bytes[first..].iter();
                    let count = rest.take_while(|it| it.is_ascii_digit()).count();
                    let text = number.to_string();
                    drop(bytes.splice(first..first + count, text.bytes()));
                }
            }
            Edit::Copy(from, to, count) => {
                let part = bytes[clamp(from, *count)].to_vec();
                drop(bytes.splice(clamp(to, 0), part));
            }
            Edit::Zeros(count) => bytes.resize(len + count, 0),
        }
    }
    bytes
}

/// A log's bytes with checksums and chains that hold, as far as the lengths in them lead.
pub fn sealed_log(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.len() < HEADER_BYTES {
        return bytes;
    }
    let checksum = crc32c::crc32c(&bytes[..12]).to_le_bytes();
    bytes[12..HEADER_BYTES].copy_from_slice(&checksum);
    let mut chain = *blake3::hash(&bytes[..HEADER_BYTES]).as_bytes();
    let mut offset = HEADER_BYTES;
    while let Some(head) = bytes.get(offset..offset + FRAME_BYTES) {
        let length = u32::from_le_bytes(head[..4].try_into().unwrap()) as usize;
        let start = offset + FRAME_BYTES;
        if let Some(payload) = bytes.get(start..start + length) {
            chain = *blake3::Hasher::new()
                .update(&chain)
                .update(payload)
                .finalize()
                .as_bytes();
        }
        bytes[offset + 8..start].copy_from_slice(&chain);
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes[offset..offset + 4]), &chain);
        bytes[offset + 4..offset + 8].copy_from_slice(&checksum.to_le_bytes());
        offset = start + length;
    }
    bytes
}
