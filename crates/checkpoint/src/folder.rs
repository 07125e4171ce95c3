//! Names in a directory of checkpoints. Nothing here judges what a file holds.

use std::{cmp::Reverse, io, path::Path};

use storage::{FileError, Folder};

/// The manifest's name in a checkpoint's folder.
pub const MANIFEST: &str = "manifest.json";

/// The folder of the checkpoint of `step` below `dir`.
pub(crate) fn of_step(dir: &Folder, step: u64) -> Folder {
    dir.below(&format!("step-{step:08}"))
}

/// The step that a folder's name stands for.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    // One name per step: `step-1` or `step-+0000001` are somebody else's.
    (name == format!("step-{step:08}")).then_some(step)
}

/// The name of a rank's file. The generation in it keeps the files of a second save of a step apart from those of a
/// committed first one until the new manifest takes its place.
pub(crate) fn file_name(rank: u32, world: u32, generation: u64) -> String {
    format!("rank-{rank:05}-of-{world:05}.generation-{generation}.safetensors")
}

/// Whether a file that its manifest does not list remains of a save by `generation` or an earlier one: a rank's file, or a
/// temporary of one or of a manifest. A later generation's may be part of its commit at this very moment.
pub(crate) fn is_remains(name: &str, generation: u64) -> bool {
    if name.starts_with(MANIFEST) {
        return true;
    }
    let rank_file = name
        .strip_prefix("rank-")
        .and_then(|rest| rest.split_once(".generation-"));
    let of = rank_file
        .and_then(|(_, rest)| rest.split_once(".safetensors"))
        .map(|(of, _)| of.parse());
    matches!(of, Some(Ok(of)) if generation >= of)
}

/// All checkpoint folders below `dir`, the newest step first, complete or not. None if there is no such directory.
pub(crate) fn list(dir: &Folder) -> Result<Vec<(u64, Folder)>, FileError> {
    let names = dir.list()?;
    let steps = names.iter().filter_map(|name| step_of(name));
    let mut folders: Vec<(u64, Folder)> = steps.map(|step| (step, of_step(dir, step))).collect();
    folders.sort_by_key(|(step, _)| Reverse(*step));
    Ok(folders)
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
