//! Gradients in shards (ZeRO stage 2): a rank never has the whole gradient, only the sums of its own shard and of the one that it
//! mirrors, and a few buckets on their way there.
//!
//! ```text
//! pack after pack, stage after stage: bucket (zeros) ──backward──► own part ──reduce-scatter──► + sums of the own shard
//! once a step:                        sums of the own shard ──mirror──► sums of the shard of the rank before
//! ```
//! All ranks reduce the same buckets in the same order: those that have no pack left, or one that predicts nothing, bring zeros. So
//! a bucket travels as often as the rank with the most packs has packs, and not once a step: that is the price.
//!
//! Packs go through the model one by one, and their sums over ranks are added in their order: the same world gives the same bits,
//! and another order of summation than whole gradients have.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use collective::{Collective, CollectiveError, Op, Region, Ticket};
use kernels::{Device, TileSums};
use model::{Gradients, InputGradient, Layout, Model, Stage, Sums};

use crate::moments::Moments;
use crate::shards::{Shard, ShardedOptimizer, Whose, norm, sum_of_squares};
use crate::shared_sums::early_stages;

/// Buckets that are on their way at once.
pub(crate) const REDUCTIONS_IN_FLIGHT: usize = 4;

/// Most elements of buckets that lie on a GPU at once, beside the sums of its shards: those of a stage while the backward adds to
/// them, and as many as may be on their way that came before it, of the pack before it too. The embedding's are there all along
/// where it is the head as well.
pub(crate) fn most_elements_on_a_gpu(layout: &Layout) -> usize {
    let is_tied = layout.buckets_of(Stage::Head).next().is_none();
    let stays = |stage| is_tied && stage == Stage::Embedding;
    let mut stages: Vec<Stage> = layout.buckets.iter().rev().map(|it| it.stage).collect();
    stages.dedup();
    let passing = stages.iter().filter(|&&stage| !stays(stage));
    let lens: Vec<Vec<usize>> = passing
        .map(|&stage| layout.buckets_of(stage).map(|at| layout.buckets[at].len))
        .map(Iterator::collect)
        .collect();
    let at_once = (lens.len()..2 * lens.len()).map(|at| {
        let before = (0..at)
            .rev()
            .flat_map(|at| lens[at % lens.len()].iter().rev());
        let travelling: usize = before.take(REDUCTIONS_IN_FLIGHT).sum();
        lens[at % lens.len()].iter().sum::<usize>() + travelling
    });
    let kept = layout.buckets.iter().filter(|it| stays(it.stage));
    let kept: usize = kept.map(|it| it.len).sum();
    // A bucket is there once.
    (kept + at_once.max().unwrap_or(0)).min(layout.elements())
}

/// A gradient's sums over ranks, of the shards that a rank keeps.
#[derive(Debug)]
pub struct ShardSums {
    own: Vec<Moments>,
    /// None without a mirror.
    mirrored: Vec<Moments>,
}

impl ShardSums {
    /// Zeros for the shards of `optimizer`: on `device` where that is a GPU whose gradients stay there.
    pub fn zeros(optimizer: &ShardedOptimizer, device: Option<&Device>) -> Self {
        let zeros = |shards: &[Shard]| {
            let shards = shards.iter();
            shards
                .map(|shard| Moments::zeros(shard.range.len(), device))
                .collect()
        };
        Self {
            own: zeros(optimizer.shards()),
            mirrored: zeros(optimizer.mirrored()),
        }
    }

    /// The sums of a bucket's shard.
    pub fn of(&self, bucket: usize, whose: Whose) -> &Moments {
        match whose {
            Whose::Own => &self.own[bucket],
            Whose::Mirrored => &self.mirrored[bucket],
        }
    }

    fn clear(&mut self) {
        for sums in self.own.iter_mut().chain(&mut self.mirrored) {
            match sums {
                Moments::Host(values) => Arc::make_mut(values).fill(0.0),
                Moments::Device(values) => values.iter_mut().for_each(|values| values.clear()),
            }
        }
    }
}

