//! The update of a committed step, in each of the places that weights, masters and gradient may be in.

use std::time::Instant;

use collective::{CollectiveError, Region};

use super::{Learner, Weights};
use crate::masters::Way;
use crate::pulse::Work;
use crate::shards::{Gradient, Reduced, Scale, Sums, Ungathered};

impl Learner {
    /// Updates the weights on all ranks.
    ///
    /// # Errors
    /// A gather that was interrupted; the update of what this rank holds is made all the same.
    pub fn apply(&mut self, reduced: Reduced, learning_rate: f64) -> Result<(), CollectiveError> {
        self.copy_what_is_held();
        let start = Instant::now();
        let alone = self.collective.world() == 1;
        if !(self.resident && alone) {
            self.pulse.turn_to(Work::Exchanges);
        }
        let scale = Scale {
            norm: reduced.norm,
            learning_rate,
        };
        let ended = if self.optimizer.has_masters() {
            self.apply_to_masters(&reduced.sums, scale)
        } else if self.resident {
            self.apply_in_place(&reduced.sums, scale)
        } else {
            self.apply_to_weights(&reduced.sums, scale)
        };
        self.reset(reduced.sums);
        self.times.update += start.elapsed().as_secs_f64();
        ended
    }

    /// Copies what a checkpoint is still being written from.
    fn copy_what_is_held(&mut self) {
        let start = Instant::now();
        if !self.optimizer.unshare() {
            return;
        }
        // Files begin with the weights: whoever is done with the moments is done with them.
        if !self.optimizer.has_masters() {
            self.model.flat_mut().unshare();
        }
        self.times.checkpoint += start.elapsed().as_secs_f64();
    }

    fn apply_to_masters(&mut self, sums: &Sums, scale: Scale) -> Result<(), CollectiveError> {
        let way = Way {
            collective: self.collective.as_mut(),
            in_place: self.resident,
            deadline: Instant::now() + self.patience,
        };
        let gradient = Gradient {
            sums,
            resident: &self.gradients,
        };
        let ended = self
            .optimizer
            .apply_to_masters(way, &mut self.model, gradient, scale);
        if ended.is_err() {
            // A device has let go of the operands when this returns.
            drop(self.disband());
        }
        ended
    }

    fn apply_in_place(&mut self, sums: &Sums, scale: Scale) -> Result<(), CollectiveError> {
        let (deadline, alone) = (self.deadline(), self.collective.world() == 1);
        let (model, collective) = (&self.model, self.collective.as_mut());
        let gradient = Gradient {
            sums,
            resident: &self.gradients,
        };
        let ended = self
            .optimizer
            .apply_in_place(collective, model, gradient, scale, deadline);
        match ended {
            Ok(()) if alone => (),
            Ok(()) => self.model.refresh(),
            Err(_) => {
                // The device has let go of the weights when this returns.
                drop(self.disband());
                self.weights = Weights::Shards;
            }
        }
        ended
    }

    fn apply_to_weights(&mut self, sums: &Sums, scale: Scale) -> Result<(), CollectiveError> {
        let deadline = self.deadline();
        let weights = self.model.take_weights();
        let gradient = Gradient {
            sums,
            resident: &self.gradients,
        };
        let collective = self.collective.as_mut();
        let applied = self
            .optimizer
            .apply(collective, weights, gradient, scale, deadline);
        match applied {
            Ok(weights) => {
                self.model.put_weights(weights);
                Ok(())
            }
            Err(ungathered) => {
                let Ungathered { error, weights } = *ungathered;
                self.recover(weights);
                Err(error)
            }
        }
    }

    /// Takes the weights that an interrupted gather had back from the group, which is over.
    fn recover(&mut self, weights: Vec<Option<Vec<f32>>>) {
        let mut regions = self.disband().into_iter();
        self.weights = Weights::Shards;
        let lens = self.model.trained().bucket_lens();
        let weights = weights.into_iter().zip(lens).map(|(bucket, len)| {
            let bucket = bucket.or_else(|| match regions.next() {
                Some(Region::HostF32(values)) => Some(values),
                _ => None,
            });
            bucket.filter(|it| it.len() == len).unwrap_or_else(|| {
                self.weights = Weights::Lost;
                vec![0.0; len]
            })
        });
        let weights = weights.collect();
        self.model.put_weights(weights);
    }

    /// [`Learner::apply`] for a committed step whose group is no more.
    pub fn apply_here(&mut self, reduced: &Reduced, learning_rate: f64, alone: bool) {
        let gradient = Gradient {
            sums: &reduced.sums,
            resident: &self.gradients,
        };
        let scale = Scale {
            norm: reduced.norm,
            learning_rate,
        };
        if self.optimizer.has_masters() {
            self.optimizer
                .apply_to_masters_here(&self.model, gradient, scale);
            return;
        }
        if self.resident {
            self.optimizer
                .apply_here_in_place(&self.model, gradient, scale);
        } else {
            let mut weights = self.model.take_weights();
            self.optimizer.apply_here(&mut weights, gradient, scale);
            self.model.put_weights(weights);
        }
        if !alone {
            self.weights = Weights::Shards;
        }
    }
}
