//! A new generation out of what ranks of an earlier one hold: weights, moments and the run's position go from whoever has
//! them to whoever needs them, whatever the two worlds are (DESIGN, "How a step commits").
//!
//! ```text
//! who is where, whose weights are whole ──all-reduce──► the same at all ranks, or nothing is done
//! position ──broadcast──► weights: old shards to ranks that lack them ──► moments: old shards cut anew for owners and mirrors
//! ```
//! Where masters are in shards they move as moments do, no rank lacks any weights, and what the model computes with is gathered
//! from the new shards (`masters`).
//!
//! An old shard comes from its owner, or from its mirror where the owner is gone; with neither it is lost, and the run goes
//! back to a checkpoint. What is held is read and not changed, so that a loss on the way loses nothing: the next generation
//! starts from the same.

use std::ops::Range;
use std::time::{Duration, Instant};

use checkpoint::TrainState;
use collective::{Collective, CollectiveError, Op, Region, Ticket, shard_range};

use crate::error::TrainError;
use crate::shards::{Buckets, Place, Shard, ShardedOptimizer};

/// An earlier generation's shards, and where they are now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Past {
    /// That generation.
    pub generation: u64,
    /// By shard: the new ranks of its owner and of its mirror, if they are there.
    pub shards: Vec<[Option<usize>; 2]>,
}

/// Shards that a rank holds: its own and, with a mirror, those of the rank before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The generation that cut them.
    pub generation: u64,
    /// Its rank there.
    pub rank: usize,
    /// Ranks there.
    pub world: usize,
    /// The last step that they hold.
    pub applied: u64,
    /// Whether the reduced gradient of the step after is there too, and its verdict was not heard.
    pub gradient: bool,
}

impl Past {
    /// Ranks, and shards, of that generation.
    fn world(&self) -> usize {
        self.shards.len()
    }

    /// Whether a new rank holds any of the shards.
    pub(crate) fn brings(&self, rank: usize) -> bool {
        self.shards
            .iter()
            .any(|copies| copies.contains(&Some(rank)))
    }

    /// By shard the new rank that it comes from: its owner, or its mirror.
    ///
    /// # Errors
    /// A shard that nobody holds.
    pub(crate) fn sources(&self) -> Result<Vec<usize>, TrainError> {
        let shards = self.shards.iter().enumerate();
        shards
            .map(|(shard, [owner, mirror])| {
                owner.or(*mirror).ok_or(TrainError::LostShard { shard })
            })
            .collect()
    }
}

/// What this rank brings along, and where it goes.
pub(crate) struct Transfer<'a> {
    pub collective: &'a mut dyn Collective,
    pub past: &'a Past,
    /// By old shard.
    pub sources: Vec<usize>,
    /// Elements of every bucket.
    pub lens: Vec<usize>,
    /// For any one operation: how long all of them take depends on the model.
    pub patience: Duration,
}

/// An operation under way, and where its result goes.
struct Arrival {
    ticket: Ticket,
    /// Elements within the bucket, if they are for this rank.
    range: Option<Range<usize>>,
}

