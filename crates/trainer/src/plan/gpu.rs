//! Memory of one worker's GPU: what lies in `gpu`'s arena, derived from `kernels::cuda` and `model::PackBytes`, and what its
//! libraries take beside it; and what such a worker needs of the host's memory.
//!
//! A worker alone keeps whole weights, operands, gradients and moments on its GPU. Of several, each keeps whole operands in bf16, whole
//! f32 of what is read in f32, and whole gradients; masters and moments are those of its shard and of the one that it mirrors. In f32
//! weights are whole on every GPU; under an adapter, and of a reference model, there are operands alone. With `cluster.offload` masters
//! and moments are the host's. (Workers with GPUs that reduce over TCP keep moments on the host; their GPUs need less than this says.)
//! What an H100's arena had in use for models of 0.13 to 3 billion parameters is this sum to 0.1 %; `tests` below compares.

use std::fmt;

use data::Pair;
use model::{Device, Layout, ModelConfig, PackBytes, PackShape, Precision, Saving};
use serde::Serialize;
use spec::Spec;

use super::memory::{InFlight, cut, in_order, moment, packs, size};
use super::{Cure, Knobs, Lengths, Parts, Program, WorkerMemory, Workload};
use crate::error::TrainError;
use crate::shards::Sharding;

/// cuBLASLt's workspace, which `gpu` takes when it opens a device, and its kernels and ours as the driver loads them; the second part
/// is an assumption.
const LIBRARIES: u64 = (32 << 20) + (256 << 20);

/// One part in so many of what a pack holds may be lost between parts of the arena; an assumption, since only what is in use was
/// measured. It is no reason to refuse a job.
const GAPS: u64 = 16;

/// What the driver takes of a card for a process before anything is allocated; an assumption for cards that are not here.
pub const CONTEXT_BYTES: u64 = 512 << 20;

/// What NCCL takes for its channels to other ranks; an assumption.
const NCCL: u64 = 512 << 20;

/// Bytes of a weight and its gradient.
const FLOAT: u64 = size_of::<f32>() as u64;
const BF16: u64 = size_of::<u16>() as u64;

impl Workload {
    /// The settings that the job has, for so many workers with a GPU each.
    pub fn gpu_knobs(&self, workers: usize, sharding: Sharding) -> Knobs {
        Knobs {
            gpu: true,
            ..self.knobs(workers, 1, sharding)
        }
    }

    pub(super) fn gpu_memory(&self, knobs: &Knobs) -> WorkerMemory {
        let train = cut(&self.train, knobs.max_length);
        let held_out: Vec<Lengths> = cut(&self.held_out, knobs.max_length)
            .into_iter()
            .flatten()
            .collect();
        let apart = self.masters_apart(knobs);
        let loaded = Parts {
            weights: if apart || self.is_frozen() {
                // The f32 weights stay in the host's memory until each worker takes its shards, or are gone.
                self.frozen_gpu_weights(&self.layout)
            } else {
                self.gpu_weights(self.layout.elements())
            },
            libraries: LIBRARIES,
            ..Parts::default()
        };
        let mut moments = vec![moment("load", loaded)];
        if self.needs_reference {
            let own = self.reference.as_ref();
            let config = own.map_or(&self.config, |(config, _)| config);
            let all: Vec<Lengths> = train.iter().flatten().chain(&held_out).copied().collect();
            let parts = Parts {
                reference_weights: own.map_or(0, |(_, layout)| self.frozen_gpu_weights(layout)),
                ..loaded
            };
            let pack = self.largest_scored_on_gpu(config, &in_order(&all, knobs));
            moments.push(moment("reference pass", with(parts, pack)));
        }
        let elements = self.trained.elements();
        let adapter = if self.trained == self.layout {
            0
        } else {
            self.gpu_weights(elements)
        };
        let alone = knobs.workers == 1;
        let shard = elements.div_ceil(knobs.workers) as u64;
        let kept = knobs.shards() * FLOAT * shard;
        let offloads = self.offloads(knobs);
        let trained = Parts {
            weights: loaded.weights + adapter,
            masters: if apart && !offloads { kept } else { 0 },
            gradients: self.gradients(knobs),
            optimizer_moments: if offloads { 0 } else { self.moments * kept },
            collective: if alone { 0 } else { NCCL },
            ..loaded
        };
        let step = self.largest_step_on_gpu(&train, knobs);
        moments.push(moment("training step", with(trained, step.bytes)));
        if !held_out.is_empty() {
            let pack = self.largest_scored_on_gpu(&self.config, &packs(&held_out, knobs));
            moments.push(moment("evaluation", with(trained, pack)));
        }
        WorkerMemory::of(moments, &step)
    }

