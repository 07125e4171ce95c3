//! The stream to the coordinator: a tokio task that beats and listens, and a blocking handle for the training thread.
//!
//! When the coordinator says Stop or Abort, the task first aborts the collective, so that a training thread that waits for a
//! peer wakes up, then passes the word on. A thread that has not left [`LEAVE_SECONDS_MAX`] after a Stop is in a long computation
//! whose result nobody wants: a process that serves one job exits under it, one that serves more lets it end, unless it was told
//! to be started again.
//!
//! A stream that breaks ends the session of a worker that was not welcomed to a job, or whose job is done. Others outlive their
//! coordinator: the task connects again, for [`RECONNECT_PATIENCE`], and joins under the same incarnation. What was said into the gap is lost; whoever
//! waits for an answer says it again.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as blocking};
use std::time::{Duration, Instant};

use collective::Aborter;
use protocol::{
    Activity, Afterwards, Awaits, CoordinatorMessage, Fence, FromWorker, Generation, Incarnation,
    JobId, Step, Terms, ToWorker, Work, WorkerMessage, WorkerProfile,
};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};
use trainer::{GateClosed, Pulse};
use wire::proto::workers_client::WorkersClient;
use wire::{Pass, proto};

/// Between two beats; a coordinator's shortest heartbeat timeout is several of them.
const BEAT_MS: u64 = 500;

/// Messages that wait for the network. A step sends a handful; what does not fit waits in the training thread.
const OUTGOING_MESSAGES_MAX: usize = 64;

/// A coordinator whose machine is gone is noticed by this: a ping so often, and so long for its answer.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// How long a worker that has a job tries to reach its coordinator again.
const RECONNECT_PATIENCE: Duration = Duration::from_mins(10);

/// Longest pause between two attempts to reach a coordinator.
const DIAL_PAUSE_MAX: Duration = Duration::from_millis(500);

/// How often it is told that a coordinator cannot be reached.
const DIAL_TOLD: Duration = Duration::from_secs(30);

/// How long the training thread may take to leave after the session ended.
const LEAVE_SECONDS_MAX: u64 = 10;

/// Exit code of a process that may be started again.
pub(crate) const EXIT_TEMPORARY: u8 = 75;

/// The coordinator cannot be reached, or the session with it is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SessionError {
    /// Not a URL.
    #[error("--coordinator {url}: {reason}; expected a URL such as http://127.0.0.1:7070")]
    Url { url: String, reason: String },
    /// Nobody answers.
    #[error("connect to the coordinator at {url}: {reason} (tried for {seconds} s)")]
    Connect {
        url: String,
        reason: String,
        seconds: u64,
    },
    /// It answered and is gone.
    #[error("the session with the coordinator ended: {0}")]
    Closed(String),
    /// It does not let this worker in.
    #[error("the coordinator at {url} does not let this worker in: {reason}")]
    Denied { url: String, reason: String },
    /// It said Stop.
    #[error("stopped by the coordinator: {reason}")]
    Stopped {
        reason: String,
        afterwards: Afterwards,
    },
}

/// Where the coordinator is, and how to get in.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    pub(crate) url: String,
    pub(crate) pass: Pass,
    /// Whether the process ends with the session, even in the middle of a computation.
    pub(crate) once: bool,
}

/// The training thread's end.
pub(crate) struct Session {
    voice: Voice,
    heard: blocking::Receiver<Result<ToWorker, SessionError>>,
    /// Heard where it could not be answered, to be heard again.
    again: RefCell<Option<ToWorker>>,
    tasks: [JoinHandle<()>; 2],
}

/// Speaks to the coordinator, from any thread.
#[derive(Clone)]
pub(crate) struct Voice {
    shared: Arc<Shared>,
}

struct Shared {
    incarnation: Incarnation,
    /// Where training's work shows.
    pulse: Arc<Pulse>,
    state: Mutex<State>,
}

