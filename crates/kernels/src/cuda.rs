//! The fused forms of a GPU: our own kernels (`decoder.cu`, `attention.cu`) and cuBLASLt, over memory of `gpu`.
//!
//! A form answers `None` when an operand does not lie on a GPU, or has a shape that the kernels were not written for; its
//! function then goes on to the reference composition. Results of products have the element type of their operands, so that in
//! bf16 only the residual stream, its gradient, statistics and logits are f32. Products of f32 operands are f32 throughout (no TF32).
//!
//! A device that fails makes a form panic with the device's words: no result could be trusted after it.

mod attention;
mod head;
mod optimizer;

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::TensorData;
use gpu::{Arg, Element, Gpu, GpuError, Launch, Operand, Product, Program, View};

use crate::tensor::Array;
use crate::{
    Activation, Device, Gradients, LayerSaved, Precision, RmsSaved, RotaryTable, Slot, Tensor,
};

pub(crate) use attention::{segment_attention, segment_attention_backward};
pub(crate) use head::{logprob_head, logprob_head_backward};
pub(crate) use optimizer::{prepare_update, sum_of_squares, update};

const DECODER: &str = include_str!("cuda/decoder.cu");
/// What the macros of `decoder.cu` are called.
const MACROS: &[&str] = &["X", "D", "F"];
/// Threads of a block where a thread has an element.
const THREADS: usize = 256;
/// Rows of a slice of a column sum: enough slices to fill a device, few enough to add up.
const SLICE_ROWS: usize = 256;

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

/// x · factor + term.
pub(crate) fn affine<const D: usize>(x: &Array<D>, factor: f32, term: f32) -> Array<D> {
    convert(x, x.element(), factor, term)
}

fn convert<const D: usize>(x: &Array<D>, element: Element, factor: f32, term: f32) -> Array<D> {
    let out = x.like(element);
    let len = x.view.len();
    launch(
        x.gpu(),
        &kernel("affine", x.element(), element),
        each(len),
        &[
            Arg::View(&x.view),
            Arg::View(&out.view),
            long(len),
            Arg::Float(factor),
            Arg::Float(term),
        ],
    );
    out
}

/// The same values as f32.
pub(crate) fn as_f32<const D: usize>(x: &Array<D>) -> Array<D> {
    typed(x, Element::F32)
}

fn typed<const D: usize>(x: &Array<D>, element: Element) -> Array<D> {
    if x.element() == element {
        x.clone()
    } else {
        convert(x, element, 1.0, 0.0)
    }
}

/// The values rounded to bf16.
pub(crate) fn to_bf16<const D: usize>(x: &Tensor<D>) -> Option<Tensor<D>> {
    Some(typed(x.array()?, Element::Bf16).into())
}

/// A copy on burn's CUDA backend, f32.
pub(crate) fn to_burn<const D: usize>(array: &Array<D>) -> burn::tensor::Tensor<D> {
    let values: Vec<f32> = done(as_f32(array).view.download());
    let device = burn::tensor::Device::cuda(array.gpu().ordinal());
    burn::tensor::Tensor::from_data(TensorData::new(values, array.shape), &device)
}

/// A copy of a tensor of burn's, f32.
pub(crate) fn from_burn<const D: usize>(
    gpu: &'static Gpu,
    tensor: burn::tensor::Tensor<D>,
) -> Array<D> {
    let shape = tensor.dims();
    let values = crate::host::into_vec(tensor);
    let view = done(View::upload(gpu, &values, Element::F32));
    Array { view, shape }
}

/// Adds `gradient` to elements `range` of `bucket`.
pub(crate) fn accumulate(
    bucket: &Tensor<1>,
    range: Range<usize>,
    gradient: &Tensor<1>,
) -> Option<()> {
    let sums = bucket.slice(range);
    let sums = sums.array()?;
    // A composition's gradient comes from burn's backend.
    let gradient = match gradient.array() {
        Some(gradient) => gradient.clone(),
        None => from_burn(sums.gpu(), gradient.burn()),
    };
    add_into(sums, &gradient)
}

