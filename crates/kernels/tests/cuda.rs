//! The fused forms of a GPU against the host forms on the same operands, f32 and bf16. They need a device:
//! `cargo test --release -p kernels --features cuda --test cuda -- --ignored`.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use std::convert::Infallible;

use kernels::{
    Activation, AttentionPlan, AttentionSegment, Device, Flat, Gradients, Kept, Precision,
    RotaryTable, Slot, Tensor, UpdateRule,
};

/// Numbers in −1..1, the same for the same seed.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Both devices, one after the other, with one precision.
struct Both {
    devices: [Device; 2],
    precision: Precision,
}

fn on_both(check: impl Fn(&Both)) {
    for precision in [Precision::F32, Precision::Bf16] {
        check(&Both {
            devices: [Device::flex(), Device::cuda(0).unwrap()],
            precision,
        });
    }
}

impl Both {
    /// Compares what `work` makes of both devices; every result by ‖difference‖ / ‖expected‖.
    fn compare(&self, what: &str, work: impl Fn(&Device) -> Vec<Vec<f32>>) {
        let bound = match self.precision {
            Precision::F32 => 2e-5,
            Precision::Bf16 => 1e-2,
        };
        let [expected, found] = self.devices.each_ref().map(work);
        assert_eq!(found.len(), expected.len());
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.len(), expected.len(), "{what} {index}");
            let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
            let pairs = found.iter().zip(expected);
            let difference = square(&mut pairs.map(|(a, b)| f64::from(a - b))).sqrt();
            let norm = square(&mut expected.iter().map(|&x| f64::from(x))).sqrt();
            let error = difference / norm.max(1e-30);
            println!("{what} {index} {:?}: {error:.1e}", self.precision);
            assert!(
                error < bound,
                "{what} {index} {:?}: {error:.1e}",
                self.precision
            );
        }
    }

    fn operand(&self, rows: usize, columns: usize, seed: u32, device: &Device) -> Tensor<2> {
        self.precision.operand(&matrix(rows, columns, seed, device))
    }
}

fn matrix(rows: usize, columns: usize, seed: u32, device: &Device) -> Tensor<2> {
    Tensor::new(values(rows * columns, seed), [rows, columns], device)
}

fn vector(len: usize, seed: u32, device: &Device) -> Tensor<1> {
    Tensor::new(values(len, seed), [len], device)
}

