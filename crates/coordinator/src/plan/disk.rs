//! Room on disk: what a run leaves behind at most, by file system, against what is free there.

use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::Checkpoint;
use serde::Serialize;
use worker::plan::Amount;

use super::Cadence;
use crate::config::Config;

/// Needs of one file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// What will be there.
    pub items: Vec<DiskItem>,
    /// Sum of the items.
    pub needed_bytes: u64,
    /// What may still be written; `None` where the system does not tell.
    pub free_bytes: Option<u64>,
    /// Whether it suffices; true where the system does not tell.
    pub fits: bool,
}

/// One thing that a run writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskItem {
    /// What it is.
    pub what: &'static str,
    /// Where.
    pub path: PathBuf,
    /// Bytes still to be written, at most.
    pub bytes: u64,
}

/// Bytes of a stored reference value with its key.
const REFERENCE_VALUE: u64 = 40;
/// Header of a checkpoint's file by tensor, and its manifest's share.
const FILES_BYTES: u64 = 1 << 20;
/// f32 weight and two moments.
const PARAMETER_BYTES: u64 = 12;

/// `references` is how many values the reference store does not have yet; all of the run's where nobody has looked. The store is
/// shared with other runs and models, so that its size says nothing.
pub(super) fn disks(
    config: &Config,
    run: &Amount,
    cadence: &Cadence,
    references: u64,
) -> Vec<Disk> {
    // The next one is written and read back before an old one is removed.
    let best = u64::from(config.checkpoint.keep_best);
    let most = config.checkpoint.keep_last as u64 + best + cadence.kept_by_step + 1;
    let kept = cadence.saves.min(most);
    let checkpoint = PARAMETER_BYTES * run.trained_parameters + FILES_BYTES;
    let checkpoints = &config.checkpoint.path;
    let export = config.job.output.join("export");
    let store = config.training_value("reference", "store");
    let store = store.and_then(toml::Value::as_str).unwrap_or_default();
    let items = [
        (
            "checkpoints",
            checkpoints.clone(),
            (kept * checkpoint).saturating_sub(that_will_go(checkpoints, &config.run_digest())),
        ),
        (
            "export",
            export.clone(),
            // One that is there is not made again.
            if checkpoint::has_weights(&export) {
                0
            } else {
                4 * run.parameters + FILES_BYTES
            },
        ),
        (
            "reference log-probs",
            store.into(),
            REFERENCE_VALUE * references,
        ),
    ];
    let items = items.map(|(what, path, bytes)| DiskItem { what, path, bytes });
    // What goes to an object store needs no room here.
    let here = |item: &DiskItem| item.bytes > 0 && !storage::is_remote(&item.path);
    by_file_system(items.into_iter().filter(here))
}

fn by_file_system(items: impl Iterator<Item = DiskItem>) -> Vec<Disk> {
    let mut disks: Vec<(Option<u64>, Disk)> = Vec::new();
    for item in items {
        let space = storage::space(&item.path).ok();
        let device = space.as_ref().map(|space| space.device);
        let found = disks.iter_mut().find(|(other, _)| *other == device);
        if let Some((_, disk)) = found {
            disk.needed_bytes += item.bytes;
            disk.items.push(item);
        } else {
            let disk = Disk {
                needed_bytes: item.bytes,
                items: vec![item],
                free_bytes: space.map(|space| space.free_bytes),
                fits: true,
            };
            disks.push((device, disk));
        }
    }
    let disks = disks.into_iter().map(|(_, disk)| disk);
    disks
        .map(|disk| Disk {
            fits: disk.free_bytes.is_none_or(|free| disk.needed_bytes <= free),
            ..disk
        })
        .collect()
}

/// Bytes of checkpoints that an earlier start of this run has left, and that go as new ones come: not of pinned ones, which stay
/// beside them, nor of what cannot be opened.
fn that_will_go(checkpoints: &Path, run_digest: &str) -> u64 {
    let Ok(entries) = fs::read_dir(checkpoints) else {
        return 0;
    };
    let sizes = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        let found = Checkpoint::open(&path).ok()?;
        let stays = checkpoint::pinned(&path).ok()?.is_some();
        let own = found.manifest().info.run_digest == run_digest;
        (own && !stays).then(|| found.bytes())
    });
    sizes.sum()
}
