//! The fused forms of a GPU: our own kernels (`decoder.cu`, `attention.cu`) and cuBLASLt, over memory of `gpu`.
//!
//! A form answers `None` when an operand does not lie on a GPU, or has a shape that the kernels were not written for; its
//! function then goes on to the reference composition. Results of products have the element type of their operands, so that in
//! bf16 only the residual stream, its gradient, statistics and logits are f32. Products of f32 operands are f32 throughout (no TF32).
//!
//! A device that fails makes a form panic with the device's words: no result could be trusted after it.

mod activation;
mod attention;
mod columns;
mod elements;
mod head;
mod heads;
mod linear;
mod norm;
mod optimizer;
mod rows;

use gpu::{Arg, Element, Gpu, GpuError, Launch, Program, View};

use crate::tensor::Array;

pub(crate) use activation::{activate_backward, gated, gated_backward, gated_backward_inner};
pub(crate) use attention::{segment_attention, segment_attention_backward};
pub(crate) use columns::bias_backward;
use columns::{Normal, column_sums};
pub(crate) use elements::{accumulate, add, affine, as_f32, from_burn, to_bf16, to_burn};
use elements::{own, typed};
pub(crate) use head::{logprob_head, logprob_head_backward};
pub(crate) use heads::{join_heads, rotary, rotary_table, split_heads};
pub(crate) use linear::{
    add_bias, linear, linear_add, linear_backward, linear_backward_sum, linear_backward_weight,
};
use linear::{operands, product};
pub(crate) use norm::{
    layer_norm, layer_norm_backward, layer_norm_backward_weight, rms_norm, rms_norm_backward,
    rms_norm_backward_weight, rms_norm_operand,
};
pub(crate) use optimizer::{add_to, prepare_update, rounded, sum_of_squares, update};
pub(crate) use rows::{embedding, embedding_backward, gather_rows, scatter_add_rows};

const DECODER: &str = include_str!("cuda/decoder.cu");
/// What the macros of `decoder.cu` are called.
const MACROS: &[&str] = &["X", "D", "F"];
/// Threads of a block where a thread has an element.
const THREADS: usize = 256;

/// What the device answered.
///
/// # Panics
/// If it failed.
pub(crate) fn done<T>(answer: Result<T, GpuError>) -> T {
    answer.unwrap_or_else(|error| panic!("{error}"))
}

/// Elements that nothing was written to.
pub(crate) fn empty<const D: usize>(
    gpu: &'static Gpu,
    shape: [usize; D],
    element: Element,
) -> Array<D> {
    let view = done(View::empty(gpu, shape.iter().product(), element));
    Array { view, shape }
}

impl<const D: usize> Array<D> {
    fn gpu(&self) -> &'static Gpu {
        self.view.gpu()
    }

    fn element(&self) -> Element {
        self.view.element()
    }

    /// As many elements, to be written.
    fn like(&self, element: Element) -> Self {
        empty(self.gpu(), self.shape, element)
    }

    /// Whether four elements can be read at once from any multiple of four.
    fn in_fours(&self) -> bool {
        let width = self.shape.last().copied().unwrap_or(0);
        let bytes = 4 * self.element().bytes() as u64;
        width.is_multiple_of(4) && self.view.pointer().is_multiple_of(bytes)
    }
}

fn kind(element: Element) -> i32 {
    match element {
        Element::F32 => 0,
        Element::Bf16 => 1,
    }
}

/// A kernel of `decoder.cu` for elements of these types.
fn kernel(entry: &'static str, x: Element, d: Element) -> Program {
    Program {
        source: DECODER,
        entry,
        macros: MACROS,
        values: [kind(x), kind(d), 0, 0],
    }
}

fn launch(gpu: &Gpu, program: &Program, launch: Launch, arguments: &[Arg<'_>]) {
    done(gpu.launch(program, launch, arguments));
}

/// Threads for so many elements.
fn each(elements: usize) -> Launch {
    Launch::new(elements.div_ceil(THREADS), THREADS)
}

/// A warp for each of so many rows.
fn warps(rows: usize) -> Launch {
    Launch::new(rows.div_ceil(THREADS / 32), THREADS)
}

fn int(value: usize) -> Arg<'static> {
    Arg::Int(i32::try_from(value).expect("sizes of a pack fit into 31 bits"))
}

fn long(value: usize) -> Arg<'static> {
    Arg::Long(value as i64)
}

/// Row numbers and the like; their memory is typed f32 because it has the size.
fn upload_ints(gpu: &'static Gpu, values: &[i32]) -> View {
    done(View::upload(gpu, values, Element::F32))
}
