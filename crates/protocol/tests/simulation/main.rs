//! A deterministic simulation of the control plane: coordinators and workers over a network that loses, doubles, delays,
//! reorders and is cut, with crashes between any two actions. Everything a run writes or says is checked where it happens
//! (`disk`, `worker`, `coordinator`, `network`); the invariants' names stand in the assertions. What a seed draws: the size of
//! the job, its cadences and limits, every fault.
//!
//! `SIMULATION_SEED=17` runs one seed, `SIMULATION_SEEDS=1000000` that many instead of 20,000 (400 without optimization), on
//! all cores, from `SIMULATION_FIRST=n` on instead of 0; `SIMULATION_STORY=1` prints all that happens.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod coordinator;
mod disk;
mod faults;
mod hearing;
mod network;
mod queue;
mod random;
mod replaced;
mod worker;
mod world;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use world::{Planted, Setting, Weather, World};

/// All weathers.
const HOSTILE: Setting = Setting {
    weather: Weather::Hostile,
    planted: Planted::Nothing,
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
    let all = if cfg!(debug_assertions) { 400 } else { 20_000 };
    if let Some(seed) = number("SIMULATION_SEED") {
        return seed..seed + 1;
    }
    let first = number("SIMULATION_FIRST").unwrap_or(0);
    first..first + number("SIMULATION_SEEDS").unwrap_or(all)
}

/// The sum of what `measure` says of every seed's world, and the highest of each number; on all cores, which take the next
/// seed whenever they have done one.
fn each<const N: usize>(
    setting: Setting,
    test: &'static str,
    measure: impl Fn(World) -> [u64; N] + Sync,
) -> ([u64; N], [u64; N]) {
    let seeds = seeds();
    let next = AtomicU64::new(seeds.start);
    let some = || {
        let (mut sums, mut highest) = ([0; N], [0; N]);
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return (sums, highest);
            }
            for (place, it) in measure(run(seed, setting, test)).into_iter().enumerate() {
                sums[place] += it;
                highest[place] = it.max(highest[place]);
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let all = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(some)).collect();
        let all = threads.into_iter().map(|it| it.join().unwrap());
        all.collect::<Vec<_>>()
    });
    let (mut sums, mut highest) = ([0; N], [0; N]);
    for (some, most) in all {
        for place in 0..N {
            sums[place] += some[place];
            highest[place] = most[place].max(highest[place]);
        }
    }
    (sums, highest)
}

#[test]
fn m4_every_run_completes_with_each_step_committed_once_and_rewinds_only_when_a_shard_is_lost() {
    let test = "m4_every_run_completes_with_each_step_committed_once_and_rewinds_only_when_a_shard_is_lost";
    let (sums, highest) = each(HOSTILE, test, |world| {
        [
            u64::from(world.oracle.stops_after.is_some()),
            u64::from(world.keeps_an_older_checkpoint()),
            world.events,
            world.faults,
            world.disk.generation().0,
            world.life,
            world.carried,
            world.admitted,
            world.disk.rewinds() as u64,
            world.now_ms,
            world.wakes,
            world.refused,
            world.workers.values().filter(|it| it.restarted).count() as u64,
        ]
    });
    let [
        stopped,
        kept,
        events,
        faults,
        generations,
        lives,
        carried,
        admitted,
        rewinds,
        simulated_ms,
        wakes,
        refused,
        restarted,
    ] = sums;
    println!(
        "{:?}: {events} events, {faults} faults, {stopped} stopped early, {kept} with a best checkpoint before the last, \
         {generations} generations, {lives} coordinators, {carried} losses that cost \
         no commit, {admitted} admitted, {rewinds} rewinds, {refused} of {wakes} replaced coordinators refused by the journal, \
         {restarted} stuck and restarted, {} simulated s, the slowest ended at {} ms",
        seeds(),
        simulated_ms / 1000,
        highest[9]
    );
    let count = seeds().end - seeds().start;
    assert!(count == 1 || (faults > 10 * count && generations > 2 * count));
    assert!(count < 100 || (5 * stopped > count && 10 * kept > count));
    assert!(count < 100 || (carried > count / 2 && admitted > count && rewinds > count / 10));
    assert!(count < 100 || (refused > count / 20 && restarted > count / 20));
}

#[test]
fn a_late_form_and_a_late_word_of_who_is_silent_make_no_false_alarm() {
    let test = "a_late_form_and_a_late_word_of_who_is_silent_make_no_false_alarm";
    // Found among a million.
    for seed in [105_173, 212_636] {
        run(seed, HOSTILE, test);
    }
}

#[test]
fn a_lost_message_costs_heartbeats_and_never_a_generation() {
    let test = "a_lost_message_costs_heartbeats_and_never_a_generation";
    let lossy = Setting {
        weather: Weather::Lossy,
        ..HOSTILE
    };
    let ([lost], _) = each(lossy, test, |world| [world.faults]);
    let count = seeds().end - seeds().start;
    assert!(lost > count, "hardly anything was lost");
}

/// Seed 348382 of the first million: a rewind to the start, of which one of two workers still holds the step before, the other one
/// step after; the generation that goes on from the first is interrupted before the second is in it.
#[test]
fn m4_a_worker_ahead_of_a_rewind_may_keep_what_it_holds_until_it_is_in_a_generation() {
    let test = "m4_a_worker_ahead_of_a_rewind_may_keep_what_it_holds_until_it_is_in_a_generation";
    run(348_382, HOSTILE, test);
}

#[test]
fn a_seed_tells_the_whole_story() {
    let test = "a_seed_tells_the_whole_story";
    let story = |seed| {
        let world = run(seed, HOSTILE, test);
        (
            format!("{:?}", world.disk.journal),
            world.events,
            world.faults,
        )
    };
    assert_eq!(story(3), story(3));
    assert_ne!(story(3), story(4));
}

/// Some seed fails with a planted fault, of as many as it takes, and says `what`.
fn finds(planted: Planted, weather: Weather, what: &[&str]) {
    let setting = Setting { weather, planted };
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

#[test]
fn a_journal_that_takes_records_of_a_replaced_coordinator_is_found() {
    finds(
        Planted::JournalOpenToAll,
        Weather::Hostile,
        &["M1", "M2", "M3"],
    );
}

#[test]
fn workers_that_act_on_words_of_a_replaced_coordinator_are_found() {
    finds(
        Planted::WorkersOpenToAll,
        Weather::Hostile,
        &["M1: a word under fence"],
    );
}
