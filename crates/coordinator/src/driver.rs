//! The one owner of a running job: takes inputs from sessions, processes, disk and signals, hands them to [`protocol::Job`]
//! with the time, and executes what it answers, strictly in order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use checkpoint::{ManifestInfo, RankFile, Retention};
use protocol::{
    Action, Afterwards, Cause, CoordinatorMessage, Event, FromWorker, Generation, Incarnation, Job,
    Note, Outcome, Record, RunFacts, Step, ToWorker, Waiting, WorkerMessage,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant as TokioInstant, sleep_until};
use wire::proto;
use wire::proto::job_event::Event as Kind;

use crate::feed::{self, Feed};
use crate::launcher::ChildExit;
use crate::monitor::{Monitor, Warning, of_data_report};
use crate::observer::Observer;
use crate::run_directory::{RunDirectory, RunDirectoryError};
use crate::server::{Connected, SessionId};
use crate::summary::ReferenceCounts;
use crate::ui::Console;

/// A Form that a session carries already is not said in it again for so long. Who speaks as if it had not heard it has not got to
/// it yet, and a stream loses nothing: the Forms of thousands, said again at each of their beats, would keep them from it.
const FORM_PAUSE: Duration = Duration::from_secs(5);

/// Workers that are gone whose counts are told apart.
const GONE_MAX: usize = 1024;

/// What reaches the driver. The queue that carries it is bounded; senders wait.
#[derive(Debug)]
pub enum Input {
    /// A session spoke for the first time.
    Connected(Connected),
    /// A worker's message.
    Message(Box<FromWorker>),
    /// A session ended.
    Disconnected(Incarnation, SessionId),
    /// Somebody asks how the job is.
    Job(oneshot::Sender<proto::Job>),
    /// A checkpoint became visible, and where, or did not.
    Checkpoint(Step, Result<String, String>),
    /// A worker process of this machine is gone.
    ChildExited(ChildExit),
    /// Somebody asks whether a worker of that name is in the job.
    IsHere(String, oneshot::Sender<bool>),
    /// Somebody wants a worker to leave.
    Drain(Incarnation, String),
    /// A signal, or somebody, wants the job to stop.
    StopRequested(String),
}

/// Where checkpoints go and how many stay.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    /// Their folder.
    pub directory: PathBuf,
    /// How many verified ones stay.
    pub keep_last: usize,
    /// Those of steps that are a multiple of this stay too; 0 for none.
    pub keep_every_steps: u64,
    /// Digest of what defines the run.
    pub run_digest: String,
}

/// A job and everything its actions touch.
pub struct Driver<'a> {
    job: Job,
    directory: &'a mut RunDirectory,
    console: &'a mut Console,
    checkpoints: Checkpoints,
    feed: Feed,
    /// The state that watchers were told last.
    told: Option<proto::JobState>,
    observer: Observer,
    monitor: Monitor,
    /// For the results of work that is done beside the loop.
    inputs: mpsc::Sender<Input>,
    sessions: BTreeMap<Incarnation, Line>,
    /// By worker: who connects again says its own again.
    references: BTreeMap<Incarnation, ReferenceCounts>,
    /// Of workers that are gone and no more in `references`.
    references_of_gone: ReferenceCounts,
    /// Worker processes of this machine that ended since the step that was committed then.
    exits: (Step, u32),
    /// The last checkpoint that is being published.
    publishing: Option<JoinHandle<()>>,
    start: Instant,
    outcome: Option<Outcome>,
}

/// A session of the job, and the last Form that it carries.
struct Line {
    session: Connected,
    formed: Option<(Generation, Instant)>,
}

/// How a job ended.
#[derive(Debug)]
pub struct Driven {
    /// Its outcome.
    pub outcome: Outcome,
    /// What the members agreed on.
    pub facts: Option<RunFacts>,
    /// Over all members.
    pub references: ReferenceCounts,
    /// The last commit.
    pub committed: Step,
}

