//! One attempt of a job, whoever brings its workers: the run directory is opened, the journal says where to go on, the driver
//! runs the job to its end, and what it leaves behind is written.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use checkpoint::{Newest, newest};
use protocol::{
    Cause, Job, JobId, JobSpec, Outcome, Record, Recovery, RecoveryError, Step, recover,
    recover_living, saved,
};
use storage::FileError;
use tokio::sync::mpsc;
use wire::proto;

use crate::claim::{self, ClaimError, Owner};
use crate::config::Config;
use crate::driver::{Checkpoints, Driven, Driver, Input};
use crate::feed::Feed;
use crate::finish::{Finished, finish};
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::observer::Observer;
use crate::output::{self, Unwritable};
use crate::random;
use crate::run_directory::{Opened, RunDirectory, RunDirectoryError};
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
    owner: Owner,
    recovery: Recovery,
    resume: Option<PathBuf>,
}

/// Why an attempt does not begin.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The run directory cannot be written.
    #[error(transparent)]
    Output(#[from] Unwritable),
    /// The run directory cannot be used.
    #[error(transparent)]
    Directory(#[from] RunDirectoryError),
    /// `checkpoint.path` is another run's, or cannot be claimed.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// `checkpoint.path` cannot be read.
    #[error("look for checkpoints in checkpoint.path: {source}")]
    Checkpoints {
        /// Whether it is an object store, which may answer the next time.
        remote: bool,
        /// What the store answered.
        #[source]
        source: FileError,
    },
    /// The journal knows a checkpoint where there is none that holds.
    #[error(
        "the journal of {output} knows a checkpoint of step {step}, but in checkpoint.path {folder} {found}: mount or restore that \
         folder, or name the place that it was moved to; to begin at step 0 instead, choose another job.output"
    )]
    Gone {
        /// The run directory.
        output: PathBuf,
        /// The newest checkpoint that the journal knows.
        step: Step,
        /// Where it should be.
        folder: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// The journal and the newest checkpoint contradict each other.
    #[error("{source}; the journal is that of {output}, the checkpoint lies in {folder}")]
    Recovery {
        /// The run directory.
        output: PathBuf,
        /// `checkpoint.path`.
        folder: PathBuf,
        /// How.
        #[source]
        source: RecoveryError,
    },
}

impl AttemptError {
    /// What becomes of the job: [`Cause::Config`] where another configuration is the cure, [`Cause::Temporary`] where another
    /// attempt may be.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Directory(error) if error.is_usage() => Cause::Config,
            Self::Output(_)
            | Self::Claim(ClaimError::Taken { .. } | ClaimError::Foreign { .. })
            | Self::Gone { .. }
            | Self::Recovery {
                source: RecoveryError::CheckpointAhead { .. },
                ..
            } => Cause::Config,
            Self::Checkpoints { remote: true, .. } => Cause::Temporary,
            _ => Cause::Fatal,
        }
    }
}

impl<'a> Attempt<'a> {
    /// Opens the run directory, sees that the folder of its checkpoints is no other run's, and looks for what to go on from: the
    /// newest checkpoint, or also what its workers may be `holding`. The folder is claimed when the run is driven on.
    ///
    /// # Errors
    /// Directories that are another run's or held by another coordinator; damage; checkpoints that are gone.
    pub fn open(config: &'a Config, holding: bool) -> Result<Self, AttemptError> {
        output::prepare(&config.job.output)?;
        let Opened {
            directory,
            records,
            torn_bytes,
            replaced,
        } = RunDirectory::open(&config.job.output, &config.identity, &config.to_toml())?;
        if torn_bytes > 0 {
            tracing::warn!(
                torn_bytes,
                "the journal's last record was torn and is cut off"
            );
        }
        if !replaced.is_empty() {
            let replaced: Vec<String> = replaced.iter().map(ToString::to_string).collect();
            tracing::warn!(
                "{} held a run that had not committed a step, and begins anew: {}",
                config.job.output.display(),
                replaced.join("; ")
            );
        }
        let owner = Owner {
            run: directory.id().to_owned(),
            output: config.job.output.clone(),
        };
        let folder = &config.checkpoint.path;
        claim::check(folder, &owner)?;
        let checkpoints = newest(folder).map_err(|source| AttemptError::Checkpoints {
            remote: storage::is_remote(folder),
            source,
        })?;
        for (path, reason) in &checkpoints.refused {
            tracing::warn!("{} cannot be used: {reason}", path.display());
        }
        claim::check_newest(folder, &config.run_digest(), &checkpoints)?;
        let newest = checkpoints.found.as_ref().map(|it| Step(it.0));
        let recover = if holding { recover_living } else { recover };
        let recovery = recover(&records, newest).map_err(|source| AttemptError::Recovery {
            output: config.job.output.clone(),
            folder: folder.clone(),
            source,
        })?;
        if !recovery.completed {
            check_present(config, &records, &checkpoints, holding)?;
        }
        Ok(Self {
            recovery,
            resume: checkpoints.found.map(|(_, path)| path),
            config,
            directory,
            owner,
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
        claim::claim(&config.checkpoint.path, &self.owner).map_err(AttemptError::from)?;
        let probe = Probe::leave(&config.checkpoint.path)?;
        let spec = JobSpec {
            id: JobId(config.job.name.clone()),
            policy: config.policy(),
            build: env!("CARGO_PKG_VERSION").into(),
            config_toml: config.training_toml(),
            checkpoint_dir: config.checkpoint.path.display().to_string(),
            probe: probe.name.clone(),
            secret: random::bytes().context("read random bytes")?,
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
        let report = finish(self.config, &mut self.directory, &finished)?;
        if driven.committed == Step(0)
            && let Err(error) = claim::release(&self.config.checkpoint.path, &self.owner)
        {
            tracing::warn!("nothing was saved, and the claim on checkpoint.path stays: {error}");
        }
        Ok(report)
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

/// Refuses to rewind to the beginning because checkpoints are not where they were. Workers that may be `holding` the state are
/// asked first where a folder is there and what it holds is damaged.
fn check_present(
    config: &Config,
    records: &[Record],
    checkpoints: &Newest,
    holding: bool,
) -> Result<(), AttemptError> {
    let step = saved(records);
    if step == Step(0) || checkpoints.found.is_some() {
        return Ok(());
    }
    let found = match checkpoints.refused.is_empty() {
        true => "there is none",
        false if holding => return Ok(()),
        false => "none holds, as the warnings above say",
    };
    Err(AttemptError::Gone {
        output: config.job.output.clone(),
        step,
        folder: config.checkpoint.path.clone(),
        found,
    })
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
        let number = random::hexadecimal::<8>().context("read random bytes")?;
        let name = format!("{PROBE}{number}");
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
