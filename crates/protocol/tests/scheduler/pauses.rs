//! Paused jobs do not start until they are resumed.

use protocol::{
    Afterwards, JobId, JobRecord, JobSummaryState, Outcome, SchedulerEvent, recover_jobs,
};

use crate::play::{Play, dismissed, interrupted, lost, new_job, notes, stopped};

#[test]
fn a_paused_job_of_the_queue_keeps_its_place_and_lets_others_pass() {
    let mut play = Play::new();
    for name in ["a", "b", "c"] {
        play.submit(new_job(name, 1)).expect("taken");
    }
    let actions = play.pause("a");
    assert_eq!(notes(&actions, "pause"), ["job a is paused: for the night"]);
    assert_eq!(play.state("a"), JobSummaryState::Paused);
    let said = play.waiting("a");
    assert_eq!(
        said,
        "is paused: for the night; go on with: coordinator resume a"
    );
    assert!(
        play.waiting("b").contains("0 idle"),
        "{}",
        play.waiting("b")
    );
    assert!(play.pause("a").is_empty(), "again, nothing happens");
    play.join(1);
    assert_eq!(play.members("b"), [1]);
    assert_eq!(
        play.scheduler.waiting().as_deref().map(|it| &it[..5]),
        Some("job c")
    );
    let actions = play.resume("a");
    assert_eq!(
        notes(&actions, "resume"),
        ["job a waits for its turn again: it is morning"]
    );
    assert!(play.resume("a").is_empty(), "again, nothing happens");
    play.join(2);
    assert_eq!(play.members("a"), [2], "before c");
}

#[test]
fn a_running_job_saves_stops_and_stays_until_it_is_resumed() {
    let mut play = Play::new();
    play.submit(new_job("a", 1)).expect("taken");
    play.join(1);
    assert_eq!(stopped(&play.pause("a")), ["a"]);
    assert!(play.pause("a").is_empty());
    assert_eq!(play.state("a"), JobSummaryState::Running, "it saves first");
    assert_eq!(play.waiting("a"), "saves and stops: paused: for the night");
    play.end_and_return("a", interrupted(4), 4);
    play.pass(100_000);
    play.join(2);
    assert_eq!(play.state("a"), JobSummaryState::Paused);
    play.resume("a");
    assert_eq!(play.members("a"), [2]);

    // Resumed while it saves, it goes on as soon as it has stopped.
    play.pause("a");
    let actions = play.resume("a");
    assert_eq!(
        notes(&actions, "resume"),
        ["job a goes on once it has stopped: it is morning"]
    );
    play.end_and_return("a", interrupted(5), 5);
    assert_eq!(play.members("a"), [1_002]);

    // A pause is no failure, and one whose save is lost waits, too.
    for _ in 0..9 {
        play.pause("a");
        play.end("a", lost(), 5);
        assert_eq!(play.state("a"), JobSummaryState::Paused);
        play.resume("a");
        play.join(play.now_ms + 10_000);
        play.pass(1_000);
        assert_eq!(play.state("a"), JobSummaryState::Running);
    }
    play.pause("a");
    play.end("a", Outcome::Completed, 9);
    assert_eq!(play.state("a"), JobSummaryState::Completed);
    assert!(play.pause("a").is_empty() && play.resume("a").is_empty());
}

#[test]
fn a_pause_outlives_the_coordinator_and_workers_that_hold_its_state_serve_others() {
    let mut before = Play::new();
    for name in ["paused", "resumed", "runs"] {
        before.submit(new_job(name, 1)).expect("taken");
    }
    before.pause("paused");
    before.pause("resumed");
    before.resume("resumed");
    before.join(1);
    before.join(2);
    assert_eq!(before.members("resumed"), [1]);
    assert_eq!(before.members("runs"), [2]);
    before.end("resumed", lost(), 6);
    // The coordinator is killed while this one saves.
    before.pause("runs");
    let recovery = recover_jobs(&before.journal);
    assert_eq!(recover_jobs(&recovery.records()), recovery, "compacted");

    let mut play = Play::with(&before.journal);
    assert_eq!(play.state("paused"), JobSummaryState::Paused);
    assert_eq!(play.state("runs"), JobSummaryState::Paused);
    assert!(play.waiting("runs").contains("for the night"));
    let resumed = play.scheduler.job(&JobId("resumed".into()));
    let resumed = resumed.expect("a job");
    assert_eq!(
        (resumed.state, resumed.committed.0),
        (JobSummaryState::Queued, 6)
    );
    let back = play.come_back(2, "runs");
    let (incarnation, afterwards, reason) = dismissed(&back)[0];
    assert_eq!((incarnation, afterwards), (2, Afterwards::Rejoin));
    assert_eq!(reason, "job runs needs no worker now");
    play.join(3);
    assert_eq!(play.members("resumed"), [3]);
    play.resume("runs");
    play.join(4);
    assert_eq!(play.members("runs"), [4]);
}

#[test]
fn a_cancellation_outweighs_a_pause() {
    let mut play = Play::new();
    play.submit(new_job("a", 1)).expect("taken");
    play.submit(new_job("b", 1)).expect("taken");
    let cancel = |name: &str| SchedulerEvent::CancelRequested {
        id: JobId(name.into()),
        reason: "too slow".into(),
    };
    play.pause("b");
    play.event(cancel("b"));
    assert_eq!(play.state("b"), JobSummaryState::Cancelled);
    play.join(1);
    assert_eq!(stopped(&play.pause("a")), ["a"]);
    assert!(
        stopped(&play.event(cancel("a"))).is_empty(),
        "it stops already"
    );
    assert!(
        play.waiting("a").contains("too slow"),
        "{}",
        play.waiting("a")
    );
    play.end("a", interrupted(3), 3);
    assert_eq!(play.state("a"), JobSummaryState::Cancelled);
}

#[test]
fn journals_from_before_priorities_pauses_and_limits_are_read() {
    let lines = [
        r#"{"record":"submitted","id":"a","key":"","config_toml":"","workers":2,"submitted_unix_ms":7}"#,
        r#"{"record":"started","id":"a"}"#,
        r#"{"record":"submitted","id":"b","key":"k","config_toml":"","workers":1,"workers_max":3,"submitted_unix_ms":8}"#,
        r#"{"record":"ended","id":"b","committed":4,"ending":"cancelled","reason":"enough"}"#,
    ];
    let records: Vec<JobRecord> = lines
        .iter()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    let JobRecord::Submitted { job } = &records[0] else {
        panic!("{:?}", records[0]);
    };
    assert_eq!(
        (job.priority, job.run_ms_max, job.attempts_max),
        (0, None, 5)
    );
    let play = Play::with(&records);
    assert_eq!(play.state("a"), JobSummaryState::Queued);
    assert_eq!(play.state("b"), JobSummaryState::Cancelled);
    // What is written now is read back.
    for record in records {
        let text = serde_json::to_string(&record).expect("JSON");
        let again: JobRecord = serde_json::from_str(&text).expect(&text);
        assert_eq!(again, record);
    }
}