impl<'a> Driver<'a> {
    /// A driver for `job`, whose clock started at `start`.
    pub fn new(
        job: Job,
        start: Instant,
        directory: &'a mut RunDirectory,
        console: &'a mut Console,
        checkpoints: Checkpoints,
        feed: Feed,
        observer: Observer,
        monitor: Monitor,
        inputs: mpsc::Sender<Input>,
    ) -> Self {
        Self {
            job,
            directory,
            console,
            checkpoints,
            feed,
            told: None,
            observer,
            monitor,
            inputs,
            sessions: BTreeMap::new(),
            references: BTreeMap::new(),
            references_of_gone: ReferenceCounts::default(),
            exits: (Step(0), 0),
            publishing: None,
            start,
            outcome: None,
        }
    }

    /// Runs the job to its end. `first` are the actions of its creation.
    ///
    /// # Errors
    /// The run directory cannot be written: nothing more can be promised, and the journal says where the run stands.
    pub async fn run(
        mut self,
        first: Vec<Action>,
        queue: &mut mpsc::Receiver<Input>,
    ) -> anyhow::Result<Driven> {
        self.execute(first)?;
        self.warn(self.monitor.start())?;
        self.watch_again()?;
        // In a row, without a look at the clock.
        let mut taken = 0;
        while self.outcome.is_none() {
            let deadline = self
                .job
                .next_deadline()
                .map_or(self.start + Duration::from_hours(24), |at_ms| {
                    self.start + Duration::from_millis(at_ms)
                });
            // What has arrived goes first, so that a coordinator that slept does not take its workers for silent. Where thousands
            // speak something nearly always has, and the timer is not set anew for each word.
            let overdue = Instant::now() >= deadline && taken >= queue.max_capacity();
            let event = if overdue {
                // All that had arrived by then is taken; more is never at an end.
                taken = 0;
                Some(Event::Tick)
            } else if let Ok(input) = queue.try_recv() {
                taken += 1;
                self.event(input)
            } else {
                taken = 0;
                tokio::select! {
                    biased;
                    input = queue.recv() => match input {
                        Some(input) => self.event(input),
                        None => anyhow::bail!("the driver's inputs closed"),
                    },
                    () = sleep_until(TokioInstant::from_std(deadline)) => Some(Event::Tick),
                }
            };
            if let Some(event) = event {
                let actions = self.job.handle(self.now_ms(), event);
                self.execute(actions)?;
                self.tell_state();
            }
        }
        self.console.finish(Instant::now());
        let outcome = self.outcome.context("the job has no outcome")?;
        self.observer.finish(&outcome);
        let references = self.references.values().copied();
        Ok(Driven {
            outcome,
            committed: self.job.committed(),
            facts: self.job.facts().cloned(),
            references: references.fold(self.references_of_gone, ReferenceCounts::plus),
        })
    }

    /// Of workers that come and go only so many are told apart: the newest counts replace older ones of the same worker.
    fn count_references(&mut self, worker: Incarnation, counts: ReferenceCounts) {
        self.references.insert(worker, counts);
        if self.references.len() > self.sessions.len() + GONE_MAX {
            let (sessions, gone) = (&self.sessions, &mut self.references_of_gone);
            self.references.retain(|worker, counts| {
                let connected = sessions.contains_key(worker);
                if !connected {
                    *gone = gone.plus(*counts);
                }
                connected
            });
        }
    }

    /// The job as it is, for whoever asks.
    fn view(&self) -> proto::Job {
        let last = self.directory.metrics().last();
        proto::Job {
            events: self.feed.notes(),
            output: self.directory.path().display().to_string(),
            ..wire::running_job(&self.job, self.now_ms(), last)
        }
    }

