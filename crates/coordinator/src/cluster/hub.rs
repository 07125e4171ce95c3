//! The one owner of a coordinator's queue: sessions of waiting workers, requests of clients, ends of attempts and signals come
//! in; what [`Scheduler`] answers is executed strictly in order.

mod answers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::absolute;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use protocol::{
    Cause, CoordinatorMessage, Fence, FromWorker, Generation, Incarnation, JobId, JobSummaryState,
    Note, Outcome, Scheduler, SchedulerAction, SchedulerEvent, SchedulerPolicy, Step, ToWorker,
    WorkerMessage,
};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant as TokioInstant, sleep_until};
use wire::proto;
use wire::proto::job_event::Event as Kind;

use super::jobs::Jobs;
use crate::attempt::{Attempt, AttemptError, INPUTS_MAX};
use crate::config::{Config, Sources};
use crate::driver::Input;
use crate::feed::{self, Feed};
use crate::metrics::Metrics;
use crate::server::{Ask, Connected, Route, SessionId};
use crate::summary::record_cancelled;
use crate::ui::Console;

/// Silence after which a waiting worker counts as lost; a worker beats every half second.
const HEARTBEAT_TIMEOUT_MS: u64 = 10_000;

/// Pause before a job that lost workers is started again; doubled with each loss that came no further.
const RETRY_PAUSE_MS: u64 = 2_000;

/// How long a job that ran when the coordinator ended waits for its workers, which try to connect twice a second.
const RETURN_MS: u64 = 5_000;

/// How often the head of the queue says what it waits for.
const REMIND_MS: u64 = 60_000;

/// Events of the coordinator that are kept for status, and that a slow watcher may be behind.
const EVENTS_KEPT: usize = 100;

/// A worker that waits for a job.
struct Waiting {
    session: Connected,
    /// What it said first, to be said again to its job.
    join: Option<FromWorker>,
}

/// A job that has not ended.
struct Live {
    config: Arc<Config>,
    feed: Feed,
    /// Where its running attempt listens.
    inputs: Option<mpsc::Sender<Input>>,
}

/// What an attempt's thread tells.
enum Told {
    /// It needs no workers any more, and this is how it stands.
    Released(JobId, Box<proto::Job>),
    /// It is over.
    Ended {
        id: JobId,
        outcome: Outcome,
        committed: Step,
    },
}

pub(super) struct Hub {
    scheduler: Scheduler,
    jobs: Jobs,
    /// Where jobs' metrics go, if they are served.
    metrics: Option<Metrics>,
    waiting: BTreeMap<Incarnation, Waiting>,
    /// The present session of every worker, here or in a job.
    sessions: BTreeMap<Incarnation, SessionId>,
    live: BTreeMap<JobId, Live>,
    /// How jobs stood when an attempt of theirs last ended under this coordinator.
    stood: BTreeMap<JobId, Box<proto::Job>>,
    events: broadcast::Sender<proto::Event>,
    kept: VecDeque<proto::Event>,
    tell: mpsc::Sender<Told>,
    told: mpsc::Receiver<Told>,
    start: Instant,
}

impl Hub {
    pub(super) fn new(jobs: Jobs, metrics: Option<Metrics>) -> Self {
        let policy = SchedulerPolicy {
            build: env!("CARGO_PKG_VERSION").into(),
            heartbeat_timeout_ms: HEARTBEAT_TIMEOUT_MS,
            retry_pause_ms: RETRY_PAUSE_MS,
            return_ms: RETURN_MS,
            remind_ms: REMIND_MS,
        };
        let (tell, told) = mpsc::channel(64);
        Self {
            scheduler: Scheduler::new(policy, jobs.recovery.clone(), 0),
            jobs,
            metrics,
            waiting: BTreeMap::new(),
            sessions: BTreeMap::new(),
            live: BTreeMap::new(),
            stood: BTreeMap::new(),
            events: broadcast::Sender::new(EVENTS_KEPT),
            kept: VecDeque::new(),
            tell,
            told,
            start: Instant::now(),
        }
    }

    /// Serves until a signal comes through `stopping` and every running job has saved.
    pub(super) async fn run(
        mut self,
        mut sessions: mpsc::Receiver<Input>,
        mut asks: mpsc::Receiver<Ask>,
        mut stopping: mpsc::Receiver<&'static str>,
    ) -> anyhow::Result<()> {
        self.find_jobs_again()?;
        while !self.scheduler.is_shut_down() {
            let deadline = self.scheduler.next_deadline();
            let deadline = deadline.map_or(Duration::from_hours(24), Duration::from_millis);
            // What has arrived goes first, so that a coordinator that slept does not take its workers for silent.
            tokio::select! {
                biased;
                Some(signal) = stopping.recv() => {
                    let reason = signal.to_owned();
                    self.handle(SchedulerEvent::ShutdownRequested { reason })?;
                }
                Some(told) = self.told.recv() => self.hear_attempt(told)?,
                Some(input) = sessions.recv() => self.hear(input)?,
                Some(ask) = asks.recv() => self.answer(ask)?,
                () = sleep_until(TokioInstant::from_std(self.start + deadline)) => {
                    self.handle(SchedulerEvent::Tick)?;
                }
                else => anyhow::bail!("all who speak to the coordinator are gone"),
            }
        }
        Ok(())
    }

