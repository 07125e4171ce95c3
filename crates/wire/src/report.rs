//! Reports, phases and facts. Floats of a report keep their bits, NaN's included: votes are compared by bits.

use protocol::{
    EvaluationRow, GpuFigures, MetricsRow, Phases, RunFacts, Sample, Statistics, StepReport,
};

use crate::error::{figure, from_one, required, seconds, text};
use crate::{WireError, proto};

impl From<Statistics> for proto::Statistics {
    fn from(it: Statistics) -> Self {
        Self {
            loss: Some(it.loss),
            loss_pairwise: Some(it.loss_pairwise),
            loss_calibration: Some(it.loss_calibration),
            rewards_chosen: Some(it.rewards_chosen),
            rewards_rejected: Some(it.rewards_rejected),
            rewards_margins: Some(it.rewards_margins),
            rewards_accuracies: Some(it.rewards_accuracies),
            log_ratios_chosen: Some(it.log_ratios_chosen),
            log_ratios_rejected: Some(it.log_ratios_rejected),
            logps_chosen: Some(it.logps_chosen),
            logps_rejected: Some(it.logps_rejected),
        }
    }
}

impl TryFrom<proto::Statistics> for Statistics {
    type Error = WireError;

    fn try_from(it: proto::Statistics) -> Result<Self, WireError> {
        Ok(Self {
            loss: required("Statistics.loss", it.loss)?,
            loss_pairwise: required("Statistics.loss_pairwise", it.loss_pairwise)?,
            loss_calibration: required("Statistics.loss_calibration", it.loss_calibration)?,
            rewards_chosen: required("Statistics.rewards_chosen", it.rewards_chosen)?,
            rewards_rejected: required("Statistics.rewards_rejected", it.rewards_rejected)?,
            rewards_margins: required("Statistics.rewards_margins", it.rewards_margins)?,
            rewards_accuracies: required("Statistics.rewards_accuracies", it.rewards_accuracies)?,
            log_ratios_chosen: required("Statistics.log_ratios_chosen", it.log_ratios_chosen)?,
            log_ratios_rejected: required(
                "Statistics.log_ratios_rejected",
                it.log_ratios_rejected,
            )?,
            logps_chosen: required("Statistics.logps_chosen", it.logps_chosen)?,
            logps_rejected: required("Statistics.logps_rejected", it.logps_rejected)?,
        })
    }
}

impl From<StepReport> for proto::StepReport {
    fn from(it: StepReport) -> Self {
        Self {
            step: it.step,
            epoch: it.epoch,
            finite: it.finite,
            statistics: Some(it.statistics.into()),
            grad_norm: Some(it.grad_norm),
            learning_rate: Some(it.learning_rate),
            tokens: it.tokens,
            pairs: it.pairs,
        }
    }
}

impl TryFrom<proto::StepReport> for StepReport {
    type Error = WireError;

    fn try_from(it: proto::StepReport) -> Result<Self, WireError> {
        Ok(Self {
            step: from_one("StepReport.step", it.step)?,
            epoch: it.epoch,
            finite: it.finite,
            statistics: required("StepReport.statistics", it.statistics)?.try_into()?,
            grad_norm: required("StepReport.grad_norm", it.grad_norm)?,
            learning_rate: required("StepReport.learning_rate", it.learning_rate)?,
            tokens: it.tokens,
            pairs: it.pairs,
        })
    }
}

impl From<MetricsRow> for proto::MetricsRow {
    fn from(it: MetricsRow) -> Self {
        Self {
            report: Some(it.report.into()),
            tokens_per_second: it.tokens_per_second,
            world_size: it.world_size,
            generation: it.generation,
            seconds: it.seconds,
            phases: Some(it.phases.into()),
            gpu: Some(it.gpu.into()),
        }
    }
}

impl TryFrom<proto::MetricsRow> for MetricsRow {
    type Error = WireError;

    fn try_from(it: proto::MetricsRow) -> Result<Self, WireError> {
        Ok(Self {
            report: required("MetricsRow.report", it.report)?.try_into()?,
            tokens_per_second: it.tokens_per_second,
            world_size: it.world_size,
            generation: it.generation,
            seconds: it.seconds,
            phases: phases(it.phases)?,
            gpu: gpu_figures(it.gpu)?,
        })
    }
}

impl From<Phases> for proto::Phases {
    fn from(it: Phases) -> Self {
        Self {
            data: it.data,
            forward: it.forward,
            head: it.head,
            backward: it.backward,
            reduce: it.reduce,
            update: it.update,
            evaluate: it.evaluate,
            checkpoint: it.checkpoint,
            wait: it.wait,
        }
    }
}

