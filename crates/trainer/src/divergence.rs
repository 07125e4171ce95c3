//! Ranks that should hold the same bits, compared: data parallelism keeps a copy of the weights on every rank, and a copy that
//! differs by a bit (a memory error, a kernel that is not deterministic) trains on as another model without a sign. The weights of
//! every bucket as they are computed with, and what the optimizer keeps of every shard beside its mirror's, are compared by the
//! first 64 bits of their BLAKE3.

use std::time::Instant;

use collective::{Collective, CollectiveError, Op, Region};
use model::Layout;

use crate::error::TrainError;
use crate::moments::Moments;
use crate::shards::{Shard, ShardedOptimizer};

/// Numbers of a rank: a digest of each bucket of weights, of its own masters and moments, of those that it mirrors.
struct Digests(Vec<u64>);

/// Compares this rank's `weights`, by bucket, and what its optimizer keeps with the others'.
///
/// # Errors
/// The first bucket whose weights differ, or the shard whose mirror does; the same on all ranks.
pub(crate) fn compare(
    collective: &mut dyn Collective,
    layout: &Layout,
    weights: impl Iterator<Item = impl AsRef<[f32]>>,
    optimizer: &ShardedOptimizer,
    step: u64,
    deadline: Instant,
) -> Result<(), TrainError> {
    let buckets = layout.buckets.len();
    let weights = weights.map(|bucket| digest([bucket.as_ref()]));
    let moments = [optimizer.shards(), optimizer.mirrored()].map(moments);
    let own = Digests(weights.chain(moments).collect());
    let all = own.share(collective, deadline)?;
    let world = all.len();
    let different = (0..buckets).find_map(|bucket| {
        let rank = (1..world).find(|&rank| all[rank][bucket] != all[0][bucket])?;
        Some((bucket, rank))
    });
    if let Some((bucket, rank)) = different {
        let tensors = layout.buckets[bucket].parameters.clone();
        let first = &layout.parameters[tensors.start].name;
        return Err(TrainError::Diverged {
            step,
            what: format!("the weights of bucket {bucket} (from {first} on)"),
            rank,
            other: 0,
        });
    }
    if optimizer.mirrored().is_empty() {
        return Ok(());
    }
    let kept = if optimizer.has_masters() {
        "the masters and moments"
    } else {
        "the moments"
    };
    for rank in 0..world {
        let mirror = (rank + 1) % world;
        if all[rank][buckets] != all[mirror][buckets + 1] {
            return Err(TrainError::Diverged {
                step,
                what: format!("{kept} of shard {rank}"),
                rank: mirror,
                other: rank,
            });
        }
    }
    Ok(())
}

fn moments(shards: &[Shard]) -> u64 {
    let values: Vec<_> = shards
        .iter()
        .flat_map(|shard| [&shard.master, &shard.first, &shard.second].map(Moments::read))
        .collect();
    digest(values.iter().map(AsRef::as_ref))
}

