//! The network: between workers and the coordinator it loses, doubles, delays and reorders, and it is cut in one direction or
//! the other; between workers it carries collectives, which need every member and every link.

use protocol::{Rank, ToWorker, WorkerMessage};

use crate::worker::{Doing, Effect, Health};
use crate::world::{Happens, Weather, World};

/// The coordinator among the ends of a link.
pub const COORDINATOR: u64 = 0;

/// What one end says does not reach the other for a while.
#[derive(Clone, Copy)]
pub struct Partition {
    pub from: u64,
    pub to: u64,
    pub until_ms: u64,
}

impl World {
    fn cut(&self, from: u64, to: u64) -> bool {
        let cut = |it: &Partition| it.from == from && it.to == to && it.until_ms > self.now_ms;
        self.partitions.iter().any(cut)
    }

    /// Zero, one or two deliveries, in any order.
    fn transmit(&mut self, from: u64, to: u64, make: impl Fn() -> Happens) {
        if self.cut(from, to) {
            return;
        }
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
            let slowest_ms = match self.setting.weather {
                _ if !self.random.once_in(20) => 40,
                Weather::Lossy => 1_000,
                Weather::Hostile => 3_000,
            };
            let delay_ms = self.random.between(1, slowest_ms);
            self.after(delay_ms, make());
        }
    }

    pub fn tell(&mut self, to: &ToWorker) {
        let incarnation = to.incarnation.0;
        self.transmit(COORDINATOR, incarnation, || Happens::ToWorker(to.clone()));
    }

    pub fn say(&mut self, incarnation: u64, message: WorkerMessage) {
        let from = self.workers[&incarnation].envelope(message);
        self.transmit(incarnation, COORDINATOR, || {
            Happens::ToCoordinator(from.clone())
        });
    }

    pub fn effects(&mut self, incarnation: u64, effects: Vec<Effect>) {
        for effect in effects {
            let generation = self.workers[&incarnation].generation;
            match effect {
                Effect::Say(message) => self.say(incarnation, message),
                Effect::Collective { step } => self.collective(incarnation, generation, step),
                Effect::Load => {
                    let delay_ms = self.random.between(50, 400);
                    self.after(delay_ms, Happens::Loaded { incarnation });
                }
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

    /// A collective ends when all ranks take part and all links hold; otherwise those who wait give up.
    fn collective(&mut self, incarnation: u64, generation: u64, step: u64) {
        let world = self.workers[&incarnation].world as usize;
        let here = self.collectives.entry((generation, step)).or_default();
        assert!(
            here.insert(incarnation),
            "step {step} computed twice in one generation"
        );
        assert!(here.len() <= world, "M1: two generations of one number");
        let here = here.clone();
        self.after(
            self.policy.elastic.collective_timeout_ms,
            Happens::CollectiveTimeout {
                incarnation,
                generation,
                step,
            },
        );
        let whole = here
            .iter()
            .all(|from| here.iter().all(|to| !self.cut(*from, *to)));
        if here.len() < world || !whole {
            return;
        }
        // Who has left it in the meantime is not there to answer.
        let waits = |it: &u64| match self.workers[it].doing {
            Doing::Connecting => step == 0,
            Doing::Computing { step: at } => at == step,
            _ => false,
        };
        let alive = |it: &u64| {
            let worker = &self.workers[it];
            worker.generation == generation && worker.health != Health::Dead && waits(it)
        };
        if !here.iter().all(alive) {
            return;
        }
        let moved =
            (step == 0).then(|| self.moved_state(&here.iter().copied().collect::<Vec<_>>()));
        for incarnation in here {
            let (low, high) = if step == 0 { (10, 80) } else { self.step_ms };
            let delay_ms = self.random.between(low, high);
            self.after(
                delay_ms,
                Happens::Reduced {
                    incarnation,
                    generation,
                    step,
                    moved: moved.flatten(),
                },
            );
        }
    }

    /// The state that the shards of the Form's base make up, each from who is said to have it; `None` where all have read it
    /// from a checkpoint.
    fn moved_state(&self, members: &[u64]) -> Option<u64> {
        let first = &self.workers[members.first()?];
        for it in members {
            assert_eq!(self.workers[it].base, first.base, "one base for all");
        }
        let base = first.base.as_ref()?;
        let of_rank = |rank: Rank| {
            let mut all = members.iter().map(|it| &self.workers[it]);
            all.find(|it| it.rank == rank.0).expect("ranks are members")
        };
        for (shard, copies) in base.shards.iter().enumerate() {
            for holder in [copies.owner, copies.mirror].into_iter().flatten() {
                let holder = of_rank(holder);
                let cut = holder
                    .cuts
                    .iter()
                    .find(|it| it.generation == base.generation.0)
                    .expect("it has shards of this cut");
                assert!(cut.has_shard(shard as u32), "it has this shard");
                assert_eq!(
                    (cut.applied, cut.state),
                    (first.committed, self.oracle.state_after(first.committed)),
                    "the shard is that of an undisturbed run at the commit"
                );
            }
            assert!(copies.source().is_some(), "every shard has a copy");
        }
        Some(self.oracle.state_after(first.committed))
    }

    pub fn collective_timeout(&mut self, incarnation: u64, generation: u64, step: u64) {
        if !self.wake(incarnation) || self.workers[&incarnation].health != Health::Well {
            return;
        }
        let here = self.collectives.get(&(generation, step));
        let here = here.cloned().unwrap_or_default();
        let members = self.disk.members();
        // Whom it misses, or whom it cannot reach; at times it cannot tell.
        let missed = members.iter().enumerate().filter(|(_, it)| {
            !here.contains(&it.0) || self.cut(it.0, incarnation) || self.cut(incarnation, it.0)
        });
        let missed: Vec<Rank> = missed.map(|(rank, _)| Rank(rank as u32)).collect();
        let suspect = missed.first().copied().filter(|_| !self.random.once_in(4));
        let worker = self.workers.get_mut(&incarnation).expect("awake");
        let effect = worker.gives_up(generation, step, suspect);
        self.effects(incarnation, effect.into_iter().collect());
    }
}
