//! Segment attention: against the composition, autodiff and finite differences; what may see what; windows; odd segments.

#![allow(clippy::unwrap_used)]

mod support;

use kernels::{
    AttentionPlan, AttentionSegment, Device, Tensor, composition, segment_attention,
    segment_attention_backward,
};
use support::{bits, close, host, leaf, matrix, on, plan, segment, tracked, values};

/// Output and gradients of the fused form against the composition and autodiff over it, with and without a soft cap.
fn check(rows: usize, segments: &[AttentionSegment], plan: &AttentionPlan) {
    for soft_cap in [None, Some(1.5)] {
        check_one(rows, segments, &AttentionPlan { soft_cap, ..*plan });
    }
}

fn check_one(rows: usize, segments: &[AttentionSegment], plan: &AttentionPlan) {
    let (wide, narrow) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    let (q, k, v) = (
        matrix(rows, wide, 1).scale(3.0),
        matrix(rows, narrow, 2),
        matrix(rows, narrow, 3),
    );
    let dy = matrix(rows, wide, 4);
    let (out, saved) = segment_attention(&q, &k, &v, segments, plan);
    let (dq, dk, dv) = segment_attention_backward(&dy, &q, &k, &v, &out, &saved, segments, plan);
    let leaves = [&q, &k, &v].map(leaf);
    let tracked = tracked(&dy);
    let [q, k, v, dy] = [q, k, v, dy].map(|operand| operand.burn());
    close(
        "out",
        &host(&out),
        &host(&composition::segment_attention(&q, &k, &v, segments, plan)),
        1e-5,
    );
    let composed = composition::segment_attention_backward(&dy, &q, &k, &v, segments, plan);
    let [q, k, v] = leaves;
    let grads = (composition::segment_attention(&q, &k, &v, segments, plan) * tracked)
        .sum()
        .backward();
    for (what, leaf, fused, composed) in [
        ("dq", q, dq, composed.0),
        ("dk", k, dk, composed.1),
        ("dv", v, dv, composed.2),
    ] {
        let oracle = host(&leaf.grad(&grads).unwrap());
        close(what, &host(&fused), &oracle, 3e-5);
        close(&format!("{what} composed"), &host(&composed), &oracle, 3e-5);
    }
}

#[test]
fn a_pack_of_pairs_agrees_with_composition_and_autodiff() {
    check(
        31,
        &[
            segment(0, 5, 4, 3),
            segment(12, 1, 1, 1),
            segment(15, 7, 2, 7),
        ],
        &plan(4, 2, 8, None),
    );
}

#[test]
fn many_blocks_of_queries_agree_with_composition_and_autodiff() {
    check(300, &[segment(0, 130, 70, 100)], &plan(2, 1, 16, None));
    check(200, &[segment(0, 10, 150, 40)], &plan(3, 3, 4, None));
}

#[test]
fn deep_keys_agree_with_composition_and_autodiff() {
    check(1100, &[segment(0, 600, 450, 50)], &plan(1, 1, 4, None));
    check(1100, &[segment(0, 600, 450, 50)], &plan(1, 1, 4, Some(40)));
}

#[test]
fn sliding_windows_agree_with_composition_and_autodiff() {
    for window in [1, 2, 5, 100] {
        check(
            31,
            &[segment(0, 5, 4, 3), segment(12, 9, 5, 5)],
            &plan(4, 2, 8, Some(window)),
        );
    }
}

#[test]
fn empty_prompts_and_completions_agree_with_composition_and_autodiff() {
    check(
        20,
        &[
            segment(0, 5, 4, 0),
            segment(9, 0, 3, 2),
            segment(14, 4, 0, 0),
        ],
        &plan(2, 2, 8, None),
    );
}

#[test]
fn attention_agrees_with_finite_differences() {
    let (rows, plan) = (6, plan(2, 1, 4, None));
    let segments = [segment(0, 2, 2, 2)];
    let (q, k, v, dy) = (values(48, 1), values(24, 2), values(24, 3), values(48, 4));
    let wide = |values: &[f32]| on(&Device::flex(), rows, 8, values);
    let narrow = |values: &[f32]| on(&Device::flex(), rows, 4, values);
    let (out, saved) = segment_attention(&wide(&q), &narrow(&k), &narrow(&v), &segments, &plan);
    let (dq, dk, dv) = segment_attention_backward(
        &wide(&dy),
        &wide(&q),
        &narrow(&k),
        &narrow(&v),
        &out,
        &saved,
        &segments,
        &plan,
    );
    let operands = [q, k, v];
    for (which, gradient) in [dq, dk, dv].iter().enumerate() {
        for (i, &got) in host(gradient).iter().enumerate() {
            let loss = |step: f32| {
                let mut moved = operands.clone();
                moved[which][i] += step;
                let out = segment_attention(
                    &wide(&moved[0]),
                    &narrow(&moved[1]),
                    &narrow(&moved[2]),
                    &segments,
                    &plan,
                )
                .0;
                host(&out)
                    .iter()
                    .zip(&dy)
                    .map(|(&o, &d)| f64::from(o) * f64::from(d))
                    .sum::<f64>()
            };
            let slope = (loss(1e-2) - loss(-1e-2)) / 2e-2;
            assert!(
                (f64::from(got) - slope).abs() < 1e-3,
                "operand {which}, element {i}: {got}, expected {slope}"
            );
        }
    }
}

