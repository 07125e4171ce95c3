//! The queue of a coordinator that serves job after job: order, losses, retries, cancelling, draining, recovery.

#[path = "../support/mod.rs"]
mod support;

mod limits;
mod pauses;
mod play;
mod priorities;
mod random;

use protocol::{
    Afterwards, Cause, Incarnation, JobId, JobRecord, JobSummaryState, NewJob, Outcome,
    SchedulerAction, SchedulerEvent, SubmitError, WIRE_VERSION, recover_jobs,
};

use play::{Play, dismissed, interrupted, lost, new_job, notes, stopped};
use support::profile;

#[test]
fn a_job_starts_when_enough_workers_wait_and_the_queue_keeps_its_order() {
    let mut play = Play::new();
    play.submit(new_job("large", 2)).expect("taken");
    play.submit(new_job("small", 1)).expect("taken");
    play.join(1);
    assert!(
        play.running.is_empty(),
        "the head wants two, and a small job may not overtake it"
    );
    assert!(
        play.waiting("large")
            .contains("1 idle; start 1 worker more")
    );
    assert_eq!(play.waiting("small"), "waits for the job before it");
    play.join(2);
    assert_eq!(play.running[&JobId("large".into())], [1, 2]);
    play.join(3);
    assert_eq!(play.running[&JobId("small".into())], [3]);
    play.end("large", Outcome::Completed, 9);
    assert_eq!(play.state("large"), JobSummaryState::Completed);
}

#[test]
fn a_submission_is_repeated_safely_by_its_key_and_a_name_is_taken_until_its_job_ends() {
    let mut play = Play::new();
    let keyed = NewJob {
        key: "k".into(),
        ..new_job("a", 1)
    };
    assert_eq!(play.submit(keyed.clone()), Ok(true));
    assert_eq!(play.submit(keyed.clone()), Ok(false));
    let other = NewJob {
        config_toml: "other".into(),
        ..keyed.clone()
    };
    assert!(matches!(
        play.submit(other),
        Err(SubmitError::KeyTaken { .. })
    ));
    let again = play.submit(new_job("a", 1)).expect_err("the name is taken");
    let said = again.to_string();
    for part in [
        "queued",
        "another job.name",
        "coordinator cancel a",
        "--key",
    ] {
        assert!(said.contains(part), "no `{part}` in: {said}");
    }
    play.join(1);
    play.end("a", Outcome::Completed, 3);
    // The key still answers for what it did; without one the run directory is gone on with.
    assert_eq!(play.submit(keyed), Ok(false));
    assert_eq!(play.submit(new_job("a", 1)), Ok(true));
    assert_eq!(play.scheduler.jobs().len(), 1);
}

#[test]
fn a_job_that_loses_workers_goes_on_after_a_pause_before_the_jobs_behind_it() {
    let mut play = Play::new();
    play.submit(new_job("a", 1)).expect("taken");
    play.submit(new_job("b", 1)).expect("taken");
    play.join(1);
    play.event(SchedulerEvent::Gone {
        incarnation: Incarnation(1),
    });
    play.end("a", lost(), 4);
    assert_eq!(play.state("a"), JobSummaryState::Queued);
    play.join(2);
    assert!(
        play.running.is_empty(),
        "a waits its pause out, and b waits behind it"
    );
    play.pass(1_000);
    assert_eq!(play.running[&JobId("a".into())], [2]);
    play.join(3);
    assert_eq!(play.running[&JobId("b".into())], [3]);
}

#[test]
fn attempts_that_come_no_further_end_a_job_and_progress_forgives() {
    let mut play = Play::new();
    play.submit(new_job("a", 1)).expect("taken");
    let mut worker = 0;
    // Two losses at step 4, then progress, then three at step 6.
    for (committed, ended) in [(4, false), (4, false), (6, false), (5, false), (6, true)] {
        worker += 1;
        play.join(worker);
        assert_eq!(play.state("a"), JobSummaryState::Running, "at {committed}");
        play.event(SchedulerEvent::Gone {
            incarnation: Incarnation(worker),
        });
        play.end("a", lost(), committed);
        play.pass(10_000);
        let failed = play.state("a") == JobSummaryState::Failed;
        assert_eq!(failed, ended, "at {committed}: {}", play.waiting("a"));
    }
    let said = play.waiting("a");
    assert!(
        said.contains("3 attempts in a row") && said.contains("rank 1 was lost"),
        "{said}"
    );
}

#[test]
fn what_fails_for_its_input_is_not_tried_again() {
    for cause in [Cause::Config, Cause::Fatal] {
        let mut play = Play::new();
        play.submit(new_job("a", 1)).expect("taken");
        play.join(1);
        let reason = "no such key".into();
        play.end("a", Outcome::Failed { cause, reason }, 0);
        assert_eq!(play.state("a"), JobSummaryState::Failed);
        assert!(play.waiting("a").contains("no such key"));
    }
}

