//! The border: operations, regions, tickets and the trait. No transport.

use std::{fmt, ops::Range, sync::Arc, time::Instant};

use crate::{CollectiveError, DeviceRegion, Element};

/// What to do with a region. All ranks start the same operations on regions of the same length in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Every rank gets the sum over ranks of every element.
    AllReduceSum,
    /// Every rank gets the sums of its own [`shard_range`]; the rest of the region is unspecified.
    ReduceScatterSum,
    /// Every rank gives its own [`shard_range`] and gets the others'.
    AllGather,
    /// Every rank gets `root`'s region.
    Broadcast {
        /// The rank whose region is sent.
        root: usize,
    },
    /// Every rank gives its own [`shard_range`] and gets that of the rank before it, rank 0 that of the last, so that each
    /// shard is at two ranks. The rest of the region is unspecified.
    Mirror,
    /// One rank's region replaces another's of the same length. The others take part with whatever they bring, such as
    /// nothing.
    Send {
        /// Whose region is sent.
        from: usize,
        /// Whose is replaced; if it is `from`, nothing happens.
        to: usize,
    },
}

/// Memory that an operation takes over and gives back.
#[derive(Clone, Debug, PartialEq)]
pub enum Region {
    /// Gradients, weights, moments.
    HostF32(Vec<f32>),
    /// Norms, counts, log-probs.
    HostF64(Vec<f64>),
    /// The bits of bf16: weights to gather, to mirror, to broadcast or to send. Sums are made in f32 or wider.
    HostBf16(Vec<u16>),
    /// Opaque bytes, for [`Op::Broadcast`] alone; ranks other than the root get the root's length.
    HostBytes(Vec<u8>),
    /// Memory of a GPU, where [`Collective::takes_devices`].
    Device(DeviceRegion),
}

impl Region {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::HostF32(values) => values.len(),
            Self::HostF64(values) => values.len(),
            Self::HostBf16(values) => values.len(),
            Self::HostBytes(bytes) => bytes.len(),
            Self::Device(region) => region.elements(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The f32 values.
    ///
    /// # Panics
    /// If the region holds something else: an operation never changes a region's type.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::HostF32(values) => values,
            other => panic!("region of {} where f32 was started", other.element()),
        }
    }

    /// The f64 values.
    ///
    /// # Panics
    /// If the region holds something else: an operation never changes a region's type.
    pub fn into_f64(self) -> Vec<f64> {
        match self {
            Self::HostF64(values) => values,
            other => panic!("region of {} where f64 was started", other.element()),
        }
    }

    /// The bits of bf16.
    ///
    /// # Panics
    /// If the region holds something else: an operation never changes a region's type.
    pub fn into_bf16(self) -> Vec<u16> {
        match self {
            Self::HostBf16(values) => values,
            other => panic!("region of {} where bf16 was started", other.element()),
        }
    }

    /// The bytes.
    ///
    /// # Panics
    /// If the region holds something else: an operation never changes a region's type.
    pub fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::HostBytes(bytes) => bytes,
            other => panic!("region of {} where bytes were started", other.element()),
        }
    }

    /// The region of a device.
    ///
    /// # Panics
    /// If the region holds something else: an operation never changes a region's type.
    pub fn into_device(self) -> DeviceRegion {
        match self {
            Self::Device(region) => region,
            other => panic!(
                "region of {} where device memory was started",
                other.element()
            ),
        }
    }

    /// What a region of a device holds.
    pub(crate) fn device_element(&self) -> Option<Element> {
        match self {
            Self::Device(region) => Some(region.element()),
            _ => None,
        }
    }

    pub(crate) fn element(&self) -> &'static str {
        match self {
            Self::HostF32(_) => "f32",
            Self::HostF64(_) => "f64",
            Self::HostBf16(_) => "bf16",
            Self::HostBytes(_) => "bytes",
            Self::Device(region) => region.element().name(),
        }
    }
}

/// A started operation; [`Collective::wait`] turns it into its region.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the region comes back from `wait`"]
pub struct Ticket {
    pub(crate) sequence: u64,
}

/// One rank's end of a group of processes.
pub trait Collective: Send {
    /// This process's rank, `0..world`.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world(&self) -> usize;