#[test]
fn a_completion_never_sees_its_sibling() {
    let plan = plan(2, 1, 8, None);
    let segments = [segment(0, 6, 5, 4)];
    let (q, k, v) = (matrix(15, 16, 1), matrix(15, 8, 2), host(&matrix(15, 8, 3)));
    let out = |v: &[f32]| {
        host(&segment_attention(&q, &k, &on(&Device::flex(), 15, 8, v), &segments, &plan).0)
    };
    let before = out(&v);
    let mut changed = v.clone();
    changed[11 * 8..].iter_mut().for_each(|value| *value += 1.0);
    let after = out(&changed);
    assert_eq!(
        bits(&before[..11 * 16]),
        bits(&after[..11 * 16]),
        "prompt and chosen"
    );
    assert_ne!(
        bits(&before[11 * 16..]),
        bits(&after[11 * 16..]),
        "rejected"
    );
}

#[test]
fn a_shared_prompt_gives_the_bits_of_two_plain_sequences() {
    for window in [None, Some(7)] {
        let plan = plan(4, 2, 8, window);
        let (prompt, chosen, rejected) = (150, 37, 61);
        let rows = prompt + chosen + rejected;
        let (q, k, v) = (
            matrix(rows, 32, 1),
            matrix(rows, 16, 2),
            matrix(rows, 16, 3),
        );
        let shared =
            segment_attention(&q, &k, &v, &[segment(0, prompt, chosen, rejected)], &plan).0;
        for (start, len) in [(prompt, chosen), (prompt + chosen, rejected)] {
            let plain: Vec<usize> = (0..prompt).chain(start..start + len).collect();
            let pick = |x: &Tensor<2>| kernels::gather_rows(x, &plain);
            let alone = segment_attention(
                &pick(&q),
                &pick(&k),
                &pick(&v),
                &[segment(0, prompt + len, 0, 0)],
                &plan,
            )
            .0;
            assert_eq!(bits(&host(&alone)), bits(&host(&pick(&shared))), "{start}");
        }
    }
}

#[test]
fn a_fully_masked_row_gives_zeros_and_no_nan() {
    let plan = plan(2, 1, 8, Some(0));
    let segments = [segment(0, 3, 2, 1)];
    let (q, k, v, dy) = (
        matrix(6, 16, 1),
        matrix(6, 8, 2),
        matrix(6, 8, 3),
        matrix(6, 16, 4),
    );
    let (out, saved) = segment_attention(&q, &k, &v, &segments, &plan);
    assert_eq!(host(&out), vec![0.0; 96]);
    let [q_burn, k_burn, v_burn] = [&q, &k, &v].map(Tensor::burn);
    let composed = composition::segment_attention(&q_burn, &k_burn, &v_burn, &segments, &plan);
    assert_eq!(host(&composed), vec![0.0; 96]);
    let (dq, dk, dv) = segment_attention_backward(&dy, &q, &k, &v, &out, &saved, &segments, &plan);
    assert!(
        [dq, dk, dv]
            .iter()
            .all(|gradient| host(gradient).iter().all(|&value| value == 0.0))
    );
}

#[test]
fn rows_in_no_segment_give_zeros() {
    let plan = plan(1, 1, 4, None);
    let (q, k, v) = (matrix(5, 4, 1), matrix(5, 4, 2), matrix(5, 4, 3));
    let out = host(&segment_attention(&q, &k, &v, &[segment(1, 1, 1, 1)], &plan).0);
    assert_eq!(out[..4], [0.0; 4]);
    assert_eq!(out[16..], [0.0; 4]);
    assert_eq!(
        host(&segment_attention(&q, &k, &v, &[], &plan).0),
        vec![0.0; 20]
    );
}

#[test]
fn huge_scores_stay_finite() {
    let plan = plan(1, 1, 8, None);
    let (q, k, v) = (
        matrix(9, 8, 1).scale(1e6),
        matrix(9, 8, 2).scale(1e6),
        matrix(9, 8, 3),
    );
    let segments = [segment(0, 4, 3, 2)];
    let (out, saved) = segment_attention(&q, &k, &v, &segments, &plan);
    assert!(host(&out).iter().all(|value| value.is_finite()));
    let (dq, _, _) = segment_attention_backward(&v, &q, &k, &v, &out, &saved, &segments, &plan);
    assert!(host(&dq).iter().all(|value| value.is_finite()));
}

#[test]
#[should_panic(expected = "is in two parts")]
fn overlapping_segments_are_refused() {
    let (q, k, v) = (matrix(6, 4, 1), matrix(6, 4, 2), matrix(6, 4, 3));
    segment_attention(
        &q,
        &k,
        &v,
        &[segment(0, 2, 1, 1), segment(3, 1, 1, 1)],
        &plan(1, 1, 4, None),
    );
}

#[test]
#[should_panic(expected = "in a pack of 5 rows")]
fn a_segment_beyond_the_pack_is_refused() {
    let (q, k, v) = (matrix(5, 4, 1), matrix(5, 4, 2), matrix(5, 4, 3));
    segment_attention(&q, &k, &v, &[segment(0, 2, 2, 2)], &plan(1, 1, 4, None));
}
