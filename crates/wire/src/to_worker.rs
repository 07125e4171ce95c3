//! What the coordinator says.

use std::fmt;
use std::sync::Arc;

use protocol::{
    Afterwards, CoordinatorMessage, Copies, Fence, Generation, Incarnation, JobId, Layout, Rank,
    Step, Terms, ToWorker,
};

use crate::error::{address, from_one, required, text};
use crate::proto::to_worker::Message;
use crate::{WireError, proto};

impl From<ToWorker> for proto::ToWorker {
    fn from(it: ToWorker) -> Self {
        Self {
            incarnation: it.incarnation.0,
            fence: it.fence.0,
            generation: it.generation.0,
            message: Some(it.message.into()),
        }
    }
}

impl TryFrom<proto::ToWorker> for ToWorker {
    type Error = WireError;

    fn try_from(it: proto::ToWorker) -> Result<Self, WireError> {
        Ok(Self {
            incarnation: Incarnation(from_one("ToWorker.incarnation", it.incarnation)?),
            fence: Fence(it.fence),
            generation: Generation(it.generation),
            message: required("ToWorker.message", it.message)?.try_into()?,
        })
    }
}

impl From<CoordinatorMessage> for Message {
    fn from(it: CoordinatorMessage) -> Self {
        match it {
            CoordinatorMessage::Welcome {
                config_toml,
                checkpoint_dir,
                probe,
                spare,
                job,
                terms,
            } => Self::Welcome(proto::Welcome {
                config_toml,
                checkpoint_dir,
                probe,
                spare,
                job: job.0,
                terms: Some(proto::Terms {
                    mirror: terms.mirror,
                    shard_gradients: terms.shard_gradients,
                    offload: terms.offload,
                    collective_timeout_ms: terms.collective_timeout_ms,
                    silence_ms: terms.silence_ms,
                }),
            }),
            CoordinatorMessage::Form {
                rank,
                addresses,
                secret,
                committed,
                resume,
                apply,
                base,
            } => Self::Form(proto::Form {
                rank: rank.0,
                addresses: addresses.to_vec(),
                secret: secret.to_vec(),
                committed: committed.0,
                resume,
                apply,
                base: base.as_deref().map(Into::into),
            }),
            CoordinatorMessage::Go {
                step,
                evaluate,
                save,
                last,
            } => Self::Go(proto::Go {
                step: step.0,
                evaluate,
                save,
                last,
            }),
            CoordinatorMessage::Commit {
                step,
                apply,
                save,
                evaluate,
                last,
            } => Self::Commit(proto::Commit {
                step: step.0,
                apply,
                save,
                evaluate,
                last,
            }),
            CoordinatorMessage::Finish => Self::Finish(proto::Finish {}),
            CoordinatorMessage::Stop { reason, afterwards } => Self::Stop(proto::Stop {
                reason,
                afterwards: proto::Afterwards::from(afterwards).into(),
            }),
            CoordinatorMessage::Stale { committed } => Self::Stale(proto::Stale {
                committed: committed.0,
            }),
            CoordinatorMessage::Abort { reason } => Self::Abort(proto::Abort { reason }),
            CoordinatorMessage::Heard { committed } => Self::Heard(proto::Heard {
                committed: committed.0,
            }),
        }
    }
}

impl TryFrom<Message> for CoordinatorMessage {
    type Error = WireError;

    fn try_from(it: Message) -> Result<Self, WireError> {
        Ok(match it {
            Message::Welcome(it) => Self::Welcome {
                config_toml: it.config_toml,
                checkpoint_dir: text("Welcome.checkpoint_dir", it.checkpoint_dir)?,
                probe: it.probe,
                spare: it.spare,
                job: JobId(it.job),
                terms: terms(required("Welcome.terms", it.terms)?)?,
            },
            Message::Form(it) => form(it)?,
            Message::Go(it) => Self::Go {
                step: Step(from_one("Go.step", it.step)?),
                evaluate: it.evaluate,
                save: it.save,
                last: it.last,
            },
            Message::Commit(it) => Self::Commit {
                step: Step(from_one("Commit.step", it.step)?),
                apply: it.apply,
                save: it.save,
                evaluate: it.evaluate,
                last: it.last,
            },
            Message::Finish(_) => Self::Finish,
            Message::Stop(it) => Self::Stop {
                afterwards: afterwards(it.afterwards)?,
                reason: it.reason,
            },
            Message::Stale(it) => Self::Stale {
                committed: Step(it.committed),
            },
            Message::Abort(it) => Self::Abort { reason: it.reason },
            Message::Heard(it) => Self::Heard {
                committed: Step(it.committed),
            },
        })
    }
}

