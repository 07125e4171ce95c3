//! Jobs, workers and status as text for a person and as JSON for a script.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::{ContentArrangement, Table, presets::NOTHING};
use serde_json::{Value, json};
use wire::proto;

use crate::numbers::{duration, plain, signed};
use crate::timestamp::rfc3339;

/// Events that a status shows.
const EVENTS_SHOWN: usize = 5;

/// `training`, `queued`, …
pub(super) fn state(job: &proto::Job) -> String {
    let name = job.state().as_str_name();
    name.trim_start_matches("JOB_STATE_").to_lowercase()
}

/// One screen: what runs, who is late, what is waited for, what happened last.
pub(super) fn status(status: &proto::Status, url: &str) -> String {
    let mut text = format!("coordinator {} at {url}", status.build);
    if status.cluster {
        let idle = status.workers.iter().filter(|it| it.job.is_empty()).count();
        text += &format!(
            ", {} worker{} ({idle} idle)",
            status.workers.len(),
            if status.workers.len() == 1 { "" } else { "s" }
        );
        if !status.waiting.is_empty() {
            text += &format!("\n{}", status.waiting);
        }
    }
    for job in &status.jobs {
        text += &format!("\n\n{}", job_text(job));
    }
    if status.jobs.is_empty() {
        text += "\n\nno jobs; submit one with: coordinator submit CONFIG.toml";
    }
    let idle: Vec<_> = status
        .workers
        .iter()
        .filter(|it| it.job.is_empty())
        .collect();
    if status.cluster && !idle.is_empty() {
        text += "\n\nidle workers";
        for worker in idle {
            text += &format!("\n  {}", worker_line(worker));
        }
    }
    if !status.events.is_empty() {
        text += "\n\nlast events";
        let skip = status.events.len().saturating_sub(EVENTS_SHOWN);
        for event in &status.events[skip..] {
            text += &format!("\n  {}", event_line(event));
        }
    }
    text
}

fn job_text(job: &proto::Job) -> String {
    let total = job
        .steps_total
        .map_or_else(|| "?".into(), |total| total.to_string());
    let mut text = format!("{}  {}", job.name, state(job));
    if job.generation > 0 {
        text += &format!(
            "  step {}/{total}  generation {}",
            job.committed_step, job.generation
        );
    }
    text += &format!("\n  {}", job.waiting);
    if let Some((row, report)) = job
        .last_row
        .as_ref()
        .and_then(|row| Some((row, row.report.as_ref()?)))
    {
        let statistics = report.statistics.unwrap_or_default();
        text += &format!(
            "\n  loss {} · chosen {} · rejected {} · accuracy {:.2} · {:.1} tokens/s",
            plain(statistics.loss.unwrap_or_default()),
            signed(statistics.log_ratios_chosen.unwrap_or_default()),
            signed(statistics.log_ratios_rejected.unwrap_or_default()),
            statistics.rewards_accuracies.unwrap_or_default(),
            row.tokens_per_second
        );
    }
    for worker in &job.workers {
        let rank = worker
            .rank
            .map_or_else(|| "-".into(), |rank| rank.to_string());
        text += &format!(
            "\n  rank {rank}  {}  {}  {}  heard {} ago",
            worker.name,
            worker.address,
            worker.phase,
            seconds(worker.silent_ms)
        );
    }
    text
}

fn worker_line(worker: &proto::Worker) -> String {
    let heard = worker
        .silent_ms
        .map(|ms| format!("  heard {} ago", seconds(ms)));
    format!(
        "{}  {}  {}{}",
        worker.name,
        worker.address,
        worker.device,
        heard.unwrap_or_default()
    )
}

/// `20:15:07 lost: worker b was lost`.
pub(super) fn event_line(event: &proto::Event) -> String {
    let time = rfc3339(UNIX_EPOCH + Duration::from_millis(event.unix_ms));
    format!("{time}  {}: {}", event.kind, event.text)
}

fn seconds(ms: u64) -> String {
    format!("{:.1} s", ms as f64 / 1000.0)
}

