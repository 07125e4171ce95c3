//! Finding NCCL and the CUDA driver, and refusing what is known not to work. No communicators.

use std::path::{Path, PathBuf};

use super::{
    ffi::{CudaTable, NcclTable, Unusable},
    id::UniqueId,
    version::{OLDEST, Version},
};
use crate::CollectiveError;

/// Names that NCCL is looked for under, through the system's loader (`LD_LIBRARY_PATH`, the loader's cache). The first is what
/// wheels and Debian ship, the second comes with development packages only.
pub const NCCL_NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// Names of the CUDA driver, which comes with the kernel's driver.
pub const CUDA_NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Why a library is not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// It is nowhere.
    #[error("no {what}: tried {}; {cure}", tried(.attempts))]
    Missing {
        /// Which library.
        what: &'static str,
        /// Names or paths, and the loader's words for each.
        attempts: Vec<(PathBuf, String)>,
        /// What to do.
        cure: &'static str,
    },
    /// It lacks a function.
    #[error("{} has no function {function}: it is another library, or older than {needed}", library.display())]
    Incomplete {
        /// The file that was loaded.
        library: PathBuf,
        /// What it lacks.
        function: &'static str,
        /// A version that has it.
        needed: String,
    },
    /// It is of a version that does not work.
    #[error("NCCL {found} in {} is {objection}", library.display())]
    Version {
        /// The file that was loaded.
        library: PathBuf,
        /// Its version, or its number if that is none.
        found: String,
        /// Why not, and what to use.
        objection: String,
    },
    /// It does not say its version.
    #[error("{} does not tell its version: error {code}", library.display())]
    Silent {
        /// The file that was loaded.
        library: PathBuf,
        /// NCCL's code.
        code: i32,
    },
}

impl From<LoadError> for CollectiveError {
    fn from(error: LoadError) -> Self {
        Self::Local {
            what: "load the libraries of a GPU".into(),
            cause: error.to_string(),
        }
    }
}

fn tried(attempts: &[(PathBuf, String)]) -> String {
    let attempts: Vec<String> = attempts
        .iter()
        .map(|(name, cause)| format!("{} ({cause})", name.display()))
        .collect();
    attempts.join(", ")
}

/// NCCL, loaded and of a version that works. It stays loaded.
#[derive(Clone, Copy)]
pub struct Library {
    table: &'static NcclTable,
    version: Version,
}

impl Library {
    /// Loads NCCL from `path`, or from the first of [`NCCL_NAMES`] that the system's loader finds.
    ///
    /// # Errors
    /// No such library, one that lacks functions, or a version that is too old or known to be faulty.
    pub fn open(path: Option<&Path>) -> Result<Self, LoadError> {
        let cure = "install NCCL 2 (package libnccl2, or the nvidia-nccl wheel with its folder in LD_LIBRARY_PATH)";
        let needed = || format!("NCCL {OLDEST}");
        let (table, library) = first("NCCL", path, &NCCL_NAMES, cure, needed, NcclTable::open)?;
        let code = match table.version() {
            Ok(code) => code,
            Err(code) => return Err(LoadError::Silent { library, code }),
        };
        let Some(version) = Version::from_code(code) else {
            return Err(LoadError::Version {
                library,
                found: code.to_string(),
                objection: "of no version that there is".into(),
            });
        };
        if let Some(objection) = version.objection() {
            return Err(LoadError::Version {
                library,
                found: version.to_string(),
                objection,
            });
        }
        tracing::debug!(library = %library.display(), %version, "NCCL is loaded");
        Ok(Self { table, version })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Makes the id of a new communicator. It holds an address of this process, which waits there for the ranks and so has to
    /// live until all are connected. No device is needed. The address is that of an interface which NCCL chooses; the variable
    /// `NCCL_SOCKET_IFNAME` chooses another.
    ///
    /// # Errors
    /// NCCL's, such as a machine without a network interface.
    pub fn unique_id(&self) -> Result<UniqueId, CollectiveError> {
        let local = |cause| CollectiveError::Local {
            what: "make an NCCL id".into(),
            cause,
        };
        let bytes = self.table.unique_id();
        let bytes = bytes.map_err(|code| local(self.explain(code)))?;
        UniqueId::try_from(&bytes[..]).map_err(|error| local(error.to_string()))
    }

    /// A code in words.
    pub(super) fn explain(&self, code: i32) -> String {
        words("NCCL", code, &self.table.error_string(code))
    }

    pub(super) fn table(&self) -> &'static NcclTable {
        self.table
    }
}

