//! How a rank comes to the state of a generation: from what it and others held in an earlier one, or from a checkpoint.

use checkpoint::TrainState;
use std::time::Instant;

use super::{
    Holding, Learner, Weights, can_part, gradients, is_resident, masters_apart, optimizer,
    running_mean,
};
use crate::error::TrainError;
use crate::masters::Way;
use crate::reform::{Past, Transfer};
use crate::shards::ShardedOptimizer;
use model::Gradients;

/// Fills in a bucket of weights, whole.
type ReadBucket<'a> = &'a mut dyn FnMut(usize, &mut [f32]) -> Result<(), TrainError>;

impl Learner {
    /// Takes from the ranks of the group what this one lacks to be at `committed`: the run's position, weights, and the moments of
    /// its new shards. Returns the position and the shards; what this rank held is as it was, also with an error.
    pub fn reform(
        &mut self,
        past: &Past,
        holding: Holding<'_>,
        state: TrainState,
        committed: u64,
    ) -> Result<(TrainState, ShardedOptimizer), TrainError> {
        // A device need not have room for what this rank had and for what it gets: gradients are made anew, and what it had of the
        // optimizer waits in the host's memory, from where it is also sent.
        self.gradients = Gradients::zeros(&[], self.model.device());
        self.shard_sums = None;
        self.optimizer.park();
        let masters = can_part(&self.model);
        if masters && self.model.flat().is_whole() {
            // They move like moments, and stay with the shards that they belong to until all ranks have theirs.
            self.optimizer.take_masters(self.model.take_masters());
        }
        let mut new = self.fresh_shards(masters);
        let mut transfer = Transfer {
            collective: self.collective.as_mut(),
            past,
            sources: past.sources()?,
            lens: self.model.trained().bucket_lens(),
            patience: self.patience,
        };
        if self.weights == Weights::Lost && !matches!(holding, Holding::Nothing) {
            return Err(TrainError::NotHeld {
                what: "its weights".into(),
            });
        }
        let whole = transfer.agree(committed, state.step, self.weights == Weights::Whole)?;
        let state = transfer.state(state)?;
        if !masters && whole.contains(&false) {
            let mut weights = self.model.take_weights();
            let completed = transfer.weights(&mut weights, &whole);
            self.model.put_weights(weights);
            completed?;
            self.weights = Weights::Whole;
        }
        let held = match holding {
            Holding::Nothing => None,
            Holding::Present => Some(&self.optimizer),
            Holding::Before(shards) => Some(shards),
        };
        transfer.moments(held, &mut new, self.sharding.mirror)?;
        if masters_apart(&self.model, self.collective.as_ref(), self.sharding) {
            let way = Way {
                in_place: is_resident(&self.model, self.collective.as_ref()),
                collective: self.collective.as_mut(),
                deadline: Instant::now() + self.patience,
            };
            new.gather(way, &mut self.model)?;
        }
        new.set_updates(state.updates);
        self.shift = running_mean(&state);
        Ok((state, new))
    }

    /// Takes up these shards of the present group, with a fresh gradient; returns the shards before them.
    pub fn take_up(&mut self, mut shards: ShardedOptimizer) -> ShardedOptimizer {
        if shards.has_masters()
            && !masters_apart(&self.model, self.collective.as_ref(), self.sharding)
        {
            self.model.put_masters(shards.give_masters());
        }
        self.resident = is_resident(&self.model, self.collective.as_ref());
        // First those that are there: a device need not have room for both.
        self.gradients = Gradients::zeros(&[], self.model.device());
        self.shard_sums = None;
        self.gradients = gradients(&self.model, self.shards_gradients());
        std::mem::replace(&mut self.optimizer, shards)
    }

    /// Fresh shards of the present group, for reading a checkpoint.
    pub fn start_over(&mut self) {
        let apart = masters_apart(&self.model, self.collective.as_ref(), self.sharding);
        if apart && self.model.flat().is_whole() {
            drop(self.model.take_masters());
        }
        // Of a rank that is alone now they go to its model.
        let shards = self.fresh_shards(apart || !self.model.flat().is_whole());
        drop(self.take_up(shards));
        self.weights = Weights::Whole;
    }

    fn fresh_shards(&self, masters: bool) -> ShardedOptimizer {
        optimizer(
            &self.model,
            self.section,
            self.collective.as_ref(),
            self.sharding,
            masters,
        )
    }

    /// Reads weights from where they are whole: `read` fills in a bucket. Every rank reads all of them by itself, as ranks need not
    /// come here at the same time.
    ///
    /// # Errors
    /// What `read` says.
    pub fn restore_weights(&mut self, read: ReadBucket<'_>) -> Result<(), TrainError> {
        if self.optimizer.has_masters() {
            return self.restore_masters(read);
        }
        let mut weights = self.model.take_weights();
        let read = (0..)
            .zip(&mut weights)
            .try_for_each(|(bucket, values)| read(bucket, values));
        self.model.put_weights(weights);
        read
    }

    fn restore_masters(&mut self, read: ReadBucket<'_>) -> Result<(), TrainError> {
        let lens = self.model.trained().bucket_lens();
        let flat = self.model.flat_mut();
        let mut narrow = vec![0.0; flat.narrow_len()];
        for (bucket, len) in lens.into_iter().enumerate() {
            let (mut values, mut bits) = (vec![0.0; len], vec![0; len]);
            read(bucket, &mut values)?;
            self.optimizer.fill_bucket(bucket, &values);
            flat.rounding(bucket, 0).to_bf16(&values, &mut bits);
            flat.put_operands(bucket, &bits);
            flat.collect_narrow(bucket, &(0..len), &values, &mut narrow);
        }
        flat.put_narrow(narrow);
        Ok(())
    }
}