    /// What a worker with a GPU takes of the host's memory. `saves`: whether a checkpoint comes before the last step.
    pub fn host_memory(&self, knobs: &Knobs, saves: bool) -> HostMemory {
        let apart = self.masters_apart(knobs);
        let bucket = self.layout.bucket_lens().into_iter().max().unwrap_or(0) as u64;
        let shard = FLOAT * self.shard(knobs);
        // Where masters are not beside the moments, they stay on the GPU.
        let kept = (u64::from(apart) + self.moments) * knobs.shards() * shard;
        HostMemory {
            loading: if apart && !self.stored_bf16 {
                FLOAT * self.layout.elements() as u64
            } else {
                bucket * (FLOAT + BF16)
            },
            optimizer: if self.offloads(knobs) { kept } else { 0 },
            regrouping: if knobs.workers > 1 { kept } else { 0 },
            snapshot: if saves { (1 + self.moments) * shard } else { 0 },
        }
    }

    /// Bytes of so many weights, and of what they are as operands.
    fn gpu_weights(&self, elements: usize) -> u64 {
        let operand = match self.precision {
            Precision::F32 => 0,
            Precision::Bf16 => self.precision.gpu_bytes() as u64,
        };
        (FLOAT + operand) * elements as u64
    }

    /// Bytes of weights of which there is nothing but what a forward reads.
    fn frozen_gpu_weights(&self, layout: &Layout) -> u64 {
        let operands = self.precision.gpu_bytes() * layout.elements();
        let apart = match self.precision {
            Precision::F32 => 0,
            Precision::Bf16 => FLOAT * layout.narrow_elements() as u64,
        };
        operands as u64 + apart
    }

    /// One pack is on its way at a time.
    fn largest_step_on_gpu(&self, train: &[Option<Lengths>], knobs: &Knobs) -> InFlight {
        let saving = if knobs.gradient_checkpointing {
            Saving::BlockInputs
        } else {
            Saving::Operands
        };
        let packs = self.steps.iter().flat_map(|step| {
            let lengths: Vec<Lengths> = step.iter().filter_map(|&pair| train[pair]).collect();
            packs(&lengths, knobs)
        });
        let held = packs.map(|shape| InFlight {
            bytes: PackBytes::training_on_gpu(&self.config, &shape, saving, self.precision),
            tokens: shape.tokens,
        });
        held.max_by_key(|it| it.bytes.total()).unwrap_or_default()
    }

    fn largest_scored_on_gpu(&self, config: &ModelConfig, shapes: &[PackShape]) -> PackBytes {
        let held = shapes
            .iter()
            .map(|shape| PackBytes::scoring_on_gpu(config, shape, self.precision));
        held.max_by_key(PackBytes::total).unwrap_or_default()
    }
}

fn with(parts: Parts, pack: PackBytes) -> Parts {
    Parts {
        activations: pack.kept,
        workspace: pack.workspace,
        gaps: pack.total() / GAPS,
        ..parts
    }
}

