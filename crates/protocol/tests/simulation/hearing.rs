//! What a simulated worker does with what it is told, and what must be true of that.

use std::sync::Arc;

use protocol::{Afterwards, CoordinatorMessage, Copies, Layout, Rank, ToWorker, WorkerMessage};

use crate::disk::{Disk, Oracle};
use crate::worker::{Doing, Effect, Health, Worker};

impl Worker {
    pub fn told(&mut self, to: ToWorker, disk: &Disk, oracle: &Oracle) -> Vec<Effect> {
        let generation = to.generation.0;
        if generation < self.generation {
            return vec![]; // of a coordinator that is no more
        }
        match to.message {
            CoordinatorMessage::Stop { afterwards, .. } => {
                assert_ne!(afterwards, Afterwards::Refused, "a worker like any other");
                // The session of one whose training thread is stuck is well, and returns.
                let stays = match afterwards {
                    Afterwards::Return => true,
                    Afterwards::Rejoin => self.health != Health::Stuck,
                    Afterwards::Leave | Afterwards::Restart | Afterwards::Refused => false,
                };
                self.restarted |= afterwards == Afterwards::Restart;
                if self.leaving || !stays {
                    return vec![Effect::Exit];
                }
                self.rejoin();
                return vec![];
            }
            // Its training thread hears nothing any more.
            _ if self.health == Health::Stuck => return vec![],
            CoordinatorMessage::Stale { .. } => {
                let overtaken = self.generation != 0 && generation > self.generation;
                if overtaken || matches!(self.doing, Doing::Welcomed { .. }) {
                    self.rejoin();
                }
                return vec![];
            }
            CoordinatorMessage::Welcome { spare, .. } => return self.welcomed(spare),
            CoordinatorMessage::Form { .. } => return self.form(to, disk, oracle),
            CoordinatorMessage::Abort { .. } => {
                // Whatever it has not heard of this generation it will not take part in.
                self.generation = generation;
                match self.doing {
                    Doing::Joining => return vec![],
                    Doing::Welcomed { .. } => {}
                    _ => {
                        self.rejoin();
                        self.doing = Doing::Left;
                    }
                }
                return vec![Effect::Say(self.held())];
            }
            CoordinatorMessage::Heard { committed } => {
                // It may be late, and never early.
                assert!(
                    committed.0 <= disk.highest_commit(),
                    "M2: {committed} was never journaled"
                );
                return vec![];
            }
            _ => {}
        }
        if generation != self.generation {
            return vec![];
        }
        match to.message {
            CoordinatorMessage::Go {
                step,
                evaluate,
                save,
                last,
            } if self.doing == Doing::Ready => {
                assert_eq!(step.0, self.committed + 1);
                self.cuts.retain(|it| it.generation == generation);
                self.go_on(step.0, (save, evaluate, last), oracle)
            }
            CoordinatorMessage::Commit {
                step,
                apply,
                save,
                evaluate,
                last,
            } => {
                // Who has left the generation hears of its last commit with the next Form.
                let left = matches!(
                    self.doing,
                    Doing::Left | Doing::Joining | Doing::Welcomed { .. } | Doing::Broken { .. }
                );
                if step.0 <= self.committed || left {
                    return vec![];
                }
                self.commit(step.0, apply, disk);
                self.go_on(step.0 + 1, (save, evaluate, last), oracle)
            }
            CoordinatorMessage::Finish if matches!(self.doing, Doing::Ending | Doing::Ready) => {
                self.doing = Doing::Finished;
                vec![Effect::Say(WorkerMessage::Finished)]
            }
            _ => vec![],
        }
    }

    fn welcomed(&mut self, spare: bool) -> Vec<Effect> {
        let was_joining = self.doing == Doing::Joining;
        if !was_joining && !matches!(self.doing, Doing::Welcomed { .. }) {
            return vec![];
        }
        if was_joining {
            self.doing = Doing::Welcomed { loaded: false };
        }
        let mut effects = vec![Effect::Say(self.held())];
        if spare && self.doing == (Doing::Welcomed { loaded: false }) {
            effects.push(Effect::Load);
        }
        effects
    }

