//! The training loop of one rank. It reads from top to bottom: what next, prepare, ask, apply or drop, save, evaluate.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint::TrainState;
use collective::Collective;
use data::{Dataset, Pair, Place, StepPairs, Tokenizer, step_pairs};
use model::Device;
use objective::{BatchStatistics, PairLogps, RunningMean};
use spec::{Schedule, Spec};

use crate::batch::Batch;
use crate::error::TrainError;
use crate::evaluate;
use crate::gate::{EvaluationRow, Next, Reformation, StepGate, StepReport};
use crate::learner::{Holding, Learner, Mismatched, Prepared};
use crate::measure::{measure, pair_logps};
use crate::phases::{Phases, timed};
use crate::process::peak_bytes;
use crate::pulse::{Pulse, Work};
use crate::reference::{ReferenceCounts, References};
use crate::reform::{Held, Past};
use crate::setup::{Facts, MismatchedPairs, Progress, Setup, held_out};
use crate::shards::{Reduced, ShardedOptimizer, Sharding};
use crate::snapshot::{Destination, Saver, restore};
use crate::utilization::{mfu, needed, peak_of};
use crate::warm_up::tell_kernels;

/// Most rows that a warning names.
const NAMED_MAX: usize = 8;

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
    /// Where its work shows. The same for all generations of a run.
    pub pulse: Arc<Pulse>,
    /// How ranks share out what training keeps.
    pub sharding: Sharding,
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
    facts: Facts,
    /// Whose shards the learner has.
    cut: Cut,
    /// The generation before and its shards, until all ranks have entered the present one.
    before: Option<(Cut, ShardedOptimizer)>,
    /// A prepared step whose verdict this rank has not heard.
    undecided: Option<Undecided>,
}

/// A rank's place in the generation that cut its shards.
#[derive(Clone, Copy)]
struct Cut {
    generation: u64,
    rank: usize,
    world: usize,
}

/// A step between its preparation and its verdict.
struct Undecided {
    step: u64,
    epoch: u64,
    learning_rate: f64,
    reduced: Reduced,
    shift: RunningMean,
}