#[test]
fn a_cancelled_job_ends_at_once_in_the_queue_and_after_saving_when_it_runs() {
    let mut play = Play::new();
    play.submit(new_job("a", 1)).expect("taken");
    play.submit(new_job("b", 1)).expect("taken");
    let cancel = |name: &str| SchedulerEvent::CancelRequested {
        id: JobId(name.into()),
        reason: "too slow".into(),
    };
    play.event(cancel("b"));
    assert_eq!(play.state("b"), JobSummaryState::Cancelled);
    play.join(1);
    assert_eq!(stopped(&play.event(cancel("a"))), ["a"]);
    assert_eq!(play.state("a"), JobSummaryState::Running, "it saves first");
    play.end("a", interrupted(5), 5);
    assert_eq!(play.state("a"), JobSummaryState::Cancelled);
    assert!(play.waiting("a").contains("too slow"));
}

#[test]
fn a_worker_that_is_drained_is_asked_of_its_job_and_replaced() {
    let mut play = Play::new();
    play.submit(new_job("a", 1)).expect("taken");
    play.join(1);
    let released = |actions: &[SchedulerAction]| {
        let asked = actions.iter().filter_map(|it| match it {
            SchedulerAction::Release {
                id, incarnation, ..
            } => Some((id.0.clone(), incarnation.0)),
            _ => None,
        });
        asked.collect::<Vec<_>>()
    };
    let actions = play.event(SchedulerEvent::DrainRequested { name: "w1".into() });
    assert_eq!(released(&actions), [("a".to_owned(), 1)]);
    assert!(stopped(&actions).is_empty());
    // Asked again, nothing new happens.
    let again = play.event(SchedulerEvent::DrainRequested { name: "w1".into() });
    assert!(released(&again).is_empty());
    play.gone(1);
    play.join(3);
    assert_eq!(play.running[&JobId("a".into())], [3]);
    // Who waits leaves at once.
    play.join(4);
    let actions = play.event(SchedulerEvent::DrainRequested { name: "w4".into() });
    assert_eq!(dismissed(&actions), [(4, Afterwards::Leave, "drained")]);
}

#[test]
fn idle_workers_go_to_jobs_that_lost_some_then_to_the_queue_then_to_jobs_that_take_more() {
    let mut play = Play::new();
    let wide = NewJob {
        workers_max: 3,
        ..new_job("wide", 2)
    };
    play.submit(wide).expect("taken");
    play.join(1);
    play.join(2);
    play.submit(new_job("next", 1)).expect("taken");
    play.gone(1);
    play.join(3);
    assert_eq!(play.running[&JobId("wide".into())], [2, 3], "it lost one");
    play.join(4);
    assert_eq!(play.running[&JobId("next".into())], [4]);
    play.join(5);
    assert_eq!(play.running[&JobId("wide".into())], [2, 3, 5]);
    play.join(6);
    assert_eq!(play.running[&JobId("wide".into())], [2, 3, 5], "its most");
    // While it writes its export it takes nobody.
    play.event(SchedulerEvent::Released {
        id: JobId("wide".into()),
    });
    play.running.insert(JobId("wide".into()), Vec::new());
    let back = play.come_back(2, "wide");
    assert_eq!(dismissed(&back)[0].1, Afterwards::Rejoin);
}

#[test]
fn workers_that_hold_a_jobs_state_go_to_that_job_alone() {
    let mut before = Play::new();
    before.submit(new_job("first", 3)).expect("taken");
    before.submit(new_job("second", 2)).expect("taken");
    // The coordinator starts again; two workers of the second job are still there.
    let mut play = Play::with(&before.journal);
    play.come_back(1, "second");
    assert_eq!(
        play.running[&JobId("second".into())],
        [1],
        "it begins with those who hold it"
    );
    play.come_back(2, "second");
    assert_eq!(play.running[&JobId("second".into())], [1, 2]);
    // A new session of one that is known is handed on, too.
    let again = play.come_back(2, "second");
    assert!(matches!(
        again[..],
        [SchedulerAction::Lend {
            incarnation: Incarnation(2),
            ..
        }]
    ));
    let strange = play.come_back(3, "unheard-of");
    let (incarnation, afterwards, reason) = dismissed(&strange)[0];
    assert_eq!((incarnation, afterwards), (3, Afterwards::Rejoin));
    assert!(reason.contains("unheard-of"), "{reason}");
}

