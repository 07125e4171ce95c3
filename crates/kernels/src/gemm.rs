//! The one door to the `gemm` crate: products of strided matrices over checked slices, with bits that depend on nothing
//! but the operands' rows and columns themselves.
//!
//! `gemm` chooses other summation orders for small or thin products (a horizontal kernel up to 256 results, `gemv`,
//! rank-2 updates) and cuts the depth by cache size. Here the depth is cut at multiples of [`DEPTH`], which `gemm` never
//! cuts again, and small or thin products are padded until the ordinary kernel takes them. Then every result is the
//! same chain of fused multiply-adds over the depth, whichever rows and columns stand beside it, on any thread count.

#![allow(unsafe_code)]

use gemm::Parallelism;

use crate::parallel;

/// Deepest product given to `gemm` at once: its own depth blocks are never shallower than this.
pub(crate) const DEPTH: usize = 512;

/// Products of this many results or fewer may take `gemm`'s horizontal kernel.
const HORIZONTAL_MAX: usize = 16 * 16;

/// A matrix inside a slice.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows` × `columns`, row-major, no gaps.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert!(
            data.len() >= rows * columns,
            "{} elements for a {rows} × {columns} matrix",
            data.len()
        );
        Self {
            data,
            rows,
            columns,
            row_stride: columns,
            column_stride: 1,
        }
    }

    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn columns_from(self, start: usize, columns: usize) -> Self {
        Self {
            data: &self.data[start * self.column_stride..],
            columns,
            ..self
        }
    }

    fn rows_from(self, start: usize, rows: usize) -> Self {
        Self {
            data: &self.data[start * self.row_stride..],
            rows,
            ..self
        }
    }

    /// A copy of `rows` × `columns`, zero outside the matrix.
    fn padded(self, rows: usize, columns: usize) -> Vec<f32> {
        let mut copy = vec![0.0; rows * columns];
        for row in 0..self.rows {
            for column in 0..self.columns {
                copy[row * columns + column] =
                    self.data[row * self.row_stride + column * self.column_stride];
            }
        }
        copy
    }
}

/// What happens to the old value of a result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// It is overwritten (and never read).
    Set,
    /// The product is added to it.
    Add,
}

/// Whether a product may use the rayon threads. Callers that already run on them say `One`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    One,
    All,
}

/// `out = scale · lhs · rhs` or `out += scale · lhs · rhs`; `out` is row-major, rows `out_stride` apart.
pub(crate) fn multiply(
    out: &mut [f32],
    out_stride: usize,
    write: Write,
    scale: f32,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    threads: Threads,
) {
    assert_eq!(lhs.columns, rhs.rows, "depths of a product");
    let (rows, columns, depth) = (lhs.rows, rhs.columns, lhs.columns);
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(
        columns <= out_stride,
        "rows of {columns} at a distance of {out_stride}"
    );
    assert!(
        out.len() >= (rows - 1) * out_stride + columns,
        "{} elements for {rows} × {columns} results",
        out.len()
    );
    if depth == 0 && write == Write::Set {
        out.chunks_mut(out_stride)
            .take(rows)
            .for_each(|row| row[..columns].fill(0.0));
    }
    let mut write = write;
    for start in (0..depth).step_by(DEPTH) {
        let deep = DEPTH.min(depth - start);
        let (lhs, rhs) = (lhs.columns_from(start, deep), rhs.rows_from(start, deep));
        padded(out, out_stride, write, scale, lhs, rhs, threads);
        write = Write::Add;
    }
}

/// A product of one depth block, padded when `gemm` would treat it specially.
fn padded(
    out: &mut [f32],
    out_stride: usize,
    write: Write,
    scale: f32,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    threads: Threads,
) {
    let (rows, columns, depth) = (lhs.rows, rhs.columns, lhs.columns);
    let small = rows < 2 || columns < 2 || rows * columns <= HORIZONTAL_MAX;
    if !small && depth > 2 {
        return plain(out, out_stride, write, scale, lhs, rhs, threads);
    }
    let depth_padded = depth.max(3);
    let rows_padded = if small { rows.max(2) } else { rows };
    let columns_padded = if small {
        columns.max(HORIZONTAL_MAX / rows_padded + 1).max(2)
    } else {
        columns
    };
    let lhs_copy = lhs.padded(rows_padded, depth_padded);
    let rhs_copy = rhs.padded(depth_padded, columns_padded);
    let lhs = Matrix::new(&lhs_copy, rows_padded, depth_padded);
    let rhs = Matrix::new(&rhs_copy, depth_padded, columns_padded);
    if !small {
        return plain(out, out_stride, write, scale, lhs, rhs, threads);
    }
    let mut copy = vec![0.0; rows_padded * columns_padded];
    if write == Write::Add {
        for row in 0..rows {
            copy[row * columns_padded..][..columns]
                .copy_from_slice(&out[row * out_stride..][..columns]);
        }
    }
    plain(&mut copy, columns_padded, write, scale, lhs, rhs, threads);
    for row in 0..rows {
        out[row * out_stride..][..columns]
            .copy_from_slice(&copy[row * columns_padded..][..columns]);
    }
}

