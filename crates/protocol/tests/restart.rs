//! Elastic jobs whose coordinator was restarted: who comes back with what, and what the job goes on from.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod support;

use protocol::{
    Action, Activity, Awaits, Cause, CoordinatorMessage, Event, Outcome, Record, Step,
    WIRE_VERSION, WorkerMessage, recover_living,
};
use support::{
    Play, commit, cut, elastic, facts, formed, generation, join_message, journaled, layout,
    outcome, told,
};

/// Two members, six commits, a checkpoint of step 4, then the coordinator was killed.
fn journal() -> Vec<Record> {
    let mut journal = vec![generation(1, &[1, 2]), Record::Facts { facts: facts(9, 0) }];
    journal.extend((1..=6).map(|step| commit(step, 1, true)));
    journal.push(Record::Checkpoint { step: Step(4) });
    journal
}

fn restarted(world: u64) -> Play {
    let recovery = recover_living(&journal(), Some(Step(4))).unwrap();
    let (mut play, actions) = Play::new(elastic(world, 1), recovery);
    assert_eq!(
        journaled(&actions),
        [],
        "nothing is rewound before anybody was heard"
    );
    play.world = world;
    play
}

/// These workers, out of these generations, await a Form for so many seconds.
fn wait(play: &mut Play, seconds: u64, alive: &[(u64, u64)]) -> Vec<Action> {
    let mut actions = Vec::new();
    for _ in 0..seconds {
        play.now_ms += 1_000;
        for (incarnation, generation) in alive {
            let beat = WorkerMessage::Beat {
                committed: Step(0),
                awaits: Awaits::Form,
                activity: Activity::default(),
            };
            actions.extend(play.say_in(*incarnation, *generation, beat));
        }
        actions.extend(play.event(Event::Tick));
    }
    actions
}

#[test]
fn m2_members_that_kept_their_state_go_on_after_a_restart_without_a_rewind() {
    let mut play = restarted(2);
    // It still works for a coordinator that is no more.
    let beat = WorkerMessage::Beat {
        committed: Step(5),
        awaits: Awaits::Commit,
        activity: Activity::default(),
    };
    let answer = told(&play.say_in(1, 1, beat));
    assert_eq!(
        answer,
        [(1, CoordinatorMessage::Stale { committed: Step(6) })]
    );
    for incarnation in [1, 2] {
        play.say_in(incarnation, 1, join_message("build", WIRE_VERSION));
    }
    play.held(1, 1, vec![cut(1, 0, 2, 5, true)]);
    let form = play.held(2, 1, vec![cut(1, 1, 2, 6, false)]);
    assert_eq!(journaled(&form), [generation(2, &[1, 2])]);
    let base = layout(1, &[(Some(0), Some(1)), (Some(1), Some(0))]);
    let says = |to, rank| (to, rank, 2, 6, true, Some(base.clone()), None);
    assert_eq!(formed(&form), [says(1, 0), says(2, 1)]);
}

#[test]
fn after_a_restart_whoever_holds_it_all_goes_on_once_the_others_had_their_time() {
    let mut play = restarted(2);
    play.say_in(1, 1, join_message("build", WIRE_VERSION));
    assert_eq!(formed(&play.held(1, 1, vec![cut(1, 0, 2, 6, false)])), []);
    let form = wait(&mut play, 8, &[(1, 1)]);
    assert_eq!(journaled(&form), [generation(2, &[1])]);
    let base = Some(layout(1, &[(Some(0), None), (None, Some(0))]));
    assert_eq!(formed(&form), [(1, 0, 1, 6, true, base, None)]);
}

#[test]
fn after_a_restart_without_its_workers_a_full_world_goes_on_from_the_checkpoint() {
    let mut play = restarted(2);
    for incarnation in [8, 9] {
        play.join(incarnation);
        assert_eq!(formed(&play.held(incarnation, 0, vec![])), []);
    }
    let form = wait(&mut play, 8, &[(8, 0), (9, 0)]);
    let records = journaled(&form);
    assert!(matches!(
        records[..],
        [
            Record::Rewind { to: Step(4), .. },
            Record::Generation { .. }
        ]
    ));
    let says = |to, rank| (to, rank, 2, 4, true, None, Some("step-4".into()));
    assert_eq!(formed(&form), [says(8, 0), says(9, 1)]);
}

#[test]
fn m2_a_worker_that_knows_a_later_commit_than_the_journal_stops_the_job() {
    let mut play = restarted(2);
    play.say_in(1, 1, join_message("build", WIRE_VERSION));
    let refused = play.held(1, 1, vec![cut(1, 0, 2, 7, false)]);
    match outcome(&refused) {
        Some(Outcome::Failed {
            cause: Cause::Fatal,
            reason,
        }) => assert!(
            reason.contains("knows commit 7, the journal ends at 6"),
            "{reason}"
        ),
        other => panic!("{other:?}"),
    }
}

#[test]
fn m2_a_generation_that_only_a_worker_knows_is_not_used_again() {
    let mut play = restarted(2);
    play.say_in(1, 5, join_message("build", WIRE_VERSION));
    play.say_in(2, 3, join_message("build", WIRE_VERSION));
    play.held(2, 3, vec![cut(1, 1, 2, 6, false)]);
    let form = play.held(1, 5, vec![cut(1, 0, 2, 6, false)]);
    assert_eq!(journaled(&form), [generation(6, &[1, 2])]);
}
