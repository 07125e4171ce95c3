//! One step's arithmetic, over all ranks: forward and backward of the own packs, gradients reduced as they become complete,
//! log-probs shared, weights updated. When to do which, and what it means for the job, is `trainer`'s.

mod reforming;
mod updating;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::{MeanState, TrainState};
use collective::{Collective, CollectiveError, Op, Region, Ticket};
use model::{Gradients, Model, PackLogps, Precision, Stage};
use objective::{BatchStatistics, ObjectiveConfig, PairLogps, RunningMean, pair_loss};
use spec::OptimizerSection;

use crate::batch::Batch;
use crate::divergence::compare;
use crate::error::TrainError;
use crate::exchange::share_logps;
use crate::lanes::Lanes;
use crate::measure::pair_logps;
use crate::phases::{PackTimes, Phases};
use crate::pulse::{Pulse, Work};
use crate::shard_sums::{ShardSums, Streamed};
use crate::shards::{Keeping, Place, Reduced, ShardedOptimizer, Sharding, Stretch, Sums};
use crate::shared_sums::{SharedSums, early_stages, late_stages};
use crate::warm_up::warm_up;

/// How long ranks that are done wait for each other.
const LEAVE_PATIENCE: Duration = Duration::from_secs(20);

/// The policy, its optimizer's share, and the way to the other ranks.
pub(crate) struct Learner {
    pub model: Model,
    pub optimizer: ShardedOptimizer,
    /// Of the present generation.
    pub collective: Box<dyn Collective>,
    /// What this rank holds of the weights at its step.
    pub weights: Weights,
    /// How ranks share out what training keeps.
    sharding: Sharding,
    section: OptimizerSection,
    /// Of `bco_pair`'s rewards over the steps that were applied.
    pub shift: RunningMean,
    /// Of the own pairs; none where several ranks keep them in shards.
    gradients: Gradients,
    /// Where ranks keep gradients in shards, while no step is between its preparation and its end.
    shard_sums: Option<ShardSums>,
    lanes: Lanes,
    /// Whether weights, moments and gradient stay on a GPU from step to step.
    resident: bool,
    /// How long to wait for the other ranks in any one operation.
    patience: Duration,
    /// Where its work shows.
    pub pulse: Arc<Pulse>,
    /// Where the time went, since whoever reads it last set it back.
    pub times: Phases,
}

/// What a rank holds of the weights, where their masters are not in shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// All.
    Whole,
    /// Its own and its mirrored shard; the gather of the others was interrupted.
    Shards,
    /// None: an interrupted gather kept them.
    Lost,
}

/// What a rank brings to a new generation.
#[derive(Clone, Copy)]
pub(crate) enum Holding<'a> {
    /// It was in none before.
    Nothing,
    /// The learner's shards.
    Present,
    /// The shards of the generation before, as not all ranks have entered the present one.
    Before(&'a ShardedOptimizer),
}

/// A step before its decision.
pub(crate) struct Prepared {
    /// Of all pairs of the batch, in its order.
    pub pairs: Vec<PairLogps>,
    /// The gradient, whose norm is not finite if any element on any rank is not.
    pub reduced: Reduced,
    /// What the objective read of the whole batch.
    pub statistics: BatchStatistics,
    /// [`Learner::shift`] if the step is applied.
    pub shift: RunningMean,
}

/// Completions after prompts of other rows, of which an objective reads the mean log-ratio.
pub(crate) struct Mismatched<'a> {
    /// In the chosen completions' place, in the order of the step's slots.
    pub batch: Batch<'a>,
    /// By slot.
    pub references: Vec<[f64; 2]>,
}

