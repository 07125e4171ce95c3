//! What a job refuses, and that it says what is true instead.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod support;

use protocol::{
    Action, Activity, Awaits, Cause, CoordinatorMessage, Event, FromWorker, Generation,
    Incarnation, JobId, Outcome, Phases, Recovery, Step, WIRE_VERSION, WorkerMessage,
};
use support::{
    Play, checkpoint_committed, facts, join_message, journaled, notes, outcome, policy, report,
    stopped, told,
};

/// The only thing said, which is to stop, and why.
fn stop_reason(actions: &[Action]) -> String {
    match told(actions).as_slice() {
        [(_, CoordinatorMessage::Stop { reason, .. })] => reason.clone(),
        other => panic!("{other:?}"),
    }
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

#[test]
fn a_worker_of_another_build_or_wire_version_is_refused_and_others_may_join() {
    let mut play = Play::new(policy(1), Recovery::default()).0;
    let other_build = play.say_in(1, 0, join_message("other", WIRE_VERSION));
    let reason = stop_reason(&other_build);
    assert!(
        reason.contains("it runs build other, the coordinator build"),
        "{reason}"
    );
    let other_version = play.say_in(1, 0, join_message("build", WIRE_VERSION + 1));
    let reason = stop_reason(&other_version);
    let versions = format!(
        "it speaks wire version {}, the coordinator {WIRE_VERSION}",
        WIRE_VERSION + 1
    );
    assert!(reason.contains(&versions), "{reason}");
    assert!(matches!(
        told(&play.join(2))[0].1,
        CoordinatorMessage::Welcome { .. }
    ));
}

#[test]
fn a_worker_too_many_is_refused() {
    let mut play = Play::stepping(policy(2), 5);
    // Others wait, as many as may train.
    for spare in 3..=5 {
        assert_eq!(stopped(&play.join(spare)), [0; 0]);
    }
    let reason = stop_reason(&play.join(6));
    assert!(
        reason.contains("generation 1 has its 2 members already"),
        "{reason}"
    );
    let reason = stop_reason(&play.beat(6, 0, Awaits::Form));
    assert!(reason.contains("has its members already"), "{reason}");
    assert_eq!(play.job.workers().len(), 5);
}

#[test]
fn m1_a_message_of_another_job_is_refused() {
    let mut play = Play::stepping(policy(1), 5);
    let message = WorkerMessage::Prepared {
        report: report(1, true),
        gpu: protocol::GpuFigures::default(),
        phases: Phases::default(),
    };
    let from = FromWorker {
        job: JobId("other".into()),
        incarnation: Incarnation(1),
        generation: Generation(1),
        message,
    };
    let reason = stop_reason(&play.event(Event::Message(from)));
    assert!(reason.contains("runs job run, not other"), "{reason}");
    assert_eq!(play.job.committed(), Step(0));
}

#[test]
fn m1_a_message_of_an_old_generation_is_answered_with_the_truth_and_not_acted_on() {
    let recovery = Recovery {
        generation: Generation(6),
        ..Recovery::default()
    };
    let mut play = Play::new(policy(2), recovery).0;
    play.join_all();
    play.ready(1, facts(5, 0));
    for (worker, generation) in [(1, 0), (1, 6), (2, 0), (2, 6)] {
        let message = WorkerMessage::Prepared {
            report: report(1, true),
            gpu: protocol::GpuFigures::default(),
            phases: Phases::default(),
        };
        let actions = play.say_in(worker, generation, message);
        // The first has heard it already.
        let told = told(&actions);
        let form =
            |it: &(u64, CoordinatorMessage)| matches!(it, (2, CoordinatorMessage::Form { .. }));
        assert_eq!(
            (told.len(), told.iter().all(form)),
            (worker as usize - 1, true)
        );
        assert_eq!(journaled(&actions), []);
    }
}

#[test]
fn m1_who_speaks_of_an_old_generation_is_not_heard_as_alive() {
    let mut play = Play::stepping(policy(1), 5);
    play.now_ms += 4_000;
    let beat = WorkerMessage::Beat {
        committed: Step(0),
        awaits: Awaits::Nothing,
        activity: Activity::default(),
    };
    play.say_in(1, 0, beat);
    play.now_ms += 1_000;
    let lost = notes(&play.event(Event::Tick), "lost").concat();
    assert!(
        lost.contains("rank 0") && lost.contains("silent for 5 s"),
        "{lost}"
    );
}

#[test]
fn m1_a_worker_that_never_joined_is_told_the_truth_while_it_may_join() {
    let mut play = Play::new(policy(1), Recovery::default()).0;
    let actions = play.beat(9, 0, Awaits::Form);
    assert_eq!(
        told(&actions),
        [(9, CoordinatorMessage::Stale { committed: Step(0) })]
    );
}

#[test]
fn m2_a_worker_that_knows_a_later_commit_ends_the_job() {
    let recovery = Recovery {
        highest_committed: Step(3),
        ..Recovery::default()
    };
    let mut play = Play::new(policy(1), recovery).0;
    assert_eq!(
        outcome(&play.beat(9, 3, Awaits::Commit)),
        None,
        "rewound, but known"
    );
    let parts = ["knows commit 4, the journal ends at 3", "restore it"];
    failed(&play.beat(9, 4, Awaits::Commit), Cause::Fatal, &parts);
}

#[test]
fn members_that_found_different_facts_end_the_job_as_badly_configured() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join_all();
    play.ready(1, facts(5, 0));
    let mut other = facts(5, 0);
    other.data_digest = "ff".into();
    let actions = play.ready(2, other);
    failed(
        &actions,
        Cause::Config,
        &["rank 1", "data_digest ff", "rank 0 has"],
    );
    assert_eq!(stopped(&actions), [1, 2]);
    assert_eq!(journaled(&actions), []);
}

