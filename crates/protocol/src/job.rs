//! One generation of a job, from the first Join to its outcome.
//!
//! A [`Job`] gathers workers, forms the generation, commits its steps and checkpoints, and ends; it is handed events with
//! the time and answers with actions. Its phases are variants that own their data (`phase`); each step of the way has a
//! file: `gathering`, `forming`, `stepping`, `ending`. All its deadlines are one table (`deadline`).
//!
//! ```text
//! Gathering ─ world joined ─► Forming ─ all Ready ─► Stepping ─ last commit ─► Draining ─ checkpoint ─► Finishing ─► Done
//!      └───────────────────────────┴──── a loss, a deadline, a disagreement: Stop to all, Done(Failed) ────────┘
//! ```

mod deadline;
mod ending;
mod evaluating;
mod forming;
mod gathering;
mod phase;
mod stepping;
mod view;

use std::collections::BTreeMap;

use crate::{
    Afterwards, Awaits, Cause, CoordinatorMessage, EarlyStop, EvaluationRow, FromWorker,
    Generation, Incarnation, JobId, JobPolicy, MetricsRow, Note, Outcome, Rank, Record, Recovery,
    RunFacts, Sample, Step, ToWorker, WorkerMessage,
};
use phase::{Member, Phase, Save, Vote};
pub use view::{Waiting, WorkerView};

/// What a job is made of.
#[derive(Clone, PartialEq)]
pub struct JobSpec {
    /// Its name.
    pub id: JobId,
    /// Sizes, cadences, limits.
    pub policy: JobPolicy,
    /// Version of the program that all members must run.
    pub build: String,
    /// The resolved configuration, for the workers.
    pub config_toml: String,
    /// Where checkpoints go.
    pub checkpoint_dir: String,
    /// A file in that folder, by which workers see that it is the same disk; empty for none.
    pub probe: String,
    /// Key of this generation's collective handshake.
    pub secret: [u8; 32],
    /// What to go on from.
    pub recovery: Recovery,
    /// The checkpoint that holds `recovery.committed`; `None` at step 0.
    pub resume: Option<String>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
#[allow(
    clippy::large_enum_variant,
    reason = "nearly all events are messages, and few wait at a time"
)]
pub enum Event {
    /// A worker said something.
    Message(FromWorker),
    /// A worker's connection is gone, or its process.
    Disconnected {
        /// Whose.
        incarnation: Incarnation,
    },
    /// [`Action::CommitCheckpoint`] succeeded: the manifest is in place and verified.
    CheckpointCommitted {
        /// Its step.
        step: Step,
    },
    /// [`Action::CommitCheckpoint`] did not succeed.
    CheckpointFailed {
        /// Its step.
        step: Step,
        /// What happened, where, and the cure.
        reason: String,
    },
    /// Somebody wants the job to stop, resumable.
    StopRequested {
        /// Who and why.
        reason: String,
    },
    /// [`Job::next_deadline`] is reached. Messages that have arrived are handed in first, so that a coordinator which
    /// slept does not take its workers for silent.
    Tick,
}

/// What to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Append to the journal and sync; go on only when it is durable.
    Journal(Record),
    /// Send, if the worker is still connected.
    Send(ToWorker),
    /// Verify all ranks' files and write the manifest, beside the loop; answer with [`Event::CheckpointCommitted`] or
    /// [`Event::CheckpointFailed`].
    CommitCheckpoint {
        /// The generation that wrote the files.
        generation: Generation,
        /// The step whose state they hold.
        step: Step,
        /// Their number.
        world: u32,
        /// What each rank said in [`WorkerMessage::Saved`], by rank.
        shards: Vec<String>,
        /// Evaluated steps, the best first: the first of them that has a checkpoint keeps it, beside the newest ones. Empty
        /// where only the newest stay. Later steps than `step` may be better and are not known yet.
        best_first: Vec<Step>,
    },
    /// Append to `metrics.jsonl`.
    RecordStep(MetricsRow),
    /// Append to `eval.jsonl`, keep the samples.
    RecordEvaluation {
        /// The means.
        row: EvaluationRow,
        /// Greedy continuations with the same weights.
        samples: Vec<Sample>,
    },
    /// Show and keep rank 0's account of the data files.
    DataReport {
        /// Several lines for a person.
        text: String,
    },
    /// Append to `events.jsonl`.
    Note(Note),
    /// A long phase of a rank moved.
    Progress {
        /// Whose.
        rank: Rank,
        /// Such as `load model`.
        phase: String,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
    },
    /// The job ended. Always the last action; later events bring only [`CoordinatorMessage::Stop`] to whoever still speaks.
    Done(Outcome),
}

