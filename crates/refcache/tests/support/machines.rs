//! Machines that share a folder.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use storage::{Folder, LocalStore, testing::HostileStore};
use tempfile::TempDir;

use super::report;

/// A folder that machines share, and two machines' stores.
pub struct Machines {
    pub directory: TempDir,
    pub hostile: HostileStore,
    pub shared: Folder,
}

/// A directory in memory where there is one: these tests fail on their own, and wait for no disk.
pub fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    directory.unwrap()
}

impl Machines {
    pub fn new() -> Self {
        let directory = scratch();
        let store = LocalStore::new(directory.path().join("shared"));
        let hostile = HostileStore::new(Arc::new(store));
        let shared = Folder::of(Arc::new(hostile.clone()));
        Self {
            directory,
            hostile,
            shared,
        }
    }

    /// The same shared folder, seen by nobody's faults.
    pub fn whole(&self) -> Folder {
        Folder::open(&self.directory.path().join("shared")).unwrap()
    }

    pub fn machine(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The scope's folder in the shared one, seen by nobody's faults.
    pub fn scope(&self) -> Folder {
        self.whole().below(&report(&self.machine("a")).digest)
    }

    /// Objects that are segments.
    pub fn objects(&self) -> usize {
        let names = self.scope().list().unwrap();
        names.iter().filter(|it| it.ends_with(".segment")).count()
    }
}
