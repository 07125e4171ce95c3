//! A job, from the first Join to its outcome.
//!
//! A [`Job`] gathers workers, forms a generation, commits its steps and checkpoints, and ends; it is handed events with
//! the time and answers with actions. Its phases are variants that own their data (`phase`); each step of the way has a
//! file: `gathering`, `forming`, `stepping`, `ending`. What workers say comes in through `hearing`. All its deadlines are one table (`deadline`).
//!
//! ```text
//! Gathering ─ world joined ─► Forming ─ all Ready ─► Stepping ─ last commit ─► Draining ─ checkpoint ─► Finishing ─► Done
//!      │                       ▲ └────────────┬──────────┴────────────────────────┘
//!      │      the next generation             │ a loss, a hang, a leaver, a joiner
//!      │                       └─ Regrouping ◄┘
//!      └── a disagreement, a deadline: Stop to all, Done(Failed) ───────────────────────────────────────────────► Done
//! ```
//! After a loss it forms the next generation with whoever is left (`regrouping`) and with spares (`gathering`); it tells a hang
//! from a death and from slowness (`watching`).

mod deadline;
mod ending;
mod evaluating;
mod event;
mod forming;
mod gathering;
mod hearing;
mod phase;
mod regrouping;
mod roster;
mod spoken;
mod stepping;
mod view;
mod watching;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{
    Afterwards, CoordinatorMessage, EarlyStop, Elastic, EvaluationRow, Generation, Incarnation,
    Layout, Note, Outcome, Record, RunFacts, Step, ToWorker,
};
use deadline::Table;
use phase::{Failing, Member, Newest, Phase, Save};
use roster::Roster;
use spoken::Spoken;

pub use event::{Action, Event, JobSpec};
pub use view::{Waiting, WorkerView};
use watching::Pace;

/// A job's state.
pub struct Job {
    spec: JobSpec,
    generation: Generation,
    committed: Step,
    facts: Option<RunFacts>,
    /// Consecutive skipped steps up to `committed`.
    skipped: u64,
    /// Checkpoints in a row that could not be written.
    unsaved: u32,
    /// When the last step may be saved again, after that failed.
    save_again_ms: Option<u64>,
    /// By incarnation, which is the order of their ranks.
    members: Roster,
    phase: Phase,
    /// Deadlines of single workers, which [`Job::refresh`] keeps.
    table: Table,
    /// Checkpoints that were asked for and are not yet visible. Several may be under way, one a step.
    saves: BTreeMap<Step, Save>,
    /// Collective addresses of this generation's members, by rank: as they were when it was formed.
    addresses: Arc<[String]>,
    /// This generation's last Go or Commit, to be repeated.
    said: Option<CoordinatorMessage>,
    /// Recorded evaluations up to `committed`.
    evaluations: Vec<EvaluationRow>,
    /// The step whose evaluation was asked for and is not recorded yet.
    evaluating: Option<Step>,
    /// Why the step after an evaluation is the last.
    early_stop: Option<EarlyStop>,
    /// The next commit is to be the last, and why.
    stop: Option<String>,
    /// Whether the data report was handed out.
    reported: bool,

    // Of losses and of who comes.
    /// Workers that wait to be admitted.
    spares: Roster,
    /// Fewest members among whom the devices of the last ones that all were ready have room; 0 for any number.
    room: u32,
    /// How the job ends after `committed`, once that is its last commit.
    ending: Option<Outcome>,
    /// What to go back to when a shard has no living copy.
    newest: Newest,
    /// Who holds the state that this generation begins with; `None`: `newest`.
    base: Option<Arc<Layout>>,
    /// Whether the update of `committed` was applied.
    apply: bool,
    /// The generation that committed `committed`.
    since: Generation,
    /// Which words are stale.
    spoken: Spoken,
    /// Highest generation that a worker knew.
    known: Generation,
    /// Highest commit of this life, rewound ones included.
    highest: Step,
    /// Who reported a broken collective of this generation, and whom it suspects.
    suspected: BTreeMap<Incarnation, Incarnation>,
    /// In how many generations in a row without a commit a member was suspected.
    strikes: BTreeMap<Incarnation, u32>,
    /// Why members were lost since the last commit, one generation after the other.
    failing: Option<Failing>,
    /// How long steps take.
    pace: Pace,
    /// When the job last got anywhere.
    moved_ms: u64,
}

