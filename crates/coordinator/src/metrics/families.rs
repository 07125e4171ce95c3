//! The metrics by name: what each says, and where its value is. A scrape walks these tables.

use std::{collections::BTreeMap, fmt::Error};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet},
    metrics::MetricType,
};
use protocol::{GpuFigures, Statistics};

use super::{Jobs, State};

type Gauge = (&'static str, &'static str, fn(&State) -> Option<f64>);
type Statistic = (&'static str, &'static str, fn(&Statistics) -> f64);
type Figure = (&'static str, &'static str, fn(&GpuFigures) -> Option<f64>);
type Counter = (&'static str, &'static str, fn(&State) -> u64);

/// Of the job and its last committed step; a job without one has none of the latter.
const GAUGES: [Gauge; 15] = [
    (
        "job_running",
        "1 while the job runs, 0 when it has ended",
        |job| Some(f64::from(u8::from(job.ended.is_none()))),
    ),
    (
        "steps_planned",
        "Steps of the whole run, 0 until it is known",
        |job| Some(job.steps_planned as f64),
    ),
    ("step", "Last committed step", |job| {
        Some(job.row.map_or(0.0, |row| row.report.step as f64))
    }),
    ("epoch", "Epoch of the last committed step, from 0", |job| {
        Some(job.row?.report.epoch as f64)
    }),
    (
        "generation",
        "Generation that committed the last step",
        |job| Some(job.row?.generation as f64),
    ),
    ("world_size", "Workers that computed the last step", |job| {
        Some(f64::from(job.row?.world_size))
    }),
    (
        "last_commit_timestamp_seconds",
        "When this process committed its last step, seconds since 1970",
        |job| job.committed_at,
    ),
    (
        "last_step_duration_seconds",
        "Time of the last step",
        |job| Some(job.row?.seconds),
    ),
    (
        "tokens_per_second",
        "Tokens a second in the last step, unpadded",
        |job| Some(job.row?.tokens_per_second),
    ),
    (
        "pairs_per_second",
        "Pairs a second in the last step",
        |job| {
            let row = job.row?;
            (row.seconds > 0.0).then(|| row.report.pairs as f64 / row.seconds)
        },
    ),
    ("grad_norm", "Gradient norm before clipping", |job| {
        Some(job.row?.report.grad_norm)
    }),
    ("learning_rate", "Learning rate of the last step", |job| {
        Some(job.row?.report.learning_rate)
    }),
    (
        "checkpoint_step",
        "Step of the newest checkpoint that this process made",
        |job| Some(job.checkpoint? as f64),
    ),
    (
        "eval_step",
        "Step whose weights were last evaluated",
        |job| Some(job.evaluation?.step as f64),
    ),
    (
        "eval_pairs",
        "Held-out pairs of the last evaluation",
        |job| Some(job.evaluation?.pairs as f64),
    ),
];

/// Loss and rewards of a batch; for held-out pairs with `eval_` before the name.
const STATISTICS: [Statistic; 11] = [
    ("loss", "Mean loss", |it| it.loss),
    ("loss_pairwise", "Pairwise term of the loss", |it| {
        it.loss_pairwise
    }),
    ("loss_calibration", "Calibration term of the loss", |it| {
        it.loss_calibration
    }),
    (
        "rewards_chosen",
        "Mean reward of chosen completions, scaled by beta",
        |it| it.rewards_chosen,
    ),
    (
        "rewards_rejected",
        "Mean reward of rejected completions, scaled by beta",
        |it| it.rewards_rejected,
    ),
    (
        "rewards_margins",
        "Mean of chosen minus rejected rewards",
        |it| it.rewards_margins,
    ),
    (
        "rewards_accuracies",
        "Share of pairs whose chosen reward is the higher one",
        |it| it.rewards_accuracies,
    ),
    (
        "log_ratios_chosen",
        "Mean log-ratio of chosen completions in nats",
        |it| it.log_ratios_chosen,
    ),
    (
        "log_ratios_rejected",
        "Mean log-ratio of rejected completions in nats",
        |it| it.log_ratios_rejected,
    ),
    (
        "logps_chosen",
        "Mean log-probability of chosen completions in nats",
        |it| it.logps_chosen,
    ),
    (
        "logps_rejected",
        "Mean log-probability of rejected completions in nats",
        |it| it.logps_rejected,
    ),
];

