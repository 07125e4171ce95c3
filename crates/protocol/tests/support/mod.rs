//! A job under test with its clock, spoken to by workers 1, 2, … of ranks 0, 1, ….

#![allow(dead_code, reason = "each test program uses its part")]

use std::mem::discriminant;
use std::sync::Arc;

use protocol::{
    Action, Activity, Awaits, Cause, CommitRecord, CoordinatorMessage, Copies, Elastic, Event,
    Fence, FromWorker, Generation, Held, Incarnation, Job, JobId, JobPolicy, JobSpec, Layout,
    MetricsRow, Outcome, Phases, Rank, Record, Recovery, RunFacts, Step, StepReport, WIRE_VERSION,
    WorkerMessage, WorkerProfile,
};

pub struct Play {
    pub job: Job,
    pub now_ms: u64,
    pub world: u64,
}

/// A job that needs all of its `world`: the ladder is 5 s heartbeat, 8 s abort, 10 s collective, 40 s step, 60 s join, 300 s job.
pub fn policy(world: u64) -> JobPolicy {
    JobPolicy {
        world: world as u32,
        save_every: None,
        evaluate_every: None,
        selection: None,
        heartbeat_timeout_ms: 5_000,
        join_timeout_ms: 60_000,
        form_timeout_ms: 30_000,
        step_timeout_ms: 40_000,
        save_timeout_ms: 50_000,
        skipped_steps_max: 3,
        failed_saves_max: 3,
        elastic: Elastic {
            workers_min: world as u32,
            workers_max: world as u32 + 1,
            abort_timeout_ms: 8_000,
            collective_timeout_ms: 10_000,
            job_timeout_ms: 300_000,
            hang_factor: 5.0,
            slow_factor: 2.0,
            mirror: true,
            shard_gradients: false,
            offload: false,
            failures_max: u32::MAX,
        },
    }
}

/// The same, and `min` of them are enough.
pub fn elastic(world: u64, min: u32) -> JobPolicy {
    let mut policy = policy(world);
    policy.elastic.workers_min = min;
    policy
}

/// Shards of rank `rank` of `world`, cut by `generation`, at `applied`; with the next step's gradient or without.
pub fn cut(generation: u64, rank: u32, world: u32, applied: u64, gradient: bool) -> Held {
    Held {
        generation: Generation(generation),
        rank: Rank(rank),
        world,
        applied: Step(applied),
        gradient,
    }
}

pub fn spec(policy: JobPolicy, recovery: Recovery) -> JobSpec {
    // It may stand after its checkpoint.
    let checkpoint = recovery.checkpoint;
    JobSpec {
        id: JobId("run".into()),
        policy,
        build: "build".into(),
        config_toml: "[job]".into(),
        checkpoint_dir: "checkpoints".into(),
        probe: ".probe".into(),
        secret: [7; 32],
        fence: Fence(1),
        recovery,
        resume: (checkpoint.0 > 0).then(|| format!("step-{checkpoint}")),
    }
}

pub fn facts(steps_total: u64, committed: u64) -> RunFacts {
    RunFacts {
        steps_total,
        committed,
        pairs: 100,
        model_digest: "aa".into(),
        ..RunFacts::default()
    }
}

pub fn report(step: u64, finite: bool) -> StepReport {
    StepReport {
        step,
        finite,
        grad_norm: if finite { 1.0 } else { f64::NAN },
        learning_rate: 1e-3,
        tokens: 500,
        pairs: 8,
        ..StepReport::default()
    }
}

pub fn commit(step: u64, generation: u64, apply: bool) -> Record {
    let row = MetricsRow {
        report: report(step, apply),
        tokens_per_second: 250.0,
        world_size: 2,
        generation,
        seconds: 2.0,
        gpu: protocol::GpuFigures::default(),
        phases: Phases {
            forward: 0.5,
            backward: 1.25,
            ..Phases::default()
        },
    };
    Record::Commit(CommitRecord { apply, row })
}

impl Play {
    /// A job that gathers, and what it did first.
    pub fn new(policy: JobPolicy, recovery: Recovery) -> (Self, Vec<Action>) {
        let world = policy.world.into();
        let now_ms = 1_000;
        let (job, actions) = Job::new(spec(policy, recovery), now_ms);
        (Self { job, now_ms, world }, actions)
    }

    /// An elastic job of `world` members whose first step is computed; `min` of them are enough, and one spare fits in.
    pub fn elastic(world: u64, min: u32, steps_total: u64) -> Self {
        let mut play = Self::new(elastic(world, min), Recovery::default()).0;
        play.join_all();
        let go = play.ready_all(steps_total);
        assert_eq!(told(&go).len() as u64, world, "all are told to go");
        play
    }

