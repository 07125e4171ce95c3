//! Elastic jobs watch their members: who hangs, who is slow, who is late, whom others suspect; and how long that may take.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod support;

use protocol::{
    Action, Activity, Afterwards, Awaits, CoordinatorMessage, Event, JobPolicy, Liveness, Phases,
    Rank, Recovery, WIRE_VERSION, Work, WorkerMessage,
};
use support::{
    Play, aborted, cut, elastic, facts, failed, generation, join_message, journaled, notes,
    outcome, report, stopped, told,
};

fn beat(play: &mut Play, incarnation: u64, work: Work, progress: u64) -> Vec<Action> {
    let step = play.job.committed().next();
    let activity = Activity {
        step,
        work,
        progress,
    };
    play.say(
        incarnation,
        WorkerMessage::Beat {
            committed: play.job.committed(),
            awaits: Awaits::Nothing,
            activity,
        },
    )
}

#[test]
fn a_hang_is_told_apart_from_a_death_and_from_a_wait_for_a_peer() {
    let mut play = Play::elastic(2, 1, 99);
    for _ in 0..3 {
        play.now_ms += 2_000;
        play.step(true);
    }
    // Five times the usual 2 s.
    let mut actions = Vec::new();
    for second in 1..=10u64 {
        play.now_ms += 1_000;
        actions.extend(beat(&mut play, 1, Work::Exchanges, second));
        actions.extend(beat(&mut play, 2, Work::Computes, 3));
        assert_eq!(aborted(&actions), [0; 0], "after {second} s");
        actions.extend(play.event(Event::Tick));
        assert!(
            play.job
                .liveness(play.now_ms)
                .iter()
                .all(|it| it.1 == Liveness::Green)
        );
    }
    play.now_ms += 1_000;
    let hung = play.event(Event::Tick);
    assert_eq!((aborted(&hung), stopped(&hung)), (vec![1], vec![2]));
    let why = &notes(&hung, "lost")[0];
    assert!(
        why.contains("rank 1 (worker any) hangs: its heartbeats come"),
        "{why}"
    );
}

#[test]
fn m5_a_worker_that_comes_back_and_never_says_what_it_holds_is_to_be_started_again() {
    let mut play = Play::elastic(3, 2, 99);
    // Taken for dead, and in no hurry to come back: it is told to leave what it computes.
    play.lose(3);
    for incarnation in 1..=2 {
        play.held(
            incarnation,
            1,
            vec![cut(1, incarnation as u32 - 1, 3, 0, false)],
        );
    }
    for incarnation in 1..=2 {
        play.ready(incarnation, facts(99, 0));
    }
    let stuck = play.say_in(3, 1, join_message("build", WIRE_VERSION));
    assert_eq!(stopped(&stuck), [0; 0]);
    let slow = play.say_in(4, 0, join_message("build", WIRE_VERSION));
    assert_eq!(stopped(&slow), [0; 0]);
    // The step's 40 s.
    for second in 1..40u64 {
        play.now_ms += 1_000;
        for incarnation in 1..=4 {
            beat(&mut play, incarnation, Work::Exchanges, second);
        }
        if second % 10 == 0 {
            for incarnation in 1..=2 {
                play.prepare(incarnation, report(second / 10, true));
            }
        }
        if second == 39 {
            let generation = play.job.generation().0;
            play.held(4, generation, vec![]);
        }
        let waits = play.event(Event::Tick);
        assert_eq!(stopped(&waits), [0; 0], "after {second} s");
    }
    play.now_ms += 1_000;
    let over = play.event(Event::Tick);
    let restart = |it: &&(u64, CoordinatorMessage)| {
        matches!(
            it.1,
            CoordinatorMessage::Stop {
                afterwards: Afterwards::Restart,
                ..
            }
        )
    };
    let told = told(&over);
    let restarted: Vec<u64> = told.iter().filter(restart).map(|it| it.0).collect();
    assert_eq!(restarted, [3]);
    let why = notes(&over, "lost").concat();
    assert!(why.contains("worker any is stuck"), "{why}");
    // Its place is free.
    let again = play.join(5);
    assert_eq!(stopped(&again), [0; 0]);
}

