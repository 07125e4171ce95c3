//! Where rayon threads come in: only by cutting outputs into disjoint pieces, so that every element is computed by the
//! same instructions in the same order with any number of threads. With one thread rayon is not entered at all.

use rayon::prelude::*;

/// Whether more than one thread may work.
pub(crate) fn is_parallel() -> bool {
    rayon::current_num_threads() > 1
}

/// Runs `work(first_row, block)` over blocks of whole rows of `out`.
pub(crate) fn row_blocks(
    out: &mut [f32],
    columns: usize,
    work: impl Fn(usize, &mut [f32]) + Sync + Send,
) {
    if out.is_empty() {
        return;
    }
    if !is_parallel() {
        return work(0, out);
    }
    let rows = block_rows(out.len() / columns);
    out.par_chunks_mut(rows * columns)
        .enumerate()
        .for_each(|(index, block)| work(index * rows, block));
}

/// As [`row_blocks`], for two outputs of the same shape.
pub(crate) fn row_blocks_of_two(
    one: &mut [f32],
    two: &mut [f32],
    columns: usize,
    work: impl Fn(usize, &mut [f32], &mut [f32]) + Sync + Send,
) {
    assert_eq!(one.len(), two.len(), "outputs of one shape");
    if one.is_empty() {
        return;
    }
    if !is_parallel() {
        return work(0, one, two);
    }
    let rows = block_rows(one.len() / columns);
    one.par_chunks_mut(rows * columns)
        .zip(two.par_chunks_mut(rows * columns))
        .enumerate()
        .for_each(|(index, (one, two))| work(index * rows, one, two));
}

/// Elements that a thread turns into others at a time.
const PIECE_ELEMENTS: usize = 1 << 16;

/// Runs `work` on pieces of `from`, with the number of a piece's first element, and the pieces of `to` that belong to them.
pub(crate) fn of_elements<A: Sync, B: Send>(
    from: &[A],
    to: &mut [B],
    work: impl Fn(usize, &[A], &mut [B]) + Sync + Send,
) {
    if !is_parallel() {
        return work(0, from, to);
    }
    let pieces = from.par_chunks(PIECE_ELEMENTS);
    pieces
        .zip(to.par_chunks_mut(PIECE_ELEMENTS))
        .enumerate()
        .for_each(|(index, (from, to))| work(index * PIECE_ELEMENTS, from, to));
}

/// Runs `work` on every item.
pub(crate) fn each<T: Send>(items: &mut [T], work: impl Fn(&mut T) + Sync + Send) {
    if is_parallel() {
        items.par_iter_mut().for_each(work);
    } else {
        items.iter_mut().for_each(work);
    }
}

/// `work(0), …, work(count - 1)`, in this order whichever thread computed which.
pub(crate) fn tasks<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    if is_parallel() {
        (0..count).into_par_iter().map(work).collect()
    } else {
        (0..count).map(work).collect()
    }
}

fn block_rows(rows: usize) -> usize {
    rows.div_ceil(4 * rayon::current_num_threads()).max(1)
}
