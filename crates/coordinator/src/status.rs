//! Asks a running coordinator how it fares.

use std::time::Duration;

use anyhow::Context;
use serde_json::json;
use tonic::transport::Endpoint;
use wire::proto;
use wire::proto::cluster_client::ClusterClient;

const PATIENCE: Duration = Duration::from_secs(5);

/// Prints the status of the coordinator at `url`, for a person or as one JSON object.
///
/// # Errors
/// Nobody answers there.
pub fn print_status(url: &str, json: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the network")?;
    let status = runtime.block_on(ask(url))?;
    if json {
        println!("{}", as_json(&status));
    } else {
        println!("{}", as_text(&status));
    }
    Ok(())
}

async fn ask(url: &str) -> anyhow::Result<proto::Status> {
    let endpoint = Endpoint::from_shared(url.to_owned())
        .with_context(|| format!("{url} is not a URL such as http://127.0.0.1:7070"))?
        .connect_timeout(PATIENCE)
        .timeout(PATIENCE);
    let channel = endpoint
        .connect()
        .await
        .with_context(|| format!("connect to a coordinator at {url}"))?;
    let answer = ClusterClient::new(channel)
        .get_status(proto::GetStatusRequest {})
        .await
        .context("ask for the status")?;
    Ok(answer.into_inner())
}

fn state(status: &proto::Status) -> String {
    let name = status.state().as_str_name();
    name.trim_start_matches("JOB_STATE_").to_lowercase()
}

fn as_text(status: &proto::Status) -> String {
    let total = status
        .steps_total
        .map_or_else(|| "?".into(), |total| total.to_string());
    let mut text = format!(
        "{}  {}  step {}/{total}  generation {}\n{}",
        status.job,
        state(status),
        status.committed_step,
        status.generation,
        status.waiting
    );
    for worker in &status.workers {
        let rank = worker
            .rank
            .map_or_else(|| "-".into(), |rank| rank.to_string());
        text = format!(
            "{text}\n  rank {rank}  {}  {}  heard {:.1} s ago",
            worker.address,
            worker.phase,
            f64::from(u32::try_from(worker.silent_ms).unwrap_or(u32::MAX)) / 1000.0
        );
    }
    text
}

fn as_json(status: &proto::Status) -> serde_json::Value {
    let workers: Vec<_> = status
        .workers
        .iter()
        .map(|worker| {
            json!({
                "incarnation": worker.incarnation,
                "rank": worker.rank,
                "address": worker.address,
                "phase": worker.phase,
                "committed_step": worker.committed_step,
                "silent_ms": worker.silent_ms,
            })
        })
        .collect();
    json!({
        "job": status.job,
        "state": state(status),
        "waiting": status.waiting,
        "generation": status.generation,
        "committed_step": status.committed_step,
        "steps_total": status.steps_total,
        "world_size": status.world_size,
        "build": status.build,
        "workers": workers,
    })
}
