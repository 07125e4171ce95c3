//! What clients ask of a coordinator, and what they are told.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protocol::{JobId, JobSummaryState, NewJob, SchedulerEvent, SubmitError};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tonic::Status;
use wire::proto;

use super::{Hub, Live, read};
use crate::driver::Input;
use crate::feed::Feed;
use crate::rows;
use crate::server::{Answer, Ask, give};

/// How long a running job may take to say how it is.
const VIEW_PATIENCE: Duration = Duration::from_secs(2);

impl Hub {
    pub(super) fn answer(&mut self, ask: Ask) -> anyhow::Result<()> {
        match ask {
            Ask::Submit(request, answer) => {
                let result = self.submit(request)?;
                give(answer, result);
            }
            Ask::Cancel(request, answer) => {
                let event = |id, reason| SchedulerEvent::CancelRequested { id, reason };
                self.steer(request.job, request.reason, "cancelled", event, answer)?;
            }
            Ask::Pause(request, answer) => {
                let event = |id, reason| SchedulerEvent::PauseRequested { id, reason };
                self.steer(request.job, request.reason, "paused", event, answer)?;
            }
            Ask::Resume(request, answer) => {
                let event = |id, reason| SchedulerEvent::ResumeRequested { id, reason };
                self.steer(request.job, request.reason, "resumed", event, answer)?;
            }
            Ask::Drain(name, answer) => {
                let found = self.scheduler.worker(&name);
                let result = found.map(|(incarnation, it)| {
                    let worker = wire::pool_worker(incarnation, it, self.now_ms());
                    proto::Worker {
                        draining: true,
                        ..worker
                    }
                });
                let result = result.ok_or_else(|| {
                    Status::not_found(format!(
                        "there is no worker {name}; `coordinator workers` lists those that are here"
                    ))
                });
                if result.is_ok() {
                    self.handle(SchedulerEvent::DrainRequested { name })?;
                }
                give(answer, result);
            }
            Ask::Job(name, answer) => {
                let found = self.find(&JobId(name)).map(|job| job.id);
                self.view(found, answer);
            }
            Ask::Watch(name, answer) => match self.find(&JobId(name)) {
                Err(status) => give(answer, Err(status)),
                Ok(job) => {
                    // First the feed, so that nothing falls between it and the view.
                    let feed = self.live.get(&job.id).map(|live| live.feed.clone());
                    let events = feed.unwrap_or_else(Feed::new).watch();
                    let view = self.ask_view(&job.id);
                    tokio::spawn(async move {
                        give(answer, view.await.map(|job| (job, events)));
                    });
                }
            },
            Ask::Jobs(answer) => {
                let views = self.views();
                tokio::spawn(async move { give(answer, Ok(views.await)) });
            }
            Ask::Metrics(request, answer) => {
                let found = self.find(&JobId(request.job.clone()));
                let config = found
                    .and_then(|job| read(&job.config_toml).map_err(Status::failed_precondition));
                tokio::spawn(async move {
                    let rows = match config {
                        Ok(config) => rows::read(config.job.output, request).await,
                        Err(status) => Err(status),
                    };
                    give(answer, rows);
                });
            }
            Ask::Workers(answer) => give(answer, Ok(self.workers())),
            Ask::Events(answer) => give(answer, Ok(self.events.subscribe())),
            Ask::Status(answer) => {
                let status = proto::Status {
                    build: env!("CARGO_PKG_VERSION").into(),
                    cluster: true,
                    jobs: Vec::new(),
                    workers: self.workers(),
                    events: self.kept.iter().cloned().collect(),
                    waiting: self.scheduler.waiting().unwrap_or_default(),
                };
                let views = self.views();
                tokio::spawn(async move {
                    let jobs = views.await;
                    give(answer, Ok(proto::Status { jobs, ..status }));
                });
            }
        }
        Ok(())
    }

    /// Tells the queue that a client wants a job to be `done` so, and answers with the job as it is then. Of one that has ended
    /// nothing can be wanted.
    fn steer(
        &mut self,
        name: String,
        reason: String,
        done: &str,
        event: impl FnOnce(JobId, String) -> SchedulerEvent,
        answer: Answer<proto::Job>,
    ) -> anyhow::Result<()> {
        let found = self.find(&JobId(name)).and_then(|job| match job.state {
            state if !state.has_ended() => Ok(job.id),
            state => Err(Status::failed_precondition(ended(&job.id, state, done))),
        });
        if let Ok(id) = &found {
            let reason = match reason.as_str() {
                "" => "by a client".to_owned(),
                _ => reason,
            };
            self.handle(event(id.clone(), reason))?;
        }
        self.view(found, answer);
        Ok(())
    }

