//! Speed of one SmolLM2-135M block, forward and backward, over 300 tokens on one thread: `cargo run --release -p kernels
//! --example gate`. Prints GFLOP/s of the whole block and of its parts; a tool for looking, not a test.

use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use kernels::{
    Activation, AttentionPlan, AttentionSegment, Flat, Gradients, Precision, RotaryTable, Slot,
    add, gated, gated_backward, linear, linear_backward, linear_backward_weight, logprob_head,
    logprob_head_backward, rms_norm, rms_norm_backward, rms_norm_backward_weight, rotary,
    rotary_backward, segment_attention, segment_attention_backward,
};

const TOKENS: usize = 300;
const HIDDEN: usize = 576;
const INNER: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 49152;
const NARROW: usize = KV_HEADS * HEAD_DIM;

fn main() {
    let threads = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("start a pool");
    println!("{TOKENS} tokens, {threads} thread(s)");
    pool.install(|| {
        products();
        block();
        head();
    });
}

/// Best of several rounds, in seconds.
fn best(rounds: usize, mut work: impl FnMut()) -> f64 {
    work();
    let time = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..rounds)
        .map(|_| time(&mut work))
        .fold(f64::INFINITY, f64::min)
}

fn report(what: &str, seconds: f64, operations: f64) {
    println!(
        "{what:<28} {:9.3} ms {:8.1} GFLOP/s",
        seconds * 1e3,
        operations / seconds / 1e9
    );
}

fn matrix(rows: usize, columns: usize) -> Tensor<2> {
    let values = (0..rows * columns)
        .map(|i| ((i * 7919) % 1009) as f32 / 10090.0 - 0.05)
        .collect::<Vec<f32>>();
    Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::flex())
}

fn products() {
    for (depth, out) in [
        (HIDDEN, HIDDEN),
        (HIDDEN, NARROW),
        (HIDDEN, INNER),
        (INNER, HIDDEN),
    ] {
        let (x, weight, dy) = (
            matrix(TOKENS, depth),
            matrix(out, depth),
            matrix(TOKENS, out),
        );
        let slot = Slot {
            bucket: 0,
            offset: 0,
            len: out * depth,
        };
        let mut gradients = Gradients::zeros(&[slot.len], &Device::flex());
        let operations = 2.0 * (TOKENS * depth * out) as f64;
        let forward = best(9, || drop(linear(&x, &weight)));
        report(&format!("linear {depth} -> {out}"), forward, operations);
        let backward = best(9, || {
            linear_backward_weight(&dy, &x, &mut gradients, &slot);
            drop(linear_backward(&dy, &weight));
        });
        report("  backward", backward, 2.0 * operations);
    }
}

/// The weights of a block: q, k, v, o, gate, up, down, two norms.
struct Block {
    weights: Flat,
    slots: Vec<(Slot, [usize; 2])>,
    norms: [Slot; 2],
}

impl Block {
    fn new() -> (Self, Gradients) {
        let shapes = [
            [HIDDEN, HIDDEN],
            [NARROW, HIDDEN],
            [NARROW, HIDDEN],
            [HIDDEN, HIDDEN],
            [INNER, HIDDEN],
            [INNER, HIDDEN],
        ];
        let (mut slots, mut offset) = (Vec::new(), 0);
        for shape in shapes.into_iter().chain([[HIDDEN, INNER]]) {
            let len = shape[0] * shape[1];
            slots.push((
                Slot {
                    bucket: 0,
                    offset,
                    len,
                },
                shape,
            ));
            offset += len;
        }
        let norms = [0, HIDDEN].map(|more| Slot {
            bucket: 0,
            offset: offset + more,
            len: HIDDEN,
        });
        let len = offset + 2 * HIDDEN;
        let values = (0..len)
            .map(|i| ((i * 7919) % 1009) as f32 / 10090.0 - 0.05)
            .collect();
        let weights = Flat::from_host(vec![values], Precision::F32, &Device::flex());
        (
            Self {
                weights,
                slots,
                norms,
            },
            Gradients::zeros(&[len], &Device::flex()),
        )
    }

    fn weight(&self, index: usize) -> Tensor<2> {
        let (slot, shape) = &self.slots[index];
        self.weights.view(slot, *shape)
    }

    fn linear(&self, x: &Tensor<2>, index: usize) -> Tensor<2> {
        linear(x, &self.weight(index))
    }

    fn back(
        &self,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        index: usize,
        gradients: &mut Gradients,
    ) -> Tensor<2> {
        linear_backward_weight(dy, x, gradients, &self.slots[index].0);
        linear_backward(dy, &self.weight(index))
    }
}

