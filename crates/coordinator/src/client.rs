//! What people type to a running coordinator: submit, jobs, pause, resume, cancel, workers, drain, status, watch.
//!
//! Each is one call of the gRPC services, printed for a person or as JSON; nothing is decided here. Any other gRPC client can
//! do the same.

mod text;
mod watch;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use serde_json::json;
use tokio::runtime::Runtime;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use wire::proto::JobState;
use wire::proto::cluster_client::ClusterClient;
use wire::proto::jobs_client::JobsClient;
use wire::{Pass, Token, proto};

use crate::config::Config;
use crate::run::{EXIT_TEMPORARY, EXIT_USAGE};

/// How long a coordinator may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A peer whose machine is gone is noticed by this while a job is watched.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Which coordinator to ask.
#[derive(clap::Args, Clone, Debug)]
pub struct Target {
    /// URL of the coordinator.
    #[arg(
        long = "coordinator",
        value_name = "URL",
        default_value = "http://127.0.0.1:7070"
    )]
    url: String,
    /// File with the coordinator's token.
    #[arg(long, value_name = "FILE", env = "CALDPO__SECURITY__TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

impl Target {
    /// The coordinator at `url`, with the same token.
    #[must_use]
    pub fn at(self, url: Option<String>) -> Self {
        Self {
            url: url.unwrap_or(self.url),
            ..self
        }
    }
}

/// What the coordinator did not do.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    message: String,
    code: Code,
}

impl Refused {
    /// What a supervisor should make of it.
    pub fn exit_code(&self) -> u8 {
        match self.code {
            Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted => EXIT_TEMPORARY,
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::Unauthenticated => EXIT_USAGE,
            _ => 1,
        }
    }
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self {
            message: status.message().to_owned(),
            code: status.code(),
        }
    }
}

/// A connection to a coordinator.
struct Client {
    runtime: Runtime,
    url: String,
    channel: InterceptedService<Channel, Pass>,
}

impl Client {
    fn connect(target: &Target) -> anyhow::Result<Self> {
        let token = target.token_file.as_deref().map(Token::read).transpose()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the network")?;
        let url = target.url.clone();
        let endpoint = Endpoint::from_shared(url.clone())
            .with_context(|| format!("{url} is not a URL such as http://127.0.0.1:7070"))?
            .connect_timeout(PATIENCE)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE);
        let channel = runtime.block_on(endpoint.connect()).map_err(|error| Refused {
            message: format!(
                "connect to a coordinator at {url}: {}; is it running, and is --coordinator its address?",
                cause(&error)
            ),
            code: Code::Unavailable,
        })?;
        Ok(Self {
            runtime,
            url,
            channel: InterceptedService::new(channel, Pass::new(token.as_ref())),
        })
    }

    fn jobs(&self) -> JobsClient<InterceptedService<Channel, Pass>> {
        JobsClient::new(self.channel.clone())
    }

    fn cluster(&self) -> ClusterClient<InterceptedService<Channel, Pass>> {
        ClusterClient::new(self.channel.clone())
    }

    /// The answer to one call, which may take [`PATIENCE`].
    fn wait<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> anyhow::Result<T> {
        let answer = self
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, call).await });
        let answer = answer.map_err(|_| Refused {
            message: format!(
                "{} did not answer within {} s",
                self.url,
                PATIENCE.as_secs()
            ),
            code: Code::DeadlineExceeded,
        })?;
        Ok(answer.map_err(Refused::from)?.into_inner())
    }
}

