//! Matrix products by cuBLASLt: f32 sums of bf16 operands on the tensor cores, or f32 throughout without TF32.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys;
use cudarc::driver::result as driver;

use crate::{Element, Gpu, GpuError, View};

/// Bytes that cuBLASLt may use beside the operands: what NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// A row-major operand, possibly read transposed.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// Its elements.
    pub view: &'a View,
    /// Whether its transpose is meant.
    pub transposed: bool,
}

/// `out = lhs · rhs + plus`, `[m, k]` by `[k, n]`, all row-major and without gaps. Both operands have one element type; the
/// result may have another.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Summands of an element.
    pub k: usize,
    /// `[m, k]`, or `[k, m]` transposed.
    pub lhs: Operand<'a>,
    /// `[k, n]`, or `[n, k]` transposed.
    pub rhs: Operand<'a>,
    /// `[m, n]`.
    pub out: &'a View,
    /// What the product is added to, `[m, n]` of the result's type; may be `out` itself.
    pub plus: Option<&'a View>,
}

/// What an algorithm is chosen by. Where the tokens are rows of the result, their number is not part of it: the same algorithm for
/// any number gives a row the same bits whatever other rows share the product. Where they are summands, of a weight's gradient, it
/// is: an algorithm that splits many summands among blocks is wrong for few.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    /// Rows, columns and summands, with [`TOKENS`] for the tokens as rows.
    shape: [usize; 3],
    transposed: [bool; 2],
    operands: Element,
    out: Element,
    plus: bool,
    /// Of the pointers to left, right and result, in bytes.
    alignment: [u32; 3],
}

/// The number of rows that algorithms are chosen for.
const TOKENS: usize = 8192;

/// How cuBLASLt is called for a shape.
#[derive(Clone, Copy)]
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    lhs: sys::cublasLtMatrixLayout_t,
    rhs: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

pub(crate) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    algorithms: Mutex<HashMap<Kind, sys::cublasLtMatmulAlgo_t>>,
    plans: Mutex<Plans>,
}

type Plans = HashMap<(Kind, [usize; 3]), Plan>;

impl Products {
    pub fn new() -> Result<Self, GpuError> {
        let handle = lt::create_handle().map_err(|error| GpuError::Product {
            shape: "at the start".into(),
            reason: format!("{error:?}"),
        })?;
        // SAFETY: kept for good.
        let workspace =
            unsafe { driver::malloc_sync(WORKSPACE_BYTES) }.map_err(GpuError::of("cuMemAlloc"))?;
        Ok(Self {
            handle,
            workspace,
            algorithms: Mutex::default(),
            plans: Mutex::default(),
        })
    }

    fn plan(
        &self,
        plans: &mut Plans,
        kind: &Kind,
        shape: [usize; 3],
    ) -> Result<Plan, lt::CublasError> {
        if plans.len() >= PLANS_MAX {
            // SAFETY: a plan is used only by who holds `plans`.
            unsafe { plans.drain().try_for_each(|(_, plan)| plan.destroy()) }?;
            let algorithms = self.algorithms.lock();
            algorithms.unwrap_or_else(PoisonError::into_inner).clear();
        }
        if let Some(plan) = plans.get(&(*kind, shape)) {
            return Ok(*plan);
        }
        let mut algorithms = self
            .algorithms
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let algorithm = match algorithms.get(kind) {
            Some(algorithm) => *algorithm,
            None => *algorithms.entry(*kind).or_insert(self.choose(kind)?),
        };
        let mut plan = Plan::new(kind, shape, algorithm)?;
        if !plan.serves(self.handle) {
            // A shape that the usual algorithm does not take.
            plan.algorithm = plan.choose(self.handle, kind)?;
        }
        plans.insert((*kind, shape), plan);
        Ok(plan)
    }

