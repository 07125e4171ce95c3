//! Operands in bf16: what the fused forms make of them, and the reference composition over real bf16 tensors.

#![allow(clippy::unwrap_used)]

mod support;

use burn::tensor::{DType, Tensor as BurnTensor};
use kernels::{Device, Flat, Precision, Slot, Tensor, composition};
use support::{close, gradients, host, matrix, plan, segment, values, whole};

/// Half the distance of two neighbours in bf16, relative: what a result loses when it is rounded.
const ROUNDING: f32 = 1.0 / 256.0;

fn bf16(x: &Tensor<2>) -> BurnTensor<2> {
    x.burn().cast(DType::BF16)
}

#[test]
fn f32_operands_are_the_tensors_themselves_and_bf16_operands_lose_what_bf16_loses() {
    let x = matrix(7, 9, 1);
    assert_eq!(host(&Precision::F32.operand(&x)), host(&x));
    let rounded = Precision::Bf16.operand(&x);
    assert_eq!(rounded.burn().dtype(), DType::F32);
    assert_eq!(host(&rounded), host(&bf16(&x).cast(DType::F32)));
    assert_ne!(host(&rounded), host(&x));
    let again = Precision::Bf16.operand(&rounded);
    assert_eq!(host(&again), host(&rounded));
}

#[test]
fn weights_are_operands_of_their_precision_until_they_are_taken_and_put_back() {
    let values = values(12, 3);
    let flat = Flat::from_host(vec![values.clone()], Precision::Bf16, &Device::flex());
    let slot = Slot {
        bucket: 0,
        offset: 2,
        len: 6,
    };
    let exact = flat.view(&slot, [2, 3]);
    assert_eq!(host(&exact), values[2..8]);
    let expected = host(&Precision::Bf16.operand(&exact));
    assert_eq!(host(&flat.operand(&slot, [2, 3])), expected);
    let mut flat = flat;
    flat.set_precision(Precision::F32);
    assert_eq!(host(&flat.operand(&slot, [2, 3])), values[2..8]);
    flat.set_precision(Precision::Bf16);
    assert_eq!(flat.take_host(), std::slice::from_ref(&values));
    let doubled = values.iter().map(|value| 2.0 * value).collect();
    flat.put_host(vec![doubled]);
    let twice: Vec<f32> = expected.iter().map(|value| 2.0 * value).collect();
    assert_eq!(host(&flat.operand(&slot, [2, 3])), twice);
}

#[test]
fn linear_maps_of_bf16_tensors_give_f32_results_near_the_fused_ones() {
    let [x, weight, dy] = [matrix(33, 48, 1), matrix(20, 48, 2), matrix(33, 20, 3)];
    let operands = [&x, &weight, &dy].map(|tensor| Precision::Bf16.operand(tensor));
    let tensors = [&x, &weight, &dy].map(bf16);
    let near = |what: &str, fused: &Tensor<2>, composed: &BurnTensor<2>| {
        assert_eq!(composed.dtype(), DType::F32, "{what}");
        close(what, &host(composed), &host(fused), 2.0 * ROUNDING);
    };
    near(
        "y",
        &kernels::linear(&operands[0], &operands[1]),
        &composition::linear(&tensors[0], &tensors[1]),
    );
    near(
        "dx",
        &kernels::linear_backward(&operands[2], &operands[1]),
        &composition::linear_backward(&tensors[2], &tensors[1]),
    );
    let (mut fused, mut composed) = (gradients(960), gradients(960));
    kernels::linear_backward_weight(&operands[2], &operands[0], &mut fused, &whole(960));
    composition::linear_backward_weight(&tensors[2], &tensors[0], &mut composed, &whole(960));
    let (fused, composed) = (fused.take_host(), composed.take_host());
    close("dw", &composed[0], &fused[0], 2.0 * ROUNDING);
}

#[test]
fn attention_over_bf16_tensors_gives_f32_results_near_the_fused_ones() {
    let (segments, plan) = ([segment(0, 9, 6, 8)], plan(4, 2, 16, None));
    let tensors = [
        matrix(23, 64, 1),
        matrix(23, 32, 2),
        matrix(23, 32, 3),
        matrix(23, 64, 4),
    ];
    let [q, k, v, dy] = tensors
        .each_ref()
        .map(|tensor| Precision::Bf16.operand(tensor));
    let (out, saved) = kernels::segment_attention(&q, &k, &v, &segments, &plan);
    let (dq, dk, dv) =
        kernels::segment_attention_backward(&dy, &q, &k, &v, &out, &saved, &segments, &plan);
    let [q, k, v, dy] = tensors.each_ref().map(bf16);
    let composed = composition::segment_attention(&q, &k, &v, &segments, &plan);
    let (dq_composed, dk_composed, dv_composed) =
        composition::segment_attention_backward(&dy, &q, &k, &v, &segments, &plan);
    for (what, fused, composed) in [
        ("out", out, composed),
        ("dq", dq, dq_composed),
        ("dk", dk, dk_composed),
        ("dv", dv, dv_composed),
    ] {
        assert_eq!(composed.dtype(), DType::F32, "{what}");
        close(what, &host(&composed), &host(&fused), 4.0 * ROUNDING);
    }
}

#[test]
fn the_head_never_rounds_logits() {
    let (hidden, weight) = (matrix(9, 32, 1).scale(4.0), matrix(700, 32, 2));
    let targets: Vec<u32> = (0..9).map(|row| row * 71).collect();
    let operands = [&hidden, &weight].map(|tensor| Precision::Bf16.operand(tensor));
    let (fused, saved) = kernels::logprob_head(&operands[0], &operands[1], &targets, None);
    let (composed, lse) = composition::logprob_head(&bf16(&hidden), &bf16(&weight), &targets, None);
    close("log-probs", &composed, &fused, 1e-5);
    let dlogps = values(9, 3);
    let (mut sums, mut sums_composed) = (gradients(22_400), gradients(22_400));
    let slot = whole(22_400);
    let dhidden = kernels::logprob_head_backward(
        &dlogps,
        &operands[0],
        &operands[1],
        &targets,
        None,
        &saved,
        Some((&mut sums, &slot)),
    );
    let composed = composition::logprob_head_backward(
        &dlogps,
        &bf16(&hidden),
        &bf16(&weight),
        &targets,
        None,
        &lse,
        Some((&mut sums_composed, &slot)),
    );
    assert_eq!(composed.dtype(), DType::F32);
    close("dhidden", &host(&composed), &host(&dhidden), 1e-5);
    let (sums, composed) = (sums.take_host(), sums_composed.take_host());
    close("dweight", &composed[0], &sums[0], 1e-5);
}