impl TryFrom<proto::Phases> for Phases {
    type Error = WireError;

    fn try_from(it: proto::Phases) -> Result<Self, WireError> {
        Ok(Self {
            data: seconds("Phases.data", it.data)?,
            forward: seconds("Phases.forward", it.forward)?,
            head: seconds("Phases.head", it.head)?,
            backward: seconds("Phases.backward", it.backward)?,
            reduce: seconds("Phases.reduce", it.reduce)?,
            update: seconds("Phases.update", it.update)?,
            evaluate: seconds("Phases.evaluate", it.evaluate)?,
            checkpoint: seconds("Phases.checkpoint", it.checkpoint)?,
            wait: seconds("Phases.wait", it.wait)?,
        })
    }
}

/// Who does not tell sends none.
pub(crate) fn phases(sent: Option<proto::Phases>) -> Result<Phases, WireError> {
    sent.map_or(Ok(Phases::default()), Phases::try_from)
}

impl From<GpuFigures> for proto::GpuFigures {
    fn from(it: GpuFigures) -> Self {
        Self {
            mfu: it.mfu,
            memory_gib: it.memory_gib,
            utilization: it.utilization,
            temperature_celsius: it.temperature_celsius,
            power_watts: it.power_watts,
            sm_clock_mhz: it.sm_clock_mhz,
        }
    }
}

impl TryFrom<proto::GpuFigures> for GpuFigures {
    type Error = WireError;

    fn try_from(it: proto::GpuFigures) -> Result<Self, WireError> {
        let figure = |field, value: Option<f64>| value.map(|it| figure(field, it)).transpose();
        Ok(Self {
            mfu: figure("GpuFigures.mfu", it.mfu)?,
            memory_gib: figure("GpuFigures.memory_gib", it.memory_gib)?,
            utilization: figure("GpuFigures.utilization", it.utilization)?,
            temperature_celsius: figure("GpuFigures.temperature_celsius", it.temperature_celsius)?,
            power_watts: figure("GpuFigures.power_watts", it.power_watts)?,
            sm_clock_mhz: figure("GpuFigures.sm_clock_mhz", it.sm_clock_mhz)?,
        })
    }
}

/// Who has no GPU sends none.
pub(crate) fn gpu_figures(sent: Option<proto::GpuFigures>) -> Result<GpuFigures, WireError> {
    sent.map_or(Ok(GpuFigures::default()), GpuFigures::try_from)
}

impl From<EvaluationRow> for proto::EvaluationRow {
    fn from(it: EvaluationRow) -> Self {
        Self {
            step: it.step,
            pairs: it.pairs,
            statistics: Some(it.statistics.into()),
        }
    }
}

impl TryFrom<proto::EvaluationRow> for EvaluationRow {
    type Error = WireError;

    fn try_from(it: proto::EvaluationRow) -> Result<Self, WireError> {
        Ok(Self {
            step: it.step,
            pairs: it.pairs,
            statistics: required("EvaluationRow.statistics", it.statistics)?.try_into()?,
        })
    }
}

impl From<Sample> for proto::Sample {
    fn from(it: Sample) -> Self {
        Self {
            prompt: it.prompt,
            text: it.text,
        }
    }
}

impl From<proto::Sample> for Sample {
    fn from(it: proto::Sample) -> Self {
        Self {
            prompt: it.prompt,
            text: it.text,
        }
    }
}

impl From<RunFacts> for proto::RunFacts {
    fn from(it: RunFacts) -> Self {
        Self {
            steps_total: it.steps_total,
            pairs: it.pairs,
            eval_pairs: it.eval_pairs,
            parameters: it.parameters,
            model_digest: it.model_digest,
            tokenizer_digest: it.tokenizer_digest,
            data_digest: it.data_digest,
            committed: it.committed,
        }
    }
}

impl TryFrom<proto::RunFacts> for RunFacts {
    type Error = WireError;

    fn try_from(it: proto::RunFacts) -> Result<Self, WireError> {
        Ok(Self {
            steps_total: it.steps_total,
            pairs: it.pairs,
            eval_pairs: it.eval_pairs,
            parameters: it.parameters,
            model_digest: text("RunFacts.model_digest", it.model_digest)?,
            tokenizer_digest: text("RunFacts.tokenizer_digest", it.tokenizer_digest)?,
            data_digest: text("RunFacts.data_digest", it.data_digest)?,
            committed: it.committed,
        })
    }
}
