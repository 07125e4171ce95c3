//! One job on this machine from its configuration to its exit code.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use anyhow::Context;
use checkpoint::newest;
use protocol::{Cause, Job, JobId, JobSpec, Outcome, Recovery, Step, recover};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::config::Config;
use crate::driver::{Checkpoints, Driven, Driver, Input};
use crate::finish::{Finished, finish};
use crate::launcher::{Launch, launch};
use crate::run_directory::{Opened, RunDirectory};
use crate::server;
use crate::summary::ReferenceCounts;
use crate::ui::{Banner, Console};

/// Inputs that wait for the driver; whoever has more waits.
const INPUTS_MAX: usize = 1024;

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
const EXIT_CANCELLED: u8 = 3;
/// Try again.
pub(crate) const EXIT_TEMPORARY: u8 = 75;

/// Runs `config`'s job to its end, or goes on with it, and returns the exit code.
///
/// # Errors
/// What kept it from starting or from being recorded.
pub fn run(config: &Config, show: &Show) -> anyhow::Result<u8> {
    let Opened {
        mut directory,
        records,
        torn_bytes,
    } = RunDirectory::open(&config.job.output, &config.identity, &config.to_toml())?;
    if torn_bytes > 0 {
        tracing::warn!(
            torn_bytes,
            "the journal's last record was torn and is cut off"
        );
    }
    let checkpoints = newest(&config.checkpoint.path).context("look for checkpoints")?;
    for (path, reason) in &checkpoints.refused {
        tracing::warn!("{} cannot be used: {reason}", path.display());
    }
    let recovery = recover(&records, checkpoints.found.as_ref().map(|it| Step(it.0)))?;
    let mut console = if show.json {
        Console::lines(Box::new(std::io::sink()))
    } else {
        Console::stderr()
    };
    if config.objective() == "sft" {
        console = console.without_rewards();
    }
    let resumed = (recovery.committed.0 > 0).then_some(recovery.committed.0);
    console.say(&Banner::new(config, resumed).to_string());

    let (driven, signalled) = if recovery.completed {
        let driven = Driven {
            outcome: Outcome::Completed,
            facts: recovery.facts.clone(),
            references: ReferenceCounts::default(),
        };
        (driven, None)
    } else {
        let resume = checkpoints.found.map(|(_, path)| path);
        drive(
            config,
            show,
            &mut directory,
            &mut console,
            recovery,
            resume.as_deref(),
        )?
    };
    let finished = Finished {
        outcome: &driven.outcome,
        facts: driven.facts.as_ref(),
        references: driven.references,
        same_command: &show.command,
    };
    let report = finish(config, &mut directory, &finished)?;
    if show.json {
        tracing::info!(outcome = %driven.outcome, summary = %directory.summary_path().display(), "ended");
    } else {
        println!("{report}");
    }
    Ok(exit_code(&driven.outcome, signalled))
}

/// Runs the job with workers of this machine; the second value is the signal that stopped it.
fn drive(
    config: &Config,
    show: &Show,
    directory: &mut RunDirectory,
    console: &mut Console,
    recovery: Recovery,
    resume: Option<&Path>,
) -> anyhow::Result<(Driven, Option<u8>)> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the network threads")?;
    runtime.block_on(async {
        let (inputs, mut queue) = mpsc::channel(INPUTS_MAX);
        let signalled = listen_for_signals(&inputs)?;
        let listener = TcpListener::bind(config.cluster.listen)
            .await
            .with_context(|| {
                format!(
                    "listen on {} (cluster.listen); port 0 takes any free one",
                    config.cluster.listen
                )
            })?;
        let url = format!("http://{}", listener.local_addr()?);
        let (stop_server, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(server::serve(
            listener,
            config.job.name.clone(),
            inputs.clone(),
            async {
                // Also resolves when the sender is dropped.
                drop(stopped.await);
            },
        ));
        tracing::info!("serving on {url}");

        let spec = job_spec(config, recovery, resume)?;
        let start = Instant::now();
        let (job, first) = Job::new(spec, 0);
        let workers = launch(&describe(config, show, &url), &inputs)?;
        let driver = Driver::new(
            job,
            start,
            directory,
            console,
            checkpoints(config),
            inputs.clone(),
        );
        let driven = driver.run(first, &mut queue).await;
        // The driver's end closed the sessions. Keep taking inputs, so that nobody waits for a full queue.
        let drain = tokio::spawn(async move { while queue.recv().await.is_some() {} });
        workers.leave().await;
        // The server takes the end of this channel for the sign to stop.
        drop(stop_server);
        drop(inputs);
        server.abort();
        drain.abort();
        let signal = signalled.load(Ordering::Relaxed);
        Ok((driven?, (signal > 0).then_some(signal)))
    })
}

fn job_spec(config: &Config, recovery: Recovery, resume: Option<&Path>) -> anyhow::Result<JobSpec> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).context("read random bytes")?;
    Ok(JobSpec {
        id: JobId(config.job.name.clone()),
        policy: config.policy(),
        build: env!("CARGO_PKG_VERSION").into(),
        config_toml: config.training_toml(),
        checkpoint_dir: config.checkpoint.path.display().to_string(),
        secret,
        recovery,
        resume: resume.map(|path| path.display().to_string()),
    })
}

fn describe(config: &Config, show: &Show, url: &str) -> Launch {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Launch {
        url: url.to_owned(),
        workers: config.cluster.workers,
        threads: config.cluster.threads_per_worker(cores),
        backend: config.cluster.backend.as_str().to_owned(),
        logs: config.job.output.join("logs"),
        json_logs: show.json,
    }
}

fn checkpoints(config: &Config) -> Checkpoints {
    Checkpoints {
        directory: config.checkpoint.path.clone(),
        keep_last: config.checkpoint.keep_last,
        run_digest: config.run_digest(),
    }
}

/// The first SIGINT or SIGTERM asks the job to stop with its state saved; the second leaves at once. Returns where the
/// first signal's number appears.
fn listen_for_signals(inputs: &mpsc::Sender<Input>) -> anyhow::Result<Arc<AtomicU8>> {
    let received = Arc::new(AtomicU8::new(0));
    for (kind, name) in [
        (SignalKind::interrupt(), "Ctrl-C"),
        (SignalKind::terminate(), "SIGTERM"),
    ] {
        let mut signals = signal(kind).context("listen for signals")?;
        let (inputs, received) = (inputs.clone(), Arc::clone(&received));
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let number = kind.as_raw_value() as u8;
                let first =
                    received.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed);
                if first.is_err() {
                    // Workers follow: their standard inputs close with this process.
                    std::process::exit(128 + i32::from(number));
                }
                let reason = format!("{name}; the state is saved first, once more leaves at once");
                // A driver that is gone has ended its job.
                drop(inputs.send(Input::StopRequested(reason)).await);
            }
        });
    }
    Ok(received)
}

fn exit_code(outcome: &Outcome, signalled: Option<u8>) -> u8 {
    match outcome {
        Outcome::Completed => EXIT_DONE,
        Outcome::Interrupted { .. } => signalled.map_or(EXIT_CANCELLED, |signal| 128 + signal),
        Outcome::Failed { cause, .. } => match cause {
            Cause::Config => EXIT_USAGE,
            Cause::Temporary => EXIT_TEMPORARY,
            Cause::Fatal => EXIT_FAILED,
        },
    }
}
