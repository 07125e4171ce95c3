//! The memory of a forward and a backward as `PackBytes` says it, against the allocations that are really made.

#![allow(clippy::unwrap_used, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout as Bytes, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use model::{
    Device, Gradients, Model, ModelConfig, Pack, PackBytes, PackShape, PairTokens, Precision,
    Saving,
};

/// The system allocator with a count of live bytes and their maximum.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to `System` unchanged; the counters touch no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Bytes) -> *mut u8 {
        PEAK.fetch_max(
            LIVE.fetch_add(layout.size(), Relaxed) + layout.size(),
            Relaxed,
        );
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Bytes) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes that are live at once during `work`, beside those that are live before it.
fn peak<R>(work: impl FnOnce() -> R) -> (usize, R) {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    (PEAK.load(Relaxed) - before, result)
}

/// A decoder of this shape, with grouped keys.
fn config(hidden: usize, intermediate: usize, blocks: usize, vocabulary: usize) -> ModelConfig {
    let text = format!(
        r#"{{"model_type": "llama", "hidden_size": {hidden}, "intermediate_size": {intermediate},
             "num_hidden_layers": {blocks}, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": {vocabulary},
             "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu",
             "max_position_embeddings": 2048}}"#
    );
    ModelConfig::parse(&text, Path::new("config.json")).unwrap()
}

/// A decoder of a family with what the common one lacks: kinds of residual, norms of heads, fused products.
fn family(kind: &str) -> ModelConfig {
    let text = format!(
        r#"{{"model_type": "{kind}", "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 700, "tie_word_embeddings": true,
             "head_dim": 24, "sliding_window": 64, "max_position_embeddings": 2048}}"#
    );
    ModelConfig::parse(&text, Path::new("config.json")).unwrap()
}

/// Pairs of so many tokens of prompt, chosen and rejected.
fn check(name: &str, config: &ModelConfig, lengths: &[[usize; 3]], threads: usize) {
    for precision in [Precision::F32, Precision::Bf16] {
        check_in(precision, name, config, lengths, threads);
    }
}

fn check_in(
    precision: Precision,
    name: &str,
    config: &ModelConfig,
    lengths: &[[usize; 3]],
    threads: usize,
) {
    let ids: Vec<u32> = (0..4096).map(|id| id % config.vocabulary as u32).collect();
    let pack = Pack::new(
        lengths
            .iter()
            .map(|&[prompt, chosen, rejected]| PairTokens {
                prompt: &ids[..prompt],
                chosen: &ids[..chosen],
                rejected: &ids[..rejected],
            }),
    );
    let shape = lengths.iter().fold(
        PackShape::default(),
        |shape, &[prompt, chosen, rejected]| shape.and(prompt, [chosen, rejected]),
    );
    let mut model = Model::random(config.clone(), 1, &Device::flex());
    model.set_precision(precision);
    let mut gradients = model.zero_gradients();
    let dlogps = vec![[0.5, -0.5]; lengths.len()];
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    let close = |what: &str, said: PackBytes, found: usize| {
        let said = said.total() as f64;
        let ratio = said / found as f64;
        println!(
            "{name}, {what}, {precision:?}, {threads} threads: {said} said, {found} found, {ratio:.3}"
        );
        assert!(
            (0.97..1.06).contains(&ratio) || precision == Precision::Bf16,
            "{name}, {what}: {said} said, {found} found"
        );
    };
    pool.install(|| {
        let pass = |model: &Model, gradients: &mut Gradients| {
            let (_, saved) = model.forward_train(&pack.clone());
            model.backward(saved, &dlogps, gradients);
        };
        // What threads allocate once and keep is there after some passes.
        for _ in 0..2 {
            pass(&model, &mut gradients);
        }
        let (found, _) = peak(|| model.forward(&pack.clone()));
        close(
            "scoring",
            PackBytes::scoring(config, &shape, precision, threads),
            found,
        );
        for saving in [Saving::Operands, Saving::BlockInputs] {
            model.set_saving(saving);
            let (found, ()) = peak(|| pass(&model, &mut gradients));
            let said = PackBytes::training(config, &shape, saving, precision, threads);
            close(&format!("{saving:?}"), said, found);
        }
    });
}

/// Weights that are never trained, in bf16: operands of f32's size on the CPU and what is read in f32, and one bucket on the way.
fn check_frozen() {
    let config = config(128, 256, 6, 3000);
    let layout = model::Layout::new(&config);
    let dir = tempfile::tempdir().unwrap();
    let json = r#"{"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 3000, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "max_position_embeddings": 2048}"#;
    std::fs::write(dir.path().join("config.json"), json).unwrap();
    let mut file = std::fs::File::create(dir.path().join("model.safetensors")).unwrap();
    model::write_safetensors(&model::random_weights(&config, 1), &layout, &mut file).unwrap();
    let load = || Model::load_frozen(dir.path(), &Device::flex(), Precision::Bf16).unwrap();
    drop(load());
    let before = LIVE.load(Relaxed);
    let (found, model) = peak(load);
    let kept = LIVE.load(Relaxed) - before;
    let narrow = layout.narrow_elements();
    let said = 4 * (layout.elements() + narrow);
    let small = 64 << 10;
    assert!((said..said + small).contains(&kept), "{kept} of {said}");
    // A piece of the file, as it is read.
    let bucket = 6 * layout.bucket_lens().into_iter().max().unwrap();
    let piece = 4 * 3000 * 128;
    let most = said + bucket + piece + small;
    println!("frozen: {kept} kept, {found} at most, {most} said");
    assert!(found <= most, "{found} of {most}");
    drop(model);
}

#[test]
fn a_pack_holds_as_many_bytes_as_its_shape_says() {
    // In one test, as all of them count the bytes of this process.
    check_frozen();
    let wide = config(64, 256, 6, 3000);
    let thin = config(128, 96, 2, 500);
    let deep = config(64, 172, 12, 512);
    let short: Vec<[usize; 3]> = (0..24)
        .map(|pair| [20 + pair % 5, 30, 25 + pair % 7])
        .collect();
    for threads in [1, 2] {
        check("wide, short pairs", &wide, &short, threads);
        check("thin, short pairs", &thin, &short, threads);
        check("deep, short pairs", &deep, &short, threads);
        for kind in [
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3_text",
            "phi3",
            "gpt_neox",
        ] {
            check(
                &format!("{kind}, short pairs"),
                &family(kind),
                &short,
                threads,
            );
            let long = [[300, 500, 400]];
            check(
                &format!("{kind}, one long pair"),
                &family(kind),
                &long,
                threads,
            );
        }
        check("wide, one long pair", &wide, &[[300, 500, 400]], threads);
        check("thin, one long pair", &thin, &[[300, 500, 400]], threads);
        check(
            "deep, mostly prompt",
            &deep,
            &[[900, 20, 30], [700, 10, 40]],
            threads,
        );
        check(
            "wide, completions alone",
            &wide,
            &[[100, 600, 0], [50, 400, 0]],
            threads,
        );
    }
}
