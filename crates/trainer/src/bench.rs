//! The speed of training steps on this process alone: the same forward, backward and update as a run's, with reference values
//! at hand as in a run (their computation is no part of a step).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use data::{DataConfig, Tokenizer, step_pairs};
use kernels::DeviceTime;
use model::{Device, Model, ModelConfig, Operations, Saving};
use objective::ObjectiveConfig;
use serde::Serialize;
use spec::{Dtype, OptimizerSection, SpecError};

use crate::batch::Batch;
use crate::error::TrainError;
use crate::learner::Learner;
use crate::measure::measure;
use crate::phases::Phases;
use crate::process::peak_bytes;
use crate::setup::{check_vocabulary, needs, precision};
use crate::shards::Sharding;
use crate::utilization::peak_of;
use crate::warm_up::KernelTimes;

/// What to time.
#[derive(Clone, Debug)]
pub struct BenchRequest {
    /// Hugging Face directory.
    pub model: PathBuf,
    /// Files and how to read them; `data.train` is trained on, in file order.
    pub data: DataConfig,
    /// Pairs of one step.
    pub batch_pairs: usize,
    /// Most tokens that go through the model at once.
    pub micro_batch_tokens: usize,
    /// Steps that are timed.
    pub steps: u64,
    /// Steps before them that are not.
    pub warmup: u64,
    /// Arithmetic.
    pub dtype: Dtype,
    /// As in `[model]`.
    pub gradient_checkpointing: bool,
}

/// What was measured; tokens are unpadded, a prompt counted once for each of its completions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BenchResult {
    /// Pairs by second.
    pub pairs_per_second: f64,
    /// Tokens by second.
    pub tokens_per_second: f64,
    /// Mean over the timed steps.
    pub seconds_per_step: f64,
    /// Highest memory of this process, or on a GPU of what it holds there; `None` where the system does not tell.
    pub peak_memory_gib: Option<f64>,
    /// Parameters of the model; tied weights count once.
    pub parameters: u64,
    /// Where the time went.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
}

/// Where the time of the timed steps went, and what it was spent on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Profile {
    /// Mean seconds of a step.
    pub seconds: Phases,
    /// Rows that a step computes: prompts once, their completions, no padding. A mean.
    pub computed_tokens: f64,
    /// Operations that forward and backward of a step need ([`model::Operations`]), in units of 10⁹. A mean.
    pub needed_gflop: f64,
    /// Needed operations by second of forward and backward, head included, in units of 10⁹.
    pub gflop_per_second: f64,
    /// Model FLOPs utilization, 0 to 1: needed operations by second of a step over what the GPU can do at most; none on the CPU and
    /// on a GPU whose peak is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// What the same threads reach together in matrix products of a comfortable size, before or after the steps, whichever was
    /// faster; none on a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product_gflop_per_second: Option<f64>,
    /// What making a GPU's kernels ready took, before the timed steps; none on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernels: Option<KernelTimes>,
    /// What a GPU did when it took the last step once more, the longest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub device: Vec<DeviceWork>,
}

/// Launches of one kernel, or products of one shape, in a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceWork {
    /// The kernel, or the product's shape.
    pub name: String,
    /// How often it ran.
    pub launches: usize,
    /// Seconds on the device, all launches together.
    pub seconds: f64,
    /// Of products: operations by second in units of 10¹².
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tflop_per_second: Option<f64>,
}

