//! A worker's life in one job: join, form, load, train, leave.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use collective::CollectiveError;
use collective::tcp::Rendezvous;
use model::Device;
use protocol::{
    Afterwards, Awaits, Cause, CoordinatorMessage, Generation, Incarnation, RunFacts, ToWorker,
    WIRE_VERSION, WorkerMessage, WorkerProfile,
};
use spec::{JobError, Spec};
use tokio::runtime::Handle;
use trainer::plan::Peers;
use trainer::{End, Facts, GateClosed, Membership, Setup, TrainError, Trainer};

use crate::entrance::{Entrance, Formed, accuse};
use crate::gate::{Gate, ProgressTeller};
use crate::memory::{self, MemoryError};
use crate::presence::Presence;
use crate::session::{Door, Session, SessionError};
use crate::transport::Transport;
use crate::watched::Watched;

/// Version that all members of a job must share.
pub(crate) const BUILD: &str = env!("CARGO_PKG_VERSION");

/// As many workers as a job may have and more.
const MANY: usize = 1 << 12;
/// How much later than an error the GPU's own word about it may come.
#[cfg(feature = "cuda")]
const FAULT_PATIENCE: Duration = Duration::from_secs(1);

/// What a worker needs to take part in jobs.
pub(crate) struct Options {
    pub door: Door,
    pub device: Device,
    /// What it computes on, in words.
    pub device_text: String,
    /// Where the other ranks reach this one.
    pub listen: IpAddr,
    /// What they can reduce over.
    pub transport: Transport,
    /// What people call it.
    pub name: String,
    /// How long it tries to reach its coordinator.
    pub patience: Duration,
    /// How its GPU fares, and whether it has failed.
    pub gpu: Watched,
}

impl Options {
    /// Why this worker cannot go on after `error`: what the GPU says of itself, if it failed, else the error.
    #[cfg(feature = "cuda")]
    fn judge(&self, error: &AgentError) -> (Cause, String) {
        let may_be_its = self.device.is_gpu() && error.cause() != Cause::Config;
        let reason = if may_be_its {
            self.gpu.reason_of(FAULT_PATIENCE)
        } else {
            None
        };
        match reason {
            Some(reason) => (Cause::Temporary, format!("{reason} ({error})")),
            None => (error.cause(), error.to_string()),
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[allow(clippy::unused_self, reason = "as with the feature")]
    fn judge(&self, error: &AgentError) -> (Cause, String) {
        (error.cause(), error.to_string())
    }
}

/// How a job ended for this worker.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The job is done, or interrupted with its state saved.
    Finished,
    /// The coordinator said so, or is gone.
    Left(SessionError),
    /// This worker could not go on, and said so.
    Failed { cause: Cause, reason: String },
}

#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error(transparent)]
    Closed(#[from] GateClosed),
    #[error("the training thread panicked: {0}")]
    Panicked(String),
    #[error("the GPU does not answer any more: {0}")]
    Device(String),
    #[error(
        "checkpoint.path: {folder} on {worker} is not the coordinator's folder ({reason}); all workers and the coordinator must \
         see one folder under this path, such as a network file system: set job.output or checkpoint.path to one"
    )]
    OtherDisk {
        folder: String,
        worker: String,
        reason: String,
    },
}

/// Takes part in one job from Join to its end.
pub(crate) fn serve(options: &Options, presence: &Presence, runtime: &Handle) -> Ending {
    let incarnation = match incarnation() {
        Ok(incarnation) => incarnation,
        Err(reason) => {
            return Ending::Failed {
                cause: Cause::Fatal,
                reason,
            };
        }
    };
    let session = Session::open(runtime, &options.door, incarnation, options.patience);
    let mut session = match session {
        Ok(session) => session,
        Err(error) => return Ending::Left(error),
    };
    let _present = presence.enter(session.voice());
    let result = take_part(options, &mut session);
    // An error that follows from the session's end is not this worker's own.
    if let (Err(_), Some(error)) = (&result, session.over()) {
        return Ending::Left(error);
    }
    let ending = match result {
        Ok(()) => {
            drop(session.voice().say(WorkerMessage::Finished));
            Ending::Finished
        }
        Err(error) => {
            let (cause, reason) = options.judge(&error);
            let failed = WorkerMessage::Failed {
                cause,
                reason: reason.clone(),
            };
            drop(session.voice().say(failed));
            Ending::Failed { cause, reason }
        }
    };
    session.flush();
    ending
}

