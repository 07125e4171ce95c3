//! The coordinator program under load: started in a temporary folder, and what `/proc` says of it.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use tonic::transport::Channel;

use crate::worker;

/// How long it may take to start.
const START: Duration = Duration::from_secs(20);

/// A running coordinator. Dropping it kills it.
pub(crate) struct Coordinator {
    folder: tempfile::TempDir,
    pub(crate) url: String,
    process: Child,
}

/// What it has used so far.
#[derive(Clone, Copy)]
pub(crate) struct Usage {
    at: Instant,
    pub(crate) cpu_seconds: f64,
}

/// What it used between two times, and has at the second.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Load {
    /// Share of one core.
    pub(crate) cores: f64,
    /// Memory it has.
    pub(crate) resident_mib: f64,
    /// Most that it ever had.
    pub(crate) peak_mib: f64,
    /// Open files, connections among them.
    pub(crate) open_files: usize,
}

impl Coordinator {
    /// Starts `program` on a free port.
    pub(crate) async fn start(program: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("make a temporary folder")?;
        let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
        let address = listener.local_addr()?;
        drop(listener);
        let log = File::create(folder.path().join("coordinator.log"))?;
        let state = folder.path().join("state");
        let process = Command::new(program)
            .arg("--cluster")
            .args(["--set", &format!("cluster.listen={address}")])
            .args(["--set", &format!("cluster.state={}", state.display())])
            .env_remove("CALDPO__SECURITY__TOKEN_FILE")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut coordinator = Self {
            folder,
            url: format!("http://{address}"),
            process,
        };
        let start = Instant::now();
        while let Err(error) = coordinator.connect().await {
            coordinator.check()?;
            ensure!(
                start.elapsed() < START,
                "the coordinator does not answer: {error:#}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(coordinator)
    }

    pub(crate) async fn connect(&self) -> anyhow::Result<Channel> {
        worker::connect(&self.url).await
    }

    /// A folder for a job's output.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// That it still runs.
    ///
    /// # Errors
    /// It ended; with the end of its log.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        let ended = self
            .process
            .try_wait()
            .context("look after the coordinator")?;
        let log =
            fs::read_to_string(self.folder.path().join("coordinator.log")).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(5).collect();
        ensure!(
            ended.is_none(),
            "the coordinator ended ({ended:?}): {tail:?}"
        );
        Ok(())
    }

    pub(crate) fn usage(&self) -> anyhow::Result<Usage> {
        let stat = self.proc("stat")?;
        // After the name in parentheses: state is field 3, user and system time are fields 14 and 15.
        let (_, fields) = stat.rsplit_once(')').context("read stat")?;
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: Vec<u64> = ticks.map(str::parse).collect::<Result<_, _>>()?;
        let per_second = rustix::param::clock_ticks_per_second();
        Ok(Usage {
            at: Instant::now(),
            cpu_seconds: ticks.iter().sum::<u64>() as f64 / per_second as f64,
        })
    }

    /// What it used since `before`.
    pub(crate) fn load_since(&self, before: Usage) -> anyhow::Result<Load> {
        let now = self.usage()?;
        let status = self.proc("status")?;
        let mib = |name: &str| -> anyhow::Result<f64> {
            let mut lines = status.lines();
            let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|it| it.split_whitespace().next());
            let kib: f64 = kib.with_context(|| format!("find {name}"))?.parse()?;
            Ok(kib / 1024.0)
        };
        let files = fs::read_dir(format!("/proc/{}/fd", self.process.id()));
        Ok(Load {
            cores: (now.cpu_seconds - before.cpu_seconds) / (now.at - before.at).as_secs_f64(),
            resident_mib: mib("VmRSS")?,
            peak_mib: mib("VmHWM")?,
            open_files: files.context("list open files")?.count(),
        })
    }

    fn proc(&self, file: &str) -> anyhow::Result<String> {
        let path = format!("/proc/{}/{file}", self.process.id());
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // One that is gone needs no kill.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// How many events of a kind the job has whose output is `output`.
pub(crate) fn events(output: &Path, kind: &str) -> anyhow::Result<usize> {
    let text = fs::read_to_string(output.join("events.jsonl")).context("read events.jsonl")?;
    let mut count = 0;
    for line in text.lines() {
        let event: serde_json::Value = serde_json::from_str(line).context("read an event")?;
        count += usize::from(event["kind"] == kind);
    }
    Ok(count)
}
