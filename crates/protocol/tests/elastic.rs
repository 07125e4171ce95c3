//! Elastic jobs: who is lost, leaves or joins, and what the others are told, word by word.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod support;

use protocol::{
    Action, Activity, Afterwards, Awaits, Cause, CoordinatorMessage, Event, Generation, JobPolicy,
    Outcome, Phases, Record, Recovery, RunFacts, Step, Waiting, WorkerMessage,
};
use support::{
    Play, aborted, checkpoint_committed, cut, elastic, facts, failed, formed, generation,
    journaled, layout, notes, outcome, report, stopped, told,
};

/// `evaluate, save, last` of the Go.
fn go(actions: &[Action]) -> (bool, bool, bool) {
    let go = |(_, message)| match message {
        CoordinatorMessage::Go {
            evaluate,
            save,
            last,
            ..
        } => Some((evaluate, save, last)),
        _ => None,
    };
    told(actions).into_iter().find_map(go).expect("a Go")
}

/// These say Ready at `committed` in the present generation.
fn ready(play: &mut Play, incarnations: &[u64], committed: u64) -> Vec<Action> {
    let said = incarnations
        .iter()
        .flat_map(|it| play.ready(*it, facts(9, committed)));
    said.collect()
}

fn prepare_all(play: &mut Play, incarnations: &[u64], step: u64) -> Vec<Action> {
    let said = incarnations
        .iter()
        .flat_map(|it| play.prepare(*it, report(step, true)));
    said.collect()
}

/// A spare joins, says that it holds nothing, and has loaded.
fn spare(play: &mut Play, incarnation: u64) -> Vec<Action> {
    let mut actions = play.join(incarnation);
    actions.extend(play.held(incarnation, 0, vec![]));
    let facts = facts(9, 0);
    actions.extend(play.say_in(incarnation, 0, WorkerMessage::Loaded { facts }));
    actions
}

#[test]
fn m4_a_step_that_was_not_committed_is_dropped_and_computed_again_by_the_survivors() {
    let mut play = Play::elastic(3, 2, 9);
    play.step(true);
    prepare_all(&mut play, &[1, 2], 2);
    let lost = play.lose(3);
    assert_eq!(aborted(&lost), [1, 2], "at once");
    assert_eq!((stopped(&lost), outcome(&lost)), (vec![3], None));
    let waiting = play.job.waiting().to_string();
    assert!(
        waiting.starts_with(
            "waiting for ranks 0, 1 to leave generation 1: rank 2 (worker any) was lost"
        )
    );
    assert_eq!(play.held(1, 1, vec![cut(1, 0, 3, 1, true)]), []);
    // The other is still at 0: it has not heard the commit, and applies it.
    let form = play.held(2, 1, vec![cut(1, 1, 3, 0, true)]);
    assert_eq!(journaled(&form), [generation(2, &[1, 2])]);
    let base = layout(1, &[(Some(0), Some(1)), (Some(1), None), (None, Some(0))]);
    let says = |to, rank| (to, rank, 2, 1, true, Some(base.clone()), None);
    assert_eq!(formed(&form), [says(1, 0), says(2, 1)]);
    let going = ready(&mut play, &[1, 2], 1);
    assert_eq!(go(&going), (false, false, false));
    assert_eq!(play.prepare(1, report(2, true)), []);
    let committed = play.prepare(2, report(2, true));
    let [Record::Commit(it)] = journaled(&committed)[..] else {
        panic!("{committed:?}");
    };
    assert_eq!((it.row.generation, it.row.world_size), (2, 2));
}

#[test]
fn a_word_of_the_generation_before_is_answered_with_the_one_that_holds() {
    let mut play = Play::elastic(2, 1, 9);
    play.lose(2);
    play.held(1, 1, vec![cut(1, 0, 2, 0, false)]);
    let beat = |awaits| WorkerMessage::Beat {
        committed: Step(0),
        awaits,
        activity: Activity::default(),
    };
    assert_eq!(formed(&play.say_in(1, 1, beat(Awaits::Form))).len(), 1);
    assert_eq!(formed(&play.say_in(1, 1, beat(Awaits::Nothing))).len(), 1);
    let vote = WorkerMessage::Prepared {
        report: report(1, true),
        gpu: protocol::GpuFigures::default(),
        phases: Phases::default(),
    };
    let answer = play.say_in(1, 1, vote);
    assert_eq!(
        (formed(&answer).len(), journaled(&answer)),
        (1, vec![]),
        "M1"
    );
    // Who was put out is told so, whatever it says.
    assert_eq!(stopped(&play.say_in(2, 1, beat(Awaits::Nothing))), [2]);
}

