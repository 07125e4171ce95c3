//! Flat weights and gradients: views and round trips without copies, sums that add up, refusals.

#![allow(clippy::unwrap_used)]

mod support;

use std::convert::Infallible;

use kernels::{Device, Flat, Gradients, Precision, Rounding, Slot, Tensor};
use support::{autodiff, host, values, whole};

#[test]
fn views_show_the_slot_in_the_asked_shape() {
    let flat = Flat::from_host(
        vec![vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], vec![7.0]],
        Precision::F32,
        &Device::flex(),
    );
    let view = flat.view(
        &Slot {
            bucket: 0,
            offset: 1,
            len: 6,
        },
        [2, 3],
    );
    assert_eq!(view.dims(), [2, 3]);
    assert_eq!(host(&view), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(
        host(&flat.view(
            &Slot {
                bucket: 1,
                offset: 0,
                len: 1
            },
            [1]
        )),
        [7.0]
    );
}

#[test]
fn weights_travel_to_the_host_and_back_without_a_copy() {
    let weights = vec![values(5000, 1), values(300, 2)];
    let places = |buckets: &[Vec<f32>]| buckets.iter().map(Vec::as_ptr).collect::<Vec<_>>();
    let (before, expected) = (places(&weights), weights.clone());
    let mut flat = Flat::from_host(weights, Precision::F32, &Device::flex());
    drop(flat.view(
        &Slot {
            bucket: 0,
            offset: 8,
            len: 16,
        },
        [4, 4],
    ));
    for _ in 0..2 {
        let taken = flat.take_host();
        assert_eq!(places(&taken), before);
        assert_eq!(taken, expected);
        flat.put_host(taken);
    }
}

/// The nearest values of bf16.
fn rounded(values: &[f32]) -> Vec<f32> {
    let values = Tensor::new(values.to_vec(), [values.len()], &Device::flex());
    host(&Precision::Bf16.operand(&values))
}

#[test]
fn weights_whose_masters_are_elsewhere_are_operands_and_what_is_narrow_in_f32() {
    let weights = vec![values(40, 1), values(12, 2)];
    let narrow = [vec![4..10, 30..40], vec![0..5, 5..12]];
    let whole = Flat::from_host(weights.clone(), Precision::Bf16, &Device::flex());
    let slot = |bucket, offset, len| Slot {
        bucket,
        offset,
        len,
    };
    let matrix = slot(0, 10, 20);
    let operand = host(&whole.operand(&matrix, [4, 5]));
    let mut parted = Flat::from_host(weights.clone(), Precision::Bf16, &Device::flex());
    let masters = parted.take_masters(&narrow);
    let read = || weights.iter().cloned().map(Ok::<_, Infallible>);
    let Ok(parked) = Flat::parked(read(), &narrow, &Device::flex());
    let Ok(frozen) = Flat::frozen(read(), &narrow, &Device::flex());
    for flat in [&parted, &parked, &frozen] {
        assert!(!flat.is_whole() && flat.narrow_len() == 28);
        assert_eq!(host(&flat.operand(&matrix, [4, 5])), operand);
        for (asked, expected) in [
            (slot(0, 4, 6), &weights[0][4..10]),
            (slot(0, 33, 5), &weights[0][33..38]),
            (slot(1, 6, 6), &weights[1][6..]),
            (slot(1, 0, 5), &weights[1][..5]),
        ] {
            assert_eq!(host(&flat.view(&asked, [asked.len])), expected);
        }
        let refused = std::panic::catch_unwind(|| host(&flat.view(&matrix, [20])));
        assert!(refused.is_err(), "f32 of a matrix is elsewhere");
    }
    assert_eq!(parked.master(&matrix), weights[0][10..30]);
    // Weights whose values are of bf16 are their operands.
    let even: Vec<Vec<f32>> = weights.iter().map(|bucket| rounded(bucket)).collect();
    let Ok(mut parked) = Flat::parked(
        even.iter().cloned().map(Ok::<_, Infallible>),
        &narrow,
        &Device::flex(),
    );
    assert_eq!(parked.master(&matrix), even[0][10..30]);
    let taken = parked.take_masters(&narrow);
    assert_eq!(taken.iter().map(host).collect::<Vec<_>>(), even);
    parked.put_masters(taken);
    assert!(parked.is_whole());
    assert_eq!(parked.take_host(), even);
    let refused = std::panic::catch_unwind(|| frozen.master(&matrix));
    assert!(refused.is_err(), "nobody has the masters");
    // New values, as they come from all ranks.
    let moved: Vec<f32> = weights[0].iter().map(|value| 3.0 * value).collect();
    let mut bits = vec![0; 40];
    Rounding::Nearest.to_bf16(&moved, &mut bits);
    parted.put_operands(0, &bits);
    let mut collected = vec![0.0; 28];
    parted.collect_narrow(0, &(8..35), &moved[8..35], &mut collected);
    assert_eq!(collected[4..11], [&moved[8..10], &moved[30..35]].concat());
    assert!(
        collected[..4]
            .iter()
            .chain(&collected[11..])
            .all(|it| *it == 0.0)
    );
    parted.put_narrow(collected.clone());
    assert_eq!(
        parted.computed(0),
        [&rounded(&moved)[..], &collected[..16]].concat()
    );
    parted.put_masters(masters);
    assert!(parted.is_whole());
    assert_eq!(host(&parted.operand(&matrix, [4, 5])), operand);
    assert_eq!(parted.take_host(), weights);
}

