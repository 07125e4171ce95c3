//! A simulated worker: it follows the protocol to the letter, repeats what it waits for, and checks what it is told.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{
    Awaits, CoordinatorMessage, EvaluationRow, FromWorker, Generation, Incarnation, JobId, Phases,
    RunFacts, Step, StepReport, ToWorker, WIRE_VERSION, WorkerMessage, WorkerProfile,
};

use crate::disk::{Disk, Oracle};

/// What keeps it, in order of a generation.
#[derive(Clone, Debug, PartialEq)]
enum Doing {
    Joining,
    Welcomed,
    Connecting,
    Ready,
    Computing { step: u64 },
    Prepared { report: StepReport },
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
pub enum Effect {
    Say(WorkerMessage),
    /// Take part in the collective of this step (0: connecting); goes on when all ranks do.
    Collective {
        step: u64,
    },
    /// Write a shard in the background.
    Save {
        step: u64,
        shard: String,
    },
    Exit,
}

pub struct Worker {
    pub incarnation: u64,
    /// The coordinator's life that spawned it.
    pub life: u64,
    pub health: Health,
    pub generation: u64,
    pub rank: u32,
    pub world: u32,
    committed: u64,
    state: u64,
    doing: Doing,
    /// Said until it no longer matters; there is no answer to them.
    evaluated: Option<EvaluationRow>,
    saved: BTreeMap<u64, String>,
    applied: BTreeSet<u64>,
}

impl Worker {
    pub fn new(incarnation: u64, life: u64) -> Self {
        Self {
            incarnation,
            life,
            health: Health::Well,
            generation: 0,
            rank: 0,
            world: 0,
            committed: 0,
            state: 0,
            doing: Doing::Joining,
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
    pub fn beat(&self, oracle: &Oracle) -> Vec<WorkerMessage> {
        let mut said = Vec::new();
        let awaits = match &self.doing {
            Doing::Joining => {
                return vec![WorkerMessage::Join(WorkerProfile {
                    build: "build".into(),
                    wire_version: WIRE_VERSION,
                    address: format!("127.0.0.1:{}", self.incarnation),
                    name: format!("worker-{}", self.incarnation),
                    device: "cpu".into(),
                })];
            }
            Doing::Welcomed => Awaits::Form,
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
        let saved = self.saved.clone();
        said.extend(saved.into_iter().map(|(step, shard)| WorkerMessage::Saved {
            step: Step(step),
            shard,
        }));
        said.push(WorkerMessage::Beat {
            committed: Step(self.committed),
            awaits,
        });
        said
    }

    fn ready(&self, oracle: &Oracle) -> WorkerMessage {
        let facts = RunFacts {
            steps_total: oracle.steps_total,
            committed: self.committed,
            eval_pairs: 8,
            model_digest: "m".into(),
            ..RunFacts::default()
        };
        WorkerMessage::Ready {
            facts,
            reference_reused: 0,
            reference_computed: 1,
        }
    }

    /// The same report on all ranks, and this rank's own times.
    fn vote(&self, report: StepReport) -> WorkerMessage {
        let phases = phases(report.step, f64::from(self.rank));
        WorkerMessage::Prepared { report, phases }
    }

    /// All ranks took part in the collective of `step`.
    pub fn reduced(&mut self, generation: u64, step: u64, oracle: &Oracle) -> Option<Effect> {
        if generation != self.generation {
            return None;
        }
        match self.doing {
            Doing::Connecting if step == 0 => {
                self.doing = Doing::Ready;
                Some(Effect::Say(self.ready(oracle)))
            }
            Doing::Computing { step: current } if current == step => {
                let report = oracle.report(self.state, step);
                self.doing = Doing::Prepared { report };
                Some(Effect::Say(self.vote(report)))
            }
            _ => None,
        }
    }

    /// A shard is durable.
    pub fn saved(&mut self, generation: u64, step: u64, shard: String) -> Option<Effect> {
        if generation != self.generation {
            return None;
        }
        self.saved.insert(step, shard.clone());
        Some(Effect::Say(WorkerMessage::Saved {
            step: Step(step),
            shard,
        }))
    }

    pub fn told(&mut self, to: ToWorker, disk: &Disk, oracle: &Oracle) -> Vec<Effect> {
        let generation = to.generation.0;
        if generation < self.generation {
            return vec![]; // of a coordinator that is no more
        }
        match to.message {
            CoordinatorMessage::Stop { .. } => return vec![Effect::Exit],
            CoordinatorMessage::Stale { .. } => {
                let overtaken = self.generation != 0 && generation > self.generation;
                return if overtaken {
                    vec![Effect::Exit]
                } else {
                    vec![]
                };
            }
            CoordinatorMessage::Welcome { .. } => {
                if self.doing == Doing::Joining {
                    self.doing = Doing::Welcomed;
                }
                return vec![];
            }
            CoordinatorMessage::Form {
                rank,
                addresses,
                committed,
                resume,
                ..
            } => {
                if self.doing != Doing::Welcomed {
                    return vec![]; // again, or before the Welcome it overtook
                }
                assert!(
                    disk.generation().0 >= generation,
                    "M2: a Form before its journal record"
                );
                self.generation = generation;
                self.rank = rank.0;
                self.world = addresses.len() as u32;
                self.committed = committed.0;
                assert_eq!(resume.is_some(), committed.0 > 0);
                self.state = match resume {
                    Some(step) => disk.checkpoints[&step.parse::<u64>().expect("a step")],
                    None => oracle.initial_state(),
                };
                assert_eq!(
                    self.state,
                    oracle.state_after(self.committed),
                    "a wrong checkpoint"
                );
                self.doing = Doing::Connecting;
                return vec![Effect::Collective { step: 0 }];
            }
            _ => {}
        }
        if generation != self.generation {
            return vec![];
        }
        match to.message {
            CoordinatorMessage::Go { step, evaluate } if self.doing == Doing::Ready => {
                assert_eq!(step.0, self.committed + 1);
                if evaluate {
                    self.evaluate(oracle);
                }
                self.doing = Doing::Computing { step: step.0 };
                vec![Effect::Collective { step: step.0 }]
            }
            CoordinatorMessage::Commit {
                step,
                apply,
                save,
                evaluate,
                last,
            } => {
                if step.0 <= self.committed {
                    return vec![];
                }
                self.commit(step.0, apply, (save, evaluate, last), (disk, oracle))
            }
            CoordinatorMessage::Finish if matches!(self.doing, Doing::Ending | Doing::Ready) => {
                self.doing = Doing::Finished;
                vec![Effect::Say(WorkerMessage::Finished)]
            }
            _ => vec![],
        }
    }

    fn commit(
        &mut self,
        step: u64,
        apply: bool,
        (save, evaluate, last): (bool, bool, bool),
        (disk, oracle): (&Disk, &Oracle),
    ) -> Vec<Effect> {
        let prepared = matches!(&self.doing, Doing::Prepared { report } if report.step == step);
        assert!(
            prepared,
            "M4: a Commit of step {step}, which this worker did not vote for"
        );
        assert!(
            disk.has_commit(self.generation, step, apply),
            "M2: a Commit of step {step} before its journal record"
        );
        assert!(self.applied.insert(step), "M3: step {step} applied twice");
        self.state = Oracle::next_state(self.state, step, apply);
        self.committed = step;
        let mut effects = Vec::new();
        if save {
            let (rank, state) = (self.rank, self.state);
            let shard = format!("step {step} rank {rank} state {state:x}");
            effects.push(Effect::Save { step, shard });
        }
        if evaluate {
            self.evaluate(oracle);
        }
        if last {
            self.doing = Doing::Ending;
        } else {
            self.doing = Doing::Computing { step: step + 1 };
            effects.push(Effect::Collective { step: step + 1 });
        }
        effects
    }

    fn evaluate(&mut self, oracle: &Oracle) {
        if self.rank == 0 {
            self.evaluated = Some(oracle.evaluation(self.committed));
        }
    }
}

/// Times of `rank` in a step, no two phases alike. Those of the mean rank are exactly the mean over the ranks.
pub fn phases(step: u64, rank: f64) -> Phases {
    Phases::from_values(std::array::from_fn(|phase| {
        (10 * step + phase as u64) as f64 + rank
    }))
}