fn terms(it: proto::Terms) -> Result<Terms, WireError> {
    Ok(Terms {
        mirror: it.mirror,
        shard_gradients: it.shard_gradients,
        offload: it.offload,
        collective_timeout_ms: from_one("Terms.collective_timeout_ms", it.collective_timeout_ms)?,
        silence_ms: from_one("Terms.silence_ms", it.silence_ms)?,
    })
}

impl From<&Layout> for proto::Layout {
    fn from(it: &Layout) -> Self {
        let copies = |it: &Copies| proto::Copies {
            owner: it.owner.map(|rank| rank.0),
            mirror: it.mirror.map(|rank| rank.0),
        };
        Self {
            generation: it.generation.0,
            shards: it.shards.iter().map(copies).collect(),
        }
    }
}

/// Every shard is held by a member of the new generation, which has `world`.
fn layout(it: proto::Layout, world: usize) -> Result<Layout, WireError> {
    if it.shards.is_empty() {
        return Err(WireError::Missing {
            field: "Layout.shards",
        });
    }
    let copies = |it: proto::Copies| {
        let holders = [it.owner, it.mirror];
        if let Some(rank) = holders
            .into_iter()
            .flatten()
            .find(|it| *it as usize >= world)
        {
            let value = format!("rank {rank} of {world}");
            return Err(WireError::invalid(
                "Copies",
                value,
                "ranks of the generation",
            ));
        }
        let copies = Copies {
            owner: it.owner.map(Rank),
            mirror: it.mirror.map(Rank),
        };
        required("Copies.owner", copies.source())?;
        Ok(copies)
    };
    Ok(Layout {
        generation: Generation(from_one("Layout.generation", it.generation)?),
        shards: it
            .shards
            .into_iter()
            .map(copies)
            .collect::<Result<_, _>>()?,
    })
}

impl From<Afterwards> for proto::Afterwards {
    fn from(it: Afterwards) -> Self {
        match it {
            Afterwards::Rejoin => Self::Unspecified,
            Afterwards::Return => Self::Return,
            Afterwards::Restart => Self::Restart,
            Afterwards::Leave => Self::Leave,
            Afterwards::Refused => Self::Refused,
        }
    }
}

fn afterwards(value: i32) -> Result<Afterwards, WireError> {
    match proto::Afterwards::try_from(value) {
        Ok(proto::Afterwards::Unspecified) => Ok(Afterwards::Rejoin),
        Ok(proto::Afterwards::Return) => Ok(Afterwards::Return),
        Ok(proto::Afterwards::Restart) => Ok(Afterwards::Restart),
        Ok(proto::Afterwards::Leave) => Ok(Afterwards::Leave),
        Ok(proto::Afterwards::Refused) => Ok(Afterwards::Refused),
        Err(_) => Err(WireError::invalid("Stop.afterwards", value, "0 to 4")),
    }
}

fn form(it: proto::Form) -> Result<CoordinatorMessage, WireError> {
    let world = it.addresses.len();
    if it.rank as usize >= world {
        let value = format!("{} of {world} addresses", it.rank);
        return Err(WireError::invalid(
            "Form.rank",
            value,
            "a place among the addresses",
        ));
    }
    let addresses = it
        .addresses
        .into_iter()
        .map(|it| address("Form.addresses", it));
    // The secret's bytes stay out of the error.
    let secret = <[u8; 32]>::try_from(it.secret.as_slice()).map_err(|_| {
        WireError::invalid(
            "Form.secret",
            format!("{} bytes", it.secret.len()),
            "32 bytes",
        )
    })?;
    if it.committed > 0 && it.resume.is_none() && it.base.is_none() {
        return Err(WireError::Missing {
            field: "Form.resume",
        });
    }
    Ok(CoordinatorMessage::Form {
        rank: Rank(it.rank),
        addresses: addresses.collect::<Result<_, _>>()?,
        secret,
        committed: Step(it.committed),
        resume: it.resume.map(|it| text("Form.resume", it)).transpose()?,
        apply: it.apply,
        base: it
            .base
            .map(|it| layout(it, world).map(Arc::new))
            .transpose()?,
    })
}

/// Without the secret (invariant S1).
impl fmt::Debug for proto::Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Form")
            .field("rank", &self.rank)
            .field("addresses", &self.addresses)
            .field("committed", &self.committed)
            .field("resume", &self.resume)
            .field("apply", &self.apply)
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}