/// A step's gradient on its way into shards.
pub(crate) struct Streamed<'a> {
    collective: &'a mut dyn Collective,
    model: &'a Model,
    shards: &'a [Shard],
    sums: &'a mut ShardSums,
    /// Whether buckets stay on a GPU.
    resident: bool,
    patience: Duration,
    /// The buckets of the stage that the backward is in.
    gradients: Gradients,
    /// Stages in the order of their reductions, and how many of them the present pack has passed.
    stages: Vec<Stage>,
    passed: usize,
    in_flight: VecDeque<(usize, Ticket)>,
    /// After it nothing more is sent.
    failure: Option<CollectiveError>,
    /// Memory of buckets that is not in use.
    spare: Vec<Vec<f32>>,
}

impl<'a> Streamed<'a> {
    /// Begins a step.
    pub fn new(
        collective: &'a mut dyn Collective,
        model: &'a Model,
        optimizer: &'a ShardedOptimizer,
        sums: &'a mut ShardSums,
        resident: bool,
        patience: Duration,
    ) -> Self {
        sums.clear();
        let layout = model.trained();
        // A tied head is the embedding's.
        let ends = |stage: Stage| layout.buckets_of(stage).next().map(|_| stage);
        let stages = ends(Stage::Head).into_iter();
        let stages = stages.chain(early_stages(model.config().blocks()));
        Self {
            stages: stages.chain(ends(Stage::Embedding)).collect(),
            gradients: Gradients::absent(&layout.bucket_lens(), model.device()),
            collective,
            model,
            shards: optimizer.shards(),
            sums,
            resident,
            patience,
            passed: 0,
            in_flight: VecDeque::new(),
            failure: None,
            spare: Vec::new(),
        }
    }

