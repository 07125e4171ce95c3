//! What survives crashes: the journal and the checkpoints. Every write is checked against what an undisturbed run would
//! have written.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{
    CommitRecord, EvaluationRow, Fence, Generation, Incarnation, JobPolicy, Record, Recovery,
    Selection, Statistics, Step, StepReport, recover_living, surviving,
};

use crate::random::mix;

/// An undisturbed run: reports, states and evaluations are functions of the seed and the step alone.
pub struct Oracle {
    pub steps_total: u64,
    seed: u64,
    /// The state after each step, from 0.
    states: Vec<u64>,
    /// The step whose evaluation ends training early.
    pub stops_after: Option<u64>,
    /// Steps that are evaluated, the first of them 0.
    pub evaluated: Vec<u64>,
    /// The best of them after 0.
    pub best: Option<u64>,
}

impl Oracle {
    pub fn new(seed: u64, steps_total: u64, policy: &JobPolicy) -> Self {
        let mut oracle = Self {
            steps_total,
            seed,
            states: vec![mix(seed, 77)],
            stops_after: None,
            evaluated: vec![0],
            best: None,
        };
        for step in 1..=steps_total {
            let state = oracle.state_after(step - 1);
            let finite = oracle.report(state, step).finite;
            oracle.states.push(Self::next_state(state, step, finite));
        }
        oracle.play(policy);
        oracle
    }

    /// The run step by step, by a rule written down once more.
    fn play(&mut self, policy: &JobPolicy) {
        let (mut best, mut mark, mut waited): (f64, f64, u64) = (f64::NAN, f64::NAN, 0);
        for step in 1..=self.steps_total {
            let cadence = policy.evaluate_every.is_some_and(|every| step % every == 0);
            let last = step == self.steps_total || self.stops_after.is_some();
            if !cadence && !last {
                continue;
            }
            self.evaluated.push(step);
            let Some(rule) = &policy.selection else {
                continue;
            };
            let value = compared(rule, &self.evaluation(step).statistics);
            if value > best || best.is_nan() && !value.is_nan() {
                (best, self.best) = (value, Some(step));
            }
            if value > mark + rule.min_delta || mark.is_nan() && !value.is_nan() {
                (mark, waited) = (value, 0);
            } else {
                waited += 1;
            }
            if self.stops_after.is_some() {
                break;
            }
            let over = rule.patience.is_some_and(|patience| waited >= patience);
            if over && step + 1 < self.steps_total {
                self.stops_after = Some(step);
            }
        }
    }

    /// The last step.
    pub fn end(&self) -> u64 {
        self.stops_after.map_or(self.steps_total, |step| step + 1)
    }

    /// What the weights after `step` evaluate to. Values repeat, and some are not numbers.
    pub fn evaluation(&self, step: u64) -> EvaluationRow {
        let drawn = mix(self.state_after(step), 9_000 + step);
        let value = match drawn % 10 {
            9 => f64::NAN,
            eighths => eighths as f64 / 8.0 + (step / 10) as f64 / 8.0,
        };
        EvaluationRow {
            step,
            pairs: 8,
            statistics: Statistics {
                rewards_accuracies: value,
                loss: -value,
                ..Statistics::default()
            },
        }
    }

    pub fn initial_state(&self) -> u64 {
        self.state_after(0)
    }

    /// The state after a verdict on `step`.
    pub fn next_state(state: u64, step: u64, apply: bool) -> u64 {
        if apply { mix(state, step) } else { state }
    }

    /// What a worker with `state` reports of `step`. Some steps are not finite and are skipped.
    pub fn report(&self, state: u64, step: u64) -> StepReport {
        let finite = !mix(self.seed, step / 3).is_multiple_of(4) || step.is_multiple_of(3);
        let mut report = StepReport {
            step,
            finite,
            grad_norm: if finite { 1.5 } else { f64::NAN },
            learning_rate: 1.0 / step as f64,
            tokens: 100 + step,
            pairs: 4,
            ..StepReport::default()
        };
        report.statistics.loss = (mix(state, step) % 1000) as f64 / 7.0;
        report
    }

