//! What can go wrong between ranks, with the values that explain it.

use std::fmt;

/// Another process of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its rank.
    pub rank: usize,
    /// The address that it announced, `ip:port`.
    pub address: String,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} ({})", self.rank, self.address)
    }
}

/// Why an operation or a rendezvous did not happen. After any of these from `wait` the generation is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// The call belongs to another generation.
    #[error("generation {asked} was asked for, the connections belong to generation {current}")]
    Stale {
        /// The caller's generation.
        asked: u64,
        /// The collective's own.
        current: u64,
    },
    /// The region's type has no such operation, or the root is no rank.
    #[error("{op} is not possible: {reason}")]
    Unsupported {
        /// The operation.
        op: String,
        /// Why not.
        reason: String,
    },
    /// The ticket was waited for before, or belongs to another collective.
    #[error("no operation number {sequence} is pending")]
    UnknownTicket {
        /// Number of the operation since the rendezvous.
        sequence: u64,
    },
    /// Somebody ended the generation.
    #[error("generation {generation} was aborted: {reason}")]
    Aborted {
        /// The generation that ended.
        generation: u64,
        /// Who ended it, and why.
        reason: String,
    },
    /// A connection broke. `also_closed` names further peers whose connection is closed: the first to go may be among
    /// them, since every rank that notices a loss closes its own connections.
    #[error("lost {peer} while {awaited}: {cause}{}", others(also_closed))]
    Lost {
        /// Whose connection broke here.
        peer: Peer,
        /// What was under way.
        awaited: String,
        /// The system's words.
        cause: String,
        /// Other peers that are gone too.
        also_closed: Vec<Peer>,
    },
    /// The deadline passed.
    #[error("the deadline passed while {awaited} of {peer}")]
    Deadline {
        /// The peer that did not answer.
        peer: Peer,
        /// What was under way.
        awaited: String,
    },
    /// The deadline passed before all ranks were connected.
    #[error(
        "no connection from {} within the deadline{}",
        list(missing),
        refusals(refused)
    )]
    Missing {
        /// Who did not come.
        missing: Vec<Peer>,
        /// Connections that were turned away meanwhile, and why.
        refused: Vec<String>,
    },
    /// No connection could be made.
    #[error("cannot reach {peer}: {cause}")]
    Unreachable {
        /// Who was called.
        peer: Peer,
        /// The system's words.
        cause: String,
    },
    /// The handshake failed.
    #[error("handshake with {peer}: {reason}")]
    Refused {
        /// Who was called.
        peer: Peer,
        /// Why there is no connection.
        reason: String,
    },
    /// Ranks run different operations.
    #[error("{peer} sent {got} where this rank is at {expected}: ranks run different operations")]
    Disagreement {
        /// The other rank.
        peer: Peer,
        /// What this rank runs.
        expected: String,
        /// What the peer runs.
        got: String,
    },
    /// A device, NCCL or the CUDA driver refused or broke something. NCCL does not say which rank is to blame.
    #[error("rank {rank} of {world}, generation {generation}, {during}: {cause}")]
    Device {
        /// This rank.
        rank: usize,
        /// Number of ranks.
        world: usize,
        /// The generation that ended.
        generation: u64,
        /// What was under way.
        during: String,
        /// Which call failed, and the library's words.
        cause: String,
    },
    /// The deadline passed on a device.
    #[error(
        "the deadline passed on rank {rank} of {world}, generation {generation}, while {awaited}; NCCL does not say which rank \
         is late"
    )]
    Stalled {
        /// This rank.
        rank: usize,
        /// Number of ranks.
        world: usize,
        /// The generation that ended.
        generation: u64,
        /// What was under way.
        awaited: String,
    },
    /// The own side is wrong: addresses, listener, threads.
    #[error("{what}: {cause}")]
    Local {
        /// What was tried.
        what: String,
        /// What stood against it.
        cause: String,
    },
}

impl CollectiveError {
    /// The peer that broke it, as far as this rank can tell.
    pub fn suspect(&self) -> Option<&Peer> {
        match self {
            Self::Lost { peer, .. }
            | Self::Deadline { peer, .. }
            | Self::Unreachable { peer, .. }
            | Self::Refused { peer, .. }
            | Self::Disagreement { peer, .. } => Some(peer),
            Self::Missing { missing, .. } => missing.first(),
            Self::Stale { .. }
            | Self::Unsupported { .. }
            | Self::UnknownTicket { .. }
            | Self::Aborted { .. }
            | Self::Device { .. }
            | Self::Stalled { .. }
            | Self::Local { .. } => None,
        }
    }
}

fn list(peers: &[Peer]) -> String {
    let names: Vec<String> = peers.iter().map(Peer::to_string).collect();
    names.join(", ")
}

fn others(peers: &[Peer]) -> String {
    if peers.is_empty() {
        return String::new();
    }
    format!("; also closed: {}", list(peers))
}

fn refusals(refused: &[String]) -> String {
    if refused.is_empty() {
        return String::new();
    }
    format!("; turned away: {}", refused.join(", "))
}
