//! Durable replacement of whole files on a local disk.

use std::{
    fs::{self, File},
    io::{self, Write},
    num::NonZero,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{Advice, CWD, RenameFlags, fadvise, renameat_with},
    io::Errno,
};

use crate::{
    lock,
    steps::{Step, before},
};

/// Bytes of a file after which the disk is asked to begin with them.
const BEGIN_BYTES: u64 = 16 << 20;

/// A file operation that did not happen.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}: {source}")]
pub struct FileError {
    /// What was tried.
    pub operation: &'static str,
    /// On which path.
    pub path: PathBuf,
    /// What the system answered.
    #[source]
    pub source: io::Error,
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

/// Replaces `path` by `bytes`: a temporary file in the same directory, fsync, rename, fsync of the directory.
///
/// # Errors
/// As [`DurableFile::commit`].
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut file = DurableFile::create(path)?;
    file.append(bytes)?;
    file.commit()
}

/// A file that is written in pieces and appears under its name, whole and durable, at [`DurableFile::commit`]. Dropped
/// before that, it was never there.
#[derive(Debug)]
pub struct DurableFile {
    file: File,
    written: u64,
    /// Bytes that the disk was asked to begin with.
    begun: u64,
    temporary: PathBuf,
    path: PathBuf,
    committed: bool,
}

impl DurableFile {
    /// Starts a file that is to become `path`, under a temporary name in the same directory.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        loop {
            let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(format!(".{}-{unique}.tmp", std::process::id()));
            let temporary = path.with_file_name(name);
            match before(Step::CreateFile(&temporary)).and_then(|()| File::create_new(&temporary)) {
                Ok(file) => {
                    return Ok(Self {
                        file,
                        written: 0,
                        begun: 0,
                        temporary,
                        path: path.to_owned(),
                        committed: false,
                    });
                }
                // In containers every program is process 1: the name may be a dead one's leftover, or a live one's on
                // another machine. Neither is touched.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(at("create", &temporary)(error)),
            }
        }
    }

    /// The name it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds `bytes` at the end.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.write_all(bytes).map_err(at("write", &self.temporary))
    }

    /// Lets the disk begin while more is on its way, so that little is left for the sync to wait for. The system by itself
    /// would begin when a tenth of the memory is full.
    fn begin(&mut self) {
        let count = self.written - self.begun;
        if count >= BEGIN_BYTES {
            // On Linux this advice starts to write out what is dirty, waits for nothing, and drops only what is on the disk.
            let (start, count) = (self.begun, NonZero::new(count));
            // No promise rests on it.
            let _ = fadvise(&self.file, start, count, Advice::DontNeed);
            self.begun = self.written;
        }
    }

    /// Makes the content durable and puts it in place of whatever had the name: fsync, rename, fsync of the directory.
    ///
    /// # Errors
    /// Any step's failure; the old content is then untouched and the temporary file removed. Only a failed sync of the
    /// directory, the last step, leaves the new content in place without the promise that it outlives a power cut.
    pub fn commit(mut self) -> Result<(), FileError> {
        self.sync()?;
        self.put_in_place()?;
        sync_directory(directory_of(&self.path))
    }

    /// [`DurableFile::commit`] where nothing has the name yet; false, with nothing changed, where something has. Of two that
    /// ask at once one gets it, except on a file system that has neither exclusive renames nor hard links.
    pub(crate) fn commit_absent(mut self) -> Result<bool, FileError> {
        self.sync()?;
        if !rename_exclusively(&self.temporary, &self.path)
            .map_err(at("rename into", &self.path))?
        {
            return Ok(false);
        }
        self.committed = true;
        sync_directory(directory_of(&self.path))?;
        Ok(true)
    }

    /// [`DurableFile::commit`] where `expected` holds of what has the name; false, with nothing changed, where it does not.
    /// Those that ask at once take turns; [`DurableFile::commit`] waits for nobody.
    pub(crate) fn commit_over(
        mut self,
        expected: &dyn Fn(&fs::Metadata) -> bool,
    ) -> Result<bool, FileError> {
        self.sync()?;
        // A lock on the file that is to be replaced: who waits for it finds that the name leads to another one then.
        let Some((_turn, metadata)) = lock::take_turn(&self.path)? else {
            return Ok(false);
        };
        if !expected(&metadata) {
            return Ok(false);
        }
        self.put_in_place()?;
        sync_directory(directory_of(&self.path))?;
        Ok(true)
    }

    fn sync(&self) -> Result<(), FileError> {
        before(Step::SyncFile(&self.temporary))
            .and_then(|()| self.file.sync_all())
            .map_err(at("sync", &self.temporary))
    }

    fn put_in_place(&mut self) -> Result<(), FileError> {
        before(Step::Rename(&self.temporary, &self.path))
            .and_then(|()| fs::rename(&self.temporary, &self.path))
            .map_err(at("rename into", &self.path))?;
        self.committed = true;
        Ok(())
    }
}

impl Write for DurableFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        before(Step::Append(&self.temporary, bytes))?;
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        self.begin();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for DurableFile {
    fn drop(&mut self) {
        if !self.committed {
            // Whoever drops it already has an error to tell; a leftover temporary file is harmless.
            drop(
                before(Step::RemoveFile(&self.temporary))
                    .and_then(|()| fs::remove_file(&self.temporary)),
            );
        }
    }
}

/// Renames `from` to `to` unless that is there; false if it is.
fn rename_exclusively(from: &Path, to: &Path) -> io::Result<bool> {
    if to.try_exists()? {
        return Ok(false);
    }
    before(Step::Rename(from, to))?;
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(true),
        Err(Errno::EXIST) => return Ok(false),
        // NFS and many file systems in user space do not know it.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::hard_link(from, to) {
        Ok(()) => return fs::remove_file(from).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(_) => {}
    }
    // Neither is there: better this than no checkpoint at all on such a disk.
    if to.try_exists()? {
        return Ok(false);
    }
    fs::rename(from, to).map(|()| true)
}

/// Makes entries created, renamed or removed in `directory` durable.
pub fn sync_directory(directory: &Path) -> Result<(), FileError> {
    before(Step::SyncDirectory(directory))
        .and_then(|()| File::open(directory))
        .and_then(|opened| opened.sync_all())
        .map_err(at("sync directory", directory))
}

/// The directory that holds `path`; the current one for a bare file name.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
