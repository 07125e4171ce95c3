//! A job that goes well, from the first Join to its outcome, and the ways to end it on purpose.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod support;

use protocol::{
    Action, Activity, Awaits, Cause, CoordinatorMessage, EvaluationRow, Event, Generation,
    Incarnation, JobPolicy, Outcome, Phases, Rank, Record, Recovery, Step, Waiting, WorkerMessage,
};
use support::{
    Play, checkpoint_committed, facts, journaled, outcome, place, policy, report, stopped, told,
};

fn stop(play: &mut Play) -> Vec<Action> {
    play.event(Event::StopRequested {
        reason: "ctrl-c".into(),
    })
}

/// `apply, save, evaluate, last` of a step's commit.
fn flags(actions: &[Action]) -> (bool, bool, bool, bool) {
    let mut flags = told(actions)
        .into_iter()
        .filter_map(|(_, message)| match message {
            CoordinatorMessage::Commit {
                apply,
                save,
                evaluate,
                last,
                ..
            } => Some((apply, save, evaluate, last)),
            _ => None,
        });
    flags.next().expect("the step was committed")
}

#[test]
fn a_job_goes_from_the_first_join_to_completion() {
    let (mut play, actions) = Play::new(policy(2), Recovery::default());
    assert_eq!((journaled(&actions), told(&actions)), (vec![], vec![]));
    assert_eq!(
        play.job.waiting(),
        Waiting::Join {
            joined: 0,
            world: 2
        }
    );
    play.join_all();
    assert_eq!(
        play.job.waiting().to_string(),
        "waiting for ranks 0, 1 to be ready"
    );
    let go = play.ready_all(2);
    let expected = CoordinatorMessage::Go {
        step: Step(1),
        evaluate: true,
        save: false,
        last: false,
    };
    assert_eq!(told(&go), [(1, expected.clone()), (2, expected)]);
    assert_eq!(flags(&play.step(true)), (true, false, false, false));
    assert_eq!(
        play.job.waiting().to_string(),
        "waiting for ranks 0, 1 to compute step 2"
    );
    assert_eq!(flags(&play.step(true)), (true, true, true, true));
    assert_eq!(
        play.job.waiting().to_string(),
        "waiting for ranks 0, 1 to save step 2"
    );
    play.save(1, 2);
    let saved = play.save(2, 2);
    let commit = Action::CommitCheckpoint {
        generation: Generation(1),
        step: Step(2),
        world: 2,
        shards: vec!["shard of 1".into(), "shard of 2".into()],
        best_first: vec![],
    };
    assert_eq!(saved, [commit]);
    assert_eq!(play.job.waiting(), Waiting::Checkpoint { step: Step(2) });
    let durable = play.event(checkpoint_committed(2));
    assert_eq!(journaled(&durable), [Record::Checkpoint { step: Step(2) }]);
    assert_eq!(
        told(&durable),
        [
            (1, CoordinatorMessage::Finish),
            (2, CoordinatorMessage::Finish)
        ]
    );
    assert_eq!(play.say(1, WorkerMessage::Finished), []);
    let done = play.say(2, WorkerMessage::Finished);
    assert_eq!(journaled(&done), [Record::Completed { step: Step(2) }]);
    assert_eq!(outcome(&done), Some(Outcome::Completed));
    assert_eq!(play.job.next_deadline(), None);
}

#[test]
fn m2_a_generation_is_journaled_before_anybody_hears_of_it() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    let actions = play.join_all();
    let record = Record::Generation {
        generation: Generation(1),
        members: vec![Incarnation(1), Incarnation(2)],
    };
    assert_eq!(journaled(&actions), [record]);
    let form = |it: &Action| matches!(it, Action::Send(to) if matches!(to.message, CoordinatorMessage::Form { .. }));
    assert!(place(&actions, |it| matches!(it, Action::Journal(_))) < place(&actions, form));
}

#[test]
fn m2_a_commit_is_journaled_before_anybody_hears_of_it() {
    let mut play = Play::stepping(policy(2), 5);
    let actions = play.step(true);
    assert!(matches!(journaled(&actions).as_slice(), [Record::Commit(it)] if it.apply));
    let journal = place(&actions, |it| matches!(it, Action::Journal(_)));
    assert!(journal < place(&actions, |it| matches!(it, Action::Send(_))));
    assert!(journal < place(&actions, |it| matches!(it, Action::RecordStep(_))));
}