    /// Jobs of an earlier life of the coordinator wait in the queue again.
    fn find_jobs_again(&mut self) -> anyhow::Result<()> {
        for job in self.scheduler.jobs() {
            if !job.state.has_ended() {
                match read(&job.config_toml) {
                    Ok(config) => {
                        self.note(&Note {
                            kind: "queue",
                            text: format!("job {} was found again: {}", job.id, job.waiting),
                        });
                        self.live.insert(job.id, Live::new(config));
                    }
                    // Written by another version of the program, whose keys this one does not know.
                    Err(reason) => {
                        let reason =
                            format!("its configuration is not accepted any more: {reason}");
                        let id = job.id;
                        self.handle(SchedulerEvent::CancelRequested { id, reason })?;
                    }
                }
            }
        }
        Ok(())
    }

    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    fn handle(&mut self, event: SchedulerEvent) -> anyhow::Result<()> {
        let actions = self.scheduler.handle(self.now_ms(), event);
        self.execute(actions)
    }

    /// A session that no job has.
    fn hear(&mut self, input: Input) -> anyhow::Result<()> {
        match input {
            Input::Connected(session) => {
                let incarnation = session.incarnation;
                self.sessions.insert(incarnation, session.session);
                let join = None;
                self.waiting.insert(incarnation, Waiting { session, join });
                Ok(())
            }
            Input::Message(message) => self.message(*message),
            Input::Disconnected(incarnation, session) => {
                if self.sessions.get(&incarnation) != Some(&session) {
                    return Ok(()); // it has connected again
                }
                self.sessions.remove(&incarnation);
                self.waiting.remove(&incarnation);
                self.handle(SchedulerEvent::Gone { incarnation })
            }
            // Said by drivers' own shells, which speak to their drivers.
            Input::Job(_)
            | Input::Drain(..)
            | Input::Checkpoint(..)
            | Input::ChildExited(_)
            | Input::IsHere(..)
            | Input::StopRequested(_) => Ok(()),
        }
    }

    fn message(&mut self, message: FromWorker) -> anyhow::Result<()> {
        let incarnation = message.incarnation;
        match &message.message {
            WorkerMessage::Join(profile) => {
                let profile = profile.clone();
                let job = Some(message.job.clone()).filter(|id| !id.0.is_empty());
                if let Some(waiting) = self.waiting.get_mut(&incarnation) {
                    waiting.join = Some(message);
                }
                self.handle(SchedulerEvent::Joined {
                    incarnation,
                    profile,
                    job,
                })
            }
            WorkerMessage::Leave { reason } => {
                let reason = reason.clone();
                self.handle(SchedulerEvent::Leaving {
                    incarnation,
                    reason,
                })
            }
            _ => {
                if let Some(id) = self.scheduler.job_of(incarnation).cloned() {
                    // Said while its session was handed on.
                    self.pass_on(&id, vec![Input::Message(Box::new(message))]);
                    return Ok(());
                }
                // Otherwise said between its job's end and its session's; it waits for nothing here.
                // Who holds a job's state takes silence for a broken connection.
                let heard = CoordinatorMessage::Heard { committed: Step(0) };
                self.tell(incarnation, heard);
                self.handle(SchedulerEvent::Heard { incarnation })
            }
        }
    }

    /// Says something to a worker that waits here, which has no generation.
    fn tell(&self, incarnation: Incarnation, message: CoordinatorMessage) {
        let Some(waiting) = self.waiting.get(&incarnation) else {
            return;
        };
        let message = ToWorker {
            incarnation,
            fence: Fence(0),
            generation: Generation(0),
            message,
        };
        // One that does not read is noticed by its silence.
        drop(waiting.session.answers.try_send(Ok(message)));
    }

    fn hear_attempt(&mut self, told: Told) -> anyhow::Result<()> {
        match told {
            Told::Released(id, stands) => {
                self.stood.insert(id.clone(), stands);
                // The queue forgets the oldest of those that have ended.
                let known = self.scheduler.jobs().into_iter().map(|job| job.id);
                let known: BTreeSet<JobId> = known.collect();
                self.stood.retain(|id, _| known.contains(id));
                self.handle(SchedulerEvent::Released { id })
            }
            Told::Ended {
                id,
                outcome,
                committed,
            } => {
                if let Some(live) = self.live.get_mut(&id) {
                    live.inputs = None;
                }
                self.handle(SchedulerEvent::Ended {
                    id,
                    outcome,
                    committed,
                })
            }
        }
    }

