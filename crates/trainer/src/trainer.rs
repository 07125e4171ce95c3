//! The training loop of one rank. It reads from top to bottom: what next, prepare, ask, apply or drop, save, evaluate.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use checkpoint::TrainState;
use collective::Collective;
use data::{Dataset, Pair, StepPairs, Tokenizer, step_pairs};
use objective::{BatchStatistics, PairLogps};
use spec::{Schedule, Spec};

use crate::batch::Batch;
use crate::error::TrainError;
use crate::evaluate;
use crate::gate::{EvaluationRow, Next, StepGate, StepReport};
use crate::learner::{Learner, Mismatched, Prepared};
use crate::measure::{measure, pair_logps};
use crate::phases::{Phases, timed};
use crate::process::peak_bytes;
use crate::reference::{ReferenceCounts, References};
use crate::setup::{MismatchedPairs, Progress, Setup, held_out};
use crate::snapshot::{Destination, Saver, restore};

/// A rank's place among the others, for one generation.
pub struct Membership {
    /// Connected; tells rank, world and generation.
    pub collective: Box<dyn Collective>,
    /// How long to wait for the other ranks in any one operation of a step.
    pub step_deadline: Duration,
    /// Folder of checkpoints.
    pub checkpoints: PathBuf,
    /// The checkpoint to go on from; without one the starting weights.
    pub resume: Option<PathBuf>,
    /// Written into snapshots; the collective's own.
    pub generation: u64,
}

/// How [`Trainer::run`] ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The job is done.
    Finished,
    /// Asked to leave before the end.
    Stopped,
}

/// One rank, loaded and at the last commit.
pub struct Trainer {
    spec: Spec,
    tokenizer: Tokenizer,
    train: Dataset,
    eval: Option<Dataset>,
    mismatched: MismatchedPairs,
    learner: Learner,
    references: Reference,
    saver: Saver,
    rates: Schedule,
    state: TrainState,
}

/// For whoever compares it with what was planned.
fn tell_memory() {
    if let Some(bytes) = peak_bytes() {
        tracing::info!(peak_memory_mib = bytes >> 20, "done");
    }
}

/// The reference's log-probs, by pair of each list.
struct Values {
    train: Vec<[f64; 2]>,
    eval: Vec<[f64; 2]>,
    mismatched_train: Vec<[f64; 2]>,
    mismatched_eval: Vec<[f64; 2]>,
}

/// Where the reference's log-probs stand.
enum Reference {
    /// The objective reads none.
    None,
    /// This rank's part is durable; the others' may not be.
    Stored(Box<References>),
    /// Values by pair.
    Loaded(Box<Values>),
}

impl Trainer {
    /// Scores this rank's slice of the reference (durable when this returns) and takes up the state of the last commit.
    ///
    /// # Errors
    /// A store or a checkpoint that cannot be used.
    pub fn new(
        setup: Setup,
        membership: Membership,
        progress: Progress<'_>,
    ) -> Result<(Self, ReferenceCounts), TrainError> {
        let collective = membership.collective;
        let (rank, world) = (collective.rank(), collective.world());
        let (references, counts) = if setup.spec.objective.needs_reference() {
            let (references, counts) = References::make(&setup, rank, world, progress)?;
            (Reference::Stored(Box::new(references)), counts)
        } else {
            (Reference::None, ReferenceCounts::default())
        };
        let facts = setup.facts();
        let Setup {
            spec,
            tokenizer,
            train,
            eval,
            mismatched,
            mut model,
            adapter,
            ..
        } = setup;
        if let Some(adapter) = adapter {
            adapter.put_on(&mut model)?;
        }
        let mut learner = Learner::new(model, spec.optimizer, collective, membership.step_deadline);
        let state = match &membership.resume {
            Some(path) => {
                progress("load checkpoint", 0, 1);
                restore(&mut learner, path, spec.seed, &facts)?
            }
            None => TrainState {
                step: 0,
                epoch: 0,
                updates: 0,
                seed: spec.seed,
                shift: None,
            },
        };
        let saver = Saver::new(Destination {
            checkpoints: membership.checkpoints,
            generation: membership.generation,
            rank: rank as u32,
            world: world as u32,
        });
        let trainer = Self {
            rates: spec.learning_rates(facts.steps_total),
            spec,
            tokenizer,
            train,
            eval,
            mismatched,
            learner,
            references,
            saver,
            state,
        };
        Ok((trainer, counts))
    }

