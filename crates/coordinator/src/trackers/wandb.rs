//! Weights & Biases: an offline run, which `wandb sync` carries to a server.
//!
//! ```text
//! <wandb_folder>/offline-run-YYYYMMDD_HHMMSS-ID/
//!     run-ID.wandb        records: header, run with its configuration; a history record a step, files before it where it
//!                         has any; summary and exit
//!     files/media/html/   samples
//! ```
//! A run is one file however often it is started: going on and a rewind cut it back to what counts, since W&B itself takes
//! no step back. An evaluation is merged into its step's record, for W&B wants one record a step; so the newest record is
//! held until the next step, and the file ends one step behind. A run that was synced and has gone on is synced anew.

mod log;
mod records;

use std::{
    collections::BTreeMap,
    fmt::Write,
    path::{Path, PathBuf},
    time::SystemTime,
};

use prost::Message;
use protocol::{Outcome, Sample};
use storage::{atomic_write, create_directory, remove_file};

use super::{Description, Entry, Position, Tracker, TrackerError, entry::EVALUATION_PREFIX, files};
use crate::timestamp::compact;
use log::TransactionLog;
use records::{
    Config, Exit, File, Files, Header, History, HistoryStep, Item, Kind, Record, Run, Summary,
    Timestamp, VersionInfo,
};

/// What W&B's own files of this layout ask of their readers.
const MIN_CONSUMER: &str = "0.40.0";
const SAMPLES_KEY: &str = "samples";
/// Exit code of a run that somebody stopped, as W&B's own client gives it.
const EXIT_INTERRUPTED: i32 = 255;

/// This run's offline run.
pub(super) struct Wandb {
    description: Description,
    /// The run's file, once it is chosen.
    path: Option<PathBuf>,
    /// Open once there is something to write.
    log: Option<TransactionLog>,
    content: Content,
}

/// What the file says, and what is held back from it.
#[derive(Default)]
struct Content {
    /// Records up to this byte stay as they are.
    settled: u64,
    /// Their number.
    records: i64,
    /// The newest entry.
    position: Position,
    /// The newest history record.
    held: Option<Held>,
    /// The last value of every name.
    summary: BTreeMap<String, String>,
    /// When the run began, in seconds since 1970.
    start: f64,
    /// The file ends with an exit.
    ended: bool,
}

/// A step's history record, behind the settled ones, that an evaluation may still be merged into.
struct Held {
    step: u64,
    items: Vec<Item>,
    /// Files that it names.
    files: Vec<File>,
    /// Where it ends in the file, when it is there as it is here.
    written: Option<u64>,
}

impl Wandb {
    /// Reads how far this run's file reaches.
    ///
    /// # Errors
    /// It cannot be read, or is not W&B's.
    pub(super) fn open(description: &Description) -> Result<Self, TrackerError> {
        let folder = &description.telemetry.wandb_folder;
        let path = find(folder, description.short_id())?;
        let content = match &path {
            Some(path) => Content::read(path, u64::MAX)?,
            None => Content::default(),
        };
        Ok(Self {
            description: description.clone(),
            path,
            log: None,
            content,
        })
    }

    /// Opens the file, or begins it.
    fn begin(&mut self, at: SystemTime) -> Result<(), TrackerError> {
        if self.log.is_some() {
            return Ok(());
        }
        let path = match &self.path {
            Some(path) => path.clone(),
            None => self.create(at)?,
        };
        // What was synced is no longer all there is.
        remove_file(&path.with_extension("wandb.synced"))?;
        let mut log = TransactionLog::open(&path)?;
        if self.content.records < 2 {
            log.cut(log::HEADER.len() as u64)?;
            self.content = Content {
                start: seconds(at),
                settled: log.bytes(),
                ..Content::default()
            };
            for kind in [header(), self.run(at)] {
                self.content.append(&mut log, kind)?;
            }
            self.content.settled = log.bytes();
        }
        self.log = Some(log);
        Ok(())
    }

    /// Makes the run's folder and chooses its file.
    fn create(&mut self, at: SystemTime) -> Result<PathBuf, TrackerError> {
        let id = self.description.short_id();
        let name = format!("offline-run-{}-{id}", compact(at));
        let folder = self.description.telemetry.wandb_folder.join(name);
        create_directory(&folder.join("files"))?;
        let path = folder.join(file_name(id));
        self.path = Some(path.clone());
        Ok(path)
    }