impl Learner {
    /// A learner with fresh moments.
    pub fn new(
        mut model: Model,
        section: OptimizerSection,
        collective: Box<dyn Collective>,
        sharding: Sharding,
        patience: Duration,
        pulse: Arc<Pulse>,
    ) -> Self {
        let resident = is_resident(&model, collective.as_ref());
        if sharding.offload && !model.device().is_gpu() {
            tracing::warn!(
                "cluster.offload changes nothing here: on the CPU everything is in the host's memory"
            );
        }
        let apart = masters_apart(&model, collective.as_ref(), sharding);
        let mut optimizer = optimizer(&model, section, collective.as_ref(), sharding, apart);
        if apart {
            optimizer.fill_masters(model.take_masters());
        } else if !model.flat().is_whole() {
            let parked = model.take_masters();
            model.put_masters(parked);
        }
        Self {
            optimizer,
            resident,
            weights: Weights::Whole,
            sharding,
            section,
            gradients: gradients(&model, sharding.gradients && collective.world() > 1),
            shard_sums: None,
            lanes: Lanes::new(model.device()),
            model,
            collective,
            shift: RunningMean::default(),
            patience,
            pulse,
            times: Phases::default(),
        }
    }

    /// Has a GPU make its kernels ready; nothing else changes.
    pub fn warm_up(&mut self, pairs: &[data::Pair]) {
        warm_up(&self.model, pairs, &mut self.gradients, self.resident);
    }

