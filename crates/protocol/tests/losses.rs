//! Workers that are lost, silent, slow or broken, phase by phase, and what the job makes of each.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod support;

use protocol::{
    Action, Awaits, Cause, CoordinatorMessage, Event, FromWorker, Generation, Incarnation, JobId,
    JobPolicy, Outcome, Record, Recovery, Step, Waiting, WorkerMessage,
};
use support::{Play, aborted, cut, journaled, notes, outcome, policy, stopped, told};

fn lose(play: &mut Play, incarnation: u64) -> Vec<Action> {
    play.event(Event::Disconnected {
        incarnation: Incarnation(incarnation),
    })
}

fn failed(actions: &[Action], cause: Cause, parts: &[&str]) {
    match outcome(actions) {
        Some(Outcome::Failed {
            cause: found,
            reason,
        }) => {
            assert_eq!(found, cause, "{reason}");
            for part in parts {
                assert!(reason.contains(part), "{reason:?} does not say {part:?}");
            }
        }
        other => panic!("{other:?} instead of a failure that says {parts:?}"),
    }
}

/// The job goes on, puts `out` out, and says why.
fn goes_on(actions: &[Action], out: &[u64], parts: &[&str]) {
    assert_eq!((outcome(actions), stopped(actions)), (None, out.to_vec()));
    assert_eq!(journaled(actions), [], "nothing is committed or formed");
    let why = notes(actions, "lost").concat();
    for part in parts {
        assert!(why.contains(part), "{why:?} does not say {part:?}");
    }
}

/// A job of two whose last step is committed and being saved.
fn draining() -> Play {
    let mut play = Play::stepping(policy(2), 1);
    play.step(true);
    play
}

/// A job of two whose checkpoint is visible and whose members leave.
fn finishing() -> Play {
    let mut play = draining();
    play.checkpoint(1);
    play
}

#[test]
fn a_worker_lost_before_the_generation_is_formed_leaves_its_place_to_another() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join(1);
    assert_eq!(outcome(&lose(&mut play, 1)), None);
    assert_eq!(
        play.job.waiting(),
        Waiting::Join {
            joined: 0,
            world: 2
        }
    );
    for incarnation in [3, 4] {
        play.join(incarnation);
        play.held(incarnation, 0, vec![]);
    }
    assert!(matches!(play.job.waiting(), Waiting::Ready { .. }));
}

#[test]
fn a_worker_lost_while_loading_ends_the_generation_for_the_others() {
    let mut play = Play::new(policy(3), Recovery::default()).0;
    play.join_all();
    let progress = WorkerMessage::Progress {
        phase: "reference pass".into(),
        done: 3,
        total: 8,
    };
    play.say(2, progress);
    let actions = lose(&mut play, 2);
    let parts = [
        "rank 1 (worker any)",
        "reference pass 3/8",
        "connection closed",
    ];
    goes_on(&actions, &[2], &parts);
    assert_eq!(aborted(&actions), [1, 3]);
}

#[test]
fn a_worker_lost_in_a_step_that_nobody_replaces_ends_the_job_without_its_commit() {
    let mut play = Play::stepping(policy(2), 5);
    play.step(true);
    play.prepare(1, support::report(2, true));
    let actions = lose(&mut play, 2);
    goes_on(&actions, &[2], &["rank 1", "computes step 2"]);
    assert_eq!(aborted(&actions), [1]);
    play.held(1, 1, vec![cut(1, 0, 2, 1, false)]);
    assert_eq!(outcome(&play.pass(59_000, &[1])), None);
    let late = play.pass(1_000, &[1]);
    failed(&late, Cause::Temporary, &["1 here, 2 train", "for 60 s"]);
    assert_eq!((stopped(&late), journaled(&late)), (vec![1], vec![]));
}

#[test]
fn a_worker_lost_before_the_last_checkpoint_is_waited_for() {
    let actions = lose(&mut draining(), 1);
    goes_on(&actions, &[1], &["rank 0", "saves step 1"]);
    assert_eq!(aborted(&actions), [2]);
}