fn take_part(options: &Options, session: &mut Session) -> Result<(), AgentError> {
    let rendezvous = Rendezvous::bind(options.listen)?;
    let voice = session.voice().clone();
    let profile = WorkerProfile {
        build: BUILD.into(),
        wire_version: WIRE_VERSION,
        address: rendezvous.address(),
        name: options.name.clone(),
        device: options.device_text.clone(),
    };
    voice.say(WorkerMessage::Join(profile.clone()))?;
    let welcome = wait(session, |heard| match heard.message {
        CoordinatorMessage::Welcome {
            config_toml,
            checkpoint_dir,
            probe,
            terms,
            ..
        } => Some((config_toml, checkpoint_dir, probe, terms)),
        _ => None,
    })?;
    let (config_toml, checkpoint_dir, probe, terms) = welcome;
    voice.outlive(profile, terms);
    let spec = spec::parse(&config_toml)?;
    let checkpoints = PathBuf::from(checkpoint_dir);
    same_disk(&checkpoints, &probe, &options.name)?;
    let entrance = Entrance {
        rendezvous: &rendezvous,
        transport: &options.transport,
        gpu: &options.gpu,
        checkpoints,
        terms,
        workers_min: AtomicU32::new(0),
    };
    // A thread of its own: a panic in it is told to the coordinator instead of a silent death.
    std::thread::scope(|scope| {
        let training = std::thread::Builder::new().name("training".into());
        let training = training
            .spawn_scoped(scope, || train(options, session, &spec, &entrance))
            .map_err(|source| TrainError::Thread {
                thread: "training",
                source,
            })?;
        training.join().unwrap_or_else(|panic| {
            let words = words(&*panic);
            Err(if options.device.answers() {
                AgentError::Panicked(words)
            } else {
                AgentError::Device(words)
            })
        })
    })
}

/// Looks for the file that the coordinator left where checkpoints go, and whether one can be left beside it.
fn same_disk(folder: &Path, probe: &str, worker: &str) -> Result<(), AgentError> {
    if probe.is_empty() {
        return Ok(());
    }
    let other = |reason: String| AgentError::OtherDisk {
        folder: folder.display().to_string(),
        worker: worker.into(),
        reason,
    };
    let left = folder.join(probe);
    if !left.exists() {
        return Err(other(format!("{} is not there", left.display())));
    }
    let own = folder.join(format!("{probe}-{worker}"));
    std::fs::write(&own, b"the worker can write here\n")
        .and_then(|()| std::fs::remove_file(&own))
        .map_err(|error| other(format!("write {}: {error}", own.display())))
}

/// Trains through one generation after another, from the first one that begins with this worker in it.
fn train(
    options: &Options,
    session: &mut Session,
    spec: &Spec,
    entrance: &Entrance<'_>,
) -> Result<(), AgentError> {
    let mut loaded: Option<Setup> = None;
    let mut place: Option<(Formed, Membership)> = None;
    loop {
        let (form, membership) = if let Some(place) = place.take() {
            place
        } else {
            if session.voice().is_spare() && loaded.is_none() {
                // It loads before it is admitted, so that the others need not wait for that.
                session.voice().await_next(Awaits::Form);
                let held = Vec::new();
                let workers_min = 0;
                session
                    .voice()
                    .say(WorkerMessage::Held { held, workers_min })?;
                // It may become one of any number: what has no room among many has none at all, and `prepare` sees how many.
                let peers = entrance.peers(MANY);
                let setup = load(options, session, spec, peers, None)?;
                entrance.learn_room(setup.workers_min(peers)?);
                loaded = Some(setup);
            }
            let found = loaded.as_ref().map(|it| to_protocol(it.facts(), 0));
            match entrance.enter(session, &[], found.as_ref()) {
                Ok((form, collective)) => {
                    let membership = entrance.membership(session, &form, collective);
                    (form, membership)
                }
                // It was put out before it had loaded, and is a spare since.
                Err(_) if session.voice().is_spare() && loaded.is_none() => continue,
                Err(error) => return Err(error.into()),
            }
        };
        let (generation, rank) = (form.generation, form.rank);
        let trainer = prepare(
            options,
            session,
            spec,
            entrance,
            form,
            membership,
            loaded.take(),
        );
        let result = trainer.and_then(|(trainer, ready)| {
            session.voice().say(ready.clone())?;
            let mut gate = Gate::new(session, entrance, generation, rank, ready);
            // Until it begins nothing is lost with a trainer, and the next generation may want another part of the reference.
            gate.begin()?;
            let end = trainer.run(&mut gate);
            place = gate.anew();
            Ok(end?)
        });
        match result {
            Ok(End::Finished) => return Ok(()),
            Ok(End::Stopped) => {
                return Err(SessionError::Stopped {
                    reason: "the job stops here".into(),
                    afterwards: Afterwards::Rejoin,
                }
                .into());
            }
            Err(error) => {
                let interrupted = match &error {
                    AgentError::Train(TrainError::Collective(broken)) => {
                        if place.is_none() {
                            accuse(session, broken);
                        }
                        true
                    }
                    AgentError::Closed(_) | AgentError::Train(TrainError::Closed(_)) => true,
                    _ => false,
                };
                if !interrupted || session.over().is_some() {
                    return Err(error);
                }
                tracing::info!("generation {generation} is over: {error}");
            }
        }
    }
}

