//! One worker process: a session with the coordinator around one process's training.
//!
//! ```text
//! cli ─► agent: connect ─► Join ─► Welcome ─► entrance: Held ─► Form ─► load, connect ranks, reference pass ─► Ready
//!          session task (tokio): beats, messages in and out  ▲          │
//!          training thread: trainer::Trainer::run over Gate ─┘ ◄────────┘
//!                                                           the next generation
//! ```
//! The session task never computes and the training thread never touches the network of the control plane, so a long step
//! cannot silence the beats. When a generation or the session is over, the collective is aborted and the training thread
//! finds out at its next wait; it enters the next generation with what it holds. The session of a worker with a job outlives its
//! stream.
//!
//! Not here: the step itself (`trainer`), message formats (`wire`), decisions about a job (`protocol`).

mod agent;
pub mod backend;
pub mod cli;
mod entrance;
mod gate;
pub mod log;
pub mod machine;
mod memory;
pub mod plan;
mod presence;
pub mod report;
mod session;
mod transport;
#[cfg(feature = "cuda")]
mod watch;
mod watched;

/// Variables with which a worker is to be started so that its sums repeat between runs.
pub fn environment() -> Vec<(&'static str, &'static str)> {
    #[cfg(feature = "cuda")]
    return collective::nccl::deterministic_environment().into();
    #[cfg(not(feature = "cuda"))]
    Vec::new()
}