    /// The state after `step` of an undisturbed run.
    pub fn state_after(&self, step: u64) -> u64 {
        self.states[step as usize]
    }
}

/// The value that a rule compares, so that higher is better.
fn compared(rule: &Selection, statistics: &Statistics) -> f64 {
    let value = rule.metric.of(statistics);
    if rule.higher_is_better { value } else { -value }
}

#[derive(Default)]
pub struct Disk {
    /// Without the openings, of which there are as many as the newest fence.
    pub journal: Vec<Record>,
    fence: Fence,
    /// State by step.
    pub checkpoints: BTreeMap<u64, u64>,
    /// Steps that ever had a checkpoint.
    pub saved: BTreeSet<u64>,
    /// The same with the generation that wrote it.
    pub published: BTreeSet<(u64, u64)>,

    // What the journal says, kept as it grows: reading it all at each word costs the square of its length. At every start of a
    // coordinator and at the end it is compared with what the journal says read as a whole.
    commits: Vec<CommitRecord>,
    evaluated: Vec<u64>,
    members: Vec<Incarnation>,
    generation: Generation,
    rewinds: usize,
    /// How many there were when a generation was formed.
    rewinds_before: BTreeMap<u64, usize>,
    highest: u64,
    /// Commits that were ever journaled: generation, step, verdict.
    verdicts: BTreeSet<(u64, u64, bool)>,
}

impl Disk {
    /// The fence of whoever opens the journal now.
    pub fn open(&mut self) -> Fence {
        self.fence.0 += 1;
        self.fence
    }

    /// Of whoever opened it last.
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// The commits that count.
    pub fn commits(&self) -> &[CommitRecord] {
        &self.commits
    }

    /// The same, as the journal is read by a coordinator that starts.
    pub fn surviving(&self) -> Vec<CommitRecord> {
        let commits = surviving(&self.journal);
        let commits = commits.expect("M3: the journal's commits follow each other");
        // Their reports may hold what is not a number.
        let which = |it: &CommitRecord| (it.row.generation, it.row.report.step, it.apply);
        assert!(commits.iter().map(which).eq(self.commits.iter().map(which)));
        commits
    }

    pub fn recover(&self) -> Recovery {
        let newest = self.checkpoints.keys().next_back().map(|step| Step(*step));
        let recovery =
            recover_living(&self.journal, newest).expect("M2: the journal covers the checkpoints");
        self.surviving();
        assert_eq!(recovery.generation, self.generation);
        assert_eq!(recovery.members, self.members);
        assert_eq!(recovery.highest_committed.0, self.highest);
        recovery
    }

    /// Rewinds ever journaled.
    pub fn rewinds(&self) -> usize {
        self.rewinds
    }

    /// Rewinds journaled before this generation.
    pub fn rewinds_before(&self, generation: u64) -> usize {
        self.rewinds_before[&generation]
    }

    /// The last commit that counts, and the generation that made it.
    pub fn last_commit(&self) -> (u64, u64) {
        last_of(&self.commits)
    }

    /// The same of the first `records`.
    pub fn last_commit_of(&self, records: usize) -> (u64, u64) {
        let commits = surviving(&self.journal[..records]).expect("M3: it was checked before");
        last_of(&commits)
    }

    /// The highest commit ever journaled, rewound or not.
    pub fn highest_commit(&self) -> u64 {
        self.highest
    }

    /// Members of the newest generation.
    pub fn members(&self) -> &[Incarnation] {
        &self.members
    }

