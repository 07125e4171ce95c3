//! The engine: one thread that owns a rank's communicator, puts its operations on a stream of its own in the order of their
//! starts, and looks after them until the first failure.
//!
//! It never blocks for a peer. Between any two steps, and while it waits for anything, it looks at the state for a failure that
//! a deadline or another thread has put there, and at the communicator for one of NCCL's. Then it aborts the communicator, which
//! also stops what is on the device, and lets go of memory only when the device has.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    Device, Library, UniqueId,
    ffi::{Comm, Event, IN_PROGRESS, Memory, SUCCESS, Stream},
    plan::{Call, plan},
    state::{Life, State},
};
use crate::{CollectiveError, DeviceRegion, Element, Op, Region};

/// How often the engine looks, while something is under way.
const POLL_MICROSECONDS: u64 = 50;

/// How often it looks when nothing is.
const IDLE_POLL_MS: u64 = 20;

/// How long the device may take to let go of memory after an abort; what it then still holds is never freed.
const DRAIN_MS_MAX: u64 = 5_000;

pub(super) enum Job {
    /// A started operation.
    Run {
        sequence: u64,
        what: String,
        op: Op,
        region: Region,
    },
    /// Leave in order.
    Close,
}

/// What a communicator is made from.
pub(super) struct Setup {
    pub(super) library: Library,
    pub(super) device: Device,
    pub(super) id: UniqueId,
}

pub(super) fn spawn(
    state: Arc<State>,
    setup: Setup,
    queue: Receiver<Job>,
) -> io::Result<JoinHandle<()>> {
    Builder::new()
        .name(format!("nccl-{}", state.member.rank))
        .spawn(move || {
            let _guard = TellTheEnd(&state);
            serve(&state, setup, &queue);
        })
}

/// Why the engine stops: a failure of its own, or `None` for the one that the state holds.
type Stop = Option<CollectiveError>;

/// Connects, and runs operations until all ranks leave or something fails.
fn serve(state: &State, setup: Setup, queue: &Receiver<Job>) {
    let member = state.member;
    let (device, id) = (setup.device, setup.id);
    let context = device.context().clone();
    let entered = context.enter();
    let stream = entered.and_then(|entered| Ok((entered, Stream::new(&context)?)));
    let (_entered, stream) = match stream {
        Ok(both) => both,
        Err(code) => {
            let during = "entering the device".into();
            state.fail(member.device_error(during, device.explain(code)));
            return;
        }
    };
    let mut engine = Engine {
        state,
        library: setup.library,
        device,
        stream,
        comm: None,
        flights: VecDeque::new(),
        staging: None,
    };
    let ended = engine.connect(&id).and_then(|()| engine.operate(queue));
    if let Err(Some(failure)) = ended {
        // Before the engine is dropped, which may take its time: waiters need not.
        state.fail(failure);
    }
}

/// Dropping it aborts a communicator that was not closed.
struct Engine<'a> {
    state: &'a State,
    library: Library,
    device: Device,
    stream: Stream,
    /// `None` before it is made, and after an abort or a close.
    comm: Option<Comm>,
    /// What is on the stream, in its order.
    flights: VecDeque<Flight>,
    /// Where regions of the host are on their way; grows with the largest.
    staging: Option<Arc<Memory>>,
}

/// Something on the stream.
struct Flight {
    /// The operation that ends with it, if one does.
    sequence: Option<u64>,
    what: String,
    region: DeviceRegion,
    /// Stands behind it; `None` until all of it is on the stream.
    event: Option<Arc<Event>>,
}

