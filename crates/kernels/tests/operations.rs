//! Every operation: the fused form against the reference composition, every backward against burn's autodiff over it.
//! The tolerances are for sums of at most a few hundred f32 products of numbers below 1.

#![allow(clippy::unwrap_used)]

mod support;

use kernels::{Activation, Device, RotaryTable, Slot, Tensor, composition};
use support::{autodiff, close, gradients, host, leaf, matrix, on, tracked, values, vector, whole};

#[test]
fn linear_agrees_with_its_composition_and_autodiff() {
    for (rows, depth, out) in [
        (1, 8, 8),
        (1, 64, 200),
        (3, 5, 2),
        (37, 48, 96),
        (130, 600, 20),
    ] {
        let (x, weight, dy) = (
            matrix(rows, depth, 1),
            matrix(out, depth, 2),
            matrix(rows, out, 3),
        );
        let y = kernels::linear(&x, &weight);
        close(
            "linear",
            &host(&y),
            &host(&composition::linear(&x.burn(), &weight.burn())),
            1e-4,
        );
        let mut sums = gradients(out * depth);
        let dx = kernels::linear_backward(&dy, &weight);
        kernels::linear_backward_weight(&dy, &x, &mut sums, &whole(out * depth));
        let (x, weight) = (leaf(&x), leaf(&weight));
        let y = composition::linear(&x, &weight);
        let grads = (y * tracked(&dy)).sum().backward();
        close("dx", &host(&dx), &host(&x.grad(&grads).unwrap()), 1e-4);
        close(
            "dw",
            &sums.take_host()[0],
            &host(&weight.grad(&grads).unwrap()),
            1e-4,
        );
    }
}

#[test]
fn bias_agrees_with_autodiff() {
    let (x, bias, dy) = (matrix(7, 12, 1), vector(12, 2), matrix(7, 12, 3));
    let y = kernels::add_bias(x.clone(), &bias);
    close(
        "bias",
        &host(&y),
        &host(&composition::add_bias(x.burn(), &bias.burn())),
        1e-6,
    );
    let mut sums = gradients(12);
    kernels::bias_backward(&dy, &mut sums, &whole(12));
    let bias = leaf(&bias);
    let grads = (composition::add_bias(tracked(&x), &bias) * tracked(&dy))
        .sum()
        .backward();
    close(
        "dbias",
        &sums.take_host()[0],
        &host(&bias.grad(&grads).unwrap()),
        1e-5,
    );
}

#[test]
fn rms_norm_agrees_with_its_composition_and_autodiff() {
    for (rows, width) in [(1, 16), (9, 50), (40, 576)] {
        let (x, weight, dy) = (
            matrix(rows, width, 4),
            vector(width, 5),
            matrix(rows, width, 6),
        );
        let (y, saved) = kernels::rms_norm(&x, &weight, 1e-5);
        close(
            "norm",
            &host(&y),
            &host(&composition::rms_norm(&x.burn(), &weight.burn(), 1e-5).0),
            1e-5,
        );
        let mut sums = gradients(width);
        let dx = kernels::rms_norm_backward(&dy, &x, &weight, &saved);
        kernels::rms_norm_backward_weight(&dy, &x, &saved, &mut sums, &whole(width));
        let (x, weight) = (leaf(&x), leaf(&weight));
        let grads = (composition::rms_norm(&x, &weight, 1e-5).0 * tracked(&dy))
            .sum()
            .backward();
        close("dx", &host(&dx), &host(&x.grad(&grads).unwrap()), 1e-5);
        close(
            "dw",
            &sums.take_host()[0],
            &host(&weight.grad(&grads).unwrap()),
            1e-4,
        );
    }
}

#[test]
fn a_row_of_zeros_is_normalised_to_zeros() {
    let (y, _) = kernels::rms_norm(&Tensor::zeros([2, 8], &Device::flex()), &vector(8, 1), 1e-6);
    assert_eq!(host(&y), vec![0.0; 16]);
}

#[test]
fn embedding_agrees_with_its_composition_and_autodiff() {
    let (weight, ids) = (matrix(11, 6, 7), [3, 0, 10, 3, 3]);
    let y = kernels::embedding(&weight, &ids);
    assert_eq!(
        host(&y),
        host(&composition::embedding(&weight.burn(), &ids))
    );
    let dy = matrix(5, 6, 8);
    let mut sums = gradients(66);
    kernels::embedding_backward(&dy, &ids, &mut sums, &whole(66));
    let weight = leaf(&weight);
    let grads = (composition::embedding(&weight, &ids) * tracked(&dy))
        .sum()
        .backward();
    close(
        "dtable",
        &sums.take_host()[0],
        &host(&weight.grad(&grads).unwrap()),
        1e-6,
    );
}

