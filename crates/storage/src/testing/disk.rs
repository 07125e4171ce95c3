//! What a power cut leaves on a local disk. While [`record`] runs, every step by which this crate changes the disk is written
//! down, and one of them may be made to fail. [`Recording::crash`] then builds a folder as a crash after any step may leave
//! it:
//!
//! - a file's bytes since its last sync are there, gone, there in part, or zeros;
//! - of the names made, moved and removed in a directory since its last sync, any may have been kept and any lost;
//! - what was synced is there.
//!
//! That is more than any one file system does, and what POSIX allows. Steps of other threads, and changes made past this
//! crate, are not seen.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use crate::steps::Step;

/// What a disk answers to a step instead of taking it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFault {
    /// This step fails; the next one works.
    Fail,
    /// No space from this step on: files and directories are neither made nor extended.
    Full,
}

/// The steps of one thread below one folder, and what was there before.
#[derive(Clone, Debug)]
pub struct Recording {
    before: Model,
    root: PathBuf,
    steps: Vec<Taken>,
}

/// A step that was taken.
#[derive(Clone, Debug)]
enum Taken {
    CreateDirectory(PathBuf),
    CreateFile(PathBuf),
    Append(PathBuf, Vec<u8>),
    SyncFile(PathBuf),
    SyncDirectory(PathBuf),
    Rename(PathBuf, PathBuf),
    RemoveFile(PathBuf),
    RemoveDirectory(PathBuf),
}

#[derive(Debug)]
struct Recorder {
    root: PathBuf,
    fault: Option<(usize, DiskFault)>,
    announced: usize,
    steps: Vec<Taken>,
}

thread_local! {
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

/// Runs `act` and records what it does below `root`, all of which is taken as durable before. With a fault, its step, counted
/// from 0, and perhaps later ones fail.
pub fn record<T>(
    root: &Path,
    fault: Option<(usize, DiskFault)>,
    act: impl FnOnce() -> T,
) -> io::Result<(T, Recording)> {
    let before = Model::of(root)?;
    let recorder = Recorder {
        root: root.to_owned(),
        fault,
        announced: 0,
        steps: Vec::new(),
    };
    RECORDER.set(Some(recorder));
    let done = act();
    let recorder = RECORDER.take().expect("set above, on this thread");
    let recording = Recording {
        before,
        root: recorder.root,
        steps: recorder.steps,
    };
    Ok((done, recording))
}

pub(crate) fn before(step: Step<'_>) -> io::Result<()> {
    RECORDER.with_borrow_mut(|recorder| {
        let Some(recorder) = recorder else {
            return Ok(());
        };
        let taken = match step {
            Step::CreateDirectory(path) => Taken::CreateDirectory(path.into()),
            Step::CreateFile(path) => Taken::CreateFile(path.into()),
            Step::Append(path, bytes) => Taken::Append(path.into(), bytes.into()),
            Step::SyncFile(path) => Taken::SyncFile(path.into()),
            Step::SyncDirectory(path) => Taken::SyncDirectory(path.into()),
            Step::Rename(from, to) => Taken::Rename(from.into(), to.into()),
            Step::RemoveFile(path) => Taken::RemoveFile(path.into()),
            Step::RemoveDirectory(path) => Taken::RemoveDirectory(path.into()),
        };
        let number = recorder.announced;
        recorder.announced += 1;
        let extends = matches!(
            taken,
            Taken::CreateDirectory(_) | Taken::CreateFile(_) | Taken::Append(..)
        );
        match recorder.fault {
            Some((at, DiskFault::Fail)) if at == number => {
                return Err(io::Error::other(format!("injected at step {number}")));
            }
            Some((at, DiskFault::Full)) if at <= number && extends => {
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    "injected: no space left",
                ));
            }
            _ => {}
        }
        // What lies outside, such as the sync of the folder above, is nothing that a crash could be rebuilt from.
        let path = match &taken {
            Taken::CreateDirectory(path)
            | Taken::CreateFile(path)
            | Taken::Append(path, _)
            | Taken::SyncFile(path)
            | Taken::SyncDirectory(path)
            | Taken::Rename(path, _)
            | Taken::RemoveFile(path)
            | Taken::RemoveDirectory(path) => path,
        };
        if path.starts_with(&recorder.root) {
            recorder.steps.push(taken);
        }
        Ok(())
    })
}