#[test]
fn facts_that_differ_from_the_journals_end_the_job_as_badly_configured() {
    let recovery = Recovery {
        facts: Some(facts(7, 0)),
        ..Recovery::default()
    };
    let mut play = Play::new(policy(1), recovery).0;
    play.join_all();
    let actions = play.ready(1, facts(5, 0));
    failed(
        &actions,
        Cause::Config,
        &["rank 0", "steps_total 5", "the journal has 7"],
    );
}

#[test]
fn a_member_whose_state_is_at_another_commit_ends_the_job() {
    let recovery = Recovery {
        committed: Step(4),
        checkpoint: Step(4),
        ..Recovery::default()
    };
    let mut play = Play::new(policy(1), recovery).0;
    play.join_all();
    let actions = play.ready(1, facts(9, 3));
    failed(
        &actions,
        Cause::Config,
        &["committed 3", "the journal has 4"],
    );
}

#[test]
fn votes_that_differ_in_one_bit_end_the_job_without_a_commit() {
    let mut play = Play::stepping(policy(2), 5);
    let mut other = report(1, true);
    other.statistics.rewards_margins = -0.0;
    play.prepare(1, report(1, true));
    let actions = play.prepare(2, other);
    let parts = [
        "rank 1",
        "rank 0",
        "step 1",
        "rewards/margins -0.0",
        "with 0.0",
    ];
    failed(&actions, Cause::Fatal, &parts);
    assert_eq!(journaled(&actions), []);
    assert_eq!(stopped(&actions), [1, 2]);
}

#[test]
fn votes_with_the_same_nan_agree_and_with_another_do_not() {
    let mut play = Play::stepping(policy(2), 5);
    play.step(false);
    assert_eq!(play.job.committed(), Step(1), "NaN votes alike");
    let mut other = report(2, false);
    other.grad_norm = f64::from_bits(f64::NAN.to_bits() | 1);
    play.prepare(1, report(2, false));
    let parts = ["grad_norm NaN with bits 0x7ff8000000000001"];
    failed(&play.prepare(2, other), Cause::Fatal, &parts);
}

#[test]
fn a_vote_repeated_is_one_vote_and_a_vote_changed_ends_the_job() {
    let mut play = Play::stepping(policy(2), 5);
    assert_eq!(play.prepare(1, report(1, true)), []);
    assert_eq!(play.prepare(1, report(1, true)), []);
    let mut changed = report(1, true);
    changed.tokens += 1;
    let parts = ["rank 0", "tokens 501", "with 500"];
    failed(&play.prepare(1, changed), Cause::Fatal, &parts);
}

#[test]
fn a_vote_on_a_step_out_of_order_is_not_counted() {
    let mut play = Play::stepping(policy(1), 9);
    play.step(true);
    play.step(true);
    let old = play.prepare(1, report(1, true));
    assert_eq!(
        told(&old),
        [(1, CoordinatorMessage::Stale { committed: Step(2) })]
    );
    failed(
        &play.prepare(1, report(4, true)),
        Cause::Fatal,
        &["step 4", "last commit is 2"],
    );
}

#[test]
fn a_vote_before_the_job_goes_ends_it() {
    let mut play = Play::new(policy(2), Recovery::default()).0;
    play.join_all();
    let parts = ["rank 0", "step 1", "nobody asked"];
    failed(&play.prepare(1, report(1, true)), Cause::Fatal, &parts);
}

#[test]
fn a_shard_that_nobody_asked_for_changes_nothing() {
    let mut play = Play::stepping(policy(1), 9);
    play.step(true);
    assert_eq!(play.save(1, 1), []);
    assert_eq!(play.event(checkpoint_committed(1)), []);
}

#[test]
fn who_speaks_after_the_end_is_told_to_stop() {
    let mut play = Play::stepping(policy(2), 9);
    let (cause, reason) = (Cause::Fatal, "a bug".into());
    play.say(2, WorkerMessage::Failed { cause, reason });
    let reason = stop_reason(&play.beat(1, 0, Awaits::Nothing));
    assert!(reason.contains("the job ended: failed: rank 1"), "{reason}");
    assert!(stop_reason(&play.join(5)).contains("the job ended"));
    assert_eq!(play.event(Event::Tick), []);
    assert_eq!(
        play.event(Event::StopRequested {
            reason: String::new()
        }),
        []
    );
}

#[test]
fn a_worker_that_does_not_know_the_only_jobs_name_is_heard() {
    let mut play = Play::new(policy(1), Recovery::default()).0;
    let from = FromWorker {
        job: JobId::default(),
        incarnation: Incarnation(1),
        generation: Generation(0),
        message: join_message("build", WIRE_VERSION),
    };
    let actions = play.event(Event::Message(from));
    assert!(matches!(
        told(&actions)[0].1,
        CoordinatorMessage::Welcome { .. }
    ));
}
