//! The simulated world: one queue of events in time, and what is true at its end.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{
    Elastic, Event, FromWorker, Generation, Incarnation, Job, JobPolicy, Metric, Record, Selection,
    Step, ToWorker, WorkerMessage,
};

use crate::disk::{Disk, Oracle};
use crate::network::Partition;
use crate::queue::Queue;
use crate::random::{Random, mix};
use crate::replaced::Replaced;
use crate::worker::{Doing, Health, Worker};

/// Faults happen until then; after it everything works.
pub const FAULTS_END_MS: u64 = 15_000;
pub const BEAT_MS: u64 = 100;

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// The network loses, doubles, delays and reorders; no process fails.
    Lossy,
    /// All that, and processes die, hang, get stuck, and are asked to stop.
    Hostile,
}

/// A fault in the coordinator that some seed must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// None.
    Nothing,
    /// A lost Go is never said again.
    GoSaidOnce,
    /// A restarted coordinator begins with the generation of the one before it.
    GenerationReused,
    /// A restarted coordinator hears no heartbeats.
    BeatsIgnored,
    /// One vote counts for all members.
    NoQuorum,
    /// The journal takes the records of a coordinator that was replaced.
    JournalOpenToAll,
    /// Workers act on its words.
    WorkersOpenToAll,
}

/// What a world is made of beside its seed.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub weather: Weather,
    pub planted: Planted,
}

#[derive(Debug)]
pub enum Happens {
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
        moved: Option<u64>,
    },
    /// Whoever still waits in this collective gives it up.
    CollectiveTimeout {
        incarnation: u64,
        generation: u64,
        step: u64,
    },
    Loaded {
        incarnation: u64,
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
        generation: u64,
        step: u64,
        shards: Vec<String>,
        best_first: Vec<Step>,
    },
    Event {
        life: u64,
        event: Event,
    },
    /// A worker that was told to leave has had its time.
    Evicted {
        incarnation: u64,
    },
    /// A coordinator that was replaced in its sleep wakes up.
    Woken,
    Launcher,
    Fault,
}

pub struct World {
    pub setting: Setting,
    pub now_ms: u64,
    queue: Queue<Happens>,
    /// When the next tick comes that is in the queue.
    ticks_ms: Option<u64>,
    pub random: Random,
    pub disk: Disk,
    pub oracle: Oracle,
    pub policy: JobPolicy,
    pub job: Option<Job>,
    /// One whose place it has taken.
    pub replaced: Option<Replaced>,
    /// Counts coordinators; what an old one left under way means nothing to the next.
    pub life: u64,
    pub workers: BTreeMap<u64, Worker>,
    /// Who takes part in a generation's collective of a step.
    pub collectives: BTreeMap<(u64, u64), BTreeSet<u64>>,
    pub partitions: Vec<Partition>,
    /// Reports that reached the living coordinator, by generation and step.
    pub votes: BTreeMap<(u64, u64), BTreeSet<u64>>,
    /// The newest generation in which a worker spoke to the living coordinator.
    pub spoke: BTreeMap<u64, u64>,
    pub evaluations: BTreeSet<(u64, usize, u64)>,
    pub manifests: BTreeSet<(u64, u64, u64)>,
    /// Go's that were said, by generation and worker.
    pub gone: BTreeSet<(Generation, Incarnation)>,
    pub rows: u64,
    /// The life that last rewound.
    pub rewound: Option<u64>,
    pub completed: bool,
    pub faults: u64,
    pub events: u64,
    /// Spares that were admitted to a generation after the first.
    pub admitted: u64,
    /// Coordinators that woke up in another's time, and those of them whose records the journal refused.
    pub wakes: u64,
    pub refused: u64,
    /// Commits that survivors made without going back to a checkpoint after a loss.
    pub carried: u64,
    /// How long a step takes. In some runs longer than a worker may be silent.
    pub step_ms: (u64, u64),
    /// Whether the story is printed.
    pub told: bool,
}

