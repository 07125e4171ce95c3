//! cuBLASLt on our stream: bf16 operands, float32 sums.

use std::ffi::c_void;

use anyhow::{Context as _, Result};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::result as driver;

use crate::device::{Elem, Gpu};

/// What NVIDIA recommends on Hopper.
const WORKSPACE: usize = 32 << 20;

/// A handle of the library and its scratch memory.
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
}

/// A matmul of fixed shape, with the algorithm that the library's heuristic chose. Lives as long as the process.
pub struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
    beta: f32,
}

impl Blas {
    /// Opens the library.
    pub fn open() -> Result<Self> {
        let handle = result::create_handle().context("cublasLtCreate")?;
        Ok(Self {
            handle,
            workspace: unsafe { driver::malloc_sync(WORKSPACE)? },
        })
    }

    /// Plans `out (m x n) = x (m x k) . w (n x k) transposed`, all row-major.
    pub fn linear(&self, out: Elem, [m, n, k]: [usize; 3]) -> Result<Plan> {
        // In the library's column-major eyes: out' (n x m) = w' transposed (n x k) . x' (k x m).
        self.plan(out, 0.0, (true, [k, n]), (false, [k, m]), [n, m])
    }

    /// Plans `out (m x n) = beta out + dy (k x m) transposed . x (k x n)`, all row-major.
    pub fn weight_grad(&self, out: Elem, beta: f32, [m, n, k]: [usize; 3]) -> Result<Plan> {
        // Column-major: out' (n x m) = x' (n x k) . dy' (m x k) transposed.
        self.plan(out, beta, (false, [n, k]), (true, [m, k]), [n, m])
    }

    fn plan(
        &self,
        out: Elem,
        beta: f32,
        (trans_a, a): (bool, [usize; 2]),
        (trans_b, b): (bool, [usize; 2]),
        d: [usize; 2],
    ) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB,
        };
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let layout = |elem, [rows, cols]: [usize; 2]| {
            result::create_matrix_layout(elem, rows as u64, cols as u64, rows as i64)
        };
        let out = if out == Elem::Bf16 {
            CUDA_R_16BF
        } else {
            CUDA_R_32F
        };
        let (a, b, d) = (
            layout(CUDA_R_16BF, a)?,
            layout(CUDA_R_16BF, b)?,
            layout(out, d)?,
        );
        let desc =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)?;
        let (pref, workspace) = (result::create_matmul_pref()?, WORKSPACE);
        let algo = unsafe {
            for (attribute, transposed) in [
                (CUBLASLT_MATMUL_DESC_TRANSA, trans_a),
                (CUBLASLT_MATMUL_DESC_TRANSB, trans_b),
            ] {
                let operation = i32::from(transposed);
                result::set_matmul_desc_attribute(
                    desc,
                    attribute,
                    (&raw const operation).cast(),
                    4,
                )?;
            }
            let most =
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(pref, most, (&raw const workspace).cast(), 8)?;
            let best = result::get_matmul_algo_heuristic(self.handle, desc, a, b, d, d, pref)
                .context("cublasLtMatmulAlgoGetHeuristic")?;
            result::destroy_matmul_pref(pref)?;
            best.algo
        };
        Ok(Plan {
            desc,
            a,
            b,
            d,
            algo,
            beta,
        })
    }

    /// Launches `plan` on our stream with the addresses of its operands in row-major order: x and w, or dy and x.
    pub fn launch(&self, gpu: &Gpu, plan: &Plan, [left, right, out]: [u64; 3]) -> Result<()> {
        // Both plans name the right operand first, since the library sees everything transposed.
        let (a, b, d) = (
            right as *const c_void,
            left as *const c_void,
            out as *mut c_void,
        );
        let alpha = 1f32;
        unsafe {
            result::matmul(
                self.handle,
                plan.desc,
                (&raw const alpha).cast(),
                (&raw const plan.beta).cast(),
                a,
                plan.a,
                b,
                plan.b,
                d,
                plan.d,
                d,
                plan.d,
                &raw const plan.algo,
                self.workspace as *mut c_void,
                WORKSPACE,
                gpu.stream.cu_stream().cast(),
            )?;
        }
        Ok(())
    }
}