/// For whoever compares it with what was planned: of a GPU what its arena had in use, without what the driver and NCCL took beside it.
fn tell_memory(device: &Device) {
    let mib = |bytes: u64| bytes >> 20;
    tracing::info!(
        peak_memory_mib = peak_bytes().map(mib),
        gpu_peak_memory_mib = device.peak_bytes().map(|bytes| mib(bytes as u64)),
        "done"
    );
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
        let mut learner = Learner::new(
            model,
            spec.optimizer,
            collective,
            membership.sharding,
            membership.step_deadline,
            membership.pulse,
        );
        if learner.model.device().is_gpu() {
            progress("make kernels ready", 0, 1)?;
            learner.warm_up(&train.pairs);
            progress("make kernels ready", 1, 1)?;
            tell_kernels(learner.model.device());
        }
        let state = match &membership.resume {
            Some(path) => {
                progress("load checkpoint", 0, 1)?;
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
        let generation = membership.generation;
        let saver = Saver::new(Destination {
            checkpoints: membership.checkpoints,
            generation,
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
            facts,
            cut: Cut {
                generation,
                rank,
                world,
            },
            before: None,
            undecided: None,
        };
        Ok((trainer, counts))
    }

    /// As [`Trainer::new`] for a rank that comes to a run which others have begun: what it lacks, they send.
    ///
    /// # Errors
    /// Also a peer that is lost meanwhile.
    pub fn join(
        setup: Setup,
        reformation: Reformation,
        progress: Progress<'_>,
    ) -> Result<(Self, ReferenceCounts), TrainError> {
        let Reformation {
            membership,
            committed,
            past,
            ..
        } = reformation;
        let (mut trainer, counts) = Self::new(setup, membership, progress)?;
        if let Some(past) = past {
            trainer.receive(&past, None, committed)?;
        }
        Ok((trainer, counts))
    }

    /// The last committed step that this state holds.
    pub fn committed(&self) -> u64 {
        self.state.step
    }

    /// Trains as `gate` says, until it says that this is the end.
    ///
    /// # Errors
    /// A lost peer or control side, where the gate knows of no next generation; the state of the last checkpoint is what
    /// remains then.
    pub fn run(mut self, gate: &mut dyn StepGate) -> Result<End, TrainError> {
        loop {
            match self.proceed(gate) {
                Ok(None) => (),
                Ok(Some(end)) => return Ok(end),
                Err(error) => self.recover(error, gate)?,
            }
        }
    }

    /// Does the next thing.
    fn proceed(&mut self, gate: &mut dyn StepGate) -> Result<Option<End>, TrainError> {
        self.learner.pulse.about(0);
        self.learner.pulse.turn_to(Work::Waits);
        let next = timed(&mut self.learner.times.wait, || gate.next())?;
        self.learner.pulse.turn_to(Work::Untold);
        // Every rank has entered the generation: nobody will ask for the shards of the one before.
        self.before = None;
        self.collect_references()?;
        match next {
            Next::Evaluate => self.evaluate(gate)?,
            Next::Step(step) => self.step(step, gate)?,
            Next::Save { last } => self.save(last, gate)?,
            Next::Finish => {
                self.saver.finish();
                // The job is done, whatever becomes of the group.
                if let Err(error) = self.learner.leave() {
                    tracing::debug!("the ranks did not leave together: {error}");
                }
                tell_memory(self.learner.model.device());
                return Ok(Some(End::Finished));
            }
            Next::Stop => {
                self.saver.finish();
                return Ok(Some(End::Stopped));
            }
        }
        Ok(None)
    }

    /// Enters the generation that follows an interruption, or the one after that if entering is interrupted too.
    fn recover(
        &mut self,
        mut error: TrainError,
        gate: &mut dyn StepGate,
    ) -> Result<(), TrainError> {
        while let TrainError::Collective(_) | TrainError::Closed(_) = &error {
            // Whoever still waits for this rank shall not.
            drop(self.learner.disband());
            let Some(reformation) = gate.reform(&error, &self.held())? else {
                break;
            };
            tracing::info!(
                generation = reformation.membership.generation,
                committed = reformation.committed,
                "forming anew after: {error}"
            );
            match self.reform(reformation) {
                Ok(()) => match gate.reformed(self.state.step) {
                    Ok(()) => return Ok(()),
                    Err(closed) => error = closed.into(),
                },
                Err(interrupted) => error = interrupted,
            }
        }
        Err(error)
    }

    /// What this rank can bring to a next generation, the newest first.
    fn held(&self) -> Vec<Held> {
        let held = |cut: Cut, gradient: bool| Held {
            generation: cut.generation,
            rank: cut.rank,
            world: cut.world,
            applied: self.state.step,
            gradient,
        };
        let before = self.before.iter().map(|(cut, _)| held(*cut, false));
        let present = held(self.cut, self.undecided.is_some());
        std::iter::once(present).chain(before).collect()
    }

    /// Enters another generation.
    fn reform(&mut self, reformation: Reformation) -> Result<(), TrainError> {
        let Reformation {
            membership,
            committed,
            apply,
            past,
        } = reformation;
        self.settle(committed, apply);
        let cut = Cut {
            generation: membership.generation,
            rank: membership.collective.rank(),
            world: membership.collective.world(),
        };
        // A save in flight goes on; nobody waits for its file any more.
        self.saver = Saver::new(Destination {
            checkpoints: membership.checkpoints,
            generation: cut.generation,
            rank: cut.rank as u32,
            world: cut.world as u32,
        });
        self.learner.collective = membership.collective;
        match (past, membership.resume) {
            (Some(past), _) => {
                let held = past.brings(cut.rank).then_some(past.generation);
                self.receive(&past, held, committed)?;
            }
            (None, Some(path)) => {
                self.before = None;
                self.learner.start_over();
                self.state = restore(&mut self.learner, &path, self.spec.seed, &self.facts)?;
            }
            (None, None) => {
                return Err(TrainError::NotHeld {
                    what: "the starting weights".into(),
                });
            }
        }
        self.cut = cut;
        Ok(())
    }

    /// Gets to the committed step if this rank has its gradient, and drops any other.
    fn settle(&mut self, committed: u64, apply: bool) {
        let undecided = self.undecided.take();
        let Some(undecided) = undecided.filter(|it| it.step == committed) else {
            return;
        };
        if apply {
            self.learner.apply_here(
                &undecided.reduced,
                undecided.learning_rate,
                self.cut.world == 1,
            );
            self.learner.shift = undecided.shift;
        }
        self.stand_at(undecided.step, undecided.epoch);
    }

    /// Takes what this rank lacks from the others. `held` is the generation whose shards it brings.
    fn receive(
        &mut self,
        past: &Past,
        held: Option<u64>,
        committed: u64,
    ) -> Result<(), TrainError> {
        let before = self.before.as_ref();
        let before = before.filter(|(cut, _)| Some(cut.generation) == held);
        let is_present = held == Some(self.cut.generation);
        let holding = match (held, before) {
            (None, _) => Holding::Nothing,
            (Some(_), _) if is_present => Holding::Present,
            (Some(_), Some((_, shards))) => Holding::Before(shards),
            (Some(generation), None) => {
                return Err(TrainError::NotHeld {
                    what: format!("shards of generation {generation}"),
                });
            }
        };
        let formed = self.learner.reform(past, holding, self.state, committed);
        let (state, shards) = formed?;
        let present = self.learner.take_up(shards);
        if is_present {
            self.before = Some((self.cut, present));
        }
        // Otherwise the shards before the present ones are still what a next generation may start from.
        self.state = state;
        Ok(())
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
        self.learner.pulse.about(step);
        self.learner.pulse.turn_to(Work::Computes);
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
        let Prepared {
            pairs: scored,
            reduced,
            shift,
            ..
        } = prepared;
        self.learner.pulse.turn_to(Work::Waits);
        let verdict = timed(&mut self.learner.times.wait, || gate.prepared(&report));
        self.learner.pulse.turn_to(Work::Computes);
        let verdict = match verdict {
            Ok(verdict) => verdict,
            Err(closed) => {
                self.undecided = Some(Undecided {
                    step,
                    epoch: order.epoch,
                    learning_rate: report.learning_rate,
                    reduced,
                    shift,
                });
                return Err(closed.into());
            }
        };
        let mut gathered = Ok(());
        if verdict.apply {
            gathered = self.learner.apply(reduced, report.learning_rate);
            self.learner.shift = shift;
        } else {
            if self.learner.collective.rank() == 0 {
                let places = order
                    .pairs
                    .iter()
                    .map(|&pair| &self.train.pairs[pair].place);
                tracing::warn!("step {step} is skipped: {}", not_finite(places, &scored));
            }
            self.learner.skip(reduced);
        }
        // Committed and applied here, whatever became of the gather.
        self.stand_at(step, order.epoch);
        gathered?;
        self.learner.pulse.turn_to(Work::Untold);
        let every = self.spec.train.compare_every_steps;
        if every > 0 && step.is_multiple_of(every) {
            self.learner.compare(step)?;
        }

        if verdict.save {
            self.save(verdict.last, gate)?;
        }
        if verdict.evaluate {
            self.evaluate(gate)?;
        }
        Ok(())
    }

    fn save(&mut self, last: bool, gate: &mut dyn StepGate) -> Result<(), TrainError> {
        let (reporter, start) = (gate.saved_reporter(), Instant::now());
        let (saver, learner) = (&mut self.saver, &self.learner);
        saver.save(learner, self.state, reporter)?;
        if last {
            saver.finish();
        }
        self.learner.times.checkpoint += start.elapsed().as_secs_f64();
        Ok(())
    }

    fn stand_at(&mut self, step: u64, epoch: u64) {
        self.state = TrainState {
            step,
            epoch,
            updates: self.learner.optimizer.updates(),
            seed: self.spec.seed,
            shift: self.learner.kept_shift(),
        };
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
            mfu: peak_of(&self.learner.model).and_then(|peak| {
                let needed = needed(&self.learner.model, batch);
                mfu(needed, peak, &self.learner.times)
            }),
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

/// Why a gradient is not finite, as far as the log-probs of its pairs tell.
fn not_finite<'a>(places: impl Iterator<Item = &'a Place>, scored: &[PairLogps]) -> String {
    let broken = |pair: &PairLogps| {
        let values = [pair.chosen, pair.rejected];
        !values.iter().all(|it| it.is_finite())
    };
    let named = places.zip(scored).filter(|(_, pair)| broken(pair));
    let mut named: Vec<String> = named.map(|(place, _)| place.to_string()).collect();
    let count = named.len();
    if count == 0 {
        return "the log-probs of all its pairs are finite, the gradient is not: the learning rate is too high, or a weight is \
                about to overflow"
            .into();
    }
    named.truncate(NAMED_MAX);
    let of = scored.len();
    format!(
        "{count} of {of} pairs have log-probs that are not finite ({}{}): where it is nearly all of them the weights are broken, \
         which comes of too high a learning rate; otherwise look at these rows",
        named.join(", "),
        if count > NAMED_MAX { ", …" } else { "" }
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_skipped_step_names_the_pairs_that_are_not_finite() {
        let place = |line| Place {
            file: Path::new("pairs.jsonl").into(),
            line,
        };
        let places: Vec<Place> = (1..=20).map(place).collect();
        let said = |broken: &[usize]| {
            let scored = (0..20).map(|pair| PairLogps {
                chosen: -1.0,
                rejected: if broken.contains(&pair) {
                    f64::NAN
                } else {
                    -2.0
                },
                ..PairLogps::default()
            });
            not_finite(places.iter(), &scored.collect::<Vec<_>>())
        };
        let two = said(&[2, 6]);
        assert!(two.starts_with("2 of 20 pairs"), "{two}");
        assert!(two.contains("(pairs.jsonl:3, pairs.jsonl:7)"), "{two}");
        let all = said(&(0..20).collect::<Vec<_>>());
        assert!(all.contains("pairs.jsonl:8, …)"), "{all}");
        assert!(said(&[]).contains("learning rate"));
    }
}
