//! The schedule of worlds that a run went through, gone through again without faults: each stretch of steps by so many ranks, from
//! a checkpoint of the step before it. A run that lost workers and took in others has exactly these bits.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use checkpoint::{ManifestInfo, RankFile};
use collective::{Collective, tcp::Rendezvous};
use model::Device;
use serde_json::Value;
use spec::Spec;
use trainer::plan::Peers;
use trainer::{
    EvaluationRow, GateClosed, Membership, Next, Sample, SavedReporter, SavedShard, Setup,
    Sharding, StepGate, StepReport, Trainer, Verdict,
};

const PATIENCE: Duration = Duration::from_mins(1);

/// Steps by ranks of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Its last step.
    pub last: u64,
    /// Ranks.
    pub world: usize,
}

/// Columns of `metrics.jsonl` that say the bits of a step.
type Bits = Vec<(&'static str, u64)>;

/// Replays the run in `folder` and compares every committed step, bit for bit. Returns the stretches that it went through. Relative
/// paths of its configuration are taken from the working directory.
///
/// # Errors
/// The first step and value that differ.
///
/// # Panics
/// If the folder is not that of a run, or a rank fails.
pub fn replay(folder: &Path) -> Result<Vec<Stretch>, String> {
    let rows = fs::read_to_string(folder.join("metrics.jsonl")).expect("rows of metrics");
    let rows: Vec<Value> = rows
        .lines()
        .map(|line| serde_json::from_str(line).expect("a row is JSON"))
        .collect();
    let config = configuration(&folder.join("config.toml"));
    // Whose shards are mirrored shows in no bit; in what order gradients are added does.
    let sharding = Sharding {
        gradients: config["cluster"]["zero"].as_integer() == Some(2),
        ..Sharding::default()
    };
    let spec = spec_of(config);
    let mut stretches: Vec<Stretch> = Vec::new();
    for row in &rows {
        let step = row["step"].as_u64().expect("a step");
        let world = row["world_size"].as_u64().expect("a world") as usize;
        match stretches.last_mut() {
            Some(stretch) if stretch.world == world => stretch.last = step,
            _ => stretches.push(Stretch { last: step, world }),
        }
    }
    let checkpoints = tempfile::tempdir().expect("a temporary folder");
    let mut resume = None;
    let mut next = 0;
    for stretch in &stretches {
        let checkpoints = checkpoints.path();
        let done = go(&spec, sharding, *stretch, checkpoints, resume.as_deref());
        for report in &done.reports {
            let (found, expected) = (of_row(&rows[next]), of_report(report));
            let differs = found.iter().zip(&expected).find(|(a, b)| a != b);
            if let Some(((name, found), (_, expected))) = differs {
                let [found, expected] = [found, expected].map(|it| f64::from_bits(*it));
                return Err(format!(
                    "step {}, world of {}: {name} is {found:?} in the run and {expected:?} without faults",
                    report.step, stretch.world
                ));
            }
            next += 1;
        }
        if let Some(before) = resume.replace(done.checkpoint) {
            fs::remove_dir_all(before).expect("remove a checkpoint");
        }
    }
    if next != rows.len() {
        return Err(format!("{next} steps of {}", rows.len()));
    }
    Ok(stretches)
}

/// A run's configuration.
fn configuration(path: &Path) -> toml::Table {
    let text = fs::read_to_string(path).expect("a configuration");
    text.parse().expect("TOML")
}

/// The training sections of it.
fn spec_of(mut config: toml::Table) -> Spec {
    let seed = config["job"]["seed"].clone();
    config.retain(|name, _| spec::SECTIONS.contains(&name));
    let train = config.get_mut("train").and_then(|it| it.as_table_mut());
    train.expect("[train]").remove("skipped_steps_max");
    config.insert(
        "job".into(),
        toml::Table::from_iter([("seed".into(), seed)]).into(),
    );
    spec::parse(&config.to_string()).expect("a run's configuration")
}

fn of_row(row: &Value) -> Bits {
    let float = |name: &'static str| {
        let value = row[name].as_f64().unwrap_or(f64::NAN);
        (name, value.to_bits())
    };
    COLUMNS.map(float).to_vec()
}

const COLUMNS: [&str; 12] = [
    "step",
    "loss",
    "loss/pairwise",
    "loss/calibration",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "tokens",
];

fn of_report(it: &StepReport) -> Bits {
    let rewards = &it.rewards;
    let values = [
        it.step as f64,
        it.loss,
        it.loss_pairwise,
        it.loss_calibration,
        it.grad_norm,
        it.learning_rate,
        rewards.rewards_chosen,
        rewards.rewards_rejected,
        rewards.rewards_accuracies,
        rewards.logps_chosen,
        rewards.logps_rejected,
        it.tokens as f64,
    ];
    let named = COLUMNS.into_iter().zip(values);
    named.map(|(name, value)| (name, value.to_bits())).collect()
}