    /// Checks a job and puts it into the queue. The outer error ends the coordinator.
    fn submit(
        &mut self,
        request: proto::SubmitRequest,
    ) -> anyhow::Result<Result<(proto::Job, bool), Status>> {
        let config = match read(&request.config_toml) {
            Ok(config) => config,
            Err(reason) => return Ok(Err(Status::invalid_argument(reason))),
        };
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let new = NewJob {
            id: JobId(config.job.name.clone()),
            key: request.idempotency_key,
            config_toml: request.config_toml,
            workers: config.cluster.workers,
            workers_max: config.cluster.max_workers,
            priority: config.job.priority,
            run_ms_max: config.job.run_ms_max(),
            attempts_max: config.job.max_attempts,
            submitted_unix_ms: since.as_millis() as u64,
        };
        let (id, created, actions) = match self.scheduler.submit(self.now_ms(), new) {
            Ok(taken) => taken,
            Err(error) => return Ok(Err(refused(&error))),
        };
        if created {
            // Of another job of its name.
            self.stood.remove(&id);
            self.live.insert(id.clone(), Live::new(config));
        }
        self.execute(actions)?;
        let job = self.find(&id).map(wire::queued_job);
        Ok(job.map(|job| (self.complete(job), created)))
    }

    fn find(&self, id: &JobId) -> Result<protocol::JobSummary, Status> {
        self.scheduler.job(id).ok_or_else(|| {
            Status::not_found(if id.0.is_empty() {
                "name a job: there is none, or more than one, that has not ended; `coordinator jobs` lists them".to_owned()
            } else {
                format!("there is no job {id}; `coordinator jobs` lists those that are known")
            })
        })
    }

    fn view(&self, found: Result<JobId, Status>, answer: Answer<proto::Job>) {
        match found {
            Err(status) => give(answer, Err(status)),
            Ok(id) => {
                let view = self.ask_view(&id);
                tokio::spawn(async move { give(answer, view.await) });
            }
        }
    }

    fn workers(&self) -> Vec<proto::Worker> {
        let now_ms = self.now_ms();
        let workers = self.scheduler.workers();
        let mut workers: Vec<_> = workers
            .map(|(incarnation, it)| wire::pool_worker(incarnation, it, now_ms))
            .collect();
        workers.sort_by(|a, b| a.name.cmp(&b.name));
        workers
    }

    /// All jobs; those that run are asked how they are, all at once.
    fn views(&self) -> impl Future<Output = Vec<proto::Job>> + Send + 'static {
        let views: Vec<_> = self
            .scheduler
            .jobs()
            .into_iter()
            .map(|job| tokio::spawn(self.ask_view(&job.id)))
            .collect();
        async move {
            let mut jobs = Vec::new();
            for view in views {
                if let Ok(Ok(job)) = view.await {
                    jobs.push(job);
                }
            }
            jobs
        }
    }

    /// A job as it is: a running one by its driver's word, if it answers in time.
    fn ask_view(
        &self,
        id: &JobId,
    ) -> impl Future<Output = Result<proto::Job, Status>> + Send + 'static {
        let found = self.find(id).map(|summary| {
            let (attempts, priority) = (summary.attempts, summary.priority);
            let submitted = summary.submitted_unix_ms;
            let queued = self.complete(wire::queued_job(summary));
            let inputs = self.live.get(id).and_then(|live| live.inputs.clone());
            (queued, inputs, attempts, priority, submitted)
        });
        async move {
            let (queued, inputs, attempts, priority, submitted_unix_ms) = found?;
            let Some(inputs) = inputs else {
                return Ok(queued);
            };
            if inputs.is_closed() {
                return Ok(proto::Job {
                    state: proto::JobState::Finishing.into(),
                    waiting: "writes its export, plots and summary".into(),
                    ..queued
                });
            }
            let (answer, answered) = oneshot::channel();
            let asked = async {
                inputs.send(Input::Job(answer)).await.ok()?;
                answered.await.ok()
            };
            Ok(match timeout(VIEW_PATIENCE, asked).await {
                Ok(Some(job)) => proto::Job {
                    objective: queued.objective,
                    attempts,
                    priority,
                    submitted_unix_ms,
                    ..job
                },
                // It opens its run directory.
                Ok(None) | Err(_) => queued,
            })
        }
    }
}

/// Why a job that has ended cannot be `done` so.
fn ended(id: &JobId, state: JobSummaryState, done: &str) -> String {
    let text = format!("job {id} has ended: it is {state}, and cannot be {done}");
    match state {
        JobSummaryState::Completed => text,
        _ => format!("{text}; submit it again to go on from its last checkpoint"),
    }
}

fn refused(error: &SubmitError) -> Status {
    let message = error.to_string();
    match error {
        SubmitError::NameTaken { .. } | SubmitError::KeyTaken { .. } => {
            Status::already_exists(message)
        }
        SubmitError::Full => Status::resource_exhausted(message),
        SubmitError::ShuttingDown => Status::unavailable(message),
    }
}
