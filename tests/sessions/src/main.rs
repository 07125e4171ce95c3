//! Loads one `coordinator --cluster` with thousands of worker sessions over gRPC on loopback, and measures it.
//!
//! ```text
//! sessions --coordinator target/release/coordinator [--workers 2000] [--seconds 30] [--kill 100] [--churn 10000] [--json]
//! ```
//! The sessions speak what the worker program speaks (`worker`) and train nothing; each has a connection of its own, as in a
//! deployment. They join, form a generation, beat without a step for `--seconds`, then step as fast as the coordinator commits
//! for as long; some are killed at once, and short-lived workers come and go. It exits with 1 if a session that was not killed
//! is lost, or anything else is not as it should be.

mod board;
mod client;
mod coordinator;
mod report;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use protocol::{Afterwards, Awaits, CoordinatorMessage, Incarnation, Step, WorkerMessage};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use board::Board;
use client::Client;
use coordinator::{Coordinator, events};
use report::{Churn, Formation, Late, Latency, Report, Window};
use worker::{Orders, Session, Worker};

/// The job's name.
const JOB: &str = "load";

/// Connections that are opened at a time: more than a listener's backlog would be tried again after a second.
const CONNECTING_MAX: usize = 256;

/// Short-lived workers at a time.
const CHURNING_MAX: usize = 64;

/// Files that are open beside the workers' connections.
const OTHER_FILES: u64 = 200;

/// Loads a coordinator with worker sessions, and measures it.
#[derive(Debug, Parser)]
struct Arguments {
    /// The coordinator program.
    #[arg(long, value_name = "PROGRAM")]
    coordinator: PathBuf,
    /// Worker sessions.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    workers: u32,
    /// Sessions that share a connection; deployments have one each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    workers_per_connection: u32,
    /// How long heartbeats are measured, once without steps and once with.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Pause between two questions of a client while that is measured, in milliseconds.
    #[arg(long, default_value_t = 200)]
    ask_every_ms: u64,
    /// Sessions that are killed at once, no two of them neighbours; 0 for none.
    #[arg(long, default_value_t = 100)]
    kill: u32,
    /// Short-lived workers that come and go; 0 for none.
    #[arg(long, default_value_t = 10_000)]
    churn: u32,
    /// Fail when the 99th percentile of Beat to Heard is above this, in milliseconds.
    #[arg(long, value_name = "MILLISECONDS")]
    latency_max: Option<f64>,
    /// Fail when the coordinator's memory grows by more while workers come and go, in MiB.
    #[arg(long, default_value_t = 16.0, value_name = "MIB")]
    growth_max: f64,
    /// How long any one thing may take, in seconds.
    #[arg(long, default_value_t = 120)]
    patience: u64,
    /// Print one JSON object, no table.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(report) => {
            if arguments.json {
                let json = serde_json::to_string(&report).expect("a report has strings for keys");
                println!("{json}");
            } else {
                print!("{}", report.table());
            }
            for wrong in report.wrong.iter().take(20) {
                eprintln!("wrong: {wrong}");
            }
            ExitCode::from(u8::from(!report.wrong.is_empty()))
        }
        Err(error) => {
            eprintln!("wrong: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let (workers, kill) = (arguments.workers as usize, arguments.kill as usize);
    ensure!(
        2 * kill <= workers,
        "--kill {kill}: at most half of --workers {workers}, so that no two of them are neighbours"
    );
    open_files(u64::from(arguments.workers) + OTHER_FILES)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the network threads")?;
    let report = runtime.block_on(measure(arguments));
    // Sessions end with their coordinator, whatever they do.
    runtime.shutdown_background();
    report
}

/// Raises this process's limit of open files, which the coordinator inherits: each session is a file on either side.
fn open_files(wanted: u64) -> anyhow::Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|it| it >= wanted) {
        return Ok(());
    }
    ensure!(
        limit.maximum.is_none_or(|it| it >= wanted),
        "{wanted} files must be open at once, the limit is {:?}: raise it with `ulimit -Hn {wanted}` as root, or share \
         connections with --workers-per-connection",
        limit.maximum
    );
    limit.current = Some(wanted);
    setrlimit(Resource::Nofile, limit).context("raise the limit of open files")
}

