//! `checkpoint`: look into, verify and export training checkpoints, without the ML stack.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    panic,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use checkpoint::{
    Checkpoint, CheckpointError, Damage, ExportDtype, ExportError, ExportSummary, MANIFEST, newest,
};
use clap::{Parser, Subcommand};
use serde::Serialize;
use serde_json::json;

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;

/// Look into, verify and export training checkpoints.
///
/// DIR is a checkpoint's folder such as step-00000100, or a directory of such folders, which stands for the newest one that
/// verifies. Exit codes: 0 done, 1 damaged or failed, 2 bad usage or no checkpoint there.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print what a checkpoint holds.
    Inspect {
        /// A checkpoint, or a directory of checkpoints.
        dir: PathBuf,
        /// List the tensors too.
        #[arg(long)]
        tensors: bool,
        /// Print the manifest as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read every byte and compare it with the manifest; name file, tensor and offset of what differs.
    ///
    /// Of a directory: from the newest checkpoint back to the first that holds.
    Verify {
        /// A checkpoint, or a directory of checkpoints.
        dir: PathBuf,
        /// Print the result as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write the weights as a Hugging Face model directory, those of an adapter merged into the model's; or an adapter by itself.
    Export {
        /// A checkpoint, or a directory of checkpoints.
        dir: PathBuf,
        /// The model directory that the run began with: config, tokenizer and generation files come from there.
        #[arg(long, required_unless_present = "adapter")]
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
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    // A panic has told its story on stderr; its code is that of any other failure.
    let code = match panic::catch_unwind(|| run(args.command)) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            eprintln!("error: {error:#}");
            code_of(&error)
        }
        Err(_) => FAILED,
    };
    ExitCode::from(code)
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Inspect { dir, tensors, json } => inspect(&resolve(&dir)?, tensors, json),
        Command::Verify { dir, json } => verify(&dir, json),
        Command::Export {
            dir,
            model,
            adapter: _,
            out,
            dtype,
            max_shard_size,
            json,
        } => {
            let checkpoint = resolve(&dir)?;
            let summary = match model {
                Some(model) => checkpoint::export(&checkpoint, &model, &out, dtype, max_shard_size),
                None => checkpoint::export_adapter(&checkpoint, &out),
            };
            let summary = summary
                .with_context(|| format!("export {} to {}", dir.display(), out.display()))?;
            print_export(&summary, json)
        }
    }
}

fn inspect(path: &Path, tensors: bool, json: bool) -> Result<u8> {
    let checkpoint = Checkpoint::open(path)?;
    let manifest = checkpoint.manifest();
    let elements = |spec: &checkpoint::TensorSpec| spec.elements().unwrap_or(0);
    let parameters: usize = manifest.tensors.iter().map(elements).sum();
    let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    if json {
        let all =
            json!({ "path": path, "parameters": parameters, "bytes": bytes, "manifest": manifest });
        return print(&all.to_string());
    }
    let (state, info) = (manifest.state, &manifest.info);
    let mut text = format!(
        "{}\n\
         step         {} (epoch {}, {} updates, seed {})\n\
         written by   generation {}, {} ranks, version {}, format {}\n\
         model        {}\n\
         tokenizer    {}\n\
         data         {}\n\
         run          {}\n\
         tensors      {} with {parameters} parameters and their moments\n\
         files        {} with {bytes} bytes\n",
        path.display(),
        state.step,
        state.epoch,
        state.updates,
        state.seed,
        manifest.generation,
        manifest.world,
        info.tool_version,
        manifest.version,
        info.model_digest,
        info.tokenizer_digest,
        info.data_digest,
        info.run_digest,
        manifest.tensors.len(),
        manifest.files.len(),
    );
    for file in &manifest.files {
        let (name, bytes, pieces) = (&file.name, file.bytes, file.pieces.len());
        writeln!(text, "  {name}  {bytes} bytes, {pieces} pieces")?;
    }
    if tensors {
        for spec in &manifest.tensors {
            writeln!(text, "  {} {:?}", spec.name, spec.shape)?;
        }
    }
    print(text.trim_end())
}

