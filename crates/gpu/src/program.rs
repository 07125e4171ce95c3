//! Kernels: CUDA C++ that is compiled for the device at run time, or found compiled on disk, and their launches.

use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cudarc::driver::result as driver;
use cudarc::driver::sys;
use cudarc::nvrtc::result as nvrtc;

use crate::cache::{Cache, Key, Recipe, headers_digest};
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

/// How this process came to its kernels so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelReport {
    /// Texts that were compiled; one holds all kernels of a source for one set of macros.
    pub compiled: usize,
    /// Those that were found compiled on disk.
    pub loaded: usize,
    /// Seconds that both took.
    pub seconds: f64,
    /// Where they are kept; `None` where they are not.
    pub folder: Option<PathBuf>,
    /// What went wrong with what is kept, with its cure; the kernels are right nevertheless.
    pub problems: Vec<String>,
}

/// What has been compiled and loaded.
pub(crate) struct Programs {
    capability: u32,
    headers: PathBuf,
    kept: Option<Kept>,
    functions: Mutex<HashMap<Program, sys::CUfunction>>,
    modules: Mutex<HashMap<(usize, [i32; Program::MACROS]), sys::CUmodule>>,
    report: Mutex<KernelReport>,
}

/// Where compiled kernels are kept, and what their keys have in common.
struct Kept {
    cache: Cache,
    headers: [u8; 32],
    compiler: [i32; 2],
}

impl Programs {
    pub fn new(capability: u32, headers: PathBuf, cache: Option<Cache>) -> Self {
        let mut report = KernelReport::default();
        let kept = cache.and_then(|cache| match Kept::new(cache, &headers) {
            Ok(kept) => Some(kept),
            Err(problem) => {
                report.problems.push(problem);
                None
            }
        });
        report.folder = kept.as_ref().map(|kept| kept.cache.folder().to_owned());
        Self {
            capability,
            headers,
            kept,
            functions: Mutex::default(),
            modules: Mutex::default(),
            report: Mutex::new(report),
        }
    }

    pub fn report(&self) -> MutexGuard<'_, KernelReport> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
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
            None => *modules.entry(key).or_insert(self.module(program)?),
        };
        let name = CString::new(program.entry).expect("a name without NUL");
        // SAFETY: modules are never unloaded.
        let function = unsafe { driver::module::get_function(module, name) }
            .map_err(GpuError::of("cuModuleGetFunction"))?;
        functions.insert(*program, function);
        Ok(function)
    }

    /// The program's text on the device, from disk if it is kept there.
    fn module(&self, program: &Program) -> Result<sys::CUmodule, GpuError> {
        let start = Instant::now();
        let options = self.options(program);
        let key = self.kept.as_ref().map(|kept| {
            let recipe = Recipe {
                source: program.source,
                options: &options,
                headers: kept.headers,
                capability: self.capability,
                compiler: kept.compiler,
            };
            (&kept.cache, Key::of(&recipe))
        });
        let found = key.and_then(|(cache, key)| self.found(cache, &key));
        let was_found = found.is_some();
        let module = if let Some(module) = found {
            module
        } else {
            let image = self.compile(program, options)?;
            let module = load(&image)?;
            if let Some((cache, key)) = key
                && let Err(error) = cache.write(&key, &image)
            {
                self.report().problem(error.to_string());
            }
            module
        };
        let mut report = self.report();
        report.compiled += usize::from(!was_found);
        report.loaded += usize::from(was_found);
        report.seconds += start.elapsed().as_secs_f64();
        Ok(module)
    }

    /// The module under `key`, unless the cache has none that can be used.
    fn found(&self, cache: &Cache, key: &Key) -> Option<sys::CUmodule> {
        let problem = match cache.read(key) {
            Ok(None) => return None,
            Ok(Some(image)) => match load(&image) {
                Ok(module) => return Some(module),
                Err(error) => format!("a kernel kept in {}: {error}", cache.folder().display()),
            },
            Err(error) => error.to_string(),
        };
        self.report().problem(problem);
        None
    }

    /// The compiler's options, without those that say where headers lie.
    fn options(&self, program: &Program) -> Vec<String> {
        // The suffix opens the instructions that only this generation has.
        let generation = if self.capability >= 90 { "a" } else { "" };
        let mut options = vec![
            format!("--gpu-architecture=sm_{}{generation}", self.capability),
            "--std=c++17".into(),
        ];
        let macros = program.macros.iter().zip(program.values);
        options.extend(macros.map(|(name, value)| format!("-D{name}={value}")));
        options
    }

    fn compile(&self, program: &Program, mut options: Vec<String>) -> Result<Vec<u8>, GpuError> {
        options.extend([
            format!("--include-path={}", self.headers.display()),
            format!("--include-path={}", self.headers.join("cccl").display()),
        ]);
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
            Ok(image)
        }
    }
}

impl Kept {
    fn new(cache: Cache, headers: &std::path::Path) -> Result<Self, String> {
        let reason = |reason: &dyn fmt::Display| {
            format!("compiled kernels are not kept for the next start: {reason}")
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: NVRTC is there, and writes a number each.
        let asked = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) };
        asked
            .result()
            .map_err(|error| reason(&format!("nvrtcVersion: {error:?}")))?;
        let headers = headers_digest(headers).map_err(|error| reason(&error))?;
        Ok(Self {
            cache,
            headers,
            compiler: [major, minor],
        })
    }
}

impl KernelReport {
    /// Notes what went wrong, once: a folder that cannot be written says so for every kernel.
    fn problem(&mut self, problem: String) {
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }
}

fn load(image: &[u8]) -> Result<sys::CUmodule, GpuError> {
    // SAFETY: the driver copies the image, which is one that NVRTC made, before it returns.
    unsafe { driver::module::load_data(image.as_ptr().cast()) }
        .map_err(GpuError::of("cuModuleLoadData"))
}

impl Gpu {
    /// How the kernels that were asked for so far came to be.
    pub fn kernels(&self) -> KernelReport {
        self.programs.report().clone()
    }

    /// Makes `program` ready, so that its first launch need not.
    ///
    /// # Errors
    /// As [`Gpu::launch`].
    pub fn prepare(&self, program: &Program) -> Result<(), GpuError> {
        self.bind();
        self.programs.function(program).map(drop)
    }

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
