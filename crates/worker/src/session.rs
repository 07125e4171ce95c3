//! The stream to the coordinator: a tokio task that beats and listens, and a blocking handle for the training thread.
//!
//! When the coordinator says Stop, or the stream ends, the task first aborts the collective, so that a training thread that
//! waits for a peer wakes up, then passes the word on. A thread that has not left after [`LEAVE_SECONDS_MAX`] is in a long
//! computation whose result nobody wants: a process that serves one job exits under it, one that serves more lets it end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as blocking};
use std::time::{Duration, Instant};

use collective::Aborter;
use protocol::{
    Activity, Afterwards, Awaits, CoordinatorMessage, FromWorker, Generation, Incarnation, JobId,
    Step, ToWorker, WorkerMessage,
};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};
use wire::proto::workers_client::WorkersClient;
use wire::{Pass, proto};

/// Between two beats; a coordinator's shortest heartbeat timeout is several of them.
const BEAT_MS: u64 = 500;

/// Messages that wait for the network. A step sends a handful; what does not fit waits in the training thread.
const OUTGOING_MESSAGES_MAX: usize = 64;

/// A coordinator whose machine is gone is noticed by this: a ping so often, and so long for its answer.
const KEEPALIVE: Duration = Duration::from_secs(10);

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
    tasks: [JoinHandle<()>; 2],
}

/// Speaks to the coordinator, from any thread.
#[derive(Clone)]
pub(crate) struct Voice {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<FromWorker>,
}

struct Shared {
    incarnation: Incarnation,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    generation: Generation,
    committed: Step,
    awaits: Awaits,
    /// The present generation's collective.
    aborter: Option<Aborter>,
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
        let shared = Arc::new(Shared {
            incarnation,
            state: Mutex::default(),
        });
        let (outgoing, queue) = mpsc::channel(OUTGOING_MESSAGES_MAX);
        let voice = Voice { shared, outgoing };
        let incoming = runtime.block_on(connect(door, queue, patience))?;
        let (tell, heard) = blocking::channel();
        let tasks = [
            runtime.spawn(beat(voice.clone())),
            runtime.spawn(listen(incoming, Arc::clone(&voice.shared), tell, door.once)),
        ];
        Ok(Self {
            voice,
            heard,
            tasks,
        })
    }

    pub(crate) fn voice(&self) -> &Voice {
        &self.voice
    }

    /// The next message, or `None` after `patience`.
    pub(crate) fn hear(&self, patience: Duration) -> Result<Option<ToWorker>, SessionError> {
        match self.heard.recv_timeout(patience) {
            Ok(message) => message.map(Some),
            Err(blocking::RecvTimeoutError::Timeout) => Ok(None),
            Err(blocking::RecvTimeoutError::Disconnected) => Err(self.voice.ended()),
        }
    }

    /// Why the session is over, if it is.
    pub(crate) fn over(&self) -> Option<SessionError> {
        self.voice.shared.state().ended.clone()
    }

    /// Waits until what was said is on its way, at most a second.
    pub(crate) fn flush(&self) {
        let start = Instant::now();
        while self.voice.outgoing.capacity() < OUTGOING_MESSAGES_MAX
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
        let message = self.shared.sign(message);
        self.outgoing
            .blocking_send(message)
            .map_err(|_| self.ended())
    }

    /// Enters a generation whose collective `aborter` ends.
    pub(crate) fn enter(&self, generation: Generation, aborter: Option<Aborter>) {
        let ended = {
            let mut state = self.shared.state();
            state.generation = generation;
            state.aborter.clone_from(&aborter);
            state.ended.clone()
        };
        if let (Some(error), Some(aborter)) = (ended, aborter) {
            aborter.abort(generation.0, &error.to_string());
        }
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

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Plain values: a thread that panicked while it held them leaves them usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sign(&self, message: WorkerMessage) -> FromWorker {
        FromWorker {
            // The coordinator fills in the job that the session was given to.
            job: JobId::default(),
            incarnation: self.incarnation,
            generation: self.state().generation,
            message,
        }
    }

    fn end(&self, error: SessionError) -> SessionError {
        let (generation, aborter) = {
            let mut state = self.state();
            state.ended.get_or_insert_with(|| error.clone());
            (state.generation, state.aborter.take())
        };
        if let Some(aborter) = aborter {
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
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| SessionError::Url {
        url: url.into(),
        reason: error.to_string(),
    })?;
    let endpoint = endpoint
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true);
    let channel = dial(&endpoint, url, patience).await?;
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

async fn dial(endpoint: &Endpoint, url: &str, patience: Duration) -> Result<Channel, SessionError> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(50);
    loop {
        let error = match endpoint.connect().await {
            Ok(channel) => return Ok(channel),
            Err(error) => error,
        };
        if start.elapsed() + pause > patience {
            let cause = std::error::Error::source(&error);
            return Err(SessionError::Connect {
                url: url.into(),
                reason: cause.map_or_else(|| error.to_string(), ToString::to_string),
                seconds: patience.as_secs(),
            });
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}

/// Says that this worker lives, what it knows and what it waits for.
async fn beat(voice: Voice) {
    let mut ticks = interval(Duration::from_millis(BEAT_MS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        let message = {
            let state = voice.shared.state();
            WorkerMessage::Beat {
                committed: state.committed,
                awaits: state.awaits,
                activity: Activity::default(),
            }
        };
        let message = voice.shared.sign(message);
        // A full queue means that the network is behind: what waits in it proves life as well.
        if let Err(mpsc::error::TrySendError::Closed(_)) = voice.outgoing.try_send(message) {
            return;
        }
    }
}

async fn listen(
    mut incoming: Streaming<proto::ToWorker>,
    shared: Arc<Shared>,
    tell: blocking::Sender<Result<ToWorker, SessionError>>,
    once: bool,
) {
    let error = loop {
        let message = match incoming.message().await {
            Ok(Some(message)) => message,
            Ok(None) => break SessionError::Closed("the coordinator closed it".into()),
            Err(status) => break SessionError::Closed(status.message().to_owned()),
        };
        let message = match ToWorker::try_from(message) {
            Ok(message) => message,
            Err(error) => break SessionError::Closed(format!("unreadable message: {error}")),
        };
        if message.incarnation != shared.incarnation {
            continue; // meant for another life of this process
        }
        if let CoordinatorMessage::Stop { reason, afterwards } = message.message {
            break SessionError::Stopped { reason, afterwards };
        }
        if tell.send(Ok(message)).is_err() {
            return;
        }
    };
    // The receiver may be gone: then nobody needs to know.
    drop(tell.send(Err(shared.end(error.clone()))));
    drop(tell);
    sleep(Duration::from_secs(LEAVE_SECONDS_MAX)).await;
    if !once {
        return tracing::warn!("a computation that nobody wants goes on to its end: {error}");
    }
    tracing::warn!("leaving in the middle of a computation: {error}");
    std::process::exit(i32::from(EXIT_TEMPORARY));
}
