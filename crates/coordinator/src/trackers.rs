//! Trackers: a run's rows as files of TensorBoard, Weights & Biases and MLflow, for people who compare runs there.
//!
//! A tracker is a projection of the committed rows, as `metrics.jsonl` is: when it is opened it reads how far its files
//! reach, is given what is missing, and a rewind takes later steps out of it again. So a tracker may be added in the middle
//! of a run or after its end, a crash between commit and write costs nothing, and the same command on a finished run adds
//! nothing. Names are those of `metrics.jsonl`, for held-out pairs with `eval/` before them.
//!
//! They write on a thread of their own, from a bounded queue. One that cannot write, or a disk that hangs, is a warning, and
//! training goes on; the next start catches up. No network is used: `wandb sync` and `mlflow migrate-filestore` carry the
//! files on.
//!
//! ```text
//! <output>/trackers.json                    this run's id in all of them
//! <tensorboard_folder>/events.out.tfevents.SECONDS.caldpo.ID.NUMBER      one a start            (tensorboard)
//! <wandb_folder>/offline-run-DATE_TIME-ID/run-ID.wandb                   what `wandb sync` reads (wandb)
//! <mlflow_folder>/EXPERIMENT/ID/            metrics, params, tags, artifacts                    (mlflow)
//! ```

mod description;
mod entry;
mod files;
mod mlflow;
mod tensorboard;
mod wandb;

use std::{
    io,
    path::PathBuf,
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel},
    time::{Duration, SystemTime},
};

use protocol::Outcome;
use storage::FileError;

use crate::config::{Config, TelemetrySection, TrackerKind};

pub use description::Description;
pub use entry::{Entry, Position};
use mlflow::Mlflow;
use tensorboard::TensorBoard;
use wandb::Wandb;

/// Entries that wait for a disk. More than that is hours behind; the next start catches up.
const QUEUE_MAX: usize = 4096;
/// How long the end of a run waits for the last entries to be written.
const FINISH_PATIENCE: Duration = Duration::from_secs(10);

/// Commands that show what the configured trackers write.
pub fn commands(telemetry: &TelemetrySection) -> Vec<String> {
    let command = |kind: &TrackerKind| match kind {
        TrackerKind::TensorBoard => {
            let folder = telemetry.tensorboard_folder.display();
            format!("tensorboard --logdir {folder}")
        }
        TrackerKind::Wandb => {
            format!(
                "wandb sync {}/offline-run-*",
                telemetry.wandb_folder.display()
            )
        }
        TrackerKind::Mlflow => {
            let folder = telemetry.mlflow_folder.display();
            format!("MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {folder}")
        }
    };
    telemetry.trackers.iter().map(command).collect()
}

/// An entry of the past, with the time it is shown at.
pub type Past = Vec<(SystemTime, Entry)>;

/// Why a tracker does not write.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// A file or folder that cannot be read.
    #[error("read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// A file or folder that cannot be written.
    #[error(transparent)]
    Write(#[from] FileError),
    /// A folder or file whose content is not this run's, or not of the format.
    #[error("{path} {reason}")]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
}

/// One program's files.
trait Tracker {
    /// The last entry up to which its files have all.
    fn position(&self) -> Position;

    /// Adds an entry behind [`Tracker::position`]. What is there of it already stays as it is.
    fn record(&mut self, at: SystemTime, entry: &Entry) -> Result<(), TrackerError>;

    /// Takes out all entries of steps after `to`, where there are any.
    fn rewind(&mut self, at: SystemTime, to: u64) -> Result<(), TrackerError>;

    /// The run ended, for now.
    fn end(&mut self, at: SystemTime, outcome: &Outcome) -> Result<(), TrackerError>;
}

#[allow(clippy::large_enum_variant, reason = "nearly all messages are records")]
enum Message {
    Record(SystemTime, Entry),
    Rewind(SystemTime, u64),
    End(SystemTime, Outcome),
}

/// A run's trackers, at work on a thread.
pub struct Trackers {
    /// `None` once they are too far behind.
    queue: Option<SyncSender<Message>>,
    /// Closes when the thread is done.
    done: Receiver<()>,
}

