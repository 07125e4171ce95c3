//! A world of ranks in threads, each driven by a script instead of a coordinator.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use checkpoint::{Checkpoint, Kind, ManifestInfo, RankFile};
use collective::{Collective, tcp::Rendezvous};
use model::Device;
use spec::Spec;
use trainer::plan::Peers;
use trainer::{
    Cause, End, EvaluationRow, GateClosed, Membership, Next, ReferenceCounts, Sample,
    SavedReporter, SavedShard, Setup, Sharding, StepGate, StepReport, TrainError, Trainer, Verdict,
};

const PATIENCE: Duration = Duration::from_mins(1);

/// What to ask of every rank.
#[derive(Clone, Default)]
pub struct Script {
    pub checkpoints: PathBuf,
    pub resume: Option<PathBuf>,
    /// Leave after this step instead of at the end.
    pub stop_after: Option<u64>,
    /// Save after every step.
    pub save: bool,
    /// Evaluate before the first step and after every step.
    pub evaluate: bool,
    /// How the ranks share out what training keeps.
    pub sharding: Sharding,
    /// Compute threads of every rank; by default those of the process.
    pub threads: Option<usize>,
}

/// What the ranks said.
pub struct Run {
    /// One report per step; all ranks' are checked to be equal to the bit.
    pub reports: Vec<StepReport>,
    /// As rank 0 reported them.
    pub evaluations: Vec<(EvaluationRow, Vec<Sample>)>,
    /// By rank.
    pub counts: Vec<ReferenceCounts>,
    pub ends: Vec<End>,
    /// Committed checkpoints by step.
    pub checkpoints: BTreeMap<u64, PathBuf>,
    /// Why saves were not written.
    pub failed_saves: Vec<String>,
}

/// Runs `spec` with `world` ranks to the end of `script`.
///
/// # Panics
/// If any rank fails or two ranks report different bits.
pub fn run(spec: &Spec, world: usize, script: &Script) -> Run {
    let results = try_run(spec, world, script);
    results.unwrap_or_else(|error| panic!("{error} ({:?})", error.cause()))
}

