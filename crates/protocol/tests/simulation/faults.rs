//! Processes: who is launched, who dies, hangs, is told to leave or is cut off.

use protocol::{Event, Incarnation};

use crate::network::{COORDINATOR, Partition};
use crate::random::mix;
use crate::worker::{Health, Worker};
use crate::world::{Happens, World};

impl World {
    pub fn launch(&mut self) {
        let well = |it: &&Worker| it.health == Health::Well && !it.leaving;
        let alive = self.workers.values().filter(well).count();
        // Workers are replaced whenever somebody gets to it, at times by more than there were.
        let wanted = if self.faulty() && self.random.once_in(10) {
            self.policy.elastic.workers_max
        } else if !self.faulty() || self.life <= 1 && self.now_ms < 100 || self.random.once_in(8) {
            self.policy.world
        } else {
            0
        };
        for _ in alive..wanted as usize {
            // In any order, so that ranks do not follow age.
            let incarnation = mix(self.workers.len() as u64, self.life) | 1;
            let mut worker = Worker::new(incarnation);
            worker.heard_ms = self.now_ms;
            self.workers.insert(incarnation, worker);
            let delay_ms = self.random.between(1, 100);
            self.after(delay_ms, Happens::Beat { incarnation });
        }
        self.after(200, Happens::Launcher);
    }

    pub fn health(&self, incarnation: u64) -> Option<Health> {
        self.workers.get(&incarnation).map(|it| it.health)
    }

    /// Whether a worker's process runs now; a pause that is over is over.
    pub fn wake(&mut self, incarnation: u64) -> bool {
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

    pub fn exit(&mut self, incarnation: u64) {
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

    pub fn fault(&mut self) {
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
        let kind = self.random.between(0, 14);
        match (kind, victims.as_slice()) {
            (0, _) if self.job.is_some() => self.coordinator_dies(),
            (1, _) if self.random.once_in(3) => {
                self.handle(Event::StopRequested {
                    reason: "a person asked".into(),
                });
            }
            (14, _) if self.job.is_some() && self.replaced.is_none() => self.coordinator_sleeps(),
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
            (10..=13, [_, ..]) => self.further_fault(kind, &victims),
            _ => self.faults -= 1,
        }
        let delay_ms = self.random.between(100, 2_000);
        self.after(delay_ms, Happens::Fault);
    }

    fn further_fault(&mut self, kind: u64, victims: &[u64]) {
        let mut draw = || victims[self.random.between(0, victims.len() as u64 - 1) as usize];
        let (one, other) = (draw(), draw());
        let until_ms = self.now_ms + self.random.between(50, 4_000);
        let mut cut = |from, to| self.partitions.push(Partition { from, to, until_ms });
        match kind {
            // A node with both.
            10 => {
                self.exit(one);
                self.exit(other);
            }
            11 => {
                self.workers.get_mut(&one).expect("a victim").leaving = true;
                self.after(2_000, Happens::Evicted { incarnation: one });
            }
            12 if self.random.once_in(2) => cut(one, COORDINATOR),
            12 => cut(COORDINATOR, one),
            _ => cut(one, other),
        }
    }
}