/// All jobs, one a line.
pub(super) fn jobs_table(jobs: &[proto::Job]) -> String {
    if jobs.is_empty() {
        return "no jobs".into();
    }
    let mut table = table(&["job", "state", "step", "workers", "submitted", "what"]);
    for job in jobs {
        let step = match (job.committed_step, job.steps_total) {
            (0, None) => "-".into(),
            (step, total) => format!(
                "{step}/{}",
                total.map_or_else(|| "?".into(), |total| total.to_string())
            ),
        };
        let first = job.waiting.lines().next().unwrap_or_default();
        table.add_row([
            job.name.clone(),
            state(job),
            step,
            job.world_size.to_string(),
            ago(job.submitted_unix_ms),
            first.to_owned(),
        ]);
    }
    table.to_string()
}

/// All workers, one a line.
pub(super) fn workers_table(workers: &[proto::Worker]) -> String {
    if workers.is_empty() {
        return "no workers; start one with: worker --coordinator URL".into();
    }
    let mut table = table(&["worker", "address", "device", "job", "heard"]);
    for worker in workers {
        let job = match (worker.job.as_str(), worker.draining) {
            ("", false) => "idle".into(),
            ("", true) => "leaves".into(),
            (job, false) => job.to_owned(),
            (job, true) => format!("{job}, then leaves"),
        };
        let heard = worker
            .silent_ms
            .map_or_else(|| "by its job".into(), |ms| format!("{} ago", seconds(ms)));
        table.add_row([
            worker.name.clone(),
            worker.address.clone(),
            worker.device.clone(),
            job,
            heard,
        ]);
    }
    table.to_string()
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header);
    table
}

fn ago(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return "-".into();
    }
    let then = UNIX_EPOCH + Duration::from_millis(unix_ms);
    let since = SystemTime::now().duration_since(then).unwrap_or_default();
    format!("{} ago", duration(since))
}

/// A status for a script.
pub(super) fn status_json(status: &proto::Status) -> Value {
    json!({
        "build": status.build,
        "cluster": status.cluster,
        "waiting": status.waiting,
        "jobs": status.jobs.iter().map(job_json).collect::<Vec<_>>(),
        "workers": status.workers.iter().map(worker_json).collect::<Vec<_>>(),
        "events": status.events.iter().map(event_json).collect::<Vec<_>>(),
    })
}

/// A job for a script; its last row has the names of `metrics.jsonl`.
pub(super) fn job_json(job: &proto::Job) -> Value {
    let row = job
        .last_row
        .and_then(|row| protocol::MetricsRow::try_from(row).ok());
    let members = job.workers.iter().map(|worker| {
        json!({
            "name": worker.name,
            "incarnation": worker.incarnation,
            "rank": worker.rank,
            "address": worker.address,
            "phase": worker.phase,
            "committed_step": worker.committed_step,
            "silent_ms": worker.silent_ms,
        })
    });
    json!({
        "job": job.name,
        "state": state(job),
        "waiting": job.waiting,
        "objective": job.objective,
        "output": job.output,
        "generation": job.generation,
        "committed_step": job.committed_step,
        "steps_total": job.steps_total,
        "world_size": job.world_size,
        "attempts": job.attempts,
        "submitted_unix_ms": job.submitted_unix_ms,
        "workers": members.collect::<Vec<_>>(),
        "last_row": row,
        "events": job.events.iter().map(event_json).collect::<Vec<_>>(),
    })
}

/// A worker for a script.
pub(super) fn worker_json(worker: &proto::Worker) -> Value {
    json!({
        "name": worker.name,
        "incarnation": worker.incarnation,
        "address": worker.address,
        "device": worker.device,
        "job": (!worker.job.is_empty()).then_some(&worker.job),
        "draining": worker.draining,
        "silent_ms": worker.silent_ms,
    })
}

/// An event for a script.
pub(super) fn event_json(event: &proto::Event) -> Value {
    let time = rfc3339(UNIX_EPOCH + Duration::from_millis(event.unix_ms));
    json!({"time": time, "kind": event.kind, "text": event.text})
}
