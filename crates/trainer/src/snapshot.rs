//! What a checkpoint holds of a rank: its shard of weights and moments after a step, written by a thread of its own while training
//! goes on. On the host nothing is copied for it but what is not written yet when the next update comes, which the learner copies
//! first. One save is in flight at a time; a second one waits for the first.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use checkpoint::{Checkpoint, Kind, Piece, TensorSpec, TrainState};
use kernels::Values;
use model::Layout;

use crate::error::TrainError;
use crate::gate::{SavedReporter, SavedShard};
use crate::learner::{Learner, running_mean};
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

/// The thread that writes.
pub(crate) struct Saver {
    destination: Destination,
    writing: Option<JoinHandle<()>>,
}

/// A rank's shard as it was after a step: shared with the training that goes on, which copies what is not written yet when it
/// is to change.
struct Snapshot {
    layout: Layout,
    /// By bucket.
    shards: Vec<Held>,
}

/// A bucket's share.
struct Held {
    range: Range<usize>,
    weights: Values,
    /// Empty for a rule without it.
    first: Values,
    second: Values,
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
        }
    }

    /// Writes the shard as it is now in the background; `report` hears when it is durable, or why it is not.
    pub fn save(
        &mut self,
        learner: &Learner,
        state: TrainState,
        report: SavedReporter,
    ) -> Result<(), TrainError> {
        self.finish();
        let snapshot = Snapshot::of(learner);
        let destination = self.destination.clone();
        let write = move || {
            let file = destination.write(state, snapshot);
            report(SavedShard {
                step: state.step,
                file,
            });
        };
        let thread = thread::Builder::new().name("snapshot".into());
        let writing = thread.spawn(write).map_err(|source| TrainError::Thread {
            thread: "snapshot",
            source,
        })?;
        self.writing = Some(writing);
        Ok(())
    }

    /// Waits for the save in flight.
    pub fn finish(&mut self) {
        if let Some(Err(panic)) = self.writing.take().map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Snapshot {
    fn of(learner: &Learner) -> Self {
        let shards = learner.optimizer.shards().iter().enumerate();
        let held = shards.map(|(bucket, shard)| Held {
            range: shard.range.clone(),
            weights: if learner.optimizer.has_masters() {
                shard.master.values()
            } else {
                learner.model.flat().values(bucket, shard.range.clone())
            },
            first: shard.first.values(),
            second: shard.second.values(),
        });
        Self {
            layout: learner.model.trained().clone(),
            shards: held.collect(),
        }
    }
}

impl Destination {
    /// The rank's file as the manifest lists it, in JSON.
    fn write(&self, state: TrainState, snapshot: Snapshot) -> Result<String, String> {
        let Snapshot { layout, shards } = snapshot;
        let ranges: Vec<_> = shards.iter().map(|shard| shard.range.clone()).collect();
        let (parts, tensors) = (parts(&layout, &ranges), tensor_specs(&layout));
        let mut pieces = Vec::new();
        for kind in Kind::ALL {
            for part in &parts {
                let shard = &shards[part.bucket];
                let values = match kind {
                    Kind::Weight => &shard.weights,
                    Kind::FirstMoment => &shard.first,
                    Kind::SecondMoment => &shard.second,
                };
                if values.is_empty() {
                    continue;
                }
                let own = part.range.start - shard.range.start..part.range.end - shard.range.start;
                pieces.push(Piece {
                    tensor: &part.tensor,
                    kind,
                    start: part.start,
                    values: values.slice(own),
                });
            }
        }
        // From here on each piece holds its values alone, and lets them go when it is written.
        drop(shards);
        let written = checkpoint::write_rank(
            &self.checkpoints,
            self.generation,
            self.rank,
            self.world,
            state,
            &tensors,
            pieces,
        );
        let file = written.map_err(|error| error.to_string())?;
        serde_json::to_string(&file).map_err(|error| error.to_string())
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
