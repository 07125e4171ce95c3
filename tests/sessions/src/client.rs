//! Clients beside the load: they ask how things are, and time the answers.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tonic::transport::Channel;
use wire::proto;
use wire::proto::cluster_client::ClusterClient;
use wire::proto::jobs_client::JobsClient;

use crate::report::{Latency, Queries};

/// A status of thousands of workers is larger than a client's usual limit may be.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Asks for everything, and for one job.
#[derive(Clone)]
pub(crate) struct Client {
    cluster: ClusterClient<Channel>,
    jobs: JobsClient<Channel>,
    job: String,
}

impl Client {
    pub(crate) fn new(channel: Channel, job: &str) -> Self {
        Self {
            cluster: ClusterClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
            jobs: JobsClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
            job: job.to_owned(),
        }
    }

    pub(crate) async fn submit(&mut self, config_toml: String) -> anyhow::Result<()> {
        let request = proto::SubmitRequest {
            config_toml,
            idempotency_key: String::new(),
        };
        self.jobs.submit(request).await.context("submit a job")?;
        Ok(())
    }

    /// The job as its driver sees it.
    pub(crate) async fn job(&mut self) -> anyhow::Result<proto::Job> {
        let request = proto::GetRequest {
            job: self.job.clone(),
        };
        let job = self.jobs.get(request).await.context("ask for the job")?;
        Ok(job.into_inner())
    }

    /// Everything; the number of workers that the coordinator counts.
    async fn status(&mut self) -> anyhow::Result<usize> {
        let status = self.cluster.get_status(proto::GetStatusRequest {}).await;
        let status = status.context("ask for the status")?.into_inner();
        let job = status.jobs.iter().find(|it| it.name == self.job);
        let members = job.map_or(0, |it| it.workers.len());
        ensure!(
            members > 0,
            "the status has the job without its workers: its driver did not answer in time"
        );
        Ok(status.workers.len())
    }

    /// Asks for `duration`, one question after the other of each kind, both kinds at once, with a `pause` between.
    pub(crate) async fn ask_for(
        &self,
        duration: Duration,
        pause: Duration,
    ) -> anyhow::Result<Queries> {
        let (mut statuses, mut jobs) = (self.clone(), self.clone());
        let statuses = async {
            let mut times = Vec::new();
            let start = Instant::now();
            while start.elapsed() < duration {
                let asked = Instant::now();
                statuses.status().await?;
                times.push(asked.elapsed());
                tokio::time::sleep(pause).await;
            }
            anyhow::Ok((times, start.elapsed()))
        };
        let jobs = async {
            let mut times = Vec::new();
            let start = Instant::now();
            while start.elapsed() < duration {
                let asked = Instant::now();
                let job = jobs.job().await?;
                times.push(asked.elapsed());
                ensure!(
                    !job.workers.is_empty(),
                    "the job has no workers: its driver did not answer in time"
                );
                tokio::time::sleep(pause).await;
            }
            anyhow::Ok((times, start.elapsed()))
        };
        let (statuses, jobs) = tokio::try_join!(statuses, jobs)?;
        let per_second =
            |(times, took): &(Vec<Duration>, Duration)| times.len() as f64 / took.as_secs_f64();
        Ok(Queries {
            statuses_per_second: per_second(&statuses),
            jobs_per_second: per_second(&jobs),
            status: Latency::of(statuses.0)?,
            job: Latency::of(jobs.0)?,
        })
    }
}