    /// `pairs` as this rank's work, of which at most `micro_batch_tokens` go through the model at once.
    pub fn batch<'a>(&self, pairs: Vec<&'a data::Pair>, micro_batch_tokens: usize) -> Batch<'a> {
        let (rank, world) = (self.collective.rank(), self.collective.world());
        let batch = Batch::new(
            pairs,
            self.lanes.pack_tokens(micro_batch_tokens),
            rank,
            world,
        );
        let lanes = self.lanes.count(&batch.own_tokens(), micro_batch_tokens);
        Batch { lanes, ..batch }
    }

    /// Log-probs of all pairs and the reduced gradient; weights and moments are not touched. `references` by slot; with
    /// `None` the policy is its own reference.
    pub fn prepare(
        &mut self,
        batch: &Batch<'_>,
        references: Option<&[[f64; 2]]>,
        mismatched: Option<&Mismatched<'_>>,
        objective: &ObjectiveConfig,
    ) -> Result<Prepared, TrainError> {
        let mut shift = self.shift;
        let start = Instant::now();
        let statistics = self.statistics(batch, references, mismatched, objective, &mut shift)?;
        self.times.forward += start.elapsed().as_secs_f64();
        let scored = |slot: usize, logps: [f64; 2]| {
            let reference = references.map(|references| references[slot]);
            pair_logps(batch.pairs[slot], logps, reference)
        };
        let derivatives = |slot: usize, logps: [f32; 2]| {
            let pair = scored(slot, logps.map(f64::from));
            let share = pair_loss(objective, slot, &pair, batch.counts, &statistics);
            [share.d_chosen as f32, share.d_rejected as f32]
        };
        let (logps, reduced) = if self.shards_gradients() {
            let (own, reduced) = self.backward_into_shards(batch, &derivatives)?;
            self.pulse.turn_to(Work::Exchanges);
            (self.share(batch.pairs.len(), &own)?, reduced)
        } else {
            self.backward_whole(batch, &derivatives)?
        };
        Ok(Prepared {
            pairs: (0..)
                .zip(logps)
                .map(|(slot, logps)| scored(slot, logps))
                .collect(),
            reduced,
            statistics,
            shift,
        })
    }

    /// Log-probs of all pairs and the gradient, of which every rank has all until it is reduced.
    fn backward_whole(
        &mut self,
        batch: &Batch<'_>,
        derivatives: &(dyn Fn(usize, [f32; 2]) -> [f32; 2] + Sync),
    ) -> Result<(Vec<[f64; 2]>, Reduced), TrainError> {
        let (own, tickets) = self.backward(batch, derivatives)?;
        self.pulse.turn_to(Work::Exchanges);
        let start = Instant::now();
        let logps = self.share(batch.pairs.len(), &own)?;
        let deadline = self.deadline();
        let collective = self.collective.as_mut();
        let reduced = if self.resident {
            let gradients = &self.gradients;
            self.optimizer
                .reduced_in_place(collective, tickets, gradients, deadline)?
        } else {
            self.optimizer.reduced(collective, tickets, deadline)?
        };
        self.times.reduce += start.elapsed().as_secs_f64();
        Ok((logps, reduced))
    }

    /// Forward and backward of the own packs. Returns their log-probs by slot, and the reductions of all gradients, which begin as
    /// soon as the last pack has left a stage.
    fn backward(
        &mut self,
        batch: &Batch<'_>,
        derivatives: &(dyn Fn(usize, [f32; 2]) -> [f32; 2] + Sync),
    ) -> Result<(OwnLogps, Vec<Ticket>), TrainError> {
        // A rank alone has its sums.
        let alone = self.resident && self.collective.world() == 1;
        let resident = self.resident;
        let Self {
            model,
            collective,
            gradients,
            lanes,
            times,
            pulse,
            ..
        } = self;
        let model: &Model = model;
        let start = Instant::now();
        let head = model.head_slot().bucket;
        let shared = model.trains_itself() && model.device().is_host();
        let mut head_sums = shared.then(|| gradients.take(head));
        let reduction = Mutex::new(Reduction::new(collective.as_mut(), model, resident));
        let ready = |stage: Stage, gradients: &mut Gradients| {
            if alone {
                return;
            }
            let mut reduction = reduction.lock().unwrap_or_else(PoisonError::into_inner);
            reduction.start(stage, gradients);
        };
        let packs = batch.own.len();
        let sums = SharedSums::new(model, packs, gradients, head_sums.as_deref_mut(), &ready);
        let pack = |index: usize| -> (OwnLogps, PackTimes) {
            let slots = &batch.own[index];
            let start = Instant::now();
            let (result, saved) = model.forward_train(&batch.pack(slots));
            let forward_head = saved.head_time.as_secs_f64();
            let forward = start.elapsed().as_secs_f64() - forward_head;

            let start = Instant::now();
            let own = slots.iter().copied().zip(result.logps);
            let own: OwnLogps = own.collect();
            let derivatives = own.iter().map(|&(slot, logps)| derivatives(slot, logps));
            let derivatives: Vec<_> = derivatives.collect();
            let mut turn = sums.turn(index);
            let end = model.backward_into(saved, &derivatives, &mut turn);
            if let Some(input) = end.input {
                turn.input(input);
            }
            drop(turn);
            let backward_head = end.head_time.as_secs_f64();
            let times = PackTimes {
                forward,
                head: forward_head + backward_head,
                backward: start.elapsed().as_secs_f64() - backward_head,
            };
            (own, times)
        };
        let (mut own, mut busy) = (Vec::new(), PackTimes::default());
        let each = &mut |_, (logps, times): (OwnLogps, PackTimes)| {
            own.extend(logps);
            busy.add(&times);
            pulse.tick();
            // After a loss the rest of the step would be computed for nothing, and the survivors would wait for it.
            let reduction = reduction.lock().unwrap_or_else(PoisonError::into_inner);
            reduction.collective.check().map_err(TrainError::from)
        };
        lanes.each(batch.lanes, packs, &pack, each)?;
        let (parts, rows) = sums.finish();
        if let Some(head_sums) = head_sums {
            gradients.put(head, head_sums);
        }
        for part in parts {
            gradients.join(part);
        }
        rows.add_to(gradients, &model.embedding_slot());
        let mut reduction = reduction
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        if alone {
            times.add_packs(start.elapsed().as_secs_f64(), &busy);
            return Ok((own, Vec::new()));
        }
        if packs == 0 {
            early_stages(model.config().blocks()).for_each(|it| reduction.start(it, gradients));
        }
        late_stages().for_each(|stage| reduction.start(stage, gradients));
        let tickets = reduction.tickets()?;
        times.add_packs(start.elapsed().as_secs_f64(), &busy);
        Ok((own, tickets))
    }

    /// As [`Learner::backward`] where gradients are in shards: one pack after another, each reduced by itself. All ranks take as many
    /// rounds as the one with the most packs.
    fn backward_into_shards(
        &mut self,
        batch: &Batch<'_>,
        derivatives: &(dyn Fn(usize, [f32; 2]) -> [f32; 2] + Sync),
    ) -> Result<(OwnLogps, Reduced), TrainError> {
        let device = self.resident.then(|| self.model.device());
        let sums = self.shard_sums.take();
        let mut sums = sums.unwrap_or_else(|| ShardSums::zeros(&self.optimizer, device));
        let mut streamed = Streamed::new(
            self.collective.as_mut(),
            &self.model,
            &self.optimizer,
            &mut sums,
            self.resident,
            self.patience,
        );
        let (mut own, mut busy): (OwnLogps, _) = (Vec::new(), PackTimes::default());
        let start = Instant::now();
        for round in 0..batch.rounds {
            let Some(slots) = batch.own.get(round) else {
                streamed.end_pack(None)?;
                continue;
            };
            let (logps, times) = pack(&self.model, batch, slots, derivatives, &mut streamed)?;
            own.extend(logps);
            busy.add(&times);
            self.pulse.tick();
        }
        self.times.add_packs(start.elapsed().as_secs_f64(), &busy);
        self.pulse.turn_to(Work::Exchanges);
        let start = Instant::now();
        let norm = streamed.finish()?;
        self.times.reduce += start.elapsed().as_secs_f64();
        let sums = Sums::Shards(sums);
        Ok((own, Reduced { sums, norm }))
    }

    /// Whether gradients are in shards. A rank alone has the sums at once.
    fn shards_gradients(&self) -> bool {
        self.sharding.gradients && self.collective.world() > 1
    }

    /// What `objective` reads of the whole batch before any derivative: it costs a forward of its own.
    fn statistics(
        &mut self,
        batch: &Batch<'_>,
        references: Option<&[[f64; 2]]>,
        mismatched: Option<&Mismatched<'_>>,
        objective: &ObjectiveConfig,
        shift: &mut RunningMean,
    ) -> Result<BatchStatistics, TrainError> {
        let pairs = if objective.reads_batch() {
            let logps = self.score(batch, &mut |_| ())?;
            let slots = logps.into_iter().enumerate();
            slots
                .map(|(slot, logps)| {
                    let reference = references.map(|references| references[slot]);
                    pair_logps(batch.pairs[slot], logps, reference)
                })
                .collect()
        } else {
            Vec::new()
        };
        let ratios = match mismatched {
            Some(mismatched) => self.mismatched_ratios(mismatched, &mut |_| ())?,
            None => Vec::new(),
        };
        Ok(BatchStatistics::new(objective, &pairs, &ratios, shift))
    }

    /// Log-ratios of mismatched completions; `progress` after each of the own packs.
    pub fn mismatched_ratios(
        &mut self,
        mismatched: &Mismatched<'_>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<f64>, TrainError> {
        let logps = self.score(&mismatched.batch, progress)?;
        let sides = logps.into_iter().zip(&mismatched.references);
        Ok(sides
            .map(|([logp, _], [reference, _])| logp - reference)
            .collect())
    }

    /// Compares weights and moments with the other ranks', after `step`.
    ///
    /// # Errors
    /// Also a difference.
    pub fn compare(&mut self, step: u64) -> Result<(), TrainError> {
        if self.collective.world() == 1 {
            return Ok(());
        }
        let start = Instant::now();
        let deadline = self.deadline();
        let (layout, flat) = (self.model.trained(), self.model.flat());
        let lens = layout.bucket_lens().into_iter().enumerate();
        let computed = lens.map(|(bucket, len)| {
            if flat.is_whole() {
                flat.values(bucket, 0..len)
            } else {
                Arc::new(flat.computed(bucket)).into()
            }
        });
        let (collective, optimizer) = (self.collective.as_mut(), &self.optimizer);
        let compared = compare(collective, layout, computed, optimizer, step, deadline);
        self.times.update += start.elapsed().as_secs_f64();
        compared
    }

    /// Leaves the other ranks in order, after the last operation with them: peers may still be reading a GPU's memory.
    pub fn leave(&mut self) -> Result<(), CollectiveError> {
        let deadline = Instant::now() + self.patience.min(LEAVE_PATIENCE);
        let alone = collective::single(self.collective.generation());
        std::mem::replace(&mut self.collective, Box::new(alone)).close(deadline)
    }

    /// Ends the group, so that nobody waits for this rank in it; what it still had comes back.
    pub fn disband(&mut self) -> Vec<Region> {
        let generation = self.collective.generation();
        let alone: Box<dyn Collective> = Box::new(collective::single(generation));
        std::mem::replace(&mut self.collective, alone).reclaim()
    }

    /// The running mean for a checkpoint; none where no objective has one.
    pub fn kept_shift(&self) -> Option<MeanState> {
        let RunningMean { mean, count } = self.shift;
        (count > 0).then_some(MeanState { mean, count })
    }

    /// Drops the gradient; nothing else changes (T6).
    pub fn skip(&mut self, reduced: Reduced) {
        self.reset(reduced.sums);
    }

    /// Log-probs of all pairs of `batch`, nothing kept; `progress` after each of the own packs.
    pub fn score(
        &mut self,
        batch: &Batch<'_>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<[f64; 2]>, TrainError> {
        let Self {
            model,
            lanes,
            collective,
            pulse,
            ..
        } = self;
        pulse.turn_to(Work::Computes);
        let mut own = Vec::new();
        let score = |index: usize| model.forward(&batch.pack(&batch.own[index]));
        let each = &mut |index: usize, result: PackLogps| {
            own.extend(batch.own[index].iter().copied().zip(result.logps));
            progress(index + 1);
            pulse.tick();
            collective.check().map_err(TrainError::from)
        };
        lanes.each(batch.lanes, batch.own.len(), &score, each)?;
        self.pulse.turn_to(Work::Exchanges);
        Ok(self.share(batch.pairs.len(), &own)?)
    }

    fn share(
        &mut self,
        pairs: usize,
        own: &[(usize, [f32; 2])],
    ) -> Result<Vec<[f64; 2]>, CollectiveError> {
        let deadline = self.deadline();
        share_logps(self.collective.as_mut(), pairs, own, deadline)
    }

    fn reset(&mut self, sums: Sums) {
        match sums {
            Sums::Whole(memory) => {
                for (bucket, values) in memory.into_iter().enumerate() {
                    self.gradients.put(bucket, values);
                }
            }
            Sums::Resident => (),
            Sums::Shards(sums) => self.shard_sums = Some(sums),
        }
        self.gradients.zero();
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.patience
    }
}

