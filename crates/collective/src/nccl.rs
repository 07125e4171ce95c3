//! Collectives over NCCL: a communicator among the ranks of one generation, for workers with a GPU each.
//!
//! ```text
//! Library::open, Driver::open ──► Device::open           once per process
//! Library::unique_id at one rank ──► relayed to all, kept with its generation
//! Nccl::connect: an engine thread makes the communicator and owns it ──► operations ──► close, or drop
//! ```
//! [`Nccl::connect_over`] relays the id by itself, over a collective that the ranks have already, such as `tcp`'s.
//!
//! # What differs from TCP
//! - Device regions stay where they are. Regions of the host travel through device memory, one after another: for norms and
//!   counts, not for gradients.
//! - NCCL checks nothing: ranks that start different operations, or lengths, hang until the deadline or read wrong numbers.
//! - NCCL does not say which rank is late or gone, and notices a death on the same machine not at all. Whoever supervises the
//!   ranks has to notice, and has to abort at every survivor.
//! - After any failure the communicator is aborted, here by the engine, and never used again; a later call gets the first
//!   failure. A thread that is stuck inside NCCL or CUDA cannot be helped: waiters still return at their deadline, a drop gives
//!   up after a while, and then only a new process helps, as [`has_left_a_thread`] says from there on.
//! - The handshake is NCCL's own: who knows the id gets in, nothing is encrypted. The network between workers must be trusted.
//!
//! # The same bits on every run
//! All ranks always hold the same bits. Sums repeat between runs on the same machines if NCCL has no choice of algorithm, which
//! [`deterministic_environment`] sees to.

mod device;
mod engine;
mod ffi;
mod id;
mod load;
mod pair;
mod plan;
mod state;
mod version;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub use device::{Buffer, Device};
pub use id::{UNIQUE_ID_BYTES, UniqueId, UniqueIdError};
pub use load::{CUDA_NAMES, Driver, Library, LoadError, NCCL_NAMES};
pub use pair::Pair;
pub use state::Member;
pub use version::{KNOWN_BAD, OLDEST, Version};

use crate::{
    Aborter, Collective, CollectiveError, EventHandle, Op, Region, Ticket, single::check_start,
};
use engine::{Job, Setup};
use state::{Life, State};

/// How long a drop waits for the engine to abort and to let go of everything.
const STOP_MS_MAX: u64 = 10_000;

/// Variables that must stand in a worker's environment before its first communicator for sums to repeat between runs: one
/// algorithm, one protocol, no sums in the switch. Whoever starts the worker sets them, the same at all ranks; a running process
/// cannot, since NCCL reads them once and other threads may be reading the environment.
pub fn deterministic_environment() -> [(&'static str, &'static str); 3] {
    [
        ("NCCL_ALGO", "Ring"),
        ("NCCL_PROTO", "Simple"),
        ("NCCL_NVLS_ENABLE", "0"),
    ]
}

/// Set once, when a drop gives an engine up.
static HAS_LEFT_A_THREAD: AtomicBool = AtomicBool::new(false);

/// Whether a thread of this process is stuck inside NCCL or CUDA, and what it held of the device with it: another process should
/// take this one's place.
pub fn has_left_a_thread() -> bool {
    HAS_LEFT_A_THREAD.load(Ordering::Relaxed)
}

/// How often a rank that connects looks whether it still should.
const CONNECT_POLL: Duration = Duration::from_millis(50);

/// A connected rank.
pub struct Nccl {
    started: u64,
    state: Arc<State>,
    jobs: Option<mpsc::Sender<Job>>,
    engine: Option<JoinHandle<()>>,
}

impl Nccl {
    /// Connects all ranks of a generation, each with a device of its own. `id` is the same everywhere, made for this generation
    /// by a process that still lives.
    ///
    /// # Errors
    /// Ranks that do not come before the deadline, of which NCCL does not say which; NCCL's and the driver's own errors.
    pub fn connect(
        library: Library,
        device: &Device,
        member: Member,
        id: UniqueId,
        deadline: Instant,
    ) -> Result<Self, CollectiveError> {
        Self::connect_while(library, device, member, id, deadline, &|| Ok(()))
    }

    /// [`Nccl::connect`], given up as soon as `stands` fails.
    fn connect_while(
        library: Library,
        device: &Device,
        member: Member,
        id: UniqueId,
        deadline: Instant,
        stands: &dyn Fn() -> Result<(), CollectiveError>,
    ) -> Result<Self, CollectiveError> {
        let local = |what: &str, cause: String| CollectiveError::Local {
            what: what.into(),
            cause,
        };
        let Member { rank, world, .. } = member;
        if rank >= world || i32::try_from(world).is_err() {
            return Err(local(
                "connect",
                format!("rank {rank} of a world of {world}"),
            ));
        }
        let state = Arc::new(State::new(member));
        let setup = Setup {
            library,
            device: device.clone(),
            id,
        };
        let (jobs, queue) = mpsc::channel();
        let engine = engine::spawn(Arc::clone(&state), setup, queue);
        let engine = engine.map_err(|error| local("start the engine thread", error.to_string()))?;
        let nccl = Self {
            started: 0,
            state,
            jobs: Some(jobs),
            engine: Some(engine),
        };
        // NCCL does not notice a rank that stays away.
        while Instant::now() < deadline && !nccl.state.settles(Life::Connected, CONNECT_POLL) {
            if let Err(failure) = stands() {
                nccl.state.fail(failure);
            }
        }
        nccl.state.wait_for(Life::Connected, deadline)?;
        Ok(nccl)
    }