/// Adds `b` to `a`, f32.
fn add_into<const D: usize>(a: &Array<D>, b: &Array<D>) -> Option<()> {
    sum(a, b, a)
}

fn sum<const D: usize>(a: &Array<D>, b: &Array<D>, out: &Array<D>) -> Option<()> {
    if !(a.in_fours() && b.in_fours() && out.in_fours()) {
        return None;
    }
    let quarter = a.view.len() / 4;
    launch(
        a.gpu(),
        &kernel("add", a.element(), b.element()),
        each(quarter),
        &[
            Arg::View(&a.view),
            Arg::View(&b.view),
            Arg::View(&out.view),
            long(quarter),
        ],
    );
    Some(())
}

/// a + b, f32; in place when `a` is f32 and nothing else holds it.
pub(crate) fn add(a: &Tensor<2>, b: &Tensor<2>) -> Option<Tensor<2>> {
    let (a, b) = (a.array()?, b.array()?);
    let out = if a.element() == Element::F32 && a.view.is_unique() {
        a.clone()
    } else {
        a.like(Element::F32)
    };
    sum(a, b, &out)?;
    Some(out.into())
}

/// Both operands of a product in one type: bf16 if one of them is.
fn operands(x: &Array<2>, y: &Array<2>) -> (Array<2>, Array<2>) {
    let element = x.element().max(y.element());
    (typed(x, element), typed(y, element))
}

/// x Wᵀ.
pub(crate) fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Option<Tensor<2>> {
    let (x, weight) = operands(x.array()?, weight.array()?);
    let ([m, k], [n, _]) = (x.shape, weight.shape);
    let out = empty(x.gpu(), [m, n], x.element());
    product(
        [m, n, k],
        (&x.view, false),
        (&weight.view, true),
        &out.view,
        None,
    );
    Some(out.into())
}

/// x Wᵀ + to, f32.
pub(crate) fn linear_add(x: &Tensor<2>, weight: &Tensor<2>, to: &Tensor<2>) -> Option<Tensor<2>> {
    let (x, weight) = operands(x.array()?, weight.array()?);
    let to = to.array()?;
    if to.element() != Element::F32 {
        return None;
    }
    let ([m, k], [n, _]) = (x.shape, weight.shape);
    let (out, plus) = (to.like(Element::F32), Some(&to.view));
    product(
        [m, n, k],
        (&x.view, false),
        (&weight.view, true),
        &out.view,
        plus,
    );
    Some(out.into())
}

/// dy W.
pub(crate) fn linear_backward(dy: &Tensor<2>, weight: &Tensor<2>) -> Option<Tensor<2>> {
    let (dy, weight) = operands(dy.array()?, weight.array()?);
    let ([m, k], [_, n]) = (dy.shape, weight.shape);
    let out = empty(dy.gpu(), [m, n], dy.element());
    product(
        [m, n, k],
        (&dy.view, false),
        (&weight.view, false),
        &out.view,
        None,
    );
    Some(out.into())
}

/// Σ dy W, f32.
pub(crate) fn linear_backward_sum(maps: &[(&Tensor<2>, Tensor<2>)]) -> Option<Tensor<2>> {
    let mut sum: Option<Array<2>> = None;
    for (dy, weight) in maps {
        let (dy, weight) = operands(dy.array()?, weight.array()?);
        let ([m, k], [_, n]) = (dy.shape, weight.shape);
        let plus = sum.as_ref().map(|sum| sum.view.clone());
        let out = sum.get_or_insert_with(|| empty(dy.gpu(), [m, n], Element::F32));
        let (lhs, rhs) = ((&dy.view, false), (&weight.view, false));
        product([m, n, k], lhs, rhs, &out.view, plus.as_ref());
    }
    sum.map(Tensor::from)
}

/// Adds dyᵀ x at `slot`.
pub(crate) fn linear_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    gradients: &mut Gradients,
    slot: &Slot,
) -> Option<()> {
    let (dy, x) = operands(dy.array()?, x.array()?);
    let sums = gradients.array(slot)?;
    let ([k, m], [_, n]) = (dy.shape, x.shape);
    let plus = Some(&sums.view);
    product(
        [m, n, k],
        (&dy.view, true),
        (&x.view, false),
        &sums.view,
        plus,
    );
    Some(())
}

