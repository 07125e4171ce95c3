//! The queue of a coordinator that serves job after job: order, losses, retries, cancelling, draining, recovery.

mod support;

use std::collections::{BTreeMap, BTreeSet};

use protocol::{
    Afterwards, Cause, Incarnation, JobId, JobRecord, JobSummaryState, NewJob, Outcome, Scheduler,
    SchedulerAction, SchedulerEvent, SchedulerPolicy, Step, SubmitError, WIRE_VERSION,
    recover_jobs,
};
use support::profile;

fn policy() -> SchedulerPolicy {
    SchedulerPolicy {
        build: "build".into(),
        heartbeat_timeout_ms: 5_000,
        retry_pause_ms: 1_000,
        attempts_max: 3,
        return_ms: 0,
        remind_ms: 60_000,
    }
}

fn new_job(name: &str, workers: u32) -> NewJob {
    NewJob {
        id: JobId(name.into()),
        key: String::new(),
        config_toml: format!("name = \"{name}\""),
        workers,
        workers_max: 0,
        submitted_unix_ms: 7,
    }
}

struct Play {
    scheduler: Scheduler,
    now_ms: u64,
    journal: Vec<JobRecord>,
    /// Members of running attempts.
    running: BTreeMap<JobId, Vec<u64>>,
}

impl Play {
    fn new() -> Self {
        Self::with(&[])
    }

    fn with(journal: &[JobRecord]) -> Self {
        Self {
            scheduler: Scheduler::new(policy(), recover_jobs(journal), 0),
            now_ms: 0,
            journal: journal.to_vec(),
            running: BTreeMap::new(),
        }
    }

    fn take(&mut self, actions: Vec<SchedulerAction>) -> Vec<SchedulerAction> {
        for action in &actions {
            match action {
                SchedulerAction::Journal(record) => self.journal.push(record.clone()),
                SchedulerAction::Start { id, workers, .. } => {
                    let workers = workers.iter().map(|it| it.0).collect();
                    let other = self.running.insert(id.clone(), workers);
                    assert!(other.is_none(), "{id} runs twice");
                }
                SchedulerAction::Lend { id, incarnation } => {
                    let running = self.running.get_mut(id).expect("a job that runs");
                    if !running.contains(&incarnation.0) {
                        running.push(incarnation.0);
                    }
                }
                _ => {}
            }
        }
        for (_, worker) in self.scheduler.workers() {
            if let Some(id) = &worker.job {
                let state = self.scheduler.job(id).map(|it| it.state);
                assert_eq!(
                    state,
                    Some(JobSummaryState::Running),
                    "a worker works for {id}"
                );
            }
        }
        let mut seen = BTreeSet::new();
        for worker in self.running.values().flatten() {
            assert!(seen.insert(*worker), "worker {worker} has two jobs");
        }
        actions
    }

    fn submit(&mut self, job: NewJob) -> Result<bool, SubmitError> {
        let (_, created, actions) = self.scheduler.submit(self.now_ms, job)?;
        self.take(actions);
        Ok(created)
    }

    fn event(&mut self, event: SchedulerEvent) -> Vec<SchedulerAction> {
        let actions = self.scheduler.handle(self.now_ms, event);
        self.take(actions)
    }

    fn join(&mut self, incarnation: u64) -> Vec<SchedulerAction> {
        self.event(SchedulerEvent::Joined {
            incarnation: Incarnation(incarnation),
            profile: profile(&format!("w{incarnation}"), "build", WIRE_VERSION),
            job: None,
        })
    }

    /// A worker comes back with a job's state.
    fn come_back(&mut self, incarnation: u64, job: &str) -> Vec<SchedulerAction> {
        self.event(SchedulerEvent::Joined {
            incarnation: Incarnation(incarnation),
            profile: profile(&format!("w{incarnation}"), "build", WIRE_VERSION),
            job: Some(JobId(job.into())),
        })
    }

    /// A worker's session ends.
    fn gone(&mut self, incarnation: u64) -> Vec<SchedulerAction> {
        for workers in self.running.values_mut() {
            workers.retain(|it| *it != incarnation);
        }
        let incarnation = Incarnation(incarnation);
        self.event(SchedulerEvent::Gone { incarnation })
    }

    fn end(&mut self, name: &str, outcome: Outcome, committed: u64) -> Vec<SchedulerAction> {
        let id = JobId(name.into());
        self.running.remove(&id);
        self.event(SchedulerEvent::Ended {
            id,
            outcome,
            committed: Step(committed),
        })
    }

