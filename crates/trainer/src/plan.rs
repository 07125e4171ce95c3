//! What a job will need before it runs: memory of each worker by part, and a short probe of its speed.
//!
//! ```text
//! Workload: lengths of all pairs, order, model's shape ──► memory: packs of the real steps ──► parts by moment, peak
//!                                                      └─► cures: settings with which the peak fits
//! Draft: tokens and spec ──► workload, probe: the job's own first steps with all its workers in this process
//! ```
//! Not here: how much memory or disk a machine has, and what a person reads of it (`coordinator`).

mod cures;
mod gpu;
mod memory;
mod probe;

use data::{Dataset, Pair, epoch_steps};
use model::{Layout, ModelConfig, Precision};
use serde::Serialize;
use spec::Spec;

pub(crate) use gpu::{check as check_gpu, workers_min};

pub use cures::{Change, Cure};
pub use gpu::{CONTEXT_BYTES, GpuRefusal, HostMemory, Peers};
pub use memory::{Knobs, Moment, Parts, WorkerMemory};
pub use probe::{Probe, ProbeRequest};

pub use crate::reference::ReferenceAmount;

use crate::adapter::Adapter;
use crate::error::TrainError;
use crate::process::{peak_bytes, resident_bytes};
use crate::setup::{Kept, MismatchedPairs, Tokens, held_out, precision};
use crate::shards::Sharding;
use crate::update::has_first_moment;

/// Steps whose packs are looked at; the largest pack of so many is not exceeded by much later.
const STEPS_MAX: u64 = 20_000;

/// A job whose tokens are read and whose weights are not.
pub struct Draft {
    spec: Spec,
    train: Dataset,
    eval: Option<Dataset>,
    mismatched: MismatchedPairs,
    workload: Workload,
    program: Program,
}

/// Memory of a process before its model, and on the way there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// With tokenizer and pairs.
    pub resident: u64,
    /// While they were read.
    pub peak: u64,
}

/// As much of a job as its memory depends on.
#[derive(Clone, Debug)]
pub struct Workload {
    config: ModelConfig,
    layout: Layout,
    /// What is trained: all of the model, or an adapter.
    trained: Layout,
    precision: Precision,
    /// Whether the files have the weights in bf16.
    stored_bf16: bool,
    /// Moments that the optimizer keeps of a parameter.
    moments: u64,
    /// Parameters of a reference model of its own.
    reference: Option<(ModelConfig, Layout)>,
    /// Whether the objective reads reference log-probs.
    needs_reference: bool,
    train: Vec<Lengths>,
    held_out: Vec<Lengths>,
    /// Pairs of the steps that are looked at.
    steps: Vec<Vec<usize>>,
    knobs: Knobs,
}

/// What a job computes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Amount {
    /// Training pairs after drops.
    pub pairs: u64,
    /// Held-out pairs that are scored.
    pub held_out_pairs: u64,
    /// Parameters; tied weights count once.
    pub parameters: u64,
    /// Those of them, or of an adapter beside them, that are trained.
    pub trained_parameters: u64,
    /// Pairs of one optimizer step.
    pub batch_pairs: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Passes over the pairs, the last one perhaps in part.
    pub epochs: f64,
    /// Tokens of all steps, a prompt counted once for each of its completions.
    pub tokens: u64,
    /// Tokens that go through the model: prompts count once.
    pub packed_tokens: u64,
    /// Packed tokens of the held-out pairs.
    pub held_out_packed_tokens: u64,
    /// Tokens of the continuations that an evaluation writes.
    pub sample_tokens: u64,
    /// Reference log-probs, those in the store included.
    pub reference: ReferenceAmount,
}

/// Tokens of a pair.
#[derive(Clone, Copy, Debug)]
struct Lengths {
    prompt: usize,
    completions: [usize; 2],
}

impl Draft {
    /// Reads tokenizer and pairs of `spec` as its training does on `threads` threads, and the shape of its model.
    ///
    /// # Errors
    /// What its training would refuse about them.
    pub fn load(spec: &Spec, threads: usize) -> Result<Self, TrainError> {
        on_threads(threads, || Self::read(spec))?
    }