#[test]
fn who_does_not_leave_its_generation_is_left_behind() {
    let mut play = Play::elastic(3, 1, 9);
    play.lose(3);
    play.held(1, 1, vec![cut(1, 0, 3, 0, false)]);
    let actions = play.pass(7_999, &[1, 2]);
    assert_eq!(
        (formed(&actions), aborted(&actions).is_empty()),
        (vec![], false)
    );
    let actions = play.pass(1, &[1]);
    let why = &notes(&actions, "lost")[0];
    assert!(
        why.contains("did not leave generation 1 within 8 s"),
        "{why}"
    );
    // Shard 1 had its copies with 2 and 3. At step 0 nothing is lost by it.
    assert_eq!(formed(&actions), [(1, 0, 1, 0, false, None, None)]);
}

#[test]
fn m4_owner_and_mirror_lost_is_a_rewind_to_the_newest_checkpoint_in_the_journal() {
    let policy = JobPolicy {
        save_every: Some(2),
        ..elastic(3, 1)
    };
    let mut play = Play::new(policy, Recovery::default()).0;
    play.join_all();
    (1..=3).for_each(|it| drop(play.held(it, 0, vec![])));
    play.ready_all(9);
    for _ in 0..3 {
        play.step(true);
        if play.job.committed() == Step(2) {
            (1..=3).for_each(|it| drop(play.save(it, 2)));
            play.event(checkpoint_committed(2));
        }
    }
    play.lose(2);
    play.lose(3);
    let form = play.held(1, 1, vec![cut(1, 0, 3, 3, false)]);
    match journaled(&form).as_slice() {
        [
            Record::Rewind {
                to: Step(2),
                reason,
            },
            next,
        ] => {
            assert!(
                reason.contains("holds some optimizer shard at step 3"),
                "{reason}"
            );
            assert_eq!(*next, generation(2, &[1]));
        }
        other => panic!("{other:?}"),
    }
    let resume = Some("step-2".to_owned());
    let [(1, 0, 1, 2, _, None, path)] = &formed(&form)[..] else {
        panic!("{form:?}");
    };
    assert_eq!(*path, resume);
    assert_eq!(play.job.committed(), Step(2));
}

#[test]
fn a_checkpoint_about_to_be_visible_is_waited_for_before_a_rewind() {
    let policy = JobPolicy {
        save_every: Some(2),
        ..elastic(2, 1)
    };
    let mut play = Play::new(policy, Recovery::default()).0;
    play.join_all();
    (1..=2).for_each(|it| drop(play.held(it, 0, vec![])));
    play.ready_all(9);
    (0..2).for_each(|_| drop(play.step(true)));
    (1..=2).for_each(|it| drop(play.save(it, 2)));
    play.lose(1);
    // It lost what it held as well.
    assert_eq!(formed(&play.held(2, 1, vec![])), []);
    assert_eq!(play.job.waiting(), Waiting::Checkpoint { step: Step(2) });
    let form = play.event(checkpoint_committed(2));
    let records = journaled(&form);
    assert_eq!(
        records,
        [Record::Checkpoint { step: Step(2) }, generation(2, &[2])]
    );
    assert_eq!(formed(&form)[0].6, Some("step-2".into()));
}

#[test]
fn with_too_few_left_the_job_waits_for_a_joiner_and_then_ends_resumable() {
    let mut play = Play::elastic(2, 2, 9);
    play.step(true);
    play.lose(2);
    let held = vec![cut(1, 0, 2, 1, false)];
    assert_eq!(formed(&play.held(1, 1, held)), []);
    let waiting = play.job.waiting().to_string();
    assert!(
        waiting.contains("a worker to join (1 here, 2 train)"),
        "{waiting}"
    );
    let mut late = Play::elastic(2, 2, 9);
    late.lose(2);
    late.held(1, 1, vec![]);
    failed(&late.pass(60_000, &[1]), &["1 here, 2 train", "for 60 s"]);
    // One that has loaded nothing is good enough now.
    play.join(5);
    let form = play.held(5, 0, vec![]);
    assert_eq!(journaled(&form), [generation(2, &[1, 5])]);
    let base = Some(layout(1, &[(Some(0), None), (None, Some(0))]));
    assert_eq!(formed(&form)[1], (5, 1, 2, 1, true, base, None));
}

