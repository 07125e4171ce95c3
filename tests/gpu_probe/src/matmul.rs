//! How close cubek's matmul strategies come to cuBLASLt at the shapes of a training step, and whether they agree.

use anyhow::{Result, anyhow, bail};
use cubecl::ir::{ElemType, FloatKind};
use cubecl::std::tensor::TensorHandle;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy as Levels;
use cubek::matmul::multi_level::components::tile::TileMatmulKind::Mma;
use cubek::matmul::multi_level::routines::batch::double_buffering::DoubleBufferingArgs;
use cubek::matmul::multi_level::routines::batch::ordered_double_buffering::OrderedSelectionArgs;
use cubek::matmul::multi_level::routines::batch::simple::SimpleArgs;
use cubek::matmul::routine::BlueprintStrategy::Inferred;
use cubek::matmul::strategy::Strategy;
use cubek::matmul::tiled;
use cubek::std::InputBinding;
use serde_json::json;

use crate::blas::{Blas, Plan};
use crate::device::{Buffer, Elem, Gpu, Timing, guarded, time};
use crate::report::Report;

/// A name and its (m, n, k); `dyT.x` is a weight gradient, all others are `x.WT`.
type Shape = (&'static str, [usize; 3]);

/// The products of a model of hidden size 2048 over 16384 tokens.
const LARGE: [Shape; 6] = [
    ("q/o", [16384, 2048, 2048]),
    ("k/v", [16384, 512, 2048]),
    ("gate/up", [16384, 8192, 2048]),
    ("down", [16384, 2048, 8192]),
    ("head", [4096, 32000, 2048]),
    ("dyT.x", [8192, 2048, 16384]),
];
/// Those of SmolLM2-135M over 2048 tokens.
const SMALL: [Shape; 3] = [
    ("135M q/o", [2048, 576, 576]),
    ("135M gate/up", [2048, 1536, 576]),
    ("135M head", [2048, 49152, 576]),
];

/// The strategies measured, the likeliest first. burn's default, `Strategy::Auto`, tries `SimpleCyclicCmma` first,
/// so that row is burn's. The last four are variants that burn's autotune would try.
pub const STRATEGIES: [&str; 11] = [
    "SimpleCyclicCmma",
    "SimpleTmaMma",
    "DoubleTmaMma",
    "SpecializedTmaMma",
    "SpecializedTmaCmma",
    "DoubleCyclicMma",
    "OrderedDoubleMma",
    "SimpleTmaMma-rows",
    "OrderedDoubleMma-8-2",
    "DoubleCyclicMma-spec",
    "TiledCmma-tma",
];

fn strategy(name: &str) -> Result<Strategy> {
    let levels = match name {
        "SimpleCyclicCmma" => Levels::SimpleCyclicCmma(Inferred(SimpleArgs::default())),
        "SimpleTmaMma" => Levels::SimpleTmaMma(Inferred(SimpleArgs::default())),
        "DoubleTmaMma" => Levels::DoubleTmaMma(Inferred(DoubleBufferingArgs::default())),
        "SpecializedTmaMma" => Levels::SpecializedTmaMma(Inferred(().into())),
        "SpecializedTmaCmma" => Levels::SpecializedTmaCmma(Inferred(().into())),
        "DoubleCyclicMma" => Levels::DoubleCyclicMma(Inferred(DoubleBufferingArgs::default())),
        "OrderedDoubleMma" => Levels::OrderedDoubleMma(Inferred(OrderedSelectionArgs::default())),
        "SimpleTmaMma-rows" => Levels::SimpleTmaMma(Inferred(SimpleArgs {
            multi_rows: true,
            tile_matmul: Mma,
        })),
        "OrderedDoubleMma-8-2" => Levels::OrderedDoubleMma(Inferred(OrderedSelectionArgs {
            tile_matmul: Mma,
            partition_k: Some(2),
            row_count: Some(8),
            rows_per_plane: Some(2),
        })),
        "DoubleCyclicMma-spec" => Levels::DoubleCyclicMma(Inferred(DoubleBufferingArgs {
            tile_matmul: Mma,
            specialized: true,
        })),
        "TiledCmma-tma" => {
            return Ok(tiled::Strategy::Cmma(Inferred(tiled::cmma::CmmaStrategy::tma())).into());
        }
        _ => bail!("no strategy {name}"),
    };
    Ok(levels.into())
}

/// The heading of the table.
pub const HEADING: &str = "matmul                 shape          m     n     k  out   TFLOP/s       ms  first ms  rel. err.";

/// Measures cuBLASLt (`which` is `cublaslt`) or the strategy named `which` at every shape.
pub fn run(which: &str, report: &mut Report) -> Result<()> {
    let gpu = Gpu::open()?;
    let blas = Blas::open()?;
    if which != "cublaslt" {
        let strategy = strategy(which)?;
        for (name, shape) in LARGE {
            let elem = if is_gradient(name) {
                Elem::F32
            } else {
                Elem::Bf16
            };
            let outcome = guarded(|| cubek(&gpu, &blas, &strategy, name, elem, shape));
            push(report, (which, name, elem.name()), shape, outcome)?;
            gpu.sync()?;
        }
        return Ok(());
    }
    for (name, shape) in LARGE.into_iter().chain(SMALL) {
        for (label, elem, beta) in [
            ("bf16", Elem::Bf16, 0.0),
            ("f32", Elem::F32, 0.0),
            ("f32+=", Elem::F32, 1.0),
        ] {
            if beta > 0.0 && !is_gradient(name) {
                continue;
            }
            let outcome = guarded(|| {
                let [left, right, out] = operands(&gpu, name, elem, shape)?;
                let plan = plan(&blas, name, elem, beta, shape)?;
                let ptrs = [left.raw.ptr, right.raw.ptr, out.raw.ptr];
                Ok((time(&gpu, 0.5, || blas.launch(&gpu, &plan, ptrs))?, None))
            });
            push(report, (which, name, label), shape, outcome)?;
        }
    }
    Ok(())
}

fn is_gradient(name: &str) -> bool {
    name == "dyT.x"
}

/// Random operands in row-major order, and memory for the result.
fn operands(gpu: &Gpu, name: &str, out: Elem, [m, n, k]: [usize; 3]) -> Result<[Buffer; 3]> {
    let (left, right) = if is_gradient(name) {
        (k * m, k * n)
    } else {
        (m * k, n * k)
    };
    // The result starts random too: what a launch leaves unwritten shows as an error.
    Ok([
        gpu.random(Elem::Bf16, left)?,
        gpu.random(Elem::Bf16, right)?,
        gpu.random(out, m * n)?,
    ])
}

fn plan(blas: &Blas, name: &str, out: Elem, beta: f32, shape: [usize; 3]) -> Result<Plan> {
    if is_gradient(name) {
        blas.weight_grad(out, beta, shape)
    } else {
        blas.linear(out, shape)
    }
}

/// Times `strategy` and compares its result with cuBLASLt's.
fn cubek(
    gpu: &Gpu,
    blas: &Blas,
    strategy: &Strategy,
    name: &str,
    elem: Elem,
    shape: [usize; 3],
) -> Result<(Timing, Option<f64>)> {
    let [m, n, k] = shape;
    let [left, right, out] = operands(gpu, name, elem, shape)?;
    let expected = gpu.buffer(elem, m * n)?;
    let bf16 = ElemType::Float(FloatKind::BF16);
    let out_type = if elem == Elem::Bf16 {
        bf16
    } else {
        ElemType::Float(FloatKind::F32)
    };
    let tensor = |buffer: &Buffer, shape: [usize; 2], strides: [usize; 2], elem: ElemType| {
        TensorHandle::new(buffer.handle.clone(), shape, strides, elem).binding()
    };
    // A transposed operand is a view: the strides say so.
    let left_strides = if is_gradient(name) { [1, m] } else { [k, 1] };
    let right_strides = if is_gradient(name) { [n, 1] } else { [1, k] };
    let launch = || {
        let mut types = MatmulElems::from_globals(&MatmulGlobalElems {
            lhs: bf16,
            rhs: bf16,
            out: out_type,
        });
        launch_ref(
            strategy,
            &gpu.client,
            InputBinding::new(tensor(&left, [m, k], left_strides, bf16), bf16),
            InputBinding::new(tensor(&right, [k, n], right_strides, bf16), bf16),
            tensor(&out, [m, n], [n, 1], out_type),
            &mut types,
        )
        .map_err(|error| anyhow!("{error:?}"))
    };
    // A kernel that does not compile leaves its error on what it should have written.
    let start = std::time::Instant::now();
    launch()?;
    gpu.written(&out.handle)?;
    let compiled = start.elapsed().as_secs_f64();
    let mut timing = time(gpu, 0.5, launch)?;
    timing.first = (compiled - timing.median).max(0.0);

    let plan = plan(blas, name, elem, 0.0, shape)?;
    blas.launch(gpu, &plan, [left.raw.ptr, right.raw.ptr, expected.raw.ptr])?;
    gpu.sync()?;
    let distance = gpu.distance(&out, &expected)?;
    Ok((timing, Some(distance)))
}

fn push(
    report: &mut Report,
    (which, name, out): (&str, &str, &str),
    [m, n, k]: [usize; 3],
    outcome: Result<(Timing, Option<f64>)>,
) -> Result<()> {
    let label = format!("{which:22} {name:12} {m:5} {n:5} {k:5}  {out:5}");
    let mut row =
        json!({"part": "matmul", "by": which, "shape": name, "m": m, "n": n, "k": k, "out": out});
    let (timing, distance) = match outcome {
        Ok(outcome) => outcome,
        Err(error) => return report.error(&label, row, &error),
    };
    let tflops = 2.0 * (m * n * k) as f64 / timing.median / 1e12;
    let (ms, first) = (timing.median * 1e3, timing.first * 1e3);
    row["tflops"] = tflops.into();
    row["ms"] = ms.into();
    row["first_ms"] = first.into();
    row["samples"] = json!([timing.samples.0, timing.samples.1]);
    row["relative_error"] = json!(distance);
    let distance = distance.map_or_else(|| "-".into(), |distance| format!("{distance:.1e}"));
    report.push(
        &format!("{label} {tflops:7.1} {ms:9.3} {first:9.0}  {distance:>9}"),
        &row,
    )
}
