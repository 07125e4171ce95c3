//! Memory of one worker on the CPU, part by part, in the moments of a run of which the busiest decides; `gpu.rs` has a GPU's.
//!
//! Every part is what its owner allocates: weights and gradients the layout's elements (`model`), moments and snapshot a
//! rank's share of them (`shards`, `snapshot`), what a pack holds (`model::PackBytes`), the sums of a reduce-scatter
//! (`collective`). Weights are f32 in every precision; in bf16 their operands, of f32's size on the CPU, lie beside them. Several
//! workers that train a whole model in bf16 have whole operands and share the f32 weights out (`masters`); of a reference and of
//! what an adapter is put on there are operands alone.

use std::fmt;

use data::pack_plan;
use model::{Layout, ModelConfig, PackBytes, PackShape, Parameter, Precision, Saving};
use serde::Serialize;

use super::{Lengths, Program, Workload};
use crate::lanes::{lanes, pack_tokens};
use crate::masters::GATHERS_IN_FLIGHT;
use crate::shard_sums::{REDUCTIONS_IN_FLIGHT, most_elements_on_a_gpu};

/// Settings that memory depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Knobs {
    /// Workers of the job.
    pub workers: usize,
    /// Whether each keeps the shards of the one before it, too.
    pub mirror: bool,
    /// Whether gradients are in shards, too (`cluster.zero = 2`).
    pub shard_gradients: bool,
    /// Whether workers with GPUs keep masters and moments in the host's memory (`cluster.offload`).
    pub offload: bool,
    /// Compute threads of each.
    pub threads: usize,
    /// Whether each of them computes on a GPU, whose memory is then meant.
    pub gpu: bool,
    /// `train.micro_batch_tokens`.
    pub micro_batch_tokens: usize,
    /// `model.gradient_checkpointing`.
    pub gradient_checkpointing: bool,
    /// `data.max_length`.
    pub max_length: usize,
}

impl Knobs {
    /// Shards of every bucket that a worker keeps: its own, and the one that it mirrors.
    pub(super) fn shards(&self) -> u64 {
        if self.mirror && self.workers > 1 {
            2
        } else {
            1
        }
    }

    /// A worker alone has its sums at once.
    pub(super) fn shards_gradients(&self) -> bool {
        self.shard_gradients && self.workers > 1
    }
}

/// Memory of one worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WorkerMemory {
    /// What is there at once in each moment of a run.
    pub moments: Vec<Moment>,
    /// The most of them.
    pub peak_bytes: u64,
    /// Most tokens that a step has on their way through the model at once.
    pub largest_micro_batch_tokens: usize,
    /// Logits that the log-prob head holds at once, with its row states; part of the workspace.
    pub head_chunk_bytes: u64,
}

/// One moment of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Moment {
    /// Such as `training step`.
    pub name: &'static str,
    /// What is there.
    pub parts: Parts,
    /// Sum of the parts.
    pub bytes: u64,
}

/// Bytes by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// The program, tokenizer and pairs, as measured.
    pub program: u64,
    /// Log-probs of the reference and what finding them needs.
    pub reference_values: u64,
    /// The policy's weights as they are computed with, and in f32 where this worker has all of them.
    pub weights: u64,
    /// f32 weights of this worker's share, where workers share them out.
    pub masters: u64,
    /// Weights of a reference model of its own.
    pub reference_weights: u64,
    /// Gradients of all weights.
    pub gradients: u64,
    /// The optimizer's moments of this worker's share of the weights.
    pub optimizer_moments: u64,
    /// Weights, and moments of this worker's share, of which an update copies what a checkpoint has not written yet, into memory that
    /// is kept for the next time: at most all, and nothing where a step takes longer than a save.
    pub snapshot: u64,
    /// What a forward keeps for its backward.
    pub activations: u64,
    /// Intermediate results of the busiest operation.
    pub workspace: u64,
    /// What the allocator loses to gaps between the tensors of a pack.
    pub gaps: u64,
    /// What reducing gradients over the ranks needs beside them.
    pub collective: u64,
    /// On a GPU what its libraries take: a workspace of products, and kernels.
    pub libraries: u64,
}

