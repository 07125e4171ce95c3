//! What a job will need, before anything is trained: `trainer::plan` for a job's resolved sections.

use model::Device;
use toml::Table;
use trainer::plan::Draft;

use crate::backend::{self, Backend, BackendError};
use crate::report::ReportError;

pub use trainer::plan::{
    Amount, Change, Cure, Knobs, Moment, Parts, Probe, ProbeRequest, Program, ReferenceAmount,
    WorkerMemory, Workload,
};

/// A job that is read and not begun.
pub struct Job {
    draft: Draft,
    device: Device,
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
        let device = backend::device(backend)?;
        let spec = spec::resolve(sections).map_err(ReportError::from)?.spec;
        let draft = Draft::load(&spec, threads).map_err(ReportError::from)?;
        Ok(Self { draft, device })
    }

    /// Whether it computes on the CPU, whose memory is what [`Workload::memory`] knows.
    pub fn is_on_cpu(&self) -> bool {
        self.device == Device::flex()
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
    pub fn probe(&self, request: &ProbeRequest) -> Result<Probe, PlanError> {
        let probe = self.draft.probe(request, &self.device);
        Ok(probe.map_err(ReportError::from)?)
    }
}
