//! TensorBoard: one event file a start of the run, in a folder that is this run's alone.
//!
//! The first file begins with the configuration, as hyperparameters and as text. A rewind is the start of a session at the
//! first step that is computed again: TensorBoard takes back what it read of that step and later ones, so that a curve has
//! one value a step. Scalars are f32 here; the rows of `metrics.jsonl` are f64.

mod events;

use std::{collections::BTreeMap, path::PathBuf, time::SystemTime};

use protocol::{Outcome, Sample};
use storage::{AppendFile, create_directory};
use toml::Value;

use super::{
    Description, Entry, Position, Tracker, TrackerError, description::plain_text,
    entry::EVALUATION_PREFIX, files,
};
use events::{
    Event, Hyperparameter, SummaryValue, frame, hyperparameters, restart, scalar, summary, text,
    version,
};

/// What TensorBoard takes for an event file has this in its name, and is read in the order of the names.
const MARK: &str = "tfevents";

/// This run's event files.
pub(super) struct TensorBoard {
    folder: PathBuf,
    description: Description,
    position: Position,
    /// Seconds in the name of the newest file, and their number.
    newest: u64,
    files: usize,
    /// This start's file, once there is something to write.
    file: Option<AppendFile>,
}

impl TensorBoard {
    /// Reads how far this run's files reach.
    ///
    /// # Errors
    /// They cannot be read, or another run's lie beside them: TensorBoard would show both as one.
    pub(super) fn open(description: &Description) -> Result<Self, TrackerError> {
        let folder = description.telemetry.tensorboard_folder.clone();
        let own = format!(".caldpo.{}.", description.short_id());
        let paths = files::entries(&folder)?;
        let names = paths.iter().map(|path| files::name(path));
        let names: Vec<String> = names.filter(|name| name.contains(MARK)).collect();
        if let Some(other) = names.iter().find(|name| !name.contains(&own)) {
            return Err(TrackerError::Content {
                reason: format!(
                    "holds {other}, which another run wrote; TensorBoard would show both runs as one: choose another telemetry.tensorboard_folder"
                ),
                path: folder,
            });
        }
        let mut position = Position::default();
        for name in &names {
            let bytes = files::bytes(&folder.join(name))?.unwrap_or_default();
            for event in events::read(&bytes) {
                position = follow(position, &event);
            }
        }
        let seconds = names
            .last()
            .and_then(|name| name.split('.').nth(3)?.parse().ok());
        Ok(Self {
            folder,
            description: description.clone(),
            position,
            newest: seconds.unwrap_or(0),
            files: names.len(),
            file: None,
        })
    }

    /// This start's file with `event` behind what is there.
    fn write(&mut self, at: SystemTime, event: &Event) -> Result<(), TrackerError> {
        if self.file.is_none() {
            self.file = Some(self.begin(at)?);
        }
        let file = self.file.as_mut().expect("it was opened above");
        Ok(file.append(&frame(event))?)
    }

    fn begin(&mut self, at: SystemTime) -> Result<AppendFile, TrackerError> {
        create_directory(&self.folder)?;
        let wall_time = seconds(at);
        // Names keep the order of the starts, also where the clock went back.
        let stamp = (wall_time as u64).max(self.newest);
        let name = format!(
            "events.out.{MARK}.{stamp:010}.caldpo.{}.{:04}",
            self.description.short_id(),
            self.files
        );
        let mut file = AppendFile::open(&self.folder.join(name))?;
        let mut first = frame(&version(wall_time));
        if self.files == 0 {
            let sections = toml::to_string(&self.description.sections);
            let sections = sections.expect("a table of TOML values is TOML");
            let values = vec![
                hyperparameters(wall_time, self.hyperparameters()),
                text("config".into(), indented(&sections)),
            ];
            first.extend(frame(&summary(wall_time, 0, values)));
        }
        file.append(&first)?;
        Ok(file)
    }

    fn hyperparameters(&self) -> BTreeMap<String, Hyperparameter> {
        let parameters = self.description.parameters().into_iter();
        let shown = parameters.map(|(path, value)| {
            let mut shown = Hyperparameter::default();
            match value {
                Value::Integer(number) => shown.number = Some(*number as f64),
                Value::Float(number) => shown.number = Some(*number),
                Value::Boolean(flag) => shown.flag = Some(*flag),
                other => shown.text = Some(plain_text(other)),
            }
            (path, shown)
        });
        shown.collect()
    }
}

impl Tracker for TensorBoard {
    fn position(&self) -> Position {
        self.position
    }

    fn record(&mut self, at: SystemTime, entry: &Entry) -> Result<(), TrackerError> {
        let metrics = entry.metrics().into_iter();
        let mut values: Vec<SummaryValue> =
            metrics.map(|(name, value)| scalar(name, value)).collect();
        for (index, sample) in entry.samples().iter().enumerate() {
            values.push(text(format!("samples/{}", index + 1), markdown(sample)));
        }
        let position = entry.position();
        self.write(at, &summary(seconds(at), position.step, values))?;
        self.position = position;
        Ok(())
    }

    fn rewind(&mut self, at: SystemTime, to: u64) -> Result<(), TrackerError> {
        if self.position <= Position::last_of(to) {
            return Ok(());
        }
        self.position = Position::last_of(to);
        self.write(at, &restart(seconds(at), to + 1))
    }

    fn end(&mut self, _at: SystemTime, _outcome: &Outcome) -> Result<(), TrackerError> {
        if let Some(file) = &mut self.file {
            file.sync()?;
        }
        Ok(())
    }
}

/// Where the files reach after `event`, when they reached to `position` before it.
fn follow(position: Position, event: &Event) -> Position {
    if let Some(step) = events::restarts_at(event) {
        return position.min(Position::last_of(step.saturating_sub(1)));
    }
    let values = event.summary.iter().flat_map(|summary| &summary.value);
    let Some(metric) = values
        .into_iter()
        .find(|value| value.simple_value.is_some())
    else {
        return position;
    };
    Position {
        step: u64::try_from(event.step).unwrap_or(0),
        evaluated: metric.tag.starts_with(EVALUATION_PREFIX),
    }
}

fn seconds(at: SystemTime) -> f64 {
    files::since_1970(at).as_secs_f64()
}

fn markdown(sample: &Sample) -> String {
    format!(
        "prompt\n\n{}\n\ncontinuation\n\n{}",
        indented(&sample.prompt),
        indented(&sample.text)
    )
}

/// Lines that Markdown leaves as they are.
fn indented(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(|line| format!("    {line}")).collect();
    lines.join("\n")
}
