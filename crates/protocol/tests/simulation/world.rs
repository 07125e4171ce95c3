//! The simulated world: one queue of events in time, a hostile network, processes that die, hang or get stuck, and a
//! supervisor that starts the coordinator again.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{
    Action, Cause, CoordinatorMessage, Event, FromWorker, Incarnation, Job, JobId, JobPolicy,
    JobSpec, Metric, Outcome, Record, Selection, Step, ToWorker, WorkerMessage,
};

use crate::disk::{Disk, Oracle};
use crate::random::{Random, mix};
use crate::worker::{Effect, Health, Worker, phases};

/// Faults happen until then; after it everything works.
const FAULTS_END_MS: u64 = 15_000;
const BEAT_MS: u64 = 100;

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// The network loses, doubles, delays and reorders; no process fails.
    Lossy,
    /// All that, and processes die, hang, get stuck, and are asked to stop.
    Hostile,
}

enum Happens {
    Start,
    ToCoordinator(FromWorker),
    ToWorker(ToWorker),
    Tick,
    Beat {
        incarnation: u64,
    },
    Reduced {
        incarnation: u64,
        generation: u64,
        step: u64,
    },
    ShardDurable {
        incarnation: u64,
        generation: u64,
        step: u64,
        shard: String,
    },
    /// The manifest is in place; its word may still be lost in a crash of the coordinator.
    Manifest {
        life: u64,
        step: u64,
        shards: Vec<String>,
        best_first: Vec<Step>,
    },
    Event {
        life: u64,
        event: Event,
    },
    Launcher,
    Fault,
}

pub struct World {
    weather: Weather,
    now_ms: u64,
    queue: BTreeMap<(u64, u64), Happens>,
    sequence: u64,
    random: Random,
    pub disk: Disk,
    pub oracle: Oracle,
    policy: JobPolicy,
    job: Option<Job>,
    /// Counts coordinators; what an old one left under way means nothing to the next.
    life: u64,
    workers: BTreeMap<u64, Worker>,
    /// Who takes part in a generation's collective of a step.
    collectives: BTreeMap<(u64, u64), BTreeSet<u64>>,
    /// Reports that reached the living coordinator, by generation and step.
    votes: BTreeMap<(u64, u64), BTreeSet<u64>>,
    evaluations: BTreeSet<(u64, u64)>,
    manifests: BTreeSet<(u64, u64)>,
    rows: u64,
    completed: bool,
    pub faults: u64,
    pub events: u64,
}

impl World {
    pub fn new(seed: u64, weather: Weather) -> Self {
        let mut random = Random::new(seed);
        let policy = JobPolicy {
            world: random.between(1, 4) as u32,
            save_every: Some(random.between(2, 6)).filter(|it| *it < 6),
            evaluate_every: Some(random.between(1, 6)).filter(|it| *it < 6),
            selection: selection(&mut Random::new(mix(seed, 6))),
            heartbeat_timeout_ms: 1_500,
            join_timeout_ms: 5_000,
            form_timeout_ms: 4_000,
            step_timeout_ms: 3_000,
            save_timeout_ms: 4_000,
            skipped_steps_max: 3,
        };
        let steps_total = random.between(5, 60);
        let mut world = Self {
            weather,
            now_ms: 0,
            queue: BTreeMap::new(),
            sequence: 0,
            random,
            disk: Disk::default(),
            oracle: Oracle::new(mix(seed, 5), steps_total, &policy),
            policy,
            job: None,
            life: 0,
            workers: BTreeMap::new(),
            collectives: BTreeMap::new(),
            votes: BTreeMap::new(),
            evaluations: BTreeSet::new(),
            manifests: BTreeSet::new(),
            rows: 0,
            completed: false,
            faults: 0,
            events: 0,
        };
        world.after(0, Happens::Start);
        world.after(50, Happens::Launcher);
        world.after(200, Happens::Fault);
        world
    }

    /// How long a job may take once faults have stopped (invariant M5): every deadline once, to notice what the last fault
    /// left behind, then an undisturbed run.
    fn bound_ms(&self) -> u64 {
        let policy = &self.policy;
        let notice = policy.heartbeat_timeout_ms
            + policy.join_timeout_ms
            + policy.form_timeout_ms
            + 2 * policy.step_timeout_ms
            + policy.save_timeout_ms;
        notice + 2_000 + self.oracle.steps_total * 4 * BEAT_MS
    }

