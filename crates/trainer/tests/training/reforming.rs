//! Generations that follow one another within a run: ranks are lost at every moment of a step, leave, and come. Whatever happens,
//! the steps after a change have the bits of a run that resumes, in the new world, from a checkpoint of the last commit.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::support::{Folder, Run, Script, run};
use collective::Collective;
use collective::tcp::Rendezvous;
use model::Device;
use spec::Spec;
use trainer::plan::Peers;
use trainer::{
    End, EvaluationRow, GateClosed, Held, Membership, Next, Past, Reformation, Sample,
    SavedReporter, Setup, Sharding, StepGate, StepReport, TrainError, Trainer, Verdict,
};

const PATIENCE: Duration = Duration::from_mins(1);
const STEPS: u64 = 8;

/// When a member dies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Moment {
    /// Before it computes the step; the others wait for it in the reduction.
    InStep,
    /// It has prepared the step, and not all others are known to have.
    Prepared,
    /// The step was committed and all others hear so; they miss it in the gather.
    Heard,
    /// The step was committed and nobody hears so.
    Unheard,
    /// The step was committed and every second member hears so.
    HalfHeard,
    /// In the formation of the generation after that step.
    Forming,
}

/// What happens to a run.
#[derive(Clone, Copy, Debug)]
enum Change {
    Death {
        step: u64,
        moment: Moment,
        member: usize,
    },
    /// At the boundary after the step.
    Leave {
        after: u64,
        member: usize,
    },
    Join {
        after: u64,
        member: usize,
    },
}

/// A coordinator in a few lines: votes, commits, forms generations.
struct Director {
    changes: Vec<Change>,
    sharding: Sharding,
    /// Where a run goes on from when a shard is lost.
    checkpoint: Option<(u64, PathBuf)>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    generation: u64,
    /// By rank.
    members: Vec<usize>,
    /// The last generation that all its members had entered.
    past: (u64, Vec<usize>),
    committed: u64,
    prepared: BTreeSet<usize>,
    ready: BTreeSet<usize>,
    dead: BTreeSet<usize>,
    /// Members that shall be in the next generation.
    joining: BTreeSet<usize>,
    /// Changes that happened, with the generation that they happened in.
    past_changes: BTreeMap<usize, u64>,
    /// With the generation that they came from.
    arrived: BTreeMap<usize, (u64, String)>,
    broken: bool,
    /// Committed steps with the world they were made in.
    reports: Vec<(usize, StepReport)>,
}

impl Director {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        until: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        self.changed.notify_all();
        let deadline = Instant::now() + PATIENCE;
        while !until(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "nothing happens any more: {state:?}");
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
        state
    }

    /// The number of the first change that is due and `wanted`.
    fn due(&self, state: &State, wanted: impl Fn(&Change) -> bool) -> Option<usize> {
        let due = self.changes.iter().enumerate();
        due.into_iter()
            .find(|(number, change)| !state.past_changes.contains_key(number) && wanted(change))
            .map(|(number, _)| number)
    }

    /// Kills `who` if it is its time, and with it all that die at the same moment.
    fn dies(&self, state: &mut State, at: u64, when: Moment, who: usize) -> bool {
        let is_now = |change: &Change| match *change {
            Change::Death {
                step,
                moment,
                member,
            } if step == at && moment == when => Some(member),
            _ => None,
        };
        if self
            .due(state, |change| is_now(change) == Some(who))
            .is_none()
        {
            return false;
        }
        for (number, change) in self.changes.iter().enumerate() {
            if let Some(member) = is_now(change) {
                let generation = state.generation;
                state.past_changes.insert(number, generation);
                state.dead.insert(member);
            }
        }
        state.broken = true;
        self.changed.notify_all();
        true
    }
}

fn gone() -> GateClosed {
    GateClosed {
        reason: "forming anew".into(),
    }
}

struct Member {
    id: usize,
    director: Arc<Director>,
}

