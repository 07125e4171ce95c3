//! The gRPC services: worker sessions and status in, answers out. Decides nothing; everything goes to the driver's queue.
//!
//! Open are `Workers`, `Cluster`, health and reflection. Only loopback listeners are allowed so far, so none of them asks for
//! credentials (invariant S1).

use std::future::Future;
use std::pin::Pin;

use protocol::{FromWorker, Incarnation};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};
use wire::proto;
use wire::proto::cluster_server::{Cluster, ClusterServer};
use wire::proto::workers_server::{Workers, WorkersServer};

use crate::driver::Input;

/// Messages to one worker that wait for its network. A job sends a handful a step; a worker that lets more pile up is lost.
const OUTGOING_MESSAGES_MAX: usize = 64;

/// Where a session's messages go.
pub type ToSession = mpsc::Sender<Result<proto::ToWorker, Status>>;

#[derive(Clone)]
struct Services {
    /// The job of workers that name none: this coordinator runs one.
    job: String,
    inputs: mpsc::Sender<Input>,
}

/// Serves on `listener` until `shutdown` resolves.
///
/// # Errors
/// What tonic says; a service description that does not load.
pub async fn serve(
    listener: TcpListener,
    job: String,
    inputs: mpsc::Sender<Input>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let services = Services { job, inputs };
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ClusterServer<Services>>().await;
    health.set_serving::<WorkersServer<Services>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(wire::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .add_service(health_service)
        .add_service(reflection)
        .add_service(WorkersServer::new(services.clone()))
        .add_service(ClusterServer::new(services))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), shutdown)
        .await?;
    Ok(())
}

#[tonic::async_trait]
impl Workers for Services {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<proto::ToWorker, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<proto::FromWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (answers, outgoing) = mpsc::channel(OUTGOING_MESSAGES_MAX);
        let session = Session {
            services: self.clone(),
            answers,
        };
        tokio::spawn(session.run(request.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

#[tonic::async_trait]
impl Cluster for Services {
    async fn get_status(
        &self,
        _request: Request<proto::GetStatusRequest>,
    ) -> Result<Response<proto::Status>, Status> {
        let (answer, status) = oneshot::channel();
        let gone = || Status::unavailable("the job has ended and the coordinator is leaving");
        self.inputs
            .send(Input::Status(answer))
            .await
            .map_err(|_| gone())?;
        let status = status.await.map_err(|_| gone())?;
        Ok(Response::new(status))
    }
}

/// One worker's stream.
struct Session {
    services: Services,
    answers: ToSession,
}

impl Session {
    async fn run(self, mut incoming: Streaming<proto::FromWorker>) {
        let mut speaker = None;
        let end = loop {
            match incoming.message().await {
                Ok(Some(message)) => {
                    if let Err(status) = self.pass_on(message, &mut speaker).await {
                        break Some(status);
                    }
                }
                // The worker ended its side, or its process is gone.
                Ok(None) | Err(_) => break None,
            }
        };
        if let Some(status) = end {
            // The worker may be gone as well; then nobody needs to know why.
            drop(self.answers.try_send(Err(status)));
        }
        if let Some(incarnation) = speaker {
            // A driver that is gone has ended its job.
            drop(
                self.services
                    .inputs
                    .send(Input::Disconnected(incarnation))
                    .await,
            );
        }
    }

    async fn pass_on(
        &self,
        mut message: proto::FromWorker,
        speaker: &mut Option<Incarnation>,
    ) -> Result<(), Status> {
        if message.job.is_empty() {
            message.job.clone_from(&self.services.job);
        }
        let message = FromWorker::try_from(message)?;
        match speaker {
            None => {
                *speaker = Some(message.incarnation);
                self.tell(Input::Connected(message.incarnation, self.answers.clone()))
                    .await?;
            }
            Some(known) if *known != message.incarnation => {
                return Err(Status::invalid_argument(format!(
                    "this session is worker {known}'s, and worker {} spoke in it",
                    message.incarnation
                )));
            }
            Some(_) => {}
        }
        self.tell(Input::Message(message)).await
    }

    async fn tell(&self, input: Input) -> Result<(), Status> {
        let told = self.services.inputs.send(input).await;
        told.map_err(|_| Status::unavailable("the job has ended"))
    }
}