    fn read(spec: &Spec) -> Result<Self, TrainError> {
        spec.validate()?;
        let Tokens {
            tokenizer,
            train,
            eval,
        } = Tokens::load(spec, Kept::IfThere, &mut |_, _, _| Ok(()))?;
        let mismatched = MismatchedPairs::of(spec, &train, eval.as_ref())?;
        let config = ModelConfig::load(&spec.model.path)?;
        let workload = Workload::new(spec, config, &train.pairs, held_out(spec, eval.as_ref()))?;
        // A worker has read the same by now, in the same way.
        let program = Program::of_this_process(0);
        drop(tokenizer);
        Ok(Self {
            spec: spec.clone(),
            train,
            eval,
            mismatched,
            workload,
            program,
        })
    }

    /// What a worker has before its model, as this process has measured it.
    pub fn program(&self) -> Program {
        self.program
    }

    /// What its memory depends on.
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    /// What it computes.
    pub fn amount(&self) -> Amount {
        let Self { spec, train, .. } = self;
        let pairs = &train.pairs;
        let held_out = self.held_out();
        let (steps, visits) = visits(spec, pairs.len());
        let share = visits / pairs.len() as f64;
        let samples = spec.evaluate.samples.min(held_out.len());
        let packed = |pairs: &[Pair]| pairs.iter().map(Pair::packed_tokens).sum::<usize>();
        let tokens: u64 = pairs.iter().map(Pair::tokens).sum();
        Amount {
            pairs: pairs.len() as u64,
            held_out_pairs: held_out.len() as u64,
            parameters: self.workload.layout.elements() as u64,
            trained_parameters: self.workload.trained.elements() as u64,
            batch_pairs: spec.train.batch_pairs as u64,
            steps,
            epochs: share,
            tokens: (tokens as f64 * share).round() as u64,
            packed_tokens: (packed(pairs) as f64 * share).round() as u64,
            held_out_packed_tokens: packed(held_out) as u64,
            sample_tokens: (samples * spec.evaluate.sample_tokens) as u64,
            reference: if spec.objective.needs_reference() {
                ReferenceAmount::all(&self.lists())
            } else {
                ReferenceAmount::default()
            },
        }
    }

    fn held_out(&self) -> &[Pair] {
        held_out(&self.spec, self.eval.as_ref())
    }

    /// All pairs of which the reference's log-probs are read.
    fn lists(&self) -> [&[Pair]; 4] {
        let MismatchedPairs { train, eval } = &self.mismatched;
        [&self.train.pairs, self.held_out(), train, eval]
    }
}

/// A program with little to read, where the system does not tell.
const PROGRAM_BYTES: u64 = 64 << 20;

impl Program {
    /// Of which nothing lies on a GPU.
    pub const NONE: Self = Self {
        resident: 0,
        peak: 0,
    };

    /// What this process has now: before it reads a tokenizer and pairs, the least that a worker of its program has.
    pub fn here() -> Self {
        Self::of_this_process(0)
    }

    /// What this process has, without `others` bytes that it holds by now.
    pub(crate) fn of_this_process(others: u64) -> Self {
        let resident = resident_bytes().unwrap_or(PROGRAM_BYTES + others);
        let resident = resident.saturating_sub(others);
        let peak = match others {
            0 => peak_bytes().unwrap_or(0),
            // The peak may be theirs.
            _ => 0,
        };
        Self {
            resident,
            peak: peak.max(resident),
        }
    }
}

impl Workload {
    /// The workload of `spec` on these pairs, for a worker alone.
    ///
    /// # Errors
    /// A reference model whose config.json cannot be read.
    pub(crate) fn new(
        spec: &Spec,
        config: ModelConfig,
        train: &[Pair],
        held_out: &[Pair],
    ) -> Result<Self, TrainError> {
        let steps = steps(spec, train.len());
        Self::of_steps(spec, config, [train, held_out], steps)
    }

    /// The workload of `spec` before its pairs are read, whatever they are: its memory is the least of any.
    ///
    /// # Errors
    /// A model whose config.json cannot be read.
    pub fn before_pairs(spec: &Spec) -> Result<Self, TrainError> {
        let config = ModelConfig::load(&spec.model.path)?;
        Self::of_steps(spec, config, [&[], &[]], Vec::new())
    }