    /// The last committed step that this state holds.
    pub fn committed(&self) -> u64 {
        self.state.step
    }

    /// Trains as `gate` says, until it says that this is the end.
    ///
    /// # Errors
    /// A lost peer or control side; the state of the last checkpoint is what remains then.
    pub fn run(mut self, gate: &mut dyn StepGate) -> Result<End, TrainError> {
        loop {
            let next = timed(&mut self.learner.times.wait, || gate.next())?;
            self.collect_references()?;
            match next {
                Next::Evaluate => self.evaluate(gate)?,
                Next::Step(step) => self.step(step, gate)?,
                Next::Finish => {
                    self.saver.finish();
                    tell_memory();
                    return Ok(End::Finished);
                }
                Next::Stop => {
                    self.saver.finish();
                    return Ok(End::Stopped);
                }
            }
        }
    }

    fn step(&mut self, step: u64, gate: &mut dyn StepGate) -> Result<(), TrainError> {
        let (committed, total) = (self.state.step, self.rates.steps);
        if step != committed + 1 || step > total {
            return Err(TrainError::Order {
                asked: step,
                committed,
                total,
            });
        }
        let start = Instant::now();
        let pairs = self.train.pairs.len();
        let batch_pairs = self.spec.train.batch_pairs;
        let order = step_pairs(
            self.spec.seed,
            step,
            pairs,
            batch_pairs,
            self.spec.data.shuffle,
        );
        let batch = order.pairs.iter().map(|&pair| &self.train.pairs[pair]);
        let batch = self
            .learner
            .batch(batch.collect(), self.spec.train.micro_batch_tokens);
        let references = self.references.of_train(&order);
        let mismatched = self.references.mismatched_of(&order).map(|references| {
            let pairs = order.pairs.iter().map(|&pair| &self.mismatched.train[pair]);
            let capacity = self.spec.train.micro_batch_tokens;
            Mismatched {
                batch: self.learner.batch(pairs.collect(), capacity),
                references,
            }
        });
        self.learner.times.data += start.elapsed().as_secs_f64();

        let prepared = self.learner.prepare(
            &batch,
            references.as_deref(),
            mismatched.as_ref(),
            &self.spec.objective,
        )?;
        let report = self.report(step, order.epoch, &batch, &prepared);
        self.learner.times = Phases::default();
        let verdict = timed(&mut self.learner.times.wait, || gate.prepared(&report))?;
        if verdict.apply {
            self.learner.apply(prepared.reduced, report.learning_rate)?;
            self.learner.shift = prepared.shift;
        } else {
            self.learner.skip(prepared.reduced);
        }
        self.state = TrainState {
            step,
            epoch: order.epoch,
            updates: self.learner.optimizer.updates(),
            seed: self.spec.seed,
            shift: self.learner.kept_shift(),
        };

        if verdict.save {
            let (reporter, start) = (gate.saved_reporter(), Instant::now());
            let (saver, learner) = (&mut self.saver, &mut self.learner);
            if step == total {
                saver.save_last(learner, self.state, reporter);
            } else {
                saver.save(learner, self.state, reporter)?;
            }
            self.learner.times.checkpoint += start.elapsed().as_secs_f64();
        }
        if verdict.evaluate {
            self.evaluate(gate)?;
        }
        Ok(())
    }

    fn report(&self, step: u64, epoch: u64, batch: &Batch<'_>, prepared: &Prepared) -> StepReport {
        let measures = measure(
            &self.spec.objective,
            &prepared.pairs,
            batch.counts,
            &prepared.statistics,
        );
        let grad_norm = prepared.reduced.norm;
        StepReport {
            step,
            epoch,
            finite: grad_norm.is_finite() && measures.loss.is_finite(),
            grad_norm,
            learning_rate: self.rates.learning_rate(step),
            loss: measures.loss,
            loss_pairwise: measures.loss_pairwise,
            loss_calibration: measures.loss_calibration,
            rewards: measures.rewards,
            tokens: batch.tokens,
            pairs: batch.counts.pairs,
            phases: self.learner.times,
        }
    }

