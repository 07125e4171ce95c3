//! What was measured, as a table for people and as JSON.

use std::fmt::Write;
use std::time::Duration;

use anyhow::ensure;
use serde::Serialize;

use crate::coordinator::Load;

/// Times in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Latency {
    pub(crate) count: usize,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
}

impl Latency {
    /// # Errors
    /// None was measured.
    pub(crate) fn of(mut times: Vec<Duration>) -> anyhow::Result<Self> {
        ensure!(!times.is_empty(), "nothing was answered");
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Ok(Self {
            count: times.len(),
            p50_ms: ms(at(0.5)),
            p99_ms: ms(at(0.99)),
            max_ms: ms(at(1.0)),
        })
    }
}

/// Questions of clients.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Queries {
    pub(crate) statuses_per_second: f64,
    pub(crate) jobs_per_second: f64,
    /// `Cluster.GetStatus`.
    pub(crate) status: Latency,
    /// `Jobs.Get`.
    pub(crate) job: Latency,
}

/// Some time with all sessions open.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Window {
    /// From a beat to its answer.
    pub(crate) beats: Latency,
    pub(crate) steps_per_second: f64,
    pub(crate) load: Load,
    pub(crate) queries: Queries,
}

/// From an event until all workers have the Form of the next generation, and its Go.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Formation {
    pub(crate) workers: usize,
    pub(crate) generation: u64,
    pub(crate) form_ms: f64,
    pub(crate) go_ms: f64,
    /// What the coordinator computed from the event to Go, or a little longer.
    pub(crate) cpu_seconds: f64,
}

/// Workers that came and went.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Churn {
    pub(crate) workers: usize,
    pub(crate) seconds: f64,
    /// Memory after a fifth of them, and after all.
    pub(crate) resident_before_mib: f64,
    pub(crate) resident_after_mib: f64,
    pub(crate) open_files: usize,
}

/// How often the coordinator noted a worker as late, which costs nothing, though none was: it heard them late.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Late {
    pub(crate) first_formation: usize,
    /// While they beat and stepped.
    pub(crate) beating: usize,
    pub(crate) second_formation: usize,
}

/// Everything.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) workers: usize,
    pub(crate) workers_per_connection: usize,
    /// Before the first worker.
    pub(crate) empty: Load,
    /// Until all sessions are open.
    pub(crate) connect_seconds: f64,
    /// With all sessions open, before the first Join.
    pub(crate) connected: Load,
    /// From the last Join.
    pub(crate) first: Formation,
    pub(crate) formed: Load,
    /// No votes: heartbeats and questions.
    pub(crate) idle: Window,
    /// Step after step.
    pub(crate) stepping: Window,
    /// Questions without a pause.
    pub(crate) asked: Queries,
    /// From the loss of some.
    pub(crate) second: Option<Formation>,
    pub(crate) killed: usize,
    pub(crate) churn: Option<Churn>,
    /// Most memory of the coordinator.
    pub(crate) peak_mib: f64,
    pub(crate) late: Late,
    /// What should not have been; none of it in a good run.
    pub(crate) wrong: Vec<String>,
}

impl Report {
    /// As a table in Markdown.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let mut row = |what: &str, value: String| {
            // A string takes everything.
            let _ = writeln!(text, "| {what} | {value} |");
        };
        row("measured", "value".into());
        row("---", "---".into());
        let (all, each) = (self.workers, self.workers_per_connection);
        row("sessions (workers a connection)", format!("{all} ({each})"));
        row(
            "all connected after",
            format!("{:.2} s", self.connect_seconds),
        );
        row("from the last Join to Form / Go", formation(&self.first));
        for (name, it) in [("idle", &self.idle), ("stepping", &self.stepping)] {
            row(
                &format!("{name}: Beat to Heard p50 / p99 / max"),
                latency(&it.beats),
            );
            if it.steps_per_second > 0.0 {
                row(
                    &format!("{name}: steps a second"),
                    format!("{:.1}", it.steps_per_second),
                );
            }
            let load = &it.load;
            row(
                &format!("{name}: coordinator"),
                format!(
                    "{:.2} cores, {:.0} MiB, {} open files",
                    load.cores, load.resident_mib, load.open_files
                ),
            );
            row(&format!("{name}: GetStatus"), latency(&it.queries.status));
            row(&format!("{name}: Jobs.Get"), latency(&it.queries.job));
        }
        let asked = &self.asked;
        row(
            "questions without a pause: GetStatus + Jobs.Get a second",
            format!(
                "{:.0} + {:.0}",
                asked.statuses_per_second, asked.jobs_per_second
            ),
        );
        if let Some(second) = &self.second {
            let what = format!("{} killed at once: to Form / Go of the others", self.killed);
            row(&what, formation(second));
        }
        if let Some(churn) = &self.churn {
            row(
                &format!("{} workers that came and went", churn.workers),
                format!(
                    "{:.1} s, {:.0} -> {:.0} MiB, {} open files",
                    churn.seconds,
                    churn.resident_before_mib,
                    churn.resident_after_mib,
                    churn.open_files
                ),
            );
        }
        row(
            "memory: empty / connected / formed / peak",
            format!(
                "{:.0} / {:.0} / {:.0} / {:.0} MiB",
                self.empty.resident_mib,
                self.connected.resident_mib,
                self.formed.resident_mib,
                self.peak_mib
            ),
        );
        let late = &self.late;
        row(
            "noted as late while forming / beating and stepping / forming again",
            format!(
                "{} / {} / {}",
                late.first_formation, late.beating, late.second_formation
            ),
        );
        text
    }
}

fn latency(it: &Latency) -> String {
    format!(
        "{:.1} / {:.1} / {:.1} ms ({})",
        it.p50_ms, it.p99_ms, it.max_ms, it.count
    )
}

fn formation(it: &Formation) -> String {
    format!(
        "{:.2} / {:.2} s, {:.1} s of its CPU",
        it.form_ms / 1000.0,
        it.go_ms / 1000.0,
        it.cpu_seconds
    )
}
