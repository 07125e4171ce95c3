//! Whether a run can leave anything behind where `job.output` says.

use std::{fs::File, path::Path};

use storage::create_directory;

/// The run directory cannot be written. Another configuration is the cure.
#[derive(Debug, thiserror::Error)]
#[error(
    "job.output: {reason}; name a folder that can be made and written on the coordinator's machine"
)]
pub struct Unwritable {
    reason: String,
}

/// Makes the run directory `output` and the file in it that every start opens first, and changes nothing else.
///
/// # Errors
/// It cannot be made or written.
pub(crate) fn prepare(output: &Path) -> Result<(), Unwritable> {
    let unwritable = |reason| Unwritable { reason };
    create_directory(output).map_err(|error| unwritable(error.to_string()))?;
    let lock = output.join(".lock");
    let opened = File::options().append(true).create(true).open(&lock);
    opened.map_err(|error| unwritable(format!("open {}: {error}", lock.display())))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_directory_that_cannot_be_written_is_refused_by_its_key() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        File::create(&file).expect("a file");
        let taken = folder.path().join("taken");
        // Whatever user runs this: a folder cannot be opened for writing.
        std::fs::create_dir_all(taken.join(".lock")).expect("a folder");
        for output in [&file, &file.join("below"), &taken] {
            let error = prepare(output)
                .expect_err("it cannot be written")
                .to_string();
            for word in [
                "job.output: ",
                &output.display().to_string(),
                "; name a folder",
            ] {
                assert!(error.contains(word), "no `{word}` in: {error}");
            }
        }
        prepare(&folder.path().join("new/run")).expect("it can be made");
    }
}
