//! The optimizer's kernels, `optimizer.cu`.

use std::ops::Range;

use gpu::{Arg, Element, Gpu, Launch, Program, View};

use super::{THREADS, done, each, empty, int, launch, long};
use crate::optimizer::{Kept, UpdateRule};
use crate::{Device, Flat, Rounding, Tensor};

const SOURCE: &str = include_str!("optimizer.cu");
/// Blocks of a sum: enough to fill a device, the same for every length.
const SQUARES_BLOCKS: usize = 1024;

/// Compiles, or finds compiled, what this file launches: one text.
pub(crate) fn prepare_update(gpu: &Gpu) {
    done(gpu.prepare(&Program::plain(SOURCE, "squares")));
}

/// Σx² over parts of a gradient.
pub(crate) fn sum_of_squares(
    device: &Device,
    parts: impl IntoIterator<Item = Tensor<1>>,
) -> Option<f64> {
    let gpu = device.gpu()?;
    let doubles = |count: usize| empty(gpu, [2 * count], Element::F32).view;
    let (partial, total) = (doubles(SQUARES_BLOCKS), doubles(1));
    done(total.clear());
    for part in parts {
        let part = &part.array().expect("a gradient on a GPU").view;
        if part.is_empty() {
            continue;
        }
        launch(
            gpu,
            &Program::plain(SOURCE, "squares"),
            Launch::new(SQUARES_BLOCKS, THREADS),
            &[Arg::View(part), Arg::View(&partial), long(part.len())],
        );
        launch(
            gpu,
            &Program::plain(SOURCE, "squares_total"),
            Launch::new(1, THREADS),
            &[Arg::View(&partial), Arg::View(&total), int(SQUARES_BLOCKS)],
        );
    }
    Some(done(total.download::<f64>())[0])
}

/// sums += part.
pub(crate) fn add_to(sums: &Tensor<1>, part: &Tensor<1>) -> Option<()> {
    let (sums, part) = (&sums.array()?.view, &part.array()?.view);
    let len = sums.len();
    assert_lengths(&[sums, part], len);
    if len > 0 {
        launch(
            sums.gpu(),
            &Program::plain(SOURCE, "add_to"),
            each(len),
            &[Arg::View(sums), Arg::View(part), long(len)],
        );
    }
    Some(())
}

/// `weights` as operands of bf16.
pub(crate) fn rounded(weights: &Tensor<1>, rounding: Rounding) -> Option<Tensor<1>> {
    let weights = weights.array()?;
    let out = weights.like(Element::Bf16);
    let len = weights.view.len();
    if len > 0 {
        let [dithered, first] = arguments(rounding);
        launch(
            out.view.gpu(),
            &Program::plain(SOURCE, "rounded"),
            each(len),
            &[
                Arg::View(&weights.view),
                Arg::View(&out.view),
                long(len),
                dithered,
                first,
            ],
        );
    }
    Some(out.into())
}

/// What the kernels are told of a rounding.
fn arguments(rounding: Rounding) -> [Arg<'static>; 2] {
    let (dithered, first) = match rounding {
        Rounding::Nearest => (0, 0),
        Rounding::Dithered { first } => (1, first),
    };
    [Arg::Int(dithered), Arg::Int(first.cast_signed())]
}

/// Moves elements `range` of a bucket.
pub(crate) fn update(
    weights: &Flat,
    bucket: usize,
    range: &Range<usize>,
    gradient: &Tensor<1>,
    kept: Kept<'_>,
    clip: f32,
    rule: &UpdateRule,
) -> Option<()> {
    let rounding = arguments(weights.rounding(bucket, range.start));
    let (weights, operands) = match kept.masters {
        None => weights.arrays(bucket, range)?,
        Some(masters) => {
            let operands = weights.operand_array(bucket, range);
            (masters.array()?.view.clone(), operands)
        }
    };
    let gradient = gradient.array()?.view.clone();
    let second = &kept.second.array()?.view;
    let (gpu, len) = (gradient.gpu(), range.len());
    let half = operands
        .as_ref()
        .filter(|view| view.element() == Element::Bf16);
    let operands = half.map_or(Arg::Null, Arg::View);
    match *rule {
        UpdateRule::AdamW {
            keep_first,
            add_first,
            keep_second,
            add_second,
            step_size,
            root_correction,
            eps,
            keep_weight,
        } => {
            let first = &kept.first?.array()?.view;
            let views = [&weights, first, second, &gradient];
            assert_lengths(&views, len);
            let mut arguments = views.map(Arg::View).to_vec();
            arguments.extend([operands, long(len)]);
            arguments.extend(rounding);
            arguments.extend(
                [
                    clip,
                    keep_first,
                    add_first,
                    keep_second,
                    add_second,
                    step_size,
                    root_correction,
                    eps,
                    keep_weight,
                ]
                .map(Arg::Float),
            );
            launch(gpu, &Program::plain(SOURCE, "adamw"), each(len), &arguments);
        }
        UpdateRule::RmsProp {
            keep,
            add,
            step_size,
            eps,
        } => {
            let views = [&weights, second, &gradient];
            assert_lengths(&views, len);
            let mut arguments = views.map(Arg::View).to_vec();
            arguments.extend([operands, long(len)]);
            arguments.extend(rounding);
            arguments.extend([clip, keep, add, step_size, eps].map(Arg::Float));
            launch(
                gpu,
                &Program::plain(SOURCE, "rmsprop"),
                each(len),
                &arguments,
            );
        }
    }
    Some(())
}

fn assert_lengths(views: &[&View], len: usize) {
    for view in views {
        assert_eq!(view.len(), len, "elements of a stretch");
        assert_eq!(view.element(), Element::F32, "masters and moments");
    }
}
