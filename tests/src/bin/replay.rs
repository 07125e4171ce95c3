//! Goes through a run's schedule of worlds again, without faults, and says whether every committed step has the same bits.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: replay RUN_DIRECTORY");
        return ExitCode::from(2);
    };
    match tests::replay::replay(&folder) {
        Ok(stretches) => {
            let steps = stretches.last().map_or(0, |it| it.last);
            println!(
                "{steps} steps in {} stretches have the same bits",
                stretches.len()
            );
            ExitCode::SUCCESS
        }
        Err(reason) => {
            eprintln!("error: {reason}");
            ExitCode::FAILURE
        }
    }
}
