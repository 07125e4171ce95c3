//! Packs side by side: each lane is a thread (or a few) that takes one pack after another through the model. A pack is too
//! small to keep many threads busy inside every operation, and lanes need nothing of each other but the order in which they
//! add gradients (`shared_sums`).
//!
//! Results come back in the order of the packs and have the same bits with any number of lanes. On a device there is one
//! lane: the device itself is parallel.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use model::Device;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::TrainError;

/// On the host packs are cut so small that this many fit into what may go through the model at once.
const PACKS_AT_ONCE: usize = 4;

/// Threads of this process, as they are shared out among packs.
pub(crate) struct Lanes {
    host: bool,
    threads: usize,
    /// Thread pools by number of lanes, made when first asked for.
    pools: BTreeMap<usize, Vec<ThreadPool>>,
}

impl Lanes {
    /// The lanes of a process that computes on `device` with the threads of the rayon pool that this is called in.
    pub fn new(device: &Device) -> Self {
        Self {
            host: device.is_host(),
            threads: rayon::current_num_threads(),
            pools: BTreeMap::new(),
        }
    }

    /// Most tokens of a pack when `micro_batch_tokens` may go through the model at once.
    pub fn pack_tokens(&self, micro_batch_tokens: usize) -> usize {
        pack_tokens(self.host, micro_batch_tokens)
    }

    /// Lanes for packs of so many tokens.
    pub fn count(&self, pack_tokens: &[usize], micro_batch_tokens: usize) -> usize {
        if !self.host {
            return 1;
        }
        lanes(pack_tokens, micro_batch_tokens, self.threads)
    }

    /// `work(0)` to `work(count - 1)` on so many lanes; `consume` gets the results in this order on the calling thread, as they
    /// come. Its first error ends the work.
    pub fn each<T: Send, E>(
        &mut self,
        lanes: usize,
        count: usize,
        work: &(dyn Fn(usize) -> T + Sync),
        consume: &mut dyn FnMut(usize, T) -> Result<(), E>,
    ) -> Result<(), E>
    where
        E: From<TrainError>,
    {
        if lanes < 2 {
            return (0..count).try_for_each(|index| consume(index, work(index)));
        }
        let pools = self.pools(lanes)?;
        let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (results, arriving) = mpsc::sync_channel(lanes);
        std::thread::scope(|scope| {
            for pool in pools {
                let (results, next, stopped) = (results.clone(), &next, &stopped);
                scope.spawn(move || {
                    pool.install(|| {
                        while !stopped.load(Ordering::Relaxed) {
                            let index = next.fetch_add(1, Ordering::Relaxed);
                            if index >= count || results.send((index, work(index))).is_err() {
                                return;
                            }
                        }
                    });
                });
            }
            drop(results);
            let (mut early, mut due) = (BTreeMap::new(), 0);
            let mut consume_due = |index, result| {
                early.insert(index, result);
                while let Some(result) = early.remove(&due) {
                    consume(due, result)?;
                    due += 1;
                }
                Ok(())
            };
            let ended = arriving
                .iter()
                .try_for_each(|(index, result)| consume_due(index, result));
            stopped.store(true, Ordering::Relaxed);
            // A lane that still has a result finds nobody who takes it.
            drop(arriving);
            ended
        })
    }

    /// As [`Lanes::each`], all results together.
    pub fn all<T: Send>(
        &mut self,
        lanes: usize,
        count: usize,
        work: &(dyn Fn(usize) -> T + Sync),
    ) -> Result<Vec<T>, TrainError> {
        let mut results = Vec::with_capacity(count);
        self.each(lanes, count, work, &mut |_, result| {
            results.push(result);
            Ok::<(), TrainError>(())
        })?;
        Ok(results)
    }