    fn execute(&mut self, actions: Vec<SchedulerAction>) -> anyhow::Result<()> {
        for action in actions {
            match action {
                SchedulerAction::Journal(record) => self.jobs.journal(record)?,
                SchedulerAction::Start {
                    id,
                    workers,
                    holding,
                } => self.start(&id, &workers, holding)?,
                SchedulerAction::StopJob { id, reason } => {
                    self.pass_on(&id, vec![Input::StopRequested(reason)]);
                }
                SchedulerAction::Dismiss {
                    incarnation,
                    reason,
                    afterwards,
                } => {
                    self.tell(incarnation, CoordinatorMessage::Stop { reason, afterwards });
                    // Its session ends with this.
                    self.waiting.remove(&incarnation);
                }
                SchedulerAction::Lend { id, incarnation } => self.lend(&id, incarnation),
                SchedulerAction::Release {
                    id,
                    incarnation,
                    reason,
                } => self.pass_on(&id, vec![Input::Drain(incarnation, reason)]),
                SchedulerAction::Changed(id) => self.changed(&id),
                SchedulerAction::Note(note) => self.note(&note),
            }
        }
        Ok(())
    }

    /// Hands the sessions of `workers` to a new attempt of a job, which has a thread of its own.
    fn start(&mut self, id: &JobId, workers: &[Incarnation], holding: bool) -> anyhow::Result<()> {
        let live = self
            .live
            .get_mut(id)
            .context("a job without configuration starts")?;
        let (inputs, queue) = mpsc::channel(INPUTS_MAX.max(4 * workers.len()));
        live.inputs = Some(inputs.clone());
        let (config, feed) = (Arc::clone(&live.config), live.feed.clone());
        let metrics = self.metrics.clone();
        for incarnation in workers {
            self.lend(id, *incarnation);
        }
        let (tell, id) = (self.tell.clone(), id.clone());
        let runtime = Handle::current();
        std::thread::Builder::new()
            .name(format!("job {id}"))
            .spawn(move || {
                let _span = tracing::info_span!("job", name = %id).entered();
                let released =
                    |stands| drop(tell.blocking_send(Told::Released(id.clone(), stands)));
                let (outcome, committed) = attempt(
                    &config,
                    holding,
                    &feed,
                    metrics.as_ref(),
                    &inputs,
                    queue,
                    &runtime,
                    released,
                );
                // A hub that is gone has no queue any more.
                drop(tell.blocking_send(Told::Ended {
                    id,
                    outcome,
                    committed,
                }));
            })
            .context("start a job's thread")?;
        Ok(())
    }

    /// Hands a waiting worker's session to a job that runs.
    fn lend(&mut self, id: &JobId, incarnation: Incarnation) {
        let inputs = self.live.get(id).and_then(|live| live.inputs.clone());
        let (Some(inputs), Some(waiting)) = (inputs, self.waiting.remove(&incarnation)) else {
            return; // gone meanwhile
        };
        let Waiting { session, join } = waiting;
        let route = Route {
            job: id.0.clone(),
            inputs: inputs.clone(),
        };
        let over = Input::Disconnected(incarnation, session.session);
        let route_to = session.route.clone();
        let mut first = vec![Input::Connected(session)];
        if let Some(mut join) = join {
            join.job = id.clone();
            first.push(Input::Message(Box::new(join)));
        }
        // Only then may it speak there: a job takes who has not joined for somebody else's worker.
        if let Ok(places) = inputs.try_reserve_many(first.len()) {
            places
                .zip(first)
                .for_each(|(place, input)| place.send(input));
            if route_to.send(route).is_err() {
                // It ended meanwhile, and told nobody but this hub.
                self.pass_on(id, vec![over]);
            }
            return;
        }
        // Beside the loop: a driver that is busy may have a full queue.
        tokio::spawn(async move {
            for input in first {
                drop(inputs.send(input).await);
            }
            if route_to.send(route).is_err() {
                drop(inputs.send(over).await);
            }
        });
    }

    /// Tells a running job something, in this order. One that is gone has ended.
    fn pass_on(&self, id: &JobId, told: Vec<Input>) {
        let inputs = self.live.get(id).and_then(|live| live.inputs.clone());
        let Some(inputs) = inputs else { return };
        let mut told = told.into_iter();
        while let Some(input) = told.next() {
            if let Err(mpsc::error::TrySendError::Full(input)) = inputs.try_send(input) {
                // Beside the loop: a driver that is busy may have a full queue.
                tokio::spawn(async move {
                    for input in std::iter::once(input).chain(told) {
                        drop(inputs.send(input).await);
                    }
                });
                return;
            }
        }
    }