const FLOAT: u64 = size_of::<f32>() as u64;
const BF16: u64 = size_of::<u16>() as u64;
/// Bytes of a reference value while it is looked for and stored: keys in the list, in its parts and in the store.
const REFERENCE_ENTRY: u64 = 320;
/// Bytes of a pair's two reference values in training.
const REFERENCE_PAIR: u64 = 16;
/// One part in so many of what a pack holds is lost to gaps: tensors of some MiB do not fill the allocator's heaps of 64 MiB.
/// 3 to 12 % were measured on SmolLM2-135M and on stories260K.
const GAPS: u64 = 10;
/// What a worker's session, its threads and the packing buffers of its products take, as measured on runs of small models
/// (4 to 6 MiB).
const RUNTIME: u64 = 5 << 20;

impl WorkerMemory {
    pub(super) fn of(moments: Vec<Moment>, step: &InFlight) -> Self {
        Self {
            peak_bytes: moments.iter().map(|moment| moment.bytes).max().unwrap_or(0),
            moments,
            largest_micro_batch_tokens: step.tokens,
            head_chunk_bytes: step.bytes.head,
        }
    }

    /// The moment that decides.
    ///
    /// # Panics
    /// Never: there are always moments.
    pub fn busiest(&self) -> &Moment {
        let busiest = self.moments.iter().max_by_key(|moment| moment.bytes);
        busiest.expect("a run has moments")
    }
}

/// One line: the peak, when it is, and its three largest parts.
impl fmt::Display for WorkerMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let busiest = self.busiest();
        let mut parts = busiest.parts.named();
        parts.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
        let parts = parts[..3].iter().filter(|(_, bytes)| *bytes > 0);
        let parts: Vec<String> = parts
            .map(|&(name, bytes)| format!("{name} {}", size(bytes)))
            .collect();
        write!(
            f,
            "{} at most, in the {}: {}",
            size(self.peak_bytes),
            busiest.name,
            parts.join(", ")
        )
    }
}

/// Bytes as people read them.
pub(super) fn size(bytes: u64) -> String {
    match bytes as f64 / f64::from(1 << 20) {
        mib if mib < 1000.0 => format!("{mib:.1} MiB"),
        mib => format!("{:.2} GiB", mib / 1024.0),
    }
}

impl Parts {
    /// Every part with its name, in the order of the struct.
    pub fn named(&self) -> [(&'static str, u64); 13] {
        [
            ("program, tokenizer, pairs", self.program),
            ("reference log-probs", self.reference_values),
            ("weights", self.weights),
            ("f32 masters", self.masters),
            ("reference weights", self.reference_weights),
            ("gradients", self.gradients),
            ("optimizer moments", self.optimizer_moments),
            ("snapshot for checkpoints", self.snapshot),
            ("activations", self.activations),
            ("workspace", self.workspace),
            ("allocator's gaps", self.gaps),
            ("collective buffers", self.collective),
            ("GPU libraries", self.libraries),
        ]
    }

    /// With a pack on its way through the model.
    fn with(self, pack: PackBytes) -> Self {
        Self {
            activations: pack.kept,
            workspace: pack.workspace,
            gaps: pack.total() / GAPS,
            ..self
        }
    }

    fn sum(&self) -> u64 {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }
}

impl Workload {
    /// Memory of each worker under `knobs`, beside the `program` that it is before its model. `saves`: whether a
    /// checkpoint comes before the last step, so that the snapshot is there while training goes on. Neither matters to a GPU.
    pub fn memory(&self, knobs: &Knobs, program: Program, saves: bool) -> WorkerMemory {
        if knobs.gpu {
            return self.gpu_memory(knobs);
        }
        let train = cut(&self.train, knobs.max_length);
        let held_out: Vec<Lengths> = cut(&self.held_out, knobs.max_length)
            .into_iter()
            .flatten()
            .collect();
        let read = Parts {
            program: program.peak + RUNTIME,
            ..Parts::default()
        };
        let loaded = Parts {
            program: program.resident + RUNTIME,
            weights: self.loaded_weights(),
            ..Parts::default()
        };
        let mut moments = vec![
            moment("read pairs", read),
            moment(
                "load",
                Self::loading(loaded, &self.layout, self.is_frozen()),
            ),
        ];
        if self.needs_reference {
            let all: Vec<Lengths> = train.iter().flatten().chain(&held_out).copied().collect();
            let scoring = self.scoring_reference(loaded, &all, knobs);
            if let Some((_, layout)) = &self.reference {
                let weights = Parts {
                    reference_weights: scoring.reference_weights,
                    ..loaded
                };
                let loading = Self::loading(weights, layout, self.precision == Precision::Bf16);
                moments.push(moment("load the reference", loading));
            }
            moments.push(moment("reference pass", scoring));
        }
        let step = self.largest_step(&train, knobs);
        let pairs = train.len() + held_out.len();
        let trained = self.trained(loaded, pairs, knobs, saves);
        moments.push(moment(
            "training step",
            Self::stepping(trained.with(step.bytes), knobs),
        ));
        if self.masters_apart(knobs) {
            moments.push(moment("update", self.updating(trained)));
        }
        moments.push(moment("checkpoint", trained));
        if !held_out.is_empty() {
            let pack = self.largest_scored(&self.config, &packs(&held_out, knobs), knobs);
            moments.push(moment("evaluation", trained.with(pack)));
        }
        WorkerMemory::of(moments, &step)
    }

