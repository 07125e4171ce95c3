//! The optimizer's kernels, `optimizer.cu`.

use std::ops::Range;

use gpu::{Arg, Element, Gpu, Launch, Program, View};

use super::{THREADS, done, each, empty, int, launch, long};
use crate::optimizer::UpdateRule;
use crate::{Flat, Gradients, Tensor};

const SOURCE: &str = include_str!("optimizer.cu");
/// Blocks of a sum: enough to fill a device, the same for every length.
const SQUARES_BLOCKS: usize = 1024;

/// Compiles, or finds compiled, what this file launches: one text.
pub(crate) fn prepare_update(gpu: &Gpu) {
    done(gpu.prepare(&Program::plain(SOURCE, "squares")));
}

/// Σx² over a range of each bucket.
pub(crate) fn sum_of_squares(
    gradients: &Gradients,
    ranges: impl IntoIterator<Item = Range<usize>>,
) -> Option<f64> {
    let gpu = gradients.device().gpu()?;
    let doubles = |count: usize| empty(gpu, [2 * count], Element::F32).view;
    let (partial, total) = (doubles(SQUARES_BLOCKS), doubles(1));
    done(total.clear());
    for (bucket, range) in gradients.arrays().zip(ranges) {
        let part = bucket.view.slice(range);
        if part.is_empty() {
            continue;
        }
        launch(
            gpu,
            &Program::plain(SOURCE, "squares"),
            Launch::new(SQUARES_BLOCKS, THREADS),
            &[Arg::View(&part), Arg::View(&partial), long(part.len())],
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

/// Moves elements `range` of a bucket.
pub(crate) fn update(
    weights: &Flat,
    bucket: usize,
    range: Range<usize>,
    gradients: &Gradients,
    (first, second): (Option<&Tensor<1>>, &Tensor<1>),
    clip: f32,
    rule: &UpdateRule,
) -> Option<()> {
    let (weights, operands) = weights.arrays(bucket, &range)?;
    let gradient = gradients.arrays().nth(bucket)?.view.slice(range.clone());
    let second = &second.array()?.view;
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
            let first = &first?.array()?.view;
            let views = [&weights, first, second, &gradient];
            assert_lengths(&views, len);
            let mut arguments = views.map(Arg::View).to_vec();
            arguments.extend([operands, long(len)]);
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
