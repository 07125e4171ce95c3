//! The log-prob head: f32 logits of so many rows as [`gpu_head_rows`] says, by cuBLASLt, and one kernel over them.

use gpu::{Arg, Element, Launch, Program, View};

use super::{done, empty, int, kernel, launch, operands, product, upload_ints};
use crate::head::gpu_head_rows;
use crate::tensor::Array;
use crate::{Gradients, HeadSaved, Slot, Tensor};

struct Head {
    hidden: Array<2>,
    weight: Array<2>,
    /// Rows whose logits are held at once.
    chunk: usize,
    cap: Arg<'static>,
}

impl Head {
    fn new(hidden: &Tensor<2>, weight: &Tensor<2>, soft_cap: Option<f64>) -> Option<Self> {
        let (hidden, weight) = operands(hidden.array()?, weight.array()?);
        let [vocabulary, _] = weight.shape;
        Some(Self {
            hidden,
            weight,
            chunk: gpu_head_rows(vocabulary),
            // 0 is no cap.
            cap: Arg::Float(soft_cap.map_or(0.0, |cap| cap as f32)),
        })
    }

    /// Ranges of rows whose logits are held at once.
    fn chunks(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let ([rows, _], chunk) = (self.hidden.shape, self.chunk);
        (0..rows)
            .step_by(chunk)
            .map(move |start| start..rows.min(start + chunk))
    }

    fn rows(&self, range: &std::ops::Range<usize>) -> View {
        let [_, width] = self.hidden.shape;
        self.hidden
            .view
            .slice(range.start * width..range.end * width)
    }

    fn logits(&self, hidden: &View, rows: usize) -> Array<2> {
        let [vocabulary, width] = self.weight.shape;
        let logits = empty(hidden.gpu(), [rows, vocabulary], Element::F32);
        let shape = [rows, vocabulary, width];
        product(
            shape,
            (hidden, false),
            (&self.weight.view, true),
            &logits.view,
            None,
        );
        logits
    }
}

/// A kernel with a block of 256 threads for each row.
fn by_row(entry: &'static str, element: Element, rows: usize) -> (Program, Launch) {
    (kernel(entry, element, Element::F32), Launch::new(rows, 256))
}

fn targets_of(targets: &[u32]) -> Vec<i32> {
    targets.iter().map(|&id| id as i32).collect()
}

/// Log-probs of the targets, and what the backward needs.
pub(crate) fn logprob_head(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    soft_cap: Option<f64>,
) -> Option<(Vec<f32>, HeadSaved)> {
    let head = Head::new(hidden, weight, soft_cap)?;
    let (rows, gpu) = (targets.len(), head.hidden.view.gpu());
    let targets = upload_ints(gpu, &targets_of(targets));
    // Log-probs and log-sum-exps behind them: one copy brings both.
    let found = empty(gpu, [2, rows], Element::F32).view;
    for range in head.chunks() {
        let logits = head.logits(&head.rows(&range), range.len());
        let (program, blocks) = by_row("head_logprobs", Element::F32, range.len());
        launch(
            gpu,
            &program,
            blocks,
            &[
                Arg::View(&logits.view),
                Arg::View(&targets.slice(range.clone())),
                Arg::View(&found.slice(range.clone())),
                Arg::View(&found.slice(rows + range.start..rows + range.end)),
                int(head.weight.shape[0]),
                head.cap,
            ],
        );
    }
    let mut logps: Vec<f32> = done(found.download());
    let lse = logps.split_off(rows);
    Some((logps, HeadSaved { lse }))
}

/// The gradient of `hidden`, adding the weight's where `sums` says; `sums` back if this is not the device's.
#[allow(
    clippy::type_complexity,
    reason = "the error is an operand, handed back"
)]
pub(crate) fn logprob_head_backward<'a>(
    dlogps: &[f32],
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    soft_cap: Option<f64>,
    saved: &HeadSaved,
    sums: Option<(&'a mut Gradients, &'a Slot)>,
) -> Result<Tensor<2>, Option<(&'a mut Gradients, &'a Slot)>> {
    let Some(head) = Head::new(hidden, weight, soft_cap) else {
        return Err(sums);
    };
    let ([vocabulary, width], gpu) = (head.weight.shape, head.hidden.view.gpu());
    let sums = sums.map(|(gradients, slot)| {
        let sums = gradients.array(slot);
        sums.expect("gradients lie where the weight lies").view
    });
    let targets = upload_ints(gpu, &targets_of(targets));
    let [lses, dlogps] =
        [&saved.lse[..], dlogps].map(|values| done(View::upload(gpu, values, Element::F32)));
    let element = head.hidden.view.element();
    let dhidden = empty(gpu, head.hidden.shape, element);
    for range in head.chunks() {
        let (rows, own) = (range.len(), head.rows(&range));
        let logits = head.logits(&own, rows);
        let dlogits = empty(gpu, [rows, vocabulary], element);
        let (program, blocks) = by_row("head_gradients", element, rows);
        launch(
            gpu,
            &program,
            blocks,
            &[
                Arg::View(&logits.view),
                Arg::View(&targets.slice(range.clone())),
                Arg::View(&lses.slice(range.clone())),
                Arg::View(&dlogps.slice(range.clone())),
                Arg::View(&dlogits.view),
                int(vocabulary),
                head.cap,
            ],
        );
        let out = dhidden.view.slice(range.start * width..range.end * width);
        let shape = [rows, width, vocabulary];
        product(
            shape,
            (&dlogits.view, false),
            (&head.weight.view, false),
            &out,
            None,
        );
        if let Some(sums) = &sums {
            let shape = [vocabulary, width, rows];
            product(
                shape,
                (&dlogits.view, true),
                (&own, false),
                sums,
                Some(sums),
            );
        }
    }
    Ok(dhidden.into())
}