    /// A job whose members compute their first step, of `steps_total`.
    pub fn stepping(policy: JobPolicy, steps_total: u64) -> Self {
        let mut play = Self::new(policy, Recovery::default()).0;
        play.join_all();
        let actions = play.ready_all(steps_total);
        assert_eq!(
            told(&actions).len() as u64,
            play.world,
            "all are told to go"
        );
        play
    }

    pub fn event(&mut self, event: Event) -> Vec<Action> {
        let actions = self.job.handle(self.now_ms, event);
        assert!(self.job.deadlines_agree());
        let (long, short) = (self.job.waiting(), self.job.waiting_in_short());
        assert_eq!(discriminant(&short), discriminant(&long));
        actions
    }

    /// A worker speaks in the job's generation.
    pub fn say(&mut self, incarnation: u64, message: WorkerMessage) -> Vec<Action> {
        let generation = self.job.generation().0;
        self.say_in(incarnation, generation, message)
    }

    pub fn say_in(
        &mut self,
        incarnation: u64,
        generation: u64,
        message: WorkerMessage,
    ) -> Vec<Action> {
        self.event(Event::Message(FromWorker {
            job: JobId("run".into()),
            incarnation: Incarnation(incarnation),
            generation: Generation(generation),
            message,
        }))
    }

    pub fn join(&mut self, incarnation: u64) -> Vec<Action> {
        self.say_in(incarnation, 0, join_message("build", WIRE_VERSION))
    }

    /// All join, and say that they hold nothing.
    pub fn join_all(&mut self) -> Vec<Action> {
        let mut actions: Vec<Action> = (1..=self.world).flat_map(|it| self.join(it)).collect();
        actions.extend((1..=self.world).flat_map(|it| self.held(it, 0, vec![])));
        actions
    }

    pub fn ready(&mut self, incarnation: u64, facts: RunFacts) -> Vec<Action> {
        let message = WorkerMessage::Ready {
            facts,
            reference_reused: 3,
            reference_computed: 4,
            workers_min: 0,
        };
        self.say(incarnation, message)
    }

    pub fn ready_all(&mut self, steps_total: u64) -> Vec<Action> {
        let facts = facts(steps_total, self.job.committed().0);
        (1..=self.world)
            .flat_map(|it| self.ready(it, facts.clone()))
            .collect()
    }

    /// A worker says what it holds, out of `generation`.
    pub fn held(&mut self, incarnation: u64, generation: u64, held: Vec<Held>) -> Vec<Action> {
        self.held_of(incarnation, generation, held, 0)
    }

    /// The same of a worker that has room as one of so many.
    pub fn held_of(
        &mut self,
        incarnation: u64,
        generation: u64,
        held: Vec<Held>,
        workers_min: u32,
    ) -> Vec<Action> {
        let message = WorkerMessage::Held { held, workers_min };
        self.say_in(incarnation, generation, message)
    }

    pub fn lose(&mut self, incarnation: u64) -> Vec<Action> {
        self.event(Event::Disconnected {
            incarnation: Incarnation(incarnation),
        })
    }

    pub fn prepare(&mut self, incarnation: u64, report: StepReport) -> Vec<Action> {
        self.prepare_in(incarnation, report, Phases::default())
    }

    pub fn prepare_in(
        &mut self,
        incarnation: u64,
        report: StepReport,
        phases: Phases,
    ) -> Vec<Action> {
        self.say(
            incarnation,
            WorkerMessage::Prepared {
                report,
                gpu: protocol::GpuFigures::default(),
                phases,
            },
        )
    }

    /// All members prepare the next step.
    pub fn step(&mut self, finite: bool) -> Vec<Action> {
        let report = report(self.job.committed().0 + 1, finite);
        (1..=self.world)
            .flat_map(|it| self.prepare(it, report))
            .collect()
    }

    pub fn save(&mut self, incarnation: u64, step: u64) -> Vec<Action> {
        let shard = format!("shard of {incarnation}");
        self.say(
            incarnation,
            WorkerMessage::Saved {
                step: Step(step),
                asked: Generation(0),
                shard,
            },
        )
    }

    /// All members save `step`, and its checkpoint becomes visible.
    pub fn checkpoint(&mut self, step: u64) -> Vec<Action> {
        let mut actions: Vec<_> = (1..=self.world)
            .flat_map(|it| self.save(it, step))
            .collect();
        actions.extend(self.event(checkpoint_committed(step)));
        actions
    }

    pub fn finish_all(&mut self) -> Vec<Action> {
        (1..=self.world)
            .flat_map(|it| self.say(it, WorkerMessage::Finished))
            .collect()
    }

    pub fn beat(&mut self, incarnation: u64, committed: u64, awaits: Awaits) -> Vec<Action> {
        self.say(
            incarnation,
            WorkerMessage::Beat {
                committed: Step(committed),
                awaits,
                activity: Activity::default(),
            },
        )
    }

