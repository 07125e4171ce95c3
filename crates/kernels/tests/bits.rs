//! Bits: a row's result does not depend on its neighbours, and no result depends on the number of threads.

#![allow(clippy::unwrap_used)]

mod support;

use kernels::{Activation, Device, RotaryTable, Tensor, composition};
use support::{bits, gradients, host, matrix, plan, segment, values, vector, whole, with_threads};

/// `work` on all rows and on single rows and small runs of them gives the same bits per row.
fn rows_stand_alone(what: &str, x: &Tensor<2>, work: impl Fn(&Tensor<2>, &[usize]) -> Vec<f32>) {
    let [rows, _] = x.dims();
    let all: Vec<usize> = (0..rows).collect();
    let together = work(x, &all);
    let width = together.len() / rows;
    for (start, len) in [(0, 1), (rows - 1, 1), (3, 2), (7, 5), (1, 40), (11, 33)] {
        let some = &all[start..start + len];
        let alone = work(&kernels::gather_rows(x, some), some);
        let beside = &together[start * width..(start + len) * width];
        assert_eq!(
            bits(&alone),
            bits(beside),
            "{what}: {len} rows from {start}"
        );
    }
}

#[test]
fn a_row_of_a_linear_map_does_not_depend_on_its_neighbours() {
    for (depth, out) in [(8, 8), (64, 172), (64, 64), (576, 192), (1536, 576)] {
        let weight = matrix(out, depth, 1);
        let x = matrix(300, depth, 2);
        rows_stand_alone("linear", &x, |x, _| host(&kernels::linear(x, &weight)));
        let dy = matrix(300, out, 3);
        rows_stand_alone("linear backward", &dy, |dy, _| {
            host(&kernels::linear_backward(dy, &weight))
        });
    }
}

#[test]
fn a_row_of_the_head_does_not_depend_on_its_neighbours() {
    for (width, vocabulary) in [(8, 20), (64, 512), (64, 2100)] {
        let weight = matrix(vocabulary, width, 4);
        let hidden = matrix(530, width, 5);
        let targets = |rows: &[usize]| {
            rows.iter()
                .map(|row| (row * 31 % vocabulary) as u32)
                .collect::<Vec<_>>()
        };
        rows_stand_alone("head", &hidden, |hidden, rows| {
            kernels::logprob_head(hidden, &weight, &targets(rows), None).0
        });
        rows_stand_alone("head backward", &hidden, |hidden, rows| {
            let targets = targets(rows);
            let dlogps: Vec<f32> = rows.iter().map(|&row| row as f32 / 100.0 - 2.0).collect();
            let (_, saved) = kernels::logprob_head(hidden, &weight, &targets, None);
            host(&kernels::logprob_head_backward(
                &dlogps, hidden, &weight, &targets, None, &saved, None,
            ))
        });
    }
}

#[test]
fn a_row_of_an_elementwise_operation_does_not_depend_on_its_neighbours() {
    let (weight, frequencies) = (vector(48, 6), values(8, 7));
    rows_stand_alone("norm", &matrix(60, 48, 8), |x, _| {
        host(&kernels::rms_norm(x, &weight, 1e-5).0)
    });
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        rows_stand_alone("gated", &matrix(60, 47, 9), |x, _| {
            host(&kernels::gated(x, x, activation))
        });
    }
    let bias = vector(48, 8);
    rows_stand_alone("layer norm", &matrix(60, 48, 9), |x, _| {
        host(&kernels::layer_norm(x, &weight, &bias, 1e-5).0)
    });
    rows_stand_alone("rotary", &matrix(60, 48, 10), |x, rows| {
        let positions: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let table = RotaryTable::new(&positions, &frequencies, &Device::flex());
        host(&kernels::rotary(x.clone(), &table, 3))
    });
}

#[test]
fn attention_of_a_segment_does_not_depend_on_other_segments_or_its_place() {
    let plan = plan(6, 2, 16, None);
    let segments = [
        segment(0, 1, 1, 1),
        segment(3, 70, 30, 41),
        segment(144, 2, 1, 0),
        segment(147, 9, 1, 12),
    ];
    let rows = 169;
    let (q, k, v) = (
        matrix(rows, 96, 1),
        matrix(rows, 32, 2),
        matrix(rows, 32, 3),
    );
    let (out, _) = kernels::segment_attention(&q, &k, &v, &segments, &plan);
    for one in &segments {
        let own: Vec<usize> = (one.prompt.start..one.completions[1].end).collect();
        let pick = |x: &Tensor<2>| kernels::gather_rows(x, &own);
        let [chosen, rejected] = [one.completions[0].len(), one.completions[1].len()];
        let alone = [segment(0, one.prompt.len(), chosen, rejected)];
        let (out_alone, _) =
            kernels::segment_attention(&pick(&q), &pick(&k), &pick(&v), &alone, &plan);
        assert_eq!(bits(&host(&out_alone)), bits(&host(&pick(&out))), "{one:?}");
    }
}

