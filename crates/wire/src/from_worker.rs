//! What workers say.

use protocol::{
    Activity, Awaits, Cause, FromWorker, Generation, Held, Incarnation, JobId, Rank, Sample, Step,
    Work, WorkerMessage, WorkerProfile,
};

use crate::error::{address, from_one, name, required, text};
use crate::proto::from_worker::Message;
use crate::report::{gpu_figures, phases};
use crate::{WireError, proto};

impl From<FromWorker> for proto::FromWorker {
    fn from(it: FromWorker) -> Self {
        Self {
            job: it.job.0,
            incarnation: it.incarnation.0,
            generation: it.generation.0,
            message: Some(it.message.into()),
        }
    }
}

impl TryFrom<proto::FromWorker> for FromWorker {
    type Error = WireError;

    fn try_from(it: proto::FromWorker) -> Result<Self, WireError> {
        Ok(Self {
            job: JobId(it.job),
            incarnation: Incarnation(from_one("FromWorker.incarnation", it.incarnation)?),
            generation: Generation(it.generation),
            message: required("FromWorker.message", it.message)?.try_into()?,
        })
    }
}

impl From<WorkerMessage> for Message {
    fn from(it: WorkerMessage) -> Self {
        match it {
            WorkerMessage::Join(it) => Self::Join(proto::Join {
                build: it.build,
                wire_version: it.wire_version,
                address: it.address,
                name: it.name,
                device: it.device,
            }),
            WorkerMessage::Beat {
                committed,
                awaits,
                activity,
            } => Self::Beat(proto::Beat {
                committed: committed.0,
                awaits: proto::Awaits::from(awaits).into(),
                activity: Some(activity.into()),
            }),
            WorkerMessage::Progress { phase, done, total } => {
                Self::Progress(proto::Progress { phase, done, total })
            }
            WorkerMessage::DataReport { text } => Self::DataReport(proto::DataReport { text }),
            WorkerMessage::Ready {
                facts,
                reference_reused,
                reference_computed,
                workers_min,
            } => Self::Ready(proto::Ready {
                facts: Some(facts.into()),
                reference_reused,
                reference_computed,
                workers_min,
            }),
            WorkerMessage::Prepared {
                report,
                phases,
                gpu,
            } => Self::Prepared(proto::Prepared {
                report: Some(report.into()),
                phases: Some(phases.into()),
                gpu: Some(gpu.into()),
            }),
            WorkerMessage::Evaluated { row, samples } => Self::Evaluated(proto::Evaluated {
                row: Some(row.into()),
                samples: samples.into_iter().map(Into::into).collect(),
            }),
            WorkerMessage::Saved { step, asked, shard } => Self::Saved(proto::Saved {
                step: step.0,
                asked: asked.0,
                shard,
            }),
            WorkerMessage::SaveFailed {
                step,
                asked,
                reason,
            } => Self::SaveFailed(proto::SaveFailed {
                step: step.0,
                asked: asked.0,
                reason,
            }),
            WorkerMessage::Finished => Self::Finished(proto::Finished {}),
            WorkerMessage::Failed { cause, reason } => Self::Failed(proto::Failed {
                cause: proto::Cause::from(cause).into(),
                reason,
            }),
            WorkerMessage::Leave { reason } => Self::Leave(proto::Leave { reason }),
            WorkerMessage::Held { held, workers_min } => Self::Held(proto::Held {
                cuts: held.into_iter().map(Into::into).collect(),
                workers_min,
            }),
            WorkerMessage::Loaded { facts } => Self::Loaded(proto::Loaded {
                facts: Some(facts.into()),
            }),
            WorkerMessage::CollectiveFailed { suspect, reason } => {
                Self::CollectiveFailed(proto::CollectiveFailed {
                    suspect: suspect.map(|rank| rank.0),
                    reason,
                })
            }
        }
    }
}

impl TryFrom<Message> for WorkerMessage {
    type Error = WireError;