impl Member {
    /// Waits for the next generation and enters it.
    fn enter(&self) -> Option<Reformation> {
        let door = Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
        let director = &self.director;
        let mut state = director.state();
        if state.dead.contains(&self.id) {
            return None;
        }
        let before = state.generation;
        state.arrived.insert(self.id, (before, door.address()));
        let living: BTreeSet<usize> = state.members.iter().copied().collect();
        let living: BTreeSet<usize> = living.union(&state.joining).copied().collect();
        // Whoever is here last forms the generation.
        let complete = living.iter().all(|id| {
            state.dead.contains(id) || state.arrived.get(id).is_some_and(|it| it.0 == before)
        });
        if state.broken && complete {
            state.members = living.difference(&state.dead).copied().collect();
            state.generation += 1;
            state.broken = false;
            state.joining.clear();
            state.prepared.clear();
            state.ready.clear();
        }
        let state = director.wait(state, |state| state.generation > before);
        let generation = state.generation;
        let rank = state.members.iter().position(|&id| id == self.id).unwrap();
        let addresses: Vec<String> = state
            .members
            .iter()
            .map(|id| state.arrived[id].1.clone())
            .collect();
        let (past_generation, old) = &state.past;
        let rank_now = |old_rank: usize| state.members.iter().position(|id| *id == old[old_rank]);
        let shards = (0..old.len()).map(|shard| {
            let mirror =
                (director.sharding.mirror && old.len() > 1).then(|| (shard + 1) % old.len());
            [rank_now(shard), mirror.and_then(rank_now)]
        });
        let past = Past {
            generation: *past_generation,
            shards: shards.collect(),
        };
        let lost = past.shards.contains(&[None, None]);
        let mut committed = state.committed;
        drop(state);
        let collective: Box<dyn Collective> = if addresses.len() == 1 {
            Box::new(collective::single(generation))
        } else {
            let deadline = Instant::now() + PATIENCE;
            Box::new(
                door.connect(rank, &addresses, generation, [7; 32], deadline)
                    .unwrap(),
            )
        };
        let mut state = director.state();
        let resume = if lost {
            let (step, path) = director
                .checkpoint
                .clone()
                .expect("a checkpoint to go back to");
            committed = step;
            state.committed = step;
            Some(path)
        } else {
            None
        };
        if director.dies(&mut state, committed, Moment::Forming, self.id) {
            return None;
        }
        Some(Reformation {
            membership: membership(collective, generation, resume, director.sharding),
            committed,
            apply: true,
            past: (!lost).then_some(past),
        })
    }
}

fn membership(
    collective: Box<dyn Collective>,
    generation: u64,
    resume: Option<PathBuf>,
    sharding: Sharding,
) -> Membership {
    Membership {
        collective,
        step_deadline: PATIENCE,
        checkpoints: PathBuf::new(),
        resume,
        generation,
        sharding,
        pulse: Arc::default(),
    }
}

impl StepGate for Member {
    fn next(&mut self) -> Result<Next, GateClosed> {
        let director = &self.director;
        let mut state = director.state();
        if state.dead.contains(&self.id) {
            return Err(gone());
        }
        state.ready.insert(self.id);
        let mut state = director.wait(state, |state| {
            state.broken || state.ready.len() == state.members.len()
        });
        if state.broken {
            return Err(gone());
        }
        state.past = (state.generation, state.members.clone());
        let committed = state.committed;
        if committed == STEPS {
            return Ok(Next::Finish);
        }
        let boundary = director.due(&state, |change| {
            matches!(*change, Change::Leave { after, .. } | Change::Join { after, .. } if after == committed)
        });
        if let Some(number) = boundary {
            match director.changes[number] {
                Change::Leave { member, .. } => state.dead.insert(member),
                Change::Join { member, .. } => state.joining.insert(member),
                Change::Death { .. } => unreachable!("no boundary"),
            };
            let generation = state.generation;
            state.past_changes.insert(number, generation);
            state.broken = true;
            director.changed.notify_all();
            return Err(gone());
        }
        if director.dies(&mut state, committed + 1, Moment::InStep, self.id) {
            return Err(gone());
        }
        Ok(Next::Step(committed + 1))
    }

    fn prepared(&mut self, report: &StepReport) -> Result<Verdict, GateClosed> {
        let director = &self.director;
        let mut state = director.state();
        let step = report.step;
        let dead = state.dead.contains(&self.id);
        if dead || director.dies(&mut state, step, Moment::Prepared, self.id) || state.broken {
            return Err(gone());
        }
        state.prepared.insert(self.id);
        if state.prepared.len() == state.members.len() {
            state.committed = step;
            state.prepared.clear();
            // A next step is voted on by who has heard of this one.
            let world = state.members.len();
            state.reports.push((world, report.clone()));
        }
        let mut state = director.wait(state, |state| state.broken || state.committed >= step);
        if state.committed < step {
            return Err(gone());
        }
        // A step that the run went back over is heard of as any other.
        let generation = state.generation;
        let happens = |number: usize| {
            state
                .past_changes
                .get(&number)
                .is_none_or(|it| *it == generation)
        };
        let death = (0..)
            .zip(&director.changes)
            .find_map(|(number, change)| match *change {
                Change::Death {
                    step: at,
                    moment,
                    member,
                } if at == step && happens(number) => Some((moment, member)),
                _ => None,
            });
        let heard = match death {
            Some((Moment::Unheard, member)) => {
                director.dies(&mut state, step, Moment::Unheard, member);
                false
            }
            Some((Moment::HalfHeard, member)) => {
                director.dies(&mut state, step, Moment::HalfHeard, member);
                self.id.is_multiple_of(2) && self.id != member
            }
            Some((Moment::Heard, member)) => {
                director.dies(&mut state, step, Moment::Heard, member);
                self.id != member
            }
            _ => true,
        };
        if !heard {
            return Err(gone());
        }
        Ok(Verdict {
            apply: report.finite,
            save: false,
            evaluate: false,
            last: false,
        })
    }