impl World {
    pub fn new(seed: u64, setting: Setting) -> Self {
        let mut random = Random::new(seed);
        let world = random.between(1, 4) as u32;
        let mut other = Random::new(mix(seed, 7));
        let elastic = elastic(&mut other, world);
        let slowly = other.once_in(6);
        let policy = JobPolicy {
            world,
            save_every: Some(random.between(2, 6)).filter(|it| *it < 6),
            evaluate_every: Some(random.between(1, 6)).filter(|it| *it < 6),
            selection: selection(&mut Random::new(mix(seed, 6))),
            heartbeat_timeout_ms: 1_500,
            join_timeout_ms: 5_000,
            form_timeout_ms: 4_000,
            step_timeout_ms: 3_000,
            save_timeout_ms: 4_000,
            skipped_steps_max: 3,
            failed_saves_max: u32::MAX,
            elastic,
        };
        let mut steps_total = random.between(5, 60);
        let mut step_ms = (10, 80);
        if slowly {
            steps_total = steps_total.min(12);
            step_ms = (1_600, 1_900);
        }
        let mut world = Self {
            setting,
            now_ms: 0,
            queue: Queue::new(),
            ticks_ms: None,
            random,
            disk: Disk::default(),
            oracle: Oracle::new(mix(seed, 5), steps_total, &policy),
            policy,
            job: None,
            replaced: None,
            life: 0,
            workers: BTreeMap::new(),
            collectives: BTreeMap::new(),
            partitions: Vec::new(),
            votes: BTreeMap::new(),
            spoke: BTreeMap::new(),
            evaluations: BTreeSet::new(),
            manifests: BTreeSet::new(),
            gone: BTreeSet::new(),
            rows: 0,
            rewound: None,
            completed: false,
            faults: 0,
            events: 0,
            admitted: 0,
            wakes: 0,
            refused: 0,
            carried: 0,
            step_ms,
            told: std::env::var_os("SIMULATION_STORY").is_some(),
        };
        world.after(0, Happens::Start);
        world.after(50, Happens::Launcher);
        world.after(200, Happens::Fault);
        world
    }

    /// How long a job may take once faults have stopped (invariant M5): every deadline once, to notice what the last fault
    /// left behind, then an undisturbed run. It notices one by one what each worker was left with.
    fn bound_ms(&self) -> u64 {
        let policy = &self.policy;
        let notice = policy.heartbeat_timeout_ms
            + policy.join_timeout_ms
            + policy.form_timeout_ms
            + 2 * policy.step_timeout_ms
            + policy.save_timeout_ms;
        let recoveries = u64::from(policy.elastic.workers_max) + 1;
        let recovery = policy.recovery_ms_max();
        notice
            + 2_000
            + recoveries * recovery
            + self.oracle.steps_total * (4 * BEAT_MS + self.step_ms.1)
    }

