//! A deterministic simulation of the control plane: coordinators and workers over a network that loses, doubles, delays
//! and reorders, with crashes between any two actions. Everything a run writes or says is checked where it happens
//! (`disk`, `worker`, `world`); the invariants' names stand in the assertions.
//!
//! `SIMULATION_SEED=17` runs one seed, `SIMULATION_SEEDS=100000` that many.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod disk;
mod random;
mod worker;
mod world;

use world::{Weather, World};

/// Prints the seed when its run fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "again with: SIMULATION_SEED={} cargo test -p protocol --test simulation",
                self.0
            );
        }
    }
}

fn run(seed: u64, weather: Weather) -> World {
    let _seed = Seed(seed);
    let mut world = World::new(seed, weather);
    world.run();
    world
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

fn seeds() -> std::ops::Range<u64> {
    match setting("SIMULATION_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..setting("SIMULATION_SEEDS").unwrap_or(400),
    }
}

#[test]
fn every_run_completes_with_each_step_committed_once_whatever_fails() {
    let (mut faults, mut events, mut generations) = (0, 0, 0);
    let (mut stopped, mut kept) = (0, 0);
    for seed in seeds() {
        let world = run(seed, Weather::Hostile);
        faults += world.faults;
        events += world.events;
        generations += world.disk.generation().0;
        stopped += u64::from(world.oracle.stops_after.is_some());
        kept += u64::from(world.keeps_an_older_checkpoint());
    }
    println!(
        "{:?}: {events} events, {faults} faults, {generations} generations, {stopped} stopped early, {kept} with a best \
         checkpoint before the last",
        seeds()
    );
    // A simulation in which nothing goes wrong proves nothing.
    let count = seeds().end - seeds().start;
    assert!(count == 1 || (faults > 10 * count && generations > 2 * count));
    assert!(count < 100 || (5 * stopped > count && 10 * kept > count));
}

#[test]
fn a_lost_message_costs_heartbeats_and_never_a_generation() {
    let mut lost = 0;
    for seed in seeds() {
        let world = run(seed, Weather::Lossy);
        lost += world.faults;
        assert_eq!(
            world.disk.generation().0,
            1,
            "seed {seed} lost a worker to the network"
        );
    }
    assert!(
        lost > seeds().end - seeds().start,
        "hardly anything was lost"
    );
}

#[test]
fn a_seed_tells_the_whole_story() {
    let story = |seed| {
        let world = run(seed, Weather::Hostile);
        (
            format!("{:?}", world.disk.journal),
            world.events,
            world.faults,
        )
    };
    assert_eq!(story(3), story(3));
    assert_ne!(story(3), story(4));
}
