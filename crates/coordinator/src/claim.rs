//! Whose checkpoints a folder holds: a run puts its name beside them, and two runs do not mix in one `checkpoint.path`.
//!
//! ```text
//! <checkpoint.path>/owner.json    {"run": id of the run, "output": its directory}
//! ```

use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, CheckpointError, Newest};
use serde::{Deserialize, Serialize};
use storage::{Condition, FileError, Folder, Put};

/// The owner's file.
const OWNER: &str = "owner.json";

/// The run that a folder of checkpoints belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Its id.
    pub run: String,
    /// Its directory, for people.
    pub output: PathBuf,
}

/// Why a folder of checkpoints is not this run's.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another run has claimed it.
    #[error(
        "checkpoint.path {folder} belongs to another run, which began in {output}; choose another folder, or remove that run's \
         checkpoints and {OWNER} there if nobody needs them"
    )]
    Taken {
        /// The folder.
        folder: PathBuf,
        /// The other run's directory.
        output: PathBuf,
    },
    /// Nobody has claimed it, but it holds what another run saved.
    #[error(
        "checkpoint.path {folder} holds step {step} of another run; choose another folder, or move that run's checkpoints away"
    )]
    Foreign {
        /// The folder.
        folder: PathBuf,
        /// The other run's newest step there.
        step: u64,
    },
    /// The owner's file says nothing.
    #[error("{path} names no run: {reason}; remove it if the checkpoints beside it are this run's")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// The newest checkpoint cannot be looked at any more.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The store cannot be asked, or written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Refuses a folder that another run has claimed. Nothing is written.
///
/// # Errors
/// [`ClaimError::Taken`].
pub fn check(folder: &Path, own: &Owner) -> Result<(), ClaimError> {
    let folder = Folder::open(folder)?;
    match owner(&folder)? {
        Some(owner) if owner.run != own.run => Err(ClaimError::Taken {
            folder: folder.path(),
            output: owner.output,
        }),
        _ => Ok(()),
    }
}

/// Refuses checkpoints that another configuration wrote: those of a folder that nobody has claimed, or of a claim that was taken
/// away by hand.
///
/// # Errors
/// [`ClaimError::Foreign`].
pub fn check_newest(folder: &Path, run_digest: &str, newest: &Newest) -> Result<(), ClaimError> {
    let Some((step, path)) = &newest.found else {
        return Ok(());
    };
    if Checkpoint::open(path)?.manifest().info.run_digest == run_digest {
        return Ok(());
    }
    Err(ClaimError::Foreign {
        folder: folder.to_owned(),
        step: *step,
    })
}

/// Claims the folder. Of two runs that try at once, one is refused.
///
/// # Errors
/// [`ClaimError::Taken`].
pub fn claim(folder: &Path, own: &Owner) -> Result<(), ClaimError> {
    let text = serde_json::to_string(own).expect("an owner is JSON");
    let content = format!("{text}\n");
    match Folder::open(folder)?.put(OWNER, content.as_bytes(), Condition::Absent)? {
        Put::Done => Ok(()),
        Put::Refused => check(folder, own),
    }
}

/// Gives up a claim on a folder in which nothing was saved, so that another run may have it.
///
/// # Errors
/// The store cannot be asked, or written.
pub fn release(folder: &Path, own: &Owner) -> Result<(), ClaimError> {
    let folder = Folder::open(folder)?;
    if owner(&folder)?.is_some_and(|it| it.run == own.run) {
        folder.remove(OWNER)?;
    }
    Ok(())
}

fn owner(folder: &Folder) -> Result<Option<Owner>, ClaimError> {
    let Some(bytes) = folder.read(OWNER)? else {
        return Ok(None);
    };
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|error| ClaimError::Damaged {
        path: folder.path().join(OWNER),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    fn run(id: &str) -> Owner {
        Owner {
            run: id.into(),
            output: Path::new("runs").join(id),
        }
    }

    fn check_taken(result: Result<(), ClaimError>, by: &str) {
        let error = result.unwrap_err().to_string();
        for part in ["checkpoint.path", by, "choose another folder", OWNER] {
            assert!(error.contains(part), "`{part}` is missing in: {error}");
        }
    }

    #[test]
    fn a_folder_belongs_to_who_claims_it_first_until_that_one_lets_go() {
        let directory = tempfile::tempdir().unwrap();
        let folder = &directory.path().join("checkpoints");
        check(folder, &run("a")).unwrap();
        assert!(!folder.exists(), "who only looks makes nothing");
        claim(folder, &run("a")).unwrap();
        // Again, also from where its directory was moved to.
        let moved = Owner {
            output: "elsewhere".into(),
            ..run("a")
        };
        check(folder, &moved).unwrap();
        claim(folder, &moved).unwrap();
        check_taken(check(folder, &run("b")), "runs/a");
        check_taken(claim(folder, &run("b")), "runs/a");
        release(folder, &run("b")).unwrap();
        check_taken(check(folder, &run("b")), "runs/a");
        release(folder, &moved).unwrap();
        claim(folder, &run("b")).unwrap();
        check_taken(check(folder, &run("a")), "runs/b");
    }

    #[test]
    fn a_claim_that_cannot_be_read_is_refused_by_place() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(OWNER), "{}").unwrap();
        let error = check(directory.path(), &run("a")).unwrap_err().to_string();
        assert!(error.contains(OWNER) && error.contains("`run`"), "{error}");
    }
}
