//! What a job will need, before anything is trained: `trainer::plan` for a job's resolved sections.

use model::Device;
use toml::Table;
use trainer::plan::Draft;

use crate::backend::{self, Backend, BackendError};
use crate::report::ReportError;

pub use trainer::Sharding;
pub use trainer::plan::{
    Amount, CONTEXT_BYTES, Change, Cure, HostMemory, Knobs, Moment, Parts, Probe, ProbeRequest,
    Program, ReferenceAmount, WorkerMemory, Workload,
};

/// A job that is read and not begun.
pub struct Job {
    draft: Draft,
    /// `None`: GPUs that are not here.
    device: Option<Device>,
}

/// What a job's memory depends on as far as it is known without its pairs and weights.
///
/// # Errors
/// A model whose config.json cannot be read.
pub fn before_pairs(sections: &Table) -> Result<Workload, PlanError> {
    let spec = spec::resolve(sections).map_err(ReportError::from)?.spec;
    let workload = Workload::before_pairs(&spec);
    Ok(workload.map_err(ReportError::from)?)
}

/// Why nothing can be said about a job.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Its sections, tokenizer or pairs cannot be used.
    #[error(transparent)]
    Job(#[from] ReportError),
    /// Its backend cannot be had.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl Job {
    /// Reads tokenizer and pairs of a job as its training does on `threads` threads. `backend` as on a worker's command line.
    ///
    /// # Errors
    /// What its training would refuse about them, with its place.
    pub fn load(sections: &Table, backend: &str, threads: usize) -> Result<Self, PlanError> {
        let backend = match backend {
            "cpu" => Backend::Cpu,
            "cuda" => Backend::Cuda,
            _ => Backend::Auto,
        };
        Self::read(sections, Some(backend::device(backend, 0)?), threads)
    }

    /// As [`Job::load`], for GPUs that are not here: nothing of it can be run.
    ///
    /// # Errors
    /// As [`Job::load`].
    pub fn load_for_gpu(sections: &Table, threads: usize) -> Result<Self, PlanError> {
        Self::read(sections, None, threads)
    }

    fn read(sections: &Table, device: Option<Device>, threads: usize) -> Result<Self, PlanError> {
        let spec = spec::resolve(sections).map_err(ReportError::from)?.spec;
        let draft = Draft::load(&spec, threads).map_err(ReportError::from)?;
        Ok(Self { draft, device })
    }

    /// Whether it computes on the CPU, whose memory all workers share.
    pub fn is_on_cpu(&self) -> bool {
        self.device == Some(Device::flex())
    }

    /// Bytes of the GPU here that can be taken, and all of them.
    pub fn gpu_bytes(&self) -> Option<[u64; 2]> {
        self.device.as_ref()?.available_and_total()
    }

    /// What it computes.
    pub fn amount(&self) -> Amount {
        self.draft.amount()
    }

    /// What its memory depends on.
    pub fn workload(&self) -> &Workload {
        self.draft.workload()
    }

    /// What a worker has before its model.
    pub fn program(&self) -> Program {
        self.draft.program()
    }

    /// Runs its first steps with all its workers in this process.
    ///
    /// # Errors
    /// Weights that cannot be read.
    ///
    /// # Panics
    /// If it was loaded for GPUs that are not here.
    pub fn probe(&self, request: &ProbeRequest) -> Result<Probe, PlanError> {
        let device = self.device.as_ref().expect("a device that is here");
        let probe = self.draft.probe(request, device);
        Ok(probe.map_err(ReportError::from)?)
    }
}