    /// Weights that are only operands are read bucket by bucket, each in f32 and rounded; of others the digest takes each parameter
    /// by itself.
    fn loading(loaded: Parts, layout: &Layout, frozen: bool) -> Parts {
        let workspace = if frozen {
            let largest = layout.bucket_lens().into_iter().max();
            largest.unwrap_or(0) as u64 * (FLOAT + BF16)
        } else {
            let parameters = layout.parameters.iter();
            let largest = parameters.map(Parameter::elements).max();
            largest.unwrap_or(0) as u64 * FLOAT
        };
        Parts {
            workspace,
            ..loaded
        }
    }

    fn scoring_reference(&self, loaded: Parts, pairs: &[Lengths], knobs: &Knobs) -> Parts {
        let own = self.reference.as_ref();
        let config = own.map_or(&self.config, |(config, _)| config);
        let parts = Parts {
            reference_values: REFERENCE_ENTRY * 2 * pairs.len() as u64,
            reference_weights: own.map_or(0, |(_, layout)| self.frozen_weights(layout)),
            ..loaded
        };
        parts.with(self.largest_scored(config, &in_order(pairs, knobs), knobs))
    }

    /// What stays while a run trains.
    fn trained(&self, loaded: Parts, pairs: usize, knobs: &Knobs, saves: bool) -> Parts {
        let shard = knobs.shards() * self.shard(knobs);
        let apart = self.masters_apart(knobs);
        Parts {
            weights: if apart {
                self.frozen_weights(&self.layout)
            } else {
                loaded.weights + self.adapter_weights()
            },
            masters: if apart { shard * FLOAT } else { 0 },
            gradients: self.gradients(knobs),
            optimizer_moments: self.moments * shard * FLOAT,
            snapshot: if saves { self.snapshot(knobs) } else { 0 },
            reference_values: if self.needs_reference {
                REFERENCE_PAIR * pairs as u64
            } else {
                0
            },
            ..loaded
        }
    }

    /// Gradients are reduced while packs are on their way. A worker alone reduces nothing.
    fn stepping(trained: Parts, knobs: &Knobs) -> Parts {
        let scratch = if knobs.workers > 1 {
            collective::tcp::SCRATCH_BYTES as u64
        } else {
            0
        };
        Parts {
            collective: scratch,
            ..trained
        }
    }

