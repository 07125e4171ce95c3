//! `coordinator plan`: what a job will need of this machine, said before it begins. Memory and speed are the worker's to tell
//! (`worker::plan`); here they meet the machine, its disks and the job's cadence.
//!
//! ```text
//! worker::plan ─► memory of each worker ─┐
//! machine or GPU ─► limit                ├─► fits, or what would
//! storage::space ─► free disk            ┘
//! worker's probe ─► seconds by token ─► time of the run
//! ```

mod disk;
mod room;
mod text;
mod time;

use serde::Serialize;
use worker::machine::MachineMemory;
use worker::plan::{
    Amount, CONTEXT_BYTES, Cure, HostMemory, Job, PlanError, ProbeRequest, Program, Sharding,
    WorkerMemory,
};

use crate::config::Config;

pub use disk::{Disk, DiskItem};
pub use room::{NoRoom, check_cores, check_room};
pub use time::Time;

/// What the coordinator's own process takes beside its workers.
const COORDINATOR_BYTES: u64 = 40 << 20;

/// What CUDA's libraries take of this machine's memory in every worker with a GPU; an assumption.
const CUDA_BYTES: u64 = 512 << 20;

/// A job's needs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The run's name.
    pub name: String,
    /// What is computed.
    pub run: Amount,
    /// Whether evaluations may end it before its last step.
    pub may_stop_early: bool,
    /// Memory of this machine; `None` where workers do not compute on the CPU.
    pub memory: Option<Memory>,
    /// Memory of each worker's GPU; `None` where they compute on the CPU, or on no GPU with fused forms.
    pub gpu: Option<GpuMemory>,
    /// Time; `None` without a probe.
    pub time: Option<Time>,
    /// Why there was no probe although one was asked for.
    pub no_probe_because: Option<String>,
    /// Disk space by file system.
    pub disk: Vec<Disk>,
    /// Whether memory and disk suffice.
    pub fits: bool,
}

/// Memory of a job on one machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// Workers on this machine.
    pub workers: usize,
    /// Compute threads of each.
    pub threads: usize,
    /// What each of them needs.
    pub worker: WorkerMemory,
    /// What the coordinator needs.
    pub coordinator_bytes: u64,
    /// All of them together.
    pub total_bytes: u64,
    /// The machine; `None` where the system does not tell.
    pub machine: Option<MachineMemory>,
    /// Whether the machine is large enough; true where it does not tell its size.
    pub fits: bool,
    /// Whether as much is free now.
    pub is_free: bool,
    /// What would make it fit, if it does not.
    pub cures: Vec<Cure>,
    /// The least that one worker needs under any settings, if it does not fit.
    pub least_bytes: Option<u64>,
}

/// Memory of a job on GPUs, one a worker.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GpuMemory {
    /// Workers, each with a GPU of its own.
    pub workers: usize,
    /// What each of them needs there.
    pub worker: WorkerMemory,
    /// Bytes of a GPU.
    pub total_bytes: u64,
    /// As many of them as nobody uses now; of a GPU that is not here, what the driver is taken to leave.
    pub available_bytes: u64,
    /// Whether it is the GPU of this machine.
    pub is_here: bool,
    /// Whether it is large enough, if nothing is lost to gaps.
    pub fits: bool,
    /// What the workers take of their machine's memory.
    pub host: BesideGpus,
    /// What would make it fit, if it does not.
    pub cures: Vec<Cure>,
    /// The least that a worker needs under any settings, if it does not fit.
    pub least_bytes: Option<u64>,
}

/// Memory of the machine that workers with GPUs take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BesideGpus {
    /// What each of them takes beside its program.
    pub worker: HostMemory,
    /// The most that each of them has at once, with its program, tokenizer and pairs.
    pub worker_bytes: u64,
    /// All of them on one machine, with the coordinator.
    pub total_bytes: u64,
    /// Whether this machine is large enough; true where it does not tell its size, and of GPUs that are not here.
    pub fits: bool,
}