#[test]
fn strangers_are_told_to_stay_away_and_twins_to_come_again() {
    let mut play = Play::new();
    let join = |play: &mut Play, incarnation, profile| {
        play.event(SchedulerEvent::Joined {
            incarnation: Incarnation(incarnation),
            profile,
            job: None,
        })
    };
    let other_build = join(&mut play, 1, profile("a", "other", WIRE_VERSION));
    let told = dismissed(&other_build);
    assert_eq!((told[0].0, told[0].1), (1, Afterwards::Refused));
    assert!(told[0].2.contains("install the same version on both"));
    let other_wire = join(&mut play, 2, profile("a", "build", WIRE_VERSION + 1));
    assert_eq!(dismissed(&other_wire)[0].1, Afterwards::Refused);
    assert!(dismissed(&join(&mut play, 3, profile("a", "build", WIRE_VERSION))).is_empty());
    let twin = join(&mut play, 4, profile("a", "build", WIRE_VERSION));
    let told = dismissed(&twin);
    assert_eq!((told[0].0, told[0].1), (4, Afterwards::Rejoin));
    assert!(told[0].2.contains("--name"), "{}", told[0].2);
}

#[test]
fn a_silent_worker_is_dropped_and_the_head_says_what_it_waits_for_each_minute() {
    let mut play = Play::new();
    play.submit(new_job("a", 2)).expect("taken");
    play.join(1);
    play.pass(4_000);
    play.event(SchedulerEvent::Heard {
        incarnation: Incarnation(1),
    });
    let actions = play.pass(6_000);
    assert_eq!(dismissed(&actions)[0].0, 1);
    assert_eq!(play.scheduler.workers().count(), 0);
    let actions = play.pass(120_000);
    let said = notes(&actions, "wait");
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(
        said[0].contains("job a waits for 2 workers: 0 idle"),
        "{said:?}"
    );
}

#[test]
fn a_shutdown_saves_running_jobs_and_a_restart_finds_all_of_them_again() {
    let mut play = Play::new();
    for name in ["done", "runs", "waits"] {
        play.submit(new_job(name, 1)).expect("taken");
    }
    play.join(1);
    play.end("done", Outcome::Completed, 8);
    play.join(2);
    assert_eq!(play.state("runs"), JobSummaryState::Running);
    let reason = "SIGTERM".to_owned();
    let actions = play.event(SchedulerEvent::ShutdownRequested { reason });
    assert_eq!(stopped(&actions), ["runs"]);
    assert!(!play.scheduler.is_shut_down());
    assert_eq!(
        play.submit(new_job("late", 1)),
        Err(SubmitError::ShuttingDown)
    );
    play.end("runs", interrupted(5), 5);
    assert!(play.scheduler.is_shut_down());
    play.join(3);
    assert!(play.running.is_empty(), "nothing starts any more");

    // After the shutdown, and after a kill at any record before it.
    for length in 0..=play.journal.len() {
        let again = Play::with(&play.journal[..length]);
        let submitted = play.journal[..length]
            .iter()
            .filter(|it| matches!(it, JobRecord::Submitted { .. }))
            .count();
        let jobs = again.scheduler.jobs();
        assert_eq!(jobs.len(), submitted);
        assert!(jobs.iter().all(|it| it.state != JobSummaryState::Running));
        let compact = recover_jobs(&recover_jobs(&play.journal[..length]).records());
        assert_eq!(compact, recover_jobs(&play.journal[..length]));
    }
    let mut again = Play::with(&play.journal.clone());
    assert_eq!(again.state("done"), JobSummaryState::Completed);
    again.join(4);
    assert_eq!(again.running[&JobId("runs".into())], [4]);
}

#[test]
fn a_beat_of_one_of_thousands_moves_one_deadline() {
    let mut play = Play::new();
    let count = 5_000;
    for worker in 1..=count {
        let joined = SchedulerEvent::Joined {
            incarnation: Incarnation(worker),
            profile: profile(&format!("w{worker}"), "build", WIRE_VERSION),
            job: None,
        };
        play.scheduler.handle(0, joined);
    }
    for now_ms in 1..=100 {
        for worker in 2..=count {
            let incarnation = Incarnation(worker);
            let heard = SchedulerEvent::Heard { incarnation };
            assert_eq!(play.scheduler.handle(now_ms, heard), []);
            assert_eq!(play.scheduler.next_deadline(), Some(5_000), "of the first");
        }
    }
    play.now_ms = 5_000;
    let lost = play.event(SchedulerEvent::Tick);
    let dismissed: Vec<u64> = dismissed(&lost).iter().map(|it| it.0).collect();
    assert_eq!(dismissed, [1]);
    assert_eq!(play.scheduler.next_deadline(), Some(5_100));
}
