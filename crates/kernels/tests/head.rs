//! The log-prob head: against the composition, autodiff and f64; odd rows and targets.

#![allow(clippy::unwrap_used)]

mod support;

use kernels::{Device, Tensor, composition, logprob_head, logprob_head_backward};
use support::{close, gradients, host, leaf, matrix, tracked, values, whole};

fn targets(rows: usize, vocabulary: usize) -> Vec<u32> {
    (0..rows)
        .map(|row| ((row * 7919 + vocabulary - 1) % vocabulary) as u32)
        .collect()
}

#[test]
fn log_probs_and_gradients_agree_with_composition_and_autodiff() {
    for ((rows, width, vocabulary), soft_cap) in [
        ((1, 8, 30), None),
        ((5, 16, 1025), None),
        ((70, 12, 2500), None),
        ((600, 4, 40), None),
        ((5, 16, 1025), Some(2.0)),
        ((70, 12, 2500), Some(1.5)),
    ] {
        let (hidden, weight) = (
            matrix(rows, width, 1).scale(4.0),
            matrix(vocabulary, width, 2),
        );
        let (targets, dlogps) = (targets(rows, vocabulary), values(rows, 3));
        let (logps, saved) = logprob_head(&hidden, &weight, &targets, soft_cap);
        let (hidden_burn, weight_burn) = (hidden.burn(), weight.burn());
        let (composed, lse) =
            composition::logprob_head(&hidden_burn, &weight_burn, &targets, soft_cap);
        close("log-probs", &logps, &composed, 1e-5);
        let len = vocabulary * width;
        let (mut fused, mut reference) = (gradients(len), gradients(len));
        let dhidden = logprob_head_backward(
            &dlogps,
            &hidden,
            &weight,
            &targets,
            soft_cap,
            &saved,
            Some((&mut fused, &whole(len))),
        );
        let dhidden_composed = composition::logprob_head_backward(
            &dlogps,
            &hidden_burn,
            &weight_burn,
            &targets,
            soft_cap,
            &lse,
            Some((&mut reference, &whole(len))),
        );
        let (hidden, weight) = (leaf(&hidden), leaf(&weight));
        let dlogp = tracked(&Tensor::new(dlogps, [rows], &Device::flex()));
        let grads = (composition::token_logprobs(&hidden, &weight, &targets, soft_cap).0 * dlogp)
            .sum()
            .backward();
        let (dh, dw) = (
            host(&hidden.grad(&grads).unwrap()),
            host(&weight.grad(&grads).unwrap()),
        );
        close("dhidden", &host(&dhidden), &dh, 2e-5);
        close("dhidden composed", &host(&dhidden_composed), &dh, 2e-5);
        close("dweight", &fused.take_host()[0], &dw, 5e-5);
        close("dweight composed", &reference.take_host()[0], &dw, 5e-5);
    }
}

#[test]
fn log_probs_agree_with_f64_even_for_large_logits() {
    let (rows, width, vocabulary) = (6, 32, 3000);
    let (hidden, weight) = (
        matrix(rows, width, 4).scale(40.0),
        matrix(vocabulary, width, 5),
    );
    let targets = targets(rows, vocabulary);
    let (logps, _) = logprob_head(&hidden, &weight, &targets, None);
    let (hidden, weight) = (host(&hidden), host(&weight));
    for row in 0..rows {
        let logits: Vec<f64> = (0..vocabulary)
            .map(|id| {
                (0..width)
                    .map(|i| f64::from(hidden[row * width + i]) * f64::from(weight[id * width + i]))
                    .sum()
            })
            .collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exact = logits[targets[row] as usize]
            - max
            - logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        // f32 logits near 100 are rounded to about 1e-5 each.
        assert!(
            (f64::from(logps[row]) - exact).abs() < 1e-4,
            "row {row}: {}, expected {exact}",
            logps[row]
        );
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let (rows, width, vocabulary) = (3, 5, 9);
    let (hidden, weight) = (values(rows * width, 6), matrix(vocabulary, width, 7));
    let (targets, dlogps) = (targets(rows, vocabulary), values(rows, 8));
    let tensor = |values: &[f32]| support::on(&Device::flex(), rows, width, values);
    let (_, saved) = logprob_head(&tensor(&hidden), &weight, &targets, None);
    let mut sums = gradients(vocabulary * width);
    let slot = whole(vocabulary * width);
    let dhidden = logprob_head_backward(
        &dlogps,
        &tensor(&hidden),
        &weight,
        &targets,
        None,
        &saved,
        Some((&mut sums, &slot)),
    );
    for (i, &got) in host(&dhidden).iter().enumerate() {
        let loss = |step: f32| {
            let mut moved = hidden.clone();
            moved[i] += step;
            let (logps, _) = logprob_head(&tensor(&moved), &weight, &targets, None);
            logps
                .iter()
                .zip(&dlogps)
                .map(|(&l, &d)| f64::from(l) * f64::from(d))
                .sum::<f64>()
        };
        let slope = (loss(1e-2) - loss(-1e-2)) / 2e-2;
        assert!(
            (f64::from(got) - slope).abs() < 1e-3,
            "{i}: {got}, expected {slope}"
        );
    }
}

#[test]
fn a_head_without_rows_gives_nothing() {
    let (hidden, weight) = (Tensor::zeros([0, 4], &Device::flex()), matrix(10, 4, 1));
    let (logps, saved) = logprob_head(&hidden, &weight, &[], None);
    assert!(logps.is_empty());
    let mut sums = gradients(40);
    let dhidden = logprob_head_backward(
        &[],
        &hidden,
        &weight,
        &[],
        None,
        &saved,
        Some((&mut sums, &whole(40))),
    );
    assert_eq!(dhidden.dims(), [0, 4]);
    assert_eq!(sums.take_host()[0], vec![0.0; 40]);
}

#[test]
fn a_hidden_state_that_is_not_a_number_is_not_hidden() {
    let (hidden, weight) = (
        Tensor::new(vec![f32::NAN; 8], [2, 4], &Device::flex()),
        matrix(10, 4, 1),
    );
    let (logps, _) = logprob_head(&hidden, &weight, &[1, 2], None);
    assert!(logps.iter().all(|logp| logp.is_nan()), "{logps:?}");
}

#[test]
#[should_panic(expected = "target 10 in a vocabulary of 10")]
fn a_target_beyond_the_vocabulary_is_refused() {
    logprob_head(&matrix(1, 4, 1), &matrix(10, 4, 2), &[10], None);
}
