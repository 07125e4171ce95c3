//! `checkpoint pin` and `checkpoint unpin`.

use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::Checkpoint;

use crate::{Usage, print::print, target::is_one};

pub fn pin(dir: &Path, note: &str) -> Result<u8> {
    one(dir)?;
    checkpoint::pin(dir, note).with_context(|| format!("pin {}", dir.display()))?;
    print(&format!("{}: pinned", dir.display()))
}

pub fn unpin(dir: &Path) -> Result<u8> {
    one(dir)?;
    Checkpoint::open(dir)?;
    let was = checkpoint::unpin(dir)?;
    let before = if was { "no longer" } else { "was not" };
    print(&format!("{}: {before} pinned", dir.display()))
}

/// The newest of a directory is another one tomorrow: a pin names its checkpoint.
fn one(dir: &Path) -> Result<()> {
    if is_one(dir) {
        return Ok(());
    }
    let reason = format!(
        "{} is not a checkpoint; name a folder such as {}",
        dir.display(),
        dir.join("step-00000100").display()
    );
    Err(Usage(reason).into())
}