#[test]
fn late_is_not_dead() {
    let mut play = Play::elastic(2, 1, 99);
    for second in 0..8u64 {
        play.now_ms += 1_000;
        beat(&mut play, 1, Work::Computes, second);
        beat(&mut play, 2, Work::Computes, second);
    }
    let heard_ms = play.now_ms;
    play.now_ms += 3_500;
    beat(&mut play, 1, Work::Computes, 9);
    let late = play.event(Event::Tick);
    assert!(notes(&late, "late")[0].contains("rank 1 (worker any) is late: silent for 3.5 s"));
    assert_eq!(aborted(&late), [0; 0]);
    let of = |play: &Play| play.job.liveness(play.now_ms)[1].1;
    assert_eq!(of(&play), Liveness::Yellow);
    assert_eq!(notes(&play.event(Event::Tick), "late"), [""; 0], "once");
    play.now_ms = heard_ms + 4_999;
    beat(&mut play, 2, Work::Computes, 10);
    assert_eq!(of(&play), Liveness::Green);
    play.now_ms += 5_000;
    beat(&mut play, 1, Work::Computes, 10);
    assert_eq!(of(&play), Liveness::Red);
    assert_eq!(stopped(&play.event(Event::Tick)), [2]);
}

#[test]
fn a_worker_that_computes_longer_than_its_peers_is_reported_once() {
    let mut play = Play::elastic(3, 1, 99);
    let mut told = Vec::new();
    for step in 1..=12 {
        for incarnation in 1..=3u64 {
            let phases = Phases {
                forward: if incarnation == 2 { 1.0 } else { 0.25 },
                backward: 0.25,
                // Who waits is not slow.
                reduce: 9.0 * f64::from(u8::from(incarnation == 1)),
                ..Phases::default()
            };
            told.extend(play.prepare_in(incarnation, report(step, true), phases));
        }
    }
    let slow = notes(&told, "slow");
    assert_eq!(slow.len(), 1);
    let expected = "rank 1 (worker any) is slow: it computes 2.5 times as long as the median of its peers (1.250 s against 0.500 s)";
    assert!(slow[0].contains(expected), "{slow:?}");
}

#[test]
fn a_suspect_is_put_out_the_second_time() {
    let mut play = Play::elastic(3, 1, 9);
    let accuse = |play: &mut Play, by| {
        let reason = "no word for 10 s".into();
        let suspect = Some(Rank(1));
        play.say(by, WorkerMessage::CollectiveFailed { suspect, reason })
    };
    let first = accuse(&mut play, 1);
    assert_eq!(aborted(&first), [1, 2, 3]);
    let why = &notes(&first, "abort")[0];
    assert!(
        why.contains("rank 0 (worker any) lost its collective") && why.contains("suspects rank 1")
    );
    let leave = |play: &mut Play, generation| {
        let said = (1..=3).flat_map(|it| play.held(it, generation, vec![]));
        said.collect::<Vec<_>>()
    };
    assert_eq!(journaled(&leave(&mut play, 1)), [generation(2, &[1, 2, 3])]);
    accuse(&mut play, 3);
    let again = leave(&mut play, 2);
    assert_eq!(
        (stopped(&again), journaled(&again)),
        (vec![2], vec![generation(3, &[1, 3])])
    );
}

#[test]
fn a_broken_collective_without_a_suspect_costs_a_generation_and_nobody() {
    let mut play = Play::elastic(2, 2, 9);
    // All wait for each other until the step's time is over.
    let mut actions = Vec::new();
    for second in 1..=40 {
        play.now_ms += 1_000;
        actions.extend(beat(&mut play, 1, Work::Exchanges, second));
        actions.extend(beat(&mut play, 2, Work::Exchanges, second));
        actions.extend(play.event(Event::Tick));
    }
    assert_eq!((aborted(&actions), stopped(&actions)), (vec![1, 2], vec![]));
}