/// Times `request.steps` steps of Cal-DPO.
///
/// # Errors
/// A value or a file that cannot be used.
pub fn bench(request: &BenchRequest, device: &Device) -> Result<BenchResult, TrainError> {
    request.validate()?;
    let objective = ObjectiveConfig::CalDpo {
        beta: 0.1,
        calibration_weight: 1.0,
        calibration_shift: 0.5,
        score_scale: None,
    };
    let tokenizer = Tokenizer::load(&request.model, request.data.chat_template.as_deref())?;
    let pairs = data::load(
        &request.data.train,
        &request.data,
        &tokenizer,
        needs(&objective),
    )?
    .pairs;
    let mut model = Model::load(&request.model, device)?;
    model.set_precision(precision(request.dtype));
    check_vocabulary(&pairs, model.config().vocabulary, &request.model)?;
    if request.gradient_checkpointing {
        model.set_saving(Saving::BlockInputs);
    }
    let parameters = model.layout().elements() as u64;
    let alone = Box::new(collective::single(0));
    let patience = Duration::from_mins(1);
    let mut learner = Learner::new(
        model,
        OptimizerSection::default(),
        alone,
        Sharding::default(),
        patience,
        Arc::default(),
    );
    let before = product_speed(device);
    let mut start = Instant::now();
    let (mut pairs_done, mut tokens) = (0, 0);
    let (mut computed_tokens, mut needed) = (0, 0.0);
    let take = |learner: &mut Learner, step: u64| -> Result<StepWork, TrainError> {
        let batching = Instant::now();
        let order = step_pairs(0, step, pairs.len(), request.batch_pairs, false);
        let batch = order.pairs.iter().map(|&pair| &pairs[pair]);
        let batch = learner.batch(batch.collect(), request.micro_batch_tokens);
        learner.times.data += batching.elapsed().as_secs_f64();
        // The policy as its own reference costs nothing and keeps the gradients of a run's first step.
        let prepared = learner.prepare(&batch, None, None, &objective)?;
        let measures = measure(
            &objective,
            &prepared.pairs,
            batch.counts,
            &prepared.statistics,
        );
        tracing::debug!(step, loss = measures.loss, "timed step");
        learner.apply(prepared.reduced, OptimizerSection::default().learning_rate)?;
        Ok(StepWork {
            pairs: batch.counts.pairs,
            tokens: batch.tokens,
            computed_tokens: batch.own_tokens().iter().sum(),
            needed: operations(learner.model.config(), &batch).training(),
        })
    };
    let last = request.warmup + request.steps;
    for step in 1..=last {
        if step == request.warmup + 1 {
            device.synchronize();
            learner.times = Phases::default();
            start = Instant::now();
        }
        let done = take(&mut learner, step)?;
        if step > request.warmup {
            pairs_done += done.pairs;
            tokens += done.tokens;
            computed_tokens += done.computed_tokens;
            needed += done.needed;
        }
    }
    device.synchronize();
    let seconds = start.elapsed().as_secs_f64();
    let steps = request.steps as f64;
    let times = learner.times;
    let peak = device
        .peak_bytes()
        .map(|bytes| bytes as u64)
        .or(peak_bytes());
    let (traced, device_times) = if device.is_gpu() {
        device.traced(|| take(&mut learner, last).map(drop))
    } else {
        (Ok(()), Vec::new())
    };
    traced?;
    let through_the_model = times.forward + times.head + times.backward;
    Ok(BenchResult {
        pairs_per_second: pairs_done as f64 / seconds,
        tokens_per_second: tokens as f64 / seconds,
        seconds_per_step: seconds / steps,
        peak_memory_gib: peak.map(|bytes| bytes as f64 / f64::from(1 << 30)),
        parameters,
        profile: Some(Profile {
            seconds: times.over(steps),
            computed_tokens: computed_tokens as f64 / steps,
            needed_gflop: needed / steps / 1e9,
            gflop_per_second: needed / through_the_model / 1e9,
            mfu: peak_of(&learner.model).map(|peak| needed / seconds / peak),
            product_gflop_per_second: before.zip(product_speed(device)).map(|(a, b)| a.max(b)),
            kernels: KernelTimes::of(device),
            device: device_times.into_iter().map(DeviceWork::from).collect(),
        }),
    })
}

/// What a step did.
struct StepWork {
    pairs: u64,
    tokens: u64,
    computed_tokens: usize,
    needed: f64,
}

impl From<DeviceTime> for DeviceWork {
    fn from(time: DeviceTime) -> Self {
        let by_second = time.operations / time.seconds / 1e12;
        Self {
            name: time.name,
            launches: time.launches,
            seconds: time.seconds,
            tflop_per_second: (time.operations > 0.0).then_some(by_second),
        }
    }
}

/// Operations by second of matrix products in units of 10⁹; none on a device.
fn product_speed(device: &Device) -> Option<f64> {
    device
        .is_host()
        .then(|| kernels::product_speed(rayon::current_num_threads()) / 1e9)
}

/// What a forward over `batch` needs.
fn operations(config: &ModelConfig, batch: &Batch<'_>) -> Operations {
    let pairs = batch.pairs.iter();
    let lengths = pairs.map(|it| (it.prompt.len(), [it.chosen.len(), it.rejected.len()]));
    Operations::of(config, &lengths.collect::<Vec<_>>())
}

impl BenchRequest {
    fn validate(&self) -> Result<(), SpecError> {
        let refuse = |key: &str, reason: &str| {
            Err(SpecError {
                key: key.into(),
                reason: reason.into(),
            })
        };
        for (key, value) in [
            ("--batch-pairs", self.batch_pairs as u64),
            ("--micro-batch-tokens", self.micro_batch_tokens as u64),
            ("--steps", self.steps),
        ] {
            if value == 0 {
                return refuse(key, "must be at least 1, got 0");
            }
        }
        Ok(())
    }
}
