//! `coordinator watch`: a job's events on the screen of whoever follows it, as its own coordinator would show them.
//!
//! On a terminal a live bar, elsewhere lines, with `--json` one object an event. Leaving the watch does not touch the job.

use std::time::Instant;

use anyhow::Context;
use protocol::{EvaluationRow, MetricsRow};
use serde_json::{Value, json};
use tonic::Code;
use wire::proto;
use wire::proto::JobState;
use wire::proto::job_event::Event as Kind;

use super::{Client, Refused, print, text};
use crate::numbers::counted;
use crate::objective::kind_has_rewards;
use crate::run::{EXIT_CANCELLED, EXIT_DONE, EXIT_FAILED, EXIT_TEMPORARY};
use crate::ui::Console;

/// Follows the job called `name` to its end; the exit code tells how it ended.
pub(super) fn follow(client: &Client, name: &str, json: bool) -> anyhow::Result<u8> {
    let request = proto::WatchRequest { job: name.into() };
    let mut events = client.wait(client.jobs().watch(request))?;
    let mut screen = if json {
        Screen::Json
    } else {
        Screen::Person {
            console: Console::stderr(),
            steps_total: 0,
            state: None,
        }
    };
    let mut last = None;
    loop {
        let event = client.runtime.block_on(events.message());
        let event = event.map_err(|status| Refused {
            message: format!(
                "the coordinator is gone ({}); the job may go on: ask again with `coordinator status`",
                status.message()
            ),
            code: Code::Unavailable,
        });
        let Some(event) = event?.and_then(|it| it.event) else {
            break;
        };
        screen.show(&event)?;
        if let Kind::Job(job) = event {
            let ended = exit_code(job.state());
            last = Some(job);
            if ended.is_some() {
                break;
            }
        }
    }
    screen.finish();
    let job = last.context("the coordinator said nothing about the job")?;
    let code = exit_code(job.state()).unwrap_or(EXIT_TEMPORARY);
    if !json {
        print(&format!("job {} {}", job.name, job.waiting))?;
        if !job.output.is_empty() {
            print(&format!(
                "its run directory, seen from the coordinator: {}",
                job.output
            ))?;
        }
    }
    Ok(code)
}

/// The exit code of a watch whose job is in this state; `None` while it goes on.
fn exit_code(state: JobState) -> Option<u8> {
    match state {
        JobState::Completed => Some(EXIT_DONE),
        JobState::Failed => Some(EXIT_FAILED),
        JobState::Cancelled | JobState::Interrupted => Some(EXIT_CANCELLED),
        _ => None,
    }
}

/// Whether nothing more happens to a job in this state.
pub(super) fn has_ended(state: JobState) -> bool {
    exit_code(state).is_some()
}

enum Screen {
    Json,
    Person {
        console: Console,
        steps_total: u64,
        state: Option<JobState>,
    },
}

impl Screen {
    fn show(&mut self, event: &Kind) -> anyhow::Result<()> {
        let now = Instant::now();
        let Self::Person {
            console,
            steps_total,
            state,
        } = self
        else {
            return print(&as_json(event)?.to_string());
        };
        match event {
            Kind::Job(job) => {
                console.with_rewards(kind_has_rewards(&job.objective));
                *steps_total = job.steps_total.unwrap_or(*steps_total);
                let first = state.is_none();
                if state.replace(job.state()) != Some(job.state()) {
                    console.say(&format!(
                        "{}: {}, {}",
                        job.name,
                        text::state(job),
                        job.waiting
                    ));
                }
                if first {
                    for event in &job.events {
                        console.say(&text::event_line(event));
                    }
                    if let Some(row) = job.last_row {
                        console.step(now, &MetricsRow::try_from(row)?, *steps_total);
                    }
                }
            }
            Kind::Step(row) => console.step(now, &MetricsRow::try_from(*row)?, *steps_total),
            Kind::Evaluation(row) => console.evaluation(&EvaluationRow::try_from(*row)?),
            Kind::Note(note) => console.say(&text::event_line(note)),
            Kind::Progress(it) => console.phase(now, it.rank, &it.phase, it.done, it.total),
            Kind::DataReport(report) => console.say(&report.text),
            Kind::Missed(missed) => {
                console.say(&format!(
                    "left out, since this screen is too slow: {}",
                    counted(*missed, "event")
                ));
            }
        }
        Ok(())
    }

    fn finish(&mut self) {
        if let Self::Person { console, .. } = self {
            console.finish(Instant::now());
        }
    }
}

fn as_json(event: &Kind) -> anyhow::Result<Value> {
    Ok(match event {
        Kind::Job(job) => json!({"event": "job", "job": text::job_json(job)}),
        Kind::Step(row) => json!({"event": "step", "row": MetricsRow::try_from(*row)?}),
        Kind::Evaluation(row) => {
            json!({"event": "evaluation", "row": EvaluationRow::try_from(*row)?})
        }
        Kind::Note(note) => json!({"event": "note", "note": text::event_json(note)}),
        Kind::Progress(it) => json!({
            "event": "progress", "rank": it.rank, "phase": it.phase, "done": it.done, "total": it.total,
        }),
        Kind::DataReport(report) => json!({"event": "data_report", "text": report.text}),
        Kind::Missed(missed) => json!({"event": "missed", "count": missed}),
    })
}