/// The CUDA driver, loaded. It stays loaded.
#[derive(Clone, Copy)]
pub struct Driver {
    table: &'static CudaTable,
}

impl Driver {
    /// Loads the driver from `path`, or from the first of [`CUDA_NAMES`] that the system's loader finds.
    ///
    /// # Errors
    /// No such library, or one that lacks functions.
    pub fn open(path: Option<&Path>) -> Result<Self, LoadError> {
        let cure = "this machine has no NVIDIA driver, or the container was not given it";
        let needed = || "CUDA 7".into();
        let what = "CUDA driver";
        let (table, library) = first(what, path, &CUDA_NAMES, cure, needed, CudaTable::open)?;
        tracing::debug!(library = %library.display(), "the CUDA driver is loaded");
        Ok(Self { table })
    }

    /// Number of devices that this process sees.
    ///
    /// # Errors
    /// The driver's, such as no device.
    pub fn devices(self) -> Result<usize, CollectiveError> {
        let count = self.table.devices();
        let count = count.map_err(|code| CollectiveError::Local {
            what: "count CUDA devices".into(),
            cause: self.explain(code),
        })?;
        Ok(count.max(0) as usize)
    }

    /// A code in words.
    pub(super) fn explain(self, code: i32) -> String {
        words("CUDA", code, &self.table.error_string(code))
    }

    pub(super) fn table(self) -> &'static CudaTable {
        self.table
    }
}

fn first<T>(
    what: &'static str,
    path: Option<&Path>,
    names: &[&str],
    cure: &'static str,
    needed: impl Fn() -> String,
    open: impl Fn(&Path) -> Result<T, Unusable>,
) -> Result<(T, PathBuf), LoadError> {
    let names = match path {
        Some(path) => vec![path.to_owned()],
        None => names.iter().map(PathBuf::from).collect(),
    };
    let mut attempts = Vec::new();
    for library in names {
        match open(&library) {
            Ok(table) => return Ok((table, library)),
            Err(Unusable::NotLoaded(cause)) => attempts.push((library, cause)),
            Err(Unusable::Without(function)) => {
                return Err(LoadError::Incomplete {
                    library,
                    function,
                    needed: needed(),
                });
            }
        }
    }
    Err(LoadError::Missing {
        what,
        attempts,
        cure,
    })
}

/// `NCCL says "unhandled system error" (2)`; a code that a library does not know either is still a number.
fn words(library: &str, code: i32, text: &str) -> String {
    if text.is_empty() {
        return format!("{library} error {code}, which it has no words for");
    }
    format!("{library} says \"{text}\" ({code})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_without_words_stay_numbers() {
        assert_eq!(
            words("NCCL", 2, "unhandled system error"),
            "NCCL says \"unhandled system error\" (2)"
        );
        assert_eq!(
            words("CUDA", -77, ""),
            "CUDA error -77, which it has no words for"
        );
    }

    #[test]
    fn a_missing_library_is_named_with_the_loaders_words_and_a_cure() {
        let path = Path::new("/nowhere/libnccl.so.2");
        let error = Library::open(Some(path)).err().expect("no such file");
        let text = error.to_string();
        assert!(
            text.starts_with("no NCCL: tried /nowhere/libnccl.so.2 ("),
            "{text}"
        );
        assert!(text.contains("No such file"), "{text}");
        assert!(text.ends_with("LD_LIBRARY_PATH)"), "{text}");
        let error = Driver::open(Some(Path::new("/nowhere/libcuda.so.1"))).err();
        let text = error.expect("no such file").to_string();
        assert!(
            text.contains("no CUDA driver: tried /nowhere/libcuda.so.1"),
            "{text}"
        );
    }

    #[test]
    fn all_names_that_were_tried_are_told() {
        let nothing =
            |_: &Path| -> Result<(), Unusable> { Err(Unusable::NotLoaded("not there".into())) };
        let error = first(
            "NCCL",
            None,
            &NCCL_NAMES,
            "install it",
            String::new,
            nothing,
        );
        assert_eq!(
            error.expect_err("nothing is there").to_string(),
            "no NCCL: tried libnccl.so.2 (not there), libnccl.so (not there); install it"
        );
    }

    #[test]
    fn another_library_under_the_name_is_refused() {
        // Every test program on this system is linked with it.
        let error = Library::open(Some(Path::new("libc.so.6"))).err();
        let text = error.expect("libc is not NCCL").to_string();
        assert!(text.starts_with("libc.so.6 has no function nccl"), "{text}");
        assert!(text.contains("older than NCCL 2.18.0"), "{text}");
    }
}