/// Bytes of the host's memory that a worker with a GPU takes beside its program, tokenizer and pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HostMemory {
    /// While weights are read: one bucket, or all of them in f32 where the workers share them out and files have more than bf16.
    pub loading: u64,
    /// Offloaded masters and moments.
    pub optimizer: u64,
    /// What a worker had of them before, while a new generation forms.
    pub regrouping: u64,
    /// What a checkpoint is written from.
    pub snapshot: u64,
}

impl HostMemory {
    /// The most that is there at once.
    pub fn peak_bytes(&self) -> u64 {
        let training = self.optimizer + self.regrouping.max(self.snapshot);
        self.loading.max(training)
    }
}

/// A job that a GPU has no room for.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuRefusal {
    /// What it needs.
    pub memory: WorkerMemory,
    /// Bytes that are free.
    pub free: u64,
    /// Bytes that the GPU has.
    pub total: u64,
    /// Settings with which it fits.
    pub cures: Vec<Cure>,
    /// The least that it needs under any settings.
    pub least_bytes: u64,
}

impl fmt::Display for GpuRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            memory,
            free,
            total,
            cures,
            least_bytes,
        } = self;
        write!(
            f,
            "the GPU has {} free of {}, and this job needs {memory}",
            size(*free),
            size(*total)
        )?;
        if cures.is_empty() {
            return write!(
                f,
                "; no setting makes it fit: it needs at least {}; take a larger GPU or a smaller model, or end other programs \
                 on it",
                size(*least_bytes)
            );
        }
        let cures: Vec<_> = cures.iter().map(ToString::to_string).collect();
        write!(f, "; it fits with {}", cures.join(", or with "))
    }
}

/// How many workers a job has, and whether they mirror each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peers {
    /// Workers, this one included.
    pub workers: usize,
    /// How they share out what training keeps.
    pub sharding: Sharding,
}

impl Peers {
    /// One worker.
    pub const NONE: Self = Self {
        workers: 1,
        sharding: Sharding {
            mirror: false,
            gradients: false,
            offload: false,
        },
    };
}

/// Says what the job of `spec` on these pairs, as one of `peers`, needs of the GPU `device`, before anything is allocated there;
/// elsewhere nothing. `loaded` bytes of it are there already.
///
/// # Errors
/// A GPU that has no room for it.
pub(crate) fn check(
    spec: &Spec,
    train: &[Pair],
    held_out: &[Pair],
    peers: Peers,
    device: &Device,
    loaded: u64,
) -> Result<(), TrainError> {
    let Some([free, total]) = device.available_and_total() else {
        return Ok(());
    };
    judge(
        &workload(spec, train, held_out)?,
        peers,
        free + loaded,
        total,
    )
    .map_err(|refusal| TrainError::Gpu(Box::new(refusal)))
}

fn workload(spec: &Spec, train: &[Pair], held_out: &[Pair]) -> Result<Workload, TrainError> {
    let config = ModelConfig::load(&spec.model.path)?;
    Workload::new(spec, config, train, held_out)
}

/// Fewest workers of a job, at most as many as `peers`, among whom it has room on the GPU `device`, of which `loaded` bytes are its
/// own already; 0 where there is no GPU.
///
/// # Errors
/// A model that cannot be read.
pub(crate) fn workers_min(
    spec: &Spec,
    train: &[Pair],
    held_out: &[Pair],
    peers: Peers,
    device: &Device,
    loaded: u64,
) -> Result<usize, TrainError> {
    let Some([free, _]) = device.available_and_total() else {
        return Ok(0);
    };
    Ok(fewest(
        &workload(spec, train, held_out)?,
        peers,
        free + loaded,
    ))
}

/// Whatever fits among two or more fits among still more, whose shards are smaller. One alone may fit where two do not, which hold
/// mirrors and a collective's buffers; then it is not counted.
fn fewest(workload: &Workload, peers: Peers, free: u64) -> usize {
    let (mut least, mut most) = (1, peers.workers.max(1));
    while least < most {
        let middle = least.midpoint(most);
        let knobs = workload.gpu_knobs(middle, peers.sharding);
        if workload.gpu_memory(&knobs).certain_bytes() > free {
            least = middle + 1;
        } else {
            most = middle;
        }
    }
    least
}