    /// The algorithm for the shape of `kind`.
    fn choose(&self, kind: &Kind) -> Result<sys::cublasLtMatmulAlgo_t, lt::CublasError> {
        let none = sys::cublasLtMatmulAlgo_t { data: [0; 8] };
        let plan = Plan::new(kind, kind.shape, none)?;
        let algorithm = plan.choose(self.handle, kind);
        // SAFETY: made here and used nowhere else.
        unsafe { plan.destroy()? };
        algorithm
    }
}

/// Plans that are kept: more than the packs of an epoch ask for in most runs.
const PLANS_MAX: usize = 20_000;

impl Plan {
    /// cuBLASLt is column-major: it sees every row-major matrix transposed, and computes outᵀ = rhsᵀ · lhsᵀ.
    fn new(
        kind: &Kind,
        [m, n, k]: [usize; 3],
        algorithm: sys::cublasLtMatmulAlgo_t,
    ) -> Result<Self, lt::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let operation = lt::create_matmul_desc(
            // Neither TF32 nor sums in less than f32.
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )?;
        let [lhs_transposed, rhs_transposed] = kind.transposed;
        for (attribute, transposed) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, rhs_transposed),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, lhs_transposed),
        ] {
            // CUBLAS_OP_N and CUBLAS_OP_T.
            let way = i32::from(transposed);
            // SAFETY: the attribute is a C enumeration.
            unsafe {
                lt::set_matmul_desc_attribute(
                    operation,
                    attribute,
                    (&raw const way).cast(),
                    size_of_val(&way),
                )?;
            }
        }
        let stored = |rows: usize, inner: usize, transposed: bool| {
            if transposed {
                [inner, rows]
            } else {
                [rows, inner]
            }
        };
        let layout = |[rows, columns]: [usize; 2], element: Element| {
            let kind = kind_of(element);
            lt::create_matrix_layout(kind, columns as u64, rows as u64, columns as i64)
        };
        Ok(Self {
            operation,
            lhs: layout(stored(m, k, lhs_transposed), kind.operands)?,
            rhs: layout(stored(k, n, rhs_transposed), kind.operands)?,
            out: layout([m, n], kind.out)?,
            algorithm,
        })
    }

    /// Whether the algorithm takes this shape with the workspace that there is: partial sums of more rows need more of it.
    fn serves(&self, handle: sys::cublasLtHandle_t) -> bool {
        let mut found = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: all descriptors live, and zeros are a result.
        unsafe {
            let answer = sys::cublasLtMatmulAlgoCheck(
                handle,
                self.operation,
                self.rhs,
                self.lhs,
                self.out,
                self.out,
                &raw const self.algorithm,
                found.as_mut_ptr(),
            );
            answer.result().is_ok() && found.assume_init().workspaceSize <= WORKSPACE_BYTES
        }
    }

    /// What cuBLASLt's heuristic recommends.
    fn choose(
        &self,
        handle: sys::cublasLtHandle_t,
        kind: &Kind,
    ) -> Result<sys::cublasLtMatmulAlgo_t, lt::CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Wish;
        let wish = lt::create_matmul_pref()?;
        let bytes = WORKSPACE_BYTES as u64;
        let [lhs_bytes, rhs_bytes, out_bytes] = kind.alignment;
        // SAFETY: the attributes are numbers of these sizes; all descriptors live.
        unsafe {
            lt::set_matmul_pref_attribute(
                wish,
                Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of_val(&bytes),
            )?;
            for (attribute, bytes) in [
                (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, rhs_bytes),
                (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, lhs_bytes),
                (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out_bytes),
                (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out_bytes),
            ] {
                let (value, size) = ((&raw const bytes).cast(), size_of_val(&bytes));
                lt::set_matmul_pref_attribute(wish, attribute, value, size)?;
            }
            let found = lt::get_matmul_algo_heuristic(
                handle,
                self.operation,
                self.rhs,
                self.lhs,
                self.out,
                self.out,
                wish,
            );
            lt::destroy_matmul_pref(wish)?;
            Ok(found?.algo)
        }
    }

    /// # Safety
    /// It must not be used any more.
    unsafe fn destroy(self) -> Result<(), lt::CublasError> {
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            lt::destroy_matmul_desc(self.operation)?;
            for layout in [self.lhs, self.rhs, self.out] {
                lt::destroy_matrix_layout(layout)?;
            }
        }
        Ok(())
    }
}