#[test]
fn attention_of_a_token_does_not_depend_on_later_tokens() {
    for window in [None, Some(50)] {
        let plan = plan(4, 2, 8, window);
        let rows = 700;
        let (q, k, v) = (
            matrix(rows, 32, 1),
            matrix(rows, 16, 2),
            matrix(rows, 16, 3),
        );
        let all = host(&kernels::segment_attention(&q, &k, &v, &[segment(0, rows, 0, 0)], &plan).0);
        for len in [1, 2, 3, 48, 49, 512, 513, 514, 699] {
            let first: Vec<usize> = (0..len).collect();
            let pick = |x: &Tensor<2>| kernels::gather_rows(x, &first);
            let some = kernels::segment_attention(
                &pick(&q),
                &pick(&k),
                &pick(&v),
                &[segment(0, len, 0, 0)],
                &plan,
            )
            .0;
            assert_eq!(
                bits(&host(&some)),
                bits(&all[..len * 32]),
                "first {len}, window {window:?}"
            );
        }
    }
}

#[test]
fn one_thread_and_two_give_the_same_bits() {
    let work = || {
        let mut results = Vec::new();
        let (x, weight, dy) = (
            matrix(257, 192, 1),
            matrix(320, 192, 2),
            matrix(257, 320, 3),
        );
        let mut sums = gradients(320 * 192);
        results.push(host(&kernels::linear(&x, &weight)));
        results.push(host(&kernels::linear_backward(&dy, &weight)));
        kernels::linear_backward_weight(&dy, &x, &mut sums, &whole(320 * 192));
        results.push(sums.take_host().remove(0));

        let norm = vector(192, 4);
        let (y, saved) = kernels::rms_norm(&x, &norm, 1e-5);
        let mut sums = gradients(192);
        results.push(host(&kernels::rms_norm_backward(&y, &x, &norm, &saved)));
        kernels::rms_norm_backward_weight(&y, &x, &saved, &mut sums, &whole(192));
        results.push(host(&y));
        results.push(sums.take_host().remove(0));

        results.push(host(&kernels::gated(&x, &y, Activation::Silu)));
        let (dgate, dup) = kernels::gated_backward(&y, &x, &y, Activation::Silu);
        results.extend([host(&dgate), host(&dup)]);
        let positions: Vec<u32> = (0..257).collect();
        let table = RotaryTable::new(&positions, &values(32, 5), &Device::flex());
        results.push(host(&kernels::rotary(x.clone(), &table, 3)));
        results.push(host(&kernels::add(x.clone(), &y)));

        let (segments, plan) = (
            [segment(0, 100, 20, 30), segment(150, 40, 27, 40)],
            plan(6, 3, 32, None),
        );
        let (k, v) = (matrix(257, 96, 6), matrix(257, 96, 7));
        let (out, saved) = kernels::segment_attention(&x, &k, &v, &segments, &plan);
        let (dq, dk, dv) =
            kernels::segment_attention_backward(&y, &x, &k, &v, &out, &saved, &segments, &plan);
        results.extend([host(&out), host(&dq), host(&dk), host(&dv)]);

        let head = matrix(3000, 192, 8);
        let targets: Vec<u32> = (0..257).map(|row| row * 11).collect();
        let (logps, saved) = kernels::logprob_head(&x, &head, &targets, None);
        let (mut sums, slot) = (gradients(3000 * 192), whole(3000 * 192));
        let dlogps = values(257, 9);
        results.push(host(&kernels::logprob_head_backward(
            &dlogps,
            &x,
            &head,
            &targets,
            None,
            &saved,
            Some((&mut sums, &slot)),
        )));
        results.push(logps);
        results.push(sums.take_host().remove(0));
        results
            .into_iter()
            .map(|result| bits(&result))
            .collect::<Vec<_>>()
    };
    let one = with_threads(1, work);
    for threads in [2, 3] {
        for (index, (one, many)) in one.iter().zip(&with_threads(threads, work)).enumerate() {
            assert_eq!(one, many, "result {index} with {threads} threads");
        }
    }
}

#[test]
fn the_composition_is_near_but_need_not_match_bits() {
    let (x, weight) = (matrix(40, 700, 1), matrix(50, 700, 2));
    let (fused, composed) = (
        host(&kernels::linear(&x, &weight)),
        host(&composition::linear(&x.burn(), &weight.burn())),
    );
    support::close("linear", &fused, &composed, 1e-4);
}
