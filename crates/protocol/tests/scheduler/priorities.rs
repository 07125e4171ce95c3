//! The higher priority goes first, and what runs with a lower one makes room.

use protocol::{Incarnation, JobId, JobSummaryState, NewJob, Outcome, SchedulerEvent};

use crate::play::{Play, interrupted, lost, new_job, notes, stopped};

fn prior(name: &str, workers: u32, priority: i32) -> NewJob {
    NewJob {
        priority,
        ..new_job(name, workers)
    }
}

/// Running jobs as (name, workers, priority), each on workers of its own.
fn running(jobs: &[(&str, u32, i32)]) -> Play {
    let mut play = Play::new();
    let mut worker = 0;
    for (name, workers, priority) in jobs {
        for _ in 0..*workers {
            worker += 1;
            play.join(worker);
        }
        play.submit(prior(name, *workers, *priority))
            .expect("taken");
        assert_eq!(play.state(name), JobSummaryState::Running, "{name}");
    }
    play
}

#[test]
fn the_queue_is_ordered_by_priority_then_by_submission() {
    let mut play = Play::new();
    for (name, priority) in [("a", 0), ("b", -1), ("c", 7), ("d", 0), ("e", 7)] {
        play.submit(prior(name, 1, priority)).expect("taken");
    }
    let queue = play.scheduler.jobs().into_iter().map(|it| it.id.0);
    assert_eq!(queue.collect::<Vec<_>>(), ["c", "e", "a", "d", "b"]);
    assert_eq!(play.waiting("e"), "waits for the job before it");
    assert_eq!(play.waiting("b"), "waits for the 4 jobs before it");
    for (worker, name) in (1..).zip(["c", "e", "a", "d", "b"]) {
        play.join(worker);
        assert_eq!(play.members(name), [worker], "{name}");
    }
}

#[test]
fn a_higher_priority_takes_workers_of_a_lower_one_which_saves_and_goes_on_after_it() {
    let mut play = running(&[("low", 2, 0)]);
    play.submit(prior("other", 1, 0)).expect("taken");
    assert!(play.stopping.is_empty(), "nobody makes room for an equal");
    play.submit(prior("high", 2, 5)).expect("taken");
    assert!(play.stopping.contains(&JobId("low".into())));
    let said = play.waiting("low");
    assert_eq!(
        said,
        "saves and stops: makes room for job high, whose priority is 5 and not 0"
    );
    let said = play.waiting("high");
    assert!(
        said.contains("0 idle, 2 in other jobs, 2 soon idle"),
        "{said}"
    );
    let actions = play.end_and_return("low", interrupted(7), 7);
    assert_eq!(play.members("high"), [1_001, 1_002]);
    let said = notes(&actions, "queue");
    assert!(said[0].contains("makes room for job high"), "{said:?}");
    assert!(said[0].contains("from step 7"), "{said:?}");
    assert_eq!(play.state("low"), JobSummaryState::Queued);
    assert_eq!(play.waiting("other"), "waits for the job before it");
    let actions = play.end_and_return("high", Outcome::Completed, 9);
    assert!(stopped(&actions).is_empty(), "{actions:?}");
    assert_eq!(
        play.members("low"),
        [2_001, 2_002],
        "before the younger one"
    );
}

#[test]
fn making_room_is_no_failed_attempt_even_if_the_state_could_not_be_saved() {
    let mut play = running(&[("low", 1, 0)]);
    for round in 0..10 {
        let high = format!("high{round}");
        play.submit(prior(&high, 1, 1)).expect("taken");
        let outcome = if round % 2 == 0 {
            interrupted(3)
        } else {
            lost()
        };
        play.end_and_return("low", outcome, 3);
        assert_eq!(play.state("low"), JobSummaryState::Queued, "round {round}");
        play.end_and_return(&high, Outcome::Completed, 1);
        assert_eq!(play.state("low"), JobSummaryState::Running, "round {round}");
    }
}

#[test]
fn the_fewest_jobs_make_room_and_of_these_the_lowest_then_the_newest() {
    let asked = |jobs: &[(&str, u32, i32)], wanted| {
        let mut play = running(jobs);
        play.submit(prior("high", wanted, 9)).expect("taken");
        let asked = play.stopping.iter().map(|id| id.0.clone());
        asked.collect::<Vec<_>>()
    };
    assert_eq!(asked(&[("a", 1, 0), ("b", 1, 0)], 1), ["b"]);
    assert_eq!(asked(&[("a", 1, -1), ("b", 1, 0)], 1), ["a"]);
    assert_eq!(asked(&[("a", 1, 0), ("b", 1, 0), ("c", 2, 5)], 2), ["c"]);
    assert_eq!(
        asked(&[("a", 1, 0), ("b", 1, 9), ("c", 1, 2)], 2),
        ["a", "c"]
    );
}