impl Recording {
    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }

    /// Makes `target`, which must not exist, into what a crash after the first `steps` steps may leave. `choice` chooses among
    /// what is possible: 0 loses all that was not synced, 1 keeps all of it, others are seeds.
    pub fn crash(&self, steps: usize, choice: u64, target: &Path) -> io::Result<()> {
        let mut model = self.before.clone();
        for step in &self.steps[..steps] {
            model.take(step, &self.root);
        }
        let mut fate = Fate {
            choice,
            state: choice,
        };
        model.write(Path::new(""), target, &mut fate)
    }
}

/// What is on the disk and what is only meant to be.
#[derive(Clone, Debug, Default)]
struct Model {
    files: Vec<Content>,
    /// By their path below the root.
    directories: BTreeMap<PathBuf, Directory>,
}

#[derive(Clone, Debug, Default)]
struct Content {
    durable: Vec<u8>,
    written: Vec<u8>,
}

#[derive(Clone, Debug, Default)]
struct Directory {
    durable: BTreeMap<OsString, Node>,
    current: BTreeMap<OsString, Node>,
    /// Since the last sync, in order.
    changes: Vec<Change>,
}

#[derive(Clone, Copy, Debug)]
enum Node {
    File(usize),
    Directory,
}

/// One atomic change of a directory: names that go and names that come.
#[derive(Clone, Debug)]
struct Change {
    gone: Option<OsString>,
    come: Option<(OsString, Node)>,
}

impl Model {
    /// The folder as it is.
    fn of(root: &Path) -> io::Result<Self> {
        let mut model = Self::default();
        model.read(root, Path::new(""))?;
        Ok(model)
    }

    fn read(&mut self, root: &Path, below: &Path) -> io::Result<()> {
        let mut entries = BTreeMap::new();
        for entry in fs::read_dir(root.join(below))? {
            let entry = entry?;
            let path = below.join(entry.file_name());
            let node = if entry.file_type()?.is_dir() {
                self.read(root, &path)?;
                Node::Directory
            } else {
                let content = fs::read(entry.path())?;
                self.files.push(Content {
                    durable: content.clone(),
                    written: content,
                });
                Node::File(self.files.len() - 1)
            };
            entries.insert(entry.file_name(), node);
        }
        let directory = Directory {
            durable: entries.clone(),
            current: entries,
            changes: Vec::new(),
        };
        self.directories.insert(below.to_owned(), directory);
        Ok(())
    }

    fn take(&mut self, step: &Taken, root: &Path) {
        let below = |path: &Path| {
            path.strip_prefix(root)
                .expect("recorded below the root")
                .to_owned()
        };
        match step {
            Taken::CreateDirectory(path) => {
                self.change(&below(path), |name| (None, Some((name, Node::Directory))));
                self.directories.insert(below(path), Directory::default());
            }
            Taken::CreateFile(path) => {
                self.files.push(Content::default());
                let file = Node::File(self.files.len() - 1);
                self.change(&below(path), |name| (None, Some((name, file))));
            }
            Taken::Append(path, bytes) => self.file(&below(path)).written.extend_from_slice(bytes),
            Taken::SyncFile(path) => {
                let file = self.file(&below(path));
                file.durable = file.written.clone();
            }
            Taken::SyncDirectory(path) => {
                if let Some(directory) = self.directories.get_mut(&below(path)) {
                    directory.durable = directory.current.clone();
                    directory.changes.clear();
                }
            }
            Taken::Rename(from, to) => {
                assert_eq!(
                    from.parent(),
                    to.parent(),
                    "renames within a directory are all that is modelled"
                );
                let node = self.node(&below(from)).expect("renamed, so it is there");
                // A directory takes along what is in it, under either name: a crash may keep the old one.
                for (path, directory) in self.directories.clone() {
                    if let Ok(inside) = path.strip_prefix(below(from)) {
                        self.directories.insert(below(to).join(inside), directory);
                    }
                }
                let gone = from.file_name().map(ToOwned::to_owned);
                self.change(&below(to), |name| (gone, Some((name, node))));
            }
            Taken::RemoveFile(path) => {
                if self.node(&below(path)).is_some() {
                    self.change(&below(path), |name| (Some(name), None));
                }
            }
            Taken::RemoveDirectory(path) => self.remove(&below(path)),
        }
    }