/// `_total` is added to the names.
const COUNTERS: [Counter; 9] = [
    ("steps", "Committed steps, skipped ones included", |job| {
        job.counts.steps
    }),
    (
        "steps_skipped",
        "Committed steps whose gradient was not finite",
        |job| job.counts.skipped,
    ),
    ("pairs", "Pairs trained on", |job| job.counts.pairs),
    (
        "tokens",
        "Tokens trained on, unpadded, the prompt counted for both completions",
        |job| job.counts.tokens,
    ),
    ("evaluations", "Evaluations of held-out pairs", |job| {
        job.counts.evaluations
    }),
    ("checkpoints", "Checkpoints that became visible", |job| {
        job.counts.checkpoints
    }),
    (
        "checkpoint_failures",
        "Checkpoints that could not be written",
        |job| job.counts.checkpoint_failures,
    ),
    ("workers_lost", "Workers that were lost", |job| {
        job.counts.workers_lost
    }),
    ("rewinds", "Rewinds to a checkpoint", |job| {
        job.counts.rewinds
    }),
];

impl Collector for Jobs {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), Error> {
        let jobs = self.lock();
        for (name, help, value) in GAUGES {
            gauge(&mut encoder, &jobs, (name, help), value)?;
        }
        for (name, help, value) in STATISTICS {
            let of = |job: &State| Some(value(&job.row?.report.statistics));
            gauge(&mut encoder, &jobs, (name, help), of)?;
        }
        for (name, help, value) in STATISTICS {
            let of = |job: &State| Some(value(&job.evaluation?.statistics));
            let (name, help) = (
                format!("eval_{name}"),
                format!("{help}, over the held-out pairs"),
            );
            gauge(&mut encoder, &jobs, (&name, &help), of)?;
        }
        phases(&mut encoder, &jobs)?;
        for (name, help, value) in GPU {
            let of = |job: &State| value(&job.row?.gpu);
            // A service without GPUs has no families of them.
            if jobs.values().any(|job| of(job).is_some()) {
                gauge(&mut encoder, &jobs, (name, help), of)?;
            }
        }
        for (name, help, value) in COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (job, state) in &*jobs {
                let labels = [("job", job.as_str())];
                let mut series = family.encode_family(&labels)?;
                series.encode_counter::<NoLabelSet, _, u64>(&value(state), None)?;
            }
        }
        let (name, help) = ("step_duration_seconds", "Time of a step");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (job, state) in &*jobs {
            let labels = [("job", job.as_str())];
            state.step_seconds.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Of the last committed step, a series a phase.
fn phases(encoder: &mut DescriptorEncoder, jobs: &BTreeMap<String, State>) -> Result<(), Error> {
    let (name, help) = (
        "step_phase_seconds",
        "Time of the last step by phase, the mean over the ranks",
    );
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (job, state) in jobs {
        let row = state.row.iter();
        for (phase, value) in row.flat_map(|row| row.phases.values()) {
            let labels = [("job", job.as_str()), ("phase", phase)];
            family.encode_family(&labels)?.encode_gauge(&value)?;
        }
    }
    Ok(())
}

/// Of the last committed step, where there are GPUs. Units are Prometheus' base units.
const GPU: [Figure; 6] = [
    (
        "gpu_mfu",
        "Model FLOPs utilization, the mean over the ranks",
        |it| it.mfu,
    ),
    (
        "gpu_memory_bytes",
        "Memory that is taken, the most of any rank",
        |it| it.memory_gib.map(|gib| gib * f64::from(1 << 30)),
    ),
    (
        "gpu_utilization",
        "Share of the time in which a kernel ran, the mean over the ranks",
        |it| it.utilization,
    ),
    (
        "gpu_temperature_celsius",
        "The hottest chip of any rank",
        |it| it.temperature_celsius,
    ),
    (
        "gpu_power_watts",
        "Power draw of a board, the mean over the ranks",
        |it| it.power_watts,
    ),
    (
        "gpu_sm_clock_hertz",
        "The slowest multiprocessor clock of any rank",
        |it| it.sm_clock_mhz.map(|mhz| mhz * 1e6),
    ),
];

fn gauge(
    encoder: &mut DescriptorEncoder,
    jobs: &BTreeMap<String, State>,
    (name, help): (&str, &str),
    value: impl Fn(&State) -> Option<f64>,
) -> Result<(), Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (job, state) in jobs {
        if let Some(value) = value(state) {
            let labels = [("job", job.as_str())];
            family.encode_family(&labels)?.encode_gauge(&value)?;
        }
    }
    Ok(())
}