    fn evaluated(&mut self, _row: &EvaluationRow, _samples: &[Sample]) -> Result<(), GateClosed> {
        Ok(())
    }

    fn reform(
        &mut self,
        why: &TrainError,
        held: &[Held],
    ) -> Result<Option<Reformation>, GateClosed> {
        let state = self.director.state();
        let newest = held.first().unwrap();
        let behind = state.committed.saturating_sub(newest.applied);
        assert!(
            behind == 0 || newest.gradient,
            "{why}: {held:?} at {}",
            state.committed
        );
        drop(state);
        Ok(self.enter())
    }

    fn saved_reporter(&mut self) -> SavedReporter {
        Box::new(|_| ())
    }

    fn progress(&mut self, _phase: &str, _done: u64, _total: u64) {}
}

/// A run of members `0..world` to which `changes` happen: the committed steps, each with its world.
fn changing(
    spec: &Spec,
    world: usize,
    sharding: Sharding,
    changes: &[Change],
    checkpoint: Option<(u64, PathBuf)>,
) -> Vec<(usize, StepReport)> {
    let members: Vec<usize> = (0..world).collect();
    let director = Arc::new(Director {
        changes: changes.to_vec(),
        sharding,
        checkpoint,
        state: Mutex::new(State {
            generation: 1,
            past: (1, members.clone()),
            members,
            committed: 0,
            prepared: BTreeSet::new(),
            ready: BTreeSet::new(),
            dead: BTreeSet::new(),
            joining: BTreeSet::new(),
            past_changes: BTreeMap::new(),
            arrived: BTreeMap::new(),
            broken: false,
            reports: Vec::new(),
        }),
        changed: Condvar::new(),
    });
    let doors: Vec<Rendezvous> = (0..world)
        .map(|_| Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap())
        .collect();
    let addresses: Vec<String> = doors.iter().map(Rendezvous::address).collect();
    let joiners = changes.iter().filter_map(|change| match *change {
        Change::Join { member, .. } => Some(member),
        _ => None,
    });
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (id, door) in doors.into_iter().enumerate() {
            let (director, addresses) = (Arc::clone(&director), &addresses);
            threads.push(scope.spawn(move || {
                let collective: Box<dyn Collective> = if world == 1 {
                    Box::new(collective::single(1))
                } else {
                    Box::new(
                        door.connect(id, addresses, 1, [7; 32], Instant::now() + PATIENCE)
                            .unwrap(),
                    )
                };
                let setup =
                    Setup::load(spec, &Device::flex(), Peers::NONE, &mut |_, _, _| Ok(())).unwrap();
                let membership = membership(collective, 1, None, sharding);
                let (trainer, _) = Trainer::new(setup, membership, &mut |_, _, _| Ok(())).unwrap();
                (id, trainer.run(&mut Member { id, director }))
            }));
        }
        for id in joiners {
            let director = Arc::clone(&director);
            threads.push(scope.spawn(move || {
                drop(director.wait(director.state(), |state| state.joining.contains(&id)));
                let mut member = Member { id, director };
                let setup =
                    Setup::load(spec, &Device::flex(), Peers::NONE, &mut |_, _, _| Ok(())).unwrap();
                let Some(reformation) = member.enter() else {
                    return (id, Err(gone().into()));
                };
                let (trainer, _) =
                    Trainer::join(setup, reformation, &mut |_, _, _| Ok(())).unwrap();
                (id, trainer.run(&mut member))
            }));
        }
        for thread in threads {
            let (id, ended) = thread.join().unwrap();
            if director.state().dead.contains(&id) {
                assert!(
                    matches!(
                        ended,
                        Err(TrainError::Closed(_) | TrainError::Collective(_))
                    ),
                    "member {id}: {ended:?}"
                );
            } else {
                assert!(matches!(ended, Ok(End::Finished)), "member {id}: {ended:?}");
            }
        }
    });
    let mut state = director.state();
    std::mem::take(&mut state.reports)
}