    fn run(&self, at: SystemTime) -> Kind {
        let since = files::since_1970(at);
        let sections = self.description.sections.iter();
        Kind::Run(Run {
            id: self.description.short_id().into(),
            entity: self
                .description
                .telemetry
                .wandb_entity
                .clone()
                .unwrap_or_default(),
            project: self.description.telemetry.wandb_project.clone(),
            config: Some(Config {
                update: sections
                    .map(|(name, section)| Item::new(name, serde_json::json!(section).to_string()))
                    .collect(),
            }),
            display_name: self.description.name.clone(),
            start_time: Some(Timestamp {
                seconds: since.as_secs() as i64,
                nanos: since.subsec_nanos() as i32,
            }),
        })
    }

    /// Writes the samples beside the file; the item and the file that a history record names them by.
    fn write_samples(&self, step: u64, samples: &[Sample]) -> Result<(Item, File), TrackerError> {
        let path = format!("media/html/{SAMPLES_KEY}_{step}.html");
        let run = self.path.as_deref().and_then(Path::parent);
        let file = run.expect("the run has begun").join("files").join(&path);
        let page = page(samples);
        create_directory(file.parent().expect("it is below files"))?;
        atomic_write(&file, page.as_bytes())?;
        let value = serde_json::json!({"_type": "html-file", "path": path, "size": page.len()});
        Ok((Item::new(SAMPLES_KEY, value.to_string()), File { path }))
    }
}

impl Tracker for Wandb {
    fn position(&self) -> Position {
        self.content.position
    }

    fn record(&mut self, at: SystemTime, entry: &Entry) -> Result<(), TrackerError> {
        self.begin(at)?;
        let position = entry.position();
        let metrics = entry.metrics().into_iter();
        let mut items: Vec<Item> = metrics
            .map(|(name, value)| Item::number(name, value))
            .collect();
        let mut named = Vec::new();
        if !entry.samples().is_empty() {
            let (item, file) = self.write_samples(position.step, entry.samples())?;
            items.push(item);
            named.push(file);
        }
        let log = self.log.as_mut().expect("the run has begun");
        let content = &mut self.content;
        let other = |held: &Held| held.step != position.step;
        if content.held.as_ref().is_some_and(other) {
            content.settle(log)?;
        }
        content.hold(seconds(at), position, items, named);
        Ok(())
    }

    fn rewind(&mut self, at: SystemTime, to: u64) -> Result<(), TrackerError> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        if self.content.position <= Position::last_of(to) {
            return Ok(());
        }
        // What is held and not written is of a later step, or there would be nothing to take out.
        self.content = Content::read(path, to)?;
        self.begin(at)?;
        let log = self.log.as_mut().expect("the run has begun");
        let written = self.content.held.as_ref().and_then(|held| held.written);
        log.cut(written.unwrap_or(self.content.settled))?;
        Ok(())
    }

    fn end(&mut self, at: SystemTime, outcome: &Outcome) -> Result<(), TrackerError> {
        if self.content.ended || self.content.held.is_none() {
            return Ok(());
        }
        self.begin(at)?;
        let log = self.log.as_mut().expect("the run has begun");
        let content = &mut self.content;
        content.settle(log)?;
        let summary = content.summary.iter();
        let summary = Summary {
            update: summary
                .map(|(name, value)| Item::new(name, value))
                .collect(),
        };
        content.append(log, Kind::Summary(summary))?;
        let exit = Exit {
            exit_code: match outcome {
                Outcome::Completed => 0,
                Outcome::Interrupted { .. } => EXIT_INTERRUPTED,
                Outcome::Failed { .. } => 1,
            },
            runtime: (seconds(at) - content.start).max(0.0) as i32,
        };
        content.append(log, Kind::Exit(exit))?;
        content.ended = true;
        Ok(log.sync()?)
    }
}

