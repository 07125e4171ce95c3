//! A simulated worker: it follows the protocol to the letter, repeats what it waits for, and checks what it is told.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{
    Activity, Awaits, EvaluationRow, Fence, FromWorker, Generation, Held, Incarnation, JobId,
    Layout, Phases, Rank, RunFacts, Step, StepReport, WIRE_VERSION, Work, WorkerMessage,
    WorkerProfile,
};

use crate::disk::{Disk, Oracle};

/// What keeps it, in order of a generation.
#[derive(Clone, Debug, PartialEq)]
pub enum Doing {
    Joining,
    /// It waits for a generation; a spare has loaded model and data at some time.
    Welcomed {
        loaded: bool,
    },
    /// It left its generation when it was told to.
    Left,
    /// Its collective broke.
    Broken {
        suspect: Option<Rank>,
    },
    Connecting,
    Ready,
    Computing {
        step: u64,
    },
    Prepared {
        report: StepReport,
    },
    Ending,
    Finished,
}

/// What happens to it that nobody tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Well,
    /// Silent until then.
    Paused {
        until_ms: u64,
    },
    /// Beats, but computes no more.
    Stuck,
    Dead,
}

/// What its shell is to do.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one at a time, and gone at once")]
pub enum Effect {
    Say(WorkerMessage),
    /// Take part in the collective of this step (0: connecting, and moving the state); goes on when all ranks do.
    Collective {
        step: u64,
    },
    /// Load model and data as a spare.
    Load,
    /// Write a shard in the background.
    Save {
        step: u64,
        shard: String,
    },
    Exit,
}

/// The shards that it holds of one generation's cut. All shards of a cut together are the state.
#[derive(Clone, Debug)]
pub struct Cut {
    pub generation: u64,
    pub rank: u32,
    pub world: u32,
    pub applied: u64,
    pub gradient: bool,
    /// The state of which these are shards.
    pub state: u64,
    /// Whether it is known to be ahead of where a rewind went back to.
    pub outlived: bool,
}

impl Cut {
    /// Whether it is of the state at `committed`, or has all to make it so.
    pub fn reaches(&self, committed: u64, since: u64) -> bool {
        let behind = self.gradient && self.applied + 1 == committed && self.generation == since;
        self.generation >= since && (self.applied == committed || behind)
    }

    pub fn has_shard(&self, shard: u32) -> bool {
        self.rank == shard || (self.world > 1 && (shard + 1) % self.world == self.rank)
    }
}

pub struct Worker {
    pub incarnation: u64,
    pub health: Health,
    pub fence: Fence,
    pub generation: u64,
    pub rank: u32,
    pub world: u32,
    pub committed: u64,
    pub state: u64,
    pub doing: Doing,
    pub cuts: Vec<Cut>,
    pub base: Option<Layout>,
    /// Why it leaves.
    pub leaving: bool,
    /// Whether it was told to be started again.
    pub restarted: bool,
    /// When the coordinator was last heard.
    pub heard_ms: u64,
    /// The journal's rewinds that it knows of.
    pub rewinds: usize,
    /// Moves on as long as it is well.
    pub progress: u64,
    /// Said until it no longer matters; there is no answer to them.
    pub evaluated: Option<EvaluationRow>,
    /// By step and the generation that asked for it, which may be over.
    pub saved: BTreeMap<(u64, u64), String>,
    pub applied: BTreeSet<u64>,
}

impl Worker {
    pub fn new(incarnation: u64) -> Self {
        Self {
            incarnation,
            health: Health::Well,
            fence: Fence(0),
            generation: 0,
            rank: 0,
            world: 0,
            committed: 0,
            state: 0,
            doing: Doing::Joining,
            cuts: Vec::new(),
            base: None,
            leaving: false,
            restarted: false,
            heard_ms: 0,
            rewinds: 0,
            progress: 0,
            evaluated: None,
            saved: BTreeMap::new(),
            applied: BTreeSet::new(),
        }
    }

    pub fn envelope(&self, message: WorkerMessage) -> FromWorker {
        FromWorker {
            job: JobId("run".into()),
            incarnation: Incarnation(self.incarnation),
            generation: Generation(self.generation),
            message,
        }
    }

    /// A beat, and beside it whatever may have been lost.
    pub fn beat(&mut self, disk: &Disk, oracle: &Oracle) -> Vec<WorkerMessage> {
        let mut said = Vec::new();
        if self.health != Health::Stuck {
            self.progress += 1;
        }
        if self.leaving {
            let reason = "SIGTERM".into();
            said.push(WorkerMessage::Leave { reason });
        }
        let awaits = match &self.doing {
            Doing::Joining => {
                said.push(WorkerMessage::Join(WorkerProfile {
                    build: "build".into(),
                    wire_version: WIRE_VERSION,
                    address: format!("127.0.0.1:{}", self.incarnation),
                    name: format!("worker-{}", self.incarnation),
                    device: "cpu".into(),
                }));
                return said;
            }
            Doing::Welcomed { loaded } => {
                if *loaded {
                    let facts = self.facts(oracle);
                    said.push(WorkerMessage::Loaded { facts });
                }
                Awaits::Form
            }
            Doing::Left => {
                said.push(self.held());
                Awaits::Form
            }
            Doing::Broken { suspect } => {
                said.push(broken(*suspect));
                Awaits::Form
            }
            Doing::Connecting | Doing::Computing { .. } => Awaits::Nothing,
            Doing::Ready => {
                said.push(self.ready(oracle));
                Awaits::Go
            }
            Doing::Prepared { report } => {
                said.push(self.vote(*report));
                Awaits::Commit
            }
            Doing::Ending => Awaits::End,
            Doing::Finished => {
                said.push(WorkerMessage::Finished);
                Awaits::Nothing
            }
        };
        let evaluated = self.evaluated.map(|row| WorkerMessage::Evaluated {
            row,
            samples: vec![],
        });
        said.extend(evaluated);
        // Until the checkpoint is in place: together they would be a third of all that is said.
        self.saved
            .retain(|(step, asked), _| !disk.published.contains(&(*step, *asked)));
        said.extend(self.saved.iter().map(|((step, asked), shard)| {
            let (step, asked) = (Step(*step), Generation(*asked));
            let shard = shard.clone();
            WorkerMessage::Saved { step, asked, shard }
        }));
        said.push(WorkerMessage::Beat {
            committed: Step(self.committed),
            awaits,
            activity: self.activity(),
        });
        said
    }