#[test]
fn ranks_follow_incarnations_and_not_arrivals() {
    let mut play = Play::new(policy(3), Recovery::default()).0;
    let mut actions: Vec<_> = [30, 10, 20].iter().flat_map(|it| play.join(*it)).collect();
    actions.extend([30, 10, 20].iter().flat_map(|it| play.held(*it, 0, vec![])));
    let ranks: Vec<_> = told(&actions)
        .into_iter()
        .filter_map(|(incarnation, message)| match message {
            CoordinatorMessage::Form {
                rank,
                addresses,
                secret,
                ..
            } => {
                assert_eq!((addresses.len(), secret), (3, [7; 32]));
                Some((incarnation, rank))
            }
            _ => None,
        })
        .collect();
    assert_eq!(ranks, [(10, Rank(0)), (20, Rank(1)), (30, Rank(2))]);
    let seen: Vec<_> = play.job.workers().iter().map(|it| it.rank).collect();
    assert_eq!(seen, [Some(Rank(0)), Some(Rank(1)), Some(Rank(2))]);
}

#[test]
fn a_row_tells_the_time_from_the_commit_before() {
    let mut play = Play::stepping(policy(1), 5);
    play.step(true);
    play.now_ms += 2_000;
    let actions = play.step(true);
    let row = actions.iter().find_map(|it| match it {
        Action::RecordStep(row) => Some(*row),
        _ => None,
    });
    let row = row.unwrap();
    assert_eq!((row.seconds, row.tokens_per_second), (2.0, 250.0));
    assert_eq!((row.world_size, row.generation, row.report.step), (1, 1, 2));
}

#[test]
fn a_row_has_the_mean_of_the_ranks_times_which_no_vote_compares() {
    let mut play = Play::stepping(policy(3), 5);
    let times = |rank: f64| Phases {
        data: 0.25,
        backward: 2.0 + rank,
        wait: if rank == 0.0 { 1.5 } else { 0.0 },
        ..Phases::default()
    };
    assert_eq!(play.prepare_in(1, report(1, true), times(0.0)), []);
    assert_eq!(play.prepare_in(2, report(1, true), times(1.0)), []);
    // Said again with other times, as after a wait: the last one counts, once.
    assert_eq!(play.prepare_in(2, report(1, true), times(7.0)), []);
    let actions = play.prepare_in(3, report(1, true), times(2.0));
    let expected = Phases {
        data: 0.25,
        backward: 5.0,
        wait: 0.5,
        ..Phases::default()
    };
    let rows: Vec<_> = actions
        .iter()
        .filter_map(|it| match it {
            Action::RecordStep(row) => Some(row.phases),
            _ => None,
        })
        .collect();
    assert_eq!(rows, [expected]);
    let records = journaled(&actions);
    assert!(
        matches!(&records[0], Record::Commit(it) if it.row.phases == expected),
        "{records:?}"
    );
    // Who says nothing of it, an older worker, votes all the same.
    play.step(true);
    assert_eq!(play.job.committed(), Step(2));
}

#[test]
fn saves_and_evaluations_follow_their_cadence_and_the_last_step_has_both() {
    let policy = JobPolicy {
        save_every: Some(2),
        evaluate_every: Some(3),
        ..policy(1)
    };
    let mut play = Play::stepping(policy, 7);
    let asked: Vec<_> = (1..=7)
        .map(|_| flags(&play.step(true)))
        .map(|it| (it.1, it.2))
        .collect();
    let expected =
        [1, 2, 3, 4, 5, 6, 7].map(|step| (step % 2 == 0 || step == 7, step % 3 == 0 || step == 7));
    assert_eq!(asked, expected);
}

#[test]
fn training_does_not_wait_for_a_checkpoint_that_is_not_the_last() {
    let policy = JobPolicy {
        save_every: Some(1),
        ..policy(2)
    };
    let mut play = Play::stepping(policy, 9);
    play.step(true);
    play.step(true);
    play.save(1, 1);
    play.save(1, 2);
    assert!(matches!(
        play.save(2, 2).as_slice(),
        [Action::CommitCheckpoint { step: Step(2), .. }]
    ));
    assert!(matches!(
        play.save(2, 1).as_slice(),
        [Action::CommitCheckpoint { step: Step(1), .. }]
    ));
    assert_eq!(play.save(2, 1), [], "said again");
    play.step(true);
    let durable = play.event(checkpoint_committed(1));
    assert_eq!(journaled(&durable), [Record::Checkpoint { step: Step(1) }]);
    assert_eq!(play.event(checkpoint_committed(1)), [], "said again");
    assert_eq!(play.job.committed(), Step(3));
}

