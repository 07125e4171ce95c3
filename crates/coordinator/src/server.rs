//! The gRPC services: worker sessions, requests of clients, health and reflection. Decides nothing: sessions go to whoever
//! they are routed to, requests to whoever owns the jobs.
//!
//! All but health asks for the service's token, where it has one (invariant S1).

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use protocol::{FromWorker, Incarnation, ToWorker};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt, wrappers::errors::BroadcastStreamRecvError};
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Response, Status, Streaming};
use wire::proto::cluster_server::{Cluster, ClusterServer};
use wire::proto::job_event::Event as Kind;
use wire::proto::jobs_server::{Jobs, JobsServer};
use wire::proto::workers_server::{Workers, WorkersServer};
use wire::{Guard, proto};

use crate::driver::Input;

/// Messages to one worker that wait for its network. A job sends a handful a step; a worker that lets more pile up is lost.
const OUTGOING_MESSAGES_MAX: usize = 64;

/// A peer whose machine is gone is noticed by this: a ping so often, and so long for its answer.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// How long a worker that was let go may take to end its side, so that what it was told last arrives.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Between two tries to accept a connection, when files or memory are used up.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Connections that ended before they were accepted, which says nothing of the next.
const GONE_AGAIN: [io::ErrorKind; 3] = [
    io::ErrorKind::ConnectionAborted,
    io::ErrorKind::ConnectionReset,
    io::ErrorKind::Interrupted,
];

/// Where a session's messages go.
pub type ToSession = mpsc::Sender<Result<ToWorker, Status>>;

/// Who listens to a session, and may hand it on.
#[derive(Clone, Debug)]
pub struct Route {
    /// The job of workers that name none.
    pub job: String,
    /// Who listens.
    pub inputs: mpsc::Sender<Input>,
}

/// Where an answer goes.
pub type Answer<T> = oneshot::Sender<Result<T, Status>>;

/// Answers, unless whoever asked has gone.
pub fn give<T>(answer: Answer<T>, result: Result<T, Status>) {
    drop(answer.send(result));
}

/// A job as it is, and what happens to it from then on.
pub type Watched = (proto::Job, broadcast::Receiver<proto::JobEvent>);

/// What a client asks of whoever owns the jobs.
#[derive(Debug)]
pub enum Ask {
    /// Everything on one screen.
    Status(Answer<proto::Status>),
    /// One job; without a name the only one that has not ended.
    Job(String, Answer<proto::Job>),
    /// All jobs.
    Jobs(Answer<Vec<proto::Job>>),
    /// To follow a job.
    Watch(String, Answer<Watched>),
    /// To end a job.
    Cancel(proto::CancelRequest, Answer<proto::Job>),
    /// To keep a job from running.
    Pause(proto::PauseRequest, Answer<proto::Job>),
    /// To let it run again.
    Resume(proto::ResumeRequest, Answer<proto::Job>),
    /// To take a job; true when it is new.
    Submit(proto::SubmitRequest, Answer<(proto::Job, bool)>),
    /// All connected workers.
    Workers(Answer<Vec<proto::Worker>>),
    /// To follow the coordinator's events.
    Events(Answer<broadcast::Receiver<proto::Event>>),
    /// A job's rows.
    Metrics(proto::GetMetricsRequest, Answer<proto::GetMetricsResponse>),
    /// To let a worker go.
    Drain(String, Answer<proto::Worker>),
}

/// Where sessions and clients are let in to.
#[derive(Clone, Debug)]
pub struct Doors {
    /// Who listens to a new session.
    pub sessions: Route,
    /// Who answers clients.
    pub asks: mpsc::Sender<Ask>,
}