/// Whether weights, moments and gradient stay on a GPU.
fn is_resident(model: &Model, collective: &dyn Collective) -> bool {
    model.device().is_gpu() && collective.takes_devices()
}

/// Gradients of the own pairs: zeros, or none where ranks keep them in shards.
fn gradients(model: &Model, in_shards: bool) -> Gradients {
    if in_shards {
        Gradients::absent(&model.trained().bucket_lens(), model.device())
    } else {
        model.zero_gradients()
    }
}

/// Whether a model's f32 masters can be apart from what it computes with: with products of bf16, where it is itself trained.
fn can_part(model: &Model) -> bool {
    model.trains_itself() && model.precision() == Precision::Bf16
}

/// Whether the optimizer has the masters, and not the model: where the ranks of a group share them out, and where a GPU is not to
/// have them. A rank alone has all of them anyway.
fn masters_apart(model: &Model, collective: &dyn Collective, sharding: Sharding) -> bool {
    can_part(model) && (collective.world() > 1 || offloads(model, sharding))
}

/// Whether masters and moments of a model on a GPU are in the host's memory.
fn offloads(model: &Model, sharding: Sharding) -> bool {
    sharding.offload && model.device().is_gpu() && can_part(model)
}

/// Fresh moments of a rank's shards, and room for masters.
fn optimizer(
    model: &Model,
    section: OptimizerSection,
    collective: &dyn Collective,
    sharding: Sharding,
    masters: bool,
) -> ShardedOptimizer {
    let place = Place {
        world: collective.world(),
        rank: collective.rank(),
        mirror: sharding.mirror,
    };
    let on_device = is_resident(model, collective) && !offloads(model, sharding);
    let keeping = Keeping {
        device: on_device.then(|| model.device()),
        masters,
    };
    ShardedOptimizer::new(section, &stretches(model), place, keeping)
}

