//! One step's arithmetic, over all ranks: forward and backward of the own packs, log-probs shared, gradients reduced, weights
//! updated. When to do which, and what it means for the job, is `trainer`'s.

use std::time::{Duration, Instant};

use checkpoint::MeanState;
use collective::{Collective, CollectiveError};
use model::{Gradients, Model};
use objective::{BatchStatistics, ObjectiveConfig, PairLogps, RunningMean, pair_loss};
use spec::OptimizerSection;

use crate::batch::Batch;
use crate::exchange::share_logps;
use crate::measure::pair_logps;
use crate::shards::{Buckets, Reduced, ShardedOptimizer, Stretch};

/// The policy, its optimizer's share, and the way to the other ranks.
pub(crate) struct Learner {
    pub model: Model,
    pub optimizer: ShardedOptimizer,
    pub collective: Box<dyn Collective>,
    /// Of `bco_pair`'s rewards over the steps that were applied.
    pub shift: RunningMean,
    gradients: Gradients,
    /// How long to wait for the other ranks in any one operation.
    patience: Duration,
    /// Where the time went, summed over steps.
    pub times: Times,
}

/// Time by phase.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    pub forward: Duration,
    pub backward: Duration,
    pub reduce: Duration,
    pub update: Duration,
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
        model: Model,
        section: OptimizerSection,
        collective: Box<dyn Collective>,
        patience: Duration,
    ) -> Self {
        let optimizer = ShardedOptimizer::new(
            section,
            &stretches(&model),
            collective.world(),
            collective.rank(),
        );
        Self {
            gradients: model.zero_gradients(),
            model,
            optimizer,
            collective,
            shift: RunningMean::default(),
            patience,
            times: Times::default(),
        }
    }

    /// `pairs` as this rank's work.
    pub fn batch<'a>(&self, pairs: Vec<&'a data::Pair>, capacity: usize) -> Batch<'a> {
        let (rank, world) = (self.collective.rank(), self.collective.world());
        Batch::new(pairs, capacity, rank, world)
    }

    /// Log-probs of all pairs and the reduced gradient; weights and moments are not touched. `references` by slot; with
    /// `None` the policy is its own reference.
    pub fn prepare(
        &mut self,
        batch: &Batch<'_>,
        references: Option<&[[f64; 2]]>,
        mismatched: Option<&Mismatched<'_>>,
        objective: &ObjectiveConfig,
    ) -> Result<Prepared, CollectiveError> {
        let mut shift = self.shift;
        let start = Instant::now();
        let statistics = self.statistics(batch, references, mismatched, objective, &mut shift)?;
        self.times.forward += start.elapsed();
        let scored = |slot: usize, logps: [f64; 2]| {
            let reference = references.map(|references| references[slot]);
            pair_logps(batch.pairs[slot], logps, reference)
        };
        let mut own = Vec::new();
        for slots in &batch.own {
            let start = Instant::now();
            let (result, saved) = self.model.forward_train(&batch.pack(slots));
            self.times.forward += start.elapsed();

            let start = Instant::now();
            let mut dlogps = Vec::with_capacity(slots.len());
            for (&slot, logps) in slots.iter().zip(&result.logps) {
                let pair = scored(slot, logps.map(f64::from));
                let share = pair_loss(objective, slot, &pair, batch.counts, &statistics);
                dlogps.push([share.d_chosen as f32, share.d_rejected as f32]);
                own.push((slot, *logps));
            }
            self.model.backward(saved, &dlogps, &mut self.gradients);
            self.times.backward += start.elapsed();
        }

        let start = Instant::now();
        let logps = self.share(batch.pairs.len(), &own)?;
        let deadline = self.deadline();
        let gradients = self.gradients.take_host();
        let reduced = self
            .optimizer
            .reduce(self.collective.as_mut(), gradients, deadline)?;
        self.times.reduce += start.elapsed();
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

    /// What `objective` reads of the whole batch before any derivative: it costs a forward of its own.
    fn statistics(
        &mut self,
        batch: &Batch<'_>,
        references: Option<&[[f64; 2]]>,
        mismatched: Option<&Mismatched<'_>>,
        objective: &ObjectiveConfig,
        shift: &mut RunningMean,
    ) -> Result<BatchStatistics, CollectiveError> {
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
    ) -> Result<Vec<f64>, CollectiveError> {
        let logps = self.score(&mismatched.batch, progress)?;
        let sides = logps.into_iter().zip(&mismatched.references);
        Ok(sides
            .map(|([logp, _], [reference, _])| logp - reference)
            .collect())
    }

    /// Updates the weights on all ranks.
    pub fn apply(&mut self, reduced: Reduced, learning_rate: f64) -> Result<(), CollectiveError> {
        let start = Instant::now();
        let deadline = self.deadline();
        let weights = self.model.take_weights();
        let collective = self.collective.as_mut();
        let (weights, memory) =
            self.optimizer
                .apply(collective, weights, reduced, learning_rate, deadline)?;
        self.model.put_weights(weights);
        self.reset(memory);
        self.times.update += start.elapsed();
        Ok(())
    }

    /// The running mean for a checkpoint; none where no objective has one.
    pub fn kept_shift(&self) -> Option<MeanState> {
        let RunningMean { mean, count } = self.shift;
        (count > 0).then_some(MeanState { mean, count })
    }

    /// Drops the gradient; nothing else changes (T6).
    pub fn skip(&mut self, reduced: Reduced) {
        self.reset(reduced.buckets);
    }

    /// Log-probs of all pairs of `batch`, nothing kept; `progress` after each of the own packs.
    pub fn score(
        &mut self,
        batch: &Batch<'_>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<[f64; 2]>, CollectiveError> {
        let mut own = Vec::new();
        for (done, slots) in batch.own.iter().enumerate() {
            let result = self.model.forward(&batch.pack(slots));
            own.extend(slots.iter().copied().zip(result.logps));
            progress(done + 1);
        }
        self.share(batch.pairs.len(), &own)
    }

    fn share(
        &mut self,
        pairs: usize,
        own: &[(usize, [f32; 2])],
    ) -> Result<Vec<[f64; 2]>, CollectiveError> {
        let deadline = self.deadline();
        share_logps(self.collective.as_mut(), pairs, own, deadline)
    }

    fn reset(&mut self, memory: Buckets) {
        self.gradients.put_host(memory);
        self.gradients.zero();
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.patience
    }
}

/// Which elements of every bucket decay.
fn stretches(model: &Model) -> Vec<Vec<Stretch>> {
    let layout = model.trained();
    let buckets = layout.buckets.iter();
    buckets
        .map(|bucket| {
            layout.parameters[bucket.parameters.clone()]
                .iter()
                .map(|parameter| Stretch {
                    range: parameter.range(),
                    decay: parameter.decay,
                })
                .collect()
        })
        .collect()
}
