//! Rows picked by number, and rows added to where they were picked.

use std::collections::BTreeMap;

use gpu::{Arg, Element, Launch, View};

use super::{THREADS, as_f32, empty, int, kernel, launch, upload_ints};
use crate::tensor::Array;
use crate::{Gradients, Slot, Tensor};

/// Rows `rows` of x.
pub(crate) fn gather_rows(x: &Tensor<2>, rows: &[usize]) -> Option<Tensor<2>> {
    let x = x.array()?;
    let rows: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    Some(gather(x, &rows).into())
}

/// Rows `ids` of the table, f32.
pub(crate) fn embedding(weight: &Tensor<2>, ids: &[u32]) -> Option<Tensor<2>> {
    let weight = weight.array()?;
    let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    Some(as_f32(&gather(weight, &ids)).into())
}

fn gather(x: &Array<2>, rows: &[i32]) -> Array<2> {
    let ([_, width], gpu) = (x.shape, x.gpu());
    let picked = empty(gpu, [rows.len(), width], x.element());
    let numbers = upload_ints(gpu, rows);
    launch(
        gpu,
        &kernel("gather_rows", x.element(), Element::F32),
        Launch::new(rows.len(), THREADS),
        &[
            Arg::View(&x.view),
            Arg::View(&numbers),
            Arg::View(&picked.view),
            int(width),
        ],
    );
    picked
}

/// Row i of `dy` added to row `rows[i]` of zeros.
pub(crate) fn scatter_add_rows(dy: &Tensor<2>, rows: &[usize], total: usize) -> Option<Tensor<2>> {
    let dy = dy.array()?;
    let mut members = vec![Vec::new(); total];
    for (index, &row) in rows.iter().enumerate() {
        members[row].push(index as i32);
    }
    let out = empty(dy.gpu(), [total, dy.shape[1]], Element::F32);
    scatter(dy, (0..).zip(members), &out.view, false);
    Some(out.into())
}

/// Adds the rows of `dy` to the table's gradient.
pub(crate) fn embedding_backward(
    dy: &Tensor<2>,
    ids: &[u32],
    gradients: &mut Gradients,
    slot: &Slot,
) -> Option<()> {
    let dy = dy.array()?;
    let sums = gradients.array(slot)?;
    let mut members: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for (index, &id) in (0..).zip(ids) {
        members.entry(id as i32).or_default().push(index);
    }
    scatter(dy, members.into_iter(), &sums.view, true);
    Some(())
}

/// Adds rows of `dy` to those rows of `out` that are named with them, in this order; `keep` adds to what is there.
fn scatter(dy: &Array<2>, members: impl Iterator<Item = (i32, Vec<i32>)>, out: &View, keep: bool) {
    let (mut targets, mut starts, mut all) = (Vec::new(), vec![0], Vec::new());
    for (target, members) in members {
        targets.push(target);
        all.extend(members);
        starts.push(all.len() as i32);
    }
    let [numbers, starts, all] = [&targets, &starts, &all].map(|ints| upload_ints(dy.gpu(), ints));
    launch(
        dy.gpu(),
        &kernel("scatter_add_rows", Element::F32, dy.element()),
        Launch::new(targets.len(), THREADS),
        &[
            Arg::View(&dy.view),
            Arg::View(&numbers),
            Arg::View(&starts),
            Arg::View(&all),
            Arg::View(out),
            int(dy.shape[1]),
            Arg::Int(i32::from(keep)),
        ],
    );
}
