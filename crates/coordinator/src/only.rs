//! What clients ask of a coordinator that runs one job: its driver knows the answers.

use tokio::sync::{broadcast, mpsc, oneshot};
use tonic::Status;
use wire::proto;

use crate::driver::Input;
use crate::feed::Feed;
use crate::rows;
use crate::server::{Ask, give};

/// What a coordinator without a queue says to whoever submits, pauses or drains.
const NO_QUEUE: &str = "this coordinator runs one job and leaves; start `coordinator --cluster` to submit, pause and resume \
                        jobs, and to drain workers";

/// Answers what clients ask about the job called `name`, until nobody asks any more.
pub async fn answer(
    name: String,
    objective: String,
    feed: Feed,
    inputs: mpsc::Sender<Input>,
    mut asks: mpsc::Receiver<Ask>,
) {
    let only = Only {
        name,
        objective,
        feed,
        inputs,
    };
    while let Some(ask) = asks.recv().await {
        only.answer(ask).await;
    }
}

struct Only {
    name: String,
    objective: String,
    feed: Feed,
    inputs: mpsc::Sender<Input>,
}

impl Only {
    async fn answer(&self, ask: Ask) {
        match ask {
            Ask::Status(answer) => {
                let status = self.job("").await.map(|job| proto::Status {
                    build: env!("CARGO_PKG_VERSION").into(),
                    cluster: false,
                    waiting: job.waiting.clone(),
                    workers: workers(&job),
                    events: job.events.clone(),
                    jobs: vec![job],
                });
                give(answer, status);
            }
            Ask::Job(name, answer) => give(answer, self.job(&name).await),
            Ask::Jobs(answer) => give(answer, self.job("").await.map(|job| vec![job])),
            Ask::Watch(name, answer) => {
                // First the feed, so that nothing falls between it and the view.
                let events = self.feed.watch();
                give(answer, self.job(&name).await.map(|job| (job, events)));
            }
            Ask::Cancel(request, answer) => {
                let job = self.job(&request.job).await;
                if job.is_ok() {
                    let reason = format!("cancelled: {}", request.reason);
                    // A driver that is gone has ended its job.
                    drop(self.inputs.send(Input::StopRequested(reason)).await);
                }
                give(answer, job);
            }
            Ask::Workers(answer) => give(answer, self.job("").await.map(|job| workers(&job))),
            Ask::Metrics(request, answer) => {
                let rows = match self.job(&request.job).await {
                    Ok(job) => rows::read(job.output.into(), request).await,
                    Err(status) => Err(status),
                };
                give(answer, rows);
            }
            Ask::Events(answer) => give(answer, Ok(self.events())),
            Ask::Submit(_, answer) => give(answer, Err(Status::failed_precondition(NO_QUEUE))),
            Ask::Pause(_, answer) | Ask::Resume(_, answer) => {
                give(answer, Err(Status::failed_precondition(NO_QUEUE)));
            }
            Ask::Drain(_, answer) => give(answer, Err(Status::failed_precondition(NO_QUEUE))),
        }
    }

    async fn job(&self, name: &str) -> Result<proto::Job, Status> {
        if !name.is_empty() && name != self.name {
            let reason = format!(
                "there is no job {name}; this coordinator runs {}",
                self.name
            );
            return Err(Status::not_found(reason));
        }
        let (answer, answered) = oneshot::channel();
        let gone = || Status::unavailable("the job has ended and the coordinator is leaving");
        let asked = self.inputs.send(Input::Job(answer)).await;
        asked.map_err(|_| gone())?;
        let job = answered.await.map_err(|_| gone())?;
        Ok(proto::Job {
            objective: self.objective.clone(),
            attempts: 1,
            ..job
        })
    }

    /// The job's notes are all that happens here.
    fn events(&self) -> broadcast::Receiver<proto::Event> {
        let (sender, receiver) = broadcast::channel(64);
        let mut events = self.feed.watch();
        tokio::spawn(async move {
            loop {
                match events.recv().await {
                    Ok(proto::JobEvent {
                        event: Some(proto::job_event::Event::Note(note)),
                    }) => {
                        if sender.send(note).is_err() {
                            return;
                        }
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        receiver
    }
}

fn workers(job: &proto::Job) -> Vec<proto::Worker> {
    let workers = job.workers.iter().map(|it| proto::Worker {
        name: it.name.clone(),
        incarnation: it.incarnation,
        address: it.address.clone(),
        device: String::new(),
        job: job.name.clone(),
        draining: false,
        silent_ms: Some(it.silent_ms),
    });
    workers.collect()
}
