//! What one training run is: the sections of a job that training reads, with their defaults, ranges and identity.
//!
//! A crate of its own, so that every coordinator can check a job before a worker sees it, the one of the cluster image
//! included, which holds no ML stack. Values only: nothing here opens a file. Where a run is executed (workers, addresses,
//! cadence of checkpoints) is the coordinator's to say.

mod adapter;
mod metric;
mod optimizer;
mod resolve;
mod schedule;
mod sections;

pub use adapter::{AdapterSection, AdapterTargets, AllLinear};
pub use metric::Metric;
/// What `[objective]` is, for crates that are told of it and compute nothing.
pub use objective::{Divergence, ObjectiveConfig, Sides, Targets};
pub use optimizer::{OptimizerKind, OptimizerSection};
pub use resolve::{JobError, Resolved, SECTIONS, parse, resolve};
pub use schedule::{Schedule, ScheduleKind, ScheduleSection};
pub use sections::{
    Dtype, EvaluateSection, ModelSection, ReferenceSection, Spec, SpecError, TrainSection,
};