/// As [`run`], giving the first error that is not the consequence of another rank's.
pub fn try_run(spec: &Spec, world: usize, script: &Script) -> Result<Run, TrainError> {
    let shared = Arc::new(Shared {
        barrier: Barrier::new(world),
        saved: Mutex::default(),
    });
    let doors: Vec<Rendezvous> = (0..world)
        .map(|_| Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap())
        .collect();
    let addresses: Vec<String> = doors.iter().map(Rendezvous::address).collect();
    let ranks: Vec<Result<Rank, TrainError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = doors
            .into_iter()
            .enumerate()
            .map(|(rank, door)| {
                let (shared, addresses) = (Arc::clone(&shared), &addresses);
                scope.spawn(move || {
                    let collective: Box<dyn Collective> = if world == 1 {
                        Box::new(collective::single(1))
                    } else {
                        let deadline = Instant::now() + PATIENCE;
                        Box::new(door.connect(rank, addresses, 1, [9; 32], deadline).unwrap())
                    };
                    let rank = || run_rank(spec, script, collective, shared);
                    match script.threads {
                        None => rank(),
                        Some(threads) => {
                            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                            pool.build().unwrap().install(rank)
                        }
                    }
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut errors: Vec<TrainError> = Vec::new();
    let mut done = Vec::new();
    for rank in ranks {
        match rank {
            Ok(rank) => done.push(rank),
            Err(error) => errors.push(error),
        }
    }
    errors.sort_by_key(|error| error.cause() == Cause::Temporary);
    if let Some(error) = errors.into_iter().next() {
        return Err(error);
    }
    let first: Vec<_> = done[0].reports.iter().map(StepReport::bits).collect();
    for rank in &done {
        let bits: Vec<_> = rank.reports.iter().map(StepReport::bits).collect();
        assert_eq!(bits, first, "ranks report different bits");
    }
    let saved = std::mem::take(&mut *shared.saved.lock().unwrap());
    let (checkpoints, failed_saves) = commit(script, world, saved, &done[0].info);
    Ok(Run {
        counts: done.iter().map(|rank| rank.counts).collect(),
        ends: done.iter().map(|rank| rank.end).collect(),
        evaluations: done[0].evaluations.clone(),
        reports: done.swap_remove(0).reports,
        checkpoints,
        failed_saves,
    })
}

struct Shared {
    /// Every rank is ready before the first `next` returns.
    barrier: Barrier,
    saved: Mutex<Vec<SavedShard>>,
}

struct Rank {
    reports: Vec<StepReport>,
    evaluations: Vec<(EvaluationRow, Vec<Sample>)>,
    counts: ReferenceCounts,
    end: End,
    info: ManifestInfo,
}

fn run_rank(
    spec: &Spec,
    script: &Script,
    collective: Box<dyn Collective>,
    shared: Arc<Shared>,
) -> Result<Rank, TrainError> {
    let setup = Setup::load(spec, &Device::flex(), Peers::NONE, &mut |_, _, _| Ok(()))?;
    let facts = setup.facts();
    let membership = Membership {
        collective,
        step_deadline: PATIENCE,
        checkpoints: script.checkpoints.clone(),
        resume: script.resume.clone(),
        generation: 1,
        sharding: script.sharding,
        pulse: Arc::default(),
    };
    let (trainer, counts) = Trainer::new(setup, membership, &mut |_, _, _| Ok(()))?;
    let mut gate = Scripted {
        script: script.clone(),
        shared,
        ready: false,
        asked_evaluation: false,
        committed: trainer.committed(),
        last: script.stop_after.unwrap_or(facts.steps_total),
        stops: script.stop_after.is_some(),
        reports: Vec::new(),
        evaluations: Vec::new(),
    };
    let end = trainer.run(&mut gate)?;
    let info = ManifestInfo {
        model_digest: facts.model_digest,
        tokenizer_digest: facts.tokenizer_digest,
        data_digest: facts.data_digest,
        run_digest: "test".into(),
        tool_version: "test".into(),
    };
    Ok(Rank {
        reports: gate.reports,
        evaluations: gate.evaluations,
        counts,
        end,
        info,
    })
}

struct Scripted {
    script: Script,
    shared: Arc<Shared>,
    ready: bool,
    asked_evaluation: bool,
    committed: u64,
    last: u64,
    stops: bool,
    reports: Vec<StepReport>,
    evaluations: Vec<(EvaluationRow, Vec<Sample>)>,
}

impl StepGate for Scripted {
    fn next(&mut self) -> Result<Next, GateClosed> {
        if !self.ready {
            self.shared.barrier.wait();
            self.ready = true;
        }
        if self.script.evaluate && self.committed == 0 && !self.asked_evaluation {
            self.asked_evaluation = true;
            return Ok(Next::Evaluate);
        }
        Ok(match self.committed < self.last {
            true => Next::Step(self.committed + 1),
            false if self.stops => Next::Stop,
            false => Next::Finish,
        })
    }

    fn prepared(&mut self, report: &StepReport) -> Result<Verdict, GateClosed> {
        assert_eq!(report.step, self.committed + 1);
        self.committed = report.step;
        self.reports.push(report.clone());
        Ok(Verdict {
            apply: report.finite,
            save: self.script.save,
            evaluate: self.script.evaluate,
            last: self.committed == self.last,
        })
    }

    fn evaluated(&mut self, row: &EvaluationRow, samples: &[Sample]) -> Result<(), GateClosed> {
        self.evaluations.push((row.clone(), samples.to_vec()));
        Ok(())
    }

    fn saved_reporter(&mut self) -> SavedReporter {
        let shared = Arc::clone(&self.shared);
        Box::new(move |saved| shared.saved.lock().unwrap().push(saved))
    }

    fn progress(&mut self, _phase: &str, done: u64, total: u64) {
        assert!(done <= total);
    }
}

fn commit(
    script: &Script,
    world: usize,
    saved: Vec<SavedShard>,
    info: &ManifestInfo,
) -> (BTreeMap<u64, PathBuf>, Vec<String>) {
    let mut failed = Vec::new();
    let mut steps: BTreeMap<u64, Vec<RankFile>> = BTreeMap::new();
    for shard in saved {
        match shard.file {
            Ok(file) => {
                let file = serde_json::from_str(&file).unwrap();
                steps.entry(shard.step).or_default().push(file);
            }
            Err(reason) => failed.push(reason),
        }
    }
    let mut committed = BTreeMap::new();
    for (step, files) in steps {
        assert_eq!(files.len(), world, "files of step {step}");
        let done = checkpoint::commit(&script.checkpoints, &files, info).unwrap();
        committed.insert(step, done.path);
    }
    (committed, failed)
}

/// All weights and moments of a checkpoint, as bits in its tensors' order.
pub fn state_bits(checkpoint: &Checkpoint) -> Vec<u32> {
    let mut bits = Vec::new();
    for tensor in &checkpoint.manifest().tensors {
        for kind in Kind::ALL {
            let mut values = vec![0.0; tensor.elements().unwrap()];
            checkpoint.read(&tensor.name, kind, 0, &mut values).unwrap();
            bits.extend(values.iter().map(|value| value.to_bits()));
        }
    }
    bits
}