/// `out` = lhs · rhs + `plus`; `true` with an operand means its transpose.
fn product(
    [m, n, k]: [usize; 3],
    (lhs, lhs_transposed): (&View, bool),
    (rhs, rhs_transposed): (&View, bool),
    out: &View,
    plus: Option<&View>,
) {
    let operand = |view, transposed| Operand { view, transposed };
    done(out.gpu().product(&Product {
        m,
        n,
        k,
        lhs: operand(lhs, lhs_transposed),
        rhs: operand(rhs, rhs_transposed),
        out,
        plus,
    }));
}

/// x + bias; in place when nothing else holds `x`.
pub(crate) fn add_bias(x: &Tensor<2>, bias: &Tensor<1>) -> Option<Tensor<2>> {
    let (x, bias) = (x.array()?, bias.array()?);
    let out = own(x);
    let len = out.view.len();
    launch(
        x.gpu(),
        &kernel("add_bias", x.element(), Element::F32),
        each(len),
        &[
            Arg::View(&out.view),
            Arg::View(&bias.view),
            long(len),
            int(x.shape[1]),
        ],
    );
    Some(out.into())
}

/// `x` itself when nothing else holds it, else a copy.
fn own<const D: usize>(x: &Array<D>) -> Array<D> {
    if x.view.is_unique() {
        return x.clone();
    }
    let out = x.like(x.element());
    done(out.view.copy(&x.view));
    out
}

/// Adds the column sums of `dy`.
pub(crate) fn bias_backward(dy: &Tensor<2>, gradients: &mut Gradients, slot: &Slot) -> Option<()> {
    column_sums(dy.array()?, None, gradients, slot)
}

/// What a column sum multiplies a gradient by: the normalised rows.
struct Normal<'a> {
    x: &'a Array<2>,
    mean: Option<&'a Array<2>>,
    inverse: &'a Array<2>,
}

/// Adds Σ dy · (x − mean) · inverse over rows, or Σ dy.
fn column_sums(
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

/// The normalised rows in the type of `x`.
pub(crate) fn rms_norm(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    epsilon: f64,
) -> Option<(Tensor<2>, RmsSaved)> {
    let element = x.array()?.element();
    rms_norm_into(x, weight, epsilon, element)
}

/// The normalised rows as operands.
pub(crate) fn rms_norm_operand(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    epsilon: f64,
    precision: Precision,
) -> Option<(Tensor<2>, RmsSaved)> {
    let element = match precision {
        Precision::F32 => x.array()?.element(),
        Precision::Bf16 => Element::Bf16,
    };
    rms_norm_into(x, weight, epsilon, element)
}

fn rms_norm_into(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    epsilon: f64,
    element: Element,
) -> Option<(Tensor<2>, RmsSaved)> {
    let (x, weight) = (x.array()?, weight.array()?);
    let ([rows, width], gpu) = (x.shape, x.gpu());
    if !(x.in_fours() && weight.in_fours()) {
        return None;
    }
    let (y, inverse) = (x.like(element), empty(gpu, [rows, 1], Element::F32));
    launch(
        gpu,
        &kernel("rms_norm", x.element(), element),
        warps(rows),
        &[
            Arg::View(&x.view),
            Arg::View(&weight.view),
            Arg::View(&y.view),
            Arg::View(&inverse.view),
            int(rows),
            int(width),
            Arg::Float(epsilon as f32),
        ],
    );
    Some((y.into(), RmsSaved::device(inverse.into())))
}

/// The gradient of `x`, in its type, and `plus`.
pub(crate) fn rms_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    saved: &RmsSaved,
    plus: Option<&Tensor<2>>,
) -> Option<Tensor<2>> {
    let inverse = saved.tensor(x);
    let (dy, x, weight) = (dy.array()?, x.array()?, weight.array()?);
    let plus = match plus {
        Some(plus) => Some(plus.array()?),
        None => None,
    };
    if plus.is_some_and(|plus| plus.element() != Element::F32 || !plus.in_fours()) {
        return None;
    }
    let ([rows, width], inverse) = (x.shape, inverse.array()?);
    if !(x.in_fours() && dy.in_fours() && weight.in_fours()) {
        return None;
    }
    let dx = x.like(x.element());
    launch(
        x.gpu(),
        &kernel("rms_norm_backward", x.element(), dy.element()),
        warps(rows),
        &[
            Arg::View(&dy.view),
            Arg::View(&x.view),
            Arg::View(&weight.view),
            Arg::View(&inverse.view),
            plus.map_or(Arg::Null, |plus| Arg::View(&plus.view)),
            Arg::View(&dx.view),
            int(rows),
            int(width),
        ],
    );
    Some(dx.into())
}