/// An elastic job of `world` members, of which one is enough by its policy and so many by their devices, that computes step 1.
fn of_devices(world: u64, workers_min: u32) -> Play {
    let mut play = Play::new(elastic(world, 1), Recovery::default()).0;
    play.join_all();
    for member in 1..=world {
        let message = WorkerMessage::Ready {
            facts: facts(9, 0),
            reference_reused: 0,
            reference_computed: 0,
            workers_min,
        };
        play.say(member, message);
    }
    play
}

#[test]
fn a_job_whose_state_has_no_room_among_those_who_are_left_waits_for_a_joiner() {
    let mut play = of_devices(3, 2);
    play.step(true);
    play.lose(3);
    let cuts = |rank| vec![cut(1, rank, 3, 1, true)];
    play.held_of(1, 1, cuts(0), 2);
    let form = play.held_of(2, 1, cuts(1), 2);
    assert_eq!(journaled(&form), [generation(2, &[1, 2])], "two are enough");
    play.lose(2);
    let alone = play.held_of(1, 2, cuts(0), 2);
    assert_eq!((formed(&alone), outcome(&alone)), (vec![], None));
    let waiting = play.job.waiting().to_string();
    for part in ["1 here, 2 train", "has room on 2 devices or more"] {
        assert!(waiting.contains(part), "{waiting}");
    }
    play.join(5);
    let form = play.held(5, 0, vec![]);
    assert_eq!(journaled(&form).last(), Some(&generation(3, &[1, 5])));
}

#[test]
fn what_devices_had_room_for_is_remembered_when_all_are_lost() {
    let mut play = of_devices(2, 2);
    play.step(true);
    play.lose(1);
    play.lose(2);
    play.join(5);
    assert_eq!(formed(&play.held(5, 0, vec![])), []);
    play.join(6);
    let form = play.held(6, 0, vec![]);
    assert_eq!(journaled(&form).last(), Some(&generation(2, &[5, 6])));
}

#[test]
fn a_spare_whose_device_has_no_room_among_so_few_is_not_admitted() {
    let mut play = of_devices(2, 1);
    spare(&mut play, 7);
    play.held_of(7, 0, vec![], 4);
    assert_eq!(formed(&play.step(true)), [], "the two go on by themselves");
    assert_eq!(play.job.committed(), Step(1));
    play.held_of(7, 0, vec![], 3);
    let form = play.step(true);
    assert_eq!(journaled(&form).last(), Some(&generation(2, &[1, 2, 7])));
}

#[test]
fn a_leaver_without_whom_the_state_has_no_room_stops_the_job_which_saves() {
    let mut play = of_devices(2, 2);
    play.step(true);
    let reason = "drained".to_string();
    play.say(2, WorkerMessage::Leave { reason });
    let last = play.step(true);
    let save = |(_, message): &(u64, CoordinatorMessage)| {
        matches!(
            message,
            CoordinatorMessage::Commit {
                save: true,
                last: true,
                ..
            }
        )
    };
    assert_eq!(told(&last).iter().filter(|it| save(it)).count(), 2);
}

#[test]
fn a_spare_is_admitted_at_a_step_boundary_and_the_form_brings_the_verdict() {
    let mut play = Play::elastic(2, 1, 9);
    let welcome = play.join(7);
    assert!(matches!(
        told(&welcome)[..],
        [(7, CoordinatorMessage::Welcome { spare: true, .. })]
    ));
    let steps_on = play.step(true);
    assert_eq!(formed(&steps_on), [], "it has not loaded");
    spare(&mut play, 7);
    assert_eq!(play.prepare(1, report(2, true)), []);
    let boundary = play.prepare(2, report(2, true));
    let records = journaled(&boundary);
    assert!(matches!(
        records[..],
        [Record::Commit(_), Record::Generation { .. }]
    ));
    let commits = told(&boundary).into_iter();
    let mut commits = commits.filter(|it| matches!(it.1, CoordinatorMessage::Commit { .. }));
    assert_eq!(commits.next(), None);
    let base = Some(layout(1, &[(Some(0), Some(1)), (Some(1), Some(0))]));
    let says = |to, rank| (to, rank, 3, 2, true, base.clone(), None);
    assert_eq!(formed(&boundary), [says(1, 0), says(2, 1), says(7, 2)]);
    ready(&mut play, &[1, 2, 7], 2);
    assert_eq!(play.job.world(), 3);
    // No room for another: it waits, and nothing changes.
    spare(&mut play, 8);
    assert_eq!(formed(&prepare_all(&mut play, &[1, 2, 7], 3)), []);
}

