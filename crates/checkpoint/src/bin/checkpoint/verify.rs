//! `checkpoint verify`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use checkpoint::{Checkpoint, CheckpointError, Damage, newest_watched};
use serde::Serialize;

use crate::{
    DONE, FAILED,
    print::print,
    progress::Progress,
    target::{check_there, is_one, none_there},
};

/// What `verify` has to tell.
#[derive(Default, Serialize)]
struct Outcome {
    ok: bool,
    /// The checkpoint that holds.
    path: Option<PathBuf>,
    /// Files in its folder that are no part of it.
    unlisted: Vec<String>,
    /// Where files differ.
    damages: Vec<Damage>,
    /// Checkpoints that do not hold, and why.
    refused: Vec<Refused>,
}

#[derive(Serialize)]
struct Refused {
    path: PathBuf,
    reason: String,
}

pub fn verify(dir: &Path, json: bool) -> Result<u8> {
    check_there(dir)?;
    let outcome = if is_one(dir) {
        verify_one(dir)?
    } else {
        verify_newest(dir)?
    };
    if json {
        print(&serde_json::to_string(&outcome)?)?;
    } else {
        for damage in &outcome.damages {
            eprintln!("damaged: {damage}");
        }
        for refused in &outcome.refused {
            eprintln!("error: {}", refused.reason);
        }
        if let Some(path) = &outcome.path {
            print(&format!("{}: every byte verified", path.display()))?;
        }
        for name in &outcome.unlisted {
            print(&format!("note: {name} is no part of the checkpoint"))?;
        }
    }
    Ok(if outcome.ok { DONE } else { FAILED })
}

fn verify_one(path: &Path) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let verify = |checkpoint: Checkpoint| {
        let progress = Progress::new("verify", checkpoint.bytes());
        checkpoint.verify_watched(&|bytes| progress.add(bytes))
    };
    match Checkpoint::open(path).and_then(verify) {
        Ok(verified) => {
            outcome.ok = true;
            outcome.path = Some(path.to_owned());
            outcome.unlisted = verified.unlisted;
        }
        Err(error @ CheckpointError::Incomplete { .. }) => return Err(error.into()),
        Err(error) => {
            outcome.refused.push(Refused {
                path: path.to_owned(),
                reason: error.to_string(),
            });
            if let CheckpointError::Damaged { damages, .. } = error {
                outcome.damages = damages;
            }
        }
    }
    Ok(outcome)
}

fn verify_newest(dir: &Path) -> Result<Outcome> {
    let progress = Progress::new("verify", 0);
    let newest = newest_watched(dir, &|bytes| progress.add(bytes))?;
    drop(progress);
    if newest.found.is_none() && newest.refused.is_empty() {
        return Err(none_there(dir));
    }
    let refused = newest.refused.into_iter();
    Ok(Outcome {
        ok: refused.len() == 0,
        path: newest.found.map(|(_, path)| path),
        refused: refused
            .map(|(path, reason)| Refused { path, reason })
            .collect(),
        ..Outcome::default()
    })
}