/// Makes the plan of `config` for a machine with this memory, or for GPUs of `card_bytes` each that are not here; with `probe`, the
/// job's first steps are run.
///
/// # Errors
/// What training would refuse about tokenizer, pairs and model.
pub fn plan(
    config: &Config,
    machine: Option<MachineMemory>,
    card_bytes: Option<u64>,
    probe: bool,
) -> Result<Plan, PlanError> {
    let start = std::time::Instant::now();
    let (workers, threads) = workers(config);
    let job = match card_bytes {
        Some(_) => Job::load_for_gpu(&config.training, threads)?,
        None => Job::load(&config.training, config.cluster.backend.as_str(), threads)?,
    };
    let read_seconds = start.elapsed().as_secs_f64();
    let run = job.amount();
    let cadence = Cadence::of(config, run.steps);
    let saves = cadence.saves_on_the_way();
    let limit = machine.as_ref().map(|machine| machine.limit_bytes);
    let gpu = gpu_memory(config, &job, limit, card_bytes, saves);
    let memory = job
        .is_on_cpu()
        .then(|| memory(config, &job, machine, saves));
    let fits = memory.as_ref().is_none_or(|it| it.fits)
        && gpu.as_ref().is_none_or(|it| it.fits && it.host.fits);

    let no_probe_because = match (&memory, &gpu) {
        _ if !probe => None,
        (_, Some(gpu)) if !gpu.is_here => Some("the GPU is not here".to_owned()),
        (_, Some(gpu)) if !gpu.fits => Some("it does not fit".to_owned()),
        (Some(memory), _) if !memory.fits => Some("it does not fit".to_owned()),
        (Some(memory), _) if !memory.is_free => Some("too little memory is free now".to_owned()),
        _ => None,
    };
    let time = if probe && no_probe_because.is_none() {
        let probe = job.probe(&ProbeRequest {
            workers,
            threads,
            checkpoints: config.checkpoint.path.clone(),
        })?;
        Some(Time::new(&run, &cadence, read_seconds, probe))
    } else {
        None
    };
    let missing = time.as_ref().map(|time| time.probe.reference.values);
    let references = missing.unwrap_or(run.reference.values);
    let disk = disk::disks(config, &run, &cadence, references);
    let fits = fits && disk.iter().all(|it| it.fits);
    Ok(Plan {
        name: config.job.name.clone(),
        may_stop_early: config
            .selection()
            .is_some_and(|selection| selection.patience.is_some()),
        run,
        memory,
        gpu,
        time,
        no_probe_because,
        disk,
        fits,
    })
}

/// How often a run stops to do something else.
struct Cadence {
    /// Evaluations, the first and the last included.
    evaluations: u64,
    /// Checkpoints, the last one included.
    saves: u64,
    /// Those of them that `checkpoint.keep_every_steps` keeps, the last one not counted.
    kept_by_step: u64,
}

impl Cadence {
    /// The last step is evaluated and saved in any case, and `checkpoint.keep_best` saves what is evaluated.
    fn of(config: &Config, steps: u64) -> Self {
        let policy = config.policy();
        let before = steps.saturating_sub(1);
        let among = |every: Option<u64>| every.map_or(0, |every| before / every);
        let (evaluated, mut saved) = (among(policy.evaluate_every), among(policy.save_every));
        let keep_every = config.checkpoint.keep_every_steps;
        let among_kept = |every: Option<u64>| match every.filter(|_| keep_every > 0) {
            Some(every) => among(least_common_multiple(every, keep_every)),
            None => 0,
        };
        let mut kept = among_kept(policy.save_every);
        if config.checkpoint.keep_best {
            let both = policy.evaluate_every.zip(policy.save_every);
            let both = both.and_then(|(one, other)| least_common_multiple(one, other));
            saved += evaluated - among(both);
            kept += among_kept(policy.evaluate_every) - among_kept(both);
        }
        Self {
            evaluations: 2 + evaluated,
            saves: 1 + saved,
            kept_by_step: kept,
        }
    }

