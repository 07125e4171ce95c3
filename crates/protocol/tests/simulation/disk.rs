//! What survives crashes: the journal and the checkpoints. Every write is checked against what an undisturbed run would
//! have written.

use std::collections::BTreeMap;

use protocol::{CommitRecord, Generation, Record, Recovery, Step, StepReport, recover, surviving};

use crate::random::mix;

/// An undisturbed run: reports and states are functions of the seed and the step alone.
pub struct Oracle {
    pub steps_total: u64,
    seed: u64,
}

impl Oracle {
    pub fn new(seed: u64, steps_total: u64) -> Self {
        Self { steps_total, seed }
    }

    pub fn initial_state(&self) -> u64 {
        mix(self.seed, 77)
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
        let mut state = self.initial_state();
        for step in 1..=step {
            state = Self::next_state(state, step, self.report(state, step).finite);
        }
        state
    }
}

#[derive(Default)]
pub struct Disk {
    pub journal: Vec<Record>,
    /// State by step.
    pub checkpoints: BTreeMap<u64, u64>,
}

impl Disk {
    pub fn commits(&self) -> Vec<CommitRecord> {
        surviving(&self.journal).expect("M3: the journal's commits follow each other")
    }

    pub fn recover(&self) -> Recovery {
        let newest = self.checkpoints.keys().next_back().map(|step| Step(*step));
        recover(&self.journal, newest).expect("M2: the journal covers the checkpoints")
    }

    pub fn append(&mut self, record: Record, oracle: &Oracle) {
        match &record {
            Record::Generation { generation, .. } => {
                assert!(
                    *generation > self.generation(),
                    "M2: {generation} was used before"
                );
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
            }
            Record::Checkpoint { step } => {
                assert!(
                    self.checkpoints.contains_key(&step.0),
                    "C1: {step} is not in place"
                );
            }
            Record::Completed { step } => {
                assert_eq!(step.0, oracle.steps_total);
                assert!(
                    self.checkpoints.contains_key(&step.0),
                    "completed without a checkpoint"
                );
            }
            Record::Facts { .. } | Record::Rewind { .. } => {}
        }
        self.journal.push(record);
        let commits = self.commits();
        assert!(
            commits.len() as u64 <= oracle.steps_total,
            "M3: more steps than the run has"
        );
    }

    /// The highest generation journaled.
    pub fn generation(&self) -> Generation {
        let generations = self.journal.iter().filter_map(|record| match record {
            Record::Generation { generation, .. } => Some(*generation),
            _ => None,
        });
        generations.max().unwrap_or_default()
    }

    /// Whether a commit was ever journaled, rewound or not.
    pub fn has_commit(&self, generation: u64, step: u64, apply: bool) -> bool {
        self.journal.iter().any(|record| {
            matches!(record, Record::Commit(it)
                if it.row.generation == generation && it.row.report.step == step && it.apply == apply)
        })
    }

    pub fn put_checkpoint(&mut self, step: u64, shards: &[String], oracle: &Oracle) {
        let state = oracle.state_after(step);
        for (rank, shard) in shards.iter().enumerate() {
            let expected = format!("step {step} rank {rank} state {state:x}");
            assert_eq!(
                *shard, expected,
                "a shard that does not belong into the checkpoint"
            );
        }
        self.checkpoints.insert(step, state);
    }
}