    /// Watchers hear of the job's every new state. That it has ended they hear from its shell, once its export is written.
    fn tell_state(&mut self) {
        let state = wire::job_state(&self.job);
        if self.job.outcome().is_some() {
            return;
        }
        if self.told.replace(state) != Some(state) {
            self.feed.tell(Kind::Job(self.view()));
        }
    }

    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// The job's event in an input, if it concerns the job.
    fn event(&mut self, input: Input) -> Option<Event> {
        match input {
            Input::Connected(it) => {
                let line = Line {
                    session: it,
                    formed: None,
                };
                self.sessions.insert(line.session.incarnation, line);
                None
            }
            Input::Message(message) => {
                if let WorkerMessage::Ready {
                    reference_reused,
                    reference_computed,
                    ..
                } = &message.message
                {
                    let counts = ReferenceCounts {
                        reused: *reference_reused,
                        computed: *reference_computed,
                    };
                    self.count_references(message.incarnation, counts);
                }
                Some(Event::Message(*message))
            }
            Input::Disconnected(incarnation, session) => {
                // A worker that connected again has another session, and the end of the old one says nothing.
                let known = self.sessions.get(&incarnation);
                if known.is_some_and(|it| it.session.session != session) {
                    return None;
                }
                self.sessions.remove(&incarnation);
                Some(Event::Disconnected { incarnation })
            }
            Input::Drain(incarnation, reason) => Some(Event::DrainRequested {
                incarnation,
                reason,
            }),
            Input::Job(answer) => {
                // Whoever asked may have gone.
                drop(answer.send(self.view()));
                None
            }
            Input::Checkpoint(step, Ok(path)) => Some(Event::CheckpointCommitted { step, path }),
            Input::Checkpoint(step, Err(reason)) => Some(Event::CheckpointFailed { step, reason }),
            Input::ChildExited(exit) => {
                self.child_exited(exit);
                None
            }
            Input::IsHere(name, answer) => {
                let here = self.job.workers().iter().any(|it| it.name == name);
                // Whoever asked may have gone.
                let _gone = answer.send(here);
                None
            }
            Input::StopRequested(reason) => Some(Event::StopRequested { reason }),
        }
    }

    /// A process that dies in its session is the job's to judge, by that session's end, and is started again; one that dies
    /// before anybody has a generation is unknown to the job, and waiting for it would be waiting in vain.
    fn child_exited(&mut self, exit: ChildExit) {
        tracing::debug!(worker = exit.number, status = %exit.status, "worker process ended");
        if exit.code == Some(0) {
            return;
        }
        let committed = self.job.committed();
        if self.exits.0 != committed {
            self.exits = (committed, 0);
        }
        self.exits.1 += 1;
        let policy = &self.job.spec().policy;
        // All of them at once are one failure, which the job counts.
        let most = |failures_max: u32| failures_max.max(policy.world);
        let again = self.exits.1 < most(policy.elastic.failures_max);
        let begins = matches!(self.job.waiting(), Waiting::Join { .. });
        // One that cannot even begin says why; one that was killed does not.
        if again && !(begins && exit.code.is_some()) {
            tracing::info!(worker = exit.number, status = %exit.status, "a worker process ended and is started again");
            // Its watcher may be gone with the program.
            let _gone = exit.again.send(());
            return;
        }
        if !begins && !self.sessions.is_empty() {
            return; // the others go on
        }
        let before = if begins { " before it joined" } else { "" };
        let mut reason = format!(
            "worker process {} ended{before} ({}); its log is {}",
            exit.number,
            exit.status,
            exit.log.display()
        );
        if !exit.log_tail.is_empty() {
            reason = format!("{reason} and ends with:\n{}", exit.log_tail);
        }
        let cause = match exit.code {
            Some(2) => Cause::Config,
            Some(75) | None => Cause::Temporary,
            Some(_) => Cause::Fatal,
        };
        self.outcome = Some(Outcome::Failed { cause, reason });
    }