    /// Scores the held-out pairs and reports them; without any it does nothing.
    fn evaluate(&mut self, gate: &mut dyn StepGate) -> Result<(), TrainError> {
        let pairs = held_out(&self.spec, self.eval.as_ref());
        if pairs.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        let capacity = self.spec.train.micro_batch_tokens;
        let batch = self.learner.batch(pairs.iter().collect(), capacity);
        let mismatched = match &self.references {
            Reference::Loaded(values) if !values.mismatched_eval.is_empty() => {
                let pairs = self.mismatched.eval.iter();
                Some(Mismatched {
                    batch: self.learner.batch(pairs.collect(), capacity),
                    references: values.mismatched_eval.clone(),
                })
            }
            _ => None,
        };
        let own = batch.own.len();
        let more = mismatched.as_ref().map_or(0, |it| it.batch.own.len());
        let packs = (own + more) as u64;
        let mut progress = |done: usize| gate.progress("evaluate", done as u64, packs);
        let logps = self.learner.score(&batch, &mut progress)?;
        let scored = self.references.with_eval(pairs, logps);
        let mut progress = |done: usize| progress(own + done);
        let ratios = match &mismatched {
            Some(mismatched) => self.learner.mismatched_ratios(mismatched, &mut progress)?,
            None => Vec::new(),
        };
        let objective = &self.spec.objective;
        let mut shift = self.learner.shift;
        let statistics = BatchStatistics::new(objective, &scored, &ratios, &mut shift);
        let measures = measure(objective, &scored, batch.counts, &statistics);
        let row = EvaluationRow {
            step: self.state.step,
            pairs: batch.counts.pairs,
            loss: measures.loss,
            loss_pairwise: measures.loss_pairwise,
            loss_calibration: measures.loss_calibration,
            rewards: measures.rewards,
        };
        let samples = if self.learner.collective.rank() == 0 {
            let model = &self.learner.model;
            evaluate::samples(model, &self.tokenizer, pairs, &self.spec.evaluate)
        } else {
            Vec::new()
        };
        self.learner.times.evaluate += start.elapsed().as_secs_f64();
        gate.evaluated(&row, &samples)?;
        Ok(())
    }

    /// Once every rank is ready, all values are in the store.
    fn collect_references(&mut self) -> Result<(), TrainError> {
        self.references = match std::mem::replace(&mut self.references, Reference::None) {
            Reference::Stored(references) => {
                let held_out = held_out(&self.spec, self.eval.as_ref());
                let MismatchedPairs { train, eval } = &self.mismatched;
                let lists = [&self.train.pairs, held_out, train, eval];
                let [train, eval, mismatched_train, mismatched_eval] = references.collect(lists)?;
                Reference::Loaded(Box::new(Values {
                    train,
                    eval,
                    mismatched_train,
                    mismatched_eval,
                }))
            }
            other => other,
        };
        Ok(())
    }
}

impl Reference {
    /// Values of a step's pairs, by slot; `None` for an objective without a reference.
    fn of_train(&self, order: &StepPairs) -> Option<Vec<[f64; 2]>> {
        match self {
            Self::Loaded(values) => {
                let train = &values.train;
                Some(order.pairs.iter().map(|&pair| train[pair]).collect())
            }
            _ => None,
        }
    }

    /// Values of the mismatched completions of a step's pairs, by slot; `None` for an objective that reads none.
    fn mismatched_of(&self, order: &StepPairs) -> Option<Vec<[f64; 2]>> {
        match self {
            Self::Loaded(values) if !values.mismatched_train.is_empty() => {
                let all = &values.mismatched_train;
                Some(order.pairs.iter().map(|&pair| all[pair]).collect())
            }
            _ => None,
        }
    }

    /// The held-out pairs' log-probs beside the reference's.
    fn with_eval(&self, pairs: &[Pair], logps: Vec<[f64; 2]>) -> Vec<PairLogps> {
        let eval = match self {
            Self::Loaded(values) => Some(&values.eval),
            _ => None,
        };
        let scored = pairs.iter().zip(logps).enumerate();
        scored
            .map(|(index, (pair, logps))| pair_logps(pair, logps, eval.map(|eval| eval[index])))
            .collect()
    }
}