fn digest<'a>(values: impl IntoIterator<Item = &'a [f32]>) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for values in values {
        hasher.update(bytemuck::cast_slice(values));
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

impl Digests {
    /// All ranks' digests. A sum over ranks of which one fills a slot is exact, in halves that f64 holds exactly.
    fn share(
        &self,
        collective: &mut dyn Collective,
        deadline: Instant,
    ) -> Result<Vec<Vec<u64>>, CollectiveError> {
        let (rank, world, count) = (collective.rank(), collective.world(), self.0.len());
        let mut slots = vec![0.0; 2 * count * world];
        let own = &mut slots[2 * count * rank..][..2 * count];
        for (slot, digest) in own.chunks_exact_mut(2).zip(&self.0) {
            slot[0] = f64::from((digest >> 32) as u32);
            slot[1] = f64::from(*digest as u32);
        }
        let slots = collective
            .run(Op::AllReduceSum, Region::HostF64(slots), deadline)?
            .into_f64();
        let digests = slots.chunks_exact(2).map(|half| {
            // Whole numbers below 2³².
            (half[0] as u64) << 32 | half[1] as u64
        });
        let digests: Vec<u64> = digests.collect();
        Ok(digests.chunks_exact(count).map(<[u64]>::to_vec).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};
    use std::path::Path;
    use std::time::Duration;

    use collective::tcp::Rendezvous;
    use model::ModelConfig;
    use spec::OptimizerSection;

    use super::*;
    use crate::shards::{Keeping, Place, Stretch};

    const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 60, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
        "max_position_embeddings": 64, "tie_word_embeddings": false}"#;

    /// What the ranks of a world of three find after `spoil` had its way with each.
    fn found(
        spoil: impl Fn(usize, &mut [Vec<f32>], &mut ShardedOptimizer) + Sync,
    ) -> Vec<Result<(), String>> {
        let config = ModelConfig::parse(CONFIG, Path::new("config.json")).expect("a config");
        let layout = Layout::new(&config);
        let doors: Vec<_> = (0..3)
            .map(|_| Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).expect("a port"))
            .collect();
        let addresses: Vec<String> = doors.iter().map(Rendezvous::address).collect();
        let deadline = Instant::now() + Duration::from_mins(1);
        let (spoil, layout, addresses) = (&spoil, &layout, &addresses);
        std::thread::scope(|scope| {
            let ranks = doors.into_iter().enumerate().map(|(rank, door)| {
                scope.spawn(move || {
                    let mut tcp = door
                        .connect(rank, addresses, 1, [3; 32], deadline)
                        .expect("connected");
                    let lens = layout.bucket_lens().into_iter();
                    let mut weights: Vec<_> = lens.map(|len| vec![0.0; len]).collect();
                    let stretches = weights.iter().map(|bucket| {
                        let range = 0..bucket.len();
                        vec![Stretch { range, decay: true }]
                    });
                    let stretches: Vec<_> = stretches.collect();
                    let place = Place {
                        world: 3,
                        rank,
                        mirror: true,
                    };
                    let section = OptimizerSection::default();
                    let keeping = Keeping {
                        device: None,
                        masters: true,
                    };
                    let mut optimizer = ShardedOptimizer::new(section, &stretches, place, keeping);
                    spoil(rank, &mut weights, &mut optimizer);
                    let weights = weights.iter();
                    let compared = compare(&mut tcp, layout, weights, &optimizer, 7, deadline);
                    compared.map_err(|error| error.to_string())
                })
            });
            let ranks: Vec<_> = ranks.collect();
            let joined = ranks.into_iter().map(|rank| rank.join().expect("no panic"));
            joined.collect()
        })
    }

    #[test]
    fn equal_ranks_are_equal() {
        assert_eq!(found(|_, _, _| ()), [const { Ok(()) }; 3]);
    }

    #[test]
    fn one_bit_of_a_weight_is_found_by_all_ranks_with_its_bucket_and_its_rank() {
        let ends = found(|rank, weights, _| {
            if rank == 1 {
                let last = weights[1].last_mut().expect("weights");
                *last = f32::from_bits(last.to_bits() ^ 1);
            }
        });
        for end in ends {
            let text = end.expect_err("a difference");
            assert!(
                text.contains("after step 7 the weights of bucket 1"),
                "{text}"
            );
            assert!(text.contains("between rank 1 and rank 0"), "{text}");
        }
    }

    #[test]
    fn a_mirror_that_is_none_is_found_with_its_shard() {
        let of: [fn(&mut Shard) -> &mut Moments; 2] =
            [|shard| &mut shard.second, |shard| &mut shard.master];
        for of in of {
            let ends = found(|rank, _, optimizer| {
                if rank == 0 {
                    // Rank 0 mirrors the shard of the last.
                    of(&mut optimizer.mirrored_mut()[0]).host()[0] = 1e-30;
                }
            });
            for end in ends {
                let text = end.expect_err("a difference");
                assert!(
                    text.contains("the masters and moments of shard 2"),
                    "{text}"
                );
                assert!(text.contains("between rank 0 and rank 2"), "{text}");
            }
        }
    }
}
