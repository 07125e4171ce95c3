//! The parts of a training step at SmolLM2-135M's shapes on one thread: matrix products, a block both ways, the log-prob
//! head. criterion's elements are needed floating-point operations, so its Gelem/s are GFLOP/s: what a head's backward computes
//! again is not counted.
#![allow(missing_docs)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

use kernels::{
    Activation, AttentionPlan, AttentionSegment, Device, Flat, Gradients, Precision, RotaryTable,
    Slot, Tensor, add, gated, gated_backward, linear, linear_backward, linear_backward_weight,
    logprob_head, logprob_head_backward, rms_norm, rms_norm_backward, rms_norm_backward_weight,
    rotary, rotary_backward, segment_attention, segment_attention_backward,
};

const HIDDEN: usize = 576;
const INNER: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 49152;
const NARROW: usize = KV_HEADS * HEAD_DIM;

fn all(criterion: &mut Criterion) {
    let one = rayon::ThreadPoolBuilder::new().num_threads(1);
    one.build_global().expect("nobody asked for threads before");
    products(criterion, 300);
    block(criterion, "5 pairs of 60 tokens", 5, [20, 20, 20]);
    block(criterion, "1 pair of 600 tokens", 1, [100, 250, 250]);
    block(criterion, "1 pair of 2000 tokens", 1, [400, 800, 800]);
    head(criterion, 200);
}

fn matrix(rows: usize, columns: usize) -> Tensor<2> {
    let values = (0..rows * columns)
        .map(|i| ((i * 7919) % 1009) as f32 / 10090.0 - 0.05)
        .collect::<Vec<f32>>();
    Tensor::new(values, [rows, columns], &Device::flex())
}

fn products(criterion: &mut Criterion, tokens: usize) {
    let mut group = criterion.benchmark_group(format!("linear, {tokens} tokens"));
    for (depth, out) in [
        (HIDDEN, HIDDEN),
        (HIDDEN, NARROW),
        (HIDDEN, INNER),
        (INNER, HIDDEN),
    ] {
        let (x, weight, dy) = (
            matrix(tokens, depth),
            matrix(out, depth),
            matrix(tokens, out),
        );
        let slot = Slot {
            bucket: 0,
            offset: 0,
            len: out * depth,
        };
        let mut gradients = Gradients::zeros(&[slot.len], &Device::flex());
        let operations = 2 * (tokens * depth * out) as u64;
        group.throughput(Throughput::Elements(operations));
        group.bench_function(format!("{depth} to {out}, forward"), |bench| {
            bench.iter(|| linear(&x, &weight));
        });
        group.throughput(Throughput::Elements(2 * operations));
        group.bench_function(format!("{depth} to {out}, backward"), |bench| {
            bench.iter(|| {
                linear_backward_weight(&dy, &x, &mut gradients, &slot);
                linear_backward(&dy, &weight)
            });
        });
    }
    group.finish();
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

/// One block, forward alone or both ways, over pairs of so many tokens of prompt, chosen and rejected.
fn block(criterion: &mut Criterion, name: &str, pairs: usize, lengths: [usize; 3]) {
    let (block, mut gradients) = Block::new();
    let tokens = pairs * lengths.iter().sum::<usize>();
    let plan = AttentionPlan {
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        scale: 0.125,
        window: None,
        soft_cap: None,
    };
    let [prompt, chosen, rejected] = lengths;
    let segments: Vec<_> = (0..pairs)
        .map(|pair| pair * (tokens / pairs))
        .map(|at| AttentionSegment {
            prompt: at..at + prompt,
            completions: [
                at + prompt..at + prompt + chosen,
                at + prompt + chosen..at + prompt + chosen + rejected,
            ],
        })
        .collect();
    let own = (0..prompt + chosen).chain(prompt..prompt + rejected);
    let own: Vec<u32> = own.map(|position| position as u32).collect();
    let positions = own.repeat(pairs);
    let frequencies: Vec<f32> = (0..HEAD_DIM / 2)
        .map(|i| 1e4f32.powf(-(i as f32) / 32.0))
        .collect();
    let table = RotaryTable::new(&positions, &frequencies, &Device::flex());
    let (x, dy) = (matrix(tokens, HIDDEN), matrix(tokens, HIDDEN));
    let mut both_ways = || {
        let norm = |index: usize| block.weights.view(&block.norms[index], [HIDDEN]);
        let (normed, norm_saved) = rms_norm(&x, &norm(0), 1e-5);
        let q = rotary(block.linear(&normed, 0), &table, HEADS);
        let k = rotary(block.linear(&normed, 1), &table, KV_HEADS);
        let v = block.linear(&normed, 2);
        let (attended, attention_saved) = segment_attention(&q, &k, &v, &segments, &plan);
        let middle = add(block.linear(&attended, 3), &x);
        let (middle_normed, middle_saved) = rms_norm(&middle, &norm(1), 1e-5);
        let (gate, up) = (
            block.linear(&middle_normed, 4),
            block.linear(&middle_normed, 5),
        );
        let inner = gated(&gate, &up, Activation::Silu);
        let out = add(block.linear(&inner, 6), &middle);
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
        add(
            rms_norm_backward(&dnormed, &x, &norm(0), &norm_saved),
            &dmiddle,
        )
    };
    let weights: usize = block.slots.iter().map(|(slot, _)| slot.len).sum();
    let seen = (0..prompt + chosen).chain(prompt..prompt + rejected);
    let seen: usize = seen.map(|position| position + 1).sum();
    let needed = 2 * (tokens * weights) + 4 * pairs * seen * HEADS * HEAD_DIM;
    let mut group = criterion.benchmark_group("block");
    group.throughput(Throughput::Elements(3 * needed as u64));
    group.bench_function(name, |bench| bench.iter(&mut both_ways));
    group.finish();
}

fn head(criterion: &mut Criterion, rows: usize) {
    let (hidden, weight) = (matrix(rows, HIDDEN), matrix(VOCABULARY, HIDDEN));
    let targets: Vec<u32> = (0..rows).map(|row| (row * 97) as u32).collect();
    let slot = Slot {
        bucket: 0,
        offset: 0,
        len: VOCABULARY * HIDDEN,
    };
    let mut gradients = Gradients::zeros(&[slot.len], &Device::flex());
    let operations = 2 * (rows * VOCABULARY * HIDDEN) as u64;
    let mut group = criterion.benchmark_group(format!("head, {rows} rows"));
    group.sample_size(20);
    group.throughput(Throughput::Elements(operations));
    group.bench_function("forward", |bench| {
        bench.iter(|| logprob_head(&hidden, &weight, &targets, None));
    });
    let (_, saved) = logprob_head(&hidden, &weight, &targets, None);
    let dlogps = vec![1.0; rows];
    group.throughput(Throughput::Elements(2 * operations));
    group.bench_function("backward", |bench| {
        bench.iter(|| {
            let sums = Some((&mut gradients, &slot));
            logprob_head_backward(&dlogps, &hidden, &weight, &targets, None, &saved, sums)
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = all
}
criterion_main!(benches);