    fn try_from(it: Message) -> Result<Self, WireError> {
        Ok(match it {
            Message::Join(it) => Self::Join(WorkerProfile {
                build: text("Join.build", it.build)?,
                wire_version: it.wire_version,
                address: address("Join.address", it.address)?,
                name: name("Join.name", it.name)?,
                device: it.device,
            }),
            Message::Beat(it) => Self::Beat {
                committed: Step(it.committed),
                awaits: awaits(it.awaits)?,
                activity: activity(it.activity)?,
            },
            Message::Progress(it) => Self::Progress {
                phase: text("Progress.phase", it.phase)?,
                done: it.done,
                total: it.total,
            },
            Message::DataReport(it) => Self::DataReport {
                text: text("DataReport.text", it.text)?,
            },
            Message::Ready(it) => Self::Ready {
                facts: required("Ready.facts", it.facts)?.try_into()?,
                reference_reused: it.reference_reused,
                reference_computed: it.reference_computed,
                workers_min: it.workers_min,
            },
            Message::Prepared(it) => Self::Prepared {
                report: required("Prepared.report", it.report)?.try_into()?,
                phases: phases(it.phases)?,
                gpu: gpu_figures(it.gpu)?,
            },
            Message::Evaluated(it) => Self::Evaluated {
                row: required("Evaluated.row", it.row)?.try_into()?,
                samples: it.samples.into_iter().map(Sample::from).collect(),
            },
            Message::Saved(it) => Self::Saved {
                step: Step(from_one("Saved.step", it.step)?),
                asked: Generation(it.asked),
                shard: text("Saved.shard", it.shard)?,
            },
            Message::SaveFailed(it) => Self::SaveFailed {
                step: Step(from_one("SaveFailed.step", it.step)?),
                asked: Generation(it.asked),
                reason: it.reason,
            },
            Message::Finished(_) => Self::Finished,
            Message::Failed(it) => Self::Failed {
                cause: cause(it.cause)?,
                reason: it.reason,
            },
            Message::Leave(it) => Self::Leave { reason: it.reason },
            Message::Held(it) => Self::Held {
                workers_min: it.workers_min,
                held: held(it)?,
            },
            Message::Loaded(it) => Self::Loaded {
                facts: required("Loaded.facts", it.facts)?.try_into()?,
            },
            Message::CollectiveFailed(it) => Self::CollectiveFailed {
                suspect: it.suspect.map(Rank),
                reason: it.reason,
            },
        })
    }
}

impl From<Held> for proto::HeldShards {
    fn from(it: Held) -> Self {
        Self {
            generation: it.generation.0,
            rank: it.rank.0,
            world: it.world,
            applied: it.applied.0,
            gradient: it.gradient,
        }
    }
}

fn held(it: proto::Held) -> Result<Vec<Held>, WireError> {
    if it.cuts.len() > 2 {
        return Err(WireError::invalid("Held.cuts", it.cuts.len(), "2 at most"));
    }
    let cut = |it: proto::HeldShards| {
        from_one("HeldShards.generation", it.generation)?;
        if it.rank >= it.world {
            let value = format!("{} of {}", it.rank, it.world);
            return Err(WireError::invalid("HeldShards.rank", value, "below world"));
        }
        Ok(Held {
            generation: Generation(it.generation),
            rank: Rank(it.rank),
            world: it.world,
            applied: Step(it.applied),
            gradient: it.gradient,
        })
    };
    it.cuts.into_iter().map(cut).collect()
}

impl From<Activity> for proto::Activity {
    fn from(it: Activity) -> Self {
        let work = match it.work {
            Work::Untold => proto::Work::Unspecified,
            Work::Computes => proto::Work::Computes,
            Work::Exchanges => proto::Work::Exchanges,
            Work::Waits => proto::Work::Waits,
        };
        Self {
            step: it.step.0,
            work: work.into(),
            progress: it.progress,
        }
    }
}

fn activity(it: Option<proto::Activity>) -> Result<Activity, WireError> {
    let it = it.unwrap_or_default();
    let work = match proto::Work::try_from(it.work) {
        Ok(proto::Work::Unspecified) => Work::Untold,
        Ok(proto::Work::Computes) => Work::Computes,
        Ok(proto::Work::Exchanges) => Work::Exchanges,
        Ok(proto::Work::Waits) => Work::Waits,
        Err(_) => return Err(WireError::invalid("Activity.work", it.work, "0 to 3")),
    };
    Ok(Activity {
        step: Step(it.step),
        work,
        progress: it.progress,
    })
}

impl From<Awaits> for proto::Awaits {
    fn from(it: Awaits) -> Self {
        match it {
            Awaits::Nothing => Self::Nothing,
            Awaits::Form => Self::Form,
            Awaits::Go => Self::Go,
            Awaits::Commit => Self::Commit,
            Awaits::End => Self::End,
        }
    }
}

fn awaits(value: i32) -> Result<Awaits, WireError> {
    match proto::Awaits::try_from(value) {
        Ok(proto::Awaits::Nothing) => Ok(Awaits::Nothing),
        Ok(proto::Awaits::Form) => Ok(Awaits::Form),
        Ok(proto::Awaits::Go) => Ok(Awaits::Go),
        Ok(proto::Awaits::Commit) => Ok(Awaits::Commit),
        Ok(proto::Awaits::End) => Ok(Awaits::End),
        Ok(proto::Awaits::Unspecified) | Err(_) => {
            Err(WireError::invalid("Beat.awaits", value, "1 to 5"))
        }
    }
}

impl From<Cause> for proto::Cause {
    fn from(it: Cause) -> Self {
        match it {
            Cause::Config => Self::Config,
            Cause::Temporary => Self::Temporary,
            Cause::Fatal => Self::Fatal,
        }
    }
}

fn cause(value: i32) -> Result<Cause, WireError> {
    match proto::Cause::try_from(value) {
        Ok(proto::Cause::Config) => Ok(Cause::Config),
        Ok(proto::Cause::Temporary) => Ok(Cause::Temporary),
        Ok(proto::Cause::Fatal) => Ok(Cause::Fatal),
        Ok(proto::Cause::Unspecified) | Err(_) => {
            Err(WireError::invalid("Failed.cause", value, "1 to 3"))
        }
    }
}