    /// Ends a pack, whose backward left `input` for the embedding: what it has not passed is reduced as zeros. Without a pack,
    /// everything is.
    ///
    /// # Errors
    /// What the collective said to any reduction so far.
    pub fn end_pack(&mut self, input: Option<InputGradient>) -> Result<(), CollectiveError> {
        if let Some(input) = input {
            self.open(Stage::Embedding);
            self.model.backward_input(input, &mut self.gradients);
        }
        while self.passed < self.stages.len() {
            self.pass();
        }
        self.passed = 0;
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// Waits for all sums, brings them to their mirrors, and takes the norm of the gradient.
    ///
    /// # Errors
    /// What the collective says.
    pub fn finish(mut self) -> Result<f64, CollectiveError> {
        while !self.in_flight.is_empty() {
            self.land();
        }
        if let Some(error) = self.failure {
            return Err(error);
        }
        let squares = self.squares();
        if !self.sums.mirrored.is_empty() {
            self.mirror()?;
        }
        norm(self.collective, squares, Instant::now() + self.patience)
    }

    /// Has zeros where the backward adds the gradient of `stage`.
    fn open(&mut self, stage: Stage) {
        for bucket in self.model.trained().buckets_of(stage) {
            // On a GPU it is where the pack before left it, until its sums are taken.
            while self.resident && self.in_flight.iter().any(|(other, _)| *other == bucket) {
                self.land();
            }
            if self.gradients.has(bucket) {
                continue;
            }
            if self.resident {
                self.gradients.put_zeros(bucket);
            } else {
                let mut memory = self.spare.pop().unwrap_or_default();
                memory.clear();
                memory.resize(self.model.trained().buckets[bucket].len, 0.0);
                self.gradients.put(bucket, memory);
            }
        }
    }

    /// Sends the next stage's gradient off.
    fn pass(&mut self) {
        let stage = self.stages[self.passed];
        self.passed += 1;
        self.open(stage);
        let generation = self.collective.generation();
        for bucket in self.model.trained().buckets_of(stage) {
            if self.in_flight.len() == REDUCTIONS_IN_FLIGHT {
                self.land();
            }
            if self.failure.is_some() {
                // The backward goes on to its end: its gradient must not pile up meanwhile.
                self.gradients.drop_bucket(bucket);
                continue;
            }
            let region = if self.resident {
                Region::Device(self.gradients.region(bucket).expect("a gradient on a GPU"))
            } else {
                Region::HostF32(self.gradients.take(bucket))
            };
            match self
                .collective
                .start(Op::ReduceScatterSum, region, generation)
            {
                Ok(ticket) => self.in_flight.push_back((bucket, ticket)),
                Err(error) => self.failure = Some(error),
            }
        }
    }

    /// Adds the oldest bucket that is on its way to the sums of the own shard.
    fn land(&mut self) {
        let Some((bucket, ticket)) = self.in_flight.pop_front() else {
            return;
        };
        let landed = match &self.failure {
            None => self.collective.wait(ticket, Instant::now() + self.patience),
            Some(failure) => Err(failure.clone()),
        };
        match landed {
            Ok(region) => {
                let range = self.shards[bucket].range.clone();
                self.add(Whose::Own, bucket, range, region);
            }
            Err(error) => {
                self.gradients.drop_bucket(bucket);
                self.failure = Some(error);
            }
        }
    }

    /// Adds `range` of a bucket that has come to the sums of that shard.
    fn add(&mut self, whose: Whose, bucket: usize, range: Range<usize>, region: Region) {
        let sums = match whose {
            Whose::Own => &mut self.sums.own[bucket],
            Whose::Mirrored => &mut self.sums.mirrored[bucket],
        };
        match (sums, region) {
            (Moments::Host(sums), Region::HostF32(values)) => {
                for (sum, value) in Arc::make_mut(sums).iter_mut().zip(&values[range]) {
                    *sum += value;
                }
                self.spare.push(values);
            }
            (Moments::Device(sums), region) => {
                if let Some(sums) = sums {
                    let part = self.gradients.part(bucket, range);
                    kernels::add_to(sums, &part.expect("a gradient on a GPU"));
                }
                drop(region);
                self.gradients.drop_bucket(bucket);
            }
            _ => unreachable!("sums lie where the gradient does"),
        }
    }

    /// Σx² of the own shards.
    fn squares(&self) -> f64 {
        if self.resident {
            let own = self.sums.own.iter().filter_map(Moments::device).cloned();
            return kernels::sum_of_squares(self.model.device(), own).expect("a GPU");
        }
        let own = self.sums.own.iter().map(Moments::read);
        own.map(|sums| sum_of_squares(&sums)).sum()
    }

    /// Brings the sums of every own shard to the rank after this one.
    fn mirror(&mut self) -> Result<(), CollectiveError> {
        let mut waiting = VecDeque::new();
        for bucket in 0..self.shards.len() {
            if waiting.len() == REDUCTIONS_IN_FLIGHT {
                self.mirrored(waiting.pop_front())?;
            }
            let (range, len) = (
                self.shards[bucket].range.clone(),
                self.model.trained().buckets[bucket].len,
            );
            let region = if self.resident {
                self.gradients.put_zeros(bucket);
                if let Some(own) = self.sums.own[bucket].device() {
                    let part = self.gradients.part(bucket, range);
                    kernels::add_to(&part.expect("a gradient on a GPU"), own);
                }
                Region::Device(self.gradients.region(bucket).expect("a gradient on a GPU"))
            } else {
                let mut values = self.spare.pop().unwrap_or_default();
                values.resize(len, 0.0);
                values[range].copy_from_slice(&self.sums.own[bucket].read());
                Region::HostF32(values)
            };
            let generation = self.collective.generation();
            let ticket = self.collective.start(Op::Mirror, region, generation)?;
            waiting.push_back((bucket, ticket));
        }
        while !waiting.is_empty() {
            self.mirrored(waiting.pop_front())?;
        }
        Ok(())
    }

    fn mirrored(&mut self, oldest: Option<(usize, Ticket)>) -> Result<(), CollectiveError> {
        let Some((bucket, ticket)) = oldest else {
            return Ok(());
        };
        let region = self
            .collective
            .wait(ticket, Instant::now() + self.patience)?;
        let (world, rank) = (self.collective.world(), self.collective.rank());
        let len = self.model.trained().buckets[bucket].len;
        let range = collective::shard_range(len, world, (rank + world - 1) % world);
        // Until now they are the zeros that the step began with.
        self.add(Whose::Mirrored, bucket, range, region);
        Ok(())
    }
}

impl Sums for Streamed<'_> {
    fn stage(&mut self, stage: Stage, add: &mut dyn FnMut(&mut Gradients)) {
        let tied = stage == Stage::Head && self.stages.first() != Some(&Stage::Head);
        let stage = if tied { Stage::Embedding } else { stage };
        // What the backward has left out: an adapter has no head of its own.
        while !tied && self.stages[self.passed] != stage {
            self.pass();
        }
        self.open(stage);
        add(&mut self.gradients);
        // The embedding's part comes at the end of the pack.
        if stage != Stage::Embedding {
            self.pass();
        }
    }

    fn head(&mut self) -> Option<&mut dyn TileSums> {
        None
    }
}