impl Content {
    /// Reads the file at `path`; history of steps after `last` does not count, and nothing behind it.
    fn read(path: &Path, last: u64) -> Result<Self, TrackerError> {
        let bytes = files::bytes(path)?.unwrap_or_default();
        let mut content = Self::default();
        if bytes.len() < log::HEADER.len() {
            // The process died while it began the file.
            return Ok(content);
        }
        let Some(located) = log::read(&bytes) else {
            return Err(TrackerError::Content {
                path: path.to_owned(),
                reason: "is not W&B's; move it away, or choose another telemetry.wandb_folder"
                    .into(),
            });
        };
        // A history record and the files before it are one.
        let mut pending = Vec::new();
        let mut count = 0;
        let mut before = (log::HEADER.len() as u64, 0);
        for record in located {
            let Ok(Record {
                kind: Some(kind), ..
            }) = Record::decode(&record.payload[..])
            else {
                break;
            };
            count += 1;
            content.ended = false;
            match kind {
                Kind::Header(_) | Kind::Run(_) => {
                    if let Kind::Run(run) = kind {
                        let start = run.start_time.unwrap_or_default();
                        content.start = start.seconds as f64 + f64::from(start.nanos) / 1e9;
                    }
                    before = (record.end, count);
                    (content.settled, content.records) = before;
                }
                Kind::Files(named) => pending.extend(named.files),
                Kind::History(history) => {
                    let step = history.step.map_or(0, |step| step.num);
                    let step = u64::try_from(step).unwrap_or(0);
                    if step > last {
                        break;
                    }
                    (content.settled, content.records) = before;
                    before = (record.end, count);
                    content.remember(&history.item);
                    let evaluated = |item: &Item| item.key.starts_with(EVALUATION_PREFIX);
                    content.position = Position {
                        step,
                        evaluated: history.item.iter().any(evaluated),
                    };
                    content.held = Some(Held {
                        step,
                        items: history.item,
                        files: std::mem::take(&mut pending),
                        written: Some(record.end),
                    });
                }
                Kind::Summary(_) => {}
                Kind::Exit(_) => content.ended = true,
            }
        }
        Ok(content)
    }

    /// Adds an entry's items to the held record of its step.
    fn hold(&mut self, at: f64, position: Position, items: Vec<Item>, files: Vec<File>) {
        self.remember(&items);
        let runtime = (at - self.start).max(0.0);
        self.position = position;
        let held = self.held.get_or_insert_with(|| Held {
            step: position.step,
            items: vec![
                Item::new("_step", position.step.to_string()),
                Item::number("_timestamp", at),
                Item::number("_runtime", runtime),
            ],
            files: Vec::new(),
            written: None,
        });
        held.items.extend(items);
        held.files.extend(files);
        held.written = None;
        self.ended = false;
    }

    /// Makes the held record the last settled one, and the end of the file.
    fn settle(&mut self, log: &mut TransactionLog) -> Result<(), TrackerError> {
        let Some(held) = self.held.take() else {
            return Ok(());
        };
        let parts = 1 + i64::from(!held.files.is_empty());
        if let Some(end) = held.written {
            log.cut(end)?;
            self.records += parts;
        } else {
            log.cut(self.settled)?;
            if !held.files.is_empty() {
                self.append(log, Kind::Files(Files { files: held.files }))?;
            }
            self.remember(&held.items);
            let step = HistoryStep {
                num: held.step as i64,
            };
            let history = History {
                item: held.items,
                step: Some(step),
            };
            self.append(log, Kind::History(history))?;
        }
        self.settled = log.bytes();
        Ok(())
    }

    fn append(&mut self, log: &mut TransactionLog, kind: Kind) -> Result<(), TrackerError> {
        self.records += 1;
        let record = Record {
            num: self.records,
            kind: Some(kind),
        };
        Ok(log.append(&record.encode_to_vec())?)
    }

    fn remember(&mut self, items: &[Item]) {
        for item in items {
            self.summary
                .insert(item.key.clone(), item.value_json.clone());
        }
    }
}

fn header() -> Kind {
    Kind::Header(Header {
        version_info: Some(VersionInfo {
            producer: format!("caldpo-{}", env!("CARGO_PKG_VERSION")),
            min_consumer: MIN_CONSUMER.into(),
        }),
    })
}

/// The file of the run `id` below `folder`, where the run has a folder.
fn find(folder: &Path, id: &str) -> Result<Option<PathBuf>, TrackerError> {
    let run = files::entries(folder)?.into_iter().find(|run| {
        let name = files::name(run);
        name.starts_with("offline-run-") && name.ends_with(id)
    });
    Ok(run.map(|run| run.join(file_name(id))))
}

fn file_name(id: &str) -> String {
    format!("run-{id}.wandb")
}

fn seconds(at: SystemTime) -> f64 {
    files::since_1970(at).as_secs_f64()
}

/// Samples as a page: prompts and what was written after them.
fn page(samples: &[Sample]) -> String {
    let mut page = String::from("<meta charset=\"utf-8\">\n");
    for Sample { prompt, text } in samples {
        writeln!(
            page,
            "<p style=\"white-space: pre-wrap\"><b>{}</b>{}</p>",
            escaped(prompt),
            escaped(text)
        )
        .expect("a string takes everything");
    }
    page
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