/// The call itself.
fn plain(
    out: &mut [f32],
    out_stride: usize,
    write: Write,
    scale: f32,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    threads: Threads,
) {
    let reach = |m: &Matrix<'_>| (m.rows - 1) * m.row_stride + (m.columns - 1) * m.column_stride;
    assert!(
        reach(&lhs) < lhs.data.len(),
        "left operand ends at {}, slice at {}",
        reach(&lhs),
        lhs.data.len()
    );
    assert!(
        reach(&rhs) < rhs.data.len(),
        "right operand ends at {}, slice at {}",
        reach(&rhs),
        rhs.data.len()
    );
    assert!(
        (lhs.rows - 1) * out_stride + rhs.columns <= out.len(),
        "results end within the slice"
    );
    let parallelism = if threads == Threads::All && parallel::is_parallel() {
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
    // SAFETY: the assertions above bound every index that rows, columns and strides can form by the length of its slice;
    // `out` is borrowed mutably, so it overlaps neither operand; f32 has no invalid values. With `read_dst` false (Set)
    // `gemm` only writes.
    unsafe {
        gemm::gemm(
            lhs.rows,
            rhs.columns,
            lhs.columns,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            write == Write::Add,
            lhs.data.as_ptr(),
            lhs.column_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.column_stride as isize,
            rhs.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn product(lhs: Matrix<'_>, rhs: Matrix<'_>) -> Vec<f32> {
        let mut out = vec![f32::NAN; lhs.rows * rhs.columns];
        multiply(
            &mut out,
            rhs.columns,
            Write::Set,
            1.0,
            lhs,
            rhs,
            Threads::All,
        );
        out
    }

    #[test]
    fn products_agree_with_plain_loops_for_all_layouts() {
        for (rows, columns, depth) in [
            (1, 1, 1),
            (3, 5, 2),
            (1, 70, 33),
            (70, 1, 9),
            (40, 50, 600),
            (17, 16, 513),
        ] {
            let (a, b) = (values(rows * depth, 1), values(depth * columns, 2));
            for layout in 0..4 {
                let lhs = if layout & 1 == 0 {
                    Matrix::new(&a, rows, depth)
                } else {
                    Matrix::new(&a, depth, rows).transposed()
                };
                let rhs = if layout & 2 == 0 {
                    Matrix::new(&b, depth, columns)
                } else {
                    Matrix::new(&b, columns, depth).transposed()
                };
                let mut out = vec![1.0f32; rows * columns];
                multiply(&mut out, columns, Write::Add, 0.5, lhs, rhs, Threads::One);
                for row in 0..rows {
                    for column in 0..columns {
                        let exact: f64 = (0..depth)
                            .map(|k| {
                                f64::from(a[row * lhs.row_stride + k * lhs.column_stride])
                                    * f64::from(b[k * rhs.row_stride + column * rhs.column_stride])
                            })
                            .sum();
                        let got = f64::from(out[row * columns + column]);
                        assert!(
                            (got - (1.0 + 0.5 * exact)).abs() < 1e-4,
                            "{rows} {columns} {depth}: {got} {exact}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_result_has_the_same_bits_whatever_stands_beside_it() {
        for depth in [1, 2, 3, 64, 511, 512, 513, 514, 1100] {
            let (rows, columns) = (137, 131);
            let (a, b) = (values(rows * depth, 3), values(columns * depth, 4));
            let all = product(
                Matrix::new(&a, rows, depth),
                Matrix::new(&b, columns, depth).transposed(),
            );
            for (row, more) in [
                (0, 1),
                (5, 1),
                (136, 1),
                (7, 2),
                (20, 3),
                (3, 40),
                (100, 37),
                (1, 66),
            ] {
                for (column, wide) in [(0, 131), (9, 1), (130, 1), (4, 2), (0, 64), (30, 97)] {
                    let lhs = Matrix::new(&a[row * depth..], more, depth);
                    let rhs = Matrix::new(&b[column * depth..], wide, depth).transposed();
                    let part = product(lhs, rhs);
                    for i in 0..more {
                        for j in 0..wide {
                            let (alone, beside) =
                                (part[i * wide + j], all[(row + i) * columns + column + j]);
                            assert_eq!(
                                alone.to_bits(),
                                beside.to_bits(),
                                "depth {depth}, {more} × {wide} at {row}, {column}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn an_empty_depth_clears_or_keeps() {
        let mut out = vec![3.0; 4];
        multiply(
            &mut out,
            2,
            Write::Add,
            1.0,
            Matrix::new(&[], 2, 0),
            Matrix::new(&[], 0, 2),
            Threads::One,
        );
        assert_eq!(out, [3.0; 4]);
        multiply(
            &mut out,
            2,
            Write::Set,
            1.0,
            Matrix::new(&[], 2, 0),
            Matrix::new(&[], 0, 2),
            Threads::One,
        );
        assert_eq!(out, [0.0; 4]);
    }

    #[test]
    #[should_panic(expected = "depths of a product")]
    fn operands_that_do_not_meet_are_refused() {
        product(Matrix::new(&[0.0; 4], 2, 2), Matrix::new(&[0.0; 6], 3, 2));
    }
}