impl Trackers {
    /// Starts those that `config` names and gives them what they lack of `past`; entries behind `committed`, the step that
    /// the run goes on from, are taken out of them. `None` where it names none.
    pub fn start(config: &Config, past: Past, committed: u64) -> Option<Self> {
        let kinds = config.telemetry.trackers.clone();
        if kinds.is_empty() {
            return None;
        }
        let (queue, messages) = sync_channel(QUEUE_MAX);
        let (working, done) = channel::<()>();
        let config = config.clone();
        let thread = std::thread::Builder::new().name("trackers".into());
        let spawned = thread.spawn(move || {
            let _working = working;
            let description = match Description::of(&config) {
                Ok(description) => description,
                Err(error) => return tracing::warn!("no tracker writes: {error}"),
            };
            let mut tracked: Vec<Tracked> = kinds
                .iter()
                .map(|kind| Tracked::open(*kind, &description, committed))
                .collect();
            for (at, entry) in &past {
                for it in &mut tracked {
                    it.record(*at, entry);
                }
            }
            drop(past);
            for message in messages {
                for it in &mut tracked {
                    match &message {
                        Message::Record(at, entry) => it.record(*at, entry),
                        Message::Rewind(at, to) => it.rewind(*at, *to),
                        Message::End(at, outcome) => it.end(*at, outcome),
                    }
                }
            }
        });
        match spawned {
            Ok(_) => Some(Self {
                queue: Some(queue),
                done,
            }),
            Err(error) => {
                tracing::warn!("no tracker writes: start their thread: {error}");
                None
            }
        }
    }

    /// A committed step or an evaluation. One that is in their files already is passed over.
    pub fn record(&mut self, at: SystemTime, entry: Entry) {
        self.send(Message::Record(at, entry));
    }

    /// Steps after `to` no longer count.
    pub fn rewind(&mut self, at: SystemTime, to: u64) {
        self.send(Message::Rewind(at, to));
    }

    /// The run ended, for now. Returns when all is written, or after [`FINISH_PATIENCE`].
    pub fn finish(mut self, at: SystemTime, outcome: &Outcome) {
        self.send(Message::End(at, outcome.clone()));
        self.queue = None;
        if self.done.recv_timeout(FINISH_PATIENCE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(
                "trackers are still writing after {} s and are left behind; the same command catches up",
                FINISH_PATIENCE.as_secs()
            );
        }
    }

    fn send(&mut self, message: Message) {
        let Some(queue) = &self.queue else { return };
        // The thread takes messages for as long as there may be any, so only a full queue is refused.
        if queue.try_send(message).is_err() {
            tracing::warn!(
                "trackers are {QUEUE_MAX} entries behind and get no more; the next start of this run catches up"
            );
            self.queue = None;
        }
    }
}

/// A tracker that writes, or gave up with a warning.
struct Tracked {
    kind: TrackerKind,
    tracker: Option<Box<dyn Tracker>>,
}

impl Tracked {
    fn open(kind: TrackerKind, description: &Description, committed: u64) -> Self {
        let opened: Result<Box<dyn Tracker>, _> = match kind {
            TrackerKind::TensorBoard => TensorBoard::open(description).map(|it| Box::new(it) as _),
            TrackerKind::Wandb => Wandb::open(description).map(|it| Box::new(it) as _),
            TrackerKind::Mlflow => Mlflow::open(description).map(|it| Box::new(it) as _),
        };
        let mut tracked = Self {
            kind,
            tracker: None,
        };
        match opened {
            Ok(tracker) => tracked.tracker = Some(tracker),
            Err(error) => tracked.give_up(&error),
        }
        // A rewind that was journaled may not have reached it.
        tracked.rewind(SystemTime::now(), committed);
        tracked
    }

    fn record(&mut self, at: SystemTime, entry: &Entry) {
        self.attempt(|tracker| {
            if entry.position() <= tracker.position() {
                return Ok(());
            }
            tracker.record(at, entry)
        });
    }

    fn rewind(&mut self, at: SystemTime, to: u64) {
        self.attempt(|tracker| tracker.rewind(at, to));
    }

    fn end(&mut self, at: SystemTime, outcome: &Outcome) {
        self.attempt(|tracker| tracker.end(at, outcome));
    }

    fn attempt(&mut self, act: impl FnOnce(&mut dyn Tracker) -> Result<(), TrackerError>) {
        if let Some(tracker) = &mut self.tracker
            && let Err(error) = act(tracker.as_mut())
        {
            self.give_up(&error);
        }
    }

    fn give_up(&mut self, error: &TrackerError) {
        self.tracker = None;
        tracing::warn!(
            "{} gets no more rows: {error}; training goes on, and the next start of this run catches up",
            self.kind.as_str()
        );
    }
}