    pub fn append(&mut self, record: Record, oracle: &Oracle) {
        match &record {
            Record::Generation {
                generation,
                members,
            } => {
                assert!(
                    *generation > self.generation(),
                    "M2: {generation} was used before"
                );
                self.generation = *generation;
                self.rewinds_before.insert(generation.0, self.rewinds);
                self.members.clone_from(members);
            }
            Record::Commit(commit) => {
                let step = commit.row.report.step;
                let state = oracle.state_after(step - 1);
                let expected = oracle.report(state, step);
                let difference = commit.row.report.first_difference(&expected);
                assert_eq!(
                    difference, None,
                    "step {step} is not what an undisturbed run computes"
                );
                assert_eq!(
                    commit.apply, expected.finite,
                    "T6: skipped exactly when not finite"
                );
                assert_eq!(
                    commit.row.generation,
                    self.generation().0,
                    "M1: an old generation"
                );
                assert_eq!(
                    step,
                    self.commits.len() as u64 + 1,
                    "M3: the journal's commits follow each other"
                );
                self.commits.push(*commit);
                self.highest = self.highest.max(step);
                self.verdicts
                    .insert((commit.row.generation, step, commit.apply));
            }
            Record::Checkpoint { step } => {
                // A newer one may have taken its place already.
                assert!(
                    self.saved.contains(&step.0),
                    "C1: {step} was never in place"
                );
            }
            Record::Completed { step } => {
                assert_eq!(step.0, oracle.end());
                assert!(
                    self.checkpoints.contains_key(&step.0),
                    "completed without a checkpoint"
                );
            }
            Record::Evaluation { row, stop } => {
                assert_eq!(
                    format!("{row:?}"),
                    format!("{:?}", oracle.evaluation(row.step)),
                    "T3: not what an undisturbed run evaluates"
                );
                assert_eq!(
                    stop.as_ref().map(|it| it.step),
                    oracle.stops_after.filter(|step| *step == row.step),
                    "T3: an undisturbed run stops after another evaluation than {}",
                    row.step
                );
                self.evaluated.push(row.step);
            }
            Record::Rewind { to, .. } => {
                assert!(to.0 <= self.commits.len() as u64, "M4: a rewind goes back");
                self.commits.truncate(to.0 as usize);
                self.evaluated.retain(|step| *step <= to.0);
                self.rewinds += 1;
            }
            Record::Opened | Record::Anew | Record::Facts { .. } => {}
        }
        self.journal.push(record);
        let committed = self.commits.len() as u64;
        assert!(committed <= oracle.end(), "M3: more steps than the run has");
        // What a commit rests on is in the journal before it.
        let all = oracle.evaluated.iter();
        let before = all.take_while(|step| **step < committed).count();
        assert_eq!(
            self.evaluated.get(..before),
            Some(&oracle.evaluated[..before]),
            "T3: evaluations"
        );
    }

    /// Steps of the surviving evaluations.
    pub fn evaluated(&self) -> &[u64] {
        &self.evaluated
    }

    /// The highest generation journaled.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Whether a commit was ever journaled, rewound or not.
    pub fn has_commit(&self, generation: u64, step: u64, apply: bool) -> bool {
        self.verdicts.contains(&(generation, step, apply))
    }

    /// Of the older ones only the best that is there stays.
    pub fn put_checkpoint(
        &mut self,
        (step, generation): (u64, u64),
        shards: &[String],
        best_first: &[Step],
        oracle: &Oracle,
    ) {
        let state = oracle.state_after(step);
        for (rank, shard) in shards.iter().enumerate() {
            let expected = format!("step {step} rank {rank} state {state:x}");
            assert_eq!(
                *shard, expected,
                "a shard that does not belong into the checkpoint"
            );
        }
        assert!(
            !oracle.evaluated.contains(&step) || self.evaluated().contains(&step),
            "a checkpoint of step {step} without its evaluation"
        );
        self.checkpoints.insert(step, state);
        self.saved.insert(step);
        self.published.insert((step, generation));
        let mut best_first = best_first.iter().map(|it| it.0);
        let best = best_first.find(|it| self.checkpoints.contains_key(it));
        self.checkpoints
            .retain(|it, _| *it >= step || Some(*it) == best);
    }
}

/// Step and generation of the last of `commits`.
fn last_of(commits: &[CommitRecord]) -> (u64, u64) {
    let last = commits.last();
    last.map_or((0, 0), |it| (it.row.report.step, it.row.generation))
}