/// Values of bf16, and the same moved by less than half of bf16's step.
fn even_and_moved(len: usize) -> [Vec<f32>; 2] {
    let even = rounded(&values(len, 1));
    let moved = even.iter().map(|value| value * (1.0 + 1.0 / 2048.0));
    [even.clone(), moved.collect()]
}

#[test]
fn small_moves_of_weights_on_the_grid_of_bf16_show_in_the_mean_of_their_operands() {
    let mean = |values: &[f32]| {
        let magnitudes = values.iter().map(|value| f64::from(value.abs()));
        magnitudes.sum::<f64>() / values.len() as f64
    };
    let [even, moved] = even_and_moved(50_000);
    let step = mean(&moved) - mean(&even);
    assert_eq!(
        rounded(&moved),
        even,
        "to the nearest there is nothing of it"
    );
    let mut flat = Flat::from_host(vec![even.clone()], Precision::Bf16, &Device::flex());
    let operands = |flat: &Flat| host(&flat.operand(&whole(50_000), [50_000]));
    assert_eq!(operands(&flat), even);
    drop(flat.take_host());
    flat.put_host(vec![moved.clone()]);
    let seen = mean(&operands(&flat)) - mean(&even);
    assert!((seen / step - 1.0).abs() < 0.05, "{seen} of {step}");
    // Of weights that lie anywhere the nearest have it, with less noise.
    let uneven: Vec<f32> = values(50_000, 1)
        .iter()
        .map(|value| value * 0.987_654_3)
        .collect();
    let moved: Vec<f32> = uneven
        .iter()
        .map(|value| value * (1.0 + 1.0 / 2048.0))
        .collect();
    let mut flat = Flat::from_host(vec![uneven.clone()], Precision::Bf16, &Device::flex());
    assert_eq!(operands(&flat), rounded(&uneven));
    drop(flat.take_host());
    flat.put_host(vec![moved.clone()]);
    assert_eq!(operands(&flat), rounded(&moved));
}

#[test]
fn dithered_operands_are_the_same_however_they_are_made() {
    let [even, moved] = even_and_moved(40);
    let narrow = [vec![4..10, 30..40]];
    let read = || [even.clone()].into_iter().map(Ok::<_, Infallible>);
    let mut whole = Flat::from_host(vec![even.clone()], Precision::Bf16, &Device::flex());
    let Ok(parked) = Flat::parked(read(), &narrow, &Device::flex());
    let Ok(frozen) = Flat::frozen(read(), &narrow, &Device::flex());
    drop(whole.take_host());
    whole.put_host(vec![moved.clone()]);
    drop(whole.take_masters(&narrow));
    let expected = whole.computed(0)[..40].to_vec();
    assert!(expected != even && expected != moved);
    for mut flat in [parked, frozen] {
        assert_eq!(flat.computed(0)[..40], even);
        // As ranks make theirs.
        let mut bits = [0; 40];
        for range in [0..13, 13..40] {
            let rounding = flat.rounding(0, range.start);
            rounding.to_bf16(&moved[range.clone()], &mut bits[range]);
        }
        flat.put_operands(0, &bits);
        assert_eq!(flat.computed(0)[..40], expected);
    }
    let mut whole = Flat::from_host(vec![even], Precision::F32, &Device::flex());
    drop(whole.take_host());
    whole.put_host(vec![moved]);
    whole.set_precision(Precision::Bf16);
    drop(whole.take_masters(&narrow));
    assert_eq!(whole.computed(0)[..40], expected);
}