impl Transfer<'_> {
    fn deadline(&self) -> Instant {
        Instant::now() + self.patience
    }

    /// Compares where all ranks stand; by rank, whether its weights are whole. `whole`: whether this one's are.
    pub fn agree(
        &mut self,
        committed: u64,
        step: u64,
        whole: bool,
    ) -> Result<Vec<bool>, TrainError> {
        let (rank, world) = (self.collective.rank(), self.collective.world());
        let brings = self.past.brings(rank);
        let mut slots = vec![0.0; 2 * world];
        slots[2 * rank] = if brings {
            step as f64
        } else {
            committed as f64
        };
        slots[2 * rank + 1] = f64::from(u8::from(brings && whole));
        let (region, deadline) = (Region::HostF64(slots), self.deadline());
        let slots = self.collective.run(Op::AllReduceSum, region, deadline)?;
        let slots = slots.into_f64();
        let elsewhere = (0..world).find(|rank| slots[2 * rank] != committed as f64);
        match elsewhere {
            Some(rank) => Err(TrainError::Apart {
                rank,
                step: slots[2 * rank] as u64,
                committed,
            }),
            None => Ok((0..world).map(|rank| slots[2 * rank + 1] != 0.0).collect()),
        }
    }

    /// The position of the first rank that has one.
    pub fn state(&mut self, state: TrainState) -> Result<TrainState, TrainError> {
        let root = *self.sources.iter().min().expect("a generation has shards");
        let own = serde_json::to_vec(&state).expect("numbers are JSON");
        let (op, region) = (Op::Broadcast { root }, Region::HostBytes(own));
        let deadline = self.deadline();
        let bytes = self.collective.run(op, region, deadline)?.into_bytes();
        serde_json::from_slice(&bytes).map_err(|error| {
            TrainError::Collective(CollectiveError::Local {
                what: format!("read the position that rank {root} sent"),
                cause: error.to_string(),
            })
        })
    }

    /// Completes the weights of ranks that lack some.
    pub fn weights(
        &mut self,
        weights: &mut Buckets,
        whole: &[bool],
    ) -> Result<(), CollectiveError> {
        for bucket in 0..weights.len() {
            let values = &mut weights[bucket];
            let mut arrivals = Vec::new();
            for shard in 0..self.past.world() {
                let range = shard_range(self.lens[bucket], self.past.world(), shard);
                for to in (0..whole.len()).filter(|&to| !whole[to]) {
                    let own = |range: Range<usize>| values[range].to_vec();
                    arrivals.extend(self.send(shard, to, range.clone(), own)?);
                }
            }
            self.arrive(arrivals, |range, arrived| {
                values[range].copy_from_slice(arrived);
            })?;
        }
        Ok(())
    }

    /// Fills the moments of `new`, and its masters if it has any, from those of `old`, which a rank has that brings something.
    pub fn moments(
        &mut self,
        old: Option<&ShardedOptimizer>,
        new: &mut ShardedOptimizer,
        mirror: bool,
    ) -> Result<(), CollectiveError> {
        for bucket in 0..self.lens.len() {
            for moment in [Moment::Master, Moment::First, Moment::Second] {
                self.moment(moment, bucket, old, new, mirror)?;
            }
        }
        Ok(())
    }

    fn moment(
        &mut self,
        moment: Moment,
        bucket: usize,
        old: Option<&ShardedOptimizer>,
        new: &mut ShardedOptimizer,
        mirror: bool,
    ) -> Result<(), CollectiveError> {
        // All ranks have them, or none. A shard may be empty on some.
        let none = match moment {
            Moment::Master => !new.has_masters(),
            Moment::First => !new.has_first_moment(),
            Moment::Second => false,
        };
        if none {
            return Ok(());
        }
        let (world, len) = (self.collective.world(), self.lens[bucket]);
        let rank = self.collective.rank();
        let mut filled: Vec<(Range<usize>, Vec<f32>)> = wanted(world, rank, mirror, len)
            .map(|range| (range.clone(), vec![0.0; range.len()]))
            .collect();
        let mut fill = |range: Range<usize>, values: &[f32]| {
            let target = filled.iter_mut().find(|(target, _)| covers(target, &range));
            let (target, into) = target.expect("a wanted range");
            into[range.start - target.start..range.end - target.start].copy_from_slice(values);
        };
        let mut arrivals = Vec::new();
        for shard in 0..self.past.world() {
            let held = shard_range(len, self.past.world(), shard);
            for to in 0..world {
                for wanted in wanted(world, to, mirror, len) {
                    let piece = held.start.max(wanted.start)..held.end.min(wanted.end);
                    if piece.is_empty() {
                        continue;
                    }
                    let own = |range: Range<usize>| {
                        let old = old.expect("a source holds its shards");
                        let shard = old.holding(bucket, &range);
                        let values = moment.of(shard).read();
                        values[range.start - shard.range.start..range.end - shard.range.start]
                            .to_vec()
                    };
                    if self.sources[shard] == to {
                        if to == rank {
                            fill(piece.clone(), &own(piece));
                        }
                        continue;
                    }
                    arrivals.extend(self.send(shard, to, piece, own)?);
                }
            }
        }
        self.arrive(arrivals, &mut fill)?;
        for (range, values) in filled {
            moment.of_mut(new.holding_mut(bucket, &range)).write(values);
        }
        Ok(())
    }

    /// Starts sending elements of an old shard to rank `to`; `own` reads them where they are. Nothing if they are there.
    fn send(
        &mut self,
        shard: usize,
        to: usize,
        range: Range<usize>,
        own: impl Fn(Range<usize>) -> Vec<f32>,
    ) -> Result<Option<Arrival>, CollectiveError> {
        let (rank, from) = (self.collective.rank(), self.sources[shard]);
        if from == to || range.is_empty() {
            return Ok(None);
        }
        let region = match rank {
            rank if rank == from => own(range.clone()),
            rank if rank == to => vec![0.0; range.len()],
            _ => Vec::new(),
        };
        let (op, generation) = (Op::Send { from, to }, self.collective.generation());
        let ticket = self
            .collective
            .start(op, Region::HostF32(region), generation)?;
        Ok(Some(Arrival {
            ticket,
            range: (rank == to).then_some(range),
        }))
    }

    fn arrive(
        &mut self,
        arrivals: Vec<Arrival>,
        mut fill: impl FnMut(Range<usize>, &[f32]),
    ) -> Result<(), CollectiveError> {
        for Arrival { ticket, range } in arrivals {
            let deadline = self.deadline();
            let values = self.collective.wait(ticket, deadline)?.into_f32();
            if let Some(range) = range {
                fill(range, &values);
            }
        }
        Ok(())
    }
}

/// What a rank holds of a bucket of `len` elements: its own shard, and the one that it mirrors.
fn wanted(
    world: usize,
    rank: usize,
    mirror: bool,
    len: usize,
) -> impl Iterator<Item = Range<usize>> {
    let place = Place {
        world,
        rank,
        mirror,
    };
    let ranks = std::iter::once(rank).chain(place.before());
    ranks
        .map(move |rank| shard_range(len, world, rank))
        .filter(|range| !range.is_empty())
}

fn covers(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The f32 weights themselves.
    Master,
    First,
    Second,
}

impl Moment {
    fn of(self, shard: &Shard) -> &crate::moments::Moments {
        match self {
            Self::Master => &shard.master,
            Self::First => &shard.first,
            Self::Second => &shard.second,
        }
    }

    fn of_mut(self, shard: &mut Shard) -> &mut crate::moments::Moments {
        match self {
            Self::Master => &mut shard.master,
            Self::First => &mut shard.first,
            Self::Second => &mut shard.second,
        }
    }
}