impl Engine<'_> {
    fn connect(&mut self, id: &UniqueId) -> Result<(), Stop> {
        const WHAT: &str = "connecting with the other ranks";
        let member = self.state.member;
        let comm = Comm::begin(
            self.library.table(),
            member.world as i32,
            id.as_bytes(),
            member.rank as i32,
        );
        let comm = comm.map_err(|code| self.nccl_error(WHAT, "ncclCommInitRankConfig", code))?;
        self.comm = Some(comm);
        self.settle(WHAT)?;
        self.state.reached(Life::Connected);
        Ok(())
    }

    /// Runs operations in their order until a close.
    fn operate(&mut self, queue: &Receiver<Job>) -> Result<(), Stop> {
        loop {
            self.look()?;
            self.land()?;
            let patience = if self.flights.is_empty() {
                Duration::from_millis(IDLE_POLL_MS)
            } else {
                Duration::from_micros(POLL_MICROSECONDS)
            };
            let job = queue.recv_timeout(patience);
            // A failure may have come while this thread slept: nothing more must be asked of the communicator then.
            self.look_for_failure()?;
            match job {
                Ok(Job::Run {
                    sequence,
                    what,
                    op,
                    region,
                }) => self.run(sequence, &what, op, region)?,
                Ok(Job::Close) => return self.close(),
                Err(RecvTimeoutError::Timeout) => {}
                // The owner has put its reason into the state before it left.
                Err(RecvTimeoutError::Disconnected) => return Err(None),
            }
        }
    }

    fn run(&mut self, sequence: u64, what: &str, op: Op, region: Region) -> Result<(), Stop> {
        self.state.begun(sequence);
        let region = match region {
            Region::Device(region) => return self.put(Some(sequence), what, op, region),
            Region::HostF32(mut values) => {
                let bytes = bytemuck::cast_slice_mut(&mut values);
                self.stage(what, op, Element::F32, bytes)?;
                Region::HostF32(values)
            }
            Region::HostF64(mut values) => {
                let bytes = bytemuck::cast_slice_mut(&mut values);
                self.stage(what, op, Element::F64, bytes)?;
                Region::HostF64(values)
            }
            Region::HostBf16(mut values) => {
                let bytes = bytemuck::cast_slice_mut(&mut values);
                self.stage(what, op, Element::Bf16, bytes)?;
                Region::HostBf16(values)
            }
            Region::HostBytes(bytes) => Region::HostBytes(self.broadcast_bytes(what, op, bytes)?),
        };
        self.state.finish(sequence, region);
        Ok(())
    }

    /// Puts an operation on the stream. The region is a flight before NCCL hears of it, so that a failure on the way cannot take
    /// memory from under the device.
    fn put(
        &mut self,
        sequence: Option<u64>,
        what: &str,
        op: Op,
        region: DeviceRegion,
    ) -> Result<(), Stop> {
        let (ready, elements) = (region.ready(), region.elements());
        self.flights.push_back(Flight {
            sequence,
            what: what.to_owned(),
            region,
            event: None,
        });
        let cuda = |code| self.cuda_error(what, code);
        if let Some(ready) = ready {
            self.stream.wait_for(ready).map_err(cuda)?;
        }
        let calls = plan(op, elements, self.state.member.world);
        if !calls.is_empty() {
            let flight = self.flights.back().expect("just pushed");
            self.enqueue(what, &calls, &flight.region)?;
            // The kernels are on the stream only when the communicator says so; an event before that would be too early.
            self.settle(what)?;
        }
        let event = Event::new(self.device.context()).and_then(|event| {
            event.record(&self.stream)?;
            Ok(Arc::new(event))
        });
        let event = event.map_err(cuda)?;
        if let Some(sequence) = sequence {
            self.state.on_device(sequence, Arc::clone(&event));
        }
        let flight = self.flights.back_mut().expect("just pushed");
        flight.event = Some(event);
        Ok(())
    }

    /// One group of calls. It is ended whatever happens in it: an abort inside an open group would do nothing.
    fn enqueue(&self, what: &str, calls: &[Call], region: &DeviceRegion) -> Result<(), Stop> {
        let (comm, rank, on) = (self.comm(), self.state.member.rank, &self.stream);
        let mut failure = failed("ncclGroupStart", comm.group_start());
        for call in calls {
            if failure.is_some() {
                break;
            }
            failure = match call {
                Call::AllReduce { range } => {
                    failed("ncclAllReduce", comm.all_reduce(on, region, range))
                }
                Call::ReduceScatter { count } => {
                    let code = comm.reduce_scatter(on, region, rank, *count);
                    failed("ncclReduceScatter", code)
                }
                Call::AllGather { count } => {
                    let code = comm.all_gather(on, region, rank, *count);
                    failed("ncclAllGather", code)
                }
                Call::Reduce { range, root } => {
                    failed("ncclReduce", comm.reduce(on, region, range, *root))
                }
                Call::Broadcast { range, root } => {
                    failed("ncclBroadcast", comm.broadcast(on, region, range, *root))
                }
                Call::Move { range, from, to } if *from == rank => {
                    failed("ncclSend", comm.send(on, region, range, *to))
                }
                Call::Move { range, from, to } if *to == rank => {
                    failed("ncclRecv", comm.receive(on, region, range, *from))
                }
                Call::Move { .. } => None,
            };
        }
        let ended = failed("ncclGroupEnd", comm.group_end());
        match failure.or(ended) {
            None => Ok(()),
            Some((function, code)) => Err(Some(self.nccl_error(what, function, code))),
        }
    }

    /// An operation on memory of the host, finished when this returns. The stream is emptied first: copies from and to memory
    /// that is not pinned wait for what is on it, which must not be a peer.
    fn stage(
        &mut self,
        what: &str,
        op: Op,
        element: Element,
        bytes: &mut [u8],
    ) -> Result<(), Stop> {
        self.land_all()?;
        let memory = self.staging(what, bytes.len())?;
        let written = self.stream.write(&memory, bytes);
        written.map_err(|code| self.cuda_error(what, code))?;
        let region = memory.region(bytes.len() / element.bytes(), element, None);
        self.put(None, what, op, region)?;
        self.land_all()?;
        let read = self.stream.read(&memory, bytes);
        read.map_err(|code| Some(self.cuda_error(what, code)))
    }

    /// The root's length counts, whatever the others brought, so it goes first.
    fn broadcast_bytes(&mut self, what: &str, op: Op, bytes: Vec<u8>) -> Result<Vec<u8>, Stop> {
        let mut length = (bytes.len() as u64).to_le_bytes();
        self.stage(what, op, Element::Byte, &mut length)?;
        let length = u64::from_le_bytes(length) as usize;
        let mut bytes = bytes;
        let more = length.saturating_sub(bytes.len());
        if let Err(error) = bytes.try_reserve_exact(more) {
            let cause = format!("the root has {length} bytes: {error}");
            return Err(Some(self.state.member.device_error(what.into(), cause)));
        }
        bytes.resize(length, 0);
        self.stage(what, op, Element::Byte, &mut bytes)?;
        Ok(bytes)
    }

    fn staging(&mut self, what: &str, bytes: usize) -> Result<Arc<Memory>, Stop> {
        if let Some(memory) = &self.staging
            && memory.bytes() >= bytes
        {
            return Ok(Arc::clone(memory));
        }
        // The old one first, so that both need not fit.
        self.staging = None;
        let memory = Memory::new(self.device.context(), bytes.next_power_of_two());
        let memory = Arc::new(memory.map_err(|code| self.cuda_error(what, code))?);
        self.staging = Some(Arc::clone(&memory));
        Ok(memory)
    }

    /// Gives back what has finished, in the order of the stream.
    fn land(&mut self) -> Result<(), Stop> {
        while let Some(flight) = self.flights.front() {
            let event = flight.event.as_ref().expect("`put` has returned");
            let happened = event.has_happened();
            if !happened.map_err(|code| self.cuda_error(&flight.what, code))? {
                break;
            }
            let flight = self.flights.pop_front().expect("it is in front");
            if let Some(sequence) = flight.sequence {
                let region = Region::Device(flight.region.finished());
                self.state.finish(sequence, region);
            }
        }
        Ok(())
    }

    /// Waits until nothing is on the stream.
    fn land_all(&mut self) -> Result<(), Stop> {
        loop {
            self.land()?;
            if self.flights.is_empty() {
                return Ok(());
            }
            self.look()?;
            std::thread::sleep(Duration::from_micros(POLL_MICROSECONDS));
        }
    }

    /// Whether anything has failed, here, at a waiter or in NCCL.
    fn look(&self) -> Result<(), Stop> {
        self.look_for_failure()?;
        match self.comm().state() {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => {
                let what = match self.flights.front() {
                    Some(flight) => &flight.what,
                    None => "with no operation under way",
                };
                Err(Some(self.nccl_error(what, "ncclCommGetAsyncError", code)))
            }
        }
    }

    fn look_for_failure(&self) -> Result<(), Stop> {
        match self.state.failed() {
            Some(_) => Err(None),
            None => Ok(()),
        }
    }

    /// Waits until NCCL has done what it was asked in the background.
    fn settle(&self, what: &str) -> Result<(), Stop> {
        loop {
            self.look_for_failure()?;
            match self.comm().state() {
                SUCCESS => return Ok(()),
                IN_PROGRESS => std::thread::sleep(Duration::from_micros(POLL_MICROSECONDS)),
                code => return Err(Some(self.nccl_error(what, "ncclCommGetAsyncError", code))),
            }
        }
    }

    fn close(&mut self) -> Result<(), Stop> {
        const WHAT: &str = "leaving the group with the other ranks";
        self.land_all()?;
        if let Some((function, code)) = failed("ncclCommFinalize", self.comm().finalize()) {
            return Err(Some(self.nccl_error(WHAT, function, code)));
        }
        self.settle(WHAT)?;
        let code = self.comm.take().map_or(SUCCESS, Comm::destroy);
        if let Some((function, code)) = failed("ncclCommDestroy", code) {
            return Err(Some(self.nccl_error(WHAT, function, code)));
        }
        self.state.reached(Life::Closed);
        Ok(())
    }

    /// Waits for the end of the stream; whether it came. It does not come from a device that is broken, either.
    fn drained(&self) -> bool {
        let patience = Instant::now() + Duration::from_millis(DRAIN_MS_MAX);
        let end = Event::new(self.device.context());
        let Ok(end) = end.and_then(|end| end.record(&self.stream).map(|()| end)) else {
            return false;
        };
        loop {
            match end.has_happened() {
                Ok(false) if Instant::now() < patience => {
                    std::thread::sleep(Duration::from_micros(POLL_MICROSECONDS));
                }
                happened => return happened == Ok(true),
            }
        }
    }

    fn comm(&self) -> &Comm {
        self.comm
            .as_ref()
            .expect("made by connect, taken by abort and close")
    }

    fn nccl_error(&self, what: &str, function: &str, code: i32) -> CollectiveError {
        let mut cause = format!("{function}: {}", self.library.explain(code));
        let last = self.comm.as_ref().map(Comm::last_error);
        if let Some(last) = last.filter(|last| !last.is_empty()) {
            cause = format!("{cause}; its last message: {last}");
        }
        self.state.member.device_error(what.into(), cause)
    }

    fn cuda_error(&self, what: &str, code: i32) -> CollectiveError {
        let cause = self.device.explain(code);
        self.state.member.device_error(what.into(), cause)
    }
}