/// Everything that a run needs.
struct Bench<'a> {
    arguments: &'a Arguments,
    coordinator: Coordinator,
    board: Arc<Board>,
    orders: watch::Sender<Orders>,
    workers: Vec<JoinHandle<()>>,
    client: Client,
}

async fn measure(arguments: &Arguments) -> anyhow::Result<Report> {
    let coordinator = Coordinator::start(&arguments.coordinator).await?;
    let usage = coordinator.usage()?;
    let empty = coordinator.load_since(usage)?;
    let mut client = Client::new(coordinator.connect().await?, JOB);
    let output = coordinator.folder().join(JOB);
    let config = config(&output.display().to_string(), arguments.workers);
    client.submit(config).await?;
    let mut bench = Bench {
        arguments,
        coordinator,
        board: Arc::default(),
        orders: watch::Sender::default(),
        workers: Vec::new(),
        client,
    };
    let say = |what: &str| eprintln!("{what}");
    say("connecting");
    let connecting = Instant::now();
    let patience = bench.patience();
    let connected = tokio::time::timeout(patience, bench.connect()).await;
    connected.context("not all sessions could be opened in time")??;
    let connect_seconds = connecting.elapsed().as_secs_f64();
    let connected = bench.coordinator.load_since(usage)?;
    say("joining");
    let first = bench.join().await?;
    let formed = bench.coordinator.load_since(usage)?;
    let late_at_first = events(&output, "late")?;
    say("idle");
    let idle = bench.window().await?;
    say("stepping");
    bench.orders.send_modify(|it| it.step = true);
    let stepping = bench.window().await?;
    say("asking");
    bench.orders.send_modify(|it| it.step = false);
    let duration = Duration::from_secs(arguments.seconds.min(5));
    let asked = bench.client.ask_for(duration, Duration::ZERO).await?;
    say("killing");
    let late_so_far = events(&output, "late")?;
    let killed = arguments.kill as usize;
    let second = match killed {
        0 => None,
        _ => Some(bench.kill(first.generation).await?),
    };
    bench.coordinator.check()?;
    let lost = events(&output, "lost")?;
    let late_in_all = events(&output, "late")?;
    say("churning");
    let churn = match arguments.churn {
        0 => None,
        count => Some(bench.churn(count as usize).await?),
    };
    bench.coordinator.check()?;
    let load = bench.coordinator.load_since(usage)?;
    let job = bench.client.job().await?;
    let mut wrong = std::mem::take(&mut bench.board.notes().wrong);
    let mut check = |holds: bool, what: String| {
        if !holds {
            wrong.push(what);
        }
    };
    check(
        lost == killed,
        format!("the coordinator lost {lost} workers, {killed} were killed"),
    );
    let world = arguments.workers as usize - killed;
    check(
        job.world_size as usize == world,
        format!(
            "at the end the world has {} workers, not {world}",
            job.world_size
        ),
    );
    check(
        stepping.steps_per_second > 0.0,
        "no step was committed".into(),
    );
    for (name, window) in [("idle", &idle), ("stepping", &stepping)] {
        let p99_ms = window.beats.p99_ms;
        check(
            arguments.latency_max.is_none_or(|most| p99_ms <= most),
            format!("{name}: the 99th percentile of Beat to Heard is {p99_ms:.1} ms"),
        );
    }
    if let Some(churn) = &churn {
        let growth = churn.resident_after_mib - churn.resident_before_mib;
        check(
            growth <= arguments.growth_max,
            format!(
                "memory grew by {growth:.0} MiB while {} workers came and went",
                churn.workers
            ),
        );
    }
    Ok(Report {
        workers: arguments.workers as usize,
        workers_per_connection: arguments.workers_per_connection as usize,
        empty,
        connect_seconds,
        connected,
        first,
        formed,
        idle,
        stepping,
        asked,
        second,
        killed,
        churn,
        peak_mib: load.peak_mib,
        late: Late {
            first_formation: late_at_first,
            beating: late_so_far - late_at_first,
            second_formation: late_in_all - late_so_far,
        },
        wrong,
    })
}

