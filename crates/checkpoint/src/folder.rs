//! Names in a directory of checkpoints. Nothing here judges what a file holds.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use storage::FileError;

/// The manifest's name in a checkpoint's folder.
pub const MANIFEST: &str = "manifest.json";

/// The folder of the checkpoint of `step` below `dir`.
pub(crate) fn path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:08}"))
}

/// The step that a folder's name stands for.
pub(crate) fn step_of(folder: &Path) -> Option<u64> {
    let name = folder.file_name()?.to_str()?;
    let step = name.strip_prefix("step-")?.parse().ok()?;
    // One name per step: `step-1` or `step-+0000001` are somebody else's.
    (name == format!("step-{step:08}")).then_some(step)
}

/// The name of a rank's file. The generation in it keeps the files of a second save of a step apart from those of a
/// committed first one until the new manifest takes its place.
pub(crate) fn file_name(rank: u32, world: u32, generation: u64) -> String {
    format!("rank-{rank:05}-of-{world:05}.generation-{generation}.safetensors")
}

/// Whether a name is one of those that writing a checkpoint makes: a rank's file, the manifest, or a temporary of either.
pub(crate) fn is_ours(name: &str) -> bool {
    let rank_file = name.starts_with("rank-") && name.contains(".safetensors");
    rank_file || name.starts_with(MANIFEST)
}

/// All checkpoint folders below `dir`, the newest step first, complete or not. None if there is no such directory.
pub(crate) fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, FileError> {
    let mut folders: Vec<(u64, PathBuf)> = names(dir)?
        .into_iter()
        .filter_map(|name| {
            let folder = dir.join(name);
            Some((step_of(&folder)?, folder))
        })
        .collect();
    folders.sort_by(|one, other| other.cmp(one));
    Ok(folders)
}

/// Names of the entries of `dir` that are text, sorted. None if there is no such directory.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>, FileError> {
    let listed = fs::read_dir(dir).and_then(|entries| {
        entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<Vec<_>>>()
    });
    let listed = match listed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed.map_err(at("list", dir))?,
    };
    let mut names: Vec<String> = listed
        .into_iter()
        .filter_map(|name| name.into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

/// Attaches operation and path to the system's answer.
pub(crate) fn at<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError {
        operation,
        path: path.to_owned(),
        source,
    }
}