#[test]
fn none_is_stopped_when_that_would_not_be_enough() {
    let mut play = running(&[("low", 2, 0), ("equal", 1, 5)]);
    play.submit(prior("high", 3, 5)).expect("taken");
    assert!(play.stopping.is_empty());
    // A worker that is to leave is no gain either.
    play.event(SchedulerEvent::DrainRequested { name: "w1".into() });
    play.join(4);
    assert!(play.stopping.is_empty());
    play.join(5);
    assert!(play.stopping.contains(&JobId("low".into())));
}

#[test]
fn while_workers_come_back_nobody_else_makes_room_and_if_they_do_not_others_do() {
    let mut play = running(&[("a", 1, 0), ("b", 1, 0), ("c", 1, 0)]);
    play.submit(prior("high", 1, 5)).expect("taken");
    assert!(play.stopping.contains(&JobId("c".into())));
    // Its worker leaves first, then it ends, and nothing waits here for a while.
    play.gone(3);
    play.end("c", interrupted(2), 2);
    play.pass(4_000);
    assert!(play.stopping.is_empty(), "its worker is expected");
    let said = play.waiting("high");
    assert_eq!(
        said,
        "waits for 1 worker: 0 idle, 2 in other jobs, 1 soon idle"
    );
    let actions = play.pass(2_000);
    assert_eq!(stopped(&actions), ["b"], "it is lost");
    play.end_and_return("b", interrupted(2), 2);
    assert_eq!(play.members("high"), [1_002]);
    assert_eq!(play.state("a"), JobSummaryState::Running);
}

#[test]
fn workers_that_come_back_go_to_the_job_that_they_were_stopped_for() {
    let mut play = running(&[("a", 2, 0), ("b", 2, 0)]);
    // It lacks one, and would take the first that is idle.
    play.gone(1);
    play.submit(prior("high", 2, 5)).expect("taken");
    assert_eq!(play.stopping.len(), 1, "{:?}", play.stopping);
    assert!(play.stopping.contains(&JobId("b".into())));
    play.end_and_return("b", interrupted(2), 2);
    assert_eq!(play.members("high"), [1_003, 1_004]);
    assert_eq!(play.members("a"), [2]);
    play.join(9);
    assert_eq!(play.members("a"), [2, 9], "then it gets one, before b");
}

#[test]
fn a_job_that_lost_workers_gets_others_when_the_higher_one_cannot_start_anyway() {
    let mut play = running(&[("low", 2, 0)]);
    play.submit(prior("huge", 9, 5)).expect("taken");
    play.gone(1);
    play.join(3);
    assert_eq!(play.members("low"), [2, 3]);
}

#[test]
fn the_newest_highest_job_gets_what_was_freed_for_another() {
    let mut play = running(&[("low", 1, 0)]);
    play.submit(prior("high", 1, 5)).expect("taken");
    let (_, _, actions) = play
        .scheduler
        .submit(play.now_ms, prior("higher", 1, 6))
        .expect("taken");
    assert!(stopped(&actions).is_empty(), "one is enough: {actions:?}");
    play.end_and_return("low", interrupted(2), 2);
    assert_eq!(play.members("higher"), [1_001]);
    // What waits for its retry keeps its place.
    play.event(SchedulerEvent::Gone {
        incarnation: Incarnation(1_001),
    });
    play.end("higher", lost(), 0);
    play.join(7);
    assert_eq!(play.state("high"), JobSummaryState::Queued);
    play.pass(1_000);
    assert_eq!(play.members("higher"), [7]);
}

#[test]
fn what_a_job_needs_for_its_next_attempt_is_not_lent_to_others_meanwhile() {
    let mut play = Play::new();
    let wide = NewJob {
        workers_max: 9,
        ..new_job("wide", 1)
    };
    play.join(1);
    play.submit(wide).expect("taken");
    play.submit(prior("high", 1, 1)).expect("taken");
    assert!(play.stopping.contains(&JobId("wide".into())));
    play.end_and_return("wide", interrupted(1), 1);
    play.join(2);
    assert_eq!(play.members("wide"), [2]);
    play.end_and_return("high", lost(), 3);
    play.join(3);
    assert_eq!(play.members("wide"), [2], "high tries again in a second");
    play.pass(1_000);
    assert_eq!(play.members("high"), [2_001]);
    assert_eq!(play.members("wide"), [2, 3], "which is left over");
}