impl Bench<'_> {
    fn patience(&self) -> Duration {
        Duration::from_secs(self.arguments.patience)
    }

    /// Opens all sessions; none has spoken yet.
    async fn connect(&mut self) -> anyhow::Result<()> {
        let (count, each) = (
            self.arguments.workers as usize,
            self.arguments.workers_per_connection as usize,
        );
        let permits = Arc::new(Semaphore::new(CONNECTING_MAX));
        let mut opening = JoinSet::new();
        for first in (0..count).step_by(each) {
            let (permits, url) = (Arc::clone(&permits), self.coordinator.url.clone());
            opening.spawn(async move {
                let _permit = permits.acquire().await?;
                let channel = worker::connect(&url).await?;
                let mut sessions = Vec::new();
                for number in first..count.min(first + each) {
                    sessions.push((number, Session::open(channel.clone()).await?));
                }
                anyhow::Ok(sessions)
            });
        }
        let mut sessions = Vec::new();
        while let Some(opened) = opening.join_next().await {
            sessions.extend(opened??);
        }
        sessions.sort_by_key(|(number, _)| *number);
        for (number, session) in sessions {
            let (board, orders) = (Arc::clone(&self.board), self.orders.subscribe());
            let spread = number as f64 / count as f64;
            self.workers.push(tokio::spawn(async move {
                let run = Worker::run(number, spread, session, Arc::clone(&board), orders);
                let Err(error) = run.await else { return };
                board.wrong(format!("worker {number}: {error:#}"));
            }));
        }
        Ok(())
    }

    async fn join(&self) -> anyhow::Result<Formation> {
        let usage = self.coordinator.usage()?;
        self.orders.send_modify(|it| it.join = true);
        let world = self.workers.len();
        let reached = self.board.generation(1, world, self.patience()).await?;
        let (generation, formed, gone) = reached;
        let cpu_seconds = self.coordinator.usage()?.cpu_seconds - usage.cpu_seconds;
        let joined = self.board.notes().joined.context("nobody joined")?;
        let ms = |at: Instant| at.saturating_duration_since(joined).as_secs_f64() * 1000.0;
        Ok(Formation {
            workers: world,
            generation,
            form_ms: ms(formed.at),
            go_ms: ms(gone.at),
            cpu_seconds,
        })
    }

    /// Measures heartbeats, steps and questions for a while.
    async fn window(&mut self) -> anyhow::Result<Window> {
        let duration = Duration::from_secs(self.arguments.seconds);
        let pause = Duration::from_millis(self.arguments.ask_every_ms);
        drop(self.board.take_beats());
        let committed = || self.board.notes().committed;
        let (usage, before, start) = (self.coordinator.usage()?, committed(), Instant::now());
        let queries = self.client.ask_for(duration, pause).await?;
        let steps_per_second = (committed() - before) as f64 / start.elapsed().as_secs_f64();
        let load = self.coordinator.load_since(usage)?;
        self.coordinator.check()?;
        Ok(Window {
            beats: Latency::of(self.board.take_beats())?,
            steps_per_second,
            load,
            queries,
        })
    }

    /// Drops the connections of some, while the others step.
    async fn kill(&mut self, generation: u64) -> anyhow::Result<Formation> {
        self.orders.send_modify(|it| it.step = true);
        let (count, killed) = (self.workers.len(), self.arguments.kill as usize);
        let dying: Vec<&JoinHandle<()>> = (0..killed)
            .map(|it| &self.workers[it * count / killed])
            .collect();
        let (usage, start) = (self.coordinator.usage()?, Instant::now());
        for worker in dying {
            worker.abort();
        }
        let world = count - killed;
        let reached = self
            .board
            .generation(generation + 1, world, self.patience());
        let (generation, formed, gone) = reached.await?;
        let cpu_seconds = self.coordinator.usage()?.cpu_seconds - usage.cpu_seconds;
        self.orders.send_modify(|it| it.step = false);
        let ms = |at: Instant| at.saturating_duration_since(start).as_secs_f64() * 1000.0;
        Ok(Formation {
            workers: world,
            generation,
            form_ms: ms(formed.at),
            go_ms: ms(gone.at),
            cpu_seconds,
        })
    }

    /// Workers come and go: every other one says so, the rest close their connections.
    async fn churn(&self, count: usize) -> anyhow::Result<Churn> {
        let usage = self.coordinator.usage()?;
        let start = Instant::now();
        let mut before = None;
        let mut churning = JoinSet::new();
        for number in 0..count {
            if churning.len() == CHURNING_MAX {
                churning.join_next().await.context("churn")???;
            }
            if number == count / 5 {
                before = Some(self.coordinator.load_since(usage)?);
            }
            let channel_url = self.coordinator.url.clone();
            let patience = self.patience();
            churning.spawn(async move {
                let visit = visit(&channel_url, number);
                let visited = tokio::time::timeout(patience, visit).await;
                visited
                    .context("a short-lived worker is not answered")?
                    .with_context(|| format!("short-lived worker {number}"))
            });
        }
        while let Some(visited) = churning.join_next().await {
            visited??;
        }
        let seconds = start.elapsed().as_secs_f64();
        // The last ends reach the coordinator.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let after = self.coordinator.load_since(usage)?;
        Ok(Churn {
            workers: count,
            seconds,
            resident_before_mib: before.unwrap_or(after).resident_mib,
            resident_after_mib: after.resident_mib,
            open_files: after.open_files,
        })
    }
}