fn block() {
    let (block, mut gradients) = Block::new();
    let plan = AttentionPlan {
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        scale: 0.125,
        window: None,
        soft_cap: None,
    };
    // Five pairs of 60 tokens: prompt 20, completions 20 each.
    let segments: Vec<_> = (0..TOKENS / 60)
        .map(|i| i * 60)
        .map(|at| AttentionSegment {
            prompt: at..at + 20,
            completions: [at + 20..at + 40, at + 40..at + 60],
        })
        .collect();
    let positions: Vec<u32> = (0..TOKENS)
        .map(|i| if i % 60 < 40 { i % 60 } else { i % 60 - 20 } as u32)
        .collect();
    let frequencies: Vec<f32> = (0..HEAD_DIM / 2)
        .map(|i| 1e4f32.powf(-(i as f32) / 32.0))
        .collect();
    let table = RotaryTable::new(&positions, &frequencies, &Device::flex());
    let (x, dy) = (matrix(TOKENS, HIDDEN), matrix(TOKENS, HIDDEN));
    let (mut forward_s, mut attention_s) = (f64::INFINITY, f64::INFINITY);
    let whole = best(9, || {
        let start = Instant::now();
        let norm = |index: usize| block.weights.view(&block.norms[index], [HIDDEN]);
        let (normed, norm_saved) = rms_norm(&x, &norm(0), 1e-5);
        let q = rotary(block.linear(&normed, 0), &table, HEADS);
        let k = rotary(block.linear(&normed, 1), &table, KV_HEADS);
        let v = block.linear(&normed, 2);
        let attention = Instant::now();
        let (attended, attention_saved) = segment_attention(&q, &k, &v, &segments, &plan);
        let mut attention_time = attention.elapsed().as_secs_f64();
        let middle = add(block.linear(&attended, 3), &x);
        let (middle_normed, middle_saved) = rms_norm(&middle, &norm(1), 1e-5);
        let (gate, up) = (
            block.linear(&middle_normed, 4),
            block.linear(&middle_normed, 5),
        );
        let inner = gated(&gate, &up, Activation::Silu);
        let out = add(block.linear(&inner, 6), &middle);
        forward_s = forward_s.min(start.elapsed().as_secs_f64());
        drop(out);

        let dinner = block.back(&dy, &inner, 6, &mut gradients);
        let (dgate, dup) = gated_backward(&dinner, &gate, &up, Activation::Silu);
        let dnormed = block.back(&dgate, &middle_normed, 4, &mut gradients);
        let dnormed = add(
            dnormed,
            &block.back(&dup, &middle_normed, 5, &mut gradients),
        );
        let slot = &block.norms[1];
        rms_norm_backward_weight(&dnormed, &middle, &middle_saved, &mut gradients, slot);
        let dmiddle = rms_norm_backward(&dnormed, &middle, &norm(1), &middle_saved);
        let dmiddle = add(dmiddle, &dy);
        let dattended = block.back(&dmiddle, &attended, 3, &mut gradients);
        let attention = Instant::now();
        let (dq, dk, dv) = segment_attention_backward(
            &dattended,
            &q,
            &k,
            &v,
            &attended,
            &attention_saved,
            &segments,
            &plan,
        );
        attention_time += attention.elapsed().as_secs_f64();
        attention_s = attention_s.min(attention_time);
        let dq = block.back(
            &rotary_backward(dq, &table, HEADS),
            &normed,
            0,
            &mut gradients,
        );
        let dk = block.back(
            &rotary_backward(dk, &table, KV_HEADS),
            &normed,
            1,
            &mut gradients,
        );
        let dv = block.back(&dv, &normed, 2, &mut gradients);
        let dnormed = add(add(dq, &dk), &dv);
        let slot = &block.norms[0];
        rms_norm_backward_weight(&dnormed, &x, &norm_saved, &mut gradients, slot);
        let dx = add(
            rms_norm_backward(&dnormed, &x, &norm(0), &norm_saved),
            &dmiddle,
        );
        drop(dx);
    });
    let parameters: usize = block.slots.iter().map(|(slot, _)| slot.len).sum();
    let operations = 2.0 * (TOKENS * parameters) as f64;
    report("block forward", forward_s, operations);
    report("block forward + backward", whole, 3.0 * operations);
    println!("{:<28} {:9.3} ms", "  of it attention", attention_s * 1e3);
}

fn head() {
    let rows = 2 * TOKENS / 3;
    let (hidden, weight) = (matrix(rows, HIDDEN), matrix(VOCABULARY, HIDDEN));
    let targets: Vec<u32> = (0..rows).map(|row| (row * 97) as u32).collect();
    let slot = Slot {
        bucket: 0,
        offset: 0,
        len: VOCABULARY * HIDDEN,
    };
    let mut gradients = Gradients::zeros(&[slot.len], &Device::flex());
    let operations = 2.0 * (rows * VOCABULARY * HIDDEN) as f64;
    let forward = best(3, || drop(logprob_head(&hidden, &weight, &targets, None)));
    report(&format!("head over {rows} rows"), forward, operations);
    let (_, saved) = logprob_head(&hidden, &weight, &targets, None);
    let dlogps = vec![1.0; rows];
    let backward = best(3, || {
        drop(logprob_head_backward(
            &dlogps,
            &hidden,
            &weight,
            &targets,
            None,
            &saved,
            Some((&mut gradients, &slot)),
        ));
    });
    report("  backward (recomputing)", backward, 3.0 * operations);
}
