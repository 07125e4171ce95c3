//! A short run of a job's own first steps, with all its workers as threads of this process that talk over loopback: the same
//! packs, threads, collectives and updates as in training, on the machine that they will share. Nothing is kept.
//!
//! Time by token and time by step are measured apart, because a step that is too long for a probe is only begun: of its packs
//! each worker computes as many as the probe has time for.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint::{Kind, ManifestInfo, Piece, TensorSpec, TrainState};
use collective::{Collective, CollectiveError, Op, Region, tcp::Rendezvous};
use model::{Device, Model, Sampler};
use serde::Serialize;

use super::{Draft, Peers, on_threads};
use crate::adapter::Adapter;
use crate::batch::Batch;
use crate::error::TrainError;
use crate::learner::Learner;
use crate::phases::Phases;
use crate::reference::ReferenceAmount;
use crate::setup::load_policy;
use crate::shards::Sharding;

/// What to probe.
#[derive(Clone, Debug)]
pub struct ProbeRequest {
    /// Workers of the job, all on this machine.
    pub workers: usize,
    /// Compute threads of each.
    pub threads: usize,
    /// Folder of checkpoints; a small one is written to its disk and removed again. It need not exist.
    pub checkpoints: PathBuf,
}

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Probe {
    /// Timed steps; one more before them was not.
    pub steps: u64,
    /// Packed tokens that they computed.
    pub packed_tokens: u64,
    /// Whether the steps were only begun.
    pub partial: bool,
    /// Seconds until the weights were there.
    pub load_seconds: f64,
    /// Seconds in which all workers together train on a packed token.
    pub seconds_per_token: f64,
    /// Of them, the forward alone: what scoring costs.
    pub forward_seconds_per_token: f64,
    /// Seconds of a step that do not depend on its tokens: reduction and update.
    pub seconds_per_step: f64,
    /// Seconds by token of a continuation; none without held-out pairs.
    pub seconds_per_sample_token: Option<f64>,
    /// Reference values that the store does not have.
    pub reference: ReferenceAmount,
    /// Bytes by second of writing a checkpoint durably; none where nothing could be written.
    pub write_bytes_per_second: Option<f64>,
    /// Bytes by second of reading it back.
    pub verify_bytes_per_second: Option<f64>,
}

/// What one worker measured.
struct Timed {
    steps: u64,
    /// Of all workers.
    tokens: f64,
    partial: bool,
    wall: Duration,
    times: Phases,
}

/// How long the timed steps may take together.
const SECONDS: f64 = 15.0;
/// Timed steps at most.
const STEPS_MAX: u64 = 5;
/// How long the workers of a probe wait for each other.
const PATIENCE: Duration = Duration::from_mins(10);
/// Tokens of the continuation that is timed.
const SAMPLE_TOKENS: usize = 8;
/// Elements of the checkpoint that is written: 64 MiB with its moments.
const CHECKPOINT_ELEMENTS: usize = 5 << 20;

impl Draft {
    /// Runs the probe.
    ///
    /// # Errors
    /// Weights that cannot be read; a lost thread.
    pub fn probe(&self, request: &ProbeRequest, device: &Device) -> Result<Probe, TrainError> {
        let start = Instant::now();
        let mut models = Vec::new();
        for _ in 0..request.workers {
            models.push(load_policy(&self.spec, Peers::NONE, device)?);
        }
        // Workers read at the same time what is read here one after another.
        let load_seconds = start.elapsed().as_secs_f64() / request.workers as f64;
        let reference = self.missing_references(&models[0], device)?;
        let sample = self.time_sample(&models[0], request.threads)?;
        for model in &mut models {
            if let Some(adapter) = Adapter::of(&self.spec, model.config())? {
                adapter.put_on(model)?;
            }
        }
        let ranks = self.train(models, request.threads)?;
        let (write, verify) = time_checkpoint(&request.checkpoints).unzip();

        let first = &ranks[0];
        let mean = |part: fn(&Phases) -> f64| {
            let all: f64 = ranks.iter().map(|rank| part(&rank.times)).sum();
            all / ranks.len() as f64
        };
        // A forward has one of the head's four products; its backward makes the logits again, and two more.
        let head = mean(|it| it.head);
        let forward = mean(|it| it.forward) + head / 4.0;
        let backward = mean(|it| it.backward) + head * 3.0 / 4.0;
        let steps = first.steps as f64;
        Ok(Probe {
            steps: first.steps,
            packed_tokens: first.tokens as u64,
            partial: first.partial,
            load_seconds,
            seconds_per_token: (forward + backward) / first.tokens,
            forward_seconds_per_token: forward / first.tokens,
            // Waiting for the slowest worker is in it, as it is in training.
            seconds_per_step: (first.wall.as_secs_f64() - forward - backward).max(0.0) / steps,
            seconds_per_sample_token: sample,
            reference,
            write_bytes_per_second: write,
            verify_bytes_per_second: verify,
        })
    }