/// Adds Σ dy · x · inverse.
pub(crate) fn rms_norm_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    saved: &RmsSaved,
    gradients: &mut Gradients,
    slot: &Slot,
) -> Option<()> {
    let inverse = saved.tensor(x);
    let normal = Normal {
        x: x.array()?,
        mean: None,
        inverse: inverse.array()?,
    };
    column_sums(dy.array()?, Some(&normal), gradients, slot)
}

/// The normalised rows, f32.
pub(crate) fn layer_norm(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    bias: &Tensor<1>,
    epsilon: f64,
) -> Option<(Tensor<2>, LayerSaved)> {
    let (x, weight, bias) = (x.array()?, weight.array()?, bias.array()?);
    let ([rows, width], gpu) = (x.shape, x.gpu());
    if ![x.in_fours(), weight.in_fours(), bias.in_fours()]
        .iter()
        .all(|&it| it)
    {
        return None;
    }
    let y = x.like(Element::F32);
    let [mean, inverse] = [0, 1].map(|_| empty(gpu, [rows, 1], Element::F32));
    launch(
        gpu,
        &kernel("layer_norm", x.element(), Element::F32),
        warps(rows),
        &[
            Arg::View(&x.view),
            Arg::View(&weight.view),
            Arg::View(&bias.view),
            Arg::View(&y.view),
            Arg::View(&mean.view),
            Arg::View(&inverse.view),
            int(rows),
            int(width),
            Arg::Float(epsilon as f32),
        ],
    );
    let saved = LayerSaved::device([mean, inverse].map(Tensor::from));
    Some((y.into(), saved))
}

/// The gradient of `x`, in its type.
pub(crate) fn layer_norm_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    saved: &LayerSaved,
) -> Option<Tensor<2>> {
    let moments = saved.tensors(x);
    let (dy, x, weight) = (dy.array()?, x.array()?, weight.array()?);
    let ([rows, width], [mean, inverse]) = (x.shape, moments.each_ref().map(Tensor::array));
    if ![x.in_fours(), dy.in_fours(), weight.in_fours()]
        .iter()
        .all(|&it| it)
    {
        return None;
    }
    let dx = x.like(x.element());
    launch(
        x.gpu(),
        &kernel("layer_norm_backward", x.element(), dy.element()),
        warps(rows),
        &[
            Arg::View(&dy.view),
            Arg::View(&x.view),
            Arg::View(&weight.view),
            Arg::View(&mean?.view),
            Arg::View(&inverse?.view),
            Arg::View(&dx.view),
            int(rows),
            int(width),
        ],
    );
    Some(dx.into())
}

/// Adds the gradients of weight and bias.
pub(crate) fn layer_norm_backward_weight(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    saved: &LayerSaved,
    gradients: &mut Gradients,
    [weight, bias]: [&Slot; 2],
) -> Option<()> {
    let moments = saved.tensors(x);
    let [mean, inverse] = moments.each_ref().map(Tensor::array);
    let (dy, x) = (dy.array()?, x.array()?);
    gradients.array(bias)?;
    let normal = Normal {
        x,
        mean: Some(mean?),
        inverse: inverse?,
    };
    column_sums(dy, Some(&normal), gradients, weight)?;
    column_sums(dy, None, gradients, bias)
}

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