#[test]
fn a_worker_lost_once_all_is_durable_harms_nothing() {
    let mut play = finishing();
    assert_eq!(outcome(&lose(&mut play, 2)), None);
    let done = play.say(1, WorkerMessage::Finished);
    assert_eq!(outcome(&done), Some(Outcome::Completed));

    let mut play = finishing();
    play.say(1, WorkerMessage::Finished);
    assert_eq!(lose(&mut play, 1), [], "it left as it should");
    let failure = WorkerMessage::Failed {
        cause: Cause::Fatal,
        reason: "at exit".into(),
    };
    assert_eq!(outcome(&play.say(2, failure)), Some(Outcome::Completed));
}

#[test]
fn a_loss_of_somebody_else_changes_nothing() {
    let mut play = Play::stepping(policy(1), 5);
    assert_eq!(lose(&mut play, 9), []);
}

#[test]
fn a_silent_worker_is_lost_after_the_heartbeat_timeout_and_not_before() {
    let mut play = Play::stepping(policy(2), 5);
    assert_eq!(outcome(&play.pass(4_999, &[1])), None);
    assert_eq!(play.job.next_deadline(), Some(play.now_ms + 1));
    let parts = ["rank 1", "silent for 5 s"];
    goes_on(&play.pass(1, &[1]), &[2], &parts);
}

#[test]
fn a_silent_worker_loses_its_place_among_those_who_gather() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join(1);
    assert_eq!(outcome(&play.pass(5_000, &[])), None);
    assert_eq!(play.job.workers(), []);
}

#[test]
fn workers_that_do_not_come_end_the_job_after_the_join_timeout() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join(1);
    let actions = play.pass(60_000, &[1]);
    failed(
        &actions,
        Cause::Temporary,
        &["1 of 2 have", "for 60 s", "join timeout"],
    );
    assert_eq!(stopped(&actions), [1]);
}

#[test]
fn loading_may_take_as_long_as_it_goes_on() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join_all();
    play.ready(1, support::facts(5, 0));
    for done in 1..=5 {
        assert_eq!(outcome(&play.pass(29_000, &[1, 2])), None);
        let phase = "reference pass".into();
        play.say(
            2,
            WorkerMessage::Progress {
                phase,
                done,
                total: 9,
            },
        );
    }
    let stuck = WorkerMessage::Progress {
        phase: "reference pass".into(),
        done: 5,
        total: 9,
    };
    play.pass(29_000, &[1, 2]);
    play.say(2, stuck);
    let parts = [
        "rank 1 to be ready",
        "no progress for 30 s",
        "reference pass 5/9",
    ];
    goes_on(&play.pass(1_000, &[1, 2]), &[2], &parts);
}

#[test]
fn a_step_that_takes_too_long_goes_on_without_who_is_late() {
    let mut play = Play::stepping(policy(3), 5);
    play.prepare(1, support::report(1, true));
    play.prepare(3, support::report(1, true));
    let parts = ["rank 1 to compute step 1", "for 40 s", "step timeout"];
    goes_on(&play.pass(40_000, &[1, 2, 3]), &[2], &parts);
}

#[test]
fn each_step_has_its_own_time() {
    let mut play = Play::stepping(policy(1), 5);
    play.pass(30_000, &[1]);
    play.step(true);
    assert_eq!(outcome(&play.pass(30_000, &[1])), None);
}

#[test]
fn a_last_checkpoint_goes_on_without_who_is_late_and_ends_the_job_when_only_the_disk_is() {
    let mut play = draining();
    play.save(1, 1);
    let parts = ["rank 1 to save step 1", "for 50 s"];
    goes_on(&play.pass(50_000, &[1, 2]), &[2], &parts);

    let mut play = draining();
    play.save(1, 1);
    play.save(2, 1);
    let parts = ["checkpoint of step 1 to be verified", "for 50 s"];
    failed(&play.pass(50_000, &[1, 2]), Cause::Temporary, &parts);
}