fn training(folder: &Folder, dtype: &str) -> Spec {
    folder.spec(&format!(
        "objective = {{ kind = \"cal_dpo\", beta = 0.1 }}\noptimizer.learning_rate = 1e-3\nmodel.dtype = {dtype:?}\n\
         train = {{ steps = {STEPS}, batch_pairs = 8, micro_batch_tokens = 96, compare_every_steps = 2 }}"
    ))
}

/// Resumed runs in every world from checkpoints of every step of runs in every world.
struct Oracle {
    folder: Folder,
    spec: Spec,
    /// With mirrors.
    sharding: Sharding,
    runs: Mutex<Runs>,
}

/// By the worlds that they went through: after which step, how many ranks.
type Runs = BTreeMap<Vec<(u64, usize)>, Arc<Run>>;

impl Oracle {
    fn new() -> Self {
        Self::of("f32", false)
    }

    /// In bf16 several ranks have their masters in shards, and one has them in its model.
    fn of(dtype: &str, gradients: bool) -> Self {
        let folder = match dtype {
            "bf16" => Folder::even(21),
            _ => Folder::new(21),
        };
        Self {
            spec: training(&folder, dtype),
            sharding: Sharding {
                mirror: true,
                gradients,
                offload: false,
            },
            folder,
            runs: Mutex::default(),
        }
    }

    /// A run that begins in a world and goes on in others after these steps, each time from a checkpoint.
    fn run(&self, worlds: &[(u64, usize)]) -> Arc<Run> {
        if let Some(run) = self.runs.lock().unwrap().get(worlds) {
            return Arc::clone(run);
        }
        let (last, before) = worlds.split_last().unwrap();
        let resume = (!before.is_empty()).then(|| self.run(before).checkpoints[&last.0].clone());
        let script = Script {
            checkpoints: self.folder.path(&format!("checkpoints-{worlds:?}")),
            resume,
            save: true,
            // Whether others could have saved its shards changes nothing for a run without losses.
            sharding: Sharding {
                mirror: false,
                ..self.sharding
            },
            ..Script::default()
        };
        let done = Arc::new(run(&self.spec, last.1, &script));
        let kept = Arc::clone(&done);
        self.runs.lock().unwrap().insert(worlds.to_vec(), kept);
        done
    }

    /// Compares the steps of a changing run with stretches of worlds: from after a step on, so many ranks.
    fn check(&self, found: &[(usize, StepReport)], worlds: &[(u64, usize)], what: &str) {
        let steps: Vec<u64> = found.iter().map(|(_, report)| report.step).collect();
        assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "{what}");
        for (index, &(from, world)) in worlds.iter().enumerate() {
            let until = worlds.get(index + 1).map_or(STEPS, |&(step, _)| step);
            let run = self.run(&worlds[..=index]);
            for expected in run.reports.iter().filter(|report| report.step <= until) {
                let (found_world, found) = &found[expected.step as usize - 1];
                assert!(expected.step > from);
                assert_eq!(*found_world, world, "{what}, step {}", expected.step);
                assert_eq!(
                    found.bits(),
                    expected.bits(),
                    "{what}, step {}",
                    expected.step
                );
            }
        }
    }
}

#[test]
fn m4_a_rank_lost_at_any_moment_costs_no_committed_step_and_no_bit() {
    lost_at_any_moment(&Oracle::new(), 2..=4);
}

#[test]
fn m4_nor_does_it_where_masters_are_in_shards() {
    lost_at_any_moment(&Oracle::of("bf16", false), 2..=3);
}

#[test]
fn m4_nor_does_it_where_gradients_are_in_shards() {
    lost_at_any_moment(&Oracle::of("bf16", true), 2..=3);
    lost_at_any_moment(&Oracle::of("f32", true), 3..=3);
}

fn lost_at_any_moment(oracle: &Oracle, worlds: RangeInclusive<usize>) {
    for world in worlds {
        for member in 0..world {
            for moment in [
                Moment::InStep,
                Moment::Prepared,
                Moment::Heard,
                Moment::Unheard,
                Moment::HalfHeard,
            ] {
                let step = 4;
                let change = Change::Death {
                    step,
                    moment,
                    member,
                };
                let found = changing(&oracle.spec, world, oracle.sharding, &[change], None);
                // What was not committed is done again by the others.
                let last = match moment {
                    Moment::InStep | Moment::Prepared => step - 1,
                    _ => step,
                };
                let what = format!("world of {world}, {change:?}");
                oracle.check(&found, &[(0, world), (last, world - 1)], &what);
            }
        }
    }
}

