//! A worker's life in one job: join, form, load, train, leave.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use collective::tcp::Rendezvous;
use collective::{Collective, CollectiveError, single};
use model::Device;
use protocol::{
    Afterwards, Awaits, Cause, CoordinatorMessage, Generation, Incarnation, RunFacts, Step,
    ToWorker, WIRE_VERSION, WorkerMessage, WorkerProfile,
};
use spec::{JobError, Spec};
use tokio::runtime::Handle;
use trainer::{End, Facts, Membership, Setup, TrainError, Trainer};

use crate::gate::{Gate, ProgressTeller};
use crate::memory::{self, MemoryError};
use crate::presence::Presence;
use crate::session::{Door, Session, SessionError};

/// Version that all members of a job must share.
pub(crate) const BUILD: &str = env!("CARGO_PKG_VERSION");

/// How long ranks wait for each other's connections; all of them were just formed.
const RENDEZVOUS_PATIENCE: Duration = Duration::from_mins(1);

/// How long one collective operation may take. The coordinator notices a dead or silent rank much sooner and stops the
/// others, which aborts their collectives; this bound only keeps a fault in that machinery from waiting for ever.
const COLLECTIVE_PATIENCE: Duration = Duration::from_hours(1);

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
    /// What people call it.
    pub name: String,
    /// How long it tries to reach its coordinator.
    pub patience: Duration,
    /// Whether the GPU has failed.
    #[cfg(feature = "cuda")]
    pub fault: crate::watch::Fault,
}

impl Options {
    /// Why this worker cannot go on after `error`: what the GPU says of itself, if it failed, else the error.
    #[cfg(feature = "cuda")]
    fn judge(&self, error: &AgentError) -> (Cause, String) {
        let may_be_its = self.device.is_gpu() && error.cause() != Cause::Config;
        let reason = if may_be_its {
            self.fault.reason_of(FAULT_PATIENCE)
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
    #[error("the training thread panicked: {0}")]
    Panicked(String),
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
    voice.say(WorkerMessage::Join(WorkerProfile {
        build: BUILD.into(),
        wire_version: WIRE_VERSION,
        address: rendezvous.address(),
        name: options.name.clone(),
        device: options.device_text.clone(),
    }))?;
    let (config_toml, checkpoint_dir, probe) = wait(session, |heard| match heard.message {
        CoordinatorMessage::Welcome {
            config_toml,
            checkpoint_dir,
            probe,
            ..
        } => Some((config_toml, checkpoint_dir, probe)),
        _ => None,
    })?;
    let spec = spec::parse(&config_toml)?;
    let checkpoint_dir = PathBuf::from(checkpoint_dir);
    same_disk(&checkpoint_dir, &probe, &options.name)?;
    voice.await_next(Awaits::Form);
    let form = wait(session, |heard| match heard.message {
        CoordinatorMessage::Form {
            rank,
            addresses,
            secret,
            committed,
            resume,
            ..
        } => Some(Formed {
            rank: rank.0,
            generation: heard.generation,
            addresses,
            secret,
            committed,
            resume: resume.map(PathBuf::from),
        }),
        _ => None,
    })?;
    voice.await_next(Awaits::Nothing);

    let collective = form.connect(&rendezvous)?;
    voice.enter(form.generation, Some(collective.aborter()));
    voice.know(form.committed);
    // A thread of its own: a panic in it is told to the coordinator instead of a silent death.
    std::thread::scope(|scope| {
        let training = std::thread::Builder::new().name("training".into());
        let training = training
            .spawn_scoped(scope, || {
                train(options, session, &spec, &form, collective, checkpoint_dir)
            })
            .map_err(|source| TrainError::Thread {
                thread: "training",
                source,
            })?;
        training
            .join()
            .unwrap_or_else(|panic| Err(AgentError::Panicked(words(&*panic))))
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

struct Formed {
    rank: u32,
    generation: Generation,
    addresses: Vec<String>,
    secret: [u8; 32],
    committed: Step,
    resume: Option<PathBuf>,
}

impl Formed {
    /// Workers on this one's machine, itself included: those with its IP address. Containers have one each, and memory of
    /// their own.
    fn neighbors(&self) -> usize {
        let host = |address: &str| address.rsplit_once(':').map(|(host, _)| host.to_owned());
        let own = host(&self.addresses[self.rank as usize]);
        let all = self.addresses.iter();
        all.filter(|address| host(address) == own).count()
    }

    fn connect(&self, rendezvous: &Rendezvous) -> Result<Box<dyn Collective>, CollectiveError> {
        if self.addresses.len() == 1 {
            return Ok(Box::new(single(self.generation.0)));
        }
        let deadline = Instant::now() + RENDEZVOUS_PATIENCE;
        let tcp = rendezvous.connect(
            self.rank as usize,
            &self.addresses,
            self.generation.0,
            self.secret,
            deadline,
        )?;
        Ok(Box::new(tcp))
    }
}

fn train(
    options: &Options,
    session: &mut Session,
    spec: &Spec,
    form: &Formed,
    collective: Box<dyn Collective>,
    checkpoints: PathBuf,
) -> Result<(), AgentError> {
    let voice = session.voice().clone();
    let mut teller = ProgressTeller::new(voice.clone());
    let mut progress = |phase: &str, done, total| {
        teller.tell(phase, done, total);
        Ok(())
    };
    let world = form.addresses.len();
    let setup = Setup::load(spec, &options.device, world, &mut progress)?;
    if form.rank == 0 {
        let notes = setup.notes().iter().map(|note| format!("{note}\n"));
        let text = notes.collect::<String>() + &setup.reports().to_string();
        voice.say(WorkerMessage::DataReport { text })?;
        // The export is made where the coordinator runs, which may not see the model's folder.
        setup.keep_source(&checkpoints)?;
    }
    if options.device == Device::flex() {
        memory::check(&setup, form.addresses.len(), form.neighbors())?;
    }
    let facts = setup.facts();
    let membership = Membership {
        collective,
        step_deadline: COLLECTIVE_PATIENCE,
        checkpoints,
        resume: form.resume.clone(),
        mirror: false,
        pulse: Arc::default(),
        generation: form.generation.0,
    };
    let (trainer, counts) = Trainer::new(setup, membership, &mut progress)?;
    voice.say(WorkerMessage::Ready {
        facts: to_protocol(facts, trainer.committed()),
        reference_reused: counts.reused,
        reference_computed: counts.computed,
    })?;
    let mut gate = Gate::new(session, form.rank);
    match trainer.run(&mut gate)? {
        End::Finished => Ok(()),
        End::Stopped => Err(SessionError::Stopped {
            reason: "the job stops here".into(),
            afterwards: Afterwards::Rejoin,
        }
        .into()),
    }
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
            Self::Session(_) | Self::Collective(_) => Cause::Temporary,
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
