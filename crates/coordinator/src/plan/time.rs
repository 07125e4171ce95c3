//! From a probe's seconds by token to the time of a run.

use serde::Serialize;
use worker::plan::{Amount, Probe};

use super::Cadence;

/// Seconds of a run by part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Time {
    /// Reading pairs (measured here) and weights.
    pub load_seconds: f64,
    /// Scoring the completions that the store does not have with the reference.
    pub reference_seconds: f64,
    /// One step of mean size.
    pub step_seconds: f64,
    /// All steps.
    pub steps_seconds: f64,
    /// Evaluations, the first and the last included.
    pub evaluations: u64,
    /// One of them.
    pub evaluation_seconds: f64,
    /// Continuations of all evaluations that have them.
    pub samples_seconds: f64,
    /// Checkpoints, the last one included.
    pub checkpoints: u64,
    /// Writing and verifying one of them; `None` where no disk could be timed. All but the last are made while training
    /// goes on.
    pub checkpoint_seconds: Option<f64>,
    /// Writing the export.
    pub export_seconds: Option<f64>,
    /// All of it.
    pub total_seconds: f64,
    /// What was measured.
    pub probe: Probe,
}

impl Time {
    pub(super) fn new(run: &Amount, cadence: &Cadence, read_seconds: f64, probe: Probe) -> Self {
        let steps = run.steps as f64;
        let steps_seconds =
            probe.seconds_per_token * run.packed_tokens as f64 + probe.seconds_per_step * steps;
        let scoring = |tokens: u64| probe.forward_seconds_per_token * tokens as f64;
        let evaluations = if run.held_out_pairs > 0 {
            cadence.evaluations
        } else {
            0
        };
        let evaluation_seconds = scoring(run.held_out_packed_tokens);
        let samples_seconds = evaluations as f64
            * run.sample_tokens as f64
            * probe.seconds_per_sample_token.unwrap_or(0.0);
        let bytes = 12.0 * run.trained_parameters as f64;
        let disk = |bytes: f64| {
            let write = bytes / probe.write_bytes_per_second?;
            Some(write + bytes / probe.verify_bytes_per_second?)
        };
        let (checkpoint_seconds, export_seconds) = (disk(bytes), disk(4.0 * run.parameters as f64));
        let load_seconds = read_seconds + probe.load_seconds;
        let reference_seconds = scoring(probe.reference.packed_tokens);
        let total_seconds = load_seconds
            + reference_seconds
            + steps_seconds
            + evaluations as f64 * evaluation_seconds
            + samples_seconds
            + checkpoint_seconds.unwrap_or(0.0)
            + export_seconds.unwrap_or(0.0);
        Self {
            load_seconds,
            reference_seconds,
            step_seconds: steps_seconds / steps.max(1.0),
            steps_seconds,
            evaluations,
            evaluation_seconds,
            samples_seconds,
            checkpoints: cadence.saves,
            checkpoint_seconds,
            export_seconds,
            total_seconds,
            probe,
        }
    }
}
