//! One job on this machine from its configuration to its exit code.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use protocol::{Cause, Outcome};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use wire::proto::job_event::Event as Kind;
use wire::{Guard, Token};

use crate::address::reachable;
pub use crate::attempt::AttemptError;
use crate::attempt::{Attempt, INPUTS_MAX};
use crate::config::{Config, SecuritySection};
use crate::driver::{Driven, Input};
use crate::feed::Feed;
use crate::launcher::{Launch, launch};
use crate::metrics;
use crate::only;
use crate::server::{self, Doors, Route};
use crate::signals::on_signals;
use crate::ui::{self, Banner, Console};

/// Clients that wait for their answer; whoever comes later waits to ask.
pub(crate) const ASKS_MAX: usize = 256;

/// How long clients may take to hear how the job ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long workers may take to leave after the job's end before they are killed.
const LEAVE_PATIENCE: Duration = Duration::from_secs(15);

/// The same where none of them has begun a step.
const LEAVE_PATIENCE_IDLE: Duration = Duration::from_secs(2);

/// How a run is shown, and how it is started again.
pub struct Show {
    /// Log lines are JSON, and nothing else is written to standard error.
    pub json: bool,
    /// The command that was given.
    pub command: String,
}

/// Exit codes that a supervisor acts on.
pub(crate) const EXIT_DONE: u8 = 0;
pub(crate) const EXIT_FAILED: u8 = 1;
/// Bad usage or configuration: do not try again.
pub const EXIT_USAGE: u8 = 2;
pub(crate) const EXIT_CANCELLED: u8 = 3;
/// Try again.
pub(crate) const EXIT_TEMPORARY: u8 = 75;

/// Runs `config`'s job to its end, or goes on with it, and returns the exit code.
///
/// # Errors
/// What kept it from starting or from being recorded.
pub fn run(config: &Config, show: &Show) -> anyhow::Result<u8> {
    let token = token(&config.security)?;
    let mut attempt = Attempt::open(config, false)?;
    let completed = attempt.completed();
    #[cfg(feature = "local")]
    if completed.is_none() {
        let machine = worker::machine::MachineMemory::here();
        crate::plan::check_room(config, machine.as_ref(), cores())?;
    }
    let mut console = if show.json {
        Console::lines(Box::new(std::io::sink()))
    } else {
        Console::stderr()
    };
    console.with_rewards(config.has_rewards());
    console.say(&Banner::new(config, attempt.resumed()).to_string());

    let (driven, signalled, report) = match completed {
        Some(driven) => {
            let report = attempt.finish(&driven, &show.command)?;
            (driven, None, report)
        }
        None => drive(config, show, &mut attempt, &mut console, token.as_ref())?,
    };
    if show.json {
        let summary = attempt.summary_path();
        tracing::info!(outcome = %driven.outcome, summary = %summary.display(), "ended");
    } else {
        ui::print(&report)?;
    }
    Ok(exit_code(&driven.outcome, signalled))
}

/// The service's token, where it has one.
pub(crate) fn token(security: &SecuritySection) -> anyhow::Result<Option<Token>> {
    let token = security.token_file.as_deref().map(Token::read);
    token.transpose().context("security.token_file")
}

/// The door at `listen`.
pub(crate) async fn bind(listen: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(listen).await;
    listener.with_context(|| {
        format!("listen on {listen} (cluster.listen); choose another port, or 0 for any free one")
    })
}