    /// Runs until the job is complete.
    pub fn run(&mut self) {
        while !self.completed {
            let (at_ms, happens) = self.queue.pop().expect("the launcher never rests");
            assert!(at_ms >= self.now_ms, "time goes forward");
            self.now_ms = at_ms;
            self.events += 1;
            if self.told {
                println!("{at_ms} {happens:?}");
            }
            if self.now_ms > FAULTS_END_MS + self.bound_ms() {
                let waiting = self.job.as_ref().map(|job| job.waiting().to_string());
                panic!(
                    "M5: not complete {} ms after the last fault; {waiting:?}",
                    self.bound_ms()
                );
            }
            self.happen(happens);
        }
        let commits = self.disk.surviving();
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
        // Spares join on purpose, one or several a generation.
        let generation = self.disk.generation().0;
        assert!(
            self.setting.weather == Weather::Hostile || generation <= 1 + self.admitted,
            "a worker was lost to the network"
        );
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
            self.setting.weather == Weather::Hostile || self.disk.saved.contains(&best),
            "an evaluated step was not saved"
        );
        assert!(
            !self.disk.saved.contains(&best) || self.disk.checkpoints.contains_key(&best),
            "the best step's checkpoint, of {best}, is gone: {:?}",
            self.disk.checkpoints
        );
    }

    /// Whether the network fails.
    pub fn faulty(&self) -> bool {
        self.now_ms < FAULTS_END_MS
    }

    /// Whether processes fail.
    pub fn deadly(&self) -> bool {
        self.faulty() && self.setting.weather == Weather::Hostile
    }

    pub fn after(&mut self, delay_ms: u64, happens: Happens) {
        self.queue.push(self.now_ms + delay_ms, happens);
    }

    /// A tick comes at the job's next deadline; one that is in the queue for an earlier time finds out when that is.
    pub fn await_deadline(&mut self) {
        let Some(at_ms) = self.job.as_ref().and_then(Job::next_deadline) else {
            return;
        };
        let at_ms = at_ms.max(self.now_ms);
        if self.ticks_ms.is_none_or(|comes_ms| comes_ms > at_ms) {
            self.ticks_ms = Some(at_ms);
            self.queue.push(at_ms, Happens::Tick);
        }
    }

    fn happen(&mut self, happens: Happens) {
        match happens {
            Happens::Start => self.start(),
            Happens::ToCoordinator(from) => self.arrives(from),
            Happens::Event { life, event } if life == self.life => self.handle(event),
            Happens::Event { .. } => {}
            Happens::Tick => {
                self.ticks_ms.take_if(|at_ms| *at_ms <= self.now_ms);
                self.tick();
                self.await_deadline();
            }
            Happens::Manifest {
                life,
                generation,
                step,
                shards,
                best_first,
            } => self.manifest(life, (step, generation), &shards, &best_first),
            Happens::Woken => self.woken(),
            Happens::Launcher => self.launch(),
            Happens::Fault => self.fault(),
            Happens::Evicted { incarnation } => self.exit(incarnation),
            Happens::Beat { incarnation } => self.beat(incarnation),
            Happens::ToWorker(to) => {
                let incarnation = to.incarnation.0;
                if self.wake(incarnation) && self.believes(incarnation, to.fence) {
                    let now_ms = self.now_ms;
                    let worker = self.workers.get_mut(&incarnation).expect("awake");
                    worker.heard_ms = now_ms;
                    let effects = worker.told(to, &self.disk, &self.oracle);
                    self.effects(incarnation, effects);
                }
            }
            Happens::Reduced {
                incarnation,
                generation,
                step,
                moved,
            } => {
                if self.wake(incarnation) && self.workers[&incarnation].health == Health::Well {
                    let worker = self.workers.get_mut(&incarnation).expect("awake");
                    let effect = worker.reduced(generation, step, moved, &self.oracle);
                    self.effects(incarnation, effect.into_iter().collect());
                } else if let Some(Health::Paused { until_ms }) = self.health(incarnation) {
                    let delay_ms = until_ms.saturating_sub(self.now_ms) + 1;
                    self.after(
                        delay_ms,
                        Happens::Reduced {
                            incarnation,
                            generation,
                            step,
                            moved,
                        },
                    );
                }
            }
            Happens::CollectiveTimeout {
                incarnation,
                generation,
                step,
            } => self.collective_timeout(incarnation, generation, step),
            Happens::Loaded { incarnation } => {
                if self.wake(incarnation) && self.workers[&incarnation].health == Health::Well {
                    let worker = self.workers.get_mut(&incarnation).expect("awake");
                    let effect = worker.loaded(&self.oracle);
                    self.effects(incarnation, effect.into_iter().collect());
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
                    self.effects(incarnation, vec![effect]);
                }
            }
        }
    }

    fn arrives(&mut self, from: FromWorker) {
        if self.setting.planted == Planted::BeatsIgnored
            && self.life > 1
            && matches!(from.message, WorkerMessage::Beat { .. })
        {
            return;
        }
        let spoke = self.spoke.entry(from.incarnation.0).or_default();
        *spoke = from.generation.0.max(*spoke);
        self.overhears(&from);
        if let WorkerMessage::Prepared { report, .. } = &from.message {
            let vote = (from.generation.0, report.step);
            self.votes
                .entry(vote)
                .or_default()
                .insert(from.incarnation.0);
            if self.setting.planted == Planted::NoQuorum {
                for incarnation in self.disk.members().to_vec() {
                    let forged = FromWorker {
                        incarnation,
                        ..from.clone()
                    };
                    self.handle(Event::Message(forged));
                }
            }
        }
        self.handle(Event::Message(from));
    }

    fn beat(&mut self, incarnation: u64) {
        if self.wake(incarnation) {
            let now_ms = self.now_ms;
            let worker = self.workers.get_mut(&incarnation).expect("awake");
            // It does not hear, or is not heard: it connects again.
            let silent_ms = now_ms.saturating_sub(worker.heard_ms);
            if silent_ms > 3_000 && worker.health == Health::Well {
                worker.heard_ms = now_ms;
                if worker.doing != Doing::Joining {
                    worker.rejoin();
                }
            }
            for message in worker.beat(&self.disk, &self.oracle) {
                self.say(incarnation, message);
            }
        }
        if self.workers[&incarnation].health != Health::Dead {
            self.after(BEAT_MS, Happens::Beat { incarnation });
        }
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

/// From one worker that must not be missing to spares that are rarely needed.
fn elastic(random: &mut Random, world: u32) -> Elastic {
    let world = u64::from(world);
    Elastic {
        workers_min: random.between(1, world) as u32,
        workers_max: random.between(world, world + 2) as u32,
        abort_timeout_ms: 2_000,
        collective_timeout_ms: 2_500,
        job_timeout_ms: 12_000,
        hang_factor: 5.0,
        slow_factor: 2.0,
        mirror: true,
        shard_gradients: false,
        offload: false,
        failures_max: u32::MAX,
    }
}