#[test]
fn a_spare_that_found_other_data_is_refused_and_harms_nobody() {
    let mut play = Play::elastic(1, 1, 9);
    play.join(7);
    let facts = RunFacts {
        model_digest: "bb".into(),
        ..facts(9, 0)
    };
    let refused = play.say_in(7, 0, WorkerMessage::Loaded { facts });
    let [(7, CoordinatorMessage::Stop { reason, afterwards })] = &told(&refused)[..] else {
        panic!("{refused:?}");
    };
    assert!(
        reason.contains("model_digest bb, the job has aa"),
        "{reason}"
    );
    assert_eq!(*afterwards, Afterwards::Refused);
    let failure = WorkerMessage::Failed {
        cause: Cause::Config,
        reason: "no such file".into(),
    };
    play.join(8);
    assert_eq!(outcome(&play.say_in(8, 0, failure)), None);
    assert_eq!(play.job.workers().len(), 1);
}

#[test]
fn what_a_lost_generation_was_asked_for_the_next_one_does() {
    // The last step is committed; its checkpoint lacks a part.
    let mut play = Play::elastic(2, 1, 1);
    play.step(true);
    play.save(1, 1);
    play.lose(2);
    let form = play.held(1, 1, vec![cut(1, 0, 2, 1, false)]);
    assert_eq!(formed(&form)[0].3, 1);
    let going = play.ready(1, facts(1, 1));
    assert_eq!(go(&going), (false, true, true));
    let saved = play.save(1, 1);
    assert!(matches!(
        saved[..],
        [Action::CommitCheckpoint {
            generation: Generation(2),
            world: 1,
            ..
        }]
    ));
    let done = play.event(checkpoint_committed(1));
    assert_eq!(told(&done), [(1, CoordinatorMessage::Finish)]);
    let done = play.say(1, WorkerMessage::Finished);
    assert_eq!(outcome(&done), Some(Outcome::Completed));
}

#[test]
fn an_evaluation_that_a_lost_rank_0_did_not_tell_is_made_again() {
    let policy = JobPolicy {
        evaluate_every: Some(1),
        ..elastic(2, 1)
    };
    let mut play = Play::new(policy, Recovery::default()).0;
    play.join_all();
    (1..=2).for_each(|it| drop(play.held(it, 0, vec![])));
    let found = RunFacts {
        eval_pairs: 4,
        ..facts(9, 0)
    };
    (1..=2).for_each(|it| drop(play.ready(it, found.clone())));
    play.lose(1);
    play.held(2, 1, vec![cut(1, 1, 2, 0, false)]);
    let going = play.ready(2, found);
    assert_eq!(go(&going), (true, false, false));
}

#[test]
fn members_whose_work_is_done_may_be_lost_while_the_disk_is_waited_for() {
    let mut play = Play::elastic(2, 2, 1);
    play.step(true);
    play.save(1, 1);
    play.save(2, 1);
    assert_eq!(aborted(&play.lose(1)), [0; 0]);
    let done = play.event(checkpoint_committed(1));
    assert_eq!(told(&done), [(2, CoordinatorMessage::Finish)]);
    assert_eq!(
        outcome(&play.say(2, WorkerMessage::Finished)),
        Some(Outcome::Completed)
    );
}

#[test]
fn a_member_that_leaves_is_let_go_if_enough_stay_and_otherwise_the_job_saves() {
    let leave = || WorkerMessage::Leave {
        reason: "SIGTERM".into(),
    };
    let mut play = Play::elastic(2, 1, 9);
    assert_eq!(aborted(&play.say(2, leave())), [1, 2]);
    play.held(1, 1, vec![cut(1, 0, 2, 0, false)]);
    let form = play.held(2, 1, vec![cut(1, 1, 2, 0, false)]);
    assert_eq!(journaled(&form), [generation(2, &[1])]);
    let stop = CoordinatorMessage::Stop {
        reason: "SIGTERM".into(),
        afterwards: Afterwards::Leave,
    };
    assert!(told(&form).contains(&(2, stop)));

    let mut play = Play::elastic(2, 2, 9);
    let asked = play.say(2, leave());
    assert!(aborted(&asked).is_empty() && notes(&asked, "stop").len() == 1);
    let last = play.step(true);
    assert!(told(&last).iter().all(|it| matches!(
        it.1,
        CoordinatorMessage::Commit {
            last: true,
            save: true,
            ..
        }
    )));
}