/// Reads model and data.
fn load(
    options: &Options,
    session: &Session,
    spec: &Spec,
    peers: Peers,
    generation: Option<Generation>,
) -> Result<Setup, AgentError> {
    let voice = session.voice();
    let mut teller = ProgressTeller::new(voice.clone());
    let setup = Setup::load(spec, &options.device, peers, &mut |phase, done, total| {
        teller.tell(phase, done, total);
        voice.check(generation)
    });
    Ok(setup?)
}

/// Loads what is not loaded, and gets a trainer to where the generation begins; what it then says.
fn prepare(
    options: &Options,
    session: &Session,
    spec: &Spec,
    entrance: &Entrance<'_>,
    form: Formed,
    membership: Membership,
    loaded: Option<Setup>,
) -> Result<(Trainer, WorkerMessage), AgentError> {
    let voice = session.voice();
    let generation = Some(form.generation);
    let peers = entrance.peers(form.addresses.len());
    let setup = if let Some(setup) = loaded {
        setup.check_room(peers)?;
        setup
    } else {
        load(options, session, spec, peers, generation)?
    };
    if form.rank == 0 {
        let notes = setup.notes().iter().map(|note| format!("{note}\n"));
        let text = notes.collect::<String>() + &setup.reports().to_string();
        voice.say(WorkerMessage::DataReport { text })?;
        // The export is made where the coordinator runs, which may not see the model's folder.
        setup.keep_source(&entrance.checkpoints)?;
    }
    if options.device == Device::flex() {
        memory::check(&setup, peers.workers, form.neighbors(), peers.sharding)?;
    }
    entrance.learn_room(setup.workers_min(peers)?);
    let facts = setup.facts();
    let mut teller = ProgressTeller::new(voice.clone());
    let reformation = form.reformation(membership);
    let (trainer, counts) = Trainer::join(setup, reformation, &mut |phase, done, total| {
        teller.tell(phase, done, total);
        voice.check(generation)
    })?;
    let ready = WorkerMessage::Ready {
        facts: to_protocol(facts, trainer.committed()),
        reference_reused: counts.reused,
        reference_computed: counts.computed,
        workers_min: entrance.workers_min(),
    };
    Ok((trainer, ready))
}

/// The first message that `wanted` takes.
fn wait<T>(session: &Session, wanted: impl Fn(ToWorker) -> Option<T>) -> Result<T, SessionError> {
    loop {
        let heard = session.hear(Duration::from_secs(1))?;
        if let Some(answer) = heard.and_then(&wanted) {
            return Ok(answer);
        }
    }
}

fn to_protocol(facts: Facts, committed: u64) -> RunFacts {
    RunFacts {
        steps_total: facts.steps_total,
        pairs: facts.pairs,
        eval_pairs: facts.eval_pairs,
        parameters: facts.parameters,
        model_digest: facts.model_digest,
        tokenizer_digest: facts.tokenizer_digest,
        data_digest: facts.data_digest,
        committed,
    }
}

/// A number that no other life of any worker has.
fn incarnation() -> Result<Incarnation, String> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| format!("read random bytes: {error}"))?;
    // 0 would read as "unset" on the wire.
    Ok(Incarnation(u64::from_le_bytes(bytes).max(1)))
}

impl AgentError {
    fn cause(&self) -> Cause {
        match self {
            Self::Job(_) | Self::OtherDisk { .. } | Self::Memory(_) => Cause::Config,
            Self::Session(_) | Self::Collective(_) | Self::Closed(_) | Self::Device(_) => {
                Cause::Temporary
            }
            Self::Panicked(_) => Cause::Fatal,
            Self::Train(error) => match error.cause() {
                trainer::Cause::Config => Cause::Config,
                trainer::Cause::Temporary => Cause::Temporary,
                trainer::Cause::Fatal => Cause::Fatal,
            },
        }
    }
}

/// What a panic said.
fn words(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a message")
        .to_owned()
}
