//! The optimizer where the f32 masters of the weights are in shards beside their moments (DESIGN, "How a step commits"): ranks that
//! train a whole model with products of bf16 hold whole operands, and f32 of what a forward reads in f32, and no more.
//!
//! ```text
//! sums of the own shard (and of the mirrored one) ──update──► masters and moments of both
//! masters of the own shard ──round──► bf16 ──all-gather──► operands (whole, equal on all ranks)
//!                          ──norms, biases──► f32 in a buffer of zeros ──all-reduce──► what is read in f32
//! ```
//! Operands have the bits that whole masters would give them. They are never a state of their own: what an interrupted gather left
//! of them is made again out of the masters, which every rank has at the step that it has applied.
//!
//! A rank alone keeps its masters in the model; on the way into another world they come here ([`ShardedOptimizer::take_masters`]),
//! and on the way back they go there.

use std::collections::VecDeque;
use std::time::Instant;

use collective::{Collective, CollectiveError, Op, Region, Ticket};
use kernels::Tensor;
use model::Model;

use crate::moments::Moments;
use crate::shards::{Gradient, Scale, Shard, ShardedOptimizer};
use crate::update::Update;

/// Buckets of operands that are on their way at once: enough to keep the network busy while the next is updated.
pub(crate) const GATHERS_IN_FLIGHT: usize = 4;

impl ShardedOptimizer {
    /// Updates the masters and gathers what the model computes with. `in_place`: whether operands travel from GPU to GPU.
    ///
    /// # Errors
    /// What the collective says. The update is made all the same, and the model's operands are to be gathered anew.
    ///
    /// # Panics
    /// If the gradient is not finite: such a step is skipped, not applied.
    pub fn apply_to_masters(
        &mut self,
        way: Way<'_>,
        model: &mut Model,
        gradient: Gradient<'_>,
        scale: Scale,
    ) -> Result<(), CollectiveError> {
        let update = self.next_update(scale);
        let mut gather = Gather::new(way);
        for bucket in 0..self.shards().len() {
            self.update_masters(&update, bucket, model, gradient);
            // The next bucket's arithmetic runs while this one travels.
            gather.send(bucket, &self.shards()[bucket], model, false);
        }
        gather.finish(self.shards(), model)
    }

    /// [`ShardedOptimizer::apply_to_masters`] without the gather: for a committed step whose group is no more.
    ///
    /// # Panics
    /// If the gradient is not finite.
    pub fn apply_to_masters_here(&mut self, model: &Model, gradient: Gradient<'_>, scale: Scale) {
        let update = self.next_update(scale);
        for bucket in 0..self.shards().len() {
            self.update_masters(&update, bucket, model, gradient);
        }
    }

    /// Gathers what the model computes with out of the masters as they are.
    ///
    /// # Errors
    /// What the collective says.
    pub fn gather(&self, way: Way<'_>, model: &mut Model) -> Result<(), CollectiveError> {
        let mut gather = Gather::new(way);
        for (bucket, shard) in self.shards().iter().enumerate() {
            gather.send(bucket, shard, model, true);
        }
        gather.finish(self.shards(), model)
    }

    fn update_masters(
        &mut self,
        update: &Update,
        bucket: usize,
        model: &Model,
        gradient: Gradient<'_>,
    ) {
        if self.shards()[bucket].second.is_on_device() {
            return self.update_in_place(update, bucket, model.flat(), gradient);
        }
        for (whose, shard) in self.holders_mut(bucket) {
            let sums = gradient.host(bucket, whose, &shard.range);
            shard.apply(update, None, &sums);
        }
    }

    /// Copies the masters of the own and the mirrored shards out of whole buckets.
    pub fn fill_masters(&mut self, masters: Vec<Tensor<1>>) {
        for (bucket, masters) in masters.into_iter().enumerate() {
            self.fill_bucket(bucket, &masters.into_vec());
        }
    }

    /// As [`ShardedOptimizer::fill_masters`], for one bucket.
    pub fn fill_bucket(&mut self, bucket: usize, masters: &[f32]) {
        for (_, shard) in self.holders_mut(bucket) {
            shard.master.write(masters[shard.range.clone()].to_vec());
        }
    }

