//! Collectives over TCP: a full mesh of connections among the ranks of one generation, for CPU workers.
//!
//! ```text
//! Rendezvous::bind ──► address (announced before the generation is formed)
//! Rendezvous::connect: rank r dials every lower rank and accepts every higher one; both sides prove the secret
//! Tcp: one engine thread runs the operations in order; per peer one writer thread, the engine reads
//! ```
//!
//! Writing never waits for reading, so two ranks may send each other more than the kernel buffers.
//!
//! The handshake proves that both sides hold the generation's secret (S1). It does not encrypt, and data after it carries no
//! tag: the network between workers must be one where nobody rewrites packets.

mod engine;
mod exchange;
mod frame;
mod handshake;
mod state;

use std::{
    io,
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{Aborter, Collective, CollectiveError, Op, Peer, Region, Ticket, single::check_start};
pub use exchange::SCRATCH_BYTES;

use engine::Job;
use state::State;

/// A caller that has connected must say who it is within this time, so that a stranger cannot hold the door.
const HELLO_MS_MAX: u64 = 2_000;

/// A dialer looks this often whether it shall still dial.
const DIAL_ATTEMPT: Duration = Duration::from_secs(2);

/// The accept loop looks at its deadline this often.
const ACCEPT_POLL_MS: u64 = 2;

/// The bound listener of a rank, which stays for generation after generation: callers of an earlier one, and strangers, do not
/// know what the present one knows, and are turned away.
pub struct Rendezvous {
    listener: TcpListener,
    address: SocketAddr,
    stop: Arc<Stop>,
}

/// How another thread ends a rendezvous.
#[derive(Default)]
struct Stop {
    /// Up to which generation, and why.
    stopped: Mutex<Option<(u64, String)>>,
    /// The connection whose handshake is awaited.
    dialing: Mutex<Option<TcpStream>>,
}

impl Stop {
    fn stop(&self, generation: u64, reason: &str) {
        *lock(&self.stopped) = Some((generation, reason.to_owned()));
        if let Some(stream) = &*lock(&self.dialing) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn check(&self, generation: u64) -> Result<(), CollectiveError> {
        match &*lock(&self.stopped) {
            Some((stopped, reason)) if generation <= *stopped => Err(CollectiveError::Aborted {
                generation,
                reason: reason.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Runs a handshake on `stream`, which a stop ends.
    fn during<R>(&self, stream: &TcpStream, handshake: impl FnOnce() -> R) -> R {
        *lock(&self.dialing) = stream.try_clone().ok();
        let result = handshake();
        *lock(&self.dialing) = None;
        result
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values: a thread that panicked while it held them leaves them usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rendezvous {
    /// Listens on a free port of `ip`.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub fn bind(ip: IpAddr) -> Result<Self, CollectiveError> {
        let local = |cause: io::Error| CollectiveError::Local {
            what: format!("listen on {ip}"),
            cause: cause.to_string(),
        };
        let listener = TcpListener::bind((ip, 0)).map_err(local)?;
        let address = listener.local_addr().map_err(local)?;
        Ok(Self {
            listener,
            address,
            stop: Arc::default(),
        })
    }

    /// Where peers reach this rank, `ip:port`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// A handle for ending [`Rendezvous::connect`] from another thread, for a generation and all before it.
    pub fn aborter(&self) -> Aborter {
        let stop = Arc::clone(&self.stop);
        Aborter::new(move |generation, reason| stop.stop(generation, reason))
    }

    /// Connects all ranks of `generation`. `addresses[r]` is rank r's; `secret` is the generation's and equal everywhere.
    /// Strangers who cannot prove the secret are turned away without harm to the group.
    ///
    /// # Errors
    /// A peer that cannot be reached or does not come within the deadline, a wrong secret, another generation, an abort.
    pub fn connect(
        &self,
        rank: usize,
        addresses: &[String],
        generation: u64,
        secret: [u8; 32],
        deadline: Instant,
    ) -> Result<Tcp, CollectiveError> {
        let world = addresses.len();
        if rank >= world {
            return Err(CollectiveError::Local {
                what: "connect".into(),
                cause: format!("rank {rank} is not below the {world} addresses"),
            });
        }
        let group = handshake::Group {
            generation,
            world,
            rank,
            secret,
        };
        let peer = |rank: usize| Peer {
            rank,
            address: addresses[rank].clone(),
        };
        let mut streams: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        for other in 0..rank {
            streams[other] = Some(dial(&self.stop, &group, &peer(other), deadline)?);
        }
        let refused = self.accept_higher(&group, &mut streams, deadline);
        self.stop.check(generation)?;
        refused.map_err(|refused| CollectiveError::Missing {
            missing: (rank + 1..world)
                .filter(|&other| streams[other].is_none())
                .map(peer)
                .collect(),
            refused,
        })?;
        Tcp::start(&group, (0..world).map(peer).collect(), streams)
    }

    /// Accepts every rank above the own one; the reasons of refusals if the deadline passes first.
    fn accept_higher(
        &self,
        group: &handshake::Group,
        streams: &mut [Option<TcpStream>],
        deadline: Instant,
    ) -> Result<(), Vec<String>> {
        let mut refused = Vec::new();
        if let Err(error) = self.listener.set_nonblocking(true) {
            return Err(vec![format!("the own listener: {error}")]);
        }
        while streams[group.rank + 1..].iter().any(Option::is_none) {
            let (stream, address) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(_) if self.stop.check(group.generation).is_err() => return Err(refused),
                Err(_) if Instant::now() >= deadline => return Err(refused),
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(ACCEPT_POLL_MS));
                    continue;
                }
            };
            let patience = Instant::now() + Duration::from_millis(HELLO_MS_MAX);
            match accept(group, stream, patience.min(deadline)) {
                Ok((other, stream)) if streams[other].is_none() => streams[other] = Some(stream),
                Ok((other, _)) => refused.push(format!("{address} (a second rank {other})")),
                Err(reason) => {
                    tracing::warn!(%address, %reason, "connection turned away");
                    refused.push(format!("{address} ({reason})"));
                }
            }
        }
        Ok(())
    }
}

fn dial(
    stop: &Stop,
    group: &handshake::Group,
    peer: &Peer,
    deadline: Instant,
) -> Result<TcpStream, CollectiveError> {
    let unreachable = |cause: String| CollectiveError::Unreachable {
        peer: peer.clone(),
        cause,
    };
    let address: SocketAddr = peer
        .address
        .parse()
        .map_err(|_| unreachable("not an address of the form ip:port".into()))?;
    let stream = loop {
        stop.check(group.generation)?;
        let left = deadline.saturating_duration_since(Instant::now());
        let attempt = left.clamp(Duration::from_millis(1), DIAL_ATTEMPT);
        match TcpStream::connect_timeout(&address, attempt) {
            Ok(stream) => break stream,
            // Nobody answers; another attempt only makes room for a look at `stop`.
            Err(error) if error.kind() == io::ErrorKind::TimedOut && left > attempt => {}
            // Listeners are bound before their addresses are given out, so a refusal is final and not worth a retry.
            Err(error) => return Err(unreachable(error.to_string())),
        }
    };
    let shaken = stop.during(&stream, || {
        stop.check(group.generation)?;
        handshake::dial(group, peer.rank, &stream, deadline)
            .and_then(|()| plain(&stream).map_err(|error| error.to_string()))
            .map_err(|reason| CollectiveError::Refused {
                peer: peer.clone(),
                reason,
            })
    });
    stop.check(group.generation)?;
    shaken?;
    Ok(stream)
}

fn accept(
    group: &handshake::Group,
    stream: TcpStream,
    deadline: Instant,
) -> Result<(usize, TcpStream), String> {
    // Some systems hand the listener's mode down to the accepted socket.
    stream
        .set_nonblocking(false)
        .map_err(|error| error.to_string())?;
    let other = handshake::accept(group, &stream, deadline)?;
    plain(&stream).map_err(|error| error.to_string())?;
    Ok((other, stream))
}

/// Handshake timeouts off: from here on deadlines are `wait`'s.
fn plain(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stream.set_nodelay(true)
}

/// A connected rank.
pub struct Tcp {
    rank: usize,
    world: usize,
    generation: u64,
    started: u64,
    state: Arc<State>,
    jobs: Option<mpsc::Sender<Job>>,
    engine: Option<JoinHandle<()>>,
}

impl Tcp {
    fn start(
        group: &handshake::Group,
        peers: Vec<Peer>,
        streams: Vec<Option<TcpStream>>,
    ) -> Result<Self, CollectiveError> {
        let (rank, world, generation) = (group.rank, group.world, group.generation);
        let state = Arc::new(State::new(generation, peers, streams));
        let (jobs, queue) = mpsc::channel();
        let engine = engine::spawn(rank, Arc::clone(&state), queue).map_err(|error| {
            CollectiveError::Local {
                what: "start the engine thread".into(),
                cause: error.to_string(),
            }
        })?;
        Ok(Self {
            rank,
            world,
            generation,
            started: 0,
            state,
            jobs: Some(jobs),
            engine: Some(engine),
        })
    }
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn start(
        &mut self,
        op: Op,
        region: Region,
        generation: u64,
    ) -> Result<Ticket, CollectiveError> {
        check_start(op, &region, self.world, generation, self.generation)?;
        if let Region::Device(_) = region {
            return Err(CollectiveError::Unsupported {
                op: format!("{op:?}"),
                reason: "device memory needs NCCL; this group is connected over TCP".into(),
            });
        }
        let sequence = self.started;
        self.started += 1;
        if let Err(failure) = self.state.begin(sequence) {
            self.state.leave(sequence, region);
            return Err(failure);
        }
        let job = Job {
            sequence,
            op,
            region,
        };
        let jobs = self.jobs.as_ref().expect("the queue lives until drop");
        if jobs.send(job).is_err() {
            return Err(self.state.failure());
        }
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

    fn reclaim(mut self: Box<Self>) -> Vec<Region> {
        self.end();
        self.state.reclaim()
    }

    fn aborter(&self) -> Aborter {
        let (own, state) = (self.generation, Arc::clone(&self.state));
        Aborter::new(move |generation, reason| {
            if generation == own {
                state.fail(CollectiveError::Aborted {
                    generation,
                    reason: reason.to_owned(),
                });
            }
        })
    }
}

impl Tcp {
    fn end(&mut self) {
        // Closing the connections wakes an engine that still waits for a peer; finished operations are not harmed.
        self.state.fail(CollectiveError::Aborted {
            generation: self.generation,
            reason: "this rank left".into(),
        });
        self.jobs = None;
        if let Some(engine) = self.engine.take() {
            let _ = engine.join();
        }
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.end();
    }
}
