//! Kernels: CUDA C++ that is compiled for the device at run time, and their launches.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::result as driver;
use cudarc::driver::sys;
use cudarc::nvrtc::result as nvrtc;

use crate::{Gpu, GpuError, View};

/// A kernel in a source text, with the macros that specialise it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Program {
    /// CUDA C++ in which the kernels are `extern "C"`.
    pub source: &'static str,
    /// The kernel's name.
    pub entry: &'static str,
    /// Macros and their values.
    pub macros: &'static [&'static str],
    /// Values of [`Program::macros`], as many.
    pub values: [i32; Program::MACROS],
}

impl Program {
    /// Most macros that a program may have.
    pub const MACROS: usize = 4;

    /// A kernel that is what it is.
    pub const fn plain(source: &'static str, entry: &'static str) -> Self {
        Self {
            source,
            entry,
            macros: &[],
            values: [0; Self::MACROS],
        }
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// A pointer to the view's first element.
    View(&'a View),
    /// `int`.
    Int(i32),
    /// `long long`.
    Long(i64),
    /// `float`.
    Float(f32),
    /// A null pointer.
    Null,
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks in x, y and z. Nothing is launched if one of them is 0.
    pub blocks: [usize; 3],
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
}

impl Launch {
    /// So many blocks in a row, without dynamic shared memory.
    pub fn new(blocks: usize, threads: usize) -> Self {
        Self {
            blocks: [blocks, 1, 1],
            threads,
            shared: 0,
        }
    }
}

/// What has been compiled and loaded.
pub(crate) struct Programs {
    capability: u32,
    headers: PathBuf,
    functions: Mutex<HashMap<Program, sys::CUfunction>>,
    modules: Mutex<HashMap<(usize, [i32; Program::MACROS]), sys::CUmodule>>,
}

impl Programs {
    pub fn new(capability: u32, headers: PathBuf) -> Self {
        Self {
            capability,
            headers,
            functions: Mutex::default(),
            modules: Mutex::default(),
        }
    }

    fn function(&self, program: &Program) -> Result<sys::CUfunction, GpuError> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(program) {
            return Ok(*function);
        }
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (program.source.as_ptr() as usize, program.values);
        let module = match modules.get(&key) {
            Some(module) => *module,
            None => *modules.entry(key).or_insert(self.compile(program)?),
        };
        let name = CString::new(program.entry).expect("a name without NUL");
        // SAFETY: modules are never unloaded.
        let function = unsafe { driver::module::get_function(module, name) }
            .map_err(GpuError::of("cuModuleGetFunction"))?;
        functions.insert(*program, function);
        Ok(function)
    }

    fn compile(&self, program: &Program) -> Result<sys::CUmodule, GpuError> {
        // The suffix opens the instructions that only this generation has.
        let generation = if self.capability >= 90 { "a" } else { "" };
        let mut options = vec![
            format!("--gpu-architecture=sm_{}{generation}", self.capability),
            "--std=c++17".into(),
            format!("--include-path={}", self.headers.display()),
            format!("--include-path={}", self.headers.join("cccl").display()),
        ];
        let macros = program.macros.iter().zip(program.values);
        options.extend(macros.map(|(name, value)| format!("-D{name}={value}")));
        let refused = |log: String| GpuError::Compile {
            entry: program.entry.into(),
            log,
        };
        let source = CString::new(program.source).expect("a source without NUL");
        let compiled =
            nvrtc::create_program(&source, None).map_err(|it| refused(format!("{it:?}")))?;
        // SAFETY: the program was just made, and is destroyed once, after the last use. `image` has the size that NVRTC names.
        unsafe {
            if nvrtc::compile_program(compiled, &options).is_err() {
                let log = nvrtc::get_program_log(compiled).unwrap_or_default();
                let log = log.iter().map(|&byte| byte as u8).collect::<Vec<_>>();
                let log = String::from_utf8_lossy(&log).trim_matches('\0').to_owned();
                let _ = nvrtc::destroy_program(compiled);
                return Err(refused(log));
            }
            let mut size = 0;
            let asked = cudarc::nvrtc::sys::nvrtcGetCUBINSize(compiled, &raw mut size).result();
            asked.map_err(|it| refused(format!("{it:?}")))?;
            let mut image = vec![0u8; size];
            let read = cudarc::nvrtc::sys::nvrtcGetCUBIN(compiled, image.as_mut_ptr().cast());
            read.result().map_err(|it| refused(format!("{it:?}")))?;
            let _ = nvrtc::destroy_program(compiled);
            driver::module::load_data(image.as_ptr().cast())
                .map_err(GpuError::of("cuModuleLoadData"))
        }
    }
}

impl Gpu {
    /// Launches `program` after all that was asked for before. Compiles it the first time.
    ///
    /// The kernel reads and writes what it likes: the caller answers for its arguments.
    ///
    /// # Errors
    /// A kernel that does not compile, or a device that stopped working.
    pub fn launch(
        &self,
        program: &Program,
        launch: Launch,
        arguments: &[Arg<'_>],
    ) -> Result<(), GpuError> {
        if launch.blocks.contains(&0) {
            return Ok(());
        }
        self.bind();
        let function = self.programs.function(program)?;
        // A kernel reads as many bytes as its parameter has, the low ones.
        let mut words: Vec<u64> = arguments.iter().map(Arg::word).collect();
        let mut pointers: Vec<*mut std::ffi::c_void> = words
            .iter_mut()
            .map(|word| std::ptr::from_mut(word).cast())
            .collect();
        let [x, y, z] = launch.blocks.map(|blocks| blocks as u32);
        let name = || (program.entry.to_owned(), 0.0);
        // SAFETY: the function's module is never unloaded, and the driver copies the words before it returns.
        self.timed(name, || unsafe {
            if launch.shared > STATIC_SHARED_BYTES {
                driver::function::set_function_attribute(
                    function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    launch.shared as i32,
                )
                .map_err(GpuError::of("cuFuncSetAttribute"))?;
            }
            driver::launch_kernel(
                function,
                (x, y, z),
                (launch.threads as u32, 1, 1),
                launch.shared as u32,
                self.stream,
                &mut pointers,
            )
            .map_err(GpuError::of(program.entry))
        })
    }
}

/// Shared memory that a block has without asking for more.
const STATIC_SHARED_BYTES: usize = 48 << 10;

impl Arg<'_> {
    fn word(&self) -> u64 {
        match *self {
            Self::View(view) => view.pointer(),
            Self::Int(value) => u64::from(value.cast_unsigned()),
            Self::Long(value) => value.cast_unsigned(),
            Self::Float(value) => u64::from(value.to_bits()),
            Self::Null => 0,
        }
    }
}