    /// The generation that the connections belong to.
    fn generation(&self) -> u64;

    /// Whether it takes regions of device memory.
    fn takes_devices(&self) -> bool {
        false
    }

    /// Starts `op` on `region` in the background. Operations run in the order of their starts.
    ///
    /// # Errors
    /// Another generation; an operation that the region does not have; a group that already failed.
    fn start(&mut self, op: Op, region: Region, generation: u64)
    -> Result<Ticket, CollectiveError>;

    /// The region of a started operation, in any order of tickets.
    ///
    /// # Errors
    /// A lost peer, an abort, or the deadline; each ends the generation.
    fn wait(&mut self, ticket: Ticket, deadline: Instant) -> Result<Region, CollectiveError>;

    /// Whether the group still stands, without waiting for anything: for callers in a long computation that a lost peer makes
    /// useless.
    ///
    /// # Errors
    /// The failure that ended it.
    fn check(&self) -> Result<(), CollectiveError>;

    /// Ends `generation`: every waiter, here and at the peers, gets an error. Nothing happens if it is not the own one.
    fn abort(&mut self, generation: u64);

    /// A handle for aborting from another thread while this one waits.
    fn aborter(&self) -> Aborter;

    /// Leaves the group in order: every rank calls it after its last operation has been waited for. Only a device needs it,
    /// where a rank that merely drops its end takes away memory that peers may still be reading; otherwise it is a drop.
    ///
    /// # Errors
    /// A group that already failed, or peers that do not leave before the deadline.
    fn close(self: Box<Self>, deadline: Instant) -> Result<(), CollectiveError> {
        let _ = deadline;
        Ok(())
    }

    /// Ends the generation and gives back the regions of operations that were started, or refused, and not waited for, in the
    /// order of their starts. Of an unfinished operation's region the elements that this rank only gives are whole, and the
    /// others are unspecified. An implementation that cannot give them back gives none.
    fn reclaim(self: Box<Self>) -> Vec<Region> {
        Vec::new()
    }

    /// [`Collective::start`] and [`Collective::wait`] in one, for callers with nothing to do meanwhile.
    ///
    /// # Errors
    /// As both.
    fn run(
        &mut self,
        op: Op,
        region: Region,
        deadline: Instant,
    ) -> Result<Region, CollectiveError> {
        let ticket = self.start(op, region, self.generation())?;
        self.wait(ticket, deadline)
    }
}

/// Aborts a collective from any thread.
#[derive(Clone)]
pub struct Aborter {
    abort: Arc<Abort>,
}

type Abort = dyn Fn(u64, &str) + Send + Sync;

impl Aborter {
    pub(crate) fn new(abort: impl Fn(u64, &str) + Send + Sync + 'static) -> Self {
        Self {
            abort: Arc::new(abort),
        }
    }

    /// Ends `generation` with `reason` in every waiter's error. Nothing happens if it is not the collective's own.
    pub fn abort(&self, generation: u64, reason: &str) {
        (self.abort)(generation, reason);
    }
}

impl fmt::Debug for Aborter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Aborter")
    }
}

/// The elements of a region of `len` that `rank` owns: contiguous, ascending with the rank, sizes that differ by at most one.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn shard_range(len: usize, world: usize, rank: usize) -> Range<usize> {
    assert!(rank < world, "rank {rank} in a world of {world}");
    let (base, longer) = (len / world, len % world);
    let start = rank * base + rank.min(longer);
    start..start + base + usize::from(rank < longer)
}

#[cfg(test)]
mod tests {
    use super::shard_range;

    #[test]
    fn shards_cover_a_region_once_and_differ_by_at_most_one() {
        for world in 1..7 {
            for len in 0..40 {
                let shards: Vec<_> = (0..world).map(|r| shard_range(len, world, r)).collect();
                assert_eq!(shards[0].start, 0);
                assert_eq!(shards[world - 1].end, len);
                assert!(shards.windows(2).all(|two| two[0].end == two[1].start));
                assert!(shards.iter().all(|s| s.len().abs_diff(len / world) <= 1));
            }
        }
    }
}
