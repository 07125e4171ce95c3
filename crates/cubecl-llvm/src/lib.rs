//! Stands in for cubecl-llvm 0.11.3, so that the `cuda` feature compiles without a download.
//!
//! cubecl-cuda contains two compilers and picks one by its feature `cpp`: CUDA C++ through NVRTC with it, LLVM without.
//! The LLVM one is linked either way, and the build script of the crate that holds it fetches an LLVM bundle from the
//! network. `kernels` switches `cubecl/cuda-cpp` on, so nothing of that crate is ever called; the workspace's
//! `[patch.crates-io]` puts this one in its place, with the items that cubecl-cuda names and no more. (The C++ path is
//! also the one that keeps TMA, clusters and asynchronous copies, which the LLVM path switches off.)
//!
//! Nothing here compiles a kernel. Where cubecl-cuda would reach this code, it was built without `cubecl/cuda-cpp`, and
//! the message says so.
//!
//! # When cubecl moves
//! `tests/pinned.rs` fails as soon as `Cargo.lock` names another cubecl. Then compare with what the new cubecl-cuda
//! takes from `cubecl_llvm` (`compiler.rs`, `runtime.rs`, `compute/context.rs`), follow it here, and raise the versions
//! in this crate's manifest and in that test. If the new cubecl-cuda makes the LLVM back end optional, delete this
//! crate.

#![cfg(feature = "nvptx")]

pub mod nvptx;
pub mod shared;

use std::{convert::Infallible, ffi::c_char, fmt};

use cubecl_core::{Compiler, ir::nvidia::SmArch, prelude::KernelDefinition};
use cubecl_environment::backtrace::BackTrace;
use cubecl_runtime::{compiler::CompilationError, kernel::BufferIOAttr};

use nvptx::ptx_version::PtxVersion;

/// What whoever gets here has to change.
pub(crate) const NOT_BUILT_IN: &str =
    "the LLVM back end of cubecl is not part of this build; build with the feature cubecl/cuda-cpp";

/// What the compiler was to compile for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LlvmTarget {
    /// The host's processor.
    #[default]
    Cpu,
    /// An NVIDIA device.
    Nvptx,
}

/// The compiler, which refuses every kernel.
#[derive(Clone, Debug, Default)]
pub struct PlironCompiler {
    /// What it was to compile for.
    pub target: LlvmTarget,
}

/// Options that cubecl-cuda fills in. It completes the struct from its default, so one field stays beyond those it names.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// Architecture of a processor.
    pub arch: Option<u32>,
    /// Architecture of an NVIDIA device.
    pub sm_arch: Option<SmArch>,
    /// Newest PTX version that the driver loads.
    pub ptx_version: Option<PtxVersion>,
    /// Whether launch parameters are grid constants.
    pub grid_constants: bool,
    /// Stands for the options that cubecl-cuda does not name.
    pub others: (),
}

/// A compiled module. It cannot exist: nothing here makes an [`Infallible`].
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// PTX text, ending in NUL.
    pub ptx: Vec<c_char>,
    /// Text of the intermediate representation.
    pub ir: String,
    /// Shared memory of a launch.
    pub shared_memory_size: usize,
    /// How the kernel uses each buffer.
    pub io: Vec<BufferIOAttr>,
    /// Keeps the struct from being made.
    pub never: Infallible,
}

/// What a compilation was to give.
#[derive(Clone, Debug)]
pub enum PlironArtifact {
    /// Code in this process's memory.
    Jit,
    /// A module for an NVIDIA device.
    NvptxCode(NvptxModule),
}

impl fmt::Display for PlironArtifact {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(NOT_BUILT_IN)
    }
}

impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;

    fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: NOT_BUILT_IN.into(),
            backtrace: BackTrace::capture(),
        })
    }

    fn extension(&self) -> &'static str {
        "ll"
    }

    fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}