/// Runs the job with workers of this machine, and writes what it leaves behind; the second value is the signal that stopped
/// it, the third the report. Clients can ask and watch until all is written.
fn drive(
    config: &Config,
    show: &Show,
    attempt: &mut Attempt,
    console: &mut Console,
    token: Option<&Token>,
) -> anyhow::Result<(Driven, Option<u8>, String)> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the network threads")?;
    runtime.block_on(async {
        let (inputs, mut queue) = mpsc::channel(INPUTS_MAX);
        let to_job = inputs.clone();
        let signalled = on_signals(move |name| {
            let reason = format!("{name}; the state is saved first, once more leaves at once");
            let to_job = to_job.clone();
            async move {
                // A driver that is gone has ended its job.
                drop(to_job.send(Input::StopRequested(reason)).await);
            }
        })?;
        let listener = bind(config.cluster.listen).await?;
        let address = listener.local_addr()?;
        let url = format!("http://{address}");
        let asked = format!("http://{}", reachable(address));
        console.say(&ui::status_line(
            &asked,
            config.security.token_file.as_deref(),
        ));
        let feed = Feed::new();
        let (asks, asked) = mpsc::channel(ASKS_MAX);
        let answers = tokio::spawn(only::answer(
            config.job.name.clone(),
            config.objective().to_owned(),
            feed.clone(),
            inputs.clone(),
            asked,
        ));
        let doors = Doors {
            sessions: Route {
                job: config.job.name.clone(),
                inputs: inputs.clone(),
            },
            asks,
        };
        let (stop_server, stopped) = oneshot::channel::<()>();
        let mut server = tokio::spawn(server::serve(listener, doors, Guard::new(token), async {
            // Also resolves when the sender is dropped.
            drop(stopped.await);
        }));
        tracing::info!("serving on {url}");
        let listening = metrics::listen(config.telemetry.metrics_listen, Guard::new(token)).await?;
        if let Some(listening) = &listening {
            tracing::info!("metrics on {}", listening.url);
            console.say(&format!("metrics on {}", listening.url));
        }
        let served = listening.as_ref().map(|it| &it.metrics);
        // Whoever is started after the signal would be started for nothing, and of many workers there may be minutes of them.
        let is_stopped = || signalled.load(Ordering::Relaxed) > 0;
        let workers = launch(&describe(config, show, &url)?, &inputs, is_stopped)?;
        let driven = attempt
            .drive(console, feed.clone(), served, inputs.clone(), &mut queue)
            .await;
        // The driver's end closed the sessions. Keep taking inputs, so that nobody waits for a full queue.
        let drain = tokio::spawn(async move { while queue.recv().await.is_some() {} });
        workers
            .leave(patience(driven.as_ref().ok(), attempt.resumed()))
            .await;
        let finished = driven.and_then(|driven| {
            let report = attempt.finish(&driven, &show.command)?;
            Ok((driven, report))
        });
        if let Ok((driven, _)) = &finished {
            feed.tell(Kind::Job(attempt.ended(driven, feed.notes())));
        }
        // The server takes the end of this channel for the sign to stop; watchers' streams end with their feed.
        drop(stop_server);
        drop(inputs);
        drain.abort();
        answers.abort();
        drop((feed, answers.await));
        if timeout(LAST_WORDS, &mut server).await.is_err() {
            server.abort();
        }
        let signal = signalled.load(Ordering::Relaxed);
        let (driven, report) = finished?;
        Ok((driven, (signal > 0).then_some(signal), report))
    })
}

/// How long workers may take to leave: those of a job that was stopped before its first step have nothing to finish.
fn patience(driven: Option<&Driven>, resumed: Option<u64>) -> Duration {
    let nothing_begun = |driven: &Driven| {
        let interrupted = matches!(driven.outcome, Outcome::Interrupted { .. });
        interrupted && driven.committed.0 == resumed.unwrap_or(0)
    };
    if driven.is_some_and(nothing_begun) {
        LEAVE_PATIENCE_IDLE
    } else {
        LEAVE_PATIENCE
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn describe(config: &Config, show: &Show, url: &str) -> anyhow::Result<Launch> {
    Ok(Launch {
        program: std::env::current_exe().context("find this program's own file")?,
        url: url.to_owned(),
        workers: config.cluster.workers,
        threads: config.cluster.threads_per_worker(cores()),
        token_file: config.security.token_file.clone(),
        backend: config.cluster.backend.as_str().to_owned(),
        collective: config.cluster.collective.as_str().to_owned(),
        gpus: config.cluster.gpus.clone().unwrap_or_default(),
        logs: config.job.output.join("logs"),
        json_logs: show.json,
    })
}

fn exit_code(outcome: &Outcome, signalled: Option<u8>) -> u8 {
    match outcome {
        Outcome::Completed => EXIT_DONE,
        Outcome::Interrupted { .. } => signalled.map_or(EXIT_CANCELLED, |signal| 128 + signal),
        Outcome::Failed { cause, .. } => exit_code_of(*cause),
    }
}

/// The exit code of a job that failed for this cause.
pub fn exit_code_of(cause: Cause) -> u8 {
    match cause {
        Cause::Config => EXIT_USAGE,
        Cause::Temporary => EXIT_TEMPORARY,
        Cause::Fatal => EXIT_FAILED,
    }
}