impl Drop for Engine<'_> {
    /// After a failure, and should this thread panic: ends the communicator, and waits for the device to let go of the memory
    /// that it was given.
    fn drop(&mut self) {
        let member = self.state.member;
        if let Some(comm) = self.comm.take() {
            let code = comm.abort();
            if let Some((function, code)) = failed("ncclCommAbort", code) {
                let cause = self.library.explain(code);
                tracing::error!(?member, function, %cause, "the communicator was not aborted cleanly");
            }
        }
        let held = self.flights.len();
        if held > 0 && !self.drained() {
            tracing::error!(
                ?member,
                held,
                "the device does not let go of memory, which is never freed"
            );
            std::mem::forget(std::mem::take(&mut self.flights));
            std::mem::forget(self.staging.take());
        }
    }
}

/// A function's code, if it is an error.
fn failed(function: &'static str, code: i32) -> Option<(&'static str, i32)> {
    match code {
        SUCCESS | IN_PROGRESS => None,
        code => Some((function, code)),
    }
}

struct TellTheEnd<'a>(&'a State);

impl Drop for TellTheEnd<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A bug, but waiters must learn of it before their deadline.
            self.0.fail(CollectiveError::Local {
                what: "run an operation".into(),
                cause: "the engine thread panicked".into(),
            });
        }
        self.0.stopped();
    }
}