    fn execute(&mut self, actions: Vec<Action>) -> anyhow::Result<()> {
        for action in actions {
            self.observer.observe(&action, self.job.facts());
            match action {
                Action::Journal(record) => {
                    if let Record::Facts { facts } = &record
                        && let Err(refusal) = self.directory.agree(facts)
                    {
                        return self.refuse(refusal);
                    }
                    self.directory.journal(&record)?;
                }
                Action::Send(message) => self.send(message),
                Action::CommitCheckpoint {
                    step,
                    shards,
                    best_first,
                    ..
                } => {
                    // It would become visible beside those of the coordinator that goes on.
                    self.directory.check_journal()?;
                    self.commit_checkpoint(step, shards, &best_first);
                }
                Action::RecordStep(row) => {
                    self.directory.record_step(row)?;
                    self.feed.tell(Kind::Step(row.into()));
                    let total = self.steps_total();
                    self.console.step(Instant::now(), &row, total);
                    tracing::info!(
                        target: "coordinator::step",
                        step = row.report.step,
                        loss = row.report.statistics.loss,
                        grad_norm = row.report.grad_norm,
                        seconds = row.seconds,
                        "step"
                    );
                    let warnings = self.monitor.step(&row, total);
                    self.warn(warnings)?;
                }
                Action::RecordEvaluation { row, samples } => {
                    self.directory.record_evaluation(row, &samples)?;
                    self.console.evaluation(&row);
                    self.feed.tell(Kind::Evaluation(row.into()));
                    tracing::info!(
                        target: "coordinator::step",
                        step = row.step,
                        chosen = row.statistics.log_ratios_chosen,
                        rejected = row.statistics.log_ratios_rejected,
                        "evaluation"
                    );
                    let warnings = self.monitor.evaluation(&row, self.steps_total());
                    self.warn(warnings)?;
                }
                Action::DataReport { text } => {
                    self.console.say(&text);
                    self.directory.write_data_report(&text)?;
                    for warning in of_data_report(&text) {
                        self.log_warning(&warning)?;
                    }
                    self.feed.tell(Kind::DataReport(proto::DataReport { text }));
                }
                Action::Note(note) => self.note(&note)?,
                Action::Progress {
                    rank,
                    phase,
                    done,
                    total,
                } => {
                    let now = Instant::now();
                    self.console.phase(now, rank.0, &phase, done, total);
                    self.feed.tell(Kind::Progress(proto::RankProgress {
                        rank: rank.0,
                        phase,
                        done,
                        total,
                    }));
                }
                Action::Done(outcome) => {
                    self.outcome.get_or_insert(outcome);
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, note: &Note) -> Result<(), RunDirectoryError> {
        let now = SystemTime::now();
        self.directory.event(now, note)?;
        self.feed.note(feed::event(now, note));
        tracing::info!(kind = note.kind, "{}", note.text);
        let shown = [
            "lost",
            "slow",
            "spare",
            "skip",
            "unsaved",
            "rewind",
            "stop",
            "early-stop",
            "ready",
        ];
        if shown.contains(&note.kind) {
            self.console.say(&note.text);
        }
        Ok(())
    }

    fn steps_total(&self) -> u64 {
        self.job.facts().map_or(0, |facts| facts.steps_total)
    }

    /// Shows the monitor the rows of earlier starts.
    fn watch_again(&mut self) -> Result<(), RunDirectoryError> {
        let (metrics, evaluations) = (self.directory.metrics(), self.directory.evaluations());
        let total = self.job.facts().map_or(0, |facts| facts.steps_total);
        let warnings = self.monitor.replay(metrics, evaluations, total);
        self.warn(warnings)
    }

    fn warn(&mut self, warnings: Vec<Warning>) -> Result<(), RunDirectoryError> {
        for warning in warnings {
            if self.log_warning(&warning)? {
                self.console.warn(&warning.text);
            }
        }
        Ok(())
    }

    /// Whether it is new.
    fn log_warning(&mut self, warning: &Warning) -> Result<bool, RunDirectoryError> {
        let now = SystemTime::now();
        let new = self.directory.warning(now, warning)?;
        if new {
            let Warning { kind, step, text } = warning;
            let note = Note {
                kind: "warning",
                text: text.clone(),
            };
            self.feed.note(feed::event(now, &note));
            tracing::warn!(target: "warning", kind, step, "{text}");
        }
        Ok(new)
    }

    /// The members found other inputs than this run's earlier parts: nobody goes on.
    fn refuse(&mut self, refusal: RunDirectoryError) -> anyhow::Result<()> {
        if !matches!(refusal, RunDirectoryError::OtherInputs { .. }) {
            return Err(refusal.into());
        }
        let reason = refusal.to_string();
        let generation = self.job.generation();
        for incarnation in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.send(ToWorker {
                incarnation,
                fence: self.job.spec().fence,
                generation,
                message: CoordinatorMessage::Stop {
                    reason: reason.clone(),
                    afterwards: Afterwards::Rejoin,
                },
            });
        }
        self.outcome = Some(Outcome::Failed {
            cause: Cause::Config,
            reason,
        });
        Ok(())
    }

    fn send(&mut self, mut message: ToWorker) {
        let incarnation = message.incarnation;
        let Some(Line { session, formed }) = self.sessions.get_mut(&incarnation) else {
            return;
        };
        if let CoordinatorMessage::Form { committed, .. } = message.message {
            let now = Instant::now();
            let carries = |(generation, at): (Generation, Instant)| {
                generation == message.generation && now.duration_since(at) < FORM_PAUSE
            };
            if formed.is_some_and(carries) {
                message.message = CoordinatorMessage::Heard { committed };
            } else {
                *formed = Some((message.generation, now));
            }
        }
        let last = matches!(message.message, CoordinatorMessage::Stop { .. });
        let sent = session.answers.try_send(Ok(message));
        if sent.is_err() {
            tracing::warn!(%incarnation, "a worker does not read its messages");
        }
        // Nothing follows a Stop; and a worker that does not read is lost: its session's end tells the job so.
        if last || sent.is_err() {
            self.sessions.remove(&incarnation);
        }
    }

    /// Verifies and publishes beside the loop; training goes on meanwhile. One after the other: removing old checkpoints must
    /// not meet one that is being published.
    fn commit_checkpoint(&mut self, step: Step, shards: Vec<String>, best_first: &[Step]) {
        let facts = self.job.facts();
        let digest = |get: fn(&RunFacts) -> &String| facts.map(get).cloned().unwrap_or_default();
        let info = ManifestInfo {
            model_digest: digest(|facts| &facts.model_digest),
            tokenizer_digest: digest(|facts| &facts.tokenizer_digest),
            data_digest: digest(|facts| &facts.data_digest),
            run_digest: self.checkpoints.run_digest.clone(),
            tool_version: env!("CARGO_PKG_VERSION").into(),
        };
        let (checkpoints, inputs) = (self.checkpoints.clone(), self.inputs.clone());
        let best_first: Vec<u64> = best_first.iter().map(|step| step.0).collect();
        let before = self.publishing.take();
        self.publishing = Some(tokio::spawn(async move {
            if let Some(before) = before {
                // How it ended was told where it ended.
                drop(before.await);
            }
            let work = move || {
                let retention = Retention {
                    keep_last: checkpoints.keep_last,
                    keep_every_steps: checkpoints.keep_every_steps,
                    best_first: &best_first,
                    since: step.0,
                    // Ranks may be writing the next one.
                    idle: false,
                };
                commit(&checkpoints.directory, &shards, &info, retention)
            };
            let committed = tokio::task::spawn_blocking(work).await;
            let committed = committed.unwrap_or_else(|panic| Err(panic.into()));
            let result = committed.map_err(|error| format!("{error:#}"));
            // A driver that is gone has ended its job.
            drop(inputs.send(Input::Checkpoint(step, result)).await);
        }));
    }
}

fn commit(
    directory: &Path,
    shards: &[String],
    info: &ManifestInfo,
    retention: Retention<'_>,
) -> anyhow::Result<String> {
    let mut ranks = Vec::new();
    for (rank, shard) in shards.iter().enumerate() {
        let file: RankFile = serde_json::from_str(shard)
            .with_context(|| format!("read what rank {rank} says of its file"))?;
        ranks.push(file);
    }
    let committed = checkpoint::commit(directory, &ranks, info)?;
    // The new one is in place; that an old one could not be removed is no reason to doubt it.
    if let Err(error) = checkpoint::retain(directory, retention) {
        tracing::warn!("old checkpoints stay: {error}");
    }
    Ok(committed.path.display().to_string())
}