/// One generation of a job.
pub struct Job {
    spec: JobSpec,
    generation: Generation,
    committed: Step,
    facts: Option<RunFacts>,
    /// Consecutive skipped steps up to `committed`.
    skipped: u64,
    /// By incarnation, which is the order of their ranks.
    members: BTreeMap<Incarnation, Member>,
    phase: Phase,
    /// Checkpoints that were asked for and are not yet visible. Several may be under way, one a step.
    saves: BTreeMap<Step, Save>,
    /// This generation's last Commit, to be repeated.
    verdict: Option<CoordinatorMessage>,
    /// Recorded evaluations up to `committed`.
    evaluations: Vec<EvaluationRow>,
    /// The step whose evaluation was asked for and is not recorded yet.
    evaluating: Option<Step>,
    /// Why the step after an evaluation is the last.
    early_stop: Option<EarlyStop>,
    /// Whether the data report was handed out.
    reported: bool,
}

impl Job {
    /// Starts generation `recovery.generation + 1`. The actions journal the recovery's rewind, if there is one.
    pub fn new(spec: JobSpec, now_ms: u64) -> (Self, Vec<Action>) {
        let recovery = &spec.recovery;
        let selection = spec.policy.selection.as_ref();
        let early_stop = recovery.early_stop.clone();
        let mut job = Self {
            generation: Generation(recovery.generation.0 + 1),
            committed: recovery.committed,
            facts: recovery.facts.clone(),
            skipped: recovery.skipped,
            members: BTreeMap::new(),
            phase: Phase::Gathering { since_ms: now_ms },
            saves: BTreeMap::new(),
            verdict: None,
            evaluations: recovery.evaluations.clone(),
            evaluating: None,
            early_stop: early_stop.filter(|stop| selection.is_some_and(|it| it.confirms(stop))),
            reported: false,
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
        if job.spec.recovery.completed {
            job.end(Outcome::Completed, &mut actions);
        }
        (job, actions)
    }

    /// Takes an event in at `now_ms`, which never goes back, and says what to do.
    pub fn handle(&mut self, now_ms: u64, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Message(message) => self.message(now_ms, message, &mut actions),
            Event::Disconnected { incarnation } => {
                self.lost(incarnation, "its connection closed", &mut actions);
            }
            Event::CheckpointCommitted { step } => {
                self.checkpoint_committed(now_ms, step, &mut actions);
            }
            Event::CheckpointFailed { step, reason } => {
                self.save_failed(now_ms, step, &reason, &mut actions);
            }
            Event::StopRequested { reason } => self.stop_requested(reason, &mut actions),
            Event::Tick => self.tick(now_ms, &mut actions),
        }
        actions
    }

    /// When to hand in [`Event::Tick`]; `None` once done.
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadlines().into_iter().map(|(at_ms, _)| at_ms).min()
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