    fn saves_on_the_way(&self) -> bool {
        self.saves > 1
    }
}

/// `None` beyond all steps.
fn least_common_multiple(one: u64, other: u64) -> Option<u64> {
    let (mut a, mut b) = (one, other);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    (one / a).checked_mul(other)
}

/// How workers share out what training keeps.
fn sharding(config: &Config) -> Sharding {
    let cluster = &config.cluster;
    Sharding {
        mirror: cluster.mirror,
        gradients: cluster.zero > 1,
        offload: cluster.offload,
    }
}

/// Workers of this machine and the threads of each.
fn workers(config: &Config) -> (usize, usize) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = config.cluster.workers as usize;
    (workers, config.cluster.threads_per_worker(cores))
}

fn memory(config: &Config, job: &Job, machine: Option<MachineMemory>, saves: bool) -> Memory {
    let (workers, threads) = workers(config);
    let workload = job.workload();
    let knobs = workload.knobs(workers, threads, sharding(config));
    let worker = workload.memory(&knobs, job.program(), saves);
    let total_bytes = worker.peak_bytes * workers as u64 + COORDINATOR_BYTES;
    let within = |bytes: fn(&MachineMemory) -> u64| {
        machine
            .as_ref()
            .is_none_or(|machine| total_bytes <= bytes(machine))
    };
    let fits = within(|machine| machine.limit_bytes);
    let limit = machine
        .as_ref()
        .map_or(u64::MAX, |machine| machine.limit_bytes);
    let limit = limit.saturating_sub(COORDINATOR_BYTES);
    let cures = || workload.cures(&knobs, job.program(), saves, limit);
    Memory {
        workers,
        threads,
        worker,
        coordinator_bytes: COORDINATOR_BYTES,
        total_bytes,
        fits,
        is_free: within(|machine| machine.available_bytes),
        cures: if fits { Vec::new() } else { cures() },
        least_bytes: (!fits).then(|| workload.least_bytes(&knobs, job.program(), saves)),
        machine,
    }
}

/// `card_bytes` of GPUs that are not here; without, the GPU of this machine, which has `limit` bytes of its own, if the job computes
/// on one.
fn gpu_memory(
    config: &Config,
    job: &Job,
    limit: Option<u64>,
    card_bytes: Option<u64>,
    saves: bool,
) -> Option<GpuMemory> {
    let [available_bytes, total_bytes] = match card_bytes {
        Some(total) => [total.saturating_sub(CONTEXT_BYTES), total],
        None => job.gpu_bytes()?,
    };
    let (workers, _) = workers(config);
    let workload = job.workload();
    let knobs = workload.gpu_knobs(workers, sharding(config));
    let worker = workload.memory(&knobs, Program::NONE, false);
    let fits = worker.certain_bytes() <= available_bytes;
    let cures = || workload.cures(&knobs, Program::NONE, false, available_bytes);
    let is_here = card_bytes.is_none();
    let beside = workload.host_memory(&knobs, saves);
    let worker_bytes = job.program().peak + CUDA_BYTES + beside.peak_bytes();
    let all_bytes = worker_bytes * workers as u64 + COORDINATOR_BYTES;
    Some(GpuMemory {
        workers,
        fits,
        cures: if fits { Vec::new() } else { cures() },
        least_bytes: (!fits).then(|| workload.least_bytes(&knobs, Program::NONE, false)),
        worker,
        host: BesideGpus {
            worker: beside,
            worker_bytes,
            total_bytes: all_bytes,
            fits: limit.is_none_or(|limit| !is_here || all_bytes <= limit),
        },
        total_bytes,
        available_bytes,
        is_here,
    })
}
