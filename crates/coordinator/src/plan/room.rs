//! Whether this machine has room for the workers of a local run, asked before any of them is started: a number of processes that
//! would fill it, or only stand in each other's way, ends the program and not the machine. Neither pairs nor weights are read, so
//! that what is counted is a lower bound: what passes may still not fit, which the plan and every worker say before they allocate.

use worker::machine::MachineMemory;
use worker::plan::{Program, before_pairs};

use super::{COORDINATOR_BYTES, sharding};
use crate::config::{Backend, Config};
use crate::numbers::{bytes, grouped};

/// Workers share cores well up to a few a core. With so many each computes a thirtieth of the time, and those that train small
/// models for a test still meet their deadlines.
const WORKERS_PER_CORE_MAX: usize = 32;

/// More workers than this machine has room for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// They would wait for cores and not compute.
    #[error(
        "cluster.workers is {}: this machine has {cores} core{}, which more than {} workers would only wait for; set \
         cluster.workers to at most {}, or serve workers of more machines with coordinator --cluster",
        grouped(*workers as u64),
        if *cores == 1 { "" } else { "s" },
        grouped(*most as u64),
        grouped(*most as u64)
    )]
    Cores {
        /// Those asked for.
        workers: usize,
        /// Of this machine.
        cores: usize,
        /// As many as may be asked for.
        most: usize,
    },
    /// They would not fit.
    #[error(
        "cluster.workers is {}: they take at least {} together, before any pair is read, and this machine has {}; {}",
        grouped(*workers as u64),
        bytes(*needed_bytes),
        bytes(*limit_bytes),
        cure(*most)
    )]
    Memory {
        /// Those asked for.
        workers: usize,
        /// The least that they and the coordinator take.
        needed_bytes: u64,
        /// Of this machine, or of its control group.
        limit_bytes: u64,
        /// As many as have that room; 0 where there is none for one.
        most: usize,
    },
}

/// Holds the workers of `config` against `cores` and `machine`.
///
/// # Errors
/// There are certainly too many.
pub fn check_room(
    config: &Config,
    machine: Option<&MachineMemory>,
    cores: usize,
) -> Result<(), NoRoom> {
    check_cores(config, cores)?;
    let Some(machine) = machine else {
        return Ok(());
    };
    let workers = config.cluster.workers as usize;
    let limit_bytes = machine.limit_bytes;
    let needed = least_bytes(config, cores);
    let needed_bytes = needed(workers);
    if needed_bytes <= limit_bytes {
        return Ok(());
    }
    let mut fewer = (1..workers).rev();
    let most = fewer.find(|&workers| needed(workers) <= limit_bytes);
    Err(NoRoom::Memory {
        workers,
        needed_bytes,
        limit_bytes,
        most: most.unwrap_or(0),
    })
}

/// Holds the workers of `config` against `cores` alone; whoever knows their pairs knows more of their memory.
///
/// # Errors
/// They would wait for cores and not compute.
pub fn check_cores(config: &Config, cores: usize) -> Result<(), NoRoom> {
    let workers = config.cluster.workers as usize;
    let most = cores.saturating_mul(WORKERS_PER_CORE_MAX);
    if workers > most {
        return Err(NoRoom::Cores {
            workers,
            cores,
            most,
        });
    }
    Ok(())
}

/// The least that so many workers and the coordinator take of this machine's memory.
fn least_bytes(config: &Config, cores: usize) -> impl Fn(usize) -> u64 {
    let program = Program::here();
    // Of workers with GPUs nothing is here for certain but their program; and a model that cannot be looked at is the workers' to
    // refuse, with its place.
    let on_cpu = config.cluster.backend == Backend::Cpu || !cfg!(feature = "cuda");
    let workload = on_cpu.then(|| before_pairs(&config.training).ok());
    let workload = workload.flatten();
    let threads = config.cluster.threads_per_worker(cores);
    let sharding = sharding(config);
    move |workers| {
        let worker = workload.as_ref().map_or(program.resident, |workload| {
            let knobs = workload.knobs(workers, threads, sharding);
            workload.memory(&knobs, program, false).peak_bytes
        });
        worker * workers as u64 + COORDINATOR_BYTES
    }
}

fn cure(most: usize) -> String {
    match most {
        0 => "not even one fits: take a larger machine, or a smaller model; coordinator plan says what takes how much".into(),
        most => format!(
            "set cluster.workers to at most {}; coordinator plan says what takes how much",
            grouped(most as u64)
        ),
    }
}
