//! One operation: what goes to whom, what comes from whom, and the order of addition. No threads of its own life, no queue.
//!
//! A phase is one round of the mesh: a writer per peer sends while this thread reads the peers one after another, so that no
//! write waits for a read. Sums are made where a shard is owned, chunk by chunk in the order of ranks: `((x₀ + x₁) + x₂) + …`,
//! the same on every run.

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    net::TcpStream,
    ops::Add,
};

use bytemuck::Pod;
use rayon::ThreadPool;

use super::{
    frame::{FRAME_BYTES, Frame},
    state::State,
};
use crate::{CollectiveError, Op, shard_range};

/// Elements added at a time. Smaller chunks cost more calls and wake-ups; the two that are in use have to stay in a core's cache.
const CHUNK_ELEMENTS: usize = 64 * 1024;

/// Most bytes that an operation on numbers holds beside its region: two chunks of f64.
pub const SCRATCH_BYTES: usize = 2 * CHUNK_ELEMENTS * size_of::<f64>();

/// Bytes read between two notes of progress, and the most that is allocated ahead of what has arrived.
const STRIDE_BYTES: usize = 1024 * 1024;

pub(super) struct Exchange<'a> {
    pub(super) rank: usize,
    pub(super) state: &'a State,
    pub(super) op: Op,
    pub(super) sequence: u64,
    /// A thread for every peer at least: with fewer, writing to one would wait for what another reads.
    pub(super) writers: &'a ThreadPool,
}

/// The failure is in the state; the engine only has to stop.
struct Stopped;