struct State {
    /// To the present stream.
    outgoing: mpsc::Sender<FromWorker>,
    /// The job that it was welcomed to.
    job: JobId,
    /// What it says of itself whenever it connects again, and what holds for it; set while it has a job.
    welcomed: Option<(WorkerProfile, Terms)>,
    /// Whether it waits to be admitted.
    spare: bool,
    /// The highest that it has heard.
    fence: Fence,
    /// The newest that it has heard of. Never goes back.
    generation: Generation,
    /// Up to which generation it shall take part in none, and why.
    over: Option<(Generation, String)>,
    committed: Step,
    awaits: Awaits,
    /// What ends the rendezvous or collective of a generation.
    aborter: Option<(Generation, Aborter)>,
    /// Why it is to leave, said again to a coordinator that may not have heard.
    leaving: Option<String>,
    /// Why the session is over.
    ended: Option<SessionError>,
}

impl Session {
    /// Connects, trying again until `patience` is over.
    pub(crate) fn open(
        runtime: &Handle,
        door: &Door,
        incarnation: Incarnation,
        patience: Duration,
    ) -> Result<Self, SessionError> {
        let (outgoing, queue) = mpsc::channel(OUTGOING_MESSAGES_MAX);
        let shared = Arc::new(Shared {
            incarnation,
            pulse: Arc::default(),
            state: Mutex::new(State {
                outgoing,
                job: JobId::default(),
                welcomed: None,
                spare: false,
                fence: Fence::default(),
                generation: Generation::default(),
                over: None,
                committed: Step::default(),
                awaits: Awaits::default(),
                aborter: None,
                leaving: None,
                ended: None,
            }),
        });
        let voice = Voice { shared };
        let incoming = runtime.block_on(connect(door, queue, patience))?;
        let (tell, heard) = blocking::channel();
        let listening = listen(incoming, Arc::clone(&voice.shared), tell, door.clone());
        let tasks = [
            runtime.spawn(beat(Arc::clone(&voice.shared))),
            runtime.spawn(listening),
        ];
        Ok(Self {
            voice,
            heard,
            again: RefCell::default(),
            tasks,
        })
    }

    pub(crate) fn voice(&self) -> &Voice {
        &self.voice
    }

    /// The next message, or `None` after `patience`.
    pub(crate) fn hear(&self, patience: Duration) -> Result<Option<ToWorker>, SessionError> {
        if let Some(message) = self.again.take() {
            return Ok(Some(message));
        }
        match self.heard.recv_timeout(patience) {
            Ok(message) => message.map(Some),
            Err(blocking::RecvTimeoutError::Timeout) => Ok(None),
            Err(blocking::RecvTimeoutError::Disconnected) => Err(self.voice.ended()),
        }
    }

    /// Has `message` heard next.
    pub(crate) fn put_back(&self, message: ToWorker) {
        *self.again.borrow_mut() = Some(message);
    }

    /// Whether something is to be heard that was put back.
    pub(crate) fn has_put_back(&self) -> bool {
        self.again.borrow().is_some()
    }

    /// Why the session is over, if it is.
    pub(crate) fn over(&self) -> Option<SessionError> {
        self.voice.shared.state().ended.clone()
    }

    /// Waits until what was said is on its way, at most a second.
    pub(crate) fn flush(&self) {
        let start = Instant::now();
        while self.voice.shared.state().outgoing.capacity() < OUTGOING_MESSAGES_MAX
            && self.over().is_none()
            && start.elapsed() < Duration::from_secs(1)
        {
            std::thread::sleep(Duration::from_millis(10));
        }
        // The last message has left the queue and may still be in the connection's hands.
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Voice {
    /// Says `message` with this worker's fences.
    pub(crate) fn say(&self, message: WorkerMessage) -> Result<(), SessionError> {
        let (outgoing, signed) = {
            let state = self.shared.state();
            (state.outgoing.clone(), self.shared.sign(&state, message))
        };
        let sent = outgoing.blocking_send(signed);
        let state = self.shared.state();
        match (sent, &state.ended) {
            (Ok(()), _) => Ok(()),
            // It is being connected again.
            (Err(_), None) if state.welcomed.is_some() => Ok(()),
            (Err(_), ended) => Err(ended
                .clone()
                .unwrap_or_else(|| SessionError::Closed("the stream is gone".into()))),
        }
    }

    /// Asks the coordinator to let this worker go, and again whenever it connects anew.
    pub(crate) fn leave(&self, reason: &str) {
        let reason = reason.to_owned();
        self.shared.state().leaving = Some(reason.clone());
        // Without a session there is nobody to tell, and nothing to leave.
        drop(self.say(WorkerMessage::Leave { reason }));
    }

    /// From now on the session outlives its stream, and joins again as `profile`.
    pub(crate) fn outlive(&self, profile: WorkerProfile, terms: Terms) {
        self.shared.state().welcomed = Some((profile, terms));
    }

    /// Where training shows its work.
    pub(crate) fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.shared.pulse)
    }

