//! `checkpoint`: look into, verify, compare, cut anew, export and clear away training checkpoints, without the ML stack.

mod diff;
mod export;
mod gc;
mod inspect;
mod pins;
mod print;
mod progress;
mod reshard;
mod target;
mod verify;

use std::{panic, path::PathBuf, process::ExitCode};

use anyhow::Result;
use checkpoint::{CheckpointError, DiffError, ExportError, ReshardError};
use clap::{Parser, Subcommand};
use storage::LockError;

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const TEMPORARY: u8 = 75;

/// Look into, verify, compare, reshard, export and clear away training checkpoints.
///
/// DIR is a checkpoint's folder such as step-00000100, or a directory of such folders, which stands for the newest one that
/// verifies. Exit codes: 0 done, 1 damaged, failed or (with diff --exit-code) different, 2 bad usage or no checkpoint there,
/// 75 a run is writing there (try again later).
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
    /// Compare two checkpoints, or a checkpoint and a Hugging Face model directory, tensor by tensor.
    ///
    /// World sizes may differ. Norms are Euclidean; relative is |A - B| / |A|.
    Diff(diff::DiffArgs),
    /// Write a checkpoint as another number of ranks would have, weights and moments to the bit.
    ///
    /// The new one is visible once it is whole and was read back; a crash leaves what was there. Little memory is needed.
    Reshard(reshard::ReshardArgs),
    /// Write the weights as a Hugging Face model directory, those of an adapter merged into the model's; or an adapter by itself.
    Export(export::ExportArgs),
    /// Remove what saves that were cut short left and, as far as the options say, old checkpoints.
    ///
    /// Never goes: the newest checkpoint that verifies, a pinned one, a damaged one. Nothing goes before the newest was verified.
    Gc(gc::GcArgs),
    /// Keep a checkpoint, whatever gc's options and the run's own rules say, until it is unpinned.
    Pin {
        /// A checkpoint.
        dir: PathBuf,
        /// Why, for people.
        #[arg(long, default_value = "")]
        note: String,
    },
    /// Take a pin away.
    Unpin {
        /// A checkpoint.
        dir: PathBuf,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    // A panic has told its story on stderr; its code is that of any other failure.
    let code = match panic::catch_unwind(|| run(args.command)) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            eprintln!("error: {}", told(&error));
            code_of(&error)
        }
        Err(_) => FAILED,
    };
    ExitCode::from(code)
}

/// The whole story, nothing of it twice: an error of a file tells its cause itself.
fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Inspect { dir, tensors, json } => {
            inspect::inspect(&target::resolve(&dir)?, tensors, json)
        }
        Command::Verify { dir, json } => verify::verify(&dir, json),
        Command::Diff(args) => diff::diff(&args),
        Command::Reshard(args) => reshard::reshard(&args),
        Command::Export(args) => export::export(&args),
        Command::Gc(args) => gc::gc(&args),
        Command::Pin { dir, note } => pins::pin(&dir, &note),
        Command::Unpin { dir } => pins::unpin(&dir),
    }
}

/// What another command line cures.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Bad usage is what another command line cures.
fn code_of(error: &anyhow::Error) -> u8 {
    if error.is::<Usage>() {
        return USAGE;
    }
    if let Some(LockError::Held { .. } | LockError::Shared { .. }) = error.downcast_ref() {
        return TEMPORARY;
    }
    let export = match error.downcast_ref() {
        Some(DiffError::Model(error)) => Some(error),
        _ => error.downcast_ref::<ExportError>(),
    };
    let checkpoint = match (export, error.downcast_ref(), error.downcast_ref()) {
        (
            Some(
                ExportError::Occupied { .. }
                | ExportError::OtherModel { .. }
                | ExportError::SourceDtype { .. }
                | ExportError::Overflow { .. }
                | ExportError::NoModel { .. },
            ),
            ..,
        )
        | (_, Some(ReshardError::Occupied { .. } | ReshardError::World), _) => return USAGE,
        (Some(ExportError::Checkpoint(error)), ..)
        | (_, Some(ReshardError::Checkpoint(error)), _)
        | (.., Some(DiffError::Checkpoint(error))) => Some(error),
        _ => error.downcast_ref::<CheckpointError>(),
    };
    match checkpoint {
        Some(CheckpointError::Incomplete { .. }) => USAGE,
        _ => FAILED,
    }
}