/// Serves on `listener` until `shutdown` resolves.
///
/// # Errors
/// What tonic says; a service description that does not load.
pub async fn serve(
    listener: TcpListener,
    doors: Doors,
    guard: Guard,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ClusterServer<Doors>>().await;
    health.set_serving::<JobsServer<Doors>>().await;
    health.set_serving::<WorkersServer<Doors>>().await;
    // Stock clients still ask in the older version of the protocol.
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(wire::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let older = InterceptedService::new(reflection().build_v1alpha()?, guard.clone());
    let reflection = InterceptedService::new(reflection().build_v1()?, guard.clone());
    tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(older)
        .add_service(WorkersServer::with_interceptor(
            doors.clone(),
            guard.clone(),
        ))
        .add_service(JobsServer::with_interceptor(doors.clone(), guard.clone()))
        .add_service(ClusterServer::with_interceptor(doors, guard))
        .serve_with_incoming_shutdown(incoming(listener), shutdown)
        .await?;
    Ok(())
}

/// Connections. Where no more can be accepted the next try has a pause before it: it would fail at once, and the one after it.
fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> {
    TcpListenerStream::new(listener).then(async |accepted| {
        if let Err(error) = &accepted
            && !GONE_AGAIN.contains(&error.kind())
        {
            tracing::warn!(
                "cannot accept a connection: {error}; each worker is an open file, whose limit `ulimit -n` tells (systemd: \
                 LimitNOFILE)"
            );
            sleep(ACCEPT_PAUSE).await;
        }
        accepted
    })
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Workers for Doors {
    type SessionStream = Events<proto::ToWorker>;

    async fn session(
        &self,
        request: Request<Streaming<proto::FromWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (answers, outgoing) = mpsc::channel(OUTGOING_MESSAGES_MAX);
        let (route, routed) = watch::channel(self.sessions.clone());
        let session = Session {
            id: SessionId::new(),
            home: self.sessions.inputs.clone(),
            routed,
            told: answers.downgrade(),
            first: Some((answers, route)),
        };
        tokio::spawn(session.run(request.into_inner()));
        // What thousands are told at once they share, until it is on its way.
        let outgoing = ReceiverStream::new(outgoing).map(|message| message.map(Into::into));
        Ok(Response::new(Box::pin(outgoing)))
    }
}

impl Doors {
    async fn ask<T>(&self, ask: impl FnOnce(Answer<T>) -> Ask) -> Result<T, Status> {
        let gone = || Status::unavailable("the coordinator is leaving");
        let (answer, answered) = oneshot::channel();
        self.asks.send(ask(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

#[tonic::async_trait]
impl Jobs for Doors {
    type WatchStream = Events<proto::JobEvent>;

    async fn submit(
        &self,
        request: Request<proto::SubmitRequest>,
    ) -> Result<Response<proto::SubmitResponse>, Status> {
        let request = request.into_inner();
        let (job, created) = self.ask(|answer| Ask::Submit(request, answer)).await?;
        let job = Some(job);
        Ok(Response::new(proto::SubmitResponse { job, created }))
    }

    async fn get(
        &self,
        request: Request<proto::GetRequest>,
    ) -> Result<Response<proto::Job>, Status> {
        let name = request.into_inner().job;
        Ok(Response::new(self.ask(|it| Ask::Job(name, it)).await?))
    }

    async fn list(
        &self,
        _request: Request<proto::ListRequest>,
    ) -> Result<Response<proto::ListResponse>, Status> {
        let jobs = self.ask(Ask::Jobs).await?;
        Ok(Response::new(proto::ListResponse { jobs }))
    }

    async fn watch(
        &self,
        request: Request<proto::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let name = request.into_inner().job;
        let (job, events) = self.ask(|it| Ask::Watch(name, it)).await?;
        let first = proto::JobEvent {
            event: Some(Kind::Job(job)),
        };
        let events = BroadcastStream::new(events).map(|event| {
            Ok(
                event.unwrap_or_else(|BroadcastStreamRecvError::Lagged(missed)| proto::JobEvent {
                    event: Some(Kind::Missed(missed)),
                }),
            )
        });
        let stream = tokio_stream::once(Ok(first)).chain(events);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn cancel(
        &self,
        request: Request<proto::CancelRequest>,
    ) -> Result<Response<proto::CancelResponse>, Status> {
        let request = request.into_inner();
        let job = Some(self.ask(|it| Ask::Cancel(request, it)).await?);
        Ok(Response::new(proto::CancelResponse { job }))
    }

    async fn pause(
        &self,
        request: Request<proto::PauseRequest>,
    ) -> Result<Response<proto::PauseResponse>, Status> {
        let request = request.into_inner();
        let job = Some(self.ask(|it| Ask::Pause(request, it)).await?);
        Ok(Response::new(proto::PauseResponse { job }))
    }

    async fn resume(
        &self,
        request: Request<proto::ResumeRequest>,
    ) -> Result<Response<proto::ResumeResponse>, Status> {
        let request = request.into_inner();
        let job = Some(self.ask(|it| Ask::Resume(request, it)).await?);
        Ok(Response::new(proto::ResumeResponse { job }))
    }
}

#[tonic::async_trait]
impl Cluster for Doors {
    type WatchEventsStream = Events<proto::Event>;

    async fn get_status(
        &self,
        _request: Request<proto::GetStatusRequest>,
    ) -> Result<Response<proto::Status>, Status> {
        Ok(Response::new(self.ask(Ask::Status).await?))
    }

    async fn list_workers(
        &self,
        _request: Request<proto::ListWorkersRequest>,
    ) -> Result<Response<proto::ListWorkersResponse>, Status> {
        let workers = self.ask(Ask::Workers).await?;
        Ok(Response::new(proto::ListWorkersResponse { workers }))
    }

    async fn watch_events(
        &self,
        _request: Request<proto::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let events = self.ask(Ask::Events).await?;
        // A client that is too slow loses some; the next one tells where things are.
        let events = BroadcastStream::new(events).filter_map(Result::ok).map(Ok);
        Ok(Response::new(Box::pin(events)))
    }

    async fn get_metrics(
        &self,
        request: Request<proto::GetMetricsRequest>,
    ) -> Result<Response<proto::GetMetricsResponse>, Status> {
        let request = request.into_inner();
        let rows = self.ask(|it| Ask::Metrics(request, it)).await?;
        Ok(Response::new(rows))
    }

    async fn drain_worker(
        &self,
        request: Request<proto::DrainWorkerRequest>,
    ) -> Result<Response<proto::DrainWorkerResponse>, Status> {
        let name = request.into_inner().name;
        let worker = Some(self.ask(|it| Ask::Drain(name, it)).await?);
        Ok(Response::new(proto::DrainWorkerResponse { worker }))
    }
}

/// One worker's stream.
struct Session {
    id: SessionId,
    /// Who listened first, and hears of the end.
    home: mpsc::Sender<Input>,
    routed: watch::Receiver<Route>,
    /// Given to whoever listens first: where answers go, and to whom the session may be handed on.
    first: Option<(ToSession, watch::Sender<Route>)>,
    /// Where answers go, as long as somebody holds it; then the stream ends.
    told: mpsc::WeakSender<Result<ToWorker, Status>>,
}

impl Session {
    async fn run(mut self, mut incoming: Streaming<proto::FromWorker>) {
        let mut speaker = None;
        let end = loop {
            let message = tokio::select! {
                message = incoming.message() => message,
                () = let_go(&mut self.routed) => break None,
            };
            match message {
                Ok(Some(message)) => {
                    if let Err(status) = self.pass_on(message, &mut speaker).await {
                        break Some(status);
                    }
                }
                // The worker ended its side, or its process is gone.
                Ok(None) | Err(_) => break None,
            }
        };
        let first = self.first.take().map(|(answers, _)| answers);
        if let (Some(status), Some(answers)) = (end, first.or_else(|| self.told.upgrade())) {
            // The worker may be gone as well; then nobody needs to know why.
            drop(answers.try_send(Err(status)));
        }
        let Some(incarnation) = speaker else { return };
        let now = self.routed.borrow().inputs.clone();
        let over = || Input::Disconnected(incarnation, self.id);
        // Whoever is gone has ended the job.
        drop(now.send(over()).await);
        if !now.same_channel(&self.home) {
            drop(self.home.send(over()).await);
        }
        let rest = async { while let Ok(Some(_)) = incoming.message().await {} };
        drop(timeout(LAST_WORDS, rest).await);
    }

    async fn pass_on(
        &mut self,
        mut message: proto::FromWorker,
        speaker: &mut Option<Incarnation>,
    ) -> Result<(), Status> {
        let route = self.routed.borrow().clone();
        if message.job.is_empty() {
            message.job.clone_from(&route.job);
        }
        let message = FromWorker::try_from(message)?;
        match speaker {
            None => {
                *speaker = Some(message.incarnation);
                if let Some((answers, route_to)) = self.first.take() {
                    let connected = Connected {
                        incarnation: message.incarnation,
                        session: self.id,
                        answers,
                        route: route_to,
                    };
                    tell(&route, Input::Connected(connected)).await?;
                }
            }
            Some(known) if *known != message.incarnation => {
                return Err(Status::invalid_argument(format!(
                    "this session is worker {known}'s, and worker {} spoke in it",
                    message.incarnation
                )));
            }
            Some(_) => {}
        }
        tell(&route, Input::Message(Box::new(message))).await
    }
}

/// A session that spoke for the first time. It ends when nobody holds this.
#[derive(Debug)]
pub struct Connected {
    /// Whose.
    pub incarnation: Incarnation,
    /// Which: a worker that connects again has another one.
    pub session: SessionId,
    /// Where answers go.
    pub answers: ToSession,
    /// To hand it on.
    pub route: watch::Sender<Route>,
}

/// A number that no other session of this process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId(u64);

impl SessionId {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Waits until nobody owns the session any more.
async fn let_go(routed: &mut watch::Receiver<Route>) {
    while routed.changed().await.is_ok() {}
}

async fn tell(route: &Route, input: Input) -> Result<(), Status> {
    let told = route.inputs.send(input).await;
    told.map_err(|_| Status::unavailable("the job has ended"))
}