    /// Enters a generation whose rendezvous or collective `aborter` ends.
    pub(crate) fn enter(&self, generation: Generation, aborter: &Aborter) {
        let over = {
            let mut state = self.shared.state();
            state.generation = state.generation.max(generation);
            state.spare = false;
            let over = state.closed(generation);
            if over.is_none() {
                state.aborter = Some((generation, aborter.clone()));
            }
            over
        };
        if let Some(reason) = over {
            aborter.abort(generation.0, &reason);
        }
    }

    /// Whether `generation` still stands, for phases that ask nobody else; without one, whether the session does.
    pub(crate) fn check(&self, generation: Option<Generation>) -> Result<(), GateClosed> {
        let state = self.shared.state();
        let reason = match generation {
            Some(generation) => state.closed(generation),
            None => state.ended.as_ref().map(ToString::to_string),
        };
        reason.map_or(Ok(()), |reason| Err(GateClosed { reason }))
    }

    /// The newest generation that it has heard of.
    pub(crate) fn generation(&self) -> Generation {
        self.shared.state().generation
    }

    /// Whether it waits to be admitted to a generation that runs already.
    pub(crate) fn is_spare(&self) -> bool {
        self.shared.state().spare
    }

    pub(crate) fn await_next(&self, awaits: Awaits) {
        self.shared.state().awaits = awaits;
    }

    pub(crate) fn know(&self, committed: Step) {
        self.shared.state().committed = committed;
    }

    fn ended(&self) -> SessionError {
        let ended = self.shared.state().ended.clone();
        ended.unwrap_or_else(|| SessionError::Closed("the stream is gone".into()))
    }
}

impl State {
    /// Why `generation` is over for this worker, if it is.
    fn closed(&self, generation: Generation) -> Option<String> {
        let ended = self.ended.as_ref().map(ToString::to_string);
        let over = self.over.as_ref().filter(|(last, _)| generation <= *last);
        ended.or_else(|| over.map(|(_, reason)| reason.clone()))
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Plain values: a thread that panicked while it held them leaves them usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sign(&self, state: &State, message: WorkerMessage) -> FromWorker {
        FromWorker {
            job: state.job.clone(),
            incarnation: self.incarnation,
            generation: state.generation,
            message,
        }
    }

    /// Ends what this worker does in generations up to `generation`.
    fn abort(&self, generation: Generation, reason: &str) {
        let aborter = {
            let mut state = self.state();
            state.generation = state.generation.max(generation);
            state.over = Some((generation, reason.to_owned()));
            state.aborter.take_if(|(entered, _)| *entered <= generation)
        };
        if let Some((entered, aborter)) = aborter {
            aborter.abort(entered.0, reason);
        }
    }

    fn end(&self, error: SessionError) -> SessionError {
        let aborter = {
            let mut state = self.state();
            state.ended.get_or_insert_with(|| error.clone());
            state.aborter.take()
        };
        if let Some((generation, aborter)) = aborter {
            aborter.abort(generation.0, &error.to_string());
        }
        error
    }
}

async fn connect(
    door: &Door,
    queue: mpsc::Receiver<FromWorker>,
    patience: Duration,
) -> Result<Streaming<proto::ToWorker>, SessionError> {
    let url = door.url.as_str();
    let refused = |reason: String| SessionError::Url {
        url: url.into(),
        reason,
    };
    let endpoint =
        Endpoint::from_shared(url.to_owned()).map_err(|error| refused(error.to_string()))?;
    if endpoint.uri().scheme_str() != Some("http") {
        return Err(refused("it has to begin with http://".into()));
    }
    let endpoint = endpoint
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true);
    let channel = dial(&endpoint, door, patience).await?;
    let outgoing = tokio_stream::StreamExt::map(ReceiverStream::new(queue), |message| {
        proto::FromWorker::from(message)
    });
    let mut client = WorkersClient::with_interceptor(channel, door.pass.clone());
    let answer = client.session(outgoing).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| match status.code() {
            Code::Unauthenticated => SessionError::Denied {
                url: url.into(),
                reason: status.message().to_owned(),
            },
            _ => SessionError::Closed(status.message().to_owned()),
        })
}