/// The running mean that a position holds.
pub(crate) fn running_mean(state: &TrainState) -> RunningMean {
    let kept = |kept: MeanState| RunningMean {
        mean: kept.mean,
        count: kept.count,
    };
    state.shift.map_or_else(RunningMean::default, kept)
}

/// Forward and backward of one pack into `streamed`: its log-probs by slot, and where the time went.
fn pack(
    model: &Model,
    batch: &Batch<'_>,
    slots: &[usize],
    derivatives: &(dyn Fn(usize, [f32; 2]) -> [f32; 2] + Sync),
    streamed: &mut Streamed<'_>,
) -> Result<(OwnLogps, PackTimes), CollectiveError> {
    let start = Instant::now();
    let (result, saved) = model.forward_train(&batch.pack(slots));
    let forward_head = saved.head_time.as_secs_f64();
    let forward = start.elapsed().as_secs_f64() - forward_head;

    let start = Instant::now();
    let own: OwnLogps = slots.iter().copied().zip(result.logps).collect();
    let derivatives = own.iter().map(|&(slot, logps)| derivatives(slot, logps));
    let derivatives: Vec<_> = derivatives.collect();
    let end = model.backward_into(saved, &derivatives, streamed);
    streamed.end_pack(end.input)?;
    let backward_head = end.head_time.as_secs_f64();
    let times = PackTimes {
        forward,
        head: forward_head + backward_head,
        backward: start.elapsed().as_secs_f64() - backward_head,
    };
    Ok((own, times))
}