#[test]
fn a_leaver_stays_for_one_generation_if_its_shards_live_nowhere_else() {
    let mut play = Play::elastic(2, 1, 9);
    play.step(true);
    spare(&mut play, 7);
    play.lose(1);
    let leave = WorkerMessage::Leave {
        reason: "SIGTERM".into(),
    };
    play.say(2, leave);
    let form = play.held(2, 1, vec![cut(1, 1, 2, 1, false)]);
    assert_eq!(journaled(&form), [generation(2, &[2, 7])]);
    ready(&mut play, &[2, 7], 1);
    let boundary = prepare_all(&mut play, &[2, 7], 2);
    assert_eq!(journaled(&boundary)[1..], [generation(3, &[7])]);
    let base = Some(layout(2, &[(None, Some(0)), (Some(0), None)]));
    assert_eq!(formed(&boundary), [(7, 0, 1, 2, true, base, None)]);
}

#[test]
fn a_stop_while_members_regroup_saves_what_they_hold() {
    let mut play = Play::elastic(2, 2, 9);
    play.step(true);
    play.lose(2);
    play.held(1, 1, vec![cut(1, 0, 2, 1, false)]);
    let form = play.event(Event::StopRequested {
        reason: "ctrl-c".into(),
    });
    // One is enough to save.
    assert_eq!(journaled(&form), [generation(2, &[1])]);
    assert_eq!(go(&play.ready(1, facts(9, 1))), (false, true, true));
    play.save(1, 1);
    play.event(checkpoint_committed(1));
    let committed = Step(1);
    let done = play.say(1, WorkerMessage::Finished);
    assert_eq!(outcome(&done), Some(Outcome::Interrupted { committed }));
}

#[test]
fn a_step_that_loses_a_worker_again_and_again_for_one_reason_ends_the_attempt() {
    let mut policy = elastic(4, 1);
    policy.elastic.failures_max = 2;
    let mut play = Play::new(policy, Recovery::default()).0;
    play.join_all();
    for incarnation in 1..=4 {
        play.held(incarnation, 0, vec![]);
    }
    play.ready_all(9);
    play.step(true);
    // Two in one generation are one failure.
    assert_eq!(outcome(&play.lose(4)), None);
    assert_eq!(outcome(&play.lose(2)), None);
    play.held(1, 1, vec![cut(1, 0, 4, 1, false)]);
    play.held(3, 1, vec![cut(1, 2, 4, 1, false)]);
    ready(&mut play, &[1, 3], 1);
    // A commit forgives.
    prepare_all(&mut play, &[1, 3], 2);
    assert_eq!(outcome(&play.lose(3)), None);
    play.held(1, 2, vec![cut(2, 0, 2, 2, false)]);
    ready(&mut play, &[1], 2);
    let ended = play.lose(1);
    let parts = [
        "rank 0 (worker any) was lost",
        "step 3 lost a worker 2 times in a row for this reason",
    ];
    failed(&ended, &parts);
}

#[test]
fn m1_of_thousands_that_come_and_go_few_are_remembered_and_a_member_always_is() {
    let mut play = Play::elastic(2, 2, 9);
    let beat = WorkerMessage::Beat {
        committed: Step(0),
        awaits: Awaits::Nothing,
        activity: Activity::default(),
    };
    for name in 100..9_100 {
        play.join(name);
        // It was told to leave a generation that it was never in, and so knows its number.
        play.held(name, 1, vec![]);
        assert_eq!(play.say_in(name, 0, beat.clone()), [], "stale");
        play.lose(name);
        assert!(
            play.job.remembered() <= 1_100,
            "{} are",
            play.job.remembered()
        );
    }
    for member in 1..=2 {
        assert_eq!(play.say_in(member, 0, beat.clone()), [], "stale");
    }
    assert_eq!(play.say_in(9_099, 0, beat), [], "it has only just gone");
}
