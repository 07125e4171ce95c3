//! What the engine, waiters and aborters share: how far each operation is, results, the first failure. No calls.
//!
//! The first failure wins, wakes every waiter at once, and is what the engine looks for between any two of its steps: it is how
//! a deadline or an abort of another thread reaches the communicator.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::ffi::Event;
use crate::{CollectiveError, EventHandle, Region};

/// Who this process is in which group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its rank, `0..world`.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// The generation that the communicator is made for.
    pub generation: u64,
}

impl Member {
    pub(super) fn device_error(self, during: String, cause: String) -> CollectiveError {
        CollectiveError::Device {
            rank: self.rank,
            world: self.world,
            generation: self.generation,
            during,
            cause,
        }
    }

    fn stalled(self, awaited: String) -> CollectiveError {
        CollectiveError::Stalled {
            rank: self.rank,
            world: self.world,
            generation: self.generation,
            awaited,
        }
    }
}

/// How far the communicator is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// Ranks are finding each other.
    Connecting,
    /// Operations run.
    Connected,
    /// All ranks left in order.
    Closed,
}

/// How far an operation is.
enum Progress {
    /// The engine has not come to it yet.
    Queued,
    /// The engine is putting it on the stream, or waits for those before it.
    Begun,
    /// It is on the stream.
    OnDevice,
    /// It is finished.
    Done(Region),
}

struct Operation {
    /// `AllGather of 100 device f32 (operation 3)`.
    what: String,
    progress: Progress,
    /// Stands behind it on the stream; kept until the operation has been waited for, since its number may have been given out.
    event: Option<Arc<Event>>,
}

impl Operation {
    fn awaited(&self) -> String {
        let stage = match self.progress {
            Progress::Queued => "waiting for the operations before it",
            Progress::Begun => "under way",
            Progress::OnDevice => "on the device",
            Progress::Done(_) => "finished",
        };
        format!("{}: {stage}", self.what)
    }
}

pub(super) struct State {
    pub(super) member: Member,
    shared: Mutex<Shared>,
    changed: Condvar,
}

struct Shared {
    life: Life,
    operations: BTreeMap<u64, Operation>,
    failure: Option<CollectiveError>,
    /// The engine thread has let go of everything.
    stopped: bool,
}

impl State {
    pub(super) fn new(member: Member) -> Self {
        Self {
            member,
            shared: Mutex::new(Shared {
                life: Life::Connecting,
                operations: BTreeMap::new(),
                failure: None,
                stopped: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // A panic elsewhere must not keep the error from waiters; the values under the lock are whole after every line.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn check(&self) -> Result<(), CollectiveError> {
        self.lock().failure.clone().map_or(Ok(()), Err)
    }

    pub(super) fn begin(&self, sequence: u64, what: String) -> Result<(), CollectiveError> {
        let mut shared = self.lock();
        if let Some(failure) = &shared.failure {
            return Err(failure.clone());
        }
        let operation = Operation {
            what,
            progress: Progress::Queued,
            event: None,
        };
        shared.operations.insert(sequence, operation);
        Ok(())
    }

    pub(super) fn begun(&self, sequence: u64) {
        self.advance(sequence, Progress::Begun);
    }

    pub(super) fn on_device(&self, sequence: u64, event: Arc<Event>) {
        if let Some(operation) = self.lock().operations.get_mut(&sequence) {
            operation.event = Some(event);
        }
        self.advance(sequence, Progress::OnDevice);
    }

    pub(super) fn finish(&self, sequence: u64, region: Region) {
        self.advance(sequence, Progress::Done(region));
    }

    fn advance(&self, sequence: u64, progress: Progress) {
        if let Some(operation) = self.lock().operations.get_mut(&sequence) {
            operation.progress = progress;
        }
        self.changed.notify_all();
    }

    pub(super) fn wait(&self, sequence: u64, deadline: Instant) -> Result<Region, CollectiveError> {
        self.wait_until(deadline, |shared| {
            let unknown = CollectiveError::UnknownTicket { sequence };
            let operation = shared.operations.remove(&sequence).ok_or(unknown)?;
            if let Progress::Done(region) = operation.progress {
                return Ok(Ok(region));
            }
            let awaited = operation.awaited();
            shared.operations.insert(sequence, operation);
            Ok(Err(awaited))
        })
    }

    /// The event behind an operation, once it is on the stream; `None` if it has finished already.
    pub(super) fn event(
        &self,
        sequence: u64,
        deadline: Instant,
    ) -> Result<Option<EventHandle>, CollectiveError> {
        self.wait_until(deadline, |shared| {
            let unknown = CollectiveError::UnknownTicket { sequence };
            let operation = shared.operations.get(&sequence).ok_or(unknown)?;
            Ok(match operation.progress {
                Progress::Done(_) => Ok(None),
                Progress::OnDevice => Ok(operation.event.as_ref().map(|event| event.handle())),
                _ => Err(operation.awaited()),
            })
        })
    }

    /// Waits until ranks are connected, or have left.
    pub(super) fn wait_for(&self, life: Life, deadline: Instant) -> Result<(), CollectiveError> {
        self.wait_until(deadline, |shared| {
            if shared.life == life {
                return Ok(Ok(()));
            }
            Ok(Err(match life {
                Life::Closed => "leaving the group with the other ranks".into(),
                _ => "connecting with the other ranks".into(),
            }))
        })
    }

    /// Whether `life` is reached, or something has failed, within `patience`.
    pub(super) fn settles(&self, life: Life, patience: Duration) -> bool {
        let shared = self.lock();
        let is_open = |shared: &mut Shared| shared.life != life && shared.failure.is_none();
        let (mut shared, _) = self
            .changed
            .wait_timeout_while(shared, patience, is_open)
            .unwrap_or_else(PoisonError::into_inner);
        !is_open(&mut shared)
    }

    /// `look` until it finds something; what it says it awaits is in the error if the deadline passes.
    fn wait_until<T>(
        &self,
        deadline: Instant,
        mut look: impl FnMut(&mut Shared) -> Result<Result<T, String>, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        let mut shared = self.lock();
        loop {
            if let Some(failure) = &shared.failure {
                return Err(failure.clone());
            }
            let awaited = match look(&mut shared)? {
                Ok(found) => return Ok(found),
                Err(awaited) => awaited,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let failure = self.member.stalled(awaited);
                shared.failure = Some(failure.clone());
                self.changed.notify_all();
                return Err(failure);
            }
            shared = self
                .changed
                .wait_timeout(shared, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(super) fn reached(&self, life: Life) {
        self.lock().life = life;
        self.changed.notify_all();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().life == Life::Closed
    }

    /// The failure that ended the generation, if there is one.
    pub(super) fn failed(&self) -> Option<CollectiveError> {
        self.lock().failure.clone()
    }

    /// Ends the generation; only the first failure is kept. `false` if it was not this one.
    pub(super) fn fail(&self, failure: CollectiveError) -> bool {
        let mut shared = self.lock();
        let first = shared.failure.is_none();
        shared.failure.get_or_insert(failure);
        self.changed.notify_all();
        first
    }

    /// The engine thread has let go of everything.
    pub(super) fn stopped(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Waits for the end of the engine; whether it came.
    pub(super) fn wait_for_stop(&self, patience: Duration) -> bool {
        let shared = self.lock();
        let (shared, _) = self
            .changed
            .wait_timeout_while(shared, patience, |shared| !shared.stopped)
            .unwrap_or_else(PoisonError::into_inner);
        shared.stopped
    }
}
