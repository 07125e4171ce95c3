//! Jobs, workers and status as text for a person and as JSON for a script.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::{ContentArrangement, Table, presets::NOTHING};
use serde_json::{Value, json};
use wire::proto;

use super::watch::has_ended;
use crate::numbers::{counted, duration, grouped, plain, signed};
use crate::objective::kind_has_rewards;
use crate::phases;
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
    let idle: Vec<_> = status
        .workers
        .iter()
        .filter(|it| it.job.is_empty())
        .collect();
    let mut lines = vec![format!("coordinator {} at {url}", status.build)];
    if status.cluster {
        let all = counted(status.workers.len() as u64, "worker");
        lines.push(format!("{all}, {} idle", idle.len()));
        lines.extend((!status.waiting.is_empty()).then(|| status.waiting.clone()));
    }
    for job in &status.jobs {
        lines.push(String::new());
        lines.extend(job_lines(job));
        // What happens in a coordinator's only job is all that happens there.
        if status.cluster && !has_ended(job.state()) {
            lines.extend(event_lines("  ", "last events of the job", &job.events));
        }
    }
    if status.jobs.is_empty() {
        lines.push("\nno jobs; submit one with: coordinator submit CONFIG.toml".into());
    }
    if status.cluster && !idle.is_empty() {
        lines.push("\nidle workers".into());
        lines.extend(idle.into_iter().map(|it| format!("  {}", worker_line(it))));
    }
    let title = if status.cluster {
        "\nlast events of the service"
    } else {
        "\nlast events"
    };
    lines.extend(event_lines("", title, &status.events));
    lines.join("\n")
}

/// The last of `events` below their title; nothing where there are none.
fn event_lines(indent: &str, title: &str, events: &[proto::Event]) -> Vec<String> {
    let skip = events.len().saturating_sub(EVENTS_SHOWN);
    let last = events.iter().skip(skip);
    let title = (!events.is_empty()).then(|| format!("{indent}{title}"));
    title
        .into_iter()
        .chain(last.map(|it| format!("{indent}  {}", event_line(it))))
        .collect()
}

fn job_lines(job: &proto::Job) -> Vec<String> {
    let total = job
        .steps_total
        .map_or_else(|| "?".into(), |total| total.to_string());
    let mut first = format!("{}  {}", job.name, state(job));
    if job.priority != 0 {
        first = format!("{first}  priority {}", job.priority);
    }
    if job.generation > 0 {
        let (step, generation) = (job.committed_step, job.generation);
        first = format!("{first}  step {step}/{total}  generation {generation}");
    } else if job.committed_step > 0 {
        first = format!("{first}  step {}/{total}", job.committed_step);
    }
    let mut lines = vec![first, format!("  {}", job.waiting)];
    if let Some(row) = job
        .last_row
        .and_then(|row| protocol::MetricsRow::try_from(row).ok())
    {
        let statistics = row.report.statistics;
        let mut rewards = String::new();
        if kind_has_rewards(&job.objective) {
            rewards = format!(
                " · chosen {} · rejected {} · accuracy {:.2}",
                signed(statistics.log_ratios_chosen),
                signed(statistics.log_ratios_rejected),
                statistics.rewards_accuracies
            );
        }
        lines.push(format!(
            "  loss {}{rewards} · {} tokens/s",
            plain(statistics.loss),
            grouped(row.tokens_per_second.round() as u64)
        ));
        let phases = phases::text(&row.phases);
        lines.extend(phases.map(|text| format!("  time by phase: {text}")));
    }
    lines.extend(job.workers.iter().map(|worker| {
        let rank = worker
            .rank
            .map_or_else(|| "-".into(), |rank| rank.to_string());
        let place = if worker.spare {
            "spare".into()
        } else {
            format!("rank {rank}")
        };
        let late = match worker.liveness() {
            proto::Liveness::Unspecified => "",
            proto::Liveness::Late => ", late",
            proto::Liveness::Lost => ", lost",
        };
        format!(
            "  {place}  {}  {}  {}  heard {} ago{late}",
            worker.name,
            worker.address,
            worker.phase,
            seconds(worker.silent_ms)
        )
    }));
    lines
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
    // A column that says something.
    let ranked = jobs.iter().any(|job| job.priority != 0);
    let mut header = vec!["job", "state", "step", "workers", "submitted", "what"];
    if ranked {
        header.insert(2, "priority");
    }
    let mut table = table(&header);
    for job in jobs {
        let step = match (job.committed_step, job.steps_total) {
            (0, None) => "-".into(),
            (step, None) => step.to_string(),
            (step, Some(total)) => format!("{step}/{total}"),
        };
        let first = job.waiting.lines().next().unwrap_or_default();
        let mut row = vec![
            job.name.clone(),
            state(job),
            step,
            job.world_size.to_string(),
            ago(job.submitted_unix_ms),
            first.to_owned(),
        ];
        if ranked {
            row.insert(2, job.priority.to_string());
        }
        table.add_row(row);
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
            "late": worker.liveness() != proto::Liveness::Unspecified,
            "spare": worker.spare,
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
        "priority": job.priority,
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

#[cfg(test)]
mod tests {
    use protocol::{MetricsRow, Phases, StepReport};

    use super::*;

    #[test]
    fn a_priority_is_shown_where_it_is_not_0() {
        let job = |name: &str, priority| proto::Job {
            name: name.into(),
            priority,
            ..proto::Job::default()
        };
        let shown = |job: &proto::Job| job_lines(job)[0].contains("priority -7");
        assert!(shown(&job("a", -7)) && !shown(&job("a", 0)));
        let plain = jobs_table(&[job("a", 0), job("b", 0)]);
        assert!(!plain.contains("priority"), "{plain}");
        let ranked = jobs_table(&[job("a", 0), job("b", -7)]);
        let columns = |line: Option<&str>| {
            let words = line.unwrap_or_default().split_whitespace().take(3);
            words.map(str::to_owned).collect::<Vec<_>>()
        };
        let mut lines = ranked.lines();
        assert_eq!(columns(lines.next()), ["job", "state", "priority"]);
        assert_eq!(columns(lines.nth(1)), ["b", "unspecified", "-7"]);
    }

    #[test]
    fn a_status_tells_where_the_time_of_the_last_step_went_if_it_was_measured() {
        let lines = |phases: Phases| {
            let report = StepReport {
                step: 3,
                ..StepReport::default()
            };
            let row = MetricsRow {
                report,
                phases,
                ..MetricsRow::default()
            };
            let job = proto::Job {
                last_row: Some(row.into()),
                ..proto::Job::default()
            };
            job_lines(&job)
        };
        let measured = Phases {
            forward: 1.0,
            backward: 3.0,
            ..Phases::default()
        };
        let line = "  time by phase: forward 25 %, backward 75 %";
        assert_eq!(lines(measured).last().map(String::as_str), Some(line));
        assert_eq!(lines(measured).len(), lines(Phases::default()).len() + 1);
    }
}