#[test]
fn m4_a_rank_lost_while_the_next_generation_forms_costs_no_bit_either() {
    lost_while_forming(&Oracle::new());
    lost_while_forming(&Oracle::of("bf16", false));
}

fn lost_while_forming(oracle: &Oracle) {
    // Members 1 and 3 are no neighbors, so every shard has a holder all the time.
    for moment in [Moment::InStep, Moment::Heard, Moment::HalfHeard] {
        let last = if moment == Moment::InStep { 3 } else { 4 };
        let changes = [
            Change::Death {
                step: 4,
                moment,
                member: 1,
            },
            Change::Death {
                step: last,
                moment: Moment::Forming,
                member: 3,
            },
        ];
        let found = changing(&oracle.spec, 4, oracle.sharding, &changes, None);
        oracle.check(&found, &[(0, 4), (last, 2)], &format!("{changes:?}"));
    }
    // A rank alone is joined by one that does not come: its masters were on their way out of its model.
    let changes = [
        Change::Join {
            after: 3,
            member: 1,
        },
        Change::Death {
            step: 3,
            moment: Moment::Forming,
            member: 1,
        },
    ];
    let found = changing(&oracle.spec, 1, oracle.sharding, &changes, None);
    oracle.check(&found, &[(0, 1)], "joined by nobody");
}

#[test]
fn ranks_leave_and_come_at_the_boundaries_of_steps() {
    leave_and_come(&Oracle::new());
    leave_and_come(&Oracle::of("bf16", false));
    leave_and_come(&Oracle::of("bf16", true));
}

fn leave_and_come(oracle: &Oracle) {
    let changes = [
        Change::Join {
            after: 2,
            member: 2,
        },
        Change::Leave {
            after: 4,
            member: 0,
        },
        Change::Join {
            after: 6,
            member: 5,
        },
    ];
    let found = changing(&oracle.spec, 2, oracle.sharding, &changes, None);
    oracle.check(
        &found,
        &[(0, 2), (2, 3), (4, 2), (6, 3)],
        "come, leave, come",
    );
    // A single worker has no mirror; it can be joined, and be left alone again.
    let changes = [
        Change::Join {
            after: 3,
            member: 1,
        },
        Change::Death {
            step: 6,
            moment: Moment::Heard,
            member: 0,
        },
    ];
    let found = changing(&oracle.spec, 1, oracle.sharding, &changes, None);
    oracle.check(&found, &[(0, 1), (3, 2), (6, 1)], "joined and left alone");
}

#[test]
fn m4_a_shard_without_a_living_copy_takes_the_run_back_to_a_checkpoint() {
    back_to_a_checkpoint(&Oracle::new());
    back_to_a_checkpoint(&Oracle::of("bf16", false));
}

fn back_to_a_checkpoint(oracle: &Oracle) {
    let lost = |mirror: bool, changes: &[Change]| {
        let checkpoint = oracle.run(&[(0, 3)]).checkpoints[&2].clone();
        let sharding = Sharding {
            mirror,
            ..oracle.sharding
        };
        let checkpoint = Some((2, checkpoint));
        let mut found = changing(&oracle.spec, 3, sharding, changes, checkpoint);
        // Steps that the run went back over were committed twice; the surviving history has the later ones.
        let survivors = found.len() - (STEPS as usize - 2);
        drop(found.drain(2..survivors));
        found
    };
    // Owner and mirror of a shard at once; and without mirrors, any rank.
    let both = [0, 1].map(|member| Change::Death {
        step: 5,
        moment: Moment::InStep,
        member,
    });
    oracle.check(&lost(true, &both), &[(0, 3), (2, 1)], "owner and mirror");
    let one = [Change::Death {
        step: 5,
        moment: Moment::Unheard,
        member: 2,
    }];
    oracle.check(&lost(false, &one), &[(0, 3), (2, 2)], "no mirrors");
}

#[test]
fn m4_an_interruption_without_a_loss_costs_no_bit() {
    interrupted(&Oracle::new());
    interrupted(&Oracle::of("bf16", false));
}

fn interrupted(oracle: &Oracle) {
    for world in 1..=3 {
        for moment in [Moment::Unheard, Moment::HalfHeard] {
            // Nobody is of this number.
            let change = Change::Death {
                step: 4,
                moment,
                member: 9,
            };
            let found = changing(&oracle.spec, world, oracle.sharding, &[change], None);
            let what = format!("world of {world}, {change:?}");
            oracle.check(&found, &[(0, world), (4, world)], &what);
        }
    }
}