/// What `verify` has to tell.
#[derive(Default, Serialize)]
struct Outcome {
    ok: bool,
    /// The checkpoint that holds.
    path: Option<PathBuf>,
    /// Files in its folder that are no part of it.
    unlisted: Vec<String>,
    /// Where files differ.
    damages: Vec<Damage>,
    /// Checkpoints that do not hold, and why.
    refused: Vec<Refused>,
}

#[derive(Serialize)]
struct Refused {
    path: PathBuf,
    reason: String,
}

fn verify(dir: &Path, json: bool) -> Result<u8> {
    let outcome = if is_one(dir) {
        verify_one(dir)?
    } else {
        verify_newest(dir)?
    };
    if json {
        print(&serde_json::to_string(&outcome)?)?;
    } else {
        for damage in &outcome.damages {
            eprintln!("damaged: {damage}");
        }
        for refused in &outcome.refused {
            eprintln!("error: {}", refused.reason);
        }
        if let Some(path) = &outcome.path {
            print(&format!("{}: every byte verified", path.display()))?;
        }
        for name in &outcome.unlisted {
            print(&format!("note: {name} is no part of the checkpoint"))?;
        }
    }
    Ok(if outcome.ok { DONE } else { FAILED })
}

fn verify_one(path: &Path) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    match Checkpoint::open(path).and_then(|checkpoint| checkpoint.verify()) {
        Ok(verified) => {
            outcome.ok = true;
            outcome.path = Some(path.to_owned());
            outcome.unlisted = verified.unlisted;
        }
        Err(error @ CheckpointError::Incomplete { .. }) => return Err(error.into()),
        Err(error) => {
            outcome.refused.push(Refused {
                path: path.to_owned(),
                reason: error.to_string(),
            });
            if let CheckpointError::Damaged { damages, .. } = error {
                outcome.damages = damages;
            }
        }
    }
    Ok(outcome)
}

fn verify_newest(dir: &Path) -> Result<Outcome> {
    let newest = newest(dir)?;
    if newest.found.is_none() && newest.refused.is_empty() {
        return Err(none_there(dir));
    }
    let refused = newest.refused.into_iter();
    Ok(Outcome {
        ok: refused.len() == 0,
        path: newest.found.map(|(_, path)| path),
        refused: refused
            .map(|(path, reason)| Refused { path, reason })
            .collect(),
        ..Outcome::default()
    })
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

/// Whether `dir` is a checkpoint's folder itself, complete or not.
fn is_one(dir: &Path) -> bool {
    let name = dir.file_name().and_then(|name| name.to_str());
    dir.join(MANIFEST).exists() || name.is_some_and(|name| name.starts_with("step-"))
}

/// The checkpoint that the user means.
fn resolve(dir: &Path) -> Result<PathBuf> {
    if is_one(dir) {
        return Ok(dir.to_owned());
    }
    let newest = newest(dir)?;
    for (_, reason) in &newest.refused {
        eprintln!("warning: {reason}");
    }
    match newest.found {
        Some((_, path)) => Ok(path),
        None if newest.refused.is_empty() => Err(none_there(dir)),
        None => anyhow::bail!("no checkpoint below {} holds", dir.display()),
    }
}

fn none_there(dir: &Path) -> anyhow::Error {
    let path = dir.to_owned();
    CheckpointError::Incomplete { path }.into()
}

/// Prints a line; a reader that has seen enough is no error.
fn print(text: &str) -> Result<u8> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("write to standard output")
        }
        _ => Ok(DONE),
    }
}

/// Bad usage is what another command line cures.
fn code_of(error: &anyhow::Error) -> u8 {
    let checkpoint = match error.downcast_ref() {
        Some(
            ExportError::Occupied { .. }
            | ExportError::OtherModel { .. }
            | ExportError::SourceDtype { .. }
            | ExportError::Overflow { .. }
            | ExportError::NoModel { .. },
        ) => return USAGE,
        Some(ExportError::Checkpoint(error)) => Some(error),
        _ => error.downcast_ref::<CheckpointError>(),
    };
    match checkpoint {
        Some(CheckpointError::Incomplete { .. }) => USAGE,
        _ => FAILED,
    }
}