fn cause(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// Submits `config`; with `follow` watches the job to its end and returns its exit code.
///
/// # Errors
/// Nobody answers; the coordinator does not take the job.
pub fn submit(
    target: &Target,
    config: &Config,
    key: Option<String>,
    json: bool,
    follow: bool,
) -> anyhow::Result<u8> {
    let client = Client::connect(target)?;
    let request = proto::SubmitRequest {
        config_toml: config.to_job_toml(),
        idempotency_key: key.unwrap_or_default(),
    };
    let answer = client.wait(client.jobs().submit(request))?;
    let job = answer.job.unwrap_or_default();
    if json {
        let mut line = text::job_json(&job);
        line["created"] = answer.created.into();
        print(&line.to_string())?;
    } else {
        let known = if answer.created {
            ""
        } else {
            " (submitted before with the same key)"
        };
        print(&format!("job {}{known} {}", job.name, job.waiting))?;
        if !follow {
            let url = &client.url;
            print(&format!(
                "follow it with: coordinator watch {} --coordinator {url}",
                job.name
            ))?;
        }
    }
    if follow {
        return watch::follow(&client, &job.name, json);
    }
    Ok(0)
}

/// Prints all jobs.
///
/// # Errors
/// Nobody answers.
pub fn jobs(target: &Target, json: bool) -> anyhow::Result<u8> {
    let client = Client::connect(target)?;
    let jobs = client.wait(client.jobs().list(proto::ListRequest {}))?.jobs;
    if json {
        print(&json!({"jobs": jobs.iter().map(text::job_json).collect::<Vec<_>>()}).to_string())?;
    } else {
        print(&text::jobs_table(&jobs))?;
    }
    Ok(0)
}

/// Ends a job.
///
/// # Errors
/// Nobody answers; there is no such job; it has ended.
pub fn cancel(target: &Target, name: &str, reason: &str, json: bool) -> anyhow::Result<u8> {
    let client = Client::connect(target)?;
    let request = proto::CancelRequest {
        job: name.into(),
        reason: reason.into(),
    };
    let job = client
        .wait(client.jobs().cancel(request))?
        .job
        .unwrap_or_default();
    let line = if json {
        text::job_json(&job).to_string()
    } else if watch::has_ended(job.state()) {
        format!("job {} {}", job.name, job.waiting)
    } else {
        format!(
            "job {} commits the step under way, saves, and ends",
            job.name
        )
    };
    print(&line)?;
    Ok(0)
}

/// Keeps a job from running until it is resumed.
///
/// # Errors
/// Nobody answers; there is no such job; it has ended.
pub fn pause(target: &Target, name: &str, reason: &str, json: bool) -> anyhow::Result<u8> {
    let client = Client::connect(target)?;
    let request = proto::PauseRequest {
        job: name.into(),
        reason: reason.into(),
    };
    let paused = client.wait(client.jobs().pause(request))?;
    let job = paused.job.unwrap_or_default();
    let line = if json {
        text::job_json(&job).to_string()
    } else if job.state() == JobState::Paused || watch::has_ended(job.state()) {
        format!("job {} {}", job.name, job.waiting)
    } else {
        format!(
            "job {0} commits the step under way, saves, and stops; go on with: coordinator resume {0}",
            job.name
        )
    };
    print(&line)?;
    Ok(0)
}

/// Lets a paused job run again.
///
/// # Errors
/// Nobody answers; there is no such job; it has ended.
pub fn resume(target: &Target, name: &str, reason: &str, json: bool) -> anyhow::Result<u8> {
    let client = Client::connect(target)?;
    let request = proto::ResumeRequest {
        job: name.into(),
        reason: reason.into(),
    };
    let resumed = client.wait(client.jobs().resume(request))?;
    let job = resumed.job.unwrap_or_default();
    let line = if json {
        text::job_json(&job).to_string()
    } else {
        format!("job {} {}", job.name, job.waiting)
    };
    print(&line)?;
    Ok(0)
}

/// Prints all workers.
///
/// # Errors
/// Nobody answers.
pub fn workers(target: &Target, json: bool) -> anyhow::Result<u8> {
    let client = Client::connect(target)?;
    let request = proto::ListWorkersRequest {};
    let workers = client.wait(client.cluster().list_workers(request))?.workers;
    if json {
        let workers: Vec<_> = workers.iter().map(text::worker_json).collect();
        print(&json!({ "workers": workers }).to_string())?;
    } else {
        print(&text::workers_table(&workers))?;
    }
    Ok(0)
}

/// Lets a worker go.
///
/// # Errors
/// Nobody answers; there is no such worker.
pub fn drain(target: &Target, name: &str, json: bool) -> anyhow::Result<u8> {
    let client = Client::connect(target)?;
    let request = proto::DrainWorkerRequest { name: name.into() };
    let worker = client.wait(client.cluster().drain_worker(request))?.worker;
    let worker = worker.unwrap_or_default();
    let line = if json {
        text::worker_json(&worker).to_string()
    } else if worker.job.is_empty() {
        format!("worker {name} leaves")
    } else {
        let job = &worker.job;
        format!(
            "worker {name} leaves job {job}, which goes on without it, or saves and waits where too few would be left"
        )
    };
    print(&line)?;
    Ok(0)
}

/// Prints how a coordinator, its jobs and its workers fare.
///
/// # Errors
/// Nobody answers.
pub fn status(target: &Target, json: bool) -> anyhow::Result<u8> {
    let client = Client::connect(target)?;
    let request = proto::GetStatusRequest {};
    let status = client.wait(client.cluster().get_status(request))?;
    let line = if json {
        text::status_json(&status).to_string()
    } else {
        text::status(&status, &client.url)
    };
    print(&line)?;
    Ok(0)
}

/// Follows a job to its end and returns its exit code; without a name, the only one that has not ended.
///
/// # Errors
/// Nobody answers; there is no such job; the coordinator is gone.
pub fn watch(target: &Target, name: Option<&str>, json: bool) -> anyhow::Result<u8> {
    watch::follow(&Client::connect(target)?, name.unwrap_or_default(), json)
}

fn print(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("write to standard output")
}