#[test]
fn a_view_outlives_taking_the_weights() {
    let mut flat = Flat::from_host(vec![values(64, 3)], Precision::F32, &Device::flex());
    let view = flat.view(&whole(64), [8, 8]);
    let taken = flat.take_host();
    assert_eq!(host(&view), taken[0]);
}

#[test]
fn gradients_add_up_inside_their_slot_only() {
    let mut sums = Gradients::zeros(&[6, 2], &Device::flex());
    let slot = Slot {
        bucket: 0,
        offset: 2,
        len: 3,
    };
    for _ in 0..2 {
        sums.accumulate(
            &slot,
            Tensor::new(vec![1.0, 2.0, 3.0], [3], &Device::flex()),
        );
    }
    let taken = sums.take_host();
    assert_eq!(taken, [vec![0.0, 0.0, 2.0, 4.0, 6.0, 0.0], vec![0.0, 0.0]]);
    for (bucket, values) in taken.into_iter().enumerate() {
        sums.put(bucket, values);
    }
    sums.zero();
    assert_eq!(sums.take_host(), [vec![0.0; 6], vec![0.0; 2]]);
}

#[test]
fn gradients_on_another_device_add_up_the_same() {
    let device = autodiff().into();
    let mut sums = Gradients::zeros(&[6], &device);
    let slot = Slot {
        bucket: 0,
        offset: 1,
        len: 2,
    };
    for _ in 0..3 {
        sums.accumulate(&slot, Tensor::new(vec![1.0, -1.0], [2], &device));
    }
    let taken = sums.take_host();
    assert_eq!(taken, [vec![0.0, 3.0, -3.0, 0.0, 0.0, 0.0]]);
    for (bucket, values) in taken.into_iter().enumerate() {
        sums.put(bucket, values);
    }
    sums.zero();
    assert_eq!(sums.take_host(), [vec![0.0; 6]]);
}

#[test]
fn a_backward_adds_to_what_is_there() {
    let (dy, x) = (support::matrix(4, 3, 1), support::matrix(4, 5, 2));
    let slot = Slot {
        bucket: 0,
        offset: 7,
        len: 15,
    };
    let once = |times: usize| {
        let mut sums = Gradients::zeros(&[30], &Device::flex());
        for _ in 0..times {
            kernels::linear_backward_weight(&dy, &x, &mut sums, &slot);
        }
        sums.take_host().remove(0)
    };
    let (one, two) = (once(1), once(2));
    support::close(
        "sums",
        &two,
        &one.iter().map(|value| 2.0 * value).collect::<Vec<_>>(),
        1e-6,
    );
    assert!(one[..7].iter().chain(&one[22..]).all(|&value| value == 0.0));
}

#[test]
#[should_panic(expected = "in a bucket of 4")]
fn a_slot_beyond_its_bucket_is_refused() {
    Flat::from_host(vec![vec![0.0; 4]], Precision::F32, &Device::flex()).view(
        &Slot {
            bucket: 0,
            offset: 3,
            len: 2,
        },
        [2],
    );
}

#[test]
#[should_panic(expected = "taken and not put back")]
fn adding_to_taken_gradients_is_refused() {
    let mut sums = Gradients::zeros(&[4], &Device::flex());
    sums.take_host();
    sums.accumulate(&whole(4), Tensor::zeros([4], &Device::flex()));
}

#[test]
#[should_panic(expected = "length of a gradient bucket")]
fn buckets_of_other_lengths_are_refused() {
    Gradients::zeros(&[4], &Device::flex()).put(0, vec![0.0; 5]);
}

#[test]
fn buckets_that_are_split_off_add_up_apart_and_join_again() {
    for device in [Device::flex(), autodiff().into()] {
        let mut sums = Gradients::zeros(&[1, 2, 3], &device);
        let mut part = sums.split([2, 0]);
        let one = |len: usize| Tensor::new(vec![1.0; len], [len], &device);
        let whole = |bucket: usize| Slot {
            bucket,
            offset: 0,
            len: bucket + 1,
        };
        part.accumulate(&whole(0), one(1));
        part.accumulate(&whole(2), one(3));
        sums.accumulate(&whole(1), one(2));
        sums.join(part);
        sums.accumulate(&whole(2), one(3));
        assert_eq!(sums.take_host(), [vec![1.0; 1], vec![1.0; 2], vec![2.0; 3]]);
    }
}

#[test]
#[should_panic(expected = "taken and not put back")]
fn adding_to_a_bucket_that_is_elsewhere_is_refused() {
    let mut sums = Gradients::zeros(&[4, 4], &Device::flex());
    let mut part = sums.split([1]);
    part.accumulate(&whole(4), Tensor::zeros([4], &Device::flex()));
}