    fn missing_references(
        &self,
        policy: &Model,
        device: &Device,
    ) -> Result<ReferenceAmount, TrainError> {
        let spec = &self.spec;
        if !spec.objective.needs_reference() {
            return Ok(ReferenceAmount::default());
        }
        let own = match &spec.model.reference {
            Some(path) => Some(Model::load_frozen(path, device, policy.precision())?),
            None => None,
        };
        let model = own.as_ref().unwrap_or(policy);
        Ok(ReferenceAmount::missing(spec, model, &self.lists())?)
    }

    fn time_sample(&self, model: &Model, threads: usize) -> Result<Option<f64>, TrainError> {
        let Some(pair) = self.held_out().first() else {
            return Ok(None);
        };
        Ok(Some(on_threads(threads, || {
            let start = Instant::now();
            let new = model.generate(&pair.prompt, SAMPLE_TOKENS, &mut Sampler::greedy(), &[]);
            start.elapsed().as_secs_f64() / new.len() as f64
        })?))
    }

    /// Trains with one worker a model.
    fn train(&self, models: Vec<Model>, threads: usize) -> Result<Vec<Timed>, TrainError> {
        let world = models.len();
        let mut secret = [0; 32];
        // The ranks are threads of this process; the number only keeps strangers of this machine from walking in by chance.
        let now = std::time::SystemTime::now();
        let now = now
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        secret[..16].copy_from_slice(&now.as_nanos().to_le_bytes());
        let mut doors = Vec::new();
        for _ in 0..world {
            doors.push(Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))?);
        }
        let addresses: Vec<String> = doors.iter().map(Rendezvous::address).collect();
        let addresses = &addresses;
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..)
                .zip(models.into_iter().zip(doors))
                .map(|(rank, (model, door))| {
                    scope.spawn(move || {
                        let collective: Box<dyn Collective> = if world == 1 {
                            Box::new(collective::single(0))
                        } else {
                            let deadline = Instant::now() + PATIENCE;
                            Box::new(door.connect(rank, addresses, 0, secret, deadline)?)
                        };
                        on_threads(threads, || self.train_rank(model, collective))?
                    })
                })
                .collect();
            ranks
                .into_iter()
                .map(|rank| match rank.join() {
                    Ok(timed) => timed,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect()
        })
    }

    /// One worker's part. All of them decide alike, from times that they share.
    fn train_rank(
        &self,
        model: Model,
        collective: Box<dyn Collective>,
    ) -> Result<Timed, TrainError> {
        let mut learner = Learner::new(
            model,
            self.spec.optimizer,
            collective,
            Sharding::default(),
            PATIENCE,
            Arc::default(),
        );
        let steps = &self.workload.steps;
        let batch = |learner: &Learner, step: u64, packs: usize| {
            let pairs = &steps[step as usize % steps.len()];
            let pairs = pairs.iter().map(|&pair| &self.train.pairs[pair]);
            let mut batch = learner.batch(pairs.collect(), self.spec.train.micro_batch_tokens);
            batch.own.truncate(packs);
            batch.lanes = batch.lanes.min(batch.own.len().max(1));
            batch
        };
        // One pack each: warms up, and tells how many packs and steps the probe has time for.
        let start = Instant::now();
        let first = batch(&learner, 0, 1);
        self.step(&mut learner, &first)?;
        let world = learner.collective.world() as f64;
        let seconds = share(&mut learner, start.elapsed().as_secs_f64())? / world;
        let packs = (SECONDS / 2.0 / seconds).max(1.0) as usize;
        let in_step = batch(&learner, 1, packs).own.len() as f64;
        let in_step = share(&mut learner, in_step)? / world;
        let count = SECONDS / (seconds * in_step.max(1.0));
        let count = (count as u64).clamp(1, STEPS_MAX);

        learner.times = Phases::default();
        let (mut tokens, mut partial) = (0.0, false);
        let start = Instant::now();
        for step in 1..=count {
            let whole = batch(&learner, step, usize::MAX).own.len();
            let batch = batch(&learner, step, packs);
            partial |= batch.own.len() < whole;
            self.step(&mut learner, &batch)?;
            tokens += own_tokens(&batch);
        }
        let wall = start.elapsed();
        let times = learner.times;
        Ok(Timed {
            steps: count,
            tokens: share(&mut learner, tokens)?,
            partial: share(&mut learner, f64::from(u8::from(partial)))? > 0.0,
            wall,
            times,
        })
    }

    fn step(&self, learner: &mut Learner, batch: &Batch<'_>) -> Result<(), TrainError> {
        // The policy as its own reference costs nothing and keeps the gradients of a run's first step.
        let prepared = learner.prepare(batch, None, None, &self.spec.objective)?;
        if prepared.reduced.norm.is_finite() {
            Ok(learner.apply(prepared.reduced, self.spec.optimizer.learning_rate)?)
        } else {
            learner.skip(prepared.reduced);
            Ok(())
        }
    }
}

