//! The `worker` program.

use std::process::ExitCode;

use clap::Parser;

/// Trains as one rank of a job, scores pairs, continues prompts, or measures speed.
#[derive(Parser)]
#[command(name = "worker", version)]
struct Program {
    #[command(flatten)]
    arguments: worker::cli::Arguments,
}

fn main() -> ExitCode {
    worker::cli::run(&Program::parse().arguments)
}