    fn remove(&mut self, path: &Path) {
        if self.node(path).is_none() {
            return;
        }
        let names: Vec<(OsString, Node)> =
            self.directories[path].current.clone().into_iter().collect();
        for (name, node) in names {
            match node {
                Node::Directory => self.remove(&path.join(name)),
                Node::File(_) => self.change(&path.join(name), |name| (Some(name), None)),
            }
        }
        self.change(path, |name| (Some(name), None));
    }

    fn change(
        &mut self,
        path: &Path,
        change: impl FnOnce(OsString) -> (Option<OsString>, Option<(OsString, Node)>),
    ) {
        let name = path.file_name().expect("not the root").to_owned();
        let parent = path.parent().expect("not the root");
        let (gone, come) = change(name);
        let directory = self
            .directories
            .get_mut(parent)
            .expect("made before what is in it");
        let change = Change { gone, come };
        change.apply(&mut directory.current);
        directory.changes.push(change);
    }

    fn node(&self, path: &Path) -> Option<Node> {
        let directory = self.directories.get(path.parent()?)?;
        directory.current.get(path.file_name()?).copied()
    }

    fn file(&mut self, path: &Path) -> &mut Content {
        match self.node(path) {
            Some(Node::File(file)) => &mut self.files[file],
            other => panic!("{} is {other:?}, not a file", path.display()),
        }
    }

    /// Writes what the fate leaves of the directory `path` as `target`.
    fn write(&self, path: &Path, target: &Path, fate: &mut Fate) -> io::Result<()> {
        fs::create_dir(target)?;
        let Some(directory) = self.directories.get(path) else {
            return Ok(());
        };
        let mut entries = directory.durable.clone();
        for change in &directory.changes {
            if fate.keeps() {
                change.apply(&mut entries);
            }
        }
        for (name, node) in entries {
            match node {
                Node::Directory => self.write(&path.join(&name), &target.join(&name), fate)?,
                Node::File(file) => fs::write(target.join(&name), fate.bytes(&self.files[file]))?,
            }
        }
        Ok(())
    }
}

impl Change {
    fn apply(&self, entries: &mut BTreeMap<OsString, Node>) {
        if let Some(gone) = &self.gone {
            entries.remove(gone);
        }
        if let Some((name, node)) = &self.come {
            entries.insert(name.clone(), *node);
        }
    }
}

/// Decides what a crash leaves of what was not synced.
struct Fate {
    choice: u64,
    state: u64,
}

impl Fate {
    fn keeps(&mut self) -> bool {
        match self.choice {
            0 => false,
            1 => true,
            _ => self.next().is_multiple_of(2),
        }
    }

    fn bytes(&mut self, content: &Content) -> Vec<u8> {
        if content.durable == content.written {
            return content.durable.clone();
        }
        // Nothing changes bytes in place, so what was synced is a part of it.
        let synced = content.durable.len();
        let added = content.written.len() - synced;
        let left = match (self.choice, self.next() % 4) {
            (0, _) | (2.., 0) => synced,
            (1, _) | (2.., 1) => synced + added,
            (_, 2) => synced + self.next() as usize % (added + 1),
            // The length was kept, and the blocks were not.
            (_, _) => return [&content.durable[..], &vec![0; added]].concat(),
        };
        content.written[..left].to_vec()
    }

    /// SplitMix64 (Steele, Lea and Flood 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}