fn whole(len: usize) -> Slot {
    Slot {
        bucket: 0,
        offset: 0,
        len,
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn products() {
    on_both(|both| {
        for (rows, depth, out) in [
            (1, 64, 200),
            (37, 48, 96),
            (130, 600, 20),
            (2048, 576, 1536),
        ] {
            both.compare(&format!("linear {rows} {depth} {out}"), |device| {
                let x = both.operand(rows, depth, 1, device);
                let weight = both.operand(out, depth, 2, device);
                let dy = both.operand(rows, out, 3, device);
                let mut sums = Gradients::zeros(&[out * depth + 8], device);
                let slot = Slot {
                    offset: 8,
                    ..whole(out * depth)
                };
                kernels::linear_backward_weight(&dy, &x, &mut sums, &slot);
                kernels::linear_backward_weight(&dy, &x, &mut sums, &slot);
                let bias = vector(out, 4, device);
                vec![
                    kernels::add_bias(kernels::linear(&x, &weight), &bias).into_vec(),
                    kernels::linear_backward(&dy, &weight).into_vec(),
                    sums.take(0)[8..].to_vec(),
                ]
            });
        }
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn norms_and_sums() {
    on_both(|both| {
        for (rows, width) in [(3, 64), (1000, 576), (70, 2048)] {
            both.compare(&format!("norm {rows} {width}"), |device| {
                let (x, dy) = (
                    matrix(rows, width, 1, device),
                    both.operand(rows, width, 2, device),
                );
                let weight = vector(width, 3, device);
                let (y, saved) = kernels::rms_norm_operand(&x, &weight, 1e-5, both.precision);
                let mut sums = Gradients::zeros(&[2 * width], device);
                let slot = Slot {
                    offset: width,
                    ..whole(width)
                };
                kernels::rms_norm_backward_weight(&dy, &x, &saved, &mut sums, &slot);
                kernels::bias_backward(&dy, &mut sums, &whole(width));
                let dx = kernels::rms_norm_backward(&dy, &x, &weight, &saved);
                let sum = kernels::add(dx.clone(), &x);
                let in_place = kernels::add(matrix(rows, width, 5, device), &dy);
                vec![
                    y.into_vec(),
                    dx.into_vec(),
                    sums.take(0),
                    sum.into_vec(),
                    in_place.into_vec(),
                ]
            });
        }
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn turns_and_activations() {
    on_both(|both| {
        let (rows, heads, head_dim) = (300, 3, 64);
        let positions: Vec<u32> = (0..rows as u32).map(|row| row * 7 % 2000).collect();
        for half in [32, 8] {
            both.compare(&format!("rotary {half}"), |device| {
                let frequencies: Vec<f32> = (0..half)
                    .map(|i| 10_000f32.powf(-(i as f32) / half as f32))
                    .collect();
                let table = RotaryTable::new(&positions, &frequencies, device);
                let x = both.operand(rows, heads * head_dim, 1, device);
                let turned = kernels::rotary(x.clone(), &table, heads);
                let back = kernels::rotary_backward(turned.clone(), &table, heads);
                vec![turned.into_vec(), back.into_vec(), x.into_vec()]
            });
        }
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
            both.compare(&format!("{activation:?}"), |device| {
                let [gate, up, dy] = [1, 2, 3].map(|seed| both.operand(77, 96, seed, device));
                let (dgate, dup) = kernels::gated_backward(&dy, &gate, &up, activation);
                vec![
                    kernels::gated(&gate, &up, activation).into_vec(),
                    dgate.into_vec(),
                    dup.into_vec(),
                    kernels::activate(&gate, activation).into_vec(),
                    kernels::activate_backward(&dy, &gate, activation).into_vec(),
                ]
            });
        }
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn rows_and_tables() {
    on_both(|both| {
        let (table, width) = (500, 72);
        let ids: Vec<u32> = (0..900u32).map(|i| i * i % 311).collect();
        let rows: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
        both.compare("rows", |device| {
            let weight = matrix(table, width, 1, device);
            let dy = matrix(ids.len(), width, 2, device);
            let mut sums = Gradients::zeros(&[table * width], device);
            let slot = whole(table * width);
            kernels::embedding_backward(&dy, &ids, &mut sums, &slot);
            kernels::embedding_backward(&dy, &ids, &mut sums, &slot);
            vec![
                kernels::embedding(&weight, &ids).into_vec(),
                kernels::gather_rows(&weight, &rows).into_vec(),
                kernels::scatter_add_rows(&dy, &rows, table).into_vec(),
                sums.take(0),
            ]
        });
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_head() {
    on_both(|both| {
        for (rows, vocabulary, cap) in
            [(5, 200, None), (300, 3000, Some(30.0)), (4000, 49152, None)]
        {
            let width = 64;
            let targets: Vec<u32> = (0..rows as u32)
                .map(|i| i * 7919 % vocabulary as u32)
                .collect();
            both.compare(&format!("head {rows} {vocabulary}"), |device| {
                let hidden = both.operand(rows, width, 1, device);
                let weight = both.operand(vocabulary, width, 2, device);
                let (logps, saved) = kernels::logprob_head(&hidden, &weight, &targets, cap);
                let dlogps = values(rows, 3);
                let mut sums = Gradients::zeros(&[vocabulary * width], device);
                let slot = whole(vocabulary * width);
                let dhidden = kernels::logprob_head_backward(
                    &dlogps,
                    &hidden,
                    &weight,
                    &targets,
                    cap,
                    &saved,
                    Some((&mut sums, &slot)),
                );
                vec![logps, dhidden.into_vec(), sums.take(0)]
            });
        }
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn attention() {
    let mut segments = Vec::new();
    let mut start = 3;
    for (prompt, chosen, rejected) in [
        (40, 70, 30),
        (0, 5, 9),
        (300, 1, 200),
        (7, 150, 0),
        (1, 1, 1),
    ] {
        let (a, b) = (start + prompt, start + prompt + chosen);
        segments.push(AttentionSegment {
            prompt: start..a,
            completions: [a..b, b..b + rejected],
        });
        start = b + rejected;
    }
    let rows = start + 2;
    on_both(|both| {
        for (heads, kv_heads, head_dim, window, soft_cap) in [
            (9, 3, 64, None, None),
            (4, 4, 128, Some(50), None),
            (8, 2, 32, None, Some(20.0)),
            (2, 1, 256, None, None),
        ] {
            let plan = AttentionPlan {
                heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f64).sqrt(),
                window,
                soft_cap,
            };
            both.compare(&format!("attention {plan:?}"), |device| {
                let q = both.operand(rows, heads * head_dim, 1, device);
                let [k, v] =
                    [2, 3].map(|seed| both.operand(rows, kv_heads * head_dim, seed, device));
                let dy = both.operand(rows, heads * head_dim, 4, device);
                let (out, saved) = kernels::segment_attention(&q, &k, &v, &segments, &plan);
                let (dq, dk, dv) = kernels::segment_attention_backward(
                    &dy, &q, &k, &v, &out, &saved, &segments, &plan,
                );
                [out, dq, dk, dv].map(Tensor::into_vec).to_vec()
            });
        }
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn what_a_device_holds_is_what_it_was_given() {
    let device = Device::cuda(0).unwrap();
    let buckets = vec![values(1000, 1), values(64, 2)];
    let mut flat = Flat::from_host(buckets.clone(), Precision::Bf16, &device);
    let slot = Slot {
        bucket: 0,
        offset: 30,
        len: 12,
    };
    assert_eq!(flat.view(&slot, [3, 4]).into_vec(), buckets[0][30..42]);
    let rounded = flat.operand(&slot, [3, 4]).into_vec();
    assert!(
        rounded
            .iter()
            .zip(&buckets[0][30..42])
            .all(|(a, b)| (a - b).abs() <= b.abs() / 256.0)
    );
    assert_eq!(flat.take_host(), buckets);
    let mut sums = Gradients::zeros(&[4, 4], &device);
    sums.accumulate(
        &Slot {
            bucket: 1,
            offset: 0,
            len: 4,
        },
        Tensor::new(vec![1.0, 2.0, 3.0, 4.0], [4], &device),
    );
    sums.accumulate(
        &Slot {
            bucket: 1,
            offset: 0,
            len: 4,
        },
        Tensor::new(vec![1.0; 4], [4], &device),
    );
    assert_eq!(sums.take_host(), [vec![0.0; 4], vec![2.0, 3.0, 4.0, 5.0]]);
}

/// What a forward reads of all buckets.
fn computed(flat: &Flat) -> Vec<Vec<f32>> {
    [0, 1].map(|bucket| flat.computed(bucket)).to_vec()
}

fn given(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::new(values.to_vec(), [values.len()], device)
}

/// Weights that lie anywhere, and such as lie on the grid of bf16 and are dithered once they have moved.
fn uneven_and_even(len: usize, seed: u32) -> [Vec<f32>; 2] {
    let uneven = values(len, seed);
    let even = Precision::Bf16.operand(&given(&uneven, &Device::flex()));
    [uneven, even.into_vec()]
}

/// What the host makes of all elements of a bucket of `like`, as operands.
fn rounded(like: &Flat, bucket: usize, weights: &[f32]) -> Vec<f32> {
    let mut bits = vec![0; weights.len()];
    let rounding = like.rounding(bucket, 0);
    rounding.to_bf16(weights, &mut bits);
    let widened = bits
        .into_iter()
        .map(|it| f32::from_bits(u32::from(it) << 16));
    widened.collect()
}

fn read(buckets: &[Vec<f32>]) -> impl Iterator<Item = Result<Vec<f32>, Infallible>> {
    buckets.iter().cloned().map(Ok)
}

#[test]
#[ignore = "needs a CUDA device"]
fn operands_of_masters_that_are_elsewhere_are_those_of_the_host() {
    let [one, other] = uneven_and_even(1003, 1);
    for first in [one, other] {
        masters_elsewhere(&[first, values(64, 2)]);
    }
}

fn masters_elsewhere(buckets: &[Vec<f32>]) {
    let narrow = [vec![4..10, 900..1003], vec![0..2, 2..5]];
    let (host, device) = (Device::flex(), Device::cuda(0).unwrap());
    let Ok(expected) = Flat::frozen(read(buckets), &narrow, &host);
    let expected = computed(&expected);
    let mut whole = Flat::from_host(buckets.to_vec(), Precision::Bf16, &device);
    let masters = whole.take_masters(&narrow);
    let Ok(parked) = Flat::parked(read(buckets), &narrow, &device);
    let Ok(frozen) = Flat::frozen(read(buckets), &narrow, &device);
    for flat in [&whole, &parked, &frozen] {
        assert_eq!(computed(flat), expected);
    }
    whole.put_masters(masters);
    assert_eq!(whole.take_host(), buckets);
    whole.put_host(buckets.to_vec());
    // Masters whose values are of bf16 are their operands, and f32 again when they are put in place.
    let even: Vec<Vec<f32>> = buckets
        .iter()
        .map(|bucket| Precision::Bf16.operand(&given(bucket, &host)).into_vec())
        .collect();
    let Ok(mut parked) = Flat::parked(read(&even), &narrow, &device);
    let taken = parked.take_masters(&narrow);
    parked.put_masters(taken);
    let slot = Slot {
        bucket: 0,
        offset: 30,
        len: 12,
    };
    assert_eq!(parked.view(&slot, [12]).into_vec(), even[0][30..42]);
    assert_eq!(parked.take_host(), even);
    // New values of a part, from the device's memory and from the host's.
    let Ok(mut moved) = Flat::parked(read(buckets), &narrow, &device);
    let mut new = buckets.to_vec();
    for range in [100..333, 500..903] {
        for value in &mut new[0][range] {
            *value *= -3.0;
        }
    }
    let mut bits = vec![0; 403];
    moved.rounding(0, 500).to_bf16(&new[0][500..903], &mut bits);
    moved.round_in_place(0, 100..333, &given(&new[0][100..333], &device));
    moved.write_in_place(0, 500..903, &bits);
    // One rank's part of what is read in f32: the rest is zero until the ranks have summed.
    let part = given(&new[0][500..903], &device);
    drop(moved.narrow_region([(0, &(500..903), &part)]).unwrap());
    let mut parts = vec![vec![0.0; 109], vec![0.0; 5]];
    parts[0][6..9].copy_from_slice(&new[0][900..903]);
    for (bucket, narrow) in parts.into_iter().enumerate() {
        let rounded = rounded(&moved, bucket, &new[bucket]);
        assert_eq!(moved.computed(bucket), [rounded, narrow].concat());
    }
    // All of them, in place.
    whole.put_masters(new.iter().map(|bucket| given(bucket, &device)).collect());
    whole.refresh();
    for (bucket, new) in new.iter().enumerate() {
        let slot = Slot {
            bucket,
            offset: 0,
            len: new.len(),
        };
        let found = whole.operand(&slot, [new.len()]).into_vec();
        assert_eq!(found, rounded(&whole, bucket, new));
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn an_update_moves_masters_that_are_elsewhere_and_their_operands_and_no_others() {
    for weights in uneven_and_even(1003, 1) {
        updated(&weights);
    }
}

fn updated(weights: &[f32]) {
    let device = Device::cuda(0).unwrap();
    let flat = Flat::from_host(vec![weights.to_vec()], Precision::Bf16, &device);
    let before = flat.operand(&whole(1003), [1003]).into_vec();
    // A shard, and of it a stretch that begins anywhere.
    let (shard, stretch) = (251..777, 303..771);
    let own = stretch.start - shard.start..stretch.end - shard.start;
    let [gradient, first, second] = [2, 3, 4].map(|seed| {
        let all = values(shard.len(), seed).into_iter();
        all.map(f32::abs).collect::<Vec<_>>()
    });
    let [masters, gradients, firsts, seconds] =
        [&weights[shard.clone()], &gradient, &first, &second].map(|it| given(it, &device));
    let (clip, rule) = (
        0.5,
        UpdateRule::AdamW {
            keep_first: 0.9,
            add_first: 0.1,
            keep_second: 0.99,
            add_second: 0.01,
            step_size: 0.05,
            root_correction: 1.5,
            eps: 1e-8,
            keep_weight: 0.999,
        },
    );
    let [of_masters, of_firsts, of_seconds, of_gradient] =
        [&masters, &firsts, &seconds, &gradients].map(|it| it.slice(own.clone()));
    let kept = Kept {
        masters: Some(&of_masters),
        first: Some(&of_firsts),
        second: &of_seconds,
    };
    kernels::update(&flat, 0, stretch.clone(), &of_gradient, kept, clip, &rule);
    let moved = masters.clone().into_vec();
    let (mut operands, mut all) = (before, weights.to_vec());
    all[shard.clone()].copy_from_slice(&moved);
    for (index, value) in moved.iter().enumerate() {
        let was = weights[shard.start + index];
        if !own.contains(&index) {
            assert_eq!(*value, was, "{index} is not of the stretch");
            continue;
        }
        let g = gradient[index] * clip;
        let m = 0.9 * first[index] + 0.1 * g;
        let v = 0.99 * second[index] + 0.01 * g * g;
        let expected = was * 0.999 - 0.05 * (m / (v.sqrt() * 1.5 + 1e-8));
        assert!((value - expected).abs() < 1e-6, "{value} is not {expected}");
    }
    let rounded = rounded(&flat, 0, &all);
    operands[stretch.clone()].copy_from_slice(&rounded[stretch]);
    let found = flat.operand(&whole(1003), [1003]).into_vec();
    assert_eq!(found, operands);
    // The model's own f32 weights stay: their masters are elsewhere.
    assert_eq!(flat.master(&whole(1003)), weights);
    kernels::add_to(&of_firsts, &of_gradient);
    let squares = kernels::sum_of_squares(&device, [of_gradient]).unwrap();
    let exact: f64 = gradient[own].iter().map(|x| f64::from(*x).powi(2)).sum();
    assert!((squares / exact - 1.0).abs() < 1e-12, "{squares} {exact}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn memory_that_a_job_used_goes_back_to_the_device_before_the_next_one() {
    // The driver takes back what it gave at a time, so that a part of what others left may serve first.
    const MOST: usize = 200 << 20;
    let gpu = gpu::Gpu::open(0).unwrap();
    let device = Device::cuda(0).unwrap();
    device.begin_anew();
    let free = || gpu.free_and_total().unwrap().0;
    let before = free();
    let kept = Tensor::new(values(1 << 20, 1), [1 << 10, 1 << 10], &device);
    let large = gpu.allocate(300 << 20).unwrap();
    assert!(free() + MOST <= before);
    drop(large);
    assert!(free() + MOST <= before, "it is kept for what comes next");
    device.begin_anew();
    assert!(free() + MOST >= before, "{} of {before} are free", free());
    // What is in use stays, and the range grows again where it ended.
    assert_eq!(kept.into_vec(), values(1 << 20, 1));
    let large = gpu.allocate(300 << 20).unwrap();
    drop(large);
    assert!(free() + MOST <= before);
}