impl Exchange<'_> {
    /// Runs an operation on numbers. After a failure the region comes back as an error. Of bits no sum is asked for: `start` refuses
    /// it.
    pub(super) fn run<T: Pod + Add<Output = T> + Send + Sync>(
        &self,
        mut region: Vec<T>,
    ) -> Result<Vec<T>, Vec<T>> {
        let done = match self.op {
            Op::ReduceScatterSum => self.reduce_scatter(&mut region),
            Op::AllGather => self.all_gather(&mut region),
            Op::AllReduceSum => self
                .reduce_scatter(&mut region)
                .and_then(|()| self.all_gather(&mut region)),
            Op::Broadcast { root } => self.broadcast(root, &mut region),
            Op::Mirror => self.mirror(&mut region),
            Op::Send { from, to } => self.send(from, to, &mut region),
        };
        match done {
            Ok(()) => Ok(region),
            Err(Stopped) => Err(region),
        }
    }

    /// Every peer gets its shard of this rank's region; the own shard, which nobody is sent, becomes the sum over ranks while
    /// the others leave.
    fn reduce_scatter<T: Pod + Add<Output = T> + Send + Sync>(
        &self,
        region: &mut [T],
    ) -> Result<(), Stopped> {
        let frame = self.frame::<T>(region.len(), 0);
        let mut shards = self.shards(region);
        let own = std::mem::take(&mut shards[self.rank]);
        self.phase(
            "sums of parts",
            |peer| Some(bytemuck::cast_slice(&*shards[peer])),
            frame,
            || {
                for peer in self.peers() {
                    self.expect_frame(peer, &frame, size_of_val(own))?;
                }
                self.add_in_order(own)
            },
        )
    }

    /// Adds the ranks below to the own values and the ranks above to that, in place: memory for two chunks is all it takes.
    fn add_in_order<T: Pod + Add<Output = T>>(&self, own: &mut [T]) -> Result<(), Stopped> {
        let all = size_of_val(own) as u64;
        let mut below = vec![T::zeroed(); CHUNK_ELEMENTS.min(own.len())];
        let mut arrived = vec![T::zeroed(); below.len()];
        for (index, own) in own.chunks_mut(CHUNK_ELEMENTS).enumerate() {
            let got = (index * CHUNK_ELEMENTS * size_of::<T>()) as u64;
            let below = &mut below[..own.len()];
            let arrived = &mut arrived[..own.len()];
            for rank in 0..self.rank {
                if rank == 0 {
                    self.read(rank, bytemuck::cast_slice_mut(below), got, all)?;
                } else {
                    self.read(rank, bytemuck::cast_slice_mut(arrived), got, all)?;
                    add(below, arrived);
                }
            }
            if self.rank > 0 {
                for (own, below) in own.iter_mut().zip(&*below) {
                    *own = *below + *own;
                }
            }
            for rank in self.rank + 1..self.world() {
                self.read(rank, bytemuck::cast_slice_mut(arrived), got, all)?;
                add(own, arrived);
            }
        }
        Ok(())
    }

    /// Every peer gets this rank's shard; the others' shards are filled in.
    fn all_gather<T: Pod + Send + Sync>(&self, region: &mut [T]) -> Result<(), Stopped> {
        let frame = self.frame::<T>(region.len(), 1);
        let mut shards = self.shards(region);
        let own = std::mem::take(&mut shards[self.rank]);
        let own = bytemuck::cast_slice(&*own);
        self.phase(
            "shards",
            |_| Some(own),
            frame,
            || {
                for peer in self.peers() {
                    let theirs: &mut [u8] = bytemuck::cast_slice_mut(&mut *shards[peer]);
                    self.expect_frame(peer, &frame, theirs.len())?;
                    self.read_all(peer, theirs)?;
                }
                Ok(())
            },
        )
    }

    fn broadcast<T: Pod + Send + Sync>(
        &self,
        root: usize,
        region: &mut [T],
    ) -> Result<(), Stopped> {
        let frame = self.frame::<T>(region.len(), 1);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(region);
        if root == self.rank {
            let bytes = &*bytes;
            return self.phase("a broadcast", |_| Some(bytes), frame, || Ok(()));
        }
        self.phase(
            "a broadcast",
            |_| None,
            frame,
            || {
                self.expect_frame(root, &frame, bytes.len())?;
                self.read_all(root, bytes)
            },
        )
    }

    /// The next rank gets this rank's shard, and the shard of the one before is filled in.
    fn mirror<T: Pod + Send + Sync>(&self, region: &mut [T]) -> Result<(), Stopped> {
        let world = self.world();
        let (next, before) = ((self.rank + 1) % world, (self.rank + world - 1) % world);
        if next == self.rank {
            return Ok(());
        }
        let frame = self.frame::<T>(region.len(), 1);
        let mut shards = self.shards(region);
        let own = std::mem::take(&mut shards[self.rank]);
        let own = bytemuck::cast_slice(&*own);
        let theirs: &mut [u8] = bytemuck::cast_slice_mut(&mut *shards[before]);
        self.phase(
            "mirrored shards",
            |peer| (peer == next).then_some(own),
            frame,
            || {
                self.expect_frame(before, &frame, theirs.len())?;
                self.read_all(before, theirs)
            },
        )
    }

    fn send<T: Pod + Send + Sync>(
        &self,
        from: usize,
        to: usize,
        region: &mut [T],
    ) -> Result<(), Stopped> {
        if from == to || (self.rank != from && self.rank != to) {
            return Ok(());
        }
        let frame = self.frame::<T>(region.len(), 1);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(region);
        if self.rank == from {
            let bytes = &*bytes;
            let payload = |peer| (peer == to).then_some(bytes);
            return self.phase("a region", payload, frame, || Ok(()));
        }
        self.phase(
            "a region",
            |_| None,
            frame,
            || {
                self.expect_frame(from, &frame, bytes.len())?;
                self.read_all(from, bytes)
            },
        )
    }

    /// Broadcast of bytes: the root's length counts, whatever the others brought. After a failure, what this rank brought.
    pub(super) fn broadcast_bytes(&self, bytes: Vec<u8>) -> Result<Vec<u8>, Vec<u8>> {
        let Op::Broadcast { root } = self.op else {
            unreachable!("start refuses {:?} of bytes", self.op)
        };
        if root == self.rank {
            let frame = self.frame::<u8>(bytes.len(), 1);
            let sent = self.phase("a broadcast", |_| Some(&bytes), frame, || Ok(()));
            return match sent {
                Ok(()) => Ok(bytes),
                Err(Stopped) => Err(bytes),
            };
        }
        let mut received = Vec::new();
        let frame = self.frame::<u8>(0, 1);
        let done = self.phase(
            "a broadcast",
            |_| None,
            frame,
            || {
                let got = self.read_frame(root)?;
                let expected = Frame {
                    elements: got.elements,
                    payload_bytes: got.elements,
                    ..frame
                };
                self.check_frame(root, &expected, &got)?;
                // Grows with what has arrived, so that a wrong length cannot ask for memory.
                while (received.len() as u64) < got.elements {
                    let start = received.len();
                    let more = (got.elements - start as u64).min(STRIDE_BYTES as u64) as usize;
                    received.resize(start + more, 0);
                    self.read(root, &mut received[start..], start as u64, got.elements)?;
                }
                Ok(())
            },
        );
        match done {
            Ok(()) => Ok(received),
            Err(Stopped) => Err(bytes),
        }
    }

    /// Sends what `payload` names for each peer, each from a thread of its own, while `receive` runs on this one.
    fn phase<'b>(
        &self,
        what: &str,
        payload: impl Fn(usize) -> Option<&'b [u8]>,
        frame: Frame,
        receive: impl FnOnce() -> Result<(), Stopped>,
    ) -> Result<(), Stopped> {
        let outgoing: Vec<(usize, &[u8])> = self
            .peers()
            .filter_map(|peer| payload(peer).map(|bytes| (peer, bytes)))
            .collect();
        let sending: BTreeSet<usize> = outgoing.iter().map(|&(peer, _)| peer).collect();
        self.state.enter(
            format!(
                "exchanging {what} ({:?}, operation {})",
                self.op, self.sequence
            ),
            sending,
        );
        let received = self.writers.in_place_scope(|scope| {
            for (peer, bytes) in outgoing {
                let header = Frame {
                    payload_bytes: bytes.len() as u64,
                    ..frame
                }
                .encode();
                scope.spawn(
                    move |_| match write(self.state.stream(peer), &header, bytes) {
                        Ok(()) => self.state.sent(peer),
                        Err(error) => self.state.lost(peer, &error),
                    },
                );
            }
            let received = receive();
            self.state.reading(None);
            received
        });
        received?;
        // A writer's failure reaches this thread only through the state.
        if self.state.has_failed() {
            return Err(Stopped);
        }
        Ok(())
    }

    fn frame<T>(&self, elements: usize, phase: u8) -> Frame {
        Frame {
            generation: self.state.generation(),
            sequence: self.sequence,
            elements: elements as u64,
            payload_bytes: 0,
            op: self.op,
            phase,
            element_bytes: size_of::<T>() as u8,
        }
    }

    fn expect_frame(&self, peer: usize, frame: &Frame, bytes: usize) -> Result<(), Stopped> {
        let expected = Frame {
            payload_bytes: bytes as u64,
            ..*frame
        };
        let got = self.read_frame(peer)?;
        self.check_frame(peer, &expected, &got)
    }

    fn read_frame(&self, peer: usize) -> Result<Frame, Stopped> {
        let mut header = [0; FRAME_BYTES];
        self.read(peer, &mut header, 0, FRAME_BYTES as u64)?;
        Frame::decode(&header).map_err(|got| self.disagree(peer, "a frame".into(), got))
    }

    fn check_frame(&self, peer: usize, expected: &Frame, got: &Frame) -> Result<(), Stopped> {
        if expected == got {
            return Ok(());
        }
        Err(self.disagree(peer, expected.to_string(), got.to_string()))
    }

    fn disagree(&self, peer: usize, expected: String, got: String) -> Stopped {
        self.state.fail(CollectiveError::Disagreement {
            peer: self.state.peers[peer].clone(),
            expected,
            got,
        });
        Stopped
    }

    fn read_all(&self, peer: usize, bytes: &mut [u8]) -> Result<(), Stopped> {
        let all = bytes.len() as u64;
        let mut got = 0;
        for piece in bytes.chunks_mut(STRIDE_BYTES) {
            self.read(peer, piece, got, all)?;
            got += piece.len() as u64;
        }
        Ok(())
    }

    /// Fills `bytes` from `peer`; `got` of `all` bytes of the payload came before.
    fn read(&self, peer: usize, bytes: &mut [u8], got: u64, all: u64) -> Result<(), Stopped> {
        self.state.reading(Some((peer, got, all)));
        let mut stream = self.state.stream(peer);
        stream.read_exact(bytes).map_err(|error| {
            self.state.lost(peer, &error);
            Stopped
        })
    }

    /// The shards of a region in the order of ranks.
    fn shards<'r, T>(&self, mut region: &'r mut [T]) -> Vec<&'r mut [T]> {
        let elements = region.len();
        (0..self.world())
            .map(|rank| {
                let shard = shard_range(elements, self.world(), rank);
                region
                    .split_off_mut(..shard.len())
                    .expect("shards cover a region")
            })
            .collect()
    }

    fn world(&self) -> usize {
        self.state.peers.len()
    }

    fn peers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.world()).filter(|&rank| rank != self.rank)
    }
}

fn add<T: Copy + Add<Output = T>>(sums: &mut [T], values: &[T]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum = *sum + *value;
    }
}

fn write(mut stream: &TcpStream, header: &[u8], bytes: &[u8]) -> io::Result<()> {
    stream.write_all(header)?;
    stream.write_all(bytes)
}