    /// Runs until the job is complete.
    pub fn run(&mut self) {
        while !self.completed {
            let ((at_ms, _), happens) = self.queue.pop_first().expect("the launcher never rests");
            assert!(at_ms >= self.now_ms, "time goes forward");
            self.now_ms = at_ms;
            self.events += 1;
            let waiting = self.job.as_ref().map(|job| job.waiting().to_string());
            assert!(
                self.now_ms <= FAULTS_END_MS + self.bound_ms(),
                "M5: not complete {} ms after the last fault; {waiting:?}",
                self.bound_ms()
            );
            self.happen(happens);
        }
        let commits = self.disk.commits();
        let steps: Vec<u64> = commits.iter().map(|it| it.row.report.step).collect();
        let end = self.oracle.end();
        let all: Vec<u64> = (1..=end).collect();
        assert_eq!(steps, all, "M3: each step once");
        let state = self.disk.checkpoints.get(&end);
        assert_eq!(state, Some(&self.oracle.state_after(end)));
        assert!(matches!(
            self.disk.journal.last(),
            Some(Record::Completed { .. })
        ));
        assert!(self.rows >= end, "every commit has its row");
        assert_eq!(
            self.disk.evaluated(),
            self.oracle.evaluated,
            "T3: each evaluation once"
        );
        self.check_best();
    }

    /// Whether the best step is not the last, and has its checkpoint.
    pub fn keeps_an_older_checkpoint(&self) -> bool {
        let best = self.oracle.best.filter(|best| *best < self.oracle.end());
        best.is_some_and(|best| self.disk.checkpoints.contains_key(&best))
    }

    /// The best step's checkpoint stays; a save of it may have failed.
    fn check_best(&self) {
        let keep_best = self
            .policy
            .selection
            .as_ref()
            .is_some_and(|it| it.keep_best);
        let Some(best) = self.oracle.best.filter(|_| keep_best) else {
            return;
        };
        assert!(
            self.weather == Weather::Hostile || self.disk.saved.contains(&best),
            "an evaluated step was not saved"
        );
        assert!(
            !self.disk.saved.contains(&best) || self.disk.checkpoints.contains_key(&best),
            "the best step's checkpoint, of {best}, is gone: {:?}",
            self.disk.checkpoints
        );
    }

    /// Whether the network fails.
    fn faulty(&self) -> bool {
        self.now_ms < FAULTS_END_MS
    }

    /// Whether processes fail.
    fn deadly(&self) -> bool {
        self.faulty() && self.weather == Weather::Hostile
    }

    fn after(&mut self, delay_ms: u64, happens: Happens) {
        self.sequence += 1;
        self.queue
            .insert((self.now_ms + delay_ms, self.sequence), happens);
    }

    /// Zero, one or two deliveries, in any order.
    fn transmit(&mut self, make: impl Fn() -> Happens) {
        if !self.faulty() {
            let delay_ms = self.random.between(1, 5);
            return self.after(delay_ms, make());
        }
        if self.random.once_in(12) {
            self.faults += 1;
            return;
        }
        let copies = if self.random.once_in(8) { 2 } else { 1 };
        for _ in 0..copies {
            let slowest_ms = match self.weather {
                _ if !self.random.once_in(20) => 40,
                Weather::Lossy => 1_000,
                Weather::Hostile => 3_000,
            };
            let delay_ms = self.random.between(1, slowest_ms);
            self.after(delay_ms, make());
        }
    }

    fn happen(&mut self, happens: Happens) {
        match happens {
            Happens::Start => self.start(),
            Happens::ToCoordinator(from) => {
                if let WorkerMessage::Prepared { report, .. } = &from.message {
                    let vote = (from.generation.0, report.step);
                    self.votes
                        .entry(vote)
                        .or_default()
                        .insert(from.incarnation.0);
                }
                self.handle(Event::Message(from));
            }
            Happens::Event { life, event } if life == self.life => self.handle(event),
            Happens::Event { .. } => {}
            Happens::Tick => self.tick(),
            Happens::Manifest {
                life,
                step,
                shards,
                best_first,
            } => self.manifest(life, step, &shards, &best_first),
            Happens::Launcher => self.launch(),
            Happens::Fault => self.fault(),
            Happens::Beat { incarnation } => {
                if self.wake(incarnation) {
                    let worker = &self.workers[&incarnation];
                    for message in worker.beat(&self.oracle) {
                        self.say(incarnation, message);
                    }
                }
                if self.workers[&incarnation].health != Health::Dead {
                    self.after(BEAT_MS, Happens::Beat { incarnation });
                }
            }
            Happens::ToWorker(to) => {
                let incarnation = to.incarnation.0;
                if self.wake(incarnation) {
                    let worker = self.workers.get_mut(&incarnation).expect("awake");
                    let effects = worker.told(to, &self.disk, &self.oracle);
                    self.effects(incarnation, effects);
                }
            }
            Happens::Reduced {
                incarnation,
                generation,
                step,
            } => {
                if self.wake(incarnation) && self.workers[&incarnation].health == Health::Well {
                    let worker = self.workers.get_mut(&incarnation).expect("awake");
                    let effect = worker.reduced(generation, step, &self.oracle);
                    self.effects(incarnation, effect.into_iter().collect());
                } else if let Some(Health::Paused { until_ms }) = self.health(incarnation) {
                    let delay_ms = until_ms.saturating_sub(self.now_ms) + 1;
                    self.after(
                        delay_ms,
                        Happens::Reduced {
                            incarnation,
                            generation,
                            step,
                        },
                    );
                }
            }
            Happens::ShardDurable {
                incarnation,
                generation,
                step,
                shard,
            } => {
                if self.wake(incarnation) {
                    let worker = self.workers.get_mut(&incarnation).expect("awake");
                    let effect = worker.saved(generation, step, shard);
                    self.effects(incarnation, effect.into_iter().collect());
                }
            }
        }
    }