    fn activity(&self) -> Activity {
        let work = match self.doing {
            Doing::Computing { .. } if self.health == Health::Stuck => Work::Computes,
            Doing::Computing { .. } | Doing::Connecting => Work::Exchanges,
            _ => Work::Waits,
        };
        Activity {
            step: Step(self.committed + 1),
            work,
            progress: self.progress,
        }
    }

    fn facts(&self, oracle: &Oracle) -> RunFacts {
        RunFacts {
            steps_total: oracle.steps_total,
            committed: self.committed,
            eval_pairs: 8,
            model_digest: "m".into(),
            ..RunFacts::default()
        }
    }

    fn ready(&self, oracle: &Oracle) -> WorkerMessage {
        WorkerMessage::Ready {
            facts: self.facts(oracle),
            reference_reused: 0,
            reference_computed: 1,
            workers_min: 0,
        }
    }

    pub fn held(&self) -> WorkerMessage {
        let held = self.cuts.iter().map(|it| Held {
            generation: Generation(it.generation),
            rank: Rank(it.rank),
            world: it.world,
            applied: Step(it.applied),
            gradient: it.gradient,
        });
        WorkerMessage::Held {
            held: held.collect(),
            workers_min: 0,
        }
    }

    /// The same report on all ranks, and this rank's own times.
    fn vote(&self, report: StepReport) -> WorkerMessage {
        let phases = phases(report.step, f64::from(self.rank));
        WorkerMessage::Prepared {
            report,
            gpu: protocol::GpuFigures::default(),
            phases,
        }
    }

    /// All ranks took part in the collective of `step`. The one of step 0 has `moved` the state to every rank that needs it.
    pub fn reduced(
        &mut self,
        generation: u64,
        step: u64,
        moved: Option<u64>,
        oracle: &Oracle,
    ) -> Option<Effect> {
        if generation != self.generation {
            return None;
        }
        match self.doing {
            Doing::Connecting if step == 0 => {
                self.state = moved.unwrap_or(self.state);
                // The old cut stays until all have the new one.
                let cut = Cut {
                    generation,
                    rank: self.rank,
                    world: self.world,
                    applied: self.committed,
                    gradient: false,
                    state: self.state,
                    outlived: false,
                };
                self.cuts.insert(0, cut);
                self.doing = Doing::Ready;
                Some(Effect::Say(self.ready(oracle)))
            }
            Doing::Computing { step: current } if current == step => {
                let report = oracle.report(self.state, step);
                self.cuts[0].gradient = true;
                self.doing = Doing::Prepared { report };
                Some(Effect::Say(self.vote(report)))
            }
            _ => None,
        }
    }

    /// The collective of `step` took too long.
    pub fn gives_up(
        &mut self,
        generation: u64,
        step: u64,
        suspect: Option<Rank>,
    ) -> Option<Effect> {
        let here = match self.doing {
            Doing::Connecting => step == 0,
            Doing::Computing { step: current } => step == current,
            _ => false,
        };
        if generation != self.generation || !here {
            return None;
        }
        self.doing = Doing::Broken { suspect };
        Some(Effect::Say(broken(suspect)))
    }

    /// Model and data are loaded.
    pub fn loaded(&mut self, oracle: &Oracle) -> Option<Effect> {
        let Doing::Welcomed { loaded } = &mut self.doing else {
            return None;
        };
        *loaded = true;
        let facts = self.facts(oracle);
        Some(Effect::Say(WorkerMessage::Loaded { facts }))
    }

    /// Connects again, with what it holds.
    pub fn rejoin(&mut self) {
        self.doing = Doing::Joining;
        self.evaluated = None;
    }

    /// A shard is durable.
    pub fn saved(&mut self, generation: u64, step: u64, shard: String) -> Effect {
        self.saved.insert((step, generation), shard.clone());
        let (step, asked) = (Step(step), Generation(generation));
        Effect::Say(WorkerMessage::Saved { step, asked, shard })
    }
}

fn broken(suspect: Option<Rank>) -> WorkerMessage {
    WorkerMessage::CollectiveFailed {
        suspect,
        reason: "no word from a peer".into(),
    }
}

/// Times of `rank` in a step, no two phases alike. Those of the mean rank are exactly the mean over the ranks.
pub fn phases(step: u64, rank: f64) -> Phases {
    Phases::from_values(std::array::from_fn(|phase| {
        (10 * step + phase as u64) as f64 + rank
    }))
}