    /// Time passes; `alive` beat every second.
    pub fn pass(&mut self, ms: u64, alive: &[u64]) -> Vec<Action> {
        let mut actions = Vec::new();
        let end_ms = self.now_ms + ms;
        while self.now_ms < end_ms {
            self.now_ms = end_ms.min(self.now_ms + 1_000);
            for incarnation in alive {
                actions.extend(self.beat(*incarnation, 0, Awaits::Nothing));
            }
            if self
                .job
                .next_deadline()
                .is_some_and(|at_ms| at_ms <= self.now_ms)
            {
                actions.extend(self.event(Event::Tick));
            }
        }
        actions
    }
}

pub fn checkpoint_committed(step: u64) -> Event {
    Event::CheckpointCommitted {
        step: Step(step),
        path: format!("step-{step}"),
    }
}

pub fn profile(name: &str, build: &str, wire_version: u32) -> WorkerProfile {
    WorkerProfile {
        build: build.into(),
        wire_version,
        address: "127.0.0.1:4000".into(),
        name: name.into(),
        device: "cpu".into(),
    }
}

pub fn join_message(build: &str, wire_version: u32) -> WorkerMessage {
    WorkerMessage::Join(profile("any", build, wire_version))
}

/// What workers are told, by incarnation.
pub fn told(actions: &[Action]) -> Vec<(u64, CoordinatorMessage)> {
    let sends = actions.iter().filter_map(|action| match action {
        Action::Send(to) => Some((to.incarnation.0, to.message.clone())),
        _ => None,
    });
    sends.collect()
}

pub fn journaled(actions: &[Action]) -> Vec<Record> {
    let records = actions.iter().filter_map(|action| match action {
        Action::Journal(record) => Some(record.clone()),
        _ => None,
    });
    records.collect()
}

pub fn outcome(actions: &[Action]) -> Option<Outcome> {
    let mut ends = actions.iter().filter_map(|action| match action {
        Action::Done(outcome) => Some(outcome.clone()),
        _ => None,
    });
    let end = ends.next();
    if end.is_some() {
        let last = matches!(actions.last(), Some(Action::Done(_)));
        assert!(last && ends.next().is_none(), "Done comes once, and last");
    }
    end
}

/// Who is told to stop.
pub fn stopped(actions: &[Action]) -> Vec<u64> {
    let stop = |(_, message): &(u64, CoordinatorMessage)| {
        matches!(message, CoordinatorMessage::Stop { .. })
    };
    told(actions)
        .into_iter()
        .filter(stop)
        .map(|it| it.0)
        .collect()
}

/// Index of the first action that matches.
pub fn place(actions: &[Action], what: impl Fn(&Action) -> bool) -> usize {
    actions.iter().position(what).expect("the action is there")
}

/// Who is told to abort.
pub fn aborted(actions: &[Action]) -> Vec<u64> {
    let abort = |(_, message): &(u64, CoordinatorMessage)| {
        matches!(message, CoordinatorMessage::Abort { .. })
    };
    told(actions)
        .into_iter()
        .filter(abort)
        .map(|it| it.0)
        .collect()
}

/// What each Form says: to whom, rank, members, commit, verdict, base, checkpoint.
pub type Formed = (u64, u32, usize, u64, bool, Option<Layout>, Option<String>);

pub fn formed(actions: &[Action]) -> Vec<Formed> {
    let form = |(to, message)| match message {
        CoordinatorMessage::Form {
            rank,
            addresses,
            committed,
            resume,
            apply,
            base,
            ..
        } => {
            let members = addresses.len();
            let base = base.map(Arc::unwrap_or_clone);
            Some((to, rank.0, members, committed.0, apply, base, resume))
        }
        _ => None,
    };
    told(actions).into_iter().filter_map(form).collect()
}

pub fn layout(generation: u64, shards: &[(Option<u32>, Option<u32>)]) -> Layout {
    let copies = |(owner, mirror): &(Option<u32>, Option<u32>)| Copies {
        owner: owner.map(Rank),
        mirror: mirror.map(Rank),
    };
    Layout {
        generation: Generation(generation),
        shards: shards.iter().map(copies).collect(),
    }
}

pub fn generation(number: u64, members: &[u64]) -> Record {
    Record::Generation {
        generation: Generation(number),
        members: members.iter().map(|it| Incarnation(*it)).collect(),
    }
}

pub fn notes(actions: &[Action], kind: &str) -> Vec<String> {
    let note = |action: &Action| match action {
        Action::Note(note) if note.kind == kind => Some(note.text.clone()),
        _ => None,
    };
    actions.iter().filter_map(note).collect()
}

pub fn failed(actions: &[Action], parts: &[&str]) {
    match outcome(actions) {
        Some(Outcome::Failed {
            cause: Cause::Temporary,
            reason,
        }) => {
            for part in parts {
                assert!(reason.contains(part), "{reason:?} does not say {part:?}");
            }
        }
        other => panic!("{other:?} instead of a failure that says {parts:?}"),
    }
}
