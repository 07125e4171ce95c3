//! Sums over rows: the gradients of biases and of the weights of norms, in slices that are added up in one order.

use gpu::{Arg, Element, Launch};

use super::{each, empty, int, kernel, launch};
use crate::tensor::Array;
use crate::{Gradients, Slot, Tensor};

/// Rows of a slice of a column sum: enough slices to fill a device, few enough to add up.
const SLICE_ROWS: usize = 256;

/// What a column sum multiplies a gradient by: the normalised rows.
pub(super) struct Normal<'a> {
    pub x: &'a Array<2>,
    pub mean: Option<&'a Array<2>>,
    pub inverse: &'a Array<2>,
}

/// Adds the column sums of `dy`.
pub(crate) fn bias_backward(dy: &Tensor<2>, gradients: &mut Gradients, slot: &Slot) -> Option<()> {
    column_sums(dy.array()?, None, gradients, slot)
}

/// Adds Σ dy · (x − mean) · inverse over rows, or Σ dy.
pub(super) fn column_sums(
    dy: &Array<2>,
    normal: Option<&Normal<'_>>,
    gradients: &mut Gradients,
    slot: &Slot,
) -> Option<()> {
    let ([rows, width], gpu) = (dy.shape, dy.gpu());
    let sums = gradients.array(slot)?;
    let slices = rows.div_ceil(SLICE_ROWS);
    let partial = empty(gpu, [slices, width], Element::F32);
    let element = normal.map_or(Element::F32, |it| it.x.element());
    let (mut x, mut mean, mut inverse) = (Arg::Null, Arg::Null, Arg::Null);
    if let Some(normal) = normal {
        x = Arg::View(&normal.x.view);
        mean = normal.mean.map_or(Arg::Null, |mean| Arg::View(&mean.view));
        inverse = Arg::View(&normal.inverse.view);
    }
    let blocks = Launch {
        blocks: [width.div_ceil(32), slices, 1],
        threads: 256,
        shared: 0,
    };
    launch(
        gpu,
        &kernel("column_sums", element, dy.element()),
        blocks,
        &[
            Arg::View(&dy.view),
            x,
            mean,
            inverse,
            Arg::View(&partial.view),
            int(rows),
            int(width),
            int(SLICE_ROWS),
        ],
    );
    launch(
        gpu,
        &kernel("column_sums_add", Element::F32, Element::F32),
        each(width),
        &[
            Arg::View(&partial.view),
            Arg::View(&sums.view),
            int(slices),
            int(width),
        ],
    );
    Some(())
}
