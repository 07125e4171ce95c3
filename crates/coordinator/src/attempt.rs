//! One attempt of a job, whoever brings its workers: the run directory is opened, the journal says where to go on, the driver
//! runs the job to its end, and what it leaves behind is written.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use checkpoint::newest;
use protocol::{Job, JobId, JobSpec, Outcome, Recovery, Step, recover, recover_living};
use tokio::sync::mpsc;
use wire::proto;

use crate::config::Config;
use crate::driver::{Checkpoints, Driven, Driver, Input};
use crate::feed::Feed;
use crate::finish::{Finished, finish};
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::observer::Observer;
use crate::run_directory::{Opened, RunDirectory};
use crate::summary::ReferenceCounts;
use crate::ui::Console;

/// Inputs that wait for a driver; whoever has more waits.
pub const INPUTS_MAX: usize = 1024;

/// How files begin by which workers see that they look at the same disk.
const PROBE: &str = ".probe-";

/// An attempt that has read where its run stands.
pub struct Attempt<'a> {
    config: &'a Config,
    directory: RunDirectory,
    recovery: Recovery,
    resume: Option<PathBuf>,
}

impl<'a> Attempt<'a> {
    /// Opens the run directory and looks for what to go on from: the newest checkpoint, or also what its workers may be `holding`.
    ///
    /// # Errors
    /// A directory that is another run's or held by another coordinator; damage.
    pub fn open(config: &'a Config, holding: bool) -> anyhow::Result<Self> {
        let Opened {
            directory,
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
        let newest = checkpoints.found.as_ref().map(|it| Step(it.0));
        let recover = if holding { recover_living } else { recover };
        Ok(Self {
            recovery: recover(&records, newest)?,
            resume: checkpoints.found.map(|(_, path)| path),
            config,
            directory,
        })
    }

    /// The step that a continued run goes on from.
    pub fn resumed(&self) -> Option<u64> {
        Some(self.recovery.committed.0).filter(|step| *step > 0)
    }

    /// How the run ended, when an earlier attempt completed it: no worker is needed.
    pub fn completed(&self) -> Option<Driven> {
        if !self.recovery.completed {
            return None;
        }
        let outcome = Outcome::Completed;
        // A tracker that was added since gets the rows.
        self.observe(None).finish(&outcome);
        Some(Driven {
            outcome,
            facts: self.recovery.facts.clone(),
            references: ReferenceCounts::default(),
            committed: self.recovery.committed,
        })
    }

    /// Who watches from here on.
    fn observe(&self, metrics: Option<&Metrics>) -> Observer {
        Observer::open(
            self.config,
            &self.directory,
            self.recovery.committed,
            metrics,
        )
    }

    /// Runs the job on the workers that come through `queue`.
    ///
    /// # Errors
    /// The run directory cannot be written.
    pub async fn drive(
        &mut self,
        console: &mut Console,
        feed: Feed,
        metrics: Option<&Metrics>,
        inputs: mpsc::Sender<Input>,
        queue: &mut mpsc::Receiver<Input>,
    ) -> anyhow::Result<Driven> {
        let config = self.config;
        let probe = Probe::leave(&config.checkpoint.path)?;
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).context("read random bytes")?;
        let spec = JobSpec {
            id: JobId(config.job.name.clone()),
            policy: config.policy(),
            build: env!("CARGO_PKG_VERSION").into(),
            config_toml: config.training_toml(),
            checkpoint_dir: config.checkpoint.path.display().to_string(),
            probe: probe.name.clone(),
            secret,
            fence: self.directory.take_over()?,
            recovery: self.recovery.clone(),
            resume: self.resume.as_ref().map(|path| path.display().to_string()),
        };
        let checkpoints = Checkpoints {
            directory: config.checkpoint.path.clone(),
            keep_last: config.checkpoint.keep_last,
            keep_every_steps: config.checkpoint.keep_every_steps,
            run_digest: config.run_digest(),
        };
        let observer = self.observe(metrics);
        let start = Instant::now();
        let (job, first) = Job::new(spec, 0);
        let driver = Driver::new(
            job,
            start,
            &mut self.directory,
            console,
            checkpoints,
            feed,
            observer,
            Monitor::new(config),
            inputs,
        );
        driver.run(first, queue).await
    }

    /// Writes what the run leaves behind, and returns the report for a person.
    ///
    /// # Errors
    /// What could not be written.
    pub fn finish(&mut self, driven: &Driven, same_command: &str) -> anyhow::Result<String> {
        let finished = Finished {
            outcome: &driven.outcome,
            facts: driven.facts.as_ref(),
            references: driven.references,
            same_command,
        };
        finish(self.config, &mut self.directory, &finished)
    }

    /// The job as it is at its end, for watchers.
    pub fn ended(&self, driven: &Driven, events: Vec<proto::Event>) -> proto::Job {
        let state = match driven.outcome {
            Outcome::Completed => proto::JobState::Completed,
            Outcome::Interrupted { .. } => proto::JobState::Interrupted,
            Outcome::Failed { .. } => proto::JobState::Failed,
        };
        proto::Job {
            name: self.config.job.name.clone(),
            state: state.into(),
            waiting: driven.outcome.to_string(),
            committed_step: driven.committed.0,
            steps_total: driven.facts.as_ref().map(|facts| facts.steps_total),
            world_size: self.config.cluster.workers,
            last_row: self.directory.metrics().last().copied().map(Into::into),
            objective: self.config.objective().to_owned(),
            output: self.config.job.output.display().to_string(),
            events,
            ..proto::Job::default()
        }
    }

    /// Where the summary lies.
    pub fn summary_path(&self) -> PathBuf {
        self.directory.summary_path()
    }
}

/// A file in the checkpoint folder that workers must see there; taken away when dropped.
struct Probe {
    /// Empty where there is none.
    name: String,
    path: Option<PathBuf>,
}

impl Probe {
    /// Leaves a new probe, and takes those away that a crash left. None in an object store, which is one place for all: whether
    /// a worker may write there shows when it does.
    fn leave(folder: &std::path::Path) -> anyhow::Result<Self> {
        if storage::is_remote(folder) {
            return Ok(Self {
                name: String::new(),
                path: None,
            });
        }
        storage::create_directory(folder)?;
        let entries = std::fs::read_dir(folder);
        let entries = entries.with_context(|| format!("list {}", folder.display()))?;
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(PROBE) {
                storage::remove_file(&entry.path())?;
            }
        }
        let mut number = [0; 8];
        getrandom::fill(&mut number).context("read random bytes")?;
        let name = format!("{PROBE}{:016x}", u64::from_le_bytes(number));
        let path = folder.join(&name);
        storage::atomic_write(&path, b"workers look for this file\n")?;
        let path = Some(path);
        Ok(Self { name, path })
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // The next attempt takes away what stays.
        if let Some(path) = &self.path {
            drop(storage::remove_file(path));
        }
    }
}