    /// Moves everything to the host's memory: it is only read from here on, for a next generation.
    pub fn park(&mut self) {
        for bucket in 0..self.shards().len() {
            for (_, shard) in self.holders_mut(bucket) {
                let Shard {
                    master,
                    first,
                    second,
                    ..
                } = shard;
                [master, first, second].into_iter().for_each(Moments::park);
            }
        }
    }

    /// Takes over the masters of a rank alone, whose shards are whole buckets, without a copy where they lie where its moments do.
    ///
    /// # Panics
    /// If the shards are not whole buckets.
    pub fn take_masters(&mut self, masters: Vec<Tensor<1>>) {
        for (shard, masters) in self.shards_mut().iter_mut().zip(masters) {
            assert_eq!(
                masters.dims(),
                [shard.range.len()],
                "masters of a rank alone"
            );
            shard.master = Moments::of(masters, &shard.second);
        }
        self.set_masters(true);
    }

    /// Gives the masters of a rank alone up, by bucket.
    pub fn give_masters(&mut self) -> Vec<Tensor<1>> {
        self.set_masters(false);
        let shards = self.shards_mut().iter_mut();
        let given = shards.map(|shard| {
            std::mem::replace(&mut shard.master, Moments::zeros(0, None)).into_tensor()
        });
        given.collect()
    }
}

/// The way to the other ranks.
pub struct Way<'a> {
    /// All of them.
    pub collective: &'a mut dyn Collective,
    /// Whether operands travel from GPU to GPU.
    pub in_place: bool,
    /// For the whole gather.
    pub deadline: Instant,
}

/// Operands on their way to all ranks. After a failure nothing more is sent.
struct Gather<'a> {
    way: Way<'a>,
    /// The oldest first.
    in_flight: VecDeque<(usize, Ticket)>,
    failure: Option<CollectiveError>,
    /// Memory for bits that is not in use.
    spare: Vec<Vec<u16>>,
}

impl<'a> Gather<'a> {
    fn new(way: Way<'a>) -> Self {
        Self {
            way,
            in_flight: VecDeque::new(),
            failure: None,
            spare: Vec::new(),
        }
    }

    /// Sends the own shard of a bucket. `round`: whether a GPU has yet to make operands of masters that it has.
    fn send(&mut self, bucket: usize, shard: &Shard, model: &mut Model, round: bool) {
        if self.failure.is_some() {
            return;
        }
        let region = if self.way.in_place {
            self.place(bucket, shard, model, round)
        } else {
            let len = model.trained().buckets[bucket].len;
            let mut bits = self.spare.pop().unwrap_or_default();
            bits.resize(len, 0);
            let rounding = model.flat().rounding(bucket, shard.range.start);
            rounding.to_bf16(&shard.master.read(), &mut bits[shard.range.clone()]);
            Region::HostBf16(bits)
        };
        if self.in_flight.len() == GATHERS_IN_FLIGHT {
            self.land(model);
        }
        let generation = self.way.collective.generation();
        match self.way.collective.start(Op::AllGather, region, generation) {
            Ok(ticket) => self.in_flight.push_back((bucket, ticket)),
            Err(error) => self.failure = Some(error),
        }
    }

    /// Operands of the own shard at their place on the GPU.
    fn place(&mut self, bucket: usize, shard: &Shard, model: &Model, round: bool) -> Region {
        let flat = model.flat();
        if !shard.range.is_empty() {
            match shard.master.device() {
                Some(masters) if round => {
                    flat.round_in_place(bucket, shard.range.clone(), masters);
                }
                // The update has written them.
                Some(_) => (),
                None => {
                    let mut bits = self.spare.pop().unwrap_or_default();
                    bits.resize(shard.range.len(), 0);
                    let rounding = flat.rounding(bucket, shard.range.start);
                    rounding.to_bf16(&shard.master.read(), &mut bits);
                    flat.write_in_place(bucket, shard.range.clone(), &bits);
                    self.spare.push(bits);
                }
            }
        }
        Region::Device(flat.operand_region(bucket).expect("operands on a GPU"))
    }

    /// Takes the oldest bucket that is on its way.
    fn land(&mut self, model: &mut Model) {
        let Some((bucket, ticket)) = self.in_flight.pop_front() else {
            return;
        };
        if self.failure.is_some() {
            return;
        }
        match self.way.collective.wait(ticket, self.way.deadline) {
            Ok(Region::HostBf16(bits)) => {
                model.flat_mut().put_operands(bucket, &bits);
                self.spare.push(bits);
            }
            Ok(_) => (),
            Err(error) => self.failure = Some(error),
        }
    }

