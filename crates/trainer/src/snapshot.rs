//! What a checkpoint holds of a rank: its shard of weights and moments, copied between two steps and written by a thread of
//! its own while training goes on. One save is in flight at a time; a second one waits for the first.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use checkpoint::{Checkpoint, Kind, Piece, TensorSpec, TrainState};
use model::Layout;

use crate::error::TrainError;
use crate::gate::{SavedReporter, SavedShard};
use crate::learner::{Learner, running_mean};
use crate::moments::Moments;
use crate::setup::Facts;
use crate::shards::Shard;

/// Where snapshots go and as whose.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub checkpoints: PathBuf,
    pub generation: u64,
    pub rank: u32,
    pub world: u32,
}

/// The thread that writes, and the memory it gives back.
pub(crate) struct Saver {
    destination: Destination,
    writing: Option<JoinHandle<Snapshot>>,
    spare: Snapshot,
}

/// A copy of a rank's shard; the shards of all buckets lie one behind the other.
#[derive(Default)]
struct Snapshot {
    tensors: Vec<TensorSpec>,
    parts: Vec<Part>,
    weights: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
}

/// The elements of one tensor within the shard.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    tensor: String,
    /// First element within the tensor.
    start: usize,
    /// Bucket of the tensor.
    bucket: usize,
    /// Elements within the bucket.
    range: Range<usize>,
}

impl Saver {
    /// A saver that has written nothing yet.
    pub fn new(destination: Destination) -> Self {
        Self {
            destination,
            writing: None,
            spare: Snapshot::default(),
        }
    }

    /// Copies the shard and writes it in the background; `report` hears when it is durable, or why it is not.
    pub fn save(
        &mut self,
        learner: &mut Learner,
        state: TrainState,
        report: SavedReporter,
    ) -> Result<(), TrainError> {
        self.finish();
        let mut snapshot = std::mem::take(&mut self.spare);
        snapshot.take(learner);
        let destination = self.destination.clone();
        let write = move || {
            let file = snapshot.write(&destination, state);
            report(SavedShard {
                step: state.step,
                file,
            });
            snapshot
        };
        let thread = thread::Builder::new().name("snapshot".into());
        let writing = thread.spawn(write).map_err(|source| TrainError::Thread {
            thread: "snapshot",
            source,
        })?;
        self.writing = Some(writing);
        Ok(())
    }

    /// Writes the shard as it lies there, for a state that nothing changes any more; `report` hears as in [`Saver::save`]. A copy
    /// would cost as much memory as weights and moments for nothing.
    pub fn save_last(&mut self, learner: &mut Learner, state: TrainState, report: SavedReporter) {
        self.finish();
        self.spare = Snapshot::default();
        let ranges = shard_ranges(learner);
        let parts = parts(learner.model.trained(), &ranges);
        let tensors = tensor_specs(learner.model.trained());
        let weights = learner.take_whole();
        let shards = learner.optimizer.shards();
        let moments = shards
            .iter()
            .map(|shard| [&shard.master, &shard.first, &shard.second].map(Moments::read))
            .collect::<Vec<_>>();
        let mut pieces = Vec::new();
        for kind in [Kind::Weight, Kind::FirstMoment, Kind::SecondMoment] {
            for part in &parts {
                let shard = &shards[part.bucket];
                let own = part.range.start - shard.range.start..part.range.end - shard.range.start;
                let [master, first, second] = &moments[part.bucket];
                let values = match kind {
                    Kind::Weight => match &weights {
                        Some(weights) => &weights[part.bucket][part.range.clone()],
                        None => &master[own],
                    },
                    Kind::FirstMoment if first.is_empty() => continue,
                    Kind::FirstMoment => &first[own],
                    Kind::SecondMoment => &second[own],
                };
                pieces.push(part.piece(kind, values));
            }
        }
        let file = self.destination.write(state, &tensors, &pieces);
        drop(moments);
        learner.put_whole(weights);
        report(SavedShard {
            step: state.step,
            file,
        });
    }

