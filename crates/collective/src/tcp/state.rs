//! What the engine, its writers, waiters and aborters share: results, the first failure, and where the engine is.
//!
//! The first failure wins and closes every connection, which wakes every thread that reads or writes one.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{Shutdown, TcpStream},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use crate::{CollectiveError, Peer, Region};

pub(super) struct State {
    generation: u64,
    pub(super) peers: Vec<Peer>,
    /// Connection to each rank; `None` at the own rank.
    pub(super) streams: Vec<Option<TcpStream>>,
    shared: Mutex<Shared>,
    changed: Condvar,
}

#[derive(Default)]
struct Shared {
    pending: BTreeSet<u64>,
    done: BTreeMap<u64, Region>,
    /// Regions of operations that a failure kept from their end.
    left: BTreeMap<u64, Region>,
    failure: Option<CollectiveError>,
    /// The operation that the engine runs.
    running: String,
    /// The peer that the engine reads from, and how far it is.
    reading: Option<(usize, u64, u64)>,
    /// Peers that have not taken all of the running phase yet.
    sending: BTreeSet<usize>,
}

impl State {
    pub(super) fn new(generation: u64, peers: Vec<Peer>, streams: Vec<Option<TcpStream>>) -> Self {
        Self {
            generation,
            peers,
            streams,
            shared: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // A panic elsewhere must not keep the error from waiters; the values under the lock are whole after every line.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn stream(&self, rank: usize) -> &TcpStream {
        self.streams[rank]
            .as_ref()
            .expect("connected to every rank but the own")
    }

    pub(super) fn check(&self) -> Result<(), CollectiveError> {
        self.lock().failure.clone().map_or(Ok(()), Err)
    }

    pub(super) fn begin(&self, sequence: u64) -> Result<(), CollectiveError> {
        let mut shared = self.lock();
        if let Some(failure) = &shared.failure {
            return Err(failure.clone());
        }
        shared.pending.insert(sequence);
        Ok(())
    }

    pub(super) fn finish(&self, sequence: u64, region: Region) {
        let mut shared = self.lock();
        shared.pending.remove(&sequence);
        shared.done.insert(sequence, region);
        self.changed.notify_all();
    }

    pub(super) fn leave(&self, sequence: u64, region: Region) {
        self.lock().left.insert(sequence, region);
    }

    /// All regions that nobody has waited for, in the order of their operations.
    pub(super) fn reclaim(&self) -> Vec<Region> {
        let mut shared = self.lock();
        let mut regions = std::mem::take(&mut shared.done);
        regions.append(&mut shared.left);
        regions.into_values().collect()
    }

    pub(super) fn wait(&self, sequence: u64, deadline: Instant) -> Result<Region, CollectiveError> {
        let mut shared = self.lock();
        loop {
            if let Some(failure) = &shared.failure {
                return Err(failure.clone());
            }
            if let Some(region) = shared.done.remove(&sequence) {
                return Ok(region);
            }
            if !shared.pending.contains(&sequence) {
                return Err(CollectiveError::UnknownTicket { sequence });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let failure = self.deadline(&shared);
                drop(shared);
                self.fail(failure);
                return Err(self.failure());
            }
            shared = self
                .changed
                .wait_timeout(shared, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Who keeps the engine waiting right now.
    fn deadline(&self, shared: &Shared) -> CollectiveError {
        if let Some((rank, got, all)) = shared.reading {
            return CollectiveError::Deadline {
                peer: self.peers[rank].clone(),
                awaited: format!(
                    "{}: reading, {got} of {all} bytes are here,",
                    shared.running
                ),
            };
        }
        match shared.sending.first() {
            Some(&rank) => CollectiveError::Deadline {
                peer: self.peers[rank].clone(),
                awaited: format!("{}: sending, not all is taken by the side", shared.running),
            },
            None => CollectiveError::Local {
                what: "wait".into(),
                cause: "the deadline passed before the operation was begun".into(),
            },
        }
    }

    /// The engine begins a phase in which it sends to `sending`.
    pub(super) fn enter(&self, running: String, sending: BTreeSet<usize>) {
        let mut shared = self.lock();
        shared.running = running;
        shared.sending = sending;
        shared.reading = None;
    }

    pub(super) fn sent(&self, rank: usize) {
        self.lock().sending.remove(&rank);
    }

    pub(super) fn reading(&self, progress: Option<(usize, u64, u64)>) {
        self.lock().reading = progress;
    }

    pub(super) fn has_failed(&self) -> bool {
        self.lock().failure.is_some()
    }

    /// The failure that ended the generation.
    pub(super) fn failure(&self) -> CollectiveError {
        self.lock()
            .failure
            .clone()
            .unwrap_or_else(|| CollectiveError::Aborted {
                generation: self.generation,
                reason: "the engine has stopped".into(),
            })
    }

    /// Ends the generation; only the first failure is kept.
    pub(super) fn fail(&self, failure: CollectiveError) {
        let mut shared = self.lock();
        if shared.failure.is_some() {
            return;
        }
        shared.failure = Some(failure);
        self.close();
        self.changed.notify_all();
    }

    /// A connection broke: ends the generation with the names of all who are gone.
    pub(super) fn lost(&self, rank: usize, error: &io::Error) {
        let mut shared = self.lock();
        if shared.failure.is_some() {
            return;
        }
        let also_closed = (0..self.peers.len())
            .filter(|&other| other != rank)
            .filter(|&other| self.streams[other].as_ref().is_some_and(is_closed))
            .map(|other| self.peers[other].clone())
            .collect();
        shared.failure = Some(CollectiveError::Lost {
            peer: self.peers[rank].clone(),
            awaited: shared.running.clone(),
            cause: error.to_string(),
            also_closed,
        });
        self.close();
        self.changed.notify_all();
    }

    fn close(&self) {
        for stream in self.streams.iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Whether the other side is gone. Leaves the stream non-blocking: only for a group that is about to close.
fn is_closed(stream: &TcpStream) -> bool {
    if stream.set_nonblocking(true).is_err() {
        return true;
    }
    match stream.peek(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}
