//! `checkpoint reshard`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use checkpoint::{Checkpoint, Kind, TensorSpec};
use serde_json::json;

use crate::{
    Usage,
    print::{bytes, counted, print},
    progress::Progress,
    target::{beside, lock, resolve},
};

/// What to write anew, and where.
#[derive(clap::Args)]
pub struct ReshardArgs {
    /// A checkpoint, or a directory of checkpoints.
    dir: PathBuf,
    /// Number of ranks.
    #[arg(long, value_name = "RANKS", value_parser = clap::value_parser!(u32).range(1..))]
    world: u32,
    /// Directory of checkpoints to write it below.
    #[arg(long, required_unless_present = "in_place")]
    out: Option<PathBuf>,
    /// Replace the checkpoint by the new one, once that is whole.
    #[arg(long, conflicts_with = "out")]
    in_place: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub fn reshard(args: &ReshardArgs) -> Result<u8> {
    let path = resolve(&args.dir)?;
    let own = beside(&path);
    let out = args.out.clone().unwrap_or_else(|| own.clone());
    if args.out.as_ref().is_some_and(|out| real(out) == real(&own)) {
        let reason = "that is the checkpoint's own directory; say --in-place to replace it";
        return Err(Usage(format!("{}: {reason}", out.display())).into());
    }
    let _lock = if args.in_place { lock(&own)? } else { None };
    let checkpoint = Checkpoint::open(&path)?;
    let manifest = checkpoint.manifest();
    let elements: usize = manifest
        .tensors
        .iter()
        .filter_map(TensorSpec::elements)
        .sum();
    let kinds = Kind::ALL
        .iter()
        .filter(|&&kind| checkpoint.has(kind))
        .count();
    let progress = Progress::new("reshard", (4 * elements * kinds) as u64);
    let done = checkpoint::reshard(&checkpoint, &out, args.world, &|bytes| progress.add(bytes));
    drop(progress);
    let done = done.with_context(|| format!("reshard {} to {}", path.display(), out.display()))?;
    if args.json {
        let all = json!({
            "path": done.path,
            "step": done.step,
            "bytes": done.bytes,
            "from_world": manifest.world,
            "world": args.world,
        });
        return print(&all.to_string());
    }
    print(&format!(
        "{}: step {}, {} instead of {}, {}",
        done.path.display(),
        done.step,
        counted(args.world as usize, "rank"),
        manifest.world,
        bytes(done.bytes)
    ))
}

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}
