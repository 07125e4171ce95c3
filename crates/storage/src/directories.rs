//! Directories made, moved and removed so that a power cut does not bring the old state back.

use std::{fs, io, path::Path};

use crate::{
    files::{FileError, at, directory_of, sync_directory},
    steps::{Step, before},
};

/// Makes `path` and its missing parents, durably. One that is there already is fine, also when another process makes it at
/// the same time.
pub fn create_directory(path: &Path) -> Result<(), FileError> {
    let missing: Vec<&Path> = path
        .ancestors()
        .take_while(|ancestor| !ancestor.as_os_str().is_empty() && !ancestor.exists())
        .collect();
    for ancestor in missing.iter().rev() {
        before(Step::CreateDirectory(ancestor)).map_err(at("create directory", ancestor))?;
    }
    fs::create_dir_all(path).map_err(at("create directory", path))?;
    for created in missing {
        sync_directory(directory_of(created))?;
    }
    Ok(())
}

/// Removes `path` with all it holds, durably. One that is not there is fine.
///
/// # Errors
/// Part of the content may then be gone.
pub fn remove_directory(path: &Path) -> Result<(), FileError> {
    match before(Step::RemoveDirectory(path)).and_then(|()| fs::remove_dir_all(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        removed => removed.map_err(at("remove directory", path))?,
    }
    sync_directory(directory_of(path))
}

/// Removes the file `path`, durably. One that is not there is fine.
pub fn remove_file(path: &Path) -> Result<(), FileError> {
    match before(Step::RemoveFile(path)).and_then(|()| fs::remove_file(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        removed => removed.map_err(at("remove", path))?,
    }
    sync_directory(directory_of(path))
}

/// Renames a file or directory within one file system, durably. A file in the way is replaced, as is an empty directory.
///
/// # Errors
/// The rename's, with nothing changed; or a directory's sync, with the rename done but not promised to outlive a power cut.
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    before(Step::Rename(from, to))
        .and_then(|()| fs::rename(from, to))
        .map_err(at("rename into", to))?;
    sync_directory(directory_of(to))?;
    if directory_of(from) != directory_of(to) {
        sync_directory(directory_of(from))?;
    }
    Ok(())
}