    fn form(&mut self, to: ToWorker, disk: &Disk, oracle: &Oracle) -> Vec<Effect> {
        let CoordinatorMessage::Form {
            rank,
            addresses,
            committed,
            resume,
            apply,
            base,
            ..
        } = to.message
        else {
            unreachable!("a Form");
        };
        let generation = to.generation.0;
        if generation <= self.generation || self.doing == Doing::Joining {
            return vec![]; // again, or before the Welcome it overtook
        }
        assert!(
            disk.generation().0 >= generation,
            "M2: a Form before its journal record"
        );
        let resumed = resume
            .as_ref()
            .map(|step| step.parse::<u64>().expect("a step"));
        if let Some(step) = resumed.filter(|it| !disk.checkpoints.contains_key(it)) {
            // Others went on without it meanwhile.
            assert!(
                disk.generation().0 > generation,
                "the checkpoint of step {step} is gone"
            );
            return vec![];
        }
        if base
            .as_ref()
            .is_some_and(|base| !self.can_give(base, rank, committed.0))
        {
            // The coordinator believed an old message.
            self.generation = generation;
            self.rejoin();
            self.doing = Doing::Left;
            return vec![Effect::Say(self.held())];
        }
        // A late Form knows of no later ones.
        let rewinds = disk.rewinds_before(generation);
        let counting = self.cuts.iter().filter(|it| !it.outlived);
        let known = counting.map(|it| it.applied).max();
        assert!(
            known.is_none_or(|known| known <= committed.0) || rewinds > self.rewinds,
            "M4: back from {known:?} to {committed} without a rewind in the journal"
        );
        // It may keep them while it enters this generation, and must not be taken for one that has lost a commit by the next.
        for cut in self.cuts.iter_mut().filter(|it| it.applied > committed.0) {
            cut.outlived = true;
        }
        self.rewinds = rewinds;
        self.generation = generation;
        self.rank = rank.0;
        self.world = addresses.len() as u32;
        self.committed = committed.0;
        self.applied.clear();
        self.evaluated = None;
        // Nobody needs another cut than the one that all begin with.
        let begins = base.as_ref().map_or(0, |it| it.generation.0);
        self.cuts.retain(|it| it.generation == begins);
        for cut in &mut self.cuts {
            if cut.gradient && cut.applied + 1 == committed.0 {
                assert!(
                    disk.has_commit(cut.generation, committed.0, apply),
                    "M2: a Form with a verdict on step {committed} before its journal record"
                );
                cut.state = Oracle::next_state(cut.state, committed.0, apply);
                cut.applied = committed.0;
            }
            cut.gradient = false;
        }
        if base.is_none() {
            self.saved.clear();
            assert_eq!(resume.is_some(), committed.0 > 0);
            self.state = match resumed {
                Some(step) => disk.checkpoints[&step],
                None => oracle.initial_state(),
            };
            assert_eq!(
                self.state,
                oracle.state_after(self.committed),
                "a wrong checkpoint"
            );
        }
        self.base = base.map(Arc::unwrap_or_clone);
        self.doing = Doing::Connecting;
        vec![Effect::Collective { step: 0 }]
    }

    /// Whether it holds what a Form says that it does.
    fn can_give(&self, base: &Layout, rank: Rank, committed: u64) -> bool {
        let named = |it: &Copies| it.owner == Some(rank) || it.mirror == Some(rank);
        let since = base.generation.0;
        let mut cuts = self.cuts.iter().filter(|it| it.generation == since);
        !base.shards.iter().any(named) || cuts.any(|it| it.reaches(committed, since))
    }

    fn commit(&mut self, step: u64, apply: bool, disk: &Disk) {
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
        let cut = &mut self.cuts[0];
        (cut.state, cut.applied, cut.gradient) = (self.state, step, false);
    }

    /// Does what a Go or a Commit asks for, then computes `step`.
    fn go_on(
        &mut self,
        step: u64,
        (save, evaluate, last): (bool, bool, bool),
        oracle: &Oracle,
    ) -> Vec<Effect> {
        let mut effects = Vec::new();
        if save {
            let (done, rank, state) = (self.committed, self.rank, self.state);
            let shard = format!("step {done} rank {rank} state {state:x}");
            effects.push(Effect::Save { step: done, shard });
        }
        if evaluate {
            self.evaluate(oracle);
        }
        if last {
            self.doing = Doing::Ending;
        } else {
            self.doing = Doing::Computing { step };
            effects.push(Effect::Collective { step });
        }
        effects
    }

    fn evaluate(&mut self, oracle: &Oracle) {
        if self.rank == 0 {
            self.evaluated = Some(oracle.evaluation(self.committed));
        }
    }
}