    fn pools(&mut self, lanes: usize) -> Result<&[ThreadPool], TrainError> {
        if !self.pools.contains_key(&lanes) {
            let (each, more) = (self.threads / lanes, self.threads % lanes);
            let pool = |lane: usize| {
                let threads = each + usize::from(lane < more);
                let builder = ThreadPoolBuilder::new().num_threads(threads);
                builder.thread_name(move |_| format!("lane-{lane}")).build()
            };
            let pools: Result<Vec<_>, _> = (0..lanes).map(pool).collect();
            let pools = pools.map_err(|error| TrainError::Thread {
                thread: "compute",
                source: io::Error::other(error),
            })?;
            self.pools.insert(lanes, pools);
        }
        Ok(&self.pools[&lanes])
    }
}

/// Most tokens of a pack, on the host or on a device.
pub(crate) fn pack_tokens(host: bool, micro_batch_tokens: usize) -> usize {
    if host {
        micro_batch_tokens.div_ceil(PACKS_AT_ONCE)
    } else {
        micro_batch_tokens
    }
}

/// Lanes of the host: as many of the largest packs as fit into `micro_batch_tokens` together, at most one a thread.
pub(crate) fn lanes(pack_tokens: &[usize], micro_batch_tokens: usize, threads: usize) -> usize {
    let mut largest = pack_tokens.to_vec();
    largest.sort_unstable_by(|a, b| b.cmp(a));
    let mut tokens = 0;
    let fitting = largest.into_iter().take(threads).take_while(|&pack| {
        tokens += pack;
        tokens <= micro_batch_tokens
    });
    fitting.count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_lanes_as_the_largest_packs_leave_room_for() {
        assert_eq!(lanes(&[500, 500, 500, 500], 2048, 8), 4);
        assert_eq!(lanes(&[500, 500, 500, 500], 2048, 2), 2);
        assert_eq!(lanes(&[100, 1500, 600, 100], 2048, 8), 1);
        assert_eq!(lanes(&[100, 1400, 600, 100], 2048, 8), 2);
        assert_eq!(lanes(&[9000], 2048, 8), 1);
        assert_eq!(lanes(&[], 2048, 8), 1);
    }

    #[test]
    fn results_come_in_order_whatever_lane_was_faster() {
        let pool = ThreadPoolBuilder::new()
            .num_threads(3)
            .build()
            .expect("threads");
        let mut all = pool.install(|| Lanes::new(&Device::flex()));
        assert_eq!(all.threads, 3);
        for lanes in 1..=3 {
            let begun = std::sync::Barrier::new(lanes);
            let work = |index: usize| {
                // Every lane takes one of the first, however late the system starts it.
                if index < lanes {
                    begun.wait();
                }
                // Early packs are the slow ones.
                let turns = if index < 2 { 200_000 } else { 10 };
                (0..turns).fold(index as u64, |sum, x| std::hint::black_box(sum ^ x));
                (index, rayon::current_num_threads())
            };
            let found = all.all(lanes, 20, &work).expect("no error");
            let order: Vec<usize> = found.iter().map(|(index, _)| *index).collect();
            assert_eq!(order, (0..20).collect::<Vec<_>>());
            let most = found.iter().map(|(_, threads)| *threads).max();
            assert!(lanes == 1 || most == Some(3 / lanes + usize::from(3 % lanes > 0)));
        }
    }

    #[test]
    fn the_first_error_ends_the_work() {
        let pool = ThreadPoolBuilder::new()
            .num_threads(2)
            .build()
            .expect("threads");
        let mut all = pool.install(|| Lanes::new(&Device::flex()));
        let done = AtomicUsize::new(0);
        let work = |index: usize| {
            done.fetch_add(1, Ordering::Relaxed);
            index
        };
        let refuse = |index: usize, _| {
            if index < 3 {
                return Ok(());
            }
            Err(TrainError::Order {
                asked: 0,
                committed: 0,
                total: 0,
            })
        };
        let ended = all.each(2, 1000, &work, &mut { refuse });
        assert!(matches!(ended, Err(TrainError::Order { .. })));
        assert!(done.load(Ordering::Relaxed) < 1000);
    }
}