    /// Watchers hear where a job is; one that has ended is not watched any longer.
    fn changed(&mut self, id: &JobId) {
        let Some(job) = self.scheduler.job(id) else {
            return;
        };
        let Some(live) = self.live.get(id) else {
            return;
        };
        let running = job.state == JobSummaryState::Running;
        let ended = job.state.has_ended();
        if job.state == JobSummaryState::Cancelled && job.attempts > 0 {
            // Its attempts know only that they were to stop.
            let recorded = record_cancelled(&live.config.job.output, &job.waiting);
            if let Err(error) = recorded {
                tracing::warn!(
                    "job {id} was cancelled, and its summary does not say so: {error:#}"
                );
            }
        }
        if !running {
            live.feed
                .tell(Kind::Job(self.complete(wire::queued_job(job))));
        }
        if ended
            && let Some(live) = self.live.remove(id)
            && let Some(stood) = self.stood.get_mut(id)
        {
            stood.events = live.feed.notes();
        }
    }

    /// Adds what the queue does not know of a job.
    fn complete(&self, job: proto::Job) -> proto::Job {
        let id = JobId(job.name.clone());
        let mut job = match self.stood.get(&id) {
            Some(stood) => proto::Job {
                steps_total: stood.steps_total,
                last_row: stood.last_row,
                events: stood.events.clone(),
                objective: stood.objective.clone(),
                output: stood.output.clone(),
                ..job
            },
            None => job,
        };
        if let Some(live) = self.live.get(&id) {
            live.config.objective().clone_into(&mut job.objective);
            job.output = live.config.job.output.display().to_string();
            job.events = live.feed.notes();
        }
        job
    }

    fn note(&mut self, note: &Note) {
        match note.kind {
            "limit" | "lost" | "refuse" | "retry" | "wait" => {
                tracing::warn!(kind = note.kind, "{}", note.text);
            }
            _ => tracing::info!(kind = note.kind, "{}", note.text),
        }
        let event = feed::event(SystemTime::now(), note);
        if self.kept.len() == EVENTS_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(event.clone());
        // Without watchers nobody needs to know.
        drop(self.events.send(event));
    }
}

impl Live {
    fn new(config: Config) -> Self {
        Self {
            config: Arc::new(config),
            feed: Feed::new(),
            inputs: None,
        }
    }
}

/// Reads a submitted configuration. Its output lies below this coordinator's working directory, unless it is absolute.
fn read(config_toml: &str) -> Result<Config, String> {
    let sources = Sources {
        texts: vec![("the submitted configuration".into(), config_toml.to_owned())],
        ..Sources::default()
    };
    let mut config = Config::load_job(&sources).map_err(|error| error.to_string())?;
    for path in [&mut config.job.output, &mut config.checkpoint.path] {
        if storage::is_remote(path) {
            continue;
        }
        *path = absolute(&*path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(config)
}

/// One attempt of a job on its own thread: how it ended, and where it stands.
fn attempt(
    config: &Config,
    holding: bool,
    feed: &Feed,
    metrics: Option<&Metrics>,
    inputs: &mpsc::Sender<Input>,
    mut queue: mpsc::Receiver<Input>,
    runtime: &Handle,
    released: impl Fn(Box<proto::Job>),
) -> (Outcome, Step) {
    let mut committed = Step(0);
    let mut run = || {
        let mut attempt = Attempt::open(config, holding)?;
        committed = Step(attempt.resumed().unwrap_or(0));
        let driven = if let Some(driven) = attempt.completed() {
            driven
        } else {
            let mut console = Console::lines(Box::new(std::io::sink()));
            let driven = attempt.drive(
                &mut console,
                feed.clone(),
                metrics,
                inputs.clone(),
                &mut queue,
            );
            runtime.block_on(driven)?
        };
        committed = driven.committed;
        // Nobody listens any more: the workers' sessions end, and they come back for the next job.
        queue.close();
        while queue.try_recv().is_ok() {}
        released(Box::new(attempt.ended(&driven, feed.notes())));
        attempt.finish(&driven, "submit it again: coordinator submit")?;
        anyhow::Ok(driven.outcome)
    };
    let outcome = run().unwrap_or_else(|error| {
        let refused = error.downcast_ref::<AttemptError>();
        let cause = refused.map_or(Cause::Fatal, AttemptError::cause);
        let reason = format!("{error:#}");
        tracing::error!(job = config.job.name, "{reason}");
        feed.note(feed::event(
            SystemTime::now(),
            &Note {
                kind: "done",
                text: format!("failed: {reason}"),
            },
        ));
        Outcome::Failed { cause, reason }
    });
    (outcome, committed)
}
