//! The coordinator's shell: it executes what a job says in order, and dies between any two actions.

use std::collections::BTreeSet;
use std::mem::discriminant;

use protocol::{
    Action, Cause, CoordinatorMessage, Event, Generation, Incarnation, Job, JobId, JobSpec,
    Outcome, Record, Step,
};

use crate::worker::phases;
use crate::world::{Happens, Planted, World};

impl World {
    pub fn start(&mut self) {
        if self.job.is_some() {
            return;
        }
        self.life += 1;
        self.votes.clear();
        self.spoke.clear();
        // Rows are a projection of the journal, which whoever opens the run directory completes.
        self.rows = self.rows.max(self.disk.commits().len() as u64);
        let mut recovery = self.disk.recover();
        if self.setting.planted == Planted::GenerationReused {
            recovery.generation = Generation(recovery.generation.0.saturating_sub(1));
        }
        let checkpoint = recovery.checkpoint.0;
        let spec = JobSpec {
            id: JobId("run".into()),
            policy: self.policy.clone(),
            build: "build".into(),
            config_toml: String::new(),
            checkpoint_dir: "checkpoints".into(),
            probe: ".probe".into(),
            secret: [0; 32],
            fence: self.disk.open(),
            recovery,
            resume: (checkpoint > 0).then(|| checkpoint.to_string()),
        };
        let (job, actions) = Job::new(spec, self.now_ms);
        self.job = Some(job);
        self.execute(actions);
    }

    pub fn handle(&mut self, event: Event) {
        let Some(job) = &mut self.job else { return };
        let actions = job.handle(self.now_ms, event);
        assert!(
            job.deadlines_agree(),
            "the table of deadlines is not what it would be if it were computed anew"
        );
        let (long, short) = (job.waiting(), job.waiting_in_short());
        assert_eq!(
            discriminant(&short),
            discriminant(&long),
            "{short:?} {long:?}"
        );
        self.execute(actions);
    }

    pub fn tick(&mut self) {
        let deadline = self.job.as_ref().and_then(Job::next_deadline);
        if deadline.is_none_or(|at_ms| at_ms > self.now_ms) {
            return;
        }
        self.handle(Event::Tick);
        let deadline = self.job.as_ref().and_then(Job::next_deadline);
        assert!(
            deadline.is_none_or(|at_ms| at_ms > self.now_ms),
            "a deadline that never passes"
        );
    }

    fn execute(&mut self, actions: Vec<Action>) {
        for action in actions {
            // Before a record is written, or after it and before anybody hears of it, as often as anywhere else together.
            let journals = matches!(action, Action::Journal(_));
            let one_in = if journals { 100 } else { 1_000 };
            if self.deadly() && self.random.once_in(one_in) {
                self.faults += 1;
                return self.coordinator_dies();
            }
            self.act(action);
            if journals && self.deadly() && self.random.once_in(100) {
                self.faults += 1;
                return self.coordinator_dies();
            }
        }
        self.await_deadline();
    }

    fn act(&mut self, action: Action) {
        if self.told {
            println!("{} -> {action:?}", self.now_ms);
        }
        match action {
            Action::Journal(record) => {
                match &record {
                    Record::Commit(commit) => {
                        let step = commit.row.report.step;
                        let vote = (commit.row.generation, step);
                        self.audit_commit(vote);
                        let world = self.disk.members().len();
                        assert_eq!(commit.row.world_size as usize, world);
                        let mean_rank = (world - 1) as f64 / 2.0;
                        let mean = phases(step, mean_rank);
                        for ((_, it), (_, expected)) in
                            commit.row.phases.values().into_iter().zip(mean.values())
                        {
                            // Ranks are whole numbers; only their mean over three is not.
                            assert!((it - expected).abs() < 1e-9, "not the mean over the ranks");
                        }
                    }
                    Record::Rewind { .. } => self.rewound = Some(self.life),
                    Record::Generation { members, .. } => {
                        self.audit_generation(members);
                    }
                    _ => {}
                }
                let fence = self.job.as_ref().map(|job| job.spec().fence);
                assert_eq!(fence, Some(self.disk.fence()), "M2: it was replaced");
                self.disk.append(record, &self.oracle);
            }
            Action::Send(to) => {
                if let CoordinatorMessage::Commit { step, apply, .. } = &to.message {
                    let commits = self.disk.commits();
                    let last = commits.last().map(|it| (it.row.report.step, it.apply));
                    assert_eq!(
                        last,
                        Some((step.0, *apply)),
                        "M2: said before it was journaled"
                    );
                }
                if let CoordinatorMessage::Go { .. } = &to.message {
                    let first = self.gone.insert((to.generation, to.incarnation));
                    if !first && self.setting.planted == Planted::GoSaidOnce {
                        return;
                    }
                }
                self.tell(&to);
            }
            Action::CommitCheckpoint {
                generation,
                step,
                world,
                shards,
                best_first,
            } => {
                assert_eq!(shards.len(), world as usize);
                let (life, step) = (self.life, step.0);
                assert!(
                    self.manifests.insert((life, generation.0, step)),
                    "step {step} saved twice"
                );
                let delay_ms = self.random.between(1, 100);
                let manifest = Happens::Manifest {
                    life,
                    generation: generation.0,
                    step,
                    shards,
                    best_first,
                };
                self.after(delay_ms, manifest);
            }
            Action::RecordStep(row) => {
                let commits = self.disk.commits();
                assert_eq!(
                    commits.last().map(|it| it.row.report.step),
                    Some(row.report.step)
                );
                self.rows += 1;
            }
            Action::RecordEvaluation { row, .. } => {
                let rewinds = self.disk.rewinds();
                assert!(
                    self.evaluations.insert((self.life, rewinds, row.step)),
                    "evaluated twice"
                );
            }
            Action::Done(outcome) => self.done(&outcome),
            Action::Note(_) | Action::Progress { .. } | Action::DataReport { .. } => {}
        }
    }

