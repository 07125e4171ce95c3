//! Settings with which a job that is too large for a machine would fit: one change where one is enough, else the mildest
//! together.

use std::fmt;

use serde::Serialize;
use serde_json::Value;

use super::memory::size;
use super::{Knobs, Lengths, Program, Workload};

/// Changes that make a job fit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cure {
    /// All of them are needed.
    pub changes: Vec<Change>,
    /// What all workers then need at most, together; on a GPU each of them.
    pub bytes: u64,
    /// Pairs that lose tokens by it.
    pub truncated_pairs: usize,
}

/// One key and its value.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// Dotted path.
    pub key: &'static str,
    /// What to set it to.
    pub value: Value,
}

/// As arguments of a command line, with what they cost.
impl fmt::Display for Cure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Change { key, value } in &self.changes {
            write!(f, "--set {key}={value} ")?;
        }
        write!(f, "({}", size(self.bytes))?;
        match self.truncated_pairs {
            0 => write!(f, ")"),
            1 => write!(f, ", which cuts or drops 1 pair)"),
            pairs => write!(f, ", which cuts or drops {pairs} pairs)"),
        }
    }
}

/// Micro-batches and lengths are offered in multiples of this.
const TOKENS_STEP: usize = 32;

/// What a candidate is measured by.
struct Search<'a> {
    workload: &'a Workload,
    knobs: Knobs,
    program: Program,
    saves: bool,
    limit: u64,
}

impl Workload {
    /// Changes to `knobs` with which all workers together need at most `limit` bytes, or on a GPU each of them; empty where nothing
    /// helps. Arguments as for [`Workload::memory`].
    pub fn cures(&self, knobs: &Knobs, program: Program, saves: bool, limit: u64) -> Vec<Cure> {
        let search = Search {
            workload: self,
            knobs: *knobs,
            program,
            saves,
            limit,
        };
        let alone = [
            search.checkpointing(*knobs),
            search.micro_batch(*knobs),
            search.gradients(*knobs),
            search.offload(*knobs),
            search.mirror(*knobs),
            search.workers(*knobs),
            search.max_length(*knobs),
        ];
        let alone: Vec<Cure> = alone
            .into_iter()
            .flatten()
            .filter_map(|knobs| search.cure(knobs))
            .collect();
        if alone.is_empty() {
            search.together().into_iter().collect()
        } else {
            alone
        }
    }

    /// The least that one worker can make do with: one pair at a time, no larger than a few tokens.
    pub fn least_bytes(&self, knobs: &Knobs, program: Program, saves: bool) -> u64 {
        let least = Knobs {
            workers: if knobs.gpu { knobs.workers } else { 1 },
            micro_batch_tokens: 1,
            gradient_checkpointing: true,
            ..*knobs
        };
        self.memory(&least, program, saves).peak_bytes
    }
}