#[test]
fn a_worker_that_does_not_leave_does_not_keep_a_durable_run_from_completing() {
    let mut play = finishing();
    play.say(1, WorkerMessage::Finished);
    let actions = play.pass(40_000, &[2]);
    assert_eq!(outcome(&actions), Some(Outcome::Completed));
}

#[test]
fn a_failed_checkpoint_in_training_is_told_and_training_goes_on() {
    let policy = JobPolicy {
        save_every: Some(1),
        ..policy(2)
    };
    let mut play = Play::stepping(policy, 5);
    play.step(true);
    let reason = "disk full".to_string();
    let actions = play.say(
        2,
        WorkerMessage::SaveFailed {
            step: Step(1),
            asked: Generation(0),
            reason,
        },
    );
    let [Action::Note(note)] = actions.as_slice() else {
        panic!("{actions:?}");
    };
    assert_eq!(note.kind, "unsaved");
    assert!(
        note.text.contains("rank 1 (worker any): disk full"),
        "{}",
        note.text
    );
    assert_eq!(play.save(1, 1), [], "given up");
    play.step(true);
    let failure = Event::CheckpointFailed {
        step: Step(2),
        reason: "torn".into(),
    };
    assert!(matches!(play.event(failure).as_slice(), [Action::Note(_)]));
    play.step(true);
    assert_eq!(play.job.committed(), Step(3));
}

#[test]
fn so_many_failed_checkpoints_in_a_row_end_the_job_and_one_that_holds_begins_the_count_anew() {
    let policy = JobPolicy {
        save_every: Some(1),
        ..policy(2)
    };
    let mut play = Play::stepping(policy, 9);
    let refused = |play: &mut Play, step: u64| {
        play.step(true);
        play.event(Event::CheckpointFailed {
            step: Step(step),
            reason: "disk full".into(),
        })
    };
    for step in [1, 2] {
        assert_eq!(outcome(&refused(&mut play, step)), None);
    }
    play.step(true);
    play.save(1, 3);
    play.save(2, 3);
    play.event(Event::CheckpointCommitted {
        step: Step(3),
        path: "step-3".into(),
    });
    for step in [4, 5] {
        assert_eq!(outcome(&refused(&mut play, step)), None);
    }
    let parts = [
        "3 checkpoints in a row",
        "checkpoint.failures_max",
        "step 6",
        "disk full",
    ];
    failed(&refused(&mut play, 6), Cause::Fatal, &parts);
}

/// Both ways in which a checkpoint fails: a part could not be written, or the manifest.
fn failures(step: u64) -> [Event; 2] {
    let step = Step(step);
    let reason = "disk full".to_string();
    let (asked, generation) = (Generation(0), Generation(0));
    let message = WorkerMessage::SaveFailed {
        step,
        asked,
        reason: reason.clone(),
    };
    let said = Event::Message(FromWorker {
        job: JobId("run".into()),
        incarnation: Incarnation(1),
        generation,
        message,
    });
    [said, Event::CheckpointFailed { step, reason }]
}

/// The event in the generation that holds now.
fn now(play: &Play, mut event: Event) -> Event {
    if let Event::Message(message) = &mut event {
        message.generation = play.job.generation();
    }
    event
}

/// Both members leave the generation with the state of step 1, and the pause before the next try passes.
fn tries_again(play: &mut Play) {
    let generation = play.job.generation().0;
    for member in 1..=2 {
        let held = vec![cut(generation, member as u32 - 1, 2, 1, true)];
        assert_eq!(journaled(&play.held(member, generation, held)), []);
    }
    let early = play.pass(7_999, &[1, 2]);
    assert_eq!((journaled(&early), outcome(&early)), (vec![], None));
    let again = play.pass(1, &[1, 2]);
    assert_eq!(
        journaled(&again),
        [support::generation(generation + 1, &[1, 2])]
    );
    let go = play.ready_all(1);
    let saves = |(_, message): &(u64, CoordinatorMessage)| {
        matches!(
            message,
            CoordinatorMessage::Go {
                save: true,
                last: true,
                ..
            }
        )
    };
    assert_eq!(told(&go).iter().filter(|it| saves(it)).count(), 2);
}

