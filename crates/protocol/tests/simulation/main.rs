//! A deterministic simulation of the control plane: coordinators and workers over a network that loses, doubles, delays,
//! reorders and is cut, with crashes between any two actions. Everything a run writes or says is checked where it happens
//! (`disk`, `worker`, `coordinator`, `network`); the invariants' names stand in the assertions. What a seed draws: the size of
//! the job, its cadences and limits, every fault.
//!
//! `SIMULATION_SEED=17` runs one seed, `SIMULATION_SEEDS=100000` that many; `SIMULATION_STORY=1` prints all that happens.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod coordinator;
mod disk;
mod faults;
mod hearing;
mod network;
mod random;
mod worker;
mod world;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use world::{Planted, Setting, Weather, World};

/// A job that a loss ends, in all weathers.
const FIXED: Setting = Setting {
    weather: Weather::Hostile,
    elastic: false,
    planted: Planted::Nothing,
};

/// A job that goes on without lost members.
const ELASTIC: Setting = Setting {
    elastic: true,
    ..FIXED
};

/// Prints the seed when its run fails.
struct Seed(u64, &'static str);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "again with: SIMULATION_SEED={} cargo test -p protocol --test simulation {} -- --exact --nocapture",
                self.0, self.1
            );
        }
    }
}

fn run(seed: u64, setting: Setting, test: &'static str) -> World {
    let _seed = Seed(seed, test);
    let mut world = World::new(seed, setting);
    world.run();
    world
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

fn seeds() -> Range<u64> {
    match number("SIMULATION_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIMULATION_SEEDS").unwrap_or(400),
    }
}

/// What `measure` says of every seed's world, in two threads.
fn each<T: Send>(
    setting: Setting,
    test: &'static str,
    measure: impl Fn(World) -> T + Sync,
) -> Vec<T> {
    let half = |parity: u64| {
        let mine = seeds().filter(|seed| seed % 2 == parity);
        let measured = mine.map(|seed| measure(run(seed, setting, test)));
        measured.collect::<Vec<T>>()
    };
    let (mut even, odd) = std::thread::scope(|scope| {
        let even = scope.spawn(|| half(0));
        let odd = scope.spawn(|| half(1));
        (even.join().unwrap(), odd.join().unwrap())
    });
    even.extend(odd);
    even
}

#[test]
fn every_run_completes_with_each_step_committed_once_whatever_fails() {
    let test = "every_run_completes_with_each_step_committed_once_whatever_fails";
    let measured = each(FIXED, test, |world| {
        [
            world.events,
            world.faults,
            world.disk.generation().0,
            u64::from(world.oracle.stops_after.is_some()),
            u64::from(world.keeps_an_older_checkpoint()),
        ]
    });
    let sum = |place: usize| measured.iter().map(|it| it[place]).sum::<u64>();
    let [events, faults, generations, stopped, kept] = std::array::from_fn(sum);
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
fn m4_an_elastic_run_goes_on_without_lost_members_and_rewinds_only_when_a_shard_is_lost() {
    let test =
        "m4_an_elastic_run_goes_on_without_lost_members_and_rewinds_only_when_a_shard_is_lost";
    let measured = each(ELASTIC, test, |world| {
        [
            world.events,
            world.faults,
            world.disk.generation().0,
            world.life,
            world.carried,
            world.admitted,
            world.disk.rewinds() as u64,
            world.now_ms,
        ]
    });
    let sum = |place: usize| measured.iter().map(|it| it[place]).sum::<u64>();
    let [
        events,
        faults,
        generations,
        lives,
        carried,
        admitted,
        rewinds,
    ] = std::array::from_fn(sum);
    let slowest = measured.iter().map(|it| it[7]).max().unwrap_or(0);
    println!(
        "{:?}: {events} events, {faults} faults, {generations} generations, {lives} coordinators, {carried} losses that cost \
         no commit, {admitted} admitted, {rewinds} rewinds, {} simulated s, the slowest ended at {slowest} ms",
        seeds(),
        sum(7) / 1000
    );
    let count = seeds().end - seeds().start;
    assert!(count == 1 || (faults > 10 * count && generations > 2 * count));
    assert!(count < 100 || (carried > count / 2 && admitted > count && rewinds > count / 10));
}

#[test]
fn a_lost_message_costs_heartbeats_and_never_a_generation() {
    let test = "a_lost_message_costs_heartbeats_and_never_a_generation";
    for setting in [FIXED, ELASTIC] {
        let lossy = Setting {
            weather: Weather::Lossy,
            ..setting
        };
        let lost = each(lossy, test, |world| world.faults);
        let lost: u64 = lost.into_iter().sum();
        assert!(
            lost > seeds().end - seeds().start,
            "hardly anything was lost"
        );
    }
}

#[test]
fn a_seed_tells_the_whole_story() {
    let test = "a_seed_tells_the_whole_story";
    for setting in [FIXED, ELASTIC] {
        let story = |seed| {
            let world = run(seed, setting, test);
            (
                format!("{:?}", world.disk.journal),
                world.events,
                world.faults,
            )
        };
        assert_eq!(story(3), story(3));
        assert_ne!(story(3), story(4));
    }
}

/// Some seed fails with a planted fault, of as many as it takes, and says `what`.
fn finds(planted: Planted, weather: Weather, what: &[&str]) {
    let setting = Setting {
        weather,
        planted,
        ..ELASTIC
    };
    for seed in 0..400 {
        let result = catch_unwind(AssertUnwindSafe(|| World::new(seed, setting).run()));
        if let Err(panic) = result {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|it| (*it).to_owned()));
            let text = text.unwrap_or_default();
            println!("{planted:?}: seed {seed} found it: {text}");
            assert!(what.iter().any(|it| text.contains(it)), "{text}");
            return;
        }
    }
    panic!("no seed found {planted:?}");
}

#[test]
fn a_go_that_is_never_repeated_is_found() {
    finds(
        Planted::GoSaidOnce,
        Weather::Lossy,
        &["lost to the network"],
    );
}

#[test]
fn a_generation_that_is_used_again_is_found() {
    finds(Planted::GenerationReused, Weather::Hostile, &["M2"]);
}

#[test]
fn heartbeats_that_a_restarted_coordinator_ignores_are_found() {
    finds(Planted::BeatsIgnored, Weather::Hostile, &["M5"]);
}

#[test]
fn a_commit_without_a_quorum_is_found() {
    finds(Planted::NoQuorum, Weather::Hostile, &["without all votes"]);
}
