//! The sharded optimizer (ZeRO; Rajbhandari et al. 2020, arXiv 1910.02054): each rank owns the same contiguous share of every
//! bucket, holds its moments, and updates it. Reduce-scatter brings the gradient's sum to the owner, all-gather the new weights to
//! everybody.
//!
//! ```text
//! gradients (whole, own pairs) ──reduce-scatter──► sums of the own shard ──Σ²──all-reduce──► norm
//!                                                        │ commit
//!                                         update of the own shard ──all-gather──► weights (whole, equal on all ranks)
//! ```
//! Between the two halves lies the coordinator's decision, so nothing is changed by the first.
//!
//! With a mirror, each rank also holds the moments of the rank before it and makes the same update to them, so that no loss of
//! one rank loses a moment (DESIGN, "How a step commits"): a second exchange brings the sums of a shard to its mirror. Whatever
//! happens to the gather, a rank that has applied a step holds its own and its mirrored shard at that step.
//!
//! Here every rank holds whole f32 weights and the optimizer only moments, as it is alone, in f32, and with adapters; `masters` has
//! the other layout, in which the f32 weights are in shards too.

use std::{borrow::Cow, ops::Range, time::Instant};

use checkpoint::Spares;
use collective::{Collective, CollectiveError, Op, Region, Ticket, shard_range};
use rayon::prelude::*;
use spec::OptimizerSection;

use kernels::{Device, Flat, Gradients, Kept, Tensor};
use model::Model;

use crate::moments::Moments;
use crate::shard_sums::ShardSums;
use crate::update::{Update, has_first_moment};

/// Flat memory in the layout's buckets.
pub type Buckets = Vec<Vec<f32>>;

/// A range of a bucket and whether its parameter decays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Elements within the bucket.
    pub range: Range<usize>,
    /// False for norms and biases.
    pub decay: bool,
}

/// What this rank's optimizer keeps of its share of every bucket.
#[derive(Debug)]
pub struct ShardedOptimizer {
    section: OptimizerSection,
    buckets: Vec<Shard>,
    /// The shares of the rank before, updated alike; none without a mirror, or in a world of one.
    mirrored: Vec<Shard>,
    /// Whether the shards have the f32 masters, and the model has not.
    masters: bool,
    /// Updates applied so far: what the bias corrections count. Skipped steps are no updates.
    updates: u64,
    /// Memory for what a checkpoint still holds when an update comes.
    spares: Spares,
}

/// One bucket's share.
#[derive(Debug)]
pub struct Shard {
    /// The own elements within the bucket.
    pub range: Range<usize>,
    /// f32 masters of them; empty where the model has them.
    pub master: Moments,
    /// First moments of them; empty for a rule that has none.
    pub first: Moments,
    /// Second moments of them.
    pub second: Moments,
    /// Stretches of one kind within the range.
    stretches: Vec<Stretch>,
}

/// What a shard keeps, and where.
#[derive(Clone, Copy)]
pub struct Keeping<'a> {
    /// The GPU that keeps it; `None`: the host.
    pub device: Option<&'a Device>,
    /// Whether the f32 masters belong to it.
    pub masters: bool,
}

/// A reduced gradient, kept until the step is committed or dropped.
#[derive(Debug)]
pub struct Reduced {
    /// The sums over ranks.
    pub sums: Sums,
    /// Norm of the whole gradient over all parameters and ranks; the same bits on all ranks, not finite if any element is
    /// not.
    pub norm: f64,
}

/// Where the sums of a gradient over the ranks are.
#[derive(Debug)]
pub enum Sums {
    /// The buckets, of which only the own and the mirrored shards are defined.
    Whole(Buckets),
    /// The same in the gradients of the model, on a GPU.
    Resident,
    /// The own and the mirrored shards alone.
    Shards(ShardSums),
}

/// A reduced gradient, wherever its sums are.
#[derive(Clone, Copy)]
pub struct Gradient<'a> {
    /// The sums over ranks.
    pub sums: &'a Sums,
    /// Those of [`Sums::Resident`].
    pub resident: &'a Gradients,
}

/// Which of the two shards that a rank holds of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Its own.
    Own,
    /// That of the rank before.
    Mirrored,
}

/// How ranks share out what training keeps. Moments are in shards always, and f32 masters wherever products are of bf16 and the whole
/// model is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sharding {
    /// Whether each rank also keeps the shard of the rank before it, so that no loss of one rank loses any.
    pub mirror: bool,
    /// Whether gradients are in shards too (ZeRO stage 2).
    pub gradients: bool,
    /// Whether with a GPU masters and moments are in the host's memory, and updated there. It needs masters that can be apart from
    /// what a model computes with, and changes nothing where they cannot.
    pub offload: bool,
}

