//! Worker processes on this machine: this program's own executable, started with its hidden subcommand.
//!
//! Children ignore Ctrl-C (the coordinator decides what it means) and leave when their standard input closes, which the
//! kernel does for them when this process dies in whatever way. Their log lines go to `<output>/logs/worker-N.log`.
//!
//! A child whose worker is not in the job for [`ABSENCE`] is killed, and like any other that ends it is started again: it is
//! stopped, or hangs so that it does not even leave.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use crate::driver::Input;

/// Lines of a dead worker's log that are shown.
const LOG_LINES_SHOWN: usize = 5;

/// How long a process may run without its worker being in the job: it starts and joins, or leaves, within seconds.
const ABSENCE: Duration = Duration::from_mins(2);

/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// How workers are started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The executable whose subcommand `worker` they run.
    pub program: PathBuf,
    /// Where they find the coordinator.
    pub url: String,
    /// How many.
    pub workers: u32,
    /// Compute threads of each.
    pub threads: usize,
    /// `auto`, `cpu` or `cuda`.
    pub backend: String,
    /// `auto`, `tcp` or `nccl`.
    pub collective: String,
    /// Number of each worker's GPU, by worker; their own numbers where there is none.
    pub gpus: Vec<u32>,
    /// The token they show.
    pub token_file: Option<PathBuf>,
    /// Folder of their logs.
    pub logs: PathBuf,
    /// Whether they log JSON.
    pub json_logs: bool,
}

/// Running worker processes. Dropping it closes their standard inputs and kills them.
pub struct Workers {
    watchers: Vec<tokio::task::JoinHandle<()>>,
}

/// A worker process that is gone.
#[derive(Debug)]
pub struct ChildExit {
    /// Its number, from 0 (not its rank).
    pub number: u32,
    /// How it ended.
    pub status: String,
    /// Exit code, when it left by itself.
    pub code: Option<i32>,
    /// The end of its log.
    pub log_tail: String,
    /// Its log.
    pub log: PathBuf,
    /// To be answered: whether it is started again. Unanswered it is not.
    pub again: oneshot::Sender<()>,
}

/// Starts the workers, until all are or `is_stopped`; each exit becomes an [`Input::ChildExited`], whose answer says whether the
/// worker is started again.
///
/// # Errors
/// If a process or its log file cannot be made.
pub fn launch(
    launch: &Launch,
    inputs: &mpsc::Sender<Input>,
    is_stopped: impl Fn() -> bool,
) -> anyhow::Result<Workers> {
    std::fs::create_dir_all(&launch.logs)
        .with_context(|| format!("create {}", launch.logs.display()))?;
    let mut watchers = Vec::new();
    for number in 0..launch.workers {
        if is_stopped() {
            break;
        }
        let worker = Worker {
            log: launch.logs.join(format!("worker-{number}.log")),
            launch: launch.clone(),
            number,
        };
        File::create(&worker.log).with_context(|| format!("create {}", worker.log.display()))?;
        let child = worker.start()?;
        watchers.push(tokio::spawn(worker.watch(child, inputs.clone())));
    }
    Ok(Workers { watchers })
}

/// One of them, in all its lives.
struct Worker {
    launch: Launch,
    number: u32,
    log: PathBuf,
}

impl Worker {
    fn name(&self) -> String {
        format!("worker-{}", self.number)
    }

    fn start(&self) -> anyhow::Result<Child> {
        let Self {
            launch,
            number,
            log,
        } = self;
        let file = File::options().append(true).create(true).open(log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        let same = file.try_clone().context("share a log file")?;
        let gpu = launch.gpus.get(*number as usize).unwrap_or(number);
        let mut command = Command::new(&launch.program);
        command
            .arg("worker")
            .args(["--coordinator", &launch.url, "--once", "--child"])
            .args(["--name", &self.name()])
            .args(["--threads", &launch.threads.to_string()])
            .args(["--backend", &launch.backend, "--gpu", &gpu.to_string()])
            .args(["--collective", &launch.collective])
            .args(["--log", if launch.json_logs { "json" } else { "text" }])
            .args(
                launch
                    .token_file
                    .iter()
                    .flat_map(|file| ["--token-file".as_ref(), file.as_os_str()]),
            )
            .envs(equal_bits())
            .stdin(Stdio::piped())
            .stdout(same)
            .stderr(file)
            .kill_on_drop(true);
        command
            .spawn()
            .with_context(|| format!("start {}", launch.program.display()))
    }

    async fn watch(self, mut child: Child, inputs: mpsc::Sender<Input>) {
        let name = self.name();
        loop {
            // `wait` closes standard input first, which is the sign to leave: hold it until the process is gone.
            let stdin = child.stdin.take();
            let status = tokio::select! {
                status = child.wait() => status,
                () = absent(&name, &inputs, LOOK, ABSENCE) => {
                    tracing::warn!(
                        worker = self.number,
                        "a worker process that is in no job for {} s is killed",
                        ABSENCE.as_secs()
                    );
                    // One that has just ended cannot be killed, and is waited for as well.
                    drop(child.start_kill());
                    child.wait().await
                }
            };
            drop(stdin);
            let (again, answer) = oneshot::channel();
            let exit = ChildExit {
                number: self.number,
                code: status.as_ref().ok().and_then(ExitStatus::code),
                status: match &status {
                    Ok(status) => status.to_string(),
                    Err(error) => format!("cannot be waited for: {error}"),
                },
                log_tail: tail(&self.log),
                log: self.log.clone(),
                again,
            };
            // A driver that is gone has ended its job.
            if inputs.send(Input::ChildExited(exit)).await.is_err() || answer.await.is_err() {
                return;
            }
            match self.start() {
                Ok(started) => child = started,
                Err(error) => return tracing::error!("worker {}: {error:#}", self.number),
            }
        }
    }
}

/// Returns once the worker called `name` has not been in the job for `absence`, which is looked at every `look`; never when there
/// is no job any more.
async fn absent(name: &str, inputs: &mpsc::Sender<Input>, look: Duration, absence: Duration) {
    let mut here = Instant::now();
    loop {
        sleep(look).await;
        let (answer, answered) = oneshot::channel();
        // A driver that is gone drops the question.
        drop(inputs.send(Input::IsHere(name.to_owned(), answer)).await);
        match answered.await {
            Ok(true) => here = Instant::now(),
            Ok(false) if here.elapsed() >= absence => return,
            Ok(false) => {}
            // Those who do not leave after its end have a deadline of their own.
            Err(_) => return std::future::pending().await,
        }
    }
}

impl Workers {
    /// Waits for all of them to leave, and kills those that have not after `patience`, which is for all together.
    pub async fn leave(self, patience: Duration) {
        let deadline = Instant::now() + patience;
        for watcher in self.watchers {
            let stop = watcher.abort_handle();
            if timeout_at(deadline, watcher).await.is_err() {
                // Dropping the watcher kills its child.
                stop.abort();
            }
        }
    }
}

/// What has a worker's sums repeat between runs, as far as the user has not said otherwise.
fn equal_bits() -> impl Iterator<Item = (&'static str, &'static str)> {
    #[cfg(feature = "local")]
    let wanted = worker::environment();
    #[cfg(not(feature = "local"))]
    let wanted: Vec<(&str, &str)> = Vec::new();
    let missing = |(name, _): &(&str, &str)| std::env::var_os(name).is_none();
    wanted.into_iter().filter(missing)
}

fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const LOOK: Duration = Duration::from_millis(1);
    const ABSENCE: Duration = Duration::from_millis(20);