impl Job {
    /// Starts generation `recovery.generation + 1`. The actions journal the recovery's rewind, if there is one.
    ///
    /// # Panics
    /// On a policy that [`crate::JobPolicy::check`] refuses.
    pub fn new(mut spec: JobSpec, now_ms: u64) -> (Self, Vec<Action>) {
        assert_eq!(
            spec.policy.check(),
            Ok(()),
            "checked with the configuration"
        );
        let spoken = Spoken::new(std::mem::take(&mut spec.recovery.spoke));
        let recovery = &spec.recovery;
        let selection = spec.policy.selection.as_ref();
        let early_stop = recovery.early_stop.clone();
        let mut job = Self {
            generation: Generation(recovery.generation.0 + 1),
            committed: recovery.committed,
            facts: recovery.facts.clone(),
            skipped: recovery.skipped,
            unsaved: 0,
            save_again_ms: None,
            members: Roster::default(),
            table: Table::default(),
            phase: Phase::Gathering {
                since_ms: now_ms,
                grace_over: false,
            },
            saves: BTreeMap::new(),
            addresses: Arc::default(),
            said: None,
            evaluations: recovery.evaluations.clone(),
            evaluating: None,
            early_stop: early_stop.filter(|stop| selection.is_some_and(|it| it.confirms(stop))),
            stop: None,
            reported: false,
            spares: Roster::default(),
            room: 0,
            ending: None,
            newest: Newest {
                step: recovery.checkpoint,
                path: spec.resume.clone(),
                skipped: recovery.checkpoint_skipped,
            },
            base: None,
            apply: recovery.apply,
            since: recovery.since,
            spoken,
            known: Generation(0),
            highest: recovery.highest_committed.max(recovery.committed),
            suspected: BTreeMap::new(),
            strikes: BTreeMap::new(),
            failing: None,
            pace: Pace::default(),
            moved_ms: now_ms,
            spec,
        };
        let mut actions = Vec::new();
        if let Some(rewind) = job.spec.recovery.rewind.clone() {
            let text = match &rewind {
                Record::Rewind { to, reason } => format!("back to step {to}: {reason}"),
                other => format!("{other:?}"),
            };
            actions.push(Action::Journal(rewind));
            actions.push(note("rewind", text));
        }
        let text = format!(
            "a lost worker costs at most {} s by the timeouts, {} s more while too few are left to train",
            job.spec.policy.recovery_ms_max() as f64 / 1000.0,
            job.spec.policy.join_timeout_ms as f64 / 1000.0
        );
        actions.push(note("bound", text));
        if job.spec.recovery.completed {
            job.end(Outcome::Completed, &mut actions);
        }
        job.forget_gone();
        job.refresh();
        (job, actions)
    }

    /// Takes an event in at `now_ms`, which never goes back, and says what to do.
    pub fn handle(&mut self, now_ms: u64, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Message(message) => self.message(now_ms, message, &mut actions),
            Event::Disconnected { incarnation } => {
                self.lost(now_ms, incarnation, "its connection closed", &mut actions);
            }
            Event::CheckpointCommitted { step, path } => {
                self.checkpoint_committed(now_ms, step, path, &mut actions);
            }
            Event::CheckpointFailed { step, reason } => {
                self.save_failed(now_ms, step, &reason, &mut actions);
            }
            Event::DrainRequested {
                incarnation,
                reason,
            } => self.drain(now_ms, incarnation, reason, &mut actions),
            Event::StopRequested { reason } => self.stop_requested(now_ms, reason, &mut actions),
            Event::Tick => self.tick(now_ms, &mut actions),
        }
        self.refresh();
        actions
    }

    /// When to hand in [`Event::Tick`]; `None` once done.
    pub fn next_deadline(&self) -> Option<u64> {
        self.first_deadline().map(|(at_ms, _)| at_ms)
    }

    /// What it is made of.
    pub fn spec(&self) -> &JobSpec {
        &self.spec
    }

    /// The last commit.
    pub fn committed(&self) -> Step {
        self.committed
    }

    /// This job's generation.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Members of the present generation; before there is one, those that the first waits for.
    pub fn world(&self) -> u32 {
        match self.phase {
            Phase::Gathering { .. } => self.spec.policy.world,
            _ => self.members.len() as u32,
        }
    }

    /// What the members agreed on, or an earlier generation did.
    pub fn facts(&self) -> Option<&RunFacts> {
        self.facts.as_ref()
    }

    /// How it ended, once it did.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.phase {
            Phase::Done(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// What it does about losses.
    fn elastic(&self) -> &Elastic {
        &self.spec.policy.elastic
    }

    fn send(
        &self,
        incarnation: Incarnation,
        message: CoordinatorMessage,
        actions: &mut Vec<Action>,
    ) {
        actions.push(Action::Send(ToWorker {
            incarnation,
            fence: self.spec.fence,
            generation: self.generation,
            message,
        }));
    }

    /// Tells a worker that the job is over for it; it may ask for another.
    fn stop(&self, incarnation: Incarnation, reason: String, actions: &mut Vec<Action>) {
        let stop = CoordinatorMessage::Stop {
            reason,
            afterwards: Afterwards::Rejoin,
        };
        self.send(incarnation, stop, actions);
    }

    fn send_all(&self, message: &CoordinatorMessage, actions: &mut Vec<Action>) {
        for incarnation in self.members.keys() {
            self.send(*incarnation, message.clone(), actions);
        }
    }

    /// `rank 1 (worker gpu-3)`, or the worker alone before it has a rank; its incarnation when it is no member.
    fn name(&self, incarnation: Incarnation) -> String {
        let member = self.members.get(&incarnation);
        let Some(member) = member.or_else(|| self.spares.get(&incarnation)) else {
            return format!("worker {incarnation}");
        };
        match member.rank {
            Some(rank) => format!("rank {rank} (worker {})", member.name),
            None => format!("worker {}", member.name),
        }
    }
}

fn note(kind: &'static str, text: String) -> Action {
    Action::Note(Note { kind, text })
}
