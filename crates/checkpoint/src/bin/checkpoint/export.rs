//! `checkpoint export`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use checkpoint::{Checkpoint, ExportDtype, ExportSummary, SOURCE};

use crate::{print::print, progress::Progress, target::resolve};

/// What to export, and how.
#[derive(clap::Args)]
pub struct ExportArgs {
    /// A checkpoint, or a directory of checkpoints.
    dir: PathBuf,
    /// The model directory that the run began with: config, tokenizer and generation files come from there. By default what the run
    /// has kept of it beside its checkpoints.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Write the adapter by itself, in PEFT's format.
    #[arg(long, conflicts_with_all = ["model", "dtype", "max_shard_size"])]
    adapter: bool,
    /// The directory to write.
    #[arg(long)]
    out: PathBuf,
    /// Element type of the weights.
    #[arg(long, value_enum, default_value = "source")]
    dtype: ExportDtype,
    /// Most bytes of tensors in one file, such as 5GB, 500MB or 2GiB; more are written as shards with an index.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    max_shard_size: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub fn export(args: &ExportArgs) -> Result<u8> {
    let checkpoint = resolve(&args.dir)?;
    let summary = write(args, &checkpoint);
    let summary = summary
        .with_context(|| format!("export {} to {}", args.dir.display(), args.out.display()))?;
    print_export(&summary, args.json)
}

fn write(args: &ExportArgs, checkpoint: &Path) -> Result<ExportSummary> {
    if args.adapter {
        return Ok(checkpoint::export_adapter(checkpoint, &args.out)?);
    }
    let kept = checkpoint.with_file_name(SOURCE);
    let model = args.model.as_ref().unwrap_or(&kept);
    ensure!(
        args.model.is_some() || kept.is_dir(),
        "{} is not there, which a run keeps of its model: name that by --model",
        kept.display()
    );
    let manifest = Checkpoint::open(checkpoint)?.manifest().clone();
    let elements = manifest
        .tensors
        .iter()
        .filter_map(checkpoint::TensorSpec::elements);
    let progress = Progress::new("export", 4 * elements.sum::<usize>() as u64);
    let watch = |bytes| progress.add(bytes);
    let (out, size) = (&args.out, args.max_shard_size);
    Ok(checkpoint::export_watched(
        checkpoint, model, out, args.dtype, size, &watch,
    )?)
}

fn print_export(summary: &ExportSummary, json: bool) -> Result<u8> {
    if json {
        return print(&serde_json::to_string(summary)?);
    }
    let files = match &summary.weights[..] {
        [one] => one.clone(),
        many => format!("{} shards", many.len()),
    };
    print(&format!(
        "{}: step {}, {} tensors, {} parameters, {} bytes in {files}; with config.json {}",
        summary.path.display(),
        summary.step,
        summary.tensors,
        summary.parameters,
        summary.bytes,
        summary.copied.join(" "),
    ))
}

/// Bytes as people and transformers write them: a whole number with a unit or without.
fn parse_size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 7] = [
        ("", 1),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("KIB", 1 << 10),
        ("MIB", 1 << 20),
        ("GIB", 1 << 30),
    ];
    let end = text.find(|it: char| !it.is_ascii_digit());
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let unit = unit.trim().to_uppercase();
    let unit = UNITS.iter().find(|(name, _)| *name == unit);
    let size = number.parse::<u64>().ok().zip(unit);
    size.and_then(|(number, (_, unit))| number.checked_mul(*unit))
        .filter(|&bytes| bytes > 0)
        .ok_or_else(|| "expected a size above 0, such as 5GB, 500MB or 2GiB".into())
}
