//! The status that a coordinator serves is that of its job.

use protocol::{
    Elastic, Event, Fence, FromWorker, Generation, Incarnation, Job, JobId, JobPolicy, JobSpec,
    JobSummary, JobSummaryState, Recovery, Step, WorkerMessage, WorkerProfile,
};
use wire::proto::JobState;

fn job() -> Job {
    let policy = JobPolicy {
        world: 2,
        save_every: None,
        evaluate_every: None,
        selection: None,
        heartbeat_timeout_ms: 5_000,
        join_timeout_ms: 90_000,
        form_timeout_ms: 60_000,
        step_timeout_ms: 60_000,
        save_timeout_ms: 60_000,
        skipped_steps_max: 3,
        failed_saves_max: 3,
        elastic: Elastic {
            workers_min: 1,
            workers_max: 2,
            mirror: true,
            shard_gradients: true,
            offload: true,
            failures_max: 3,
            abort_timeout_ms: 8_000,
            collective_timeout_ms: 10_000,
            job_timeout_ms: 300_000,
            hang_factor: 5.0,
            slow_factor: 2.0,
        },
    };
    let spec = JobSpec {
        id: JobId("run".into()),
        policy,
        build: "b".into(),
        config_toml: String::new(),
        checkpoint_dir: "c".into(),
        probe: String::new(),
        secret: [0; 32],
        fence: Fence(1),
        recovery: Recovery::default(),
        resume: None,
    };
    Job::new(spec, 1_000).0
}

fn join(job: &mut Job, now_ms: u64, incarnation: u64) {
    let message = WorkerMessage::Join(WorkerProfile {
        build: "b".into(),
        wire_version: wire::WIRE_VERSION,
        address: format!("127.0.0.1:{incarnation}"),
        name: format!("worker-{incarnation}"),
        device: String::new(),
    });
    for message in [
        message,
        WorkerMessage::Held {
            held: vec![],
            workers_min: 0,
        },
    ] {
        let from = FromWorker {
            job: JobId("run".into()),
            incarnation: Incarnation(incarnation),
            generation: Generation(0),
            message,
        };
        job.handle(now_ms, Event::Message(from));
    }
}

#[test]
fn a_status_tells_the_state_the_wait_and_the_workers() {
    let mut job = job();
    join(&mut job, 1_200, 9);
    let status = wire::running_job(&job, 1_500, None);
    assert_eq!(status.state(), JobState::Gathering);
    assert_eq!(status.waiting, "waiting for workers to join (1 of 2 have)");
    assert_eq!(status.steps_total, None);
    assert_eq!(
        (status.workers[0].rank, status.workers[0].silent_ms),
        (None, 300)
    );

    join(&mut job, 1_600, 4);
    let status = wire::running_job(&job, 1_600, None);
    assert_eq!(status.state(), JobState::Forming);
    assert_eq!(status.waiting, "waiting for ranks 0, 1 to be ready");
    let ranks: Vec<_> = status
        .workers
        .iter()
        .map(|it| (it.incarnation, it.rank))
        .collect();
    assert_eq!(ranks, [(4, Some(0)), (9, Some(1))]);
}

#[test]
fn a_status_of_an_ended_job_tells_how_it_ended() {
    let mut job = job();
    job.handle(
        2_000,
        Event::StopRequested {
            reason: "asked".into(),
        },
    );
    let status = wire::running_job(&job, 2_000, None);
    assert_eq!(status.state(), JobState::Interrupted);
    assert!(
        status.waiting.starts_with("interrupted after step 0"),
        "{}",
        status.waiting
    );
}

#[test]
fn a_job_of_the_queue_tells_its_state_and_its_priority() {
    for (state, expected) in [
        (JobSummaryState::Queued, JobState::Queued),
        (JobSummaryState::Paused, JobState::Paused),
        (JobSummaryState::Running, JobState::Gathering),
        (JobSummaryState::Completed, JobState::Completed),
        (JobSummaryState::Cancelled, JobState::Cancelled),
        (JobSummaryState::Failed, JobState::Failed),
    ] {
        let job = wire::queued_job(JobSummary {
            id: JobId("run".into()),
            state,
            waiting: "waits".into(),
            config_toml: String::new(),
            priority: -3,
            workers: 2,
            attempts: 4,
            committed: Step(7),
            submitted_unix_ms: 9,
        });
        assert_eq!(job.state(), expected);
        assert_eq!((job.priority, job.committed_step), (-3, 7));
    }
}