#[test]
fn a_last_checkpoint_that_failed_is_tried_again_after_a_pause_and_then_the_job_completes() {
    for failure in failures(1) {
        let mut play = draining();
        play.save(2, 1);
        let failure = now(&play, failure);
        let actions = play.event(failure);
        let why = notes(&actions, "unsaved").concat();
        assert!(why.contains("checkpoint of step 1"), "{why}");
        assert!(why.contains("disk full"), "{why}");
        assert_eq!((aborted(&actions), outcome(&actions)), (vec![1, 2], None));
        tries_again(&mut play);
        let durable = play.checkpoint(1);
        assert_eq!(journaled(&durable), [Record::Checkpoint { step: Step(1) }]);
        assert_eq!(outcome(&play.finish_all()), Some(Outcome::Completed));
    }
}

#[test]
fn a_last_checkpoint_is_tried_so_often_and_not_without_members_that_hold_its_state() {
    for failure in failures(1) {
        let mut play = draining();
        for _ in 1..=2 {
            let failure = now(&play, failure.clone());
            assert_eq!(outcome(&play.event(failure)), None);
            tries_again(&mut play);
        }
        let parts = [
            "3 checkpoints in a row",
            "checkpoint of step 1",
            "disk full",
        ];
        let failure = now(&play, failure);
        failed(&play.event(failure), Cause::Fatal, &parts);
    }
    let mut play = draining();
    play.save(1, 1);
    play.save(2, 1);
    lose(&mut play, 1);
    lose(&mut play, 2);
    let [_, failure] = failures(1);
    let parts = ["checkpoint of step 1", "disk full"];
    failed(&play.event(failure), Cause::Fatal, &parts);
}

#[test]
fn a_worker_that_cannot_go_on_is_a_loss_where_another_try_may_help_and_ends_the_job_where_not() {
    for cause in [Cause::Config, Cause::Temporary, Cause::Fatal] {
        let mut play = Play::stepping(policy(2), 5);
        let reason = "model.path does not exist".to_string();
        let actions = play.say(2, WorkerMessage::Failed { cause, reason });
        if cause == Cause::Temporary {
            goes_on(&actions, &[2], &["rank 1", "model.path does not exist"]);
            continue;
        }
        let parts = ["rank 1 (worker any): model.path does not exist"];
        failed(&actions, cause, &parts);
        assert_eq!(stopped(&actions), [1]);
    }
}

#[test]
fn a_worker_that_fails_before_its_form_is_heard() {
    let failure = || WorkerMessage::Failed {
        cause: Cause::Config,
        reason: "no such key".into(),
    };
    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join(1);
    failed(
        &play.say_in(1, 0, failure()),
        Cause::Config,
        &["worker any", "no such key"],
    );

    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join_all();
    failed(
        &play.say_in(1, 0, failure()),
        Cause::Config,
        &["rank 0 (worker any)", "no such key"],
    );
}

#[test]
fn workers_tell_what_they_do_and_when_they_were_heard() {
    let mut play = Play::stepping(policy(2), 5);
    play.now_ms += 100;
    play.prepare(2, support::report(1, true));
    let seen: Vec<_> = play
        .job
        .workers()
        .into_iter()
        .map(|it| (it.phase, it.last_heard_ms))
        .collect();
    assert_eq!(
        seen,
        [
            ("computes step 1".into(), 1_000),
            ("prepared step 1".into(), 1_100)
        ]
    );
    play.prepare(1, support::report(1, true));
    play.beat(1, 1, Awaits::Nothing);
    let known: Vec<_> = play.job.workers().iter().map(|it| it.committed).collect();
    assert_eq!(known, [Step(1), Step(0)]);
}