struct Done {
    reports: Vec<StepReport>,
    checkpoint: PathBuf,
}

/// One stretch, saved after its last step.
fn go(
    spec: &Spec,
    sharding: Sharding,
    stretch: Stretch,
    checkpoints: &Path,
    resume: Option<&Path>,
) -> Done {
    let world = stretch.world;
    let (barrier, saved) = (Arc::new(Barrier::new(world)), Arc::default());
    let doors: Vec<Rendezvous> = (0..world)
        .map(|_| Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).expect("a port"))
        .collect();
    let addresses: Vec<String> = doors.iter().map(Rendezvous::address).collect();
    let ranks: Vec<(Vec<StepReport>, ManifestInfo)> = std::thread::scope(|scope| {
        let ranks = doors.into_iter().enumerate().map(|(rank, door)| {
            let (barrier, saved) = (Arc::clone(&barrier), Arc::clone(&saved));
            let addresses = &addresses;
            scope.spawn(move || {
                let collective: Box<dyn Collective> = if world == 1 {
                    Box::new(collective::single(1))
                } else {
                    let deadline = Instant::now() + PATIENCE;
                    let tcp = door.connect(rank, addresses, 1, [5; 32], deadline);
                    Box::new(tcp.expect("peers"))
                };
                let membership = Membership {
                    collective,
                    step_deadline: PATIENCE,
                    checkpoints: checkpoints.to_owned(),
                    resume: resume.map(Path::to_owned),
                    generation: 1,
                    sharding,
                    pulse: Arc::default(),
                };
                let rank = Rank {
                    barrier,
                    saved,
                    last: stretch.last,
                    committed: 0,
                    ready: false,
                    reports: Vec::new(),
                };
                rank.train(spec, membership)
            })
        });
        let ranks: Vec<_> = ranks.collect();
        let ranks = ranks.into_iter();
        ranks.map(|it| it.join().expect("a rank")).collect()
    });
    let (reports, info) = ranks.into_iter().next().expect("a rank");
    let saved: Vec<SavedShard> = std::mem::take(&mut *saved.lock().expect("saved files"));
    let files: Vec<RankFile> = saved
        .into_iter()
        .map(|it| serde_json::from_str(&it.file.expect("a file")).expect("a file's entry"))
        .collect();
    let committed = checkpoint::commit(checkpoints, &files, &info).expect("a checkpoint");
    Done {
        reports,
        checkpoint: committed.path,
    }
}

/// A rank that goes to the end of its stretch without a coordinator.
struct Rank {
    barrier: Arc<Barrier>,
    saved: Arc<Mutex<Vec<SavedShard>>>,
    last: u64,
    committed: u64,
    ready: bool,
    reports: Vec<StepReport>,
}

impl Rank {
    fn train(mut self, spec: &Spec, membership: Membership) -> (Vec<StepReport>, ManifestInfo) {
        let setup = Setup::load(spec, &Device::flex(), Peers::NONE, &mut |_, _, _| Ok(()));
        let setup = setup.expect("model and data");
        let facts = setup.facts();
        let trainer = Trainer::new(setup, membership, &mut |_, _, _| Ok(()));
        let (trainer, _) = trainer.expect("a trainer");
        self.committed = trainer.committed();
        trainer.run(&mut self).expect("a run");
        let info = ManifestInfo {
            model_digest: facts.model_digest,
            tokenizer_digest: facts.tokenizer_digest,
            data_digest: facts.data_digest,
            run_digest: "replay".into(),
            tool_version: "replay".into(),
        };
        (self.reports, info)
    }
}

impl StepGate for Rank {
    fn next(&mut self) -> Result<Next, GateClosed> {
        if !std::mem::replace(&mut self.ready, true) {
            self.barrier.wait();
        }
        Ok(if self.committed < self.last {
            Next::Step(self.committed + 1)
        } else {
            Next::Stop
        })
    }

    fn prepared(&mut self, report: &StepReport) -> Result<Verdict, GateClosed> {
        self.committed = report.step;
        self.reports.push(report.clone());
        let last = self.committed == self.last;
        Ok(Verdict {
            apply: report.finite,
            save: last,
            evaluate: false,
            last,
        })
    }

    fn evaluated(&mut self, _row: &EvaluationRow, _samples: &[Sample]) -> Result<(), GateClosed> {
        Ok(())
    }

    fn saved_reporter(&mut self) -> SavedReporter {
        let saved = Arc::clone(&self.saved);
        Box::new(move |shard| saved.lock().expect("saved files").push(shard))
    }

    fn progress(&mut self, _phase: &str, _done: u64, _total: u64) {}
}