/// Connects, trying again until `patience` is over; the first attempt that fails is told at once, later ones now and then.
async fn dial(
    endpoint: &Endpoint,
    door: &Door,
    patience: Duration,
) -> Result<Channel, SessionError> {
    let url = &door.url;
    let start = Instant::now();
    let mut told: Option<Instant> = None;
    let mut pause = Duration::from_millis(50);
    loop {
        let reason = match endpoint.connect().await {
            Ok(channel) => return Ok(channel),
            Err(error) => cause(&error),
        };
        if start.elapsed() + pause > patience {
            return Err(SessionError::Connect {
                url: url.clone(),
                reason,
                seconds: patience.as_secs(),
            });
        }
        if told.is_none_or(|at| at.elapsed() >= DIAL_TOLD) {
            told = Some(Instant::now());
            let left = patience.saturating_sub(start.elapsed());
            let then = if door.once {
                "then this worker leaves"
            } else {
                "and then anew"
            };
            tracing::warn!(
                "connect to the coordinator at {url}: {reason}; trying again for {:.0} s, {then}; is it running, and is \
                 --coordinator its address?",
                left.as_secs_f64()
            );
        }
        sleep(pause).await;
        pause = (pause * 2).min(DIAL_PAUSE_MAX);
    }
}

/// What the system said, at the end of what each layer made of it.
fn cause(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// Says that this worker lives, what it knows, does and waits for.
async fn beat(shared: Arc<Shared>) {
    let mut ticks = interval(Duration::from_millis(BEAT_MS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        let (step, work, progress) = shared.pulse.read();
        let (outgoing, beat, outlives) = {
            let state = shared.state();
            let beat = WorkerMessage::Beat {
                committed: state.committed,
                awaits: state.awaits,
                activity: Activity {
                    step: Step(step),
                    work: match work {
                        trainer::Work::Untold => Work::Untold,
                        trainer::Work::Computes => Work::Computes,
                        trainer::Work::Exchanges => Work::Exchanges,
                        trainer::Work::Waits => Work::Waits,
                    },
                    progress,
                },
            };
            let beat = shared.sign(&state, beat);
            (state.outgoing.clone(), beat, state.welcomed.is_some())
        };
        // A full queue means that the network is behind: what waits in it proves life as well.
        if let Err(mpsc::error::TrySendError::Closed(_)) = outgoing.try_send(beat)
            && !outlives
        {
            return;
        }
    }
}

async fn listen(
    mut incoming: Streaming<proto::ToWorker>,
    shared: Arc<Shared>,
    tell: blocking::Sender<Result<ToWorker, SessionError>>,
    door: Door,
) {
    let error = loop {
        let Some(end) = hear(&mut incoming, &shared, &tell).await else {
            return;
        };
        let welcomed = shared.state().welcomed.clone();
        let again = match &end {
            SessionError::Closed(_) => welcomed,
            SessionError::Stopped { afterwards, .. } => {
                welcomed.filter(|_| *afterwards == Afterwards::Return)
            }
            _ => None,
        };
        let Some((profile, _)) = again else {
            break end;
        };
        tracing::warn!("connecting to the coordinator again: {end}");
        // The generation may go on there, but not with this worker: whoever lost its stream is lost.
        let generation = shared.state().generation;
        shared.abort(generation, &end.to_string());
        match connect_again(&door, &shared, profile).await {
            Ok(again) => incoming = again,
            Err(error) => break error,
        }
        tracing::info!("connected to the coordinator again");
    };
    // The receiver may be gone: then nobody needs to know.
    drop(tell.send(Err(shared.end(error.clone()))));
    drop(tell);
    sleep(Duration::from_secs(LEAVE_SECONDS_MAX)).await;
    let restart = matches!(
        &error,
        SessionError::Stopped {
            afterwards: Afterwards::Restart,
            ..
        }
    );
    if !door.once && !restart {
        return tracing::warn!("a computation that nobody wants goes on to its end: {error}");
    }
    tracing::warn!("leaving in the middle of a computation: {error}");
    std::process::exit(i32::from(EXIT_TEMPORARY));
}

/// Passes on what is heard until the stream is over; `None` when nobody listens any more.
async fn hear(
    incoming: &mut Streaming<proto::ToWorker>,
    shared: &Shared,
    tell: &blocking::Sender<Result<ToWorker, SessionError>>,
) -> Option<SessionError> {
    let closed = |reason: String| Some(SessionError::Closed(reason));
    loop {
        let silence = shared
            .state()
            .welcomed
            .as_ref()
            .map(|(_, it)| it.silence_ms);
        let next = match silence {
            Some(silence_ms) => {
                let next = timeout(Duration::from_millis(silence_ms), incoming.message()).await;
                match next {
                    Ok(next) => next,
                    Err(_) => {
                        return closed(format!("silent for {} s", silence_ms as f64 / 1000.0));
                    }
                }
            }
            None => incoming.message().await,
        };
        let message = match next {
            Ok(Some(message)) => message,
            Ok(None) => return closed("the coordinator closed it".into()),
            Err(status) => return closed(status.message().to_owned()),
        };
        let message = match ToWorker::try_from(message) {
            Ok(message) => message,
            Err(error) => return closed(format!("unreadable message: {error}")),
        };
        if message.incarnation != shared.incarnation {
            continue; // meant for another life of this process
        }
        if !shared.state().fence.admits(message.fence) {
            // Whoever replaced it may be the next to answer at this address.
            sleep(DIAL_PAUSE_MAX).await;
            return closed("another coordinator has taken its place".into());
        }
        let generation = message.generation;
        // Said by a coordinator that is no more. Who owns no generation has none.
        if generation < shared.state().generation && generation > Generation::default() {
            continue;
        }
        match &message.message {
            CoordinatorMessage::Heard { .. } => continue,
            CoordinatorMessage::Stop { reason, afterwards } => {
                return Some(SessionError::Stopped {
                    reason: reason.clone(),
                    afterwards: *afterwards,
                });
            }
            CoordinatorMessage::Abort { reason } => shared.abort(generation, reason),
            // All is durable: the stream's end is the job's.
            CoordinatorMessage::Finish => shared.state().welcomed = None,
            CoordinatorMessage::Welcome { spare, job, .. } => {
                let mut state = shared.state();
                state.spare = *spare;
                state.job.clone_from(job);
            }
            _ => {}
        }
        if tell.send(Ok(message)).is_err() {
            return None;
        }
    }
}

/// A new stream to the coordinator, whose first word is Join.
async fn connect_again(
    door: &Door,
    shared: &Shared,
    profile: WorkerProfile,
) -> Result<Streaming<proto::ToWorker>, SessionError> {
    let deadline = Instant::now() + RECONNECT_PATIENCE;
    loop {
        let (outgoing, queue) = mpsc::channel(OUTGOING_MESSAGES_MAX);
        {
            let mut state = shared.state();
            let join = WorkerMessage::Join(profile.clone());
            let leave = state.leaving.clone();
            let leave = leave.map(|reason| WorkerMessage::Leave { reason });
            for message in std::iter::once(join).chain(leave) {
                // The queue is new and has room.
                drop(outgoing.try_send(shared.sign(&state, message)));
            }
            state.outgoing = outgoing;
        }
        let patience = deadline.saturating_duration_since(Instant::now());
        match connect(door, queue, patience).await {
            Err(SessionError::Closed(_)) if Instant::now() < deadline => {
                sleep(DIAL_PAUSE_MAX).await;
            }
            result => return result,
        }
    }
}
