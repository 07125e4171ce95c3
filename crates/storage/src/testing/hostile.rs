//! A store that misbehaves at a chosen call.

use std::{
    collections::BTreeMap,
    fmt, io, mem,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{Condition, FileError, Object, Put, Store, Upload, Version, files::at};

/// What happens at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call fails and changes nothing; the next one works.
    Fail,
    /// The call is carried out, and its answer is an error; the next one works.
    LoseAnswer,
    /// The process dies before the call: it and all later ones fail, and nothing is tidied up.
    Crash,
    /// The process dies right after the call.
    CrashAfter,
    /// The process dies when so many bytes of an append or a put are there: of a put under its final name, as a disk that
    /// lies about its syncs leaves it. Of the removal of a folder, so many of its names are gone. Other calls: as `Crash`.
    Tear(usize),
    /// This and all later calls that write fail for want of space, until [`HostileStore::heal`].
    Full,
    /// This and all later puts under a condition are refused, until [`HostileStore::heal`].
    Refuse,
    /// This and all later puts under a condition fail as those of a store that knows none, until [`HostileStore::heal`].
    NoConditions,
}

/// A store that passes its calls on to another one, counts them from 0, and misbehaves as it is told. Clones share both.
#[derive(Clone, Debug)]
pub struct HostileStore {
    inner: Arc<dyn Store>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    calls: Vec<String>,
    faults: BTreeMap<usize, Fault>,
    dead: bool,
    full: bool,
    refuses: bool,
    unconditional: bool,
    /// What others do right before a call.
    meanwhile: BTreeMap<usize, Meanwhile>,
    /// Part of a key, and the bit that is read wrongly of objects whose key has it.
    flips: Vec<(String, u64)>,
    /// What every folder's last list was; told again while it is stale.
    lists: BTreeMap<String, Vec<String>>,
    stale: bool,
}

/// Runs once.
struct Meanwhile(Box<dyn FnOnce() + Send>);

impl fmt::Debug for Meanwhile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Meanwhile")
    }
}

/// How a call goes.
enum Verdict {
    Proceed,
    Fail(io::Error),
    DoAndFail(io::Error),
    Tear(usize, io::Error),
    Refuse,
}

impl HostileStore {
    /// Passes calls on to `inner`, so far without harm.
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self {
            inner,
            state: Arc::default(),
        }
    }

    /// Lets `fault` happen at call `call`, counted from 0.
    #[must_use]
    pub fn with(self, call: usize, fault: Fault) -> Self {
        self.state().faults.insert(call, fault);
        self
    }

    /// Lets `others` act right before call `call`, counted from 0, as another process might; not through this store.
    #[must_use]
    pub fn meanwhile(self, call: usize, others: impl FnOnce() + Send + 'static) -> Self {
        self.state()
            .meanwhile
            .insert(call, Meanwhile(Box::new(others)));
        self
    }

    /// Flips bit `bit`, counted from an object's first byte, whenever an object whose key contains `key` is read.
    pub fn flip(&self, key: &str, bit: u64) {
        self.state().flips.push((key.to_owned(), bit));
    }

    /// From now on lists tell what they told last, until [`HostileStore::heal`]: nothing, where nobody has asked yet.
    pub fn make_lists_stale(&self) {
        self.state().stale = true;
    }

    /// Ends all misbehaviour. What is stored stays.
    pub fn heal(&self) {
        let mut state = self.state();
        *state = State {
            calls: mem::take(&mut state.calls),
            ..State::default()
        };
    }

    /// The calls so far, such as `put step-00000010/manifest.json`.
    pub fn calls(&self) -> Vec<String> {
        self.state().calls.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call and says how it goes.
    fn enter(&self, operation: &str, key: &str, writes: bool, conditional: bool) -> Verdict {
        let mut state = self.state();
        let call = state.calls.len();
        if let Some(Meanwhile(others)) = state.meanwhile.remove(&call) {
            drop(state);
            others();
            state = self.state();
        }
        state.calls.push(format!("{operation} {key}"));
        let injected = || io::Error::other(format!("injected at call {call}"));
        if state.dead {
            return Verdict::Fail(injected());
        }
        let fault = state.faults.get(&call).copied();
        match fault {
            Some(Fault::Full) => state.full = true,
            Some(Fault::Refuse) => state.refuses = true,
            Some(Fault::NoConditions) => state.unconditional = true,
            Some(Fault::Crash | Fault::CrashAfter | Fault::Tear(_)) => state.dead = true,
            _ => {}
        }
        match fault {
            Some(Fault::Fail | Fault::Crash) => Verdict::Fail(injected()),
            Some(Fault::LoseAnswer | Fault::CrashAfter) => Verdict::DoAndFail(injected()),
            Some(Fault::Tear(bytes)) => Verdict::Tear(bytes, injected()),
            _ if state.full && writes => Verdict::Fail(io::Error::new(
                io::ErrorKind::StorageFull,
                "injected: no space left",
            )),
            _ if state.refuses && conditional => Verdict::Refuse,
            _ if state.unconditional && conditional => Verdict::Fail(io::Error::new(
                io::ErrorKind::Unsupported,
                "injected: conditions are not known here",
            )),
            _ => Verdict::Proceed,
        }
    }

    /// Carries out a call that has no half.
    fn call<T>(
        &self,
        operation: &'static str,
        key: &str,
        writes: bool,
        act: impl FnOnce() -> Result<T, FileError>,
    ) -> Result<T, FileError> {
        let failed = |error| Err(at(operation, &self.inner.path(key))(error));
        match self.enter(operation, key, writes, false) {
            Verdict::Proceed | Verdict::Refuse => act(),
            Verdict::Fail(error) | Verdict::Tear(_, error) => failed(error),
            Verdict::DoAndFail(error) => {
                act()?;
                failed(error)
            }
        }
    }
}