impl Search<'_> {
    fn bytes(&self, knobs: &Knobs) -> u64 {
        let memory = self.workload.memory(knobs, self.program, self.saves);
        // Workers share a machine's memory, but each has a GPU of its own.
        let sharing = if knobs.gpu { 1 } else { knobs.workers };
        memory.peak_bytes * sharing as u64
    }

    fn fits(&self, knobs: &Knobs) -> bool {
        self.bytes(knobs) <= self.limit
    }

    fn checkpointing(&self, knobs: Knobs) -> Option<Knobs> {
        let knobs = Knobs {
            gradient_checkpointing: true,
            ..knobs
        };
        self.fits(&knobs).then_some(knobs)
    }

    /// The largest smaller micro-batch that fits.
    fn micro_batch(&self, knobs: Knobs) -> Option<Knobs> {
        let with = |tokens| Knobs {
            micro_batch_tokens: tokens,
            ..knobs
        };
        let tokens = Self::most(knobs.micro_batch_tokens, |tokens| self.fits(&with(tokens)))?;
        Some(with(tokens))
    }

    /// With gradients in shards, which costs traffic.
    fn gradients(&self, knobs: Knobs) -> Option<Knobs> {
        let sharded = Knobs {
            shard_gradients: true,
            ..knobs
        };
        (sharded.shards_gradients() && sharded != knobs && self.fits(&sharded)).then_some(sharded)
    }

    /// With masters and moments beside the GPU, which costs time.
    fn offload(&self, knobs: Knobs) -> Option<Knobs> {
        let offloaded = Knobs {
            offload: true,
            ..knobs
        };
        let helps = self.workload.offloads(&offloaded) && offloaded != knobs;
        (helps && self.fits(&offloaded)).then_some(offloaded)
    }

    /// Without mirrors, which costs the promise that no step is lost with a worker.
    fn mirror(&self, knobs: Knobs) -> Option<Knobs> {
        let without = Knobs {
            mirror: false,
            ..knobs
        };
        (without != knobs && self.fits(&without)).then_some(without)
    }

    fn workers(&self, knobs: Knobs) -> Option<Knobs> {
        if knobs.gpu {
            return None;
        }
        let with = |workers| Knobs { workers, ..knobs };
        (1..knobs.workers)
            .rev()
            .map(with)
            .find(|knobs| self.fits(knobs))
    }

    /// The longest smaller length that fits.
    fn max_length(&self, knobs: Knobs) -> Option<Knobs> {
        let with = |max_length| Knobs {
            max_length,
            ..knobs
        };
        let longest = self.workload.train.iter().map(Lengths::longest).max()?;
        let length = Self::most(longest.min(knobs.max_length), |length| {
            self.fits(&with(length))
        })?;
        Some(with(length))
    }

    /// The largest multiple of [`TOKENS_STEP`] below `from` that `fits`, which is taken to fit below it too.
    fn most(from: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
        let (mut fitting, mut large) = (0, from.div_ceil(TOKENS_STEP));
        while large - fitting > 1 {
            let middle = fitting + (large - fitting) / 2;
            if fits(middle * TOKENS_STEP) {
                fitting = middle;
            } else {
                large = middle;
            }
        }
        (fitting > 0).then_some(fitting * TOKENS_STEP)
    }

    /// One change after another, the mildest first, until it fits.
    fn together(&self) -> Option<Cure> {
        let checkpointing = Knobs {
            gradient_checkpointing: true,
            ..self.knobs
        };
        let fewest = if self.knobs.gpu {
            self.knobs.workers
        } else {
            1
        };
        let candidates = (fewest..=self.knobs.workers).rev().map(|workers| Knobs {
            workers,
            ..checkpointing
        });
        for knobs in candidates {
            let found = self
                .checkpointing(knobs)
                .or_else(|| self.micro_batch(knobs));
            if let Some(found) = found {
                return self.cure(found);
            }
        }
        let smallest = Knobs {
            workers: fewest,
            micro_batch_tokens: TOKENS_STEP,
            ..checkpointing
        };
        self.cure(self.max_length(smallest)?)
    }

    /// `None` for settings that leave no pair.
    fn cure(&self, knobs: Knobs) -> Option<Cure> {
        let before = &self.knobs;
        let mut changes = Vec::new();
        let mut change = |key, differs: bool, value: Value| {
            if differs {
                changes.push(Change { key, value });
            }
        };
        change(
            "model.gradient_checkpointing",
            knobs.gradient_checkpointing != before.gradient_checkpointing,
            knobs.gradient_checkpointing.into(),
        );
        change(
            "train.micro_batch_tokens",
            knobs.micro_batch_tokens != before.micro_batch_tokens,
            knobs.micro_batch_tokens.into(),
        );
        change(
            "cluster.zero",
            knobs.shard_gradients != before.shard_gradients,
            2.into(),
        );
        change(
            "cluster.offload",
            knobs.offload != before.offload,
            knobs.offload.into(),
        );
        change(
            "cluster.mirror",
            knobs.mirror != before.mirror,
            knobs.mirror.into(),
        );
        change(
            "cluster.workers",
            knobs.workers != before.workers,
            knobs.workers.into(),
        );
        change(
            "data.max_length",
            knobs.max_length != before.max_length,
            knobs.max_length.into(),
        );
        let train = &self.workload.train;
        let longer = train
            .iter()
            .filter(|pair| pair.longest() > knobs.max_length);
        let kept = train
            .iter()
            .any(|pair| pair.cut(knobs.max_length).is_some());
        kept.then(|| Cure {
            bytes: self.bytes(&knobs),
            truncated_pairs: if knobs.max_length == before.max_length {
                0
            } else {
                longer.count()
            },
            changes,
        })
    }
}