/// A rank among the others, and whether it holds the shard of the rank before too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Ranks.
    pub world: usize,
    /// This one.
    pub rank: usize,
    /// Whether shards are mirrored; a world of one has nobody to do it.
    pub mirror: bool,
}

impl Place {
    /// The rank whose shard this one mirrors.
    pub fn before(&self) -> Option<usize> {
        (self.mirror && self.world > 1).then(|| (self.rank + self.world - 1) % self.world)
    }
}

impl<'a> Gradient<'a> {
    /// The sums of the shard `range` of a bucket in the host's memory; waits for a device that has them.
    pub fn host(&self, bucket: usize, whose: Whose, range: &Range<usize>) -> Cow<'a, [f32]> {
        match self.sums {
            Sums::Whole(buckets) => Cow::Borrowed(&buckets[bucket][range.clone()]),
            Sums::Shards(sums) => sums.of(bucket, whose).read(),
            Sums::Resident => Cow::Owned(self.resident_part(bucket, range).into_vec()),
        }
    }

    /// The same where they lie, on a GPU.
    ///
    /// # Panics
    /// If they do not.
    pub fn device(&self, bucket: usize, whose: Whose, range: &Range<usize>) -> Tensor<1> {
        match self.sums {
            Sums::Whole(_) => panic!("a gradient on the host"),
            Sums::Shards(sums) => {
                let sums = sums.of(bucket, whose).device();
                sums.expect("a gradient on a GPU").clone()
            }
            Sums::Resident => self.resident_part(bucket, range),
        }
    }

    fn resident_part(&self, bucket: usize, range: &Range<usize>) -> Tensor<1> {
        let part = self.resident.part(bucket, range.clone());
        part.expect("a gradient on a GPU")
    }
}

/// An update that was made here and did not reach every rank.
#[derive(Debug)]
pub struct Ungathered {
    /// Why.
    pub error: CollectiveError,
    /// By bucket, with the own and the mirrored shard updated; `None` where the collective still has the region, in the order
    /// of the buckets ([`Collective::reclaim`]).
    pub weights: Vec<Option<Vec<f32>>>,
}

impl ShardedOptimizer {
    /// Fresh moments, and zeros where masters are kept, for buckets of `stretches` that cover them in order.
    pub fn new(
        section: OptimizerSection,
        buckets: &[Vec<Stretch>],
        place: Place,
        keeping: Keeping<'_>,
    ) -> Self {
        let shards = |rank: usize| {
            let buckets = buckets.iter();
            buckets
                .map(|stretches| Shard::new(&section, stretches, place.world, rank, keeping))
                .collect()
        };
        Self {
            section,
            buckets: shards(place.rank),
            mirrored: place.before().map(shards).unwrap_or_default(),
            masters: keeping.masters,
            updates: 0,
            spares: Spares::default(),
        }
    }

    /// Whether the shards have the f32 masters.
    pub fn has_masters(&self) -> bool {
        self.masters
    }

    pub(super) fn set_masters(&mut self, masters: bool) {
        self.masters = masters;
    }

    /// The shards of the rank before, one per bucket; none without a mirror.
    pub fn mirrored(&self) -> &[Shard] {
        &self.mirrored
    }

    /// As [`ShardedOptimizer::shards_mut`] for the mirrored shards.
    pub fn mirrored_mut(&mut self) -> &mut [Shard] {
        &mut self.mirrored
    }

    /// The shards, one per bucket.
    pub fn shards(&self) -> &[Shard] {
        &self.buckets
    }

    /// The shards, for filling in what a checkpoint holds, together with [`ShardedOptimizer::set_updates`].
    pub fn shards_mut(&mut self) -> &mut [Shard] {
        &mut self.buckets
    }

    /// Whether the update rule has first moments.
    pub fn has_first_moment(&self) -> bool {
        has_first_moment(&self.section)
    }

    /// The shard that holds `range` of a bucket.
    ///
    /// # Panics
    /// If neither the own nor the mirrored shard does.
    pub fn holding(&self, bucket: usize, range: &Range<usize>) -> &Shard {
        let found = self.holders(bucket).find(|(_, shard)| shard.covers(range));
        let (_, shard) =
            found.unwrap_or_else(|| panic!("{range:?} of bucket {bucket} is not held"));
        shard
    }