    /// What is there while masters that are shared out are updated: no pack, but bits of operands on their way.
    fn updating(&self, trained: Parts) -> Parts {
        let mut lens = self.trained.bucket_lens();
        lens.sort_unstable_by(|a, b| b.cmp(a));
        let travelling: usize = lens.iter().take(GATHERS_IN_FLIGHT + 1).sum();
        Parts {
            collective: BF16 * travelling as u64,
            ..trained
        }
    }

    /// Bytes of gradients: of all weights, or of a worker's shards and of the buckets on their way there.
    pub(super) fn gradients(&self, knobs: &Knobs) -> u64 {
        if !knobs.shards_gradients() {
            return self.trained.elements() as u64 * FLOAT;
        }
        let whole = if knobs.gpu {
            most_elements_on_a_gpu(&self.trained)
        } else {
            let mut lens = self.trained.bucket_lens();
            lens.sort_unstable_by(|a, b| b.cmp(a));
            // Those of a stage while the backward adds to them, and those before them, whose memory is used again for any bucket.
            let stage = self.trained.buckets.iter().map(|bucket| {
                let others = self.trained.buckets_of(bucket.stage);
                others.map(|other| self.trained.buckets[other].len).sum()
            });
            let largest: usize = stage.max().unwrap_or(0);
            let travelling: usize = lens.iter().take(REDUCTIONS_IN_FLIGHT).sum();
            self.trained.elements().min(largest + travelling)
        };
        (knobs.shards() * self.shard(knobs) + whole as u64) * FLOAT
    }

    /// Whether the f32 weights are apart from what is computed with: workers share them out, or keep them beside their GPU.
    pub(super) fn masters_apart(&self, knobs: &Knobs) -> bool {
        self.can_part() && (knobs.workers > 1 || self.offloads(knobs))
    }

    /// Whether masters and moments are not on the GPU.
    pub(super) fn offloads(&self, knobs: &Knobs) -> bool {
        knobs.gpu && knobs.offload && self.can_part()
    }

    fn can_part(&self) -> bool {
        self.trained == self.layout && self.precision == Precision::Bf16
    }

    /// Whether there is nothing of the model's own weights but what a forward reads: an adapter is trained.
    pub(super) fn is_frozen(&self) -> bool {
        self.trained != self.layout && self.precision == Precision::Bf16
    }

    /// Copies of what a checkpoint is written from: what an update makes of it that comes before any of it is written. Of weights that
    /// this worker has whole, whole buckets are copied.
    fn snapshot(&self, knobs: &Knobs) -> u64 {
        let shard = self.shard(knobs);
        let weights = if self.masters_apart(knobs) {
            shard
        } else {
            self.trained.elements() as u64
        };
        (weights + self.moments * shard) * FLOAT
    }

    /// Elements of a worker's share; of every bucket the first workers may have one more.
    pub(super) fn shard(&self, knobs: &Knobs) -> u64 {
        let shares = self
            .trained
            .buckets
            .iter()
            .map(|it| it.len.div_ceil(knobs.workers));
        shares.sum::<usize>() as u64
    }

    /// The packs that a step has on their way at once, where they hold most.
    fn largest_step(&self, train: &[Option<Lengths>], knobs: &Knobs) -> InFlight {
        let saving = if knobs.gradient_checkpointing {
            Saving::BlockInputs
        } else {
            Saving::Operands
        };
        let steps = self.steps.iter().map(|step| {
            let lengths: Vec<Lengths> = step.iter().filter_map(|&pair| train[pair]).collect();
            in_flight(&packs(&lengths, knobs), knobs, |shape, threads| {
                PackBytes::training(&self.config, shape, saving, self.precision, threads)
            })
        });
        let largest = steps.max_by_key(|it| it.bytes.total());
        largest.unwrap_or_default()
    }

    fn largest_scored(
        &self,
        config: &ModelConfig,
        shapes: &[PackShape],
        knobs: &Knobs,
    ) -> PackBytes {
        in_flight(shapes, knobs, |shape, threads| {
            PackBytes::scoring(config, shape, self.precision, threads)
        })
        .bytes
    }