    /// Answers that the worker is here so many times, then that it is not; after `ends` answers there is no job.
    async fn job(mut queue: mpsc::Receiver<Input>, here: usize, ends: usize) -> usize {
        let mut asked = 0;
        while asked < ends
            && let Some(Input::IsHere(name, answer)) = queue.recv().await
        {
            assert_eq!(name, "worker-3");
            asked += 1;
            // Who does not wait for it is gone.
            let _gone = answer.send(asked <= here);
        }
        asked
    }

    #[tokio::test]
    async fn a_worker_that_is_not_in_the_job_is_absent_after_a_while() {
        let (inputs, queue) = mpsc::channel(1);
        let answers = tokio::spawn(job(queue, 3, usize::MAX));
        absent("worker-3", &inputs, LOOK, ABSENCE).await;
        drop(inputs);
        assert!(answers.await.unwrap() > 3);
    }

    #[tokio::test]
    async fn nobody_is_absent_who_is_in_the_job_or_whose_job_is_over() {
        let (inputs, queue) = mpsc::channel(1);
        let answers = tokio::spawn(job(queue, 60, 60));
        let looked = absent("worker-3", &inputs, LOOK, ABSENCE);
        assert!(timeout(10 * ABSENCE, looked).await.is_err());
        drop(inputs);
        answers.abort();
    }

    /// Workers that neither join nor leave: they say their process ids and sleep.
    fn sleepers(folder: &Path) -> Launch {
        use std::os::unix::fs::PermissionsExt;
        let program = folder.join("sleeper");
        std::fs::write(&program, "#!/bin/sh\necho $$\nexec sleep 600\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Launch {
            program,
            url: String::new(),
            workers: 6,
            threads: 1,
            backend: "cpu".into(),
            collective: "tcp".into(),
            gpus: Vec::new(),
            token_file: None,
            logs: folder.join("logs"),
            json_logs: false,
        }
    }

    #[tokio::test]
    async fn a_stop_while_workers_are_started_starts_no_more_and_kills_those_that_are() {
        let folder = tempfile::tempdir().unwrap();
        let asked = std::cell::Cell::new(0);
        let is_stopped = || {
            asked.set(asked.get() + 1);
            asked.get() > 3
        };
        let (inputs, _queue) = mpsc::channel(1);
        let launched = sleepers(folder.path());
        let workers = launch(&launched, &inputs, is_stopped).unwrap();
        let logs = std::fs::read_dir(&launched.logs).unwrap();
        let mut ids = Vec::new();
        for log in logs {
            let log = log.unwrap().path();
            let id = || {
                let text = std::fs::read_to_string(&log).unwrap();
                text.trim().parse::<u32>().ok()
            };
            let mut said = id();
            while said.is_none() {
                sleep(LOOK).await;
                said = id();
            }
            ids.extend(said);
        }
        assert_eq!(ids.len(), 3, "{ids:?}");
        let start = Instant::now();
        workers.leave(10 * ABSENCE).await;
        // One after the other they would have three times as long.
        assert!(start.elapsed() < 20 * ABSENCE, "{:?}", start.elapsed());
        // Of one that nobody has waited for yet it is empty.
        let lives = |id: &u32| {
            let command = std::fs::read(format!("/proc/{id}/cmdline"));
            command.is_ok_and(|it| !it.is_empty())
        };
        let killed = async {
            while ids.iter().any(lives) {
                sleep(LOOK).await;
            }
        };
        let killed = timeout(Duration::from_secs(30), killed).await;
        assert!(killed.is_ok(), "{ids:?} live");
    }
}