    /// Lets time pass, ticking at every deadline.
    fn pass(&mut self, ms: u64) -> Vec<SchedulerAction> {
        let until = self.now_ms + ms;
        let mut all = Vec::new();
        while let Some(at_ms) = self.scheduler.next_deadline().filter(|it| *it <= until) {
            assert!(at_ms >= self.now_ms, "a deadline in the past would spin");
            self.now_ms = at_ms;
            all.extend(self.event(SchedulerEvent::Tick));
        }
        self.now_ms = until;
        all
    }

    fn state(&self, name: &str) -> JobSummaryState {
        self.scheduler.job(&JobId(name.into())).expect(name).state
    }

    fn waiting(&self, name: &str) -> String {
        self.scheduler.job(&JobId(name.into())).expect(name).waiting
    }
}

fn lost() -> Outcome {
    Outcome::Failed {
        cause: Cause::Temporary,
        reason: "rank 1 was lost".into(),
    }
}

fn interrupted(committed: u64) -> Outcome {
    Outcome::Interrupted {
        committed: Step(committed),
    }
}

fn stopped(actions: &[SchedulerAction]) -> Vec<&str> {
    let stops = actions.iter().filter_map(|it| match it {
        SchedulerAction::StopJob { id, .. } => Some(id.0.as_str()),
        _ => None,
    });
    stops.collect()
}

fn dismissed(actions: &[SchedulerAction]) -> Vec<(u64, Afterwards, &str)> {
    let told = actions.iter().filter_map(|it| match it {
        SchedulerAction::Dismiss {
            incarnation,
            reason,
            afterwards,
        } => Some((incarnation.0, *afterwards, reason.as_str())),
        _ => None,
    });
    told.collect()
}

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
    assert!(again.to_string().contains("queued; cancel it"), "{again}");
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
    let notes = |actions: &[SchedulerAction]| {
        let notes = actions.iter().filter_map(|it| match it {
            SchedulerAction::Note(note) if note.kind == "wait" => Some(note.text.clone()),
            _ => None,
        });
        notes.collect::<Vec<_>>()
    };
    let said = notes(&play.pass(120_000));
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

/// Random events for a thousand seeds: no worker has two jobs, no job runs twice (both asserted in `take`), deadlines do not
/// spin, and once enough workers wait, every job ends.
#[test]
fn whatever_happens_every_job_ends_once_workers_stay() {
    for seed in 1..=1_000_u64 {
        let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut draw = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut play = Play::new();
        let mut worker = 0;
        let mut committed: BTreeMap<JobId, u64> = BTreeMap::new();
        for _ in 0..60 {
            match draw(9) {
                0 => drop(play.submit(new_job(&format!("j{}", draw(5)), draw(3) as u32 + 1))),
                1 | 2 => {
                    worker += 1;
                    play.join(worker);
                }
                3 => {
                    play.gone(draw(worker + 1));
                }
                4 => drop(play.pass(draw(9_000))),
                5 => {
                    let name = format!("w{}", draw(worker + 1));
                    play.event(SchedulerEvent::DrainRequested { name });
                }
                6 if draw(4) == 0 => {
                    let id = JobId(format!("j{}", draw(5)));
                    let reason = String::new();
                    play.event(SchedulerEvent::CancelRequested { id, reason });
                }
                _ => {
                    let running: Vec<_> = play.running.keys().cloned().collect();
                    if let Some(id) = running.get(draw(running.len().max(1) as u64) as usize) {
                        let at = committed.entry(id.clone()).or_default();
                        *at += draw(3);
                        let at = *at;
                        let outcome = match draw(3) {
                            0 => lost(),
                            1 => interrupted(at),
                            _ => Outcome::Completed,
                        };
                        for member in play.running[id].clone() {
                            play.gone(member);
                        }
                        play.end(&id.0, outcome, at);
                    }
                }
            }
        }
        for _ in 0..60 {
            for _ in 0..3 {
                worker += 1;
                play.join(worker);
            }
            let running: Vec<_> = play.running.keys().cloned().collect();
            for id in running {
                play.end(&id.0, Outcome::Completed, 99);
            }
            play.pass(40_000);
        }
        let unended = play
            .scheduler
            .jobs()
            .into_iter()
            .find(|it| matches!(it.state, JobSummaryState::Queued | JobSummaryState::Running));
        assert_eq!(unended, None, "seed {seed}");
    }
}