fn curve(entry: &'static str, x: Element, d: Element, activation: Activation) -> Program {
    let number = match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
    };
    Program {
        values: [kind(x), kind(d), number, 0],
        ..kernel(entry, x, d)
    }
}

/// f(gate) · up, or f(gate).
pub(crate) fn gated(
    gate: &Tensor<2>,
    up: Option<&Tensor<2>>,
    activation: Activation,
) -> Option<Tensor<2>> {
    let gate = gate.array()?;
    let up = match up {
        Some(up) => Some(up.array()?),
        None => None,
    };
    let alike = |up: &&Array<2>| up.element() == gate.element() && up.in_fours();
    if !(gate.in_fours() && up.as_ref().is_none_or(alike)) {
        return None;
    }
    let (y, quarter) = (gate.like(gate.element()), gate.view.len() / 4);
    launch(
        gate.gpu(),
        &curve("gated", gate.element(), gate.element(), activation),
        each(quarter),
        &[
            Arg::View(&gate.view),
            up.map_or(Arg::Null, |up| Arg::View(&up.view)),
            Arg::View(&y.view),
            long(quarter),
        ],
    );
    Some(y.into())
}

/// The gradients of gate and up.
pub(crate) fn gated_backward(
    dy: &Tensor<2>,
    gate: &Tensor<2>,
    up: &Tensor<2>,
    activation: Activation,
) -> Option<(Tensor<2>, Tensor<2>)> {
    let (gate, up) = (gate.array()?, up.array()?);
    if up.element() != gate.element() || !up.in_fours() {
        return None;
    }
    let dup = up.like(up.element());
    let dgate = curve_backward(dy.array()?, gate, Some((up, &dup)), None, activation)?;
    Some((dgate.into(), dup.into()))
}

/// As [`gated_backward`], and f(gate) · up.
pub(crate) fn gated_backward_inner(
    dy: &Tensor<2>,
    gate: &Tensor<2>,
    up: &Tensor<2>,
    activation: Activation,
) -> Option<(Tensor<2>, Tensor<2>, Tensor<2>)> {
    let (gate, up) = (gate.array()?, up.array()?);
    if up.element() != gate.element() || !up.in_fours() {
        return None;
    }
    let [dup, inner] = [0, 1].map(|_| up.like(up.element()));
    let dgate = curve_backward(
        dy.array()?,
        gate,
        Some((up, &dup)),
        Some(&inner),
        activation,
    )?;
    Some((dgate.into(), dup.into(), inner.into()))
}

/// The gradient of x.
pub(crate) fn activate_backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    activation: Activation,
) -> Option<Tensor<2>> {
    Some(curve_backward(dy.array()?, x.array()?, None, None, activation)?.into())
}

fn curve_backward(
    dy: &Array<2>,
    gate: &Array<2>,
    up: Option<(&Array<2>, &Array<2>)>,
    inner: Option<&Array<2>>,
    activation: Activation,
) -> Option<Array<2>> {
    if !(dy.in_fours() && gate.in_fours()) {
        return None;
    }
    let (dgate, quarter) = (gate.like(gate.element()), gate.view.len() / 4);
    launch(
        gate.gpu(),
        &curve("gated_backward", gate.element(), dy.element(), activation),
        each(quarter),
        &[
            Arg::View(&dy.view),
            Arg::View(&gate.view),
            up.map_or(Arg::Null, |(up, _)| Arg::View(&up.view)),
            Arg::View(&dgate.view),
            up.map_or(Arg::Null, |(_, dup)| Arg::View(&dup.view)),
            inner.map_or(Arg::Null, |inner| Arg::View(&inner.view)),
            long(quarter),
        ],
    );
    Some(dgate)
}

/// Rows `rows` of x.
pub(crate) fn gather_rows(x: &Tensor<2>, rows: &[usize]) -> Option<Tensor<2>> {
    let x = x.array()?;
    let rows: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    Some(gather(x, &rows).into())
}

/// Rows `ids` of the table.
pub(crate) fn embedding(weight: &Tensor<2>, ids: &[u32]) -> Option<Tensor<2>> {
    let weight = weight.array()?;
    let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    Some(gather(weight, &ids).into())
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