    /// Takes all buckets, and gathers what is read in f32.
    fn finish(mut self, shards: &[Shard], model: &mut Model) -> Result<(), CollectiveError> {
        while !self.in_flight.is_empty() {
            self.land(model);
        }
        if let Some(error) = self.failure {
            return Err(error);
        }
        let Way {
            collective,
            in_place,
            deadline,
        } = self.way;
        if in_place && shards.iter().any(|shard| shard.master.is_on_device()) {
            let masters = shards.iter().enumerate().filter_map(|(bucket, shard)| {
                let masters = shard.master.device()?;
                Some((bucket, &shard.range, masters))
            });
            let region = model.flat_mut().narrow_region(masters);
            let region = Region::Device(region.expect("weights on a GPU"));
            drop(collective.run(Op::AllReduceSum, region, deadline)?);
            return Ok(());
        }
        let flat = model.flat_mut();
        let mut narrow = vec![0.0; flat.narrow_len()];
        for (bucket, shard) in shards.iter().enumerate() {
            flat.collect_narrow(bucket, &shard.range, &shard.master.read(), &mut narrow);
        }
        // x + 0 is exact: every element is one rank's.
        let region = Region::HostF32(narrow);
        let narrow = collective.run(Op::AllReduceSum, region, deadline)?;
        flat.put_narrow(narrow.into_f32());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};
    use std::path::Path;
    use std::time::Duration;

    use collective::tcp::Rendezvous;
    use kernels::Device;
    use model::{ModelConfig, Precision};
    use spec::OptimizerSection;

    use super::*;
    use crate::shards::{Keeping, Place, Stretch, Sums};

    /// With norms that have biases, and a table that is also the head's.
    const CONFIG: &str = r#"{"model_type": "qwen2", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 60, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": true, "use_sliding_window": false}"#;

    /// Random weights, or the nearest of bf16, whose operands are dithered.
    fn model(even: bool) -> Model {
        let config = ModelConfig::parse(CONFIG, Path::new("config.json")).expect("a config");
        let mut weights = model::random_weights(&config, 3);
        if even {
            for value in weights.iter_mut().flatten() {
                *value = f32::from_bits(value.to_bits() & 0xffff_0000);
            }
        }
        let mut model = Model::from_parts(config, weights, &Device::flex()).expect("a model");
        model.set_precision(Precision::Bf16);
        model
    }