#[test]
fn collectives_that_break_by_themselves_again_and_again_end_the_attempt() {
    let mut policy = elastic(2, 1);
    policy.elastic.failures_max = 3;
    let mut play = Play::new(policy, Recovery::default()).0;
    play.join_all();
    let mut breaks = |generation: u64| {
        for incarnation in [1, 2] {
            play.held(incarnation, generation, vec![]);
        }
        // Both say so: that is one failure, told by the first.
        let [first, _] = [1, 2].map(|by| {
            let reason = format!("NCCL refuses generation {}", generation + 1);
            let suspect = None;
            play.say(by, WorkerMessage::CollectiveFailed { suspect, reason })
        });
        first
    };
    for generation in [0, 1] {
        assert_eq!(outcome(&breaks(generation)), None);
    }
    let parts = ["NCCL refuses generation 3", "step 1 broke 3 times in a row"];
    failed(&breaks(2), &parts);
}

#[test]
fn a_job_that_gets_nowhere_ends_resumable() {
    let mut play = Play::elastic(1, 1, 9);
    let mut number = 1;
    let mut actions = Vec::new();
    while outcome(&actions).is_none() {
        play.now_ms += 20_000;
        beat(&mut play, 1, Work::Computes, number);
        let reason = "broken".into();
        let suspect = None;
        play.say(1, WorkerMessage::CollectiveFailed { suspect, reason });
        play.held(1, number, vec![cut(1, 0, 1, 0, false)]);
        number += 1;
        actions = play.ready(1, facts(9, 0));
        actions.extend(play.event(Event::Tick));
        assert!(number < 20);
    }
    failed(&actions, &["no step was committed for 300 s"]);
}

#[test]
fn what_a_loss_may_cost_is_in_the_first_note() {
    let (_, actions) = Play::new(elastic(2, 1), Recovery::default());
    let expected = "a lost worker costs at most 118 s by the timeouts, 60 s more while too few are left to train";
    assert_eq!(notes(&actions, "bound"), [expected]);
}

type Break = fn(&mut JobPolicy);

#[test]
fn the_ladder_of_timeouts_is_checked_rung_by_rung() {
    let fits = elastic(2, 1);
    assert_eq!(fits.check(), Ok(()));
    assert_eq!(fits.recovery_ms_max(), 40_000 + 8_000 + 30_000 + 40_000);
    let cases: [(Break, &str); 10] = [
        (
            |it| it.heartbeat_timeout_ms = 0,
            "zero is 0 ms and heartbeat_timeout 0 ms",
        ),
        (
            |it| it.heartbeat_timeout_ms = 8_000,
            "heartbeat_timeout is 8000 ms and abort_timeout 8000 ms",
        ),
        (
            |it| it.elastic.abort_timeout_ms = 11_000,
            "collective_timeout must be longer",
        ),
        (
            |it| it.step_timeout_ms = 9_000,
            "step_timeout must be longer",
        ),
        (
            |it| it.join_timeout_ms = 40_000,
            "join_timeout must be longer",
        ),
        (
            |it| it.elastic.job_timeout_ms = 1,
            "job_timeout must be longer",
        ),
        (
            |it| it.form_timeout_ms = 10_000,
            "form_timeout must be longer",
        ),
        (|it| it.save_timeout_ms = 1, "save_timeout must be longer"),
        (|it| it.elastic.workers_min = 3, "workers_min 3, workers 2"),
        (|it| it.elastic.hang_factor = f64::NAN, "hang_factor is NaN"),
    ];
    for (spoil, expected) in cases {
        let mut policy = fits.clone();
        spoil(&mut policy);
        let text = policy.check().unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
}