    /// A commit has the votes of all members, and each of its shards has a copy that its gradient makes up to date.
    fn audit_commit(&self, vote: (u64, u64)) {
        let members: BTreeSet<u64> = self.disk.members().iter().map(|it| it.0).collect();
        let votes = self.votes.get(&vote).cloned().unwrap_or_default();
        assert_eq!(votes, members, "committed without all votes");
        let held = self.copies(&members, vote.1, vote.0);
        assert!(
            held.contains(&vote.0),
            "step {} is committed, and some shard has no copy of it",
            vote.1
        );
    }

    /// The generations of whose cuts these workers have all shards at `committed`, by what they hold and not what they say.
    fn copies(&self, workers: &BTreeSet<u64>, committed: u64, since: u64) -> BTreeSet<u64> {
        let cuts = workers.iter().filter_map(|it| self.workers.get(it));
        let cuts: Vec<_> = cuts
            .flat_map(|it| &it.cuts)
            .filter(|it| it.reaches(committed, since))
            .collect();
        let generations: BTreeSet<u64> = cuts.iter().map(|it| it.generation).collect();
        let complete = |generation: &u64| {
            let of = || cuts.iter().filter(|it| it.generation == *generation);
            let world = of().next().map_or(0, |it| it.world);
            (0..world).all(|shard| of().any(|it| it.has_shard(shard)))
        };
        generations.into_iter().filter(complete).collect()
    }

    /// A generation goes on from where the journal ends: some of its members have all shards of it, or a checkpoint has. A
    /// rewind was needed (invariant M4).
    fn audit_generation(&mut self, members: &[Incarnation]) {
        let members: BTreeSet<u64> = members.iter().map(|it| it.0).collect();
        let before: BTreeSet<u64> = self.disk.members().iter().map(|it| it.0).collect();
        let newest = self.disk.checkpoints.keys().next_back().copied();
        let newest = newest.unwrap_or(0);
        let (committed, since) = self.disk.last_commit();
        let held = !self.copies(&members, committed, since).is_empty();
        if let Some(Record::Rewind { to, .. }) = self.disk.journal.last() {
            // An earlier life may have rewound while nobody answered who does now.
            if self.rewound != Some(self.life) {
                return;
            }
            assert_eq!(to.0, newest, "a rewind goes to the newest checkpoint");
            let end = self.disk.journal.len() - 1;
            let (lost, since) = self.disk.last_commit_of(end);
            // Of some it may have heard nothing but late words of another generation, and cannot know what they hold.
            let known = |it: &&u64| {
                self.spoke.get(it).copied() == self.workers.get(it).map(|it| it.generation)
            };
            let known = members.iter().filter(known).copied().collect();
            let held = self.copies(&known, lost, since);
            assert!(
                held.is_empty(),
                "M4: members have all shards of step {lost} in the cuts {held:?}, and it was rewound"
            );
        } else {
            assert!(
                held || committed == newest,
                "a shard of step {committed} has no living copy, and no rewind is journaled"
            );
            let lost = before.iter().any(|it| !members.contains(it));
            self.carried += u64::from(held && lost && committed > newest);
        }
        if !before.is_empty() {
            let joined = members.iter().filter(|it| !before.contains(it));
            self.admitted += joined.count() as u64;
        }
    }

    fn done(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Completed => self.completed = true,
            Outcome::Interrupted { committed } => {
                let newest = self.disk.checkpoints.keys().next_back().copied();
                assert_eq!(
                    newest.unwrap_or(0),
                    committed.0,
                    "interrupted at a checkpoint"
                );
            }
            Outcome::Failed {
                cause: Cause::Temporary,
                ..
            } => {}
            Outcome::Failed { .. } => panic!("a healthy job {outcome}"),
        }
        // It lingers for a while to answer who still speaks, then the supervisor starts the next.
        let event = Event::StopRequested {
            reason: "the end of a life".into(),
        };
        let life = self.life;
        self.after(50, Happens::Event { life, event });
        self.coordinator_dies();
    }

    /// Workers are nobody's children: few die at the same time.
    pub fn coordinator_dies(&mut self) {
        if self.told {
            println!("{} the coordinator dies", self.now_ms);
        }
        self.job = None;
        for incarnation in self.workers.keys().copied().collect::<Vec<_>>() {
            if self.deadly() && self.random.once_in(12) {
                self.exit(incarnation);
            }
        }
        let delay_ms = self.random.between(50, 500);
        self.after(delay_ms, Happens::Start);
    }

    pub fn manifest(
        &mut self,
        life: u64,
        (step, generation): (u64, u64),
        shards: &[String],
        best_first: &[Step],
    ) {
        // The process that would write it is gone.
        if life != self.life || self.job.is_none() {
            return;
        }
        let job = self.job.as_ref().expect("checked above");
        let last = job.committed().0 == step && !job.waiting().to_string().contains("compute");
        let event = if self.deadly() && !last && self.random.once_in(6) {
            self.faults += 1;
            Event::CheckpointFailed {
                step: Step(step),
                reason: "the disk is slow".into(),
            }
        } else {
            self.disk
                .put_checkpoint((step, generation), shards, best_first, &self.oracle);
            Event::CheckpointCommitted {
                step: Step(step),
                path: step.to_string(),
            }
        };
        let delay_ms = self.random.between(1, 50);
        self.after(delay_ms, Happens::Event { life, event });
    }
}