#[test]
fn rotary_agrees_with_its_composition_and_autodiff() {
    for (heads, head_dim, half) in [(1, 8, 4), (3, 64, 32), (2, 12, 3)] {
        let (positions, frequencies) = (
            [0, 1, 2, 900, 1],
            values(half, 9).iter().map(|f| f.abs()).collect::<Vec<_>>(),
        );
        let table = RotaryTable::new(&positions, &frequencies, &Device::flex());
        let table_autodiff = RotaryTable::new(&positions, &frequencies, &autodiff().into());
        let (x, dy) = (
            matrix(5, heads * head_dim, 10),
            matrix(5, heads * head_dim, 11),
        );
        let y = kernels::rotary(x.clone(), &table, heads);
        close(
            "rotary",
            &host(&y),
            &host(&composition::rotary(x.burn(), &table, heads)),
            1e-6,
        );
        let back = kernels::rotary_backward(y, &table, heads);
        close("turned back", &host(&back), &host(&x), 1e-5);
        let x = leaf(&x);
        let grads = (composition::rotary(x.clone(), &table_autodiff, heads) * tracked(&dy))
            .sum()
            .backward();
        let dx = kernels::rotary_backward(dy, &table, heads);
        close("dx", &host(&dx), &host(&x.grad(&grads).unwrap()), 1e-5);
    }
}

#[test]
fn rotary_turns_halves_and_not_neighbours() {
    let table = RotaryTable::new(&[1], &[std::f32::consts::FRAC_PI_2, 0.0], &Device::flex());
    let y = kernels::rotary(on(&Device::flex(), 1, 4, &[1.0, 2.0, 3.0, 4.0]), &table, 1);
    close("quarter turn", &host(&y), &[-3.0, 2.0, 1.0, 4.0], 1e-6);
}

/// Values in the order of [`ACTIVATIONS`].
#[allow(clippy::excessive_precision)]
const GOLDEN_ACTIVATIONS: [[f32; 5]; 3] = [
    [
        -0.142277620,
        -0.188770334,
        0.000000000,
        0.052497919,
        1.761594156,
    ],
    [
        -0.003637392,
        -0.154285990,
        0.000000000,
        0.053982751,
        1.954597694,
    ],
    [
        -0.004049694,
        -0.154268769,
        0.000000000,
        0.053982784,
        1.954499736,
    ],
];
const ACTIVATIONS: [Activation; 3] = [Activation::Silu, Activation::GeluTanh, Activation::Gelu];

#[test]
fn activations_agree_with_their_composition_and_autodiff() {
    for activation in ACTIVATIONS {
        let scaled = |seed| matrix(9, 33, seed).scale(8.0);
        let (gate, up, dy) = (scaled(12), scaled(13), matrix(9, 33, 14));
        let [gate_burn, up_burn, dy_burn] = [&gate, &up, &dy].map(Tensor::burn);
        let near = |what: &str, found: &Tensor<2>, expected: &Tensor<2>| {
            close(
                &format!("{activation:?} {what}"),
                &host(found),
                &host(expected),
                3e-5,
            );
        };
        let y = kernels::gated(&gate, &up, activation);
        near(
            "gated",
            &y,
            &composition::gated(&gate_burn, &up_burn, activation).into(),
        );
        let y = kernels::activate(&gate, activation);
        near(
            "alone",
            &y,
            &composition::activate(&gate_burn, activation).into(),
        );
        let (dgate, dup) = kernels::gated_backward(&dy, &gate, &up, activation);
        let composed = composition::gated_backward(&dy_burn, &gate_burn, &up_burn, activation);
        near("dgate composed", &composed.0.into(), &dgate);
        near("dup composed", &composed.1.into(), &dup);
        let alone = kernels::activate_backward(&dy, &gate, activation);
        near(
            "dx composed",
            &composition::activate_backward(&dy_burn, &gate_burn, activation).into(),
            &alone,
        );
        let (gate, up) = (leaf(&gate), leaf(&up));
        let grads = (composition::gated(&gate, &up, activation) * tracked(&dy))
            .sum()
            .backward();
        near("dgate", &dgate, &gate.grad(&grads).unwrap().into());
        near("dup", &dup, &up.grad(&grads).unwrap().into());
        let grads = (composition::activate(&gate, activation) * tracked(&dy))
            .sum()
            .backward();
        near("dx", &alone, &gate.grad(&grads).unwrap().into());
    }
}