#[test]
fn a_resumed_job_goes_on_after_its_commit_without_the_first_evaluation() {
    let recovery = Recovery {
        generation: Generation(4),
        committed: Step(6),
        highest_committed: Step(8),
        checkpoint: Step(6),
        facts: Some(facts(10, 0)),
        rewind: Some(Record::Rewind {
            to: Step(6),
            reason: "why".into(),
        }),
        ..Recovery::default()
    };
    let (mut play, actions) = Play::new(policy(1), recovery);
    assert!(matches!(
        actions[0],
        Action::Journal(Record::Rewind { to: Step(6), .. })
    ));
    let formed = play.join_all();
    assert!(told(&formed).iter().any(|(_, message)| matches!(message,
        CoordinatorMessage::Form { committed: Step(6), resume: Some(path), .. } if path == "step-6")));
    assert_eq!(play.job.generation(), Generation(5));
    let go = play.ready(1, facts(10, 6));
    assert_eq!(
        told(&go),
        [(
            1,
            CoordinatorMessage::Go {
                step: Step(7),
                evaluate: false,
                save: false,
                last: false,
            }
        )]
    );
    assert_eq!(journaled(&go), [], "the facts are in the journal already");
}

#[test]
fn facts_are_journaled_once_they_are_agreed_on() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join_all();
    assert_eq!(journaled(&play.ready(1, facts(5, 0))), []);
    assert_eq!(journaled(&play.ready(1, facts(5, 0))), [], "said again");
    let agreed = play.ready(2, facts(5, 0));
    assert_eq!(journaled(&agreed), [Record::Facts { facts: facts(5, 0) }]);
    assert_eq!(play.job.facts(), Some(&facts(5, 0)));
}

#[test]
fn a_job_whose_steps_are_all_done_finishes_without_another() {
    let recovery = Recovery {
        generation: Generation(1),
        committed: Step(5),
        checkpoint: Step(5),
        facts: Some(facts(5, 0)),
        ..Recovery::default()
    };
    let mut play = Play::new(policy(1), recovery).0;
    play.join_all();
    let actions = play.ready(1, facts(5, 5));
    assert_eq!(told(&actions), [(1, CoordinatorMessage::Finish)]);
    let beat = play.beat(1, 5, Awaits::Go);
    assert_eq!(told(&beat), [(1, CoordinatorMessage::Finish)]);
    assert_eq!(outcome(&play.finish_all()), Some(Outcome::Completed));
}

#[test]
fn a_completed_run_needs_no_worker() {
    let recovery = Recovery {
        completed: true,
        ..Recovery::default()
    };
    let (_, actions) = Play::new(policy(1), recovery);
    assert_eq!(outcome(&actions), Some(Outcome::Completed));
}

#[test]
fn t6_a_step_that_is_not_finite_commits_as_skipped() {
    let mut play = Play::stepping(policy(2), 9);
    let actions = play.step(false);
    assert_eq!(flags(&actions), (false, false, false, false));
    assert!(matches!(journaled(&actions).as_slice(), [Record::Commit(it)] if !it.apply));
    assert!(
        actions
            .iter()
            .any(|it| matches!(it, Action::Note(note) if note.kind == "skip"))
    );
}

#[test]
fn t6_too_many_skips_in_a_row_end_the_job_after_a_checkpoint() {
    let mut play = Play::stepping(policy(2), 99);
    for finite in [false, false, true, false, false] {
        assert!(
            !flags(&play.step(finite)).3,
            "an applied step starts the count again"
        );
    }
    assert_eq!(flags(&play.step(false)), (false, true, false, true));
    assert_eq!(outcome(&play.checkpoint(6)), None);
    let done = play.finish_all();
    let Some(Outcome::Failed {
        cause: Cause::Fatal,
        reason,
    }) = outcome(&done)
    else {
        panic!("{done:?}");
    };
    assert!(
        reason.starts_with("3 steps in a row up to step 6"),
        "{reason}"
    );
    assert_eq!(journaled(&done), [], "a failed run is not complete");
}

#[test]
fn t6_skips_before_a_restart_count() {
    let recovery = Recovery {
        committed: Step(4),
        highest_committed: Step(4),
        checkpoint: Step(4),
        skipped: 2,
        ..Recovery::default()
    };
    let mut play = Play::new(policy(1), recovery).0;
    play.join_all();
    play.ready(1, facts(9, 4));
    assert!(flags(&play.step(false)).3);
}

