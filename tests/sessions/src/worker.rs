//! One worker's session, as the worker program holds it: the same messages in the same order, without a model behind them.
//!
//! It says Join, Held, Ready and its votes, repeats what was not answered for two seconds, and beats twice a second. What it
//! would compute takes no time: the reports are made up, and alike on all ranks. It saves nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use protocol::{
    Activity, Awaits, CoordinatorMessage, FromWorker, Generation, Held, Incarnation, JobId, Phases,
    Rank, RunFacts, Statistics, Step, StepReport, ToWorker, WIRE_VERSION, Work, WorkerMessage,
    WorkerProfile,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant as TokioInstant, MissedTickBehavior, interval_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};
use wire::proto;
use wire::proto::workers_client::WorkersClient;

use crate::board::Board;

/// Between two beats, as of the worker program.
const BEAT: Duration = Duration::from_millis(500);

/// What was not answered is said again after this time.
const REPEAT: Duration = Duration::from_secs(2);

/// Messages that wait for the network.
const OUTGOING_MESSAGES_MAX: usize = 64;

/// Beats without an answer that make a session count as unheard: the silence after which a worker connects again.
const UNANSWERED_MAX: usize = 20;

/// What all workers are told to do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Orders {
    /// Say Join.
    pub(crate) join: bool,
    /// Vote as soon as there is something to vote on; otherwise steps take for ever.
    pub(crate) step: bool,
}

/// A connected session before its first word.
pub(crate) struct Session {
    outgoing: mpsc::Sender<proto::FromWorker>,
    incoming: Streaming<proto::ToWorker>,
}

/// Connects to a coordinator with the worker program's options.
pub(crate) async fn connect(url: &str) -> anyhow::Result<Channel> {
    let keepalive = Duration::from_secs(10);
    let endpoint = Endpoint::from_shared(url.to_owned())?
        .connect_timeout(Duration::from_secs(30))
        .http2_keep_alive_interval(keepalive)
        .keep_alive_timeout(keepalive)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true);
    endpoint.connect().await.context("connect a worker")
}

impl Session {
    /// Opens a stream.
    pub(crate) async fn open(channel: Channel) -> anyhow::Result<Self> {
        let (outgoing, queue) = mpsc::channel(OUTGOING_MESSAGES_MAX);
        let mut client = WorkersClient::new(channel);
        let incoming = client.session(ReceiverStream::new(queue)).await;
        let incoming = incoming.context("open a session")?.into_inner();
        Ok(Self { outgoing, incoming })
    }

    /// Says something, in no generation.
    pub(crate) async fn say(
        &self,
        incarnation: Incarnation,
        message: WorkerMessage,
    ) -> anyhow::Result<()> {
        let message = FromWorker {
            job: JobId::default(),
            incarnation,
            generation: Generation(0),
            message,
        };
        let said = self.outgoing.send(message.into()).await;
        said.context("speak in a session")
    }

    /// The next message; `None` at the end.
    pub(crate) async fn hear(&mut self) -> anyhow::Result<Option<CoordinatorMessage>> {
        let message = self.incoming.message().await.context("hear")?;
        message
            .map(|it| Ok(ToWorker::try_from(it)?.message))
            .transpose()
    }
}

/// What a worker of that name says of itself.
pub(crate) fn profile(name: String, number: usize) -> WorkerProfile {
    WorkerProfile {
        build: env!("CARGO_PKG_VERSION").into(),
        wire_version: WIRE_VERSION,
        // Nobody connects there; told apart for the coordinator's books.
        address: format!("127.0.0.1:{}", 1 + number % 65535),
        name,
        device: "cpu, 1 thread".into(),
    }
}

