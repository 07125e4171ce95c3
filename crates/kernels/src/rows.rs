//! Picking rows and its transpose: how the hidden states that predict completion tokens reach the log-prob head.

use crate::host::{self, Host};
use crate::{Tensor, composition};

/// Rows `rows` of `x`, `[n, d]` → `[rows, d]`; a row may be picked more than once.
///
/// # Panics
/// If a row is not below n.
pub fn gather_rows(x: &Tensor<2>, rows: &[usize]) -> Tensor<2> {
    let [total, width] = x.dims();
    check(rows, total);
    device_form!(cuda::gather_rows(x, rows));
    let Some(x) = Host::read(x) else {
        return x.take_back(composition::gather_rows(&x.burn(), rows));
    };
    let x: &[f32] = &x;
    let mut out = Vec::with_capacity(rows.len() * width);
    for &row in rows {
        out.extend_from_slice(&x[row * width..][..width]);
    }
    host::tensor(out, [rows.len(), width])
}

/// Adds row i of `dy`, `[rows, d]`, to row `rows[i]` of zeros, `[total, d]`, in the order of `rows`.
pub fn scatter_add_rows(dy: &Tensor<2>, rows: &[usize], total: usize) -> Tensor<2> {
    let [picked, width] = dy.dims();
    assert_eq!(picked, rows.len(), "rows of dy and row numbers");
    check(rows, total);
    device_form!(cuda::scatter_add_rows(dy, rows, total));
    let Some(dy) = Host::read(dy) else {
        return dy.take_back(composition::scatter_add_rows(&dy.burn(), rows, total));
    };
    let mut out = vec![0.0; total * width];
    for (&row, values) in rows.iter().zip(dy.chunks_exact(width)) {
        for (sum, &value) in out[row * width..][..width].iter_mut().zip(values) {
            *sum += value;
        }
    }
    host::tensor(out, [total, width])
}

fn check(rows: &[usize], total: usize) {
    if let Some(row) = rows.iter().find(|&&row| row >= total) {
        panic!("row {row} of {total}");
    }
}