    /// Waits for the save in flight.
    pub fn finish(&mut self) {
        if let Some(writing) = self.writing.take() {
            match writing.join() {
                Ok(snapshot) => self.spare = snapshot,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    }
}

impl Snapshot {
    fn take(&mut self, learner: &mut Learner) {
        if self.parts.is_empty() {
            self.tensors = tensor_specs(learner.model.trained());
            self.parts = parts(learner.model.trained(), &shard_ranges(learner));
        }
        self.weights.clear();
        self.first.clear();
        self.second.clear();
        let weights = learner.take_whole();
        for (bucket, shard) in learner.optimizer.shards().iter().enumerate() {
            match &weights {
                Some(weights) => {
                    let own = &weights[bucket][shard.range.clone()];
                    self.weights.extend_from_slice(own);
                }
                None => self.weights.extend_from_slice(&shard.master.read()),
            }
            self.first.extend_from_slice(&shard.first.read());
            self.second.extend_from_slice(&shard.second.read());
        }
        learner.put_whole(weights);
    }

    fn write(&self, destination: &Destination, state: TrainState) -> Result<String, String> {
        let mut pieces = Vec::new();
        for (kind, values) in [
            (Kind::Weight, &self.weights),
            (Kind::FirstMoment, &self.first),
            (Kind::SecondMoment, &self.second),
        ] {
            if values.is_empty() {
                // A rule without this moment.
                continue;
            }
            let mut rest = &values[..];
            for part in &self.parts {
                let (own, others) = rest.split_at(part.range.len());
                rest = others;
                pieces.push(part.piece(kind, own));
            }
        }
        destination.write(state, &self.tensors, &pieces)
    }
}

impl Destination {
    /// The rank's file as the manifest lists it, in JSON.
    fn write(
        &self,
        state: TrainState,
        tensors: &[TensorSpec],
        pieces: &[Piece<'_>],
    ) -> Result<String, String> {
        let written = checkpoint::write_rank(
            &self.checkpoints,
            self.generation,
            self.rank,
            self.world,
            state,
            tensors,
            pieces,
        );
        let file = written.map_err(|error| error.to_string())?;
        serde_json::to_string(&file).map_err(|error| error.to_string())
    }
}

impl Part {
    fn piece<'a>(&'a self, kind: Kind, values: &'a [f32]) -> Piece<'a> {
        Piece {
            tensor: &self.tensor,
            kind,
            start: self.start,
            values,
        }
    }
}

/// Puts the state of the checkpoint at `path` into `learner`, whatever world size wrote it (C3). Returns where it stands.
pub(crate) fn restore(
    learner: &mut Learner,
    path: &Path,
    seed: u64,
    facts: &Facts,
) -> Result<TrainState, TrainError> {
    let resume = |reason: String| TrainError::Resume {
        path: path.to_owned(),
        reason,
    };
    let checkpoint = Checkpoint::open(path).map_err(|error| resume(error.to_string()))?;
    let state = checkpoint.manifest().state;
    if state.seed != seed {
        return Err(resume(format!(
            "it was trained with seed {}, this run has {seed}; resume with the run's own configuration",
            state.seed
        )));
    }
    let info = &checkpoint.manifest().info;
    for (what, expected, found) in [
        ("starting weights", &facts.model_digest, &info.model_digest),
        (
            "a tokenizer",
            &facts.tokenizer_digest,
            &info.tokenizer_digest,
        ),
        ("training pairs", &facts.data_digest, &info.data_digest),
    ] {
        if expected != found {
            return Err(resume(format!(
                "it belongs to {what} with digest {found}, this run's have {expected}; restore what it was trained from, or \
                 start a new run"
            )));
        }
    }
    let layout = learner.model.trained().clone();
    let expected = tensor_specs(&layout);
    if checkpoint.manifest().tensors != expected {
        return Err(resume(
            "its tensors are not the model's; it belongs to another model".into(),
        ));
    }
    let read = |part: &Part, kind: Kind, out: &mut [f32]| {
        let read = checkpoint.read(&part.tensor, kind, part.start, out);
        read.map_err(|error| resume(error.to_string()))
    };
    let whole: Vec<_> = layout.bucket_lens().into_iter().map(|len| 0..len).collect();
    let all = parts(&layout, &whole);
    learner.restore_weights(&mut |bucket, out| {
        let own = all.iter().filter(|part| part.bucket == bucket);
        own.into_iter()
            .try_for_each(|part| read(part, Kind::Weight, &mut out[part.range.clone()]))
    })?;
    read_moments(&layout, learner.optimizer.shards_mut(), &read)?;
    read_moments(&layout, learner.optimizer.mirrored_mut(), &read)?;
    learner.optimizer.set_updates(state.updates);
    learner.shift = running_mean(&state);
    Ok(state)
}

/// Reads a part's values of one kind from a checkpoint.
type Read<'a> = &'a dyn Fn(&Part, Kind, &mut [f32]) -> Result<(), TrainError>;

/// Fills in what a checkpoint holds of these shards, one per bucket, or none at all.
fn read_moments(layout: &Layout, shards: &mut [Shard], read: Read<'_>) -> Result<(), TrainError> {
    if shards.is_empty() {
        return Ok(());
    }
    let ranges: Vec<_> = shards.iter().map(|shard| shard.range.clone()).collect();
    for (bucket, shard) in shards.iter_mut().enumerate() {
        let mut first = vec![0.0; shard.first.len()];
        let mut second = vec![0.0; shard.second.len()];
        let all = parts(layout, &ranges).into_iter();
        for part in all.filter(|part| part.bucket == bucket) {
            let own = part.range.start - shard.range.start..part.range.end - shard.range.start;
            if !first.is_empty() {
                read(&part, Kind::FirstMoment, &mut first[own.clone()])?;
            }
            read(&part, Kind::SecondMoment, &mut second[own])?;
        }
        shard.first.write(first);
        shard.second.write(second);
    }
    Ok(())
}

/// The own elements within every bucket.
fn shard_ranges(learner: &Learner) -> Vec<Range<usize>> {
    let shards = learner.optimizer.shards().iter();
    shards.map(|shard| shard.range.clone()).collect()
}

fn tensor_specs(layout: &Layout) -> Vec<TensorSpec> {
    let parameters = layout.parameters.iter();
    parameters
        .map(|parameter| TensorSpec {
            name: parameter.name.clone(),
            shape: parameter.shape.clone(),
        })
        .collect()
}

/// The tensors' elements inside `ranges`, one range per bucket, in layout order.
fn parts(layout: &Layout, ranges: &[Range<usize>]) -> Vec<Part> {
    let mut parts = Vec::new();
    for parameter in &layout.parameters {
        let (whole, range) = (parameter.range(), &ranges[parameter.bucket]);
        let cut = whole.start.max(range.start)..whole.end.min(range.end);
        if !cut.is_empty() {
            parts.push(Part {
                tensor: parameter.name.clone(),
                start: cut.start - whole.start,
                bucket: parameter.bucket,
                range: cut,
            });
        }
    }
    parts
}