/// One worker.
pub(crate) struct Worker {
    number: usize,
    board: Arc<Board>,
    outgoing: mpsc::Sender<proto::FromWorker>,
    job: JobId,
    generation: Generation,
    committed: Step,
    awaits: Awaits,
    /// The complete cut that it holds, and the one that becomes complete with Go.
    held: Option<Held>,
    cut: Option<Held>,
    /// Said last and not answered, and when.
    unanswered: Option<(WorkerMessage, Instant)>,
    /// The step that it is to vote on.
    turn: Option<Step>,
    progress: u64,
    /// When the beats were said that have no answer yet.
    beats: VecDeque<Instant>,
}

impl Worker {
    /// Runs until the stream ends, which is an error, as is whatever a healthy coordinator never says. `spread` is the worker's
    /// place in the beat, from 0 to 1.
    pub(crate) async fn run(
        number: usize,
        spread: f64,
        session: Session,
        board: Arc<Board>,
        mut orders: watch::Receiver<Orders>,
    ) -> anyhow::Result<()> {
        let Session {
            outgoing,
            mut incoming,
        } = session;
        let mut worker = Self {
            number,
            board,
            outgoing,
            job: JobId::default(),
            generation: Generation(0),
            committed: Step(0),
            awaits: Awaits::Form,
            held: None,
            cut: None,
            unanswered: None,
            turn: None,
            progress: 0,
            beats: VecDeque::new(),
        };
        orders.wait_for(|it| it.join).await?;
        let join = WorkerMessage::Join(profile(format!("worker-{number:05}"), number));
        worker.say(join)?;
        worker.board.joined();
        let mut ticks = interval_at(TokioInstant::now() + BEAT.mul_f64(spread), BEAT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                _ = ticks.tick() => worker.beat()?,
                message = incoming.message() => {
                    let message = message.context("hear")?.context("the coordinator ended the session")?;
                    worker.hear(ToWorker::try_from(message)?)?;
                }
                changed = orders.changed() => changed?,
            }
            if orders.borrow().step {
                worker.vote()?;
            }
        }
    }

    fn say(&self, message: WorkerMessage) -> anyhow::Result<()> {
        let message = FromWorker {
            job: self.job.clone(),
            // Not 0; ranks follow the order of incarnations.
            incarnation: Incarnation(self.number as u64 + 1),
            generation: self.generation,
            message,
        };
        // A step sends a handful: a full queue means that the network has stood still for seconds.
        let said = self.outgoing.try_send(message.into());
        said.context("speak in a session")
    }

    /// Says what is to be answered, again if it is not.
    fn ask(&mut self, message: WorkerMessage, awaits: Awaits) -> anyhow::Result<()> {
        self.say(message.clone())?;
        self.unanswered = Some((message, Instant::now()));
        self.awaits = awaits;
        Ok(())
    }

    fn beat(&mut self) -> anyhow::Result<()> {
        if self.beats.len() >= UNANSWERED_MAX {
            bail!("{UNANSWERED_MAX} beats were not answered");
        }
        if let Some((message, at)) = &mut self.unanswered
            && at.elapsed() >= REPEAT
        {
            *at = Instant::now();
            let message = message.clone();
            self.say(message)?;
        }
        self.progress += 1;
        self.beats.push_back(Instant::now());
        self.say(WorkerMessage::Beat {
            committed: self.committed,
            awaits: self.awaits,
            activity: Activity {
                step: self.turn.unwrap_or_default(),
                work: match self.turn {
                    Some(_) => Work::Computes,
                    None => Work::Waits,
                },
                progress: self.progress,
            },
        })
    }

    /// The oldest beat is answered: by Heard, or by what this worker lacked, said again.
    fn answered(&mut self) {
        if let Some(at) = self.beats.pop_front() {
            self.board.heard(at.elapsed());
        }
    }

    fn hear(&mut self, heard: ToWorker) -> anyhow::Result<()> {
        let generation = heard.generation;
        match heard.message {
            CoordinatorMessage::Welcome { spare, job, .. } => {
                if spare {
                    bail!("welcomed as a spare");
                }
                self.job = job;
                self.leave()?;
            }
            CoordinatorMessage::Abort { .. } if self.awaits == Awaits::Form => self.answered(),
            CoordinatorMessage::Abort { .. } => {
                self.generation = self.generation.max(generation);
                (self.cut, self.turn) = (None, None);
                self.leave()?;
            }
            CoordinatorMessage::Form {
                rank,
                addresses,
                committed,
                ..
            } if generation > self.generation => {
                self.form(generation, rank, addresses.len(), committed)?;
            }
            CoordinatorMessage::Go { step, .. }
                if generation == self.generation && self.awaits == Awaits::Go =>
            {
                self.held = self.cut.take().or(self.held);
                // While a session is handed on an answer may be lost: what is counted from here on has one each.
                self.beats.clear();
                self.begin(step);
                self.board.gone(generation.0);
            }
            CoordinatorMessage::Commit { step, .. }
                if generation == self.generation && self.awaits == Awaits::Commit =>
            {
                if step == self.committed.next() {
                    self.know(step);
                    self.begin(step.next());
                    self.board.committed(step.0);
                } else {
                    self.answered();
                }
            }
            // The others are said again.
            CoordinatorMessage::Heard { .. }
            | CoordinatorMessage::Form { .. }
            | CoordinatorMessage::Go { .. }
            | CoordinatorMessage::Commit { .. } => self.answered(),
            other => bail!("heard {other:?} in generation {}", self.generation),
        }
        Ok(())
    }

    /// It is in no generation, and says what it holds.
    fn leave(&mut self) -> anyhow::Result<()> {
        let held = WorkerMessage::Held {
            held: self.held.into_iter().collect(),
            workers_min: 0,
        };
        self.ask(held, Awaits::Form)
    }

    fn form(
        &mut self,
        generation: Generation,
        rank: Rank,
        world: usize,
        committed: Step,
    ) -> anyhow::Result<()> {
        self.generation = generation;
        self.know(committed);
        self.cut = Some(Held {
            generation,
            rank,
            world: world as u32,
            applied: committed,
            gradient: false,
        });
        self.board.formed(generation.0);
        let ready = WorkerMessage::Ready {
            facts: RunFacts {
                steps_total: u64::from(u32::MAX),
                pairs: 1000,
                eval_pairs: 0,
                parameters: 1000,
                model_digest: "00".into(),
                tokenizer_digest: "00".into(),
                data_digest: "00".into(),
                committed: committed.0,
            },
            reference_reused: 1,
            reference_computed: 0,
            workers_min: 0,
        };
        self.ask(ready, Awaits::Go)
    }

    /// What it holds is rolled forward.
    fn know(&mut self, committed: Step) {
        self.committed = committed;
        if let Some(held) = &mut self.held {
            held.applied = committed;
            held.gradient = false;
        }
    }

    fn begin(&mut self, step: Step) {
        self.unanswered = None;
        self.awaits = Awaits::Nothing;
        self.turn = Some(step);
    }

    /// Votes on its step, if it has one.
    fn vote(&mut self) -> anyhow::Result<()> {
        let Some(step) = self.turn.take() else {
            return Ok(());
        };
        if let Some(held) = &mut self.held {
            held.gradient = true;
        }
        let report = StepReport {
            step: step.0,
            epoch: 0,
            finite: true,
            statistics: Statistics {
                loss: 0.5,
                loss_pairwise: 0.25,
                loss_calibration: 0.25,
                rewards_chosen: 0.5,
                rewards_rejected: -0.5,
                rewards_margins: 1.0,
                rewards_accuracies: 0.75,
                log_ratios_chosen: 5.0,
                log_ratios_rejected: -5.0,
                logps_chosen: -50.0,
                logps_rejected: -60.0,
            },
            grad_norm: 1.0,
            learning_rate: 1e-3,
            tokens: 2048,
            pairs: 24,
        };
        let phases = Phases {
            forward: 0.01,
            backward: 0.02,
            ..Phases::default()
        };
        self.ask(
            WorkerMessage::Prepared {
                report,
                gpu: protocol::GpuFigures::default(),
                phases,
            },
            Awaits::Commit,
        )
    }
}
