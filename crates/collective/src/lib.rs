//! All-reduce, reduce-scatter, all-gather and broadcast over flat buffers.
//!
//! [`Collective`] is the border: an operation takes a [`Region`] over, runs in the background, and gives it back from
//! `wait`. Implementations: [`tcp`] between processes, `nccl` between GPUs (feature `nccl`), [`single`] for a world of one.
//!
//! # What callers rely on
//! - All ranks of a generation hold equal bits after an operation, and the same world size repeats them. Over TCP every element
//!   is added in the order of ranks, 0 + 1 + 2 …; NCCL has an order of its own, which `nccl` says how to keep.
//! - Everything has a deadline, which the caller gives. An error names what was awaited, and the peer where it is known.
//! - After any error the generation is over: its buffers are undefined, and a new generation needs new connections.
//! - A call with another generation than the collective's own is refused; a stale abort changes nothing.
//!
//! Not here: who is in a generation and what to do after a loss (`protocol`), gradients and optimizers (`trainer`).

mod api;
mod device;
mod error;
#[cfg(feature = "nccl")]
pub mod nccl;
mod single;
pub mod tcp;

pub use api::{Aborter, Collective, Op, Region, Ticket, shard_range};
pub use device::{DeviceRegion, Element, EventHandle};
pub use error::{CollectiveError, Peer};
pub use single::{Single, single};

#[cfg(target_endian = "big")]
compile_error!("floats travel in the byte order of the machine, which must be little-endian");
