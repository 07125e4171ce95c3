//! What goes through the model together: pairs, their packs, and which packs are this rank's. Packs are cut from the pairs
//! alone and then dealt, so the world size changes who computes a pack and never what is in it (T1).

use data::Pair;
use model::{Pack, PairTokens};
use objective::GlobalCounts;

/// The pairs of a step (or of an evaluation) and this rank's part of the work.
pub(crate) struct Batch<'a> {
    /// All pairs, in an order that all ranks share; a place in it is a slot.
    pub pairs: Vec<&'a Pair>,
    /// Slots of this rank's packs.
    pub own: Vec<Vec<usize>>,
    /// Packs of the rank that has most.
    pub rounds: usize,
    /// How many of them go through the model side by side.
    pub lanes: usize,
    /// Sizes over all ranks.
    pub counts: GlobalCounts,
    /// Tokens over all ranks, a prompt counted once for each of its completions.
    pub tokens: u64,
}

impl<'a> Batch<'a> {
    /// Cuts `pairs` into packs of at most `capacity` tokens and deals them, to go through the model one by one.
    pub fn new(pairs: Vec<&'a Pair>, capacity: usize, rank: usize, world: usize) -> Self {
        let lengths: Vec<usize> = pairs.iter().map(|pair| pair.packed_tokens()).collect();
        let mut packs = data::pack_plan(&lengths, capacity);
        let loads: Vec<usize> = packs
            .iter()
            .map(|pack| pack.iter().map(|&slot| lengths[slot]).sum())
            .collect();
        let dealt = (0..world).map(|rank| data::deal(&loads, rank, world).len());
        let rounds = dealt.max().unwrap_or(0);
        let own = packs.drain(data::deal(&loads, rank, world)).collect();
        let counts = GlobalCounts {
            pairs: pairs.len() as u64,
            completions: pairs.iter().map(|pair| pair.completions()).sum(),
            chosen_tokens: pairs.iter().map(|pair| pair.chosen.len() as u64).sum(),
        };
        Self {
            tokens: pairs.iter().map(|pair| pair.tokens()).sum(),
            own,
            rounds,
            lanes: 1,
            counts,
            pairs,
        }
    }

    /// Tokens of this rank's packs.
    pub fn own_tokens(&self) -> Vec<usize> {
        let tokens = |slot: &usize| self.pairs[*slot].packed_tokens();
        let packs = self.own.iter();
        packs
            .map(|slots| slots.iter().map(tokens).sum::<usize>())
            .collect()
    }

    /// The tokens of one of the own packs.
    pub fn pack(&self, slots: &[usize]) -> Pack {
        Pack::new(slots.iter().map(|&slot| pair_tokens(self.pairs[slot])))
    }
}

pub(crate) fn pair_tokens(pair: &Pair) -> PairTokens<'_> {
    PairTokens {
        prompt: &pair.prompt,
        chosen: &pair.chosen,
        rejected: &pair.rejected,
    }
}