    fn of_steps(
        spec: &Spec,
        config: ModelConfig,
        [train, held_out]: [&[Pair]; 2],
        steps: Vec<Vec<usize>>,
    ) -> Result<Self, TrainError> {
        let reference = match &spec.model.reference {
            Some(path) => Some(ModelConfig::load(path)?),
            None => None,
        };
        Ok(Self {
            layout: Layout::new(&config),
            trained: match Adapter::of(spec, &config)? {
                Some(adapter) => adapter.lora.layout(&config)?,
                None => Layout::new(&config),
            },
            precision: precision(spec.model.dtype),
            // Files that cannot be read are refused where their weights are.
            stored_bf16: model::stores_bf16(&spec.model.path).unwrap_or(false),
            moments: if has_first_moment(&spec.optimizer) {
                2
            } else {
                1
            },
            config,
            reference: reference.map(|config| {
                let layout = Layout::new(&config);
                (config, layout)
            }),
            needs_reference: spec.objective.needs_reference(),
            train: train.iter().map(Lengths::of).collect(),
            held_out: held_out.iter().map(Lengths::of).collect(),
            steps,
            knobs: Knobs {
                workers: 1,
                mirror: false,
                shard_gradients: false,
                offload: false,
                threads: 1,
                gpu: false,
                micro_batch_tokens: spec.train.micro_batch_tokens,
                gradient_checkpointing: spec.model.gradient_checkpointing,
                max_length: spec.data.max_length,
            },
        })
    }

    /// The settings that the job has, for so many workers of so many threads.
    pub fn knobs(&self, workers: usize, threads: usize, sharding: Sharding) -> Knobs {
        Knobs {
            workers,
            mirror: sharding.mirror,
            shard_gradients: sharding.gradients,
            offload: sharding.offload,
            threads,
            ..self.knobs
        }
    }
}

impl Lengths {
    fn of(pair: &Pair) -> Self {
        Self {
            prompt: pair.prompt.len(),
            completions: [pair.chosen.len(), pair.rejected.len()],
        }
    }

    fn tokens(&self) -> usize {
        self.prompt + self.completions[0] + self.completions[1]
    }

    fn longest(&self) -> usize {
        self.prompt + self.completions[0].max(self.completions[1])
    }

    /// As truncation to `max_length` leaves it; `None` where a completion loses everything.
    fn cut(&self, max_length: usize) -> Option<Self> {
        let room = max_length
            .checked_sub(self.prompt)
            .filter(|&room| room > 0)?;
        Some(Self {
            prompt: self.prompt,
            completions: self.completions.map(|length| length.min(room)),
        })
    }
}

/// Runs `work` with compute threads of its own, as a worker process has them.
fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> Result<R, TrainError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| TrainError::Thread {
        thread: "compute",
        source: std::io::Error::other(error),
    })?;
    Ok(pool.install(work))
}

/// Steps of the run, and how often a pair is visited, all pairs together.
fn visits(spec: &Spec, pairs: usize) -> (u64, f64) {
    let batch = spec.train.batch_pairs;
    let steps = spec.train.steps_total(pairs);
    let in_epoch = data::steps_per_epoch(pairs, batch);
    let rest = (steps % in_epoch) as usize * batch;
    let visits = (steps / in_epoch) as f64 * pairs as f64 + rest as f64;
    (steps, visits)
}

/// The pairs of the run's steps, of at most [`STEPS_MAX`].
fn steps(spec: &Spec, pairs: usize) -> Vec<Vec<usize>> {
    let wanted = spec.train.steps_total(pairs).min(STEPS_MAX) as usize;
    let mut steps = Vec::new();
    for epoch in 0.. {
        if steps.len() >= wanted {
            break;
        }
        let batch = spec.train.batch_pairs;
        steps.extend(epoch_steps(
            spec.seed,
            epoch,
            pairs,
            batch,
            spec.data.shuffle,
        ));
    }
    steps.truncate(wanted);
    steps
}
