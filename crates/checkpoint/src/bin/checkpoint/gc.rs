//! `checkpoint gc`: the retention of the library, by hand.

use std::path::PathBuf;

use anyhow::{Context, Result};
use checkpoint::{Fate, Planned, Retention};
use serde_json::json;

use crate::{
    Usage,
    print::{bytes, print},
    progress::Progress,
    target::{beside, is_one, lock},
};

mod best;

use best::{Better, Ranking};

/// What stays.
#[derive(clap::Args)]
pub struct GcArgs {
    /// A directory of checkpoints.
    dir: PathBuf,
    /// Keep the newest so many; without this option no complete checkpoint goes.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    keep_last: Option<u64>,
    /// Keep those of steps that are a multiple of this.
    #[arg(long, value_name = "STEPS", requires = "keep_last", value_parser = clap::value_parser!(u64).range(1..))]
    keep_every: Option<u64>,
    /// Keep the best by this metric of the run's evaluations, such as rewards/accuracies, and those after the last evaluation.
    #[arg(long, value_name = "METRIC", requires = "keep_last")]
    keep_best: Option<String>,
    /// Which values are better; by default lower ones of a loss and higher ones of rewards/chosen, margins and accuracies.
    #[arg(long, value_enum, requires = "keep_best")]
    better: Option<Better>,
    /// The run's evaluations. Default: eval.jsonl beside DIR.
    #[arg(long, value_name = "FILE", requires = "keep_best")]
    evaluations: Option<PathBuf>,
    /// Also remove unfinished saves that nothing newer follows. For when no run is writing there.
    #[arg(long)]
    unfinished: bool,
    /// Say what would go and remove nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub fn gc(args: &GcArgs) -> Result<u8> {
    let dir = &args.dir;
    if is_one(dir) || !(storage::is_remote(dir) || dir.is_dir()) {
        let reason =
            "is not a directory of checkpoints; name the one that holds the step-… folders";
        return Err(Usage(format!("{} {reason}", dir.display())).into());
    }
    let _lock = if args.dry_run { None } else { lock(dir)? };
    let ranking = match &args.keep_best {
        Some(metric) => {
            let file = args.evaluations.clone();
            let file = file.unwrap_or_else(|| beside(dir).join("eval.jsonl"));
            best::rank(&file, metric, args.better)?
        }
        None => Ranking::default(),
    };
    let retention = Retention {
        keep_last: args.keep_last.map_or(usize::MAX, |count| count as usize),
        keep_every_steps: args.keep_every.unwrap_or(0),
        best_first: &ranking.best_first,
        since: ranking.since,
        idle: args.unfinished,
    };
    let progress = Progress::new("verify the newest", 0);
    let plan = checkpoint::plan(dir, retention, &|bytes| progress.add(bytes))?;
    drop(progress);
    let removed = if args.dry_run {
        Vec::new()
    } else {
        checkpoint::apply(dir, &plan)
            .with_context(|| format!("clear away below {}", dir.display()))?
    };
    if args.json {
        let all = json!({ "dry_run": args.dry_run, "folders": plan, "removed": removed });
        return print(&all.to_string());
    }
    for planned in &plan {
        print(&line(planned))?;
        for leftover in &planned.leftovers {
            print(&format!("    {leftover} goes: a save that was cut short"))?;
        }
    }
    let freed = plan.iter().filter(|it| it.fate.goes());
    let freed: u64 = freed.map(|it| it.bytes).sum();
    let (count, verb) = if args.dry_run {
        let going = plan.iter().filter(|it| it.fate.goes());
        (going.count(), "would be removed")
    } else {
        (removed.len(), "removed")
    };
    print(&format!(
        "{count} of {} {verb}, {}",
        plan.len(),
        bytes(freed)
    ))
}

fn line(planned: &Planned) -> String {
    let why = match planned.fate {
        Fate::Newest => "stays: the newest",
        Fate::Last => "stays: one of the last",
        Fate::Pinned => "stays: pinned",
        Fate::Best => "stays: the best",
        Fate::Every => "stays: every so many steps",
        Fate::Undecided => "stays: not evaluated yet",
        Fate::Damaged => "stays: damaged; see `checkpoint verify`",
        Fate::Unfinished => "stays: unfinished, maybe being saved; --unfinished removes it",
        Fate::Old => "goes: nothing keeps it",
        Fate::Remains => "goes: a save that was cut short",
    };
    let name = planned
        .path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    let size = bytes(planned.bytes);
    format!("{name}  {size:>10}  {why}")
}