#[test]
fn activations_agree_with_values_of_torch() {
    // torch 2.15 in f64: silu, gelu(approximate="tanh"), gelu at −3, −0.5, 0, 0.1, 2.
    for (activation, expected) in ACTIVATIONS.into_iter().zip(GOLDEN_ACTIVATIONS) {
        let x = on(&Device::flex(), 1, 5, &[-3.0, -0.5, 0.0, 0.1, 2.0]);
        close(
            &format!("{activation:?}"),
            &host(&kernels::activate(&x, activation)),
            &expected,
            5e-7,
        );
    }
}

#[test]
fn layer_norm_agrees_with_its_composition_and_autodiff() {
    for (rows, width) in [(1, 8), (7, 33), (40, 64)] {
        let (x, weight, bias, dy) = (
            matrix(rows, width, 1).scale(3.0).add_scalar(1.0),
            vector(width, 2),
            vector(width, 3),
            matrix(rows, width, 4),
        );
        let (y, saved) = kernels::layer_norm(&x, &weight, &bias, 1e-5);
        let (composed, mean, inverse) =
            composition::layer_norm(&x.burn(), &weight.burn(), &bias.burn(), 1e-5);
        close("layer norm", &host(&y), &host(&composed), 1e-5);
        let (mut fused, mut reference) = (gradients(2 * width), gradients(2 * width));
        let slot = |offset| Slot {
            bucket: 0,
            offset,
            len: width,
        };
        let slots = [&slot(0), &slot(width)];
        let dx = kernels::layer_norm_backward(&dy, &x, &weight, &saved);
        kernels::layer_norm_backward_weight(&dy, &x, &saved, &mut fused, slots);
        let (x_burn, dy_burn) = (x.burn(), dy.burn());
        let composed =
            composition::layer_norm_backward(&dy_burn, &x_burn, &weight.burn(), &mean, &inverse);
        composition::layer_norm_backward_weight(
            &dy_burn,
            &x_burn,
            &mean,
            &inverse,
            &mut reference,
            slots,
        );
        let (x, weight, bias) = (leaf(&x), leaf(&weight), leaf(&bias));
        let grads = (composition::layer_norm(&x, &weight, &bias, 1e-5).0 * tracked(&dy))
            .sum()
            .backward();
        let oracle = host(&x.grad(&grads).unwrap());
        close("dx", &host(&dx), &oracle, 2e-5);
        close("dx composed", &host(&composed), &oracle, 2e-5);
        let oracle = [
            host(&weight.grad(&grads).unwrap()),
            host(&bias.grad(&grads).unwrap()),
        ];
        close("weights", &fused.take_host()[0], &oracle.concat(), 2e-5);
        close(
            "weights composed",
            &reference.take_host()[0],
            &oracle.concat(),
            2e-5,
        );
    }
}

#[test]
fn heads_come_apart_and_together() {
    // Two heads of two columns: q₀ q₀ k₀ k₀ v₀ v₀ q₁ q₁ …
    let row: Vec<f32> = (0..12).map(|column| column as f32).collect();
    let [queries, keys, values] = kernels::split_heads(&on(&Device::flex(), 1, 12, &row), 2);
    assert_eq!(host(&queries), [0.0, 1.0, 6.0, 7.0]);
    assert_eq!(host(&keys), [2.0, 3.0, 8.0, 9.0]);
    assert_eq!(host(&values), [4.0, 5.0, 10.0, 11.0]);
    let x = matrix(9, 3 * 4 * 5, 1);
    let parts = kernels::split_heads(&x, 4);
    for (fused, composed) in parts.iter().zip(composition::split_heads(&x.burn(), 4)) {
        assert_eq!(host(fused), host(&composed));
    }
    assert_eq!(host(&kernels::join_heads(&parts, 4)), host(&x));
    let parts = parts.each_ref().map(Tensor::burn);
    assert_eq!(host(&composition::join_heads(&parts, 4)), host(&x));
}

#[test]
fn residual_sum_leaves_a_shared_operand_alone() {
    let (a, b) = (matrix(4, 5, 18), matrix(4, 5, 19));
    let before = host(&a);
    let sum = kernels::add(a.clone(), &b);
    assert_eq!(host(&a), before);
    assert_eq!(host(&sum), host(&(a.burn() + b.burn())));
    assert_eq!(host(&kernels::add(a, &b)), host(&sum));
}

