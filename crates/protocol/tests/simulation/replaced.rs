//! A coordinator that sleeps, is replaced, and wakes up without knowing: it hears some of what workers say, takes its deadlines
//! for passed, speaks and writes as if the job were its own. The fence stops it (`protocol::Fence`).

use protocol::{Action, Event, Fence, FromWorker, Job};

use crate::world::{FAULTS_END_MS, Happens, Planted, World};

/// The one that was replaced.
pub struct Replaced {
    job: Job,
    awake: bool,
}

impl World {
    /// The next life begins soon; this one goes on in it.
    pub fn coordinator_sleeps(&mut self) {
        let Some(job) = self.job.take() else { return };
        if self.told {
            println!("{} the coordinator sleeps", self.now_ms);
        }
        let awake = false;
        self.replaced = Some(Replaced { job, awake });
        let begins_ms = self.random.between(50, 500);
        self.after(begins_ms, Happens::Start);
        let sleeps_ms = self.random.between(begins_ms, 4_000);
        self.after(sleeps_ms, Happens::Woken);
    }

    pub fn woken(&mut self) {
        if let Some(it) = &mut self.replaced {
            it.awake = true;
            self.wakes += 1;
            self.handle_replaced(Event::Tick);
        }
    }

    /// What workers say reaches it, too, at times.
    pub fn overhears(&mut self, from: &FromWorker) {
        if self.replaced.as_ref().is_some_and(|it| it.awake) && self.random.once_in(2) {
            self.handle_replaced(Event::Message(from.clone()));
        }
    }

    fn handle_replaced(&mut self, event: Event) {
        let Some(it) = &mut self.replaced else { return };
        let fence = it.job.spec().fence;
        let actions = it.job.handle(self.now_ms, event);
        for action in actions {
            if self.told {
                println!("{} -> replaced {action:?}", self.now_ms);
            }
            match action {
                Action::Journal(record) if self.planted(Planted::JournalOpenToAll) => {
                    self.disk.append(record, &self.oracle);
                }
                // It learns here that it was replaced, and ends.
                Action::Journal(_) | Action::CommitCheckpoint { .. } => {
                    assert!(fence < self.disk.fence(), "M2: nobody replaced it");
                    self.refused += 1;
                    self.replaced = None;
                    return;
                }
                Action::Send(to) => self.tell(&to),
                Action::Done(_) => {
                    self.replaced = None;
                    return;
                }
                _ => {}
            }
        }
        // Somebody finds it in the end.
        if self.now_ms >= FAULTS_END_MS {
            self.replaced = None;
        }
    }

    /// Whether a worker believes a word under `fence`.
    pub fn believes(&mut self, incarnation: u64, fence: Fence) -> bool {
        let open = self.planted(Planted::WorkersOpenToAll);
        let worker = self.workers.get_mut(&incarnation).expect("it is awake");
        let newest = worker.fence;
        if !worker.fence.admits(fence) && !open {
            return false;
        }
        assert!(
            fence >= newest,
            "M1: a word under fence {fence} was acted on after one under {newest}"
        );
        true
    }

    fn planted(&self, fault: Planted) -> bool {
        self.setting.planted == fault
    }
}