    /// As [`ShardedOptimizer::holding`], for writing.
    ///
    /// # Panics
    /// If neither shard holds it.
    pub fn holding_mut(&mut self, bucket: usize, range: &Range<usize>) -> &mut Shard {
        let mut shards = self.holders_mut(bucket).map(|(_, shard)| shard);
        let found = shards.find(|shard| shard.covers(range));
        found.unwrap_or_else(|| panic!("{range:?} of bucket {bucket} is not held"))
    }

    /// The own shard of a bucket, and the mirrored one.
    pub(super) fn holders(&self, bucket: usize) -> impl Iterator<Item = (Whose, &Shard)> {
        let own = self.buckets.get(bucket).map(|shard| (Whose::Own, shard));
        let mirrored = self.mirrored.get(bucket);
        own.into_iter()
            .chain(mirrored.map(|shard| (Whose::Mirrored, shard)))
    }

    /// The same, for updating them.
    pub(super) fn holders_mut(
        &mut self,
        bucket: usize,
    ) -> impl Iterator<Item = (Whose, &mut Shard)> {
        let own = self.buckets.get_mut(bucket);
        let mirrored = self.mirrored.get_mut(bucket);
        own.map(|shard| (Whose::Own, shard))
            .into_iter()
            .chain(mirrored.map(|shard| (Whose::Mirrored, shard)))
    }

    /// Updates applied so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Sets the number of updates that the moments hold.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }

    /// Waits for the sums of the ranks' gradients at their owners, and takes the global norm. `tickets` are reduce-scatters of the
    /// buckets in order. Weights and moments are not touched.
    ///
    /// # Errors
    /// What the collective says; the gradient is gone then and the step must be done again.
    pub fn reduced(
        &self,
        collective: &mut dyn Collective,
        tickets: Vec<Ticket>,
        deadline: Instant,
    ) -> Result<Reduced, CollectiveError> {
        let generation = collective.generation();
        let mut buckets = Vec::with_capacity(tickets.len());
        let mut mirrors = Vec::with_capacity(self.mirrored.len());
        let mut squares = 0.0;
        for (ticket, shard) in tickets.into_iter().zip(&self.buckets) {
            let bucket = collective.wait(ticket, deadline)?.into_f32();
            squares += sum_of_squares(&bucket[shard.range.clone()]);
            if self.mirrored.is_empty() {
                buckets.push(bucket);
            } else {
                let region = Region::HostF32(bucket);
                mirrors.push(collective.start(Op::Mirror, region, generation)?);
            }
        }
        for ticket in mirrors {
            buckets.push(collective.wait(ticket, deadline)?.into_f32());
        }
        Ok(Reduced {
            sums: Sums::Whole(buckets),
            norm: norm(collective, squares, deadline)?,
        })
    }

    /// Updates the own and the mirrored shards of `weights` and gathers the others'. Returns the gathered weights.
    ///
    /// # Errors
    /// What the collective says. The update is made all the same: the step was committed.
    ///
    /// # Panics
    /// If the gradient is not finite: such a step is skipped, not applied.
    pub fn apply(
        &mut self,
        collective: &mut dyn Collective,
        weights: Buckets,
        gradient: Gradient<'_>,
        scale: Scale,
        deadline: Instant,
    ) -> Result<Buckets, Box<Ungathered>> {
        let generation = collective.generation();
        let mut failure = None;
        let mut tickets = Vec::with_capacity(weights.len());
        let mut gathered = Vec::with_capacity(weights.len());
        let update = self.next_update(scale);
        for (bucket, mut weights) in weights.into_iter().enumerate() {
            self.update(&update, bucket, &mut weights, gradient);
            gathered.push(None);
            if failure.is_some() {
                gathered[bucket] = Some(weights);
                continue;
            }
            // The next bucket's arithmetic runs while this one travels.
            match collective.start(Op::AllGather, Region::HostF32(weights), generation) {
                Ok(ticket) => tickets.push(ticket),
                Err(error) => failure = Some(error),
            }
        }
        for (bucket, ticket) in tickets.into_iter().enumerate() {
            if failure.is_some() {
                break;
            }
            match collective.wait(ticket, deadline) {
                Ok(region) => gathered[bucket] = Some(region.into_f32()),
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            None => Ok(gathered.into_iter().flatten().collect()),
            Some(error) => Err(Box::new(Ungathered {
                error,
                weights: gathered,
            })),
        }
    }

    /// [`ShardedOptimizer::apply`] without the gather: for a committed step whose group is no more.
    ///
    /// # Panics
    /// If the gradient is not finite.
    pub fn apply_here(&mut self, weights: &mut Buckets, gradient: Gradient<'_>, scale: Scale) {
        let update = self.next_update(scale);
        for (bucket, weights) in weights.iter_mut().enumerate() {
            self.update(&update, bucket, weights, gradient);
        }
    }

    /// Copies what is held of the own shards elsewhere, on all threads, so that the next update need not do it one by one; says
    /// whether anything was. What a checkpoint writes last comes first: copies and writer meet half-way.
    pub fn unshare(&mut self) -> bool {
        let shards = self.buckets.iter_mut();
        let [mut masters, mut first, mut second] = [(); 3].map(|()| Vec::new());
        for shard in shards.rev() {
            masters.push(&mut shard.master);
            first.push(&mut shard.first);
            second.push(&mut shard.second);
        }
        let in_turn = second.into_iter().chain(first).chain(masters);
        let spares = &self.spares;
        let held = in_turn.par_bridge().map(|moments| moments.unshare(spares));
        held.reduce(|| false, |one, other| one | other)
    }

    pub(super) fn next_update(&mut self, scale: Scale) -> Update {
        let Scale {
            norm,
            learning_rate,
        } = scale;
        assert!(norm.is_finite(), "norm {norm} applied");
        self.updates += 1;
        Update::new(&self.section, learning_rate, norm, self.updates)
    }

    fn update(
        &mut self,
        update: &Update,
        bucket: usize,
        weights: &mut [f32],
        gradient: Gradient<'_>,
    ) {
        for (whose, shard) in self.holders_mut(bucket) {
            let sums = gradient.host(bucket, whose, &shard.range);
            let weights = &mut weights[shard.range.clone()];
            shard.apply(update, Some(weights), &sums);
        }
    }
}

/// What an update's step is scaled by.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Norm of the gradient.
    pub norm: f64,
    /// The step's.
    pub learning_rate: f64,
}