impl Gpu {
    /// Computes `product` after all that was asked for before.
    ///
    /// # Errors
    /// Shapes that cuBLASLt refuses, or a device that stopped working.
    ///
    /// # Panics
    /// If a view does not have the elements of its shape.
    pub fn product(&self, product: &Product<'_>) -> Result<(), GpuError> {
        let Product {
            m,
            n,
            k,
            lhs,
            rhs,
            out,
            plus,
        } = *product;
        assert_eq!(lhs.view.len(), m * k, "elements of [{m}, {k}]");
        assert_eq!(rhs.view.len(), k * n, "elements of [{k}, {n}]");
        assert_eq!(out.len(), m * n, "elements of [{m}, {n}]");
        assert_eq!(
            lhs.view.element(),
            rhs.view.element(),
            "operands of one type"
        );
        if let Some(plus) = plus {
            assert_eq!(
                (plus.len(), plus.element()),
                (out.len(), out.element()),
                "what is added to"
            );
        }
        if m * n == 0 {
            return Ok(());
        }
        if k == 0 {
            return match plus {
                Some(plus) if plus.pointer() != out.pointer() => out.copy(plus),
                Some(_) => Ok(()),
                None => out.clear(),
            };
        }
        self.bind();
        // Of a weight's gradient the tokens are the summands, of all else the rows.
        let shape = if lhs.transposed {
            [m, n, k]
        } else {
            [TOKENS, n, k]
        };
        let kind = Kind {
            shape,
            transposed: [lhs.transposed, rhs.transposed],
            operands: lhs.view.element(),
            out: out.element(),
            plus: plus.is_some(),
            alignment: [
                alignment(lhs.view),
                alignment(rhs.view),
                alignment(out).min(plus.map_or(u32::MAX, alignment)),
            ],
        };
        let refused = |error: lt::CublasError| GpuError::Product {
            shape: format!(
                "[{m}, {k}] by [{k}, {n}] of {:?} into {:?}",
                kind.operands, kind.out
            ),
            reason: format!("{error:?}"),
        };
        let plans = self.products.plans.lock();
        let mut plans = plans.unwrap_or_else(PoisonError::into_inner);
        let plan = self
            .products
            .plan(&mut plans, &kind, [m, n, k])
            .map_err(refused)?;
        let (one, keep) = (1f32, if plus.is_some() { 1f32 } else { 0f32 });
        let name = || (kind.name(), 2.0 * (m * n * k) as f64);
        // SAFETY: the views have the elements of the layouts, as checked above, and outlive the work in stream order.
        let launched = || unsafe {
            lt::matmul(
                self.products.handle,
                plan.operation,
                (&raw const one).cast(),
                (&raw const keep).cast(),
                rhs.view.pointer() as *const c_void,
                plan.rhs,
                lhs.view.pointer() as *const c_void,
                plan.lhs,
                plus.unwrap_or(out).pointer() as *const c_void,
                plan.out,
                out.pointer() as *mut c_void,
                plan.out,
                &raw const plan.algorithm,
                self.products.workspace as *mut c_void,
                WORKSPACE_BYTES,
                self.stream.cast(),
            )
            .map_err(refused)
        };
        self.timed(name, launched)
    }
}

impl Kind {
    /// The product without its number of tokens, which packs do not share.
    fn name(&self) -> String {
        let [m, n, k] = self.shape;
        match self.transposed {
            [true, _] => format!("xᵀ·y {m}×{n}"),
            [_, true] => format!("x·wᵀ {n}×{k}"),
            _ => format!("y·w {k}×{n}"),
        }
    }
}

fn kind_of(element: Element) -> sys::cudaDataType {
    match element {
        Element::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Element::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

/// The alignment that cuBLASLt may count on.
fn alignment(view: &View) -> u32 {
    1 << view.pointer().trailing_zeros().min(8)
}
