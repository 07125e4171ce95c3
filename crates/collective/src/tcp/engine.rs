//! The engine: one thread that runs a rank's operations in the order of their starts until the first failure.

use std::{
    io,
    sync::{Arc, mpsc},
    thread::{Builder, JoinHandle},
};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::{exchange::Exchange, state::State};
use crate::{CollectiveError, Op, Region};

/// A started operation.
pub(super) struct Job {
    pub(super) sequence: u64,
    pub(super) op: Op,
    pub(super) region: Region,
}

pub(super) fn spawn(
    rank: usize,
    state: Arc<State>,
    queue: mpsc::Receiver<Job>,
) -> io::Result<JoinHandle<()>> {
    // Kept for the generation, as starting a thread takes longer than the small operations. Zero would mean one per core.
    let writers = ThreadPoolBuilder::new()
        .num_threads((state.peers.len() - 1).max(1))
        .thread_name(move |peer| format!("collective-{rank}-writer-{peer}"))
        .build()
        .map_err(io::Error::other)?;
    Builder::new()
        .name(format!("collective-{rank}"))
        .spawn(move || {
            // A panic in here is a bug, but waiters must learn of it before their deadline.
            let _guard = FailOnPanic(&state);
            while let Ok(job) = queue.recv() {
                match run(rank, &state, &writers, job.op, job.region, job.sequence) {
                    Ok(region) => state.finish(job.sequence, region),
                    Err(region) => {
                        state.leave(job.sequence, region);
                        break;
                    }
                }
            }
            // After a failure: until this rank's end is dropped or reclaimed.
            for job in queue {
                state.leave(job.sequence, job.region);
            }
        })
}

/// The finished region, or as an error the unfinished one after a failure, which `state` holds.
fn run(
    rank: usize,
    state: &State,
    writers: &ThreadPool,
    op: Op,
    region: Region,
    sequence: u64,
) -> Result<Region, Region> {
    let exchange = Exchange {
        rank,
        state,
        op,
        sequence,
        writers,
    };
    match region {
        Region::HostF32(values) => both(exchange.run(values), Region::HostF32),
        Region::HostF64(values) => both(exchange.run(values), Region::HostF64),
        Region::HostBf16(values) => both(exchange.run(values), Region::HostBf16),
        Region::HostBytes(bytes) => both(exchange.broadcast_bytes(bytes), Region::HostBytes),
        Region::Device(_) => unreachable!("start refuses device memory"),
    }
}

fn both<T>(done: Result<T, T>, region: fn(T) -> Region) -> Result<Region, Region> {
    done.map(region).map_err(region)
}

struct FailOnPanic<'a>(&'a State);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(CollectiveError::Local {
                what: "run an operation".into(),
                cause: "the engine thread panicked".into(),
            });
        }
    }
}