#[test]
fn a_stop_before_the_first_step_ends_the_job_at_once() {
    for joined in 0..=2 {
        let recovery = Recovery {
            committed: Step(4),
            checkpoint: Step(4),
            ..Recovery::default()
        };
        let mut play = Play::new(policy(2), recovery).0;
        let _: Vec<_> = (1..=joined).flat_map(|it| play.join(it)).collect();
        let actions = stop(&mut play);
        assert_eq!(stopped(&actions), (1..=joined).collect::<Vec<_>>());
        assert_eq!(
            outcome(&actions),
            Some(Outcome::Interrupted { committed: Step(4) })
        );
    }
}

#[test]
fn a_stop_in_training_commits_and_saves_the_step_that_runs() {
    let mut play = Play::stepping(policy(2), 9);
    assert_eq!(told(&stop(&mut play)), []);
    assert_eq!(stop(&mut play), [], "asked again");
    assert_eq!(flags(&play.step(true)), (true, true, false, true));
    assert_eq!(outcome(&play.checkpoint(1)), None);
    let done = play.finish_all();
    assert_eq!(
        outcome(&done),
        Some(Outcome::Interrupted { committed: Step(1) })
    );
    assert_eq!(journaled(&done), []);
}

#[test]
fn a_stop_at_the_last_step_still_completes() {
    let mut play = Play::stepping(policy(1), 1);
    stop(&mut play);
    play.step(true);
    play.checkpoint(1);
    assert_eq!(outcome(&play.finish_all()), Some(Outcome::Completed));
}

#[test]
fn a_beat_that_waits_has_the_answer_repeated() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    let check = |actions: Vec<Action>, what: &str| match told(&actions).as_slice() {
        [(1, message)] => assert!(format!("{message:?}").starts_with(what), "{message:?}"),
        other => panic!("{what}: {other:?}"),
    };
    play.join(1);
    check(play.join(1), "Welcome");
    play.join_all();
    check(play.join(1), "Welcome");
    check(
        play.say_in(
            1,
            0,
            WorkerMessage::Beat {
                committed: Step(0),
                awaits: Awaits::Form,
                activity: Activity::default(),
            },
        ),
        "Form",
    );
    play.ready_all(2);
    check(play.beat(1, 0, Awaits::Go), "Go");
    play.step(true);
    // Late: it prepared since.
    check(play.beat(1, 0, Awaits::Go), "Heard");
    check(play.beat(1, 0, Awaits::Commit), "Commit { step: 1");
    check(play.prepare(1, report(1, true)), "Commit { step: 1");
    check(play.beat(1, 1, Awaits::Commit), "Heard");
    play.step(true);
    // Not durable yet.
    check(play.beat(1, 2, Awaits::End), "Heard");
    play.checkpoint(2);
    check(play.beat(1, 2, Awaits::End), "Finish");
}

#[test]
fn an_evaluation_is_recorded_once_and_only_from_rank_0() {
    let mut play = Play::stepping(policy(2), 9);
    let evaluated = |step| WorkerMessage::Evaluated {
        row: EvaluationRow {
            step,
            ..EvaluationRow::default()
        },
        samples: vec![],
    };
    assert_eq!(play.say(2, evaluated(0)), []);
    assert!(matches!(
        play.say(1, evaluated(0)).as_slice(),
        [
            Action::RecordEvaluation { .. },
            Action::Journal(Record::Evaluation { stop: None, .. })
        ]
    ));
    assert_eq!(play.say(1, evaluated(0)), []);
    assert_eq!(
        play.say(1, evaluated(1)),
        [],
        "of a step that is not committed"
    );
    play.step(true);
    assert!(matches!(
        play.say(1, evaluated(1)).as_slice(),
        [
            Action::RecordEvaluation { .. },
            Action::Journal(Record::Evaluation { stop: None, .. })
        ]
    ));
}

#[test]
fn progress_and_the_data_report_pass_through_once() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join_all();
    let progress = |done| WorkerMessage::Progress {
        phase: "load model".into(),
        done,
        total: 9,
    };
    assert!(matches!(
        play.say(2, progress(1)).as_slice(),
        [Action::Progress {
            rank: Rank(1),
            done: 1,
            ..
        }]
    ));
    assert_eq!(play.say(2, progress(1)), []);
    assert_eq!(play.job.workers()[1].phase, "load model 1/9");
    let report = WorkerMessage::DataReport {
        text: "100 pairs".into(),
    };
    assert_eq!(play.say(2, report.clone()), [], "rank 0 speaks for all");
    assert!(matches!(
        play.say(1, report.clone()).as_slice(),
        [Action::DataReport { .. }]
    ));
    assert_eq!(play.say(1, report), []);
}