#[test]
fn gathered_rows_scatter_back() {
    let (x, rows) = (matrix(6, 4, 20), [5, 1, 1, 0]);
    let picked = kernels::gather_rows(&x, &rows);
    assert_eq!(
        host(&picked),
        host(&composition::gather_rows(&x.burn(), &rows))
    );
    let back = kernels::scatter_add_rows(&picked, &rows, 6);
    close(
        "scatter",
        &host(&back),
        &host(&composition::scatter_add_rows(&picked.burn(), &rows, 6)),
        1e-6,
    );
    assert_eq!(kernels::gather_rows(&x, &[]).dims(), [0, 4]);
}

#[test]
fn the_composed_backwards_agree_with_the_fused_ones() {
    let (x, weight, dy) = (matrix(9, 20, 1), matrix(14, 20, 2), matrix(9, 14, 3));
    let (mut fused, mut composed) = (gradients(280), gradients(280));
    let dx = kernels::linear_backward(&dy, &weight);
    let dx_composed = composition::linear_backward(&dy.burn(), &weight.burn());
    kernels::linear_backward_weight(&dy, &x, &mut fused, &whole(280));
    composition::linear_backward_weight(&dy.burn(), &x.burn(), &mut composed, &whole(280));
    close("linear dx", &host(&dx), &host(&dx_composed), 1e-5);
    close(
        "linear dw",
        &fused.take_host()[0],
        &composed.take_host()[0],
        1e-5,
    );

    let (norm, dy) = (vector(20, 4), matrix(9, 20, 5));
    let (_, saved) = kernels::rms_norm(&x, &norm, 1e-5);
    let (x_burn, norm_burn, dy_burn) = (x.burn(), norm.burn(), dy.burn());
    let (_, inverse) = composition::rms_norm(&x_burn, &norm_burn, 1e-5);
    let (mut fused, mut composed) = (gradients(20), gradients(20));
    let dx = kernels::rms_norm_backward(&dy, &x, &norm, &saved);
    let dx_composed = composition::rms_norm_backward(&dy_burn, &x_burn, &norm_burn, &inverse);
    kernels::rms_norm_backward_weight(&dy, &x, &saved, &mut fused, &whole(20));
    composition::rms_norm_backward_weight(&dy_burn, &x_burn, &inverse, &mut composed, &whole(20));
    close("norm dx", &host(&dx), &host(&dx_composed), 1e-5);
    close(
        "norm dw",
        &fused.take_host()[0],
        &composed.take_host()[0],
        1e-5,
    );

    let (dgate, dup) = kernels::gated_backward(&dy, &x, &dx, Activation::Silu);
    let (dgate_composed, dup_composed) =
        composition::gated_backward(&dy_burn, &x_burn, &dx.burn(), Activation::Silu);
    close("dgate", &host(&dgate), &host(&dgate_composed), 1e-5);
    close("dup", &host(&dup), &host(&dup_composed), 1e-5);

    let ids = [1, 2, 1, 0, 6, 6, 3, 2, 1];
    let (mut fused, mut composed) = (gradients(140), gradients(140));
    kernels::embedding_backward(&dy, &ids, &mut fused, &whole(140));
    composition::embedding_backward(&dy_burn, &ids, &mut composed, &whole(140));
    close(
        "dtable",
        &fused.take_host()[0],
        &composed.take_host()[0],
        1e-5,
    );
}

#[test]
fn operations_on_an_autodiff_device_take_the_composition() {
    let (x, weight) = (leaf(&matrix(3, 4, 1)), leaf(&matrix(5, 4, 2)));
    let product = || kernels::linear(&x.clone().into(), &weight.clone().into());
    let y = kernels::gated(&product(), &product(), Activation::Silu);
    let grads = y.burn().sum().backward();
    assert!(x.grad(&grads).is_some() && weight.grad(&grads).is_some());
}

#[test]
#[should_panic(expected = "columns of x and of the weight")]
fn a_weight_of_another_width_is_refused() {
    kernels::linear(&matrix(2, 3, 1), &matrix(4, 5, 2));
}

#[test]
#[should_panic(expected = "token id 11 in a vocabulary of 11")]
fn an_id_beyond_the_vocabulary_is_refused() {
    kernels::embedding(&matrix(11, 2, 1), &[11]);
}

#[test]
#[should_panic(expected = "row 6 of 6")]
fn a_row_beyond_the_pack_is_refused() {
    kernels::gather_rows(&matrix(6, 2, 1), &[0, 6]);
}