fn workers(workers: usize) -> String {
    match workers {
        1 => "alone".into(),
        many => format!("as one of {many} workers"),
    }
}

fn judge(workload: &Workload, peers: Peers, free: u64, total: u64) -> Result<(), GpuRefusal> {
    let knobs = workload.gpu_knobs(peers.workers, peers.sharding);
    let memory = workload.gpu_memory(&knobs);
    tracing::info!(
        "GPU memory, {}: {memory}; {} of {} are free",
        workers(peers.workers),
        size(free),
        size(total)
    );
    if memory.certain_bytes() > free {
        let least_bytes = workload.least_bytes(&knobs, Program::NONE, false);
        return Err(GpuRefusal {
            cures: workload.cures(&knobs, Program::NONE, false, free),
            memory,
            free,
            total,
            least_bytes,
        });
    }
    if memory.peak_bytes > free {
        tracing::warn!(
            "the GPU may have too little memory for this job: it fits only without any gaps"
        );
    }
    Ok(())
}

impl WorkerMemory {
    /// The peak without what is only assumed to be lost to gaps.
    pub fn certain_bytes(&self) -> u64 {
        let certain = self.moments.iter().map(|it| it.bytes - it.parts.gaps);
        certain.max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use model::Stage;

    use super::*;

    const GIB: f64 = (1u64 << 30) as f64;

    /// A Llama: hidden, layers, heads, key heads, intermediate, vocabulary.
    fn llama(shape: [usize; 6], tied: bool) -> ModelConfig {
        let [hidden, layers, heads, kv_heads, intermediate, vocabulary] = shape;
        let text = format!(
            r#"{{"model_type": "llama", "hidden_size": {hidden}, "intermediate_size": {intermediate},
                 "num_hidden_layers": {layers}, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
                 "vocab_size": {vocabulary}, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
                 "tie_word_embeddings": {tied}, "max_position_embeddings": 8192}}"#
        );
        ModelConfig::parse(&text, Path::new("config.json")).expect("a config")
    }

    /// One step of one pack with so many tokens, of which so many are predicted.
    fn workload(config: ModelConfig, [tokens, predicted]: [usize; 2]) -> Workload {
        let layout = Layout::new(&config);
        let pair = Lengths {
            prompt: tokens - predicted,
            completions: [predicted, 0],
        };
        Workload {
            trained: layout.clone(),
            layout,
            config,
            precision: Precision::Bf16,
            stored_bf16: true,
            moments: 2,
            reference: None,
            needs_reference: false,
            train: vec![pair],
            held_out: Vec::new(),
            steps: vec![vec![0]],
            knobs: Knobs {
                workers: 1,
                mirror: false,
                shard_gradients: false,
                offload: false,
                threads: 1,
                gpu: false,
                micro_batch_tokens: tokens,
                gradient_checkpointing: false,
                max_length: tokens,
            },
        }
    }

    fn smollm2() -> ModelConfig {
        llama([576, 30, 9, 3, 1536, 49152], true)
    }

    #[test]
    fn a_step_needs_what_an_h100_had_in_use() {
        // `worker bench` with 64 pairs a step of chat-preferences.jsonl, bf16: model, the largest pack's tokens and predictions, what
        // the arena had in use at most, in GiB. Every byte of it is accounted for.
        let billion = || llama([2048, 24, 32, 8, 5632, 32000], false);
        let three = || llama([3072, 28, 24, 8, 8192, 32000], false);
        for (config, pack, checkpointing, found) in [
            (smollm2(), [14_108, 10_529], false, 8.505),
            (billion(), [14_070, 10_490], false, 36.734),
            (billion(), [8_078, 5_524], false, 30.056),
            (three(), [4_053, 3_760], true, 52.608),
        ] {
            let workload = workload(config, pack);
            let knobs = Knobs {
                gradient_checkpointing: checkpointing,
                ..workload.gpu_knobs(1, Sharding::default())
            };
            let memory = workload.gpu_memory(&knobs);
            let parts = memory.busiest().parts;
            let said = (memory.peak_bytes - parts.libraries - parts.gaps) as f64 / GIB;
            println!("{said:.3} said, {found} found");
            assert!(
                (said / found - 1.0).abs() < 0.001,
                "{said} said, {found} found"
            );
        }
    }

    #[test]
    fn the_fewest_workers_are_those_that_have_room_where_one_less_has_none() {
        let billion = llama([2048, 24, 32, 8, 5632, 32000], false);
        let workload = workload(billion, [8_078, 5_524]);
        let peers = |workers| Peers {
            workers,
            ..Peers::NONE
        };
        let needed = |workers| {
            let knobs = workload.gpu_knobs(workers, Sharding::default());
            workload.gpu_memory(&knobs).certain_bytes()
        };
        for enough in [2, 3, 7] {
            assert!(needed(enough) < needed(enough - 1));
            for among in [enough, enough + 1, 64, 1 << 12] {
                assert_eq!(fewest(&workload, peers(among), needed(enough)), enough);
            }
        }
        assert_eq!(fewest(&workload, peers(8), u64::MAX), 1);
        // Who works among so many has room there, whatever the plan says.
        assert_eq!(fewest(&workload, peers(8), 0), 8);
    }

    #[test]
    fn a_gpu_without_room_is_refused_with_settings_that_fit_and_one_with_room_is_not() {
        let workload = workload(smollm2(), [14_000, 9_000]);
        let total = 80 << 30;
        assert_eq!(judge(&workload, Peers::NONE, total, total), Ok(()));
        let memory = workload.gpu_memory(&workload.gpu_knobs(1, Sharding::default()));
        let needed = memory.certain_bytes();
        assert!(needed < memory.peak_bytes);
        assert_eq!(
            judge(&workload, Peers::NONE, needed, total),
            Ok(()),
            "gaps alone refuse nothing"
        );
        let refusal = judge(&workload, Peers::NONE, needed - 1, total).expect_err("no room");
        let first = &refusal.cures[0].changes;
        assert_eq!(first[0].key, "model.gradient_checkpointing");
        for cure in &refusal.cures {
            assert!(cure.bytes < needed, "{cure:?}");
            assert!(
                cure.changes.iter().all(|it| it.key != "cluster.workers"),
                "{cure:?}"
            );
        }
        let text = refusal.to_string();
        for part in [
            "GiB free of 80.00 GiB",
            "training step",
            "it fits with --set model.gradient_checkpointing=true (",
        ] {
            assert!(text.contains(part), "no `{part}` in: {text}");
        }
        let nothing = judge(&workload, Peers::NONE, 1 << 30, total).expect_err("no room at all");
        assert!(nothing.cures.is_empty());
        assert!(
            nothing.to_string().contains("it needs at least"),
            "{nothing}"
        );
    }

    #[test]
    fn gradients_in_shards_and_an_offloaded_optimizer_leave_operands_and_buckets_on_their_way() {
        // 8 billion parameters, which 8 GPUs of 80 GB hold with mirrors.
        let workload = workload(
            llama([4096, 32, 32, 8, 14_336, 128_256], false),
            [4096, 3000],
        );
        let elements = workload.layout.elements() as u64;
        let memory = |workers, sharding| {
            let knobs = Knobs {
                gradient_checkpointing: true,
                ..workload.gpu_knobs(workers, sharding)
            };
            workload.gpu_memory(&knobs)
        };
        let mirrored = Sharding {
            mirror: true,
            ..Sharding::default()
        };
        let sharded = Sharding {
            gradients: true,
            ..mirrored
        };
        let offloaded = Sharding {
            offload: true,
            ..sharded
        };
        let parts = |workers, sharding| memory(workers, sharding).busiest().parts;
        let whole = parts(8, mirrored);
        assert_eq!(whole.gradients, 4 * elements);
        let shards = parts(8, sharded);
        // The last block while four buckets are on their way: the norm's, the head's, and of the pack before the table of tokens and
        // the first block's last one.
        let sums = 2 * workload.shard(&workload.gpu_knobs(8, sharded)) as usize;
        let block = block(&workload.layout);
        let last = block.last().expect("a bucket");
        let travelling = 4096 + 2 * 128_256 * 4096 + last + block.iter().sum::<usize>();
        assert_eq!(shards.gradients, 4 * (sums + travelling) as u64);
        assert_eq!(
            [shards.weights, shards.masters],
            [whole.weights, whole.masters]
        );
        let host = parts(8, offloaded);
        assert_eq!([host.masters, host.optimizer_moments], [0, 0]);
        assert_eq!(
            [host.weights, host.gradients],
            [shards.weights, shards.gradients]
        );
        // A worker alone shares nothing out, but may keep its masters and moments beside its GPU.
        let alone = parts(1, offloaded);
        assert_eq!([alone.masters, alone.optimizer_moments], [0, 0]);
        assert!(alone.weights < whole.weights + (1 << 20));
        assert_eq!(alone.gradients, 4 * elements);
        let peaks = [mirrored, sharded, offloaded].map(|it| memory(8, it).certain_bytes());
        assert!(peaks[0] > peaks[1] && peaks[1] > peaks[2], "{peaks:?}");
        // What helps is offered by name.
        let knobs = Knobs {
            gradient_checkpointing: true,
            ..workload.gpu_knobs(8, mirrored)
        };
        let limit = memory(8, sharded).peak_bytes;
        let cures = workload.cures(&knobs, Program::NONE, false, limit);
        let offered = |key| {
            let changes = cures.iter().flat_map(|cure| &cure.changes);
            changes.into_iter().any(|change| change.key == key)
        };
        assert!(
            offered("cluster.zero") && offered("cluster.offload"),
            "{cures:?}"
        );
    }

    /// Elements of a block's buckets.
    fn block(layout: &Layout) -> Vec<usize> {
        let buckets = layout.buckets_of(Stage::Block(0));
        buckets.map(|at| layout.buckets[at].len).collect()
    }

    #[test]
    fn beside_a_table_that_is_the_head_as_well_blocks_come_and_go() {
        let workload = workload(smollm2(), [1000, 600]);
        let sharding = Sharding {
            gradients: true,
            ..Sharding::default()
        };
        let knobs = workload.gpu_knobs(8, sharding);
        let [block] = block(&workload.layout)[..] else {
            panic!("a small block has one bucket");
        };
        let elements = workload.shard(&knobs) as usize + 49_152 * 576 + 5 * block;
        assert_eq!(workload.gradients(&knobs), 4 * elements as u64);
    }

    #[test]
    fn under_an_adapter_and_of_a_reference_a_gpu_has_operands_alone() {
        let mut workload = workload(smollm2(), [1000, 600]);
        let elements = workload.layout.elements() as u64;
        // SmolLM2 has two norms a layer and one behind them.
        let narrow = 576 * (2 * 30 + 1);
        let lora = model::Lora {
            rank: 16,
            alpha: 16.0,
            rank_stabilized: false,
            targets: model::Targets::AllLinear,
        };
        workload.trained = lora.layout(&workload.config).expect("an adapter");
        let trained = workload.trained.elements() as u64;
        let reference = (workload.config.clone(), workload.layout.clone());
        workload.reference = Some(reference);
        workload.needs_reference = true;
        let memory = workload.gpu_memory(&workload.gpu_knobs(1, Sharding::default()));
        let parts = |name| {
            let mut moments = memory.moments.iter();
            moments.find(|it| it.name == name).expect("a moment").parts
        };
        let frozen = 2 * elements + 4 * narrow;
        assert_eq!(parts("load").weights, frozen);
        assert_eq!(parts("reference pass").reference_weights, frozen);
        let step = parts("training step");
        let held = [step.weights, step.gradients, step.optimizer_moments];
        assert_eq!(held, [frozen + 6 * trained, 4 * trained, 8 * trained]);
    }

    #[test]
    fn the_host_has_what_is_offloaded_and_f32_weights_until_they_are_shared_out() {
        let mut workload = workload(smollm2(), [1000, 600]);
        let elements = workload.layout.elements() as u64;
        let host = |workload: &Workload, workers, offload, saves| {
            let sharding = Sharding {
                mirror: true,
                offload,
                ..Sharding::default()
            };
            workload.host_memory(&workload.gpu_knobs(workers, sharding), saves)
        };
        let bucket = 6 * 49_152 * 576;
        let alone = host(&workload, 1, false, false);
        assert_eq!(
            alone,
            HostMemory {
                loading: bucket,
                optimizer: 0,
                regrouping: 0,
                snapshot: 0
            }
        );
        assert_eq!(host(&workload, 1, true, false).optimizer, 12 * elements);
        let shard = elements.div_ceil(4);
        let four = host(&workload, 4, true, true);
        assert_eq!(
            [four.loading, four.optimizer, four.regrouping, four.snapshot],
            [bucket, 24 * shard, 24 * shard, 12 * shard]
        );
        assert_eq!(four.peak_bytes(), 48 * shard);
        workload.stored_bf16 = false;
        let four = host(&workload, 4, false, true);
        assert_eq!([four.loading, four.optimizer], [4 * elements, 0]);
        assert_eq!(host(&workload, 1, false, false), alone);
        // In f32 only moments are shared out.
        workload.precision = Precision::F32;
        let four = host(&workload, 4, false, true);
        assert_eq!([four.loading, four.regrouping], [bucket, 16 * shard]);
        assert_eq!([four.optimizer, four.snapshot], [0, 12 * shard]);
    }

    #[test]
    fn operands_of_f32_are_the_weights_and_workers_hold_the_moments_of_their_shards_and_mirrors() {
        let mut workload = workload(smollm2(), [1000, 600]);
        let elements = workload.layout.elements() as u64;
        let parts = |workload: &Workload, workers, mirror| {
            let sharding = Sharding {
                mirror,
                ..Sharding::default()
            };
            workload
                .gpu_memory(&workload.gpu_knobs(workers, sharding))
                .busiest()
                .parts
        };
        let bf16 = parts(&workload, 1, true);
        let held = [bf16.weights, bf16.gradients, bf16.optimizer_moments];
        assert_eq!(held, [6, 4, 8].map(|bytes| bytes * elements));
        assert_eq!(bf16.masters, 0, "a worker alone has them in its model");
        let shard = elements.div_ceil(4);
        for (mirror, shards) in [(false, 1), (true, 2)] {
            let shared = parts(&workload, 4, mirror);
            let held = [shared.masters, shared.optimizer_moments];
            assert_eq!(held, [4, 8].map(|bytes| shards * bytes * shard));
            // SmolLM2 has two norms a layer and one behind them.
            let narrow = 576 * (2 * 30 + 1);
            assert_eq!(shared.weights, 2 * elements + 4 * narrow);
            assert_eq!(shared.gradients, 4 * elements);
        }
        assert_eq!(
            [1, 4].map(|it| parts(&workload, it, true).collective),
            [0, NCCL]
        );
        workload.precision = Precision::F32;
        let f32 = parts(&workload, 1, true);
        assert_eq!(f32.weights, 4 * elements);
        let f32_shared = parts(&workload, 4, true);
        assert_eq!([f32_shared.weights, f32_shared.masters], [4 * elements, 0]);
        assert!(f32.activations > bf16.activations);
    }
}
