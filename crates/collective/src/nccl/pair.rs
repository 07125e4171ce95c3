//! TCP and NCCL among the same ranks: each takes the regions that it is good at.

use std::{collections::BTreeMap, time::Instant};

use super::Nccl;
use crate::{Aborter, Collective, CollectiveError, Op, Region, Ticket, tcp::Tcp};

/// A group with two ways: regions of the host go over TCP, regions of a device over NCCL.
///
/// The two have queues of their own, so an operation on the host does not wait for those on the device. Where one fails, and
/// where it is aborted, both end; a peer that is gone is noticed by the next operation over TCP, and by NCCL not at all.
pub struct Pair {
    tcp: Tcp,
    nccl: Box<Nccl>,
    started: u64,
    /// The other's tickets by this one's.
    tickets: BTreeMap<u64, Way>,
}

enum Way {
    Host(Ticket),
    Device(Ticket),
}

impl Pair {
    /// Of two collectives of the same ranks and generation.
    ///
    /// # Panics
    /// If they are not.
    pub fn new(tcp: Tcp, nccl: Nccl) -> Self {
        let of = |it: &dyn Collective| (it.rank(), it.world(), it.generation());
        assert_eq!(of(&tcp), of(&nccl), "rank, world and generation");
        Self {
            tcp,
            nccl: Box::new(nccl),
            started: 0,
            tickets: BTreeMap::new(),
        }
    }

    /// Ends the other way too, if one has failed.
    fn both<T>(&mut self, result: Result<T, CollectiveError>) -> Result<T, CollectiveError> {
        if let Err(error) = &result {
            // A mistake of the caller's is no failure of the group.
            if self.tcp.check().is_err() || self.nccl.check().is_err() {
                self.aborter()
                    .abort(self.generation(), &format!("the other way failed: {error}"));
            }
        }
        result
    }
}

impl Collective for Pair {
    fn rank(&self) -> usize {
        self.tcp.rank()
    }

    fn world(&self) -> usize {
        self.tcp.world()
    }

    fn generation(&self) -> u64 {
        self.tcp.generation()
    }

    fn takes_devices(&self) -> bool {
        true
    }

    fn start(
        &mut self,
        op: Op,
        region: Region,
        generation: u64,
    ) -> Result<Ticket, CollectiveError> {
        let way = if let Region::Device(_) = region {
            self.nccl.start(op, region, generation).map(Way::Device)
        } else {
            self.tcp.start(op, region, generation).map(Way::Host)
        };
        let way = self.both(way)?;
        let sequence = self.started;
        self.started += 1;
        self.tickets.insert(sequence, way);
        Ok(Ticket { sequence })
    }

    fn wait(&mut self, ticket: Ticket, deadline: Instant) -> Result<Region, CollectiveError> {
        let sequence = ticket.sequence;
        let result = match self.tickets.remove(&sequence) {
            Some(Way::Host(ticket)) => self.tcp.wait(ticket, deadline),
            Some(Way::Device(ticket)) => self.nccl.wait(ticket, deadline),
            None => Err(CollectiveError::UnknownTicket { sequence }),
        };
        self.both(result)
    }

    fn check(&self) -> Result<(), CollectiveError> {
        self.tcp.check().and_then(|()| self.nccl.check())
    }

    fn abort(&mut self, generation: u64) {
        self.aborter().abort(generation, "by this rank");
    }

    fn aborter(&self) -> Aborter {
        let (tcp, nccl) = (self.tcp.aborter(), self.nccl.aborter());
        Aborter::new(move |generation, reason| {
            tcp.abort(generation, reason);
            nccl.abort(generation, reason);
        })
    }

    fn close(self: Box<Self>, deadline: Instant) -> Result<(), CollectiveError> {
        self.nccl.close(deadline)?;
        Box::new(self.tcp).close(deadline)
    }

    /// The host's regions; by then the device has let go of its own, which the caller holds anyway.
    fn reclaim(self: Box<Self>) -> Vec<Region> {
        let Self { tcp, nccl, .. } = *self;
        drop(nccl);
        Box::new(tcp).reclaim()
    }
}