    /// [`Nccl::connect`] for the ranks of `door`, a collective of the same generation over which rank 0 tells the others its id.
    /// The door is not needed afterwards; kept in a [`Pair`], it takes the regions of the host. While NCCL connects, an end of the
    /// door ends that too.
    ///
    /// # Errors
    /// As `connect`; the door's.
    pub fn connect_over(
        door: &mut dyn Collective,
        library: Library,
        device: &Device,
        deadline: Instant,
    ) -> Result<Self, CollectiveError> {
        let member = Member {
            rank: door.rank(),
            world: door.world(),
            generation: door.generation(),
        };
        let made = (member.rank == 0).then(|| library.unique_id());
        // Rank 0 also tells of a failure, by nothing: the others need not wait for their deadline.
        let bytes = match &made {
            Some(Ok(id)) => id.as_bytes().to_vec(),
            _ => Vec::new(),
        };
        let op = Op::Broadcast { root: 0 };
        let bytes = door.run(op, Region::HostBytes(bytes), deadline)?;
        if let Some(Err(error)) = made {
            return Err(error);
        }
        let id = UniqueId::try_from(bytes.into_bytes().as_slice());
        let id = id.map_err(|error| CollectiveError::Local {
            what: "take rank 0's NCCL id".into(),
            cause: error.to_string(),
        })?;
        let stands = || door.check();
        Self::connect_while(library, device, member, id, deadline, &stands)
    }

    /// The event behind a started operation on the stream, for work that is to follow it on the device without the host waiting:
    /// `cuStreamWaitEvent`. `None` if the operation has finished, so that there is nothing to wait for. The number is good until
    /// the ticket's `wait` returns.
    ///
    /// Work behind an operation that then fails runs on unspecified numbers: it has to be thrown away if `wait` fails.
    ///
    /// # Errors
    /// As [`Collective::wait`]: the deadline counts until the operation is on the stream, not until it has run.
    pub fn event(
        &self,
        ticket: &Ticket,
        deadline: Instant,
    ) -> Result<Option<EventHandle>, CollectiveError> {
        self.state.event(ticket.sequence, deadline)
    }

    fn send(&self, job: Job) -> Result<(), CollectiveError> {
        let jobs = self.jobs.as_ref().expect("the queue lives until drop");
        jobs.send(job).map_err(|_| {
            let gone = || CollectiveError::Aborted {
                generation: self.generation(),
                reason: "the engine has stopped".into(),
            };
            self.state.failed().unwrap_or_else(gone)
        })
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.state.member.rank
    }

    fn world(&self) -> usize {
        self.state.member.world
    }

    fn generation(&self) -> u64 {
        self.state.member.generation
    }

    fn takes_devices(&self) -> bool {
        true
    }

    fn start(
        &mut self,
        op: Op,
        region: Region,
        generation: u64,
    ) -> Result<Ticket, CollectiveError> {
        check_start(op, &region, self.world(), generation, self.generation())?;
        if let Op::Send { .. } = op {
            return Err(CollectiveError::Unsupported {
                op: format!("{op:?}"),
                reason: "between NCCL's ranks regions go to all or to none".into(),
            });
        }
        let sequence = self.started;
        let (elements, element) = (region.len(), region.element());
        let what = format!("{op:?} of {elements} {element} (operation {sequence})");
        self.state.begin(sequence, what.clone())?;
        self.started += 1;
        self.send(Job::Run {
            sequence,
            what,
            op,
            region,
        })?;
        Ok(Ticket { sequence })
    }

    fn wait(&mut self, ticket: Ticket, deadline: Instant) -> Result<Region, CollectiveError> {
        self.state.wait(ticket.sequence, deadline)
    }

    fn check(&self) -> Result<(), CollectiveError> {
        self.state.check()
    }

    fn abort(&mut self, generation: u64) {
        self.aborter().abort(generation, "by this rank");
    }

    fn aborter(&self) -> Aborter {
        let (own, state) = (self.generation(), Arc::clone(&self.state));
        Aborter::new(move |generation, reason| {
            if generation == own {
                state.fail(CollectiveError::Aborted {
                    generation,
                    reason: reason.to_owned(),
                });
            }
        })
    }

    fn close(self: Box<Self>, deadline: Instant) -> Result<(), CollectiveError> {
        self.send(Job::Close)?;
        self.state.wait_for(Life::Closed, deadline)
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        let member = self.state.member;
        if !self.state.is_closed() {
            let left = CollectiveError::Aborted {
                generation: member.generation,
                reason: "this rank left".into(),
            };
            if self.state.fail(left) {
                tracing::debug!(
                    ?member,
                    "the communicator is dropped without a close: it is aborted"
                );
            }
        }
        self.jobs = None;
        let Some(engine) = self.engine.take() else {
            return;
        };
        if self.state.wait_for_stop(Duration::from_millis(STOP_MS_MAX)) {
            let _ = engine.join();
        } else {
            HAS_LEFT_A_THREAD.store(true, Ordering::Relaxed);
            tracing::error!(
                ?member,
                "a thread is stuck inside NCCL or CUDA and is left behind: this process should be replaced"
            );
        }
    }
}