/// Tokens of a worker's own packs.
fn own_tokens(batch: &Batch<'_>) -> f64 {
    let slots = batch.own.iter().flatten();
    slots
        .map(|&slot| batch.pairs[slot].packed_tokens())
        .sum::<usize>() as f64
}

/// The sum of every worker's `value`.
fn share(learner: &mut Learner, value: f64) -> Result<f64, CollectiveError> {
    let deadline = Instant::now() + PATIENCE;
    let sum = learner
        .collective
        .run(Op::AllReduceSum, Region::HostF64(vec![value]), deadline)?;
    Ok(sum.into_f64()[0])
}

/// Bytes by second of writing and of verifying a checkpoint on the disk of `checkpoints`. What can be measured there is
/// measured; a disk that refuses will say so to training.
fn time_checkpoint(checkpoints: &Path) -> Option<(f64, f64)> {
    // A plan does not write to what others may be using and is paid for by the request.
    if checkpoint::is_remote(checkpoints) {
        return None;
    }
    let there = checkpoints.ancestors().find(|folder| folder.is_dir());
    // A relative path has the empty one above it, which is the working directory.
    let folder = there.unwrap_or(Path::new("."));
    let folder = folder.join(format!(".caldpo-probe-{}", std::process::id()));
    let timed = write_and_verify(&folder);
    drop(std::fs::remove_dir_all(&folder));
    timed
}

fn write_and_verify(folder: &Path) -> Option<(f64, f64)> {
    let values = vec![0.5; CHECKPOINT_ELEMENTS];
    let tensors = [TensorSpec {
        name: "probe".into(),
        shape: vec![values.len()],
    }];
    let pieces = Kind::ALL.map(|kind| Piece {
        tensor: "probe",
        kind,
        start: 0,
        values: &values,
    });
    let state = TrainState {
        shift: None,
        step: 1,
        epoch: 0,
        updates: 1,
        seed: 0,
    };
    let info = ManifestInfo {
        model_digest: String::new(),
        tokenizer_digest: String::new(),
        data_digest: String::new(),
        run_digest: String::new(),
        tool_version: String::new(),
    };
    let start = Instant::now();
    let file = checkpoint::write_rank(folder, 0, 0, 1, state, &tensors, pieces).ok()?;
    let (written, start) = (start.elapsed(), Instant::now());
    let committed = checkpoint::commit(folder, &[file], &info).ok()?;
    let verified = start.elapsed();
    let rate = |time: Duration| committed.bytes as f64 / time.as_secs_f64().max(1e-6);
    Some((rate(written), rate(verified)))
}
