//! What is done to a row head by head before attention: moved apart, and turned.

use gpu::{Arg, Element, View};

use super::{done, each, empty, int, kernel, launch, long, typed, upload_ints};
use crate::tensor::Array;
use crate::{Device, RotaryTable, Tensor};

/// Queries, keys and values that lie head by head, apart.
pub(crate) fn split_heads(x: &Tensor<2>, heads: usize) -> Option<[Tensor<2>; 3]> {
    let x = x.array()?;
    let [rows, width] = x.shape;
    let parts = [0, 1, 2].map(|part| {
        let out = empty(x.gpu(), [rows, width / 3], x.element());
        move_heads("split_heads", &x.view, &out, heads, part);
        Tensor::from(out)
    });
    Some(parts)
}

/// The inverse of [`split_heads`].
pub(crate) fn join_heads(parts: &[Tensor<2>; 3], heads: usize) -> Option<Tensor<2>> {
    let [queries, keys, values] = parts.each_ref().map(Tensor::array);
    let (queries, keys, values) = (queries?, keys?, values?);
    let [rows, width] = queries.shape;
    let element = queries.element().max(keys.element()).max(values.element());
    let out = empty(queries.gpu(), [rows, 3 * width], element);
    for (part, from) in [queries, keys, values].into_iter().enumerate() {
        move_heads("join_heads", &out.view, &typed(from, element), heads, part);
    }
    Some(out.into())
}

/// Moves a third of `whole` to or from `part`, head by head.
fn move_heads(entry: &'static str, whole: &View, part: &Array<2>, heads: usize, index: usize) {
    let len = part.view.len();
    launch(
        part.gpu(),
        &kernel(entry, part.element(), Element::F32),
        each(len),
        &[
            Arg::View(whole),
            Arg::View(&part.view),
            long(len),
            int(part.shape[1] / heads),
            int(index),
        ],
    );
}

/// cos and sin of every row, computed where they are needed.
pub(crate) fn rotary_table<'a>(
    positions: &[u32],
    columns: usize,
    frequencies: &dyn Fn(usize) -> &'a [f32],
    factor: f32,
    device: &Device,
) -> Option<RotaryTable> {
    let gpu = device.gpu()?;
    let rows = positions.len();
    // Few lists serve all rows: one, or one for each kind of length.
    let (mut lists, mut values, mut of_rows) = (Vec::new(), Vec::new(), Vec::with_capacity(rows));
    for row in 0..rows {
        let list = frequencies(row);
        assert_eq!(list.len(), columns, "frequencies of row {row}");
        let known = lists.iter().position(|&known| known == list.as_ptr());
        of_rows.push(known.unwrap_or(lists.len()) as i32);
        if known.is_none() {
            lists.push(list.as_ptr());
            values.extend_from_slice(list);
        }
    }
    let positions: Vec<i32> = positions.iter().map(|&position| position as i32).collect();
    let (positions, of_rows) = (upload_ints(gpu, &positions), upload_ints(gpu, &of_rows));
    let values = done(View::upload(gpu, &values, Element::F32));
    let [cos, sin] = [0, 1].map(|_| empty(gpu, [rows, columns], Element::F32));
    launch(
        gpu,
        &kernel("rotary_table", Element::F32, Element::F32),
        each(rows * columns),
        &[
            Arg::View(&positions),
            Arg::View(&of_rows),
            Arg::View(&values),
            Arg::View(&cos.view),
            Arg::View(&sin.view),
            int(rows),
            int(columns),
            Arg::Float(factor),
        ],
    );
    Some(RotaryTable {
        cos: cos.into(),
        sin: sin.into(),
    })
}

/// Turns every head; in place when nothing else holds `x`.
pub(crate) fn rotary(
    x: &Tensor<2>,
    table: &RotaryTable,
    heads: usize,
    sign: f32,
) -> Option<Tensor<2>> {
    let (x, cos, sin) = (x.array()?, table.cos.array()?, table.sin.array()?);
    let ([rows, width], [_, half]) = (x.shape, cos.shape);
    let head_dim = width / heads;
    let out = if x.view.is_unique() {
        x.clone()
    } else {
        x.like(x.element())
    };
    launch(
        x.gpu(),
        &kernel("rotary", x.element(), Element::F32),
        each(rows * heads * (head_dim - half)),
        &[
            Arg::View(&x.view),
            Arg::View(&out.view),
            Arg::View(&cos.view),
            Arg::View(&sin.view),
            int(rows),
            int(heads),
            int(head_dim),
            int(half),
            Arg::Float(sign),
        ],
    );
    Some(out.into())
}