/// The same where everything stays on a GPU. A rank alone has nobody to exchange anything with.
impl ShardedOptimizer {
    /// As [`ShardedOptimizer::reduced`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// If the gradient does not lie on a GPU.
    pub fn reduced_in_place(
        &self,
        collective: &mut dyn Collective,
        tickets: Vec<Ticket>,
        gradients: &Gradients,
        deadline: Instant,
    ) -> Result<Reduced, CollectiveError> {
        let generation = collective.generation();
        let mut mirrors = Vec::new();
        for (bucket, ticket) in tickets.into_iter().enumerate() {
            drop(collective.wait(ticket, deadline)?);
            if !self.mirrored.is_empty() {
                let region = gradients.region(bucket).expect("a gradient on a GPU");
                mirrors.push(collective.start(Op::Mirror, Region::Device(region), generation)?);
            }
        }
        let gradient = Gradient {
            sums: &Sums::Resident,
            resident: gradients,
        };
        let shards = self.buckets.iter().enumerate();
        let own = shards.map(|(bucket, shard)| gradient.device(bucket, Whose::Own, &shard.range));
        let squares = kernels::sum_of_squares(gradients.device(), own).expect("a GPU");
        for ticket in mirrors {
            drop(collective.wait(ticket, deadline)?);
        }
        Ok(Reduced {
            sums: Sums::Resident,
            norm: norm(collective, squares, deadline)?,
        })
    }