    // The coordinator and its shell.

    fn start(&mut self) {
        if self.job.is_some() {
            return;
        }
        self.life += 1;
        self.votes.clear();
        let recovery = self.disk.recover();
        let committed = recovery.committed.0;
        let spec = JobSpec {
            id: JobId("run".into()),
            policy: self.policy.clone(),
            build: "build".into(),
            config_toml: String::new(),
            checkpoint_dir: "checkpoints".into(),
            probe: ".probe".into(),
            secret: [0; 32],
            recovery,
            resume: (committed > 0).then(|| committed.to_string()),
        };
        let (job, actions) = Job::new(spec, self.now_ms);
        self.job = Some(job);
        self.execute(actions);
    }

    fn handle(&mut self, event: Event) {
        let Some(job) = &mut self.job else { return };
        let actions = job.handle(self.now_ms, event);
        self.execute(actions);
    }

    fn tick(&mut self) {
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
            if self.deadly() && self.random.once_in(1_000) {
                self.faults += 1;
                return self.coordinator_dies();
            }
            self.act(action);
        }
        let deadline = self.job.as_ref().and_then(Job::next_deadline);
        if let Some(at_ms) = deadline {
            self.after(at_ms.saturating_sub(self.now_ms), Happens::Tick);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Journal(record) => {
                if let Record::Commit(commit) = &record {
                    let vote = (commit.row.generation, commit.row.report.step);
                    let votes = self.votes.get(&vote).map_or(0, BTreeSet::len);
                    assert_eq!(
                        votes, self.policy.world as usize,
                        "committed without all votes"
                    );
                    let mean_rank = f64::from(self.policy.world - 1) / 2.0;
                    assert_eq!(
                        commit.row.phases,
                        phases(commit.row.report.step, mean_rank),
                        "not the mean over the ranks"
                    );
                }
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
                self.transmit(|| Happens::ToWorker(to.clone()));
            }
            Action::CommitCheckpoint {
                step,
                world,
                shards,
                best_first,
                ..
            } => {
                assert_eq!(shards.len(), world as usize);
                let (life, step) = (self.life, step.0);
                assert!(
                    self.manifests.insert((life, step)),
                    "step {step} saved twice"
                );
                let delay_ms = self.random.between(1, 100);
                let manifest = Happens::Manifest {
                    life,
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
                assert!(
                    self.evaluations.insert((self.life, row.step)),
                    "evaluated twice"
                );
            }
            Action::Done(outcome) => self.done(&outcome),
            Action::Note(_) | Action::Progress { .. } | Action::DataReport { .. } => {}
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

    /// Its children read the end of their input: most exit, some linger and speak to the next coordinator.
    fn coordinator_dies(&mut self) {
        self.job = None;
        for incarnation in self.workers.keys().copied().collect::<Vec<_>>() {
            if !self.deadly() || !self.random.once_in(4) {
                self.exit(incarnation);
            }
        }
        let delay_ms = self.random.between(50, 500);
        self.after(delay_ms, Happens::Start);
    }

    fn manifest(&mut self, life: u64, step: u64, shards: &[String], best_first: &[Step]) {
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
                .put_checkpoint(step, shards, best_first, &self.oracle);
            Event::CheckpointCommitted { step: Step(step) }
        };
        let delay_ms = self.random.between(1, 50);
        self.after(delay_ms, Happens::Event { life, event });
    }

    // Workers and their shells.

    fn launch(&mut self) {
        let gathering = self
            .job
            .as_ref()
            .is_some_and(|job| job.waiting().to_string().contains("to join"));
        if gathering {
            let well = |it: &&Worker| it.life == self.life && it.health == Health::Well;
            let alive = self.workers.values().filter(well).count();
            for _ in alive..self.policy.world as usize {
                // In any order, so that ranks do not follow age.
                let incarnation = mix(self.workers.len() as u64, self.life) | 1;
                let worker = Worker::new(incarnation, self.life);
                self.workers.insert(incarnation, worker);
                let delay_ms = self.random.between(1, 100);
                self.after(delay_ms, Happens::Beat { incarnation });
            }
        }
        self.after(200, Happens::Launcher);
    }

    fn health(&self, incarnation: u64) -> Option<Health> {
        self.workers.get(&incarnation).map(|it| it.health)
    }

    /// Whether a worker's process runs now; a pause that is over is over.
    fn wake(&mut self, incarnation: u64) -> bool {
        let Some(worker) = self.workers.get_mut(&incarnation) else {
            return false;
        };
        match worker.health {
            Health::Well | Health::Stuck => true,
            Health::Dead => false,
            Health::Paused { until_ms } => {
                if until_ms <= self.now_ms {
                    worker.health = Health::Well;
                }
                until_ms <= self.now_ms
            }
        }
    }

    fn exit(&mut self, incarnation: u64) {
        let Some(worker) = self.workers.get_mut(&incarnation) else {
            return;
        };
        if worker.health == Health::Dead {
            return;
        }
        worker.health = Health::Dead;
        // A closed connection is noticed, or not.
        if !self.faulty() || !self.random.once_in(3) {
            let life = self.life;
            let event = Event::Disconnected {
                incarnation: Incarnation(incarnation),
            };
            let delay_ms = self.random.between(1, 50);
            self.after(delay_ms, Happens::Event { life, event });
        }
    }

    fn say(&mut self, incarnation: u64, message: WorkerMessage) {
        let from = self.workers[&incarnation].envelope(message);
        self.transmit(|| Happens::ToCoordinator(from.clone()));
    }

    fn effects(&mut self, incarnation: u64, effects: Vec<Effect>) {
        for effect in effects {
            let generation = self.workers[&incarnation].generation;
            match effect {
                Effect::Say(message) => self.say(incarnation, message),
                Effect::Collective { step } => self.collective(incarnation, generation, step),
                Effect::Save { step, shard } => {
                    let delay_ms = self.random.between(1, 300);
                    let happens = Happens::ShardDurable {
                        incarnation,
                        generation,
                        step,
                        shard,
                    };
                    self.after(delay_ms, happens);
                }
                Effect::Exit => self.exit(incarnation),
            }
        }
    }

    /// A collective ends when all ranks take part; without one of them it hangs until somebody stops the others.
    fn collective(&mut self, incarnation: u64, generation: u64, step: u64) {
        let world = self.workers[&incarnation].world as usize;
        let here = self.collectives.entry((generation, step)).or_default();
        assert!(
            here.insert(incarnation),
            "step {step} computed twice in one generation"
        );
        assert!(here.len() <= world, "M1: two generations of one number");
        if here.len() == world {
            for incarnation in here.clone() {
                let delay_ms = self.random.between(10, 80);
                self.after(
                    delay_ms,
                    Happens::Reduced {
                        incarnation,
                        generation,
                        step,
                    },
                );
            }
        }
    }

    fn fault(&mut self) {
        if !self.deadly() {
            return;
        }
        let victims: Vec<u64> = self
            .workers
            .values()
            .filter(|it| it.health == Health::Well)
            .map(|it| it.incarnation)
            .collect();
        self.faults += 1;
        let kind = self.random.between(0, 9);
        match (kind, victims.as_slice()) {
            (0, _) if self.job.is_some() => self.coordinator_dies(),
            (1, _) => self.handle(Event::StopRequested {
                reason: "a person asked".into(),
            }),
            (2..=5, [_, ..]) => {
                let place = self.random.between(0, victims.len() as u64 - 1);
                let victim = victims[place as usize];
                match kind {
                    2 => self.exit(victim),
                    3 | 4 => {
                        let until_ms = self.now_ms + self.random.between(50, 4_000);
                        let health = Health::Paused { until_ms };
                        self.workers.get_mut(&victim).expect("a victim").health = health;
                    }
                    _ => self.workers.get_mut(&victim).expect("a victim").health = Health::Stuck,
                }
            }
            _ => self.faults -= 1,
        }
        let delay_ms = self.random.between(100, 2_000);
        self.after(delay_ms, Happens::Fault);
    }
}

/// Most runs have a rule, most of those may stop early.
fn selection(random: &mut Random) -> Option<Selection> {
    if random.once_in(4) {
        return None;
    }
    let higher = random.once_in(2);
    let name = if higher { "rewards/accuracies" } else { "loss" };
    Some(Selection {
        metric: Metric::named(name).expect("a metric"),
        higher_is_better: higher,
        patience: Some(random.between(1, 4)).filter(|it| *it < 4),
        min_delta: random.between(0, 2) as f64 / 8.0,
        keep_best: random.once_in(2),
    })
}