    /// Checks a message's fences (invariant M1), then acts on it.
    fn message(&mut self, now_ms: u64, from: FromWorker, actions: &mut Vec<Action>) {
        let FromWorker {
            job,
            incarnation,
            generation,
            message,
        } = from;
        // A worker may not know the name of the only job here.
        if !job.0.is_empty() && job != self.spec.id {
            let reason = format!("this coordinator runs job {}, not {job}", self.spec.id);
            return self.stop(incarnation, reason, actions);
        }
        if let Phase::Done(outcome) = &self.phase {
            let reason = format!("the job ended: {outcome}");
            return self.stop(incarnation, reason, actions);
        }
        if let Some(reason) = self.knows_more(incarnation, generation, &message) {
            return self.fail(Cause::Fatal, reason, None, actions);
        }
        if let WorkerMessage::Join(profile) = message {
            return self.join(now_ms, incarnation, profile, actions);
        }
        let gathering = matches!(self.phase, Phase::Gathering { .. });
        let truth = CoordinatorMessage::Stale {
            committed: self.committed,
        };
        let Some(member) = self.members.get_mut(&incarnation) else {
            if gathering {
                return self.send(incarnation, truth, actions);
            }
            let reason = format!("generation {} has its members already", self.generation);
            return self.stop(incarnation, reason, actions);
        };
        // Before its Form a member speaks with generation 0; once it said Ready, it does not.
        let fresh = generation == Generation(0)
            && matches!(self.phase, Phase::Gathering { .. } | Phase::Forming { .. });
        if generation != self.generation && !fresh {
            return self.send(incarnation, truth, actions);
        }
        member.last_heard_ms = now_ms;
        let Some(rank) = member.rank else {
            let name = self.name(incarnation);
            match message {
                WorkerMessage::Failed { cause, reason } => {
                    let reason = format!("{name} (not yet ranked): {reason}");
                    self.fail(cause, reason, Some(incarnation), actions);
                }
                WorkerMessage::Leave { reason } => {
                    self.stop_requested(format!("{name} leaves: {reason}"), actions);
                }
                _ => {}
            }
            return;
        };
        match message {
            WorkerMessage::Join(_) => unreachable!("joins were taken above"),
            WorkerMessage::Beat { committed, awaits } => {
                member.committed = member.committed.max(committed);
                self.repeat(incarnation, committed, awaits, actions);
            }
            WorkerMessage::Progress { phase, done, total } => {
                self.progress(now_ms, incarnation, (phase, done, total), actions);
            }
            WorkerMessage::DataReport { text } => {
                // Once a generation: a repetition is not shown again.
                if rank == Rank(0) && !std::mem::replace(&mut self.reported, true) {
                    actions.push(Action::DataReport { text });
                }
            }
            WorkerMessage::Ready {
                facts,
                reference_reused,
                reference_computed,
            } => {
                let counts = (reference_reused, reference_computed);
                self.ready(now_ms, incarnation, facts, counts, actions);
            }
            WorkerMessage::Prepared { report, phases } => {
                let vote = Vote { report, phases };
                self.prepared(now_ms, incarnation, vote, actions);
            }
            WorkerMessage::Evaluated { row, samples } => {
                self.evaluated(now_ms, rank, row, samples, actions);
            }
            WorkerMessage::Saved { step, shard } => self.saved(rank, step, shard, actions),
            WorkerMessage::SaveFailed { step, reason } => {
                let reason = format!("{}: {reason}", self.name(incarnation));
                self.save_failed(now_ms, step, &reason, actions);
            }
            WorkerMessage::Finished => self.finished(incarnation, actions),
            WorkerMessage::Failed { cause, reason } => {
                self.member_failed(incarnation, cause, &reason, actions);
            }
            WorkerMessage::Leave { reason } => {
                let reason = format!("{} leaves: {reason}", self.name(incarnation));
                self.stop_requested(reason, actions);
            }
        }
    }

    /// Whether a worker knows more than the journal, so that the journal cannot be this run's newest (invariant M2).
    fn knows_more(
        &self,
        incarnation: Incarnation,
        generation: Generation,
        message: &WorkerMessage,
    ) -> Option<String> {
        let cure = "the journal is not the newest of this run: restore it, or stop the workers of the other coordinator";
        if generation > self.generation {
            return Some(format!(
                "worker {incarnation} is of generation {generation}, the journal allows {}; {cure}",
                self.generation
            ));
        }
        let highest = self.committed.max(self.spec.recovery.highest_committed);
        match message {
            WorkerMessage::Beat { committed, .. } if *committed > highest => Some(format!(
                "worker {incarnation} knows commit {committed}, the journal ends at {highest}; {cure}"
            )),
            _ => None,
        }
    }

    /// Repeats the answer that a waiting worker lacks: a lost message costs one heartbeat.
    fn repeat(
        &self,
        incarnation: Incarnation,
        committed: Step,
        awaits: Awaits,
        actions: &mut Vec<Action>,
    ) {
        match (awaits, &self.phase) {
            (Awaits::Form, Phase::Forming { .. }) => {
                self.send(incarnation, self.form_message(incarnation), actions);
            }
            (Awaits::Go, Phase::Stepping { .. }) if self.verdict.is_none() => {
                self.send(incarnation, self.go_message(), actions);
            }
            (Awaits::Commit, _) if committed < self.committed => {
                self.repeat_verdict(incarnation, actions);
            }
            (Awaits::Go | Awaits::End, Phase::Finishing { .. }) => {
                self.send(incarnation, CoordinatorMessage::Finish, actions);
            }
            _ => {}
        }
    }

    fn send(
        &self,
        incarnation: Incarnation,
        message: CoordinatorMessage,
        actions: &mut Vec<Action>,
    ) {
        actions.push(Action::Send(ToWorker {
            incarnation,
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
        let Some(member) = self.members.get(&incarnation) else {
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