    /// The gradient of update `step`, the same on all ranks.
    fn gradient(model: &Model, step: u32) -> Vec<Vec<f32>> {
        let mut state = 77 + step;
        let lens = model.trained().bucket_lens().into_iter();
        lens.map(|len| {
            let values = (0..len).map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f32::from_bits(state >> 9 | 0x3f80_0000) - 1.5
            });
            values.collect()
        })
        .collect()
    }

    fn optimizer(model: &Model, place: Place, masters: bool) -> ShardedOptimizer {
        let lens = model.trained().bucket_lens().into_iter();
        let stretches = lens.map(|len| {
            let whole = Stretch {
                range: 0..len,
                decay: true,
            };
            vec![whole]
        });
        let stretches: Vec<_> = stretches.collect();
        let keeping = Keeping {
            device: None,
            masters,
        };
        ShardedOptimizer::new(OptimizerSection::default(), &stretches, place, keeping)
    }

    const SCALE: Scale = Scale {
        norm: 2.0,
        learning_rate: 1e-2,
    };

    /// Everything that a forward reads of `model`, which has its masters.
    fn computed(mut model: Model) -> Vec<Vec<u32>> {
        drop(model.take_masters());
        let buckets = 0..model.trained().buckets.len();
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
        buckets
            .map(|bucket| bits(model.flat().computed(bucket)))
            .collect()
    }

    /// A rank alone after three updates of whole weights.
    fn alone(even: bool) -> (Vec<Vec<f32>>, Vec<Vec<u32>>) {
        let mut model = model(even);
        let none = model.zero_gradients();
        let place = Place {
            world: 1,
            rank: 0,
            mirror: true,
        };
        let mut optimizer = optimizer(&model, place, false);
        for step in 0..3 {
            let sums = Sums::Whole(gradient(&model, step));
            let gradient = Gradient {
                sums: &sums,
                resident: &none,
            };
            let mut weights = model.take_weights();
            optimizer.apply_here(&mut weights, gradient, SCALE);
            model.put_weights(weights);
        }
        let weights = model.take_weights();
        model.put_weights(weights.clone());
        (weights, computed(model))
    }

    #[test]
    fn masters_in_shards_and_what_is_gathered_of_them_have_the_bits_of_whole_weights() {
        [false, true].into_iter().for_each(shards_have_the_bits);
    }

    fn shards_have_the_bits(even: bool) {
        let (weights, expected) = &alone(even);
        let begun = computed(model(even));
        assert_ne!(&begun, expected, "three updates move something");
        let doors: Vec<_> = (0..3)
            .map(|_| Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).expect("a port"))
            .collect();
        let addresses: Vec<String> = doors.iter().map(Rendezvous::address).collect();
        let addresses = &addresses;
        let deadline = Instant::now() + Duration::from_mins(1);
        std::thread::scope(|scope| {
            for (rank, door) in doors.into_iter().enumerate() {
                scope.spawn(move || {
                    let mut tcp = door
                        .connect(rank, addresses, 1, [3; 32], deadline)
                        .expect("connected");
                    let mut model = model(even);
                    let none = model.zero_gradients();
                    let place = Place {
                        world: 3,
                        rank,
                        mirror: true,
                    };
                    let mut optimizer = optimizer(&model, place, true);
                    optimizer.fill_masters(model.take_masters());
                    let now = |model: &Model, bucket: usize| -> Vec<u32> {
                        let values = model.flat().computed(bucket).into_iter();
                        values.map(f32::to_bits).collect()
                    };
                    for step in 0..3 {
                        let sums = Sums::Whole(gradient(&model, step));
                        let gradient = Gradient {
                            sums: &sums,
                            resident: &none,
                        };
                        let way = Way {
                            collective: &mut tcp,
                            in_place: false,
                            deadline,
                        };
                        let applied = optimizer.apply_to_masters(way, &mut model, gradient, SCALE);
                        applied.expect("gathered");
                    }
                    for bucket in 0..weights.len() {
                        for (whose, shard) in optimizer.holders(bucket) {
                            let found = shard.master.read();
                            let expected = &weights[bucket][shard.range.clone()];
                            assert_eq!(&found[..], expected, "{whose:?} of bucket {bucket}");
                        }
                        assert_eq!(now(&model, bucket), expected[bucket], "bucket {bucket}");
                    }
                    // Whatever became of it, it is made again out of the masters.
                    for bucket in 0..weights.len() {
                        let zeros = vec![0; weights[bucket].len()];
                        model.flat_mut().put_operands(bucket, &zeros);
                    }
                    let narrow = model.flat().narrow_len();
                    model.flat_mut().put_narrow(vec![0.0; narrow]);
                    assert_ne!(now(&model, 0), expected[0]);
                    let way = Way {
                        collective: &mut tcp,
                        in_place: false,
                        deadline,
                    };
                    optimizer.gather(way, &mut model).expect("gathered");
                    for bucket in 0..weights.len() {
                        assert_eq!(now(&model, bucket), expected[bucket], "bucket {bucket}");
                    }
                });
            }
        });
    }

    #[test]
    fn a_rank_alone_gives_its_masters_away_and_gets_them_back_to_the_bit() {
        let mut model = model(true);
        let before = model.take_weights();
        model.put_weights(before.clone());
        let place = Place {
            world: 1,
            rank: 0,
            mirror: true,
        };
        let mut optimizer = optimizer(&model, place, false);
        let pack = model::Pack::new([model::PairTokens {
            prompt: &[1, 2],
            chosen: &[3, 4],
            rejected: &[5],
        }]);
        let scored = model.forward(&pack);
        optimizer.take_masters(model.take_masters());
        assert!(optimizer.has_masters() && !model.flat().is_whole());
        assert_eq!(model.forward(&pack), scored, "it computes without them");
        model.put_masters(optimizer.give_masters());
        assert!(!optimizer.has_masters() && model.flat().is_whole());
        assert_eq!(model.forward(&pack), scored);
        assert_eq!(model.take_weights(), before);
    }
}