    /// As [`ShardedOptimizer::apply`], after which the model's operands are not those of its weights ([`Model::refresh`]) if there
    /// are other ranks.
    ///
    /// # Errors
    /// What the collective says, with the own and the mirrored shards updated.
    ///
    /// # Panics
    /// If the gradient is not finite: such a step is skipped, not applied.
    pub fn apply_in_place(
        &mut self,
        collective: &mut dyn Collective,
        model: &Model,
        gradient: Gradient<'_>,
        scale: Scale,
        deadline: Instant,
    ) -> Result<(), CollectiveError> {
        let generation = collective.generation();
        let update = self.next_update(scale);
        let (mut tickets, mut failure) = (Vec::new(), None);
        for bucket in 0..self.buckets.len() {
            self.update_in_place(&update, bucket, model.flat(), gradient);
            if collective.world() == 1 || failure.is_some() {
                continue;
            }
            let region = model.flat().region(bucket).expect("weights on a GPU");
            match collective.start(Op::AllGather, Region::Device(region), generation) {
                Ok(ticket) => tickets.push(ticket),
                Err(error) => failure = Some(error),
            }
        }
        for ticket in tickets {
            if failure.is_none() {
                failure = collective.wait(ticket, deadline).err();
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// [`ShardedOptimizer::apply_in_place`] without the gather.
    ///
    /// # Panics
    /// If the gradient is not finite.
    pub fn apply_here_in_place(&mut self, model: &Model, gradient: Gradient<'_>, scale: Scale) {
        let update = self.next_update(scale);
        for bucket in 0..self.buckets.len() {
            self.update_in_place(&update, bucket, model.flat(), gradient);
        }
    }

    pub(super) fn update_in_place(
        &self,
        update: &Update,
        bucket: usize,
        weights: &Flat,
        gradient: Gradient<'_>,
    ) {
        for (whose, shard) in self.holders(bucket) {
            if shard.range.is_empty() {
                continue;
            }
            let gradient = gradient.device(bucket, whose, &shard.range);
            for stretch in &shard.stretches {
                let range = stretch.range.clone();
                let own = range.start - shard.range.start..range.end - shard.range.start;
                let part = |moments: &Moments| {
                    let moments = moments.device()?;
                    Some(moments.slice(own.clone()))
                };
                let master = if self.masters {
                    part(&shard.master)
                } else {
                    None
                };
                let (first, second) = (part(&shard.first), part(&shard.second));
                let kept = Kept {
                    masters: master.as_ref(),
                    first: first.as_ref(),
                    second: second.as_ref().expect("second moments on a GPU"),
                };
                let gradient = &gradient.slice(own.clone());
                let (clip, rule) = (update.clip(), update.rule(stretch.decay));
                kernels::update(weights, bucket, range, gradient, kept, clip, &rule);
            }
        }
    }
}

/// The norm of a gradient of whose squares every rank has its part. Squares of f32 cannot overflow f64, so it is finite exactly
/// when every element on every rank is.
pub(super) fn norm(
    collective: &mut dyn Collective,
    squares: f64,
    deadline: Instant,
) -> Result<f64, CollectiveError> {
    let total = collective.run(Op::AllReduceSum, Region::HostF64(vec![squares]), deadline)?;
    Ok(total.into_f64()[0].sqrt())
}

/// Elements that a thread updates at a time: enough to be worth a thread, few enough for all of them.
const PIECE_ELEMENTS: usize = 1 << 18;

impl Shard {
    fn new(
        section: &OptimizerSection,
        stretches: &[Stretch],
        world: usize,
        rank: usize,
        keeping: Keeping<'_>,
    ) -> Self {
        let len = stretches.last().map_or(0, |stretch| stretch.range.end);
        let range = shard_range(len, world, rank);
        let kept = |kept: bool| {
            let len = if kept { range.len() } else { 0 };
            Moments::zeros(len, keeping.device)
        };
        Self {
            master: kept(keeping.masters),
            first: kept(has_first_moment(section)),
            second: kept(true),
            stretches: cut(stretches, &range),
            range,
        }
    }

    fn covers(&self, range: &Range<usize>) -> bool {
        self.range.start <= range.start && range.end <= self.range.end
    }

    /// Updates the shard's elements by their gradient, on all threads of this process: every element by itself, so that pieces do
    /// not show in the bits. `weights` of them; `None`: the masters that the shard has.
    pub(super) fn apply(
        &mut self,
        update: &Update,
        weights: Option<&mut [f32]>,
        mut gradient: &[f32],
    ) {
        let mut pieces = Vec::new();
        let mut weights = match weights {
            Some(weights) => weights,
            None => self.master.host(),
        };
        let (mut first, mut second) = (self.first.host(), self.second.host());
        for stretch in &self.stretches {
            let mut rest = stretch.range.len();
            while rest > 0 {
                let len = rest.min(PIECE_ELEMENTS);
                rest -= len;
                let of_first = len.min(first.len());
                pieces.push((
                    weights.split_off_mut(..len).expect("weights of the shard"),
                    first.split_off_mut(..of_first).expect("a length of it"),
                    second.split_off_mut(..len).expect("moments of the shard"),
                    gradient.split_off(..len).expect("gradient of the shard"),
                    stretch.decay,
                ));
            }
        }
        pieces
            .into_par_iter()
            .for_each(|(weights, first, second, gradient, decay)| {
                update.apply(weights, first, second, gradient, decay);
            });
    }
}

/// The parts of `stretches` inside `range`.
fn cut(stretches: &[Stretch], range: &Range<usize>) -> Vec<Stretch> {
    stretches
        .iter()
        .map(|stretch| Stretch {
            range: stretch.range.start.max(range.start)..stretch.range.end.min(range.end),
            decay: stretch.decay,
        })
        .filter(|stretch| !stretch.range.is_empty())
        .collect()
}

/// Σx² in f64, in eight interleaved sums so that the loop vectorizes; the order depends on the length alone.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    let mut sums = [0f64; 8];
    let chunks = values.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, &value) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    for (sum, &value) in sums.iter_mut().zip(rest) {
        *sum += f64::from(value) * f64::from(value);
    }
    sums.iter().sum()
}