impl Store for HostileStore {
    fn path(&self, key: &str) -> PathBuf {
        self.inner.path(key)
    }

    fn put(&self, key: &str, bytes: &[u8], condition: Condition<'_>) -> Result<Put, FileError> {
        let failed = |error| Err(at("put", &self.inner.path(key))(error));
        match self.enter("put", key, true, condition != Condition::Always) {
            Verdict::Proceed => self.inner.put(key, bytes, condition),
            Verdict::Refuse => Ok(Put::Refused),
            Verdict::Fail(error) => failed(error),
            Verdict::DoAndFail(error) => {
                let _ = self.inner.put(key, bytes, condition)?;
                failed(error)
            }
            Verdict::Tear(count, error) => {
                let _ = self
                    .inner
                    .put(key, &bytes[..count.min(bytes.len())], Condition::Always)?;
                failed(error)
            }
        }
    }

    fn create(&self, key: &str, bytes: u64) -> Result<Box<dyn Upload>, FileError> {
        let inner = self.call("create", key, true, || self.inner.create(key, bytes))?;
        Ok(Box::new(HostileUpload {
            inner: Some(inner),
            store: self.clone(),
            key: key.to_owned(),
        }))
    }

    fn open(&self, key: &str) -> Result<Option<Box<dyn Object>>, FileError> {
        let opened = self.call("open", key, false, || self.inner.open(key))?;
        Ok(opened.map(|inner| -> Box<dyn Object> {
            Box::new(HostileObject {
                inner,
                store: self.clone(),
                key: key.to_owned(),
            })
        }))
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, FileError> {
        let names = self.call("list", folder, false, || self.inner.list(folder))?;
        let mut state = self.state();
        if state.stale {
            return Ok(state.lists.get(folder).cloned().unwrap_or_default());
        }
        state.lists.insert(folder.to_owned(), names.clone());
        Ok(names)
    }

    fn remove(&self, key: &str) -> Result<(), FileError> {
        self.call("remove", key, false, || self.inner.remove(key))
    }

    fn remove_all(&self, folder: &str) -> Result<(), FileError> {
        let failed = |error| Err(at("remove all of", &self.inner.path(folder))(error));
        match self.enter("remove_all", folder, false, false) {
            Verdict::Proceed | Verdict::Refuse => self.inner.remove_all(folder),
            Verdict::Fail(error) => failed(error),
            Verdict::DoAndFail(error) => {
                self.inner.remove_all(folder)?;
                failed(error)
            }
            Verdict::Tear(count, error) => {
                for name in self.inner.list(folder)?.into_iter().take(count) {
                    self.inner.remove(&format!("{folder}/{name}"))?;
                }
                failed(error)
            }
        }
    }
}

struct HostileUpload {
    inner: Option<Box<dyn Upload>>,
    store: HostileStore,
    key: String,
}

impl Upload for HostileUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        let inner = self.inner.as_mut().expect("taken by commit alone");
        let path = self.store.inner.path(&self.key);
        match self.store.enter("append", &self.key, true, false) {
            Verdict::Proceed | Verdict::Refuse => inner.append(bytes),
            Verdict::Fail(error) => Err(at("append to", &path)(error)),
            Verdict::DoAndFail(error) => {
                inner.append(bytes)?;
                Err(at("append to", &path)(error))
            }
            Verdict::Tear(count, error) => {
                inner.append(&bytes[..count.min(bytes.len())])?;
                Err(at("append to", &path)(error))
            }
        }
    }

    fn commit(mut self: Box<Self>) -> Result<(), FileError> {
        let path = self.store.inner.path(&self.key);
        match self.store.enter("commit", &self.key, true, false) {
            Verdict::Proceed | Verdict::Refuse => {
                self.inner.take().expect("taken here alone").commit()
            }
            Verdict::Fail(error) | Verdict::Tear(_, error) => Err(at("commit", &path)(error)),
            Verdict::DoAndFail(error) => {
                self.inner.take().expect("taken here alone").commit()?;
                Err(at("commit", &path)(error))
            }
        }
    }
}

impl Drop for HostileUpload {
    fn drop(&mut self) {
        if self.store.state().dead {
            // A dead process tidies nothing up.
            mem::forget(self.inner.take());
        }
    }
}

struct HostileObject {
    inner: Box<dyn Object>,
    store: HostileStore,
    key: String,
}

impl fmt::Debug for HostileObject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(formatter)
    }
}

impl Object for HostileObject {
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }

    fn version(&self) -> &Version {
        self.inner.version()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), FileError> {
        self.store
            .call("read", &self.key, false, || self.inner.read_at(offset, out))?;
        for (key, bit) in &self.store.state().flips {
            let index = (bit / 8).checked_sub(offset).map(|index| index as usize);
            if self.key.contains(key.as_str())
                && let Some(byte) = index.and_then(|index| out.get_mut(index))
            {
                *byte ^= 1 << (bit % 8);
            }
        }
        Ok(())
    }
}