    /// Bytes of the policy's weights once they are read.
    pub(crate) fn loaded_weights(&self) -> u64 {
        if self.is_frozen() {
            self.frozen_weights(&self.layout)
        } else {
            self.weights(self.layout.elements())
        }
    }

    /// Bytes of weights of which there is nothing but what a forward reads.
    fn frozen_weights(&self, layout: &Layout) -> u64 {
        let apart = match self.precision {
            Precision::F32 => 0,
            Precision::Bf16 => layout.narrow_elements(),
        };
        (layout.elements() + apart) as u64 * FLOAT
    }

    /// Bytes of so many weights as they are computed with, and in f32.
    fn weights(&self, elements: usize) -> u64 {
        let copies = match self.precision {
            Precision::F32 => 1,
            Precision::Bf16 => 2,
        };
        copies * elements as u64 * FLOAT
    }

    /// Bytes of an adapter beside the model; none where the model itself is trained.
    fn adapter_weights(&self) -> u64 {
        if self.trained == self.layout {
            return 0;
        }
        self.weights(self.trained.elements())
    }
}

pub(super) fn moment(name: &'static str, parts: Parts) -> Moment {
    Moment {
        name,
        parts,
        bytes: parts.sum(),
    }
}

/// Packs that go through the model side by side.
#[derive(Default)]
pub(super) struct InFlight {
    pub bytes: PackBytes,
    pub tokens: usize,
}

/// The most that lanes hold of these packs; each lane has its part of the threads.
fn in_flight(
    shapes: &[PackShape],
    knobs: &Knobs,
    bytes: impl Fn(&PackShape, usize) -> PackBytes,
) -> InFlight {
    let tokens: Vec<usize> = shapes.iter().map(|shape| shape.tokens).collect();
    let lanes = lanes(&tokens, knobs.micro_batch_tokens, knobs.threads);
    let threads = knobs.threads.div_ceil(lanes);
    let mut packs: Vec<_> = shapes
        .iter()
        .map(|shape| (bytes(shape, threads), shape.tokens))
        .collect();
    packs.sort_by_key(|(bytes, _)| std::cmp::Reverse(bytes.total()));
    let together = packs.into_iter().take(lanes);
    together.fold(InFlight::default(), |all, (bytes, tokens)| InFlight {
        bytes: PackBytes {
            kept: all.bytes.kept + bytes.kept,
            workspace: all.bytes.workspace + bytes.workspace,
            head: all.bytes.head + bytes.head,
        },
        tokens: all.tokens + tokens,
    })
}

pub(super) fn cut(lengths: &[Lengths], max_length: usize) -> Vec<Option<Lengths>> {
    lengths.iter().map(|pair| pair.cut(max_length)).collect()
}

/// The packs of pairs that are planned together.
pub(super) fn packs(lengths: &[Lengths], knobs: &Knobs) -> Vec<PackShape> {
    let tokens: Vec<usize> = lengths.iter().map(Lengths::tokens).collect();
    let plan = pack_plan(&tokens, pack_tokens(!knobs.gpu, knobs.micro_batch_tokens));
    plan.iter()
        .map(|pack| shape(pack.iter().map(|&pair| &lengths[pair])))
        .collect()
}

/// Packs that are filled one after another, as the reference pass does it.
pub(super) fn in_order(lengths: &[Lengths], knobs: &Knobs) -> Vec<PackShape> {
    let capacity = pack_tokens(!knobs.gpu, knobs.micro_batch_tokens);
    let mut packs: Vec<PackShape> = Vec::new();
    for pair in lengths {
        let fits = |pack: &PackShape| pack.tokens + pair.tokens() <= capacity;
        match packs.last_mut().filter(|pack| fits(pack)) {
            Some(pack) => *pack = pack.and(pair.prompt, pair.completions),
            None => packs.push(shape(std::iter::once(pair))),
        }
    }
    packs
}

fn shape<'a>(pairs: impl Iterator<Item = &'a Lengths>) -> PackShape {
    pairs.fold(PackShape::default(), |shape, pair| {
        shape.and(pair.prompt, pair.completions)
    })
}
