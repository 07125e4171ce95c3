//! A world of one: every operation gives its region back as it is. Generations and aborts are kept like anywhere else, so
//! that a caller cannot come to rely on their absence.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use crate::{Aborter, Collective, CollectiveError, Element, Op, Region, Ticket};

/// The only rank of a generation.
pub struct Single {
    generation: u64,
    started: u64,
    pending: BTreeMap<u64, Region>,
    aborted: Arc<Mutex<Option<String>>>,
}

/// A collective of one rank.
pub fn single(generation: u64) -> Single {
    Single {
        generation,
        started: 0,
        pending: BTreeMap::new(),
        aborted: Arc::new(Mutex::new(None)),
    }
}

impl Single {
    fn check_alive(&self) -> Result<(), CollectiveError> {
        let aborted = self.aborted.lock().unwrap_or_else(PoisonError::into_inner);
        match &*aborted {
            None => Ok(()),
            Some(reason) => Err(CollectiveError::Aborted {
                generation: self.generation,
                reason: reason.clone(),
            }),
        }
    }
}

impl Collective for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn generation(&self) -> u64 {
        self.generation
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
        check_start(op, &region, 1, generation, self.generation)?;
        let sequence = self.started;
        self.started += 1;
        self.pending.insert(sequence, region);
        self.check_alive()?;
        Ok(Ticket { sequence })
    }

    fn wait(&mut self, ticket: Ticket, _deadline: Instant) -> Result<Region, CollectiveError> {
        self.check_alive()?;
        let sequence = ticket.sequence;
        self.pending
            .remove(&sequence)
            .ok_or(CollectiveError::UnknownTicket { sequence })
    }

    fn check(&self) -> Result<(), CollectiveError> {
        self.check_alive()
    }

    fn abort(&mut self, generation: u64) {
        self.aborter().abort(generation, "by this rank");
    }

    fn reclaim(self: Box<Self>) -> Vec<Region> {
        self.pending.into_values().collect()
    }

    fn aborter(&self) -> Aborter {
        let (own, aborted) = (self.generation, Arc::clone(&self.aborted));
        Aborter::new(move |generation, reason| {
            if generation == own {
                let mut aborted = aborted.lock().unwrap_or_else(PoisonError::into_inner);
                aborted.get_or_insert_with(|| reason.to_owned());
            }
        })
    }
}

/// The rules of every implementation's `start`.
pub(crate) fn check_start(
    op: Op,
    region: &Region,
    world: usize,
    asked: u64,
    current: u64,
) -> Result<(), CollectiveError> {
    if asked != current {
        return Err(CollectiveError::Stale { asked, current });
    }
    let reason = match op {
        Op::Broadcast { root } if root >= world => {
            format!("root {root} is no rank of a world of {world}")
        }
        Op::Broadcast { .. } => return Ok(()),
        Op::Send { from, to } if from.max(to) >= world => {
            format!("rank {} is none of a world of {world}", from.max(to))
        }
        _ if matches!(region, Region::HostBytes(_))
            || region.device_element() == Some(Element::Byte) =>
        {
            "bytes can be broadcast and nothing else".into()
        }
        Op::AllReduceSum | Op::ReduceScatterSum
            if matches!(region, Region::HostBf16(_))
                || region.device_element() == Some(Element::Bf16) =>
        {
            "sums are made in f32 or wider".into()
        }
        _ => return Ok(()),
    };
    Err(CollectiveError::Unsupported {
        op: format!("{op:?}"),
        reason,
    })
}
