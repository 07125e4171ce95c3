//! How long a job may run, and how often it is tried.

use protocol::{JobId, JobSummaryState, NewJob, Outcome, recover_jobs};

use crate::play::{Play, interrupted, lost, new_job, notes, stopped};

fn limited(name: &str, run_ms_max: u64) -> NewJob {
    NewJob {
        run_ms_max: Some(run_ms_max),
        ..new_job(name, 1)
    }
}

#[test]
fn a_job_that_ran_as_long_as_it_may_saves_and_fails_with_that_reason() {
    let mut play = Play::new();
    play.submit(limited("a", 1_800_000)).expect("taken");
    // Waiting costs nothing.
    play.pass(10_000_000);
    play.join(1);
    let actions = play.pass(1_799_999);
    assert!(stopped(&actions).is_empty());
    let actions = play.pass(1);
    assert_eq!(stopped(&actions), ["a"]);
    let said = "job a saves and stops: it ran for job.max_hours, which is 0.5";
    assert_eq!(notes(&actions, "limit"), [said]);
    assert!(stopped(&play.pass(100_000)).is_empty(), "asked once");
    assert!(play.pause("a").is_empty(), "it will not go on");
    play.end("a", interrupted(40), 40);
    assert_eq!(play.state("a"), JobSummaryState::Failed);
    let said = play.waiting("a");
    for word in ["job.max_hours, which is 0.5", "step 40", "submit it again"] {
        assert!(said.contains(word), "no `{word}` in {said}");
    }
    // Submitted again, it has the time again.
    play.submit(limited("a", 1_800_000)).expect("taken");
    play.join(2);
    assert!(stopped(&play.pass(1_799_999)).is_empty());
}

#[test]
fn the_time_of_all_attempts_counts_before_and_after_a_restart() {
    let mut play = Play::new();
    play.submit(limited("a", 10_000)).expect("taken");
    play.join(1);
    play.pass(4_000);
    play.end("a", lost(), 3);
    play.pass(1_000);
    play.join(2);
    play.pass(3_000);
    play.pause("a");
    play.end("a", interrupted(5), 5);
    play.pass(50_000);
    play.resume("a");

    let recovery = recover_jobs(&play.journal);
    assert_eq!(recover_jobs(&recovery.records()), recovery, "compacted");
    for journal in [play.journal.clone(), recovery.records()] {
        let mut play = Play::with(&journal);
        play.join(1);
        assert!(stopped(&play.pass(2_999)).is_empty());
        assert_eq!(stopped(&play.pass(1)), ["a"]);
        // It is not tried again either when its workers are lost meanwhile.
        play.end("a", lost(), 5);
        assert_eq!(play.state("a"), JobSummaryState::Failed);
    }
}

#[test]
fn a_job_that_completes_or_is_cancelled_at_its_limit_is_no_failure() {
    let mut play = Play::new();
    play.submit(limited("a", 10_000)).expect("taken");
    play.join(1);
    assert_eq!(stopped(&play.pass(10_000)), ["a"]);
    play.end("a", Outcome::Completed, 5);
    assert_eq!(play.state("a"), JobSummaryState::Completed);
}

#[test]
fn each_job_says_how_many_attempts_may_come_no_further() {
    for attempts_max in 1..5 {
        let mut play = Play::new();
        let job = NewJob {
            attempts_max,
            ..new_job("a", 1)
        };
        play.submit(job).expect("taken");
        for attempt in 1..=attempts_max {
            play.join(u64::from(attempt));
            assert_eq!(play.state("a"), JobSummaryState::Running, "{attempt}");
            play.gone(u64::from(attempt));
            let actions = play.end("a", lost(), 2);
            if attempt < attempts_max {
                let said = format!("(attempt {attempt} of {attempts_max} at step 2 failed)");
                assert!(notes(&actions, "retry")[0].contains(&said), "{actions:?}");
            }
            play.pass(100_000);
        }
        let job = play.scheduler.job(&JobId("a".into())).expect("a job");
        assert_eq!(job.state, JobSummaryState::Failed);
        assert_eq!(job.attempts, attempts_max);
        let said = match attempts_max {
            1 => "an attempt ended after step 2, because ".to_owned(),
            more => format!("{more} attempts in a row ended after step 2, the last because "),
        };
        assert!(job.waiting.contains(&said), "{}", job.waiting);
    }
}
