//! A queue under test with its clock, its workers 1, 2, … called w1, w2, …, and what its jobs were told.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{
    Afterwards, Cause, Incarnation, JobId, JobRecord, JobSummaryState, NewJob, Outcome, Scheduler,
    SchedulerAction, SchedulerEvent, SchedulerPolicy, Step, SubmitError, WIRE_VERSION,
    recover_jobs,
};

use crate::support::profile;

pub fn policy() -> SchedulerPolicy {
    SchedulerPolicy {
        build: "build".into(),
        heartbeat_timeout_ms: 5_000,
        retry_pause_ms: 1_000,
        return_ms: 0,
        remind_ms: 60_000,
    }
}

pub fn new_job(name: &str, workers: u32) -> NewJob {
    NewJob {
        id: JobId(name.into()),
        key: String::new(),
        config_toml: format!("name = \"{name}\""),
        workers,
        workers_max: 0,
        priority: 0,
        run_ms_max: None,
        attempts_max: 3,
        submitted_unix_ms: 7,
    }
}

pub struct Play {
    pub scheduler: Scheduler,
    pub now_ms: u64,
    pub journal: Vec<JobRecord>,
    /// Members of running attempts.
    pub running: BTreeMap<JobId, Vec<u64>>,
    /// Running attempts that were asked to stop.
    pub stopping: BTreeSet<JobId>,
}

impl Play {
    pub fn new() -> Self {
        Self::with(&[])
    }

    pub fn with(journal: &[JobRecord]) -> Self {
        Self {
            scheduler: Scheduler::new(policy(), recover_jobs(journal), 0),
            now_ms: 0,
            journal: journal.to_vec(),
            running: BTreeMap::new(),
            stopping: BTreeSet::new(),
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
                SchedulerAction::StopJob { id, reason } => {
                    assert!(
                        self.running.contains_key(id),
                        "{id} is to stop and does not run"
                    );
                    assert!(self.stopping.insert(id.clone()), "{id} is to stop twice");
                    self.check_room(id, reason);
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

    /// Who makes room for a job has a lower priority; the job is the first of the queue, and lacks workers.
    fn check_room(&self, id: &JobId, reason: &str) {
        let Some(rest) = reason.strip_prefix("makes room for job ") else {
            return;
        };
        let (head, _) = rest.split_once(',').expect("a name");
        let jobs = self.scheduler.jobs();
        let priority = |name: &str| {
            let found = jobs.iter().find(|it| it.id.0 == name);
            found.map(|it| it.priority).expect("a job")
        };
        assert!(priority(head) > priority(&id.0), "{id} {reason}");
        let mut queue = jobs.iter().filter(|it| it.state == JobSummaryState::Queued);
        let first = queue.next().expect("a queue");
        assert_eq!(first.id.0, head, "{id} {reason}");
        let workers = self.scheduler.workers();
        let idle = workers.filter(|(_, it)| it.job.is_none() && !it.draining);
        assert!(idle.count() < first.workers as usize, "{id} {reason}");
    }

    pub fn submit(&mut self, job: NewJob) -> Result<bool, SubmitError> {
        let (_, created, actions) = self.scheduler.submit(self.now_ms, job)?;
        self.take(actions);
        Ok(created)
    }

    pub fn event(&mut self, event: SchedulerEvent) -> Vec<SchedulerAction> {
        let actions = self.scheduler.handle(self.now_ms, event);
        assert!(self.scheduler.orders_agree());
        self.take(actions)
    }

    pub fn join(&mut self, incarnation: u64) -> Vec<SchedulerAction> {
        self.event(SchedulerEvent::Joined {
            incarnation: Incarnation(incarnation),
            profile: profile(&format!("w{incarnation}"), "build", WIRE_VERSION),
            job: None,
        })
    }

    /// A worker comes back with a job's state.
    pub fn come_back(&mut self, incarnation: u64, job: &str) -> Vec<SchedulerAction> {
        self.event(SchedulerEvent::Joined {
            incarnation: Incarnation(incarnation),
            profile: profile(&format!("w{incarnation}"), "build", WIRE_VERSION),
            job: Some(JobId(job.into())),
        })
    }

    /// A worker's session ends.
    pub fn gone(&mut self, incarnation: u64) -> Vec<SchedulerAction> {
        for workers in self.running.values_mut() {
            workers.retain(|it| *it != incarnation);
        }
        let incarnation = Incarnation(incarnation);
        self.event(SchedulerEvent::Gone { incarnation })
    }

    pub fn end(&mut self, name: &str, outcome: Outcome, committed: u64) -> Vec<SchedulerAction> {
        let id = JobId(name.into());
        self.running.remove(&id);
        self.stopping.remove(&id);
        self.event(SchedulerEvent::Ended {
            id,
            outcome,
            committed: Step(committed),
        })
    }

    /// Lets time pass, ticking at every deadline.
    pub fn pass(&mut self, ms: u64) -> Vec<SchedulerAction> {
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

    /// The members of a running job leave, and come back for the next one under other incarnations.
    pub fn end_and_return(
        &mut self,
        name: &str,
        outcome: Outcome,
        committed: u64,
    ) -> Vec<SchedulerAction> {
        let members = self.running[&JobId(name.into())].clone();
        let mut all = Vec::new();
        for member in &members {
            all.extend(self.gone(*member));
        }
        all.extend(self.end(name, outcome, committed));
        for member in members {
            all.extend(self.event(SchedulerEvent::Joined {
                incarnation: Incarnation(member + 1_000),
                profile: profile(&format!("w{}", member % 1_000), "build", WIRE_VERSION),
                job: None,
            }));
        }
        all
    }

    pub fn pause(&mut self, name: &str) -> Vec<SchedulerAction> {
        let (id, reason) = (JobId(name.into()), "for the night".into());
        self.event(SchedulerEvent::PauseRequested { id, reason })
    }

    pub fn resume(&mut self, name: &str) -> Vec<SchedulerAction> {
        let (id, reason) = (JobId(name.into()), "it is morning".into());
        self.event(SchedulerEvent::ResumeRequested { id, reason })
    }

    /// The workers of a running job.
    pub fn members(&self, name: &str) -> &[u64] {
        let members = self.running.get(&JobId(name.into()));
        members.map_or(&[], Vec::as_slice)
    }

    pub fn state(&self, name: &str) -> JobSummaryState {
        self.scheduler.job(&JobId(name.into())).expect(name).state
    }

    pub fn waiting(&self, name: &str) -> String {
        self.scheduler.job(&JobId(name.into())).expect(name).waiting
    }
}

pub fn lost() -> Outcome {
    Outcome::Failed {
        cause: Cause::Temporary,
        reason: "rank 1 was lost".into(),
    }
}

pub fn interrupted(committed: u64) -> Outcome {
    Outcome::Interrupted {
        committed: Step(committed),
    }
}

pub fn stopped(actions: &[SchedulerAction]) -> Vec<&str> {
    let stops = actions.iter().filter_map(|it| match it {
        SchedulerAction::StopJob { id, .. } => Some(id.0.as_str()),
        _ => None,
    });
    stops.collect()
}

pub fn dismissed(actions: &[SchedulerAction]) -> Vec<(u64, Afterwards, &str)> {
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

/// What was told of that kind.
pub fn notes<'a>(actions: &'a [SchedulerAction], kind: &str) -> Vec<&'a str> {
    let notes = actions.iter().filter_map(|it| match it {
        SchedulerAction::Note(note) if note.kind == kind => Some(note.text.as_str()),
        _ => None,
    });
    notes.collect()
}