/// One short-lived worker: joins, is heard, leaves.
async fn visit(url: &str, number: usize) -> anyhow::Result<()> {
    let mut session = Session::open(worker::connect(url).await?).await?;
    let incarnation = Incarnation((1 << 32) + number as u64);
    let profile = worker::profile(format!("visitor-{number:05}"), number);
    session
        .say(incarnation, WorkerMessage::Join(profile))
        .await?;
    let beat = WorkerMessage::Beat {
        committed: Step(0),
        awaits: Awaits::Form,
        activity: protocol::Activity::default(),
    };
    session.say(incarnation, beat).await?;
    // Idle, or lent to the job, which has lost some.
    let heard = session.hear().await?.context("the session ended")?;
    ensure!(
        matches!(
            heard,
            CoordinatorMessage::Heard { .. } | CoordinatorMessage::Welcome { spare: true, .. }
        ),
        "heard {heard:?}"
    );
    if number.is_multiple_of(2) {
        let reason = "its time is over".to_owned();
        session
            .say(incarnation, WorkerMessage::Leave { reason })
            .await?;
        loop {
            match session.hear().await?.context("no Stop came")? {
                CoordinatorMessage::Stop {
                    afterwards: Afterwards::Leave,
                    ..
                } => break,
                CoordinatorMessage::Heard { .. } | CoordinatorMessage::Welcome { .. } => {}
                other => anyhow::bail!("heard {other:?}"),
            }
        }
    }
    Ok(())
}

/// A job that is never read further than its configuration.
fn config(output: &str, workers: u32) -> String {
    let output = serde_json::Value::from(output);
    format!(
        r#"
[job]
name = "{JOB}"
output = {output}
[model]
path = "model"
[data]
train = ["train.jsonl"]
max_length = 128
[objective]
kind = "cal_dpo"
beta = 0.1
[optimizer]
learning_rate = 1e-3
[schedule]
kind = "constant"
[train]
steps = 1000000
batch_pairs = {workers}
micro_batch_tokens = 2048
[checkpoint]
every_steps = 0
[cluster]
workers = {workers}
"#
    )
}
