//! One step's arithmetic, over all ranks: forward and backward of the own packs, log-probs shared, gradients reduced, weights
//! updated. When to do which, and what it means for the job, is `trainer`'s.

use std::time::{Duration, Instant};

use collective::{Collective, CollectiveError};
use model::{Gradients, Model};
use objective::{ObjectiveConfig, PairLogps, pair_loss};
use spec::OptimizerSection;

use crate::batch::Batch;
use crate::exchange::share_logps;
use crate::measure::pair_logps;
use crate::shards::{Buckets, Reduced, ShardedAdamW, Stretch};

/// The policy, its optimizer's share, and the way to the other ranks.
pub(crate) struct Learner {
    pub model: Model,
    pub optimizer: ShardedAdamW,
    pub collective: Box<dyn Collective>,
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
}

impl Learner {
    /// A learner with fresh moments.
    pub fn new(
        model: Model,
        section: OptimizerSection,
        collective: Box<dyn Collective>,
        patience: Duration,
    ) -> Self {
        let optimizer = ShardedAdamW::new(
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
        objective: &ObjectiveConfig,
    ) -> Result<Prepared, CollectiveError> {
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
                let share = pair_loss(objective, &scored(slot, logps.map(f64::from)), batch.counts);
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
        })
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
    let layout = model.layout();
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