/// Log-probs of this rank's pairs by slot.
type OwnLogps = Vec<(usize, [f32; 2])>;

/// The reductions of a step's gradients, started bucket by bucket in one order on all ranks: that of the stages.
struct Reduction<'a> {
    collective: &'a mut dyn Collective,
    model: &'a Model,
    /// Whether gradients stay where they are, on a GPU.
    resident: bool,
    /// By bucket.
    tickets: Vec<Option<Ticket>>,
    failure: Option<CollectiveError>,
}

impl<'a> Reduction<'a> {
    fn new(collective: &'a mut dyn Collective, model: &'a Model, resident: bool) -> Self {
        let buckets = model.trained().buckets.iter();
        Self {
            collective,
            model,
            resident,
            tickets: buckets.map(|_| None).collect(),
            failure: None,
        }
    }

    /// Sends the gradients of `stage` off. After a failure nothing more is.
    fn start(&mut self, stage: Stage, gradients: &mut Gradients) {
        let generation = self.collective.generation();
        for bucket in self.model.trained().buckets_of(stage) {
            if self.failure.is_some() {
                return;
            }
            let region = if self.resident {
                Region::Device(gradients.region(bucket).expect("a gradient on a GPU"))
            } else {
                Region::HostF32(gradients.take(bucket))
            };
            match self
                .collective
                .start(Op::ReduceScatterSum, region, generation)
            {
                Ok(ticket) => self.tickets[bucket] = Some(ticket),
                Err(error) => self.failure = Some(error),
            }
        }
    }

    /// All reductions by bucket.
    fn tickets(self) -> Result<Vec<Ticket>, CollectiveError> {
        match self.failure {
            Some(error) => Err(error),
            None => Ok(self
                .tickets
                .into_iter()
                .map(|ticket| ticket.expect("every bucket has a stage"))
                .collect()),
        }
    }
}

/// Which elements of every bucket decay.
fn stretches(model: &Model) -> Vec<Vec<Stretch>> {
    let layout = model.trained();
    let buckets = layout.buckets.iter();
    buckets
        .map(|bucket| {
            let mut stretches: Vec<Stretch> = Vec::new();
            for parameter in &layout.parameters[bucket.parameters.clone()] {
                let (range, decay) = (parameter.range(), parameter.decay);
                match stretches.last_mut() {
                    Some(last) if last.decay == decay && last.range.end == range.start => {
                        last.range.end = range.end;
                    }
                    _ => stretches.push(Stretch { range, decay }),
                }
            }
            stretches
        })
        .collect()
}
