//! Where log lines go: standard error, beside the console for people or as JSON for machines.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// What standard error carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Progress for people, and warnings.
    #[default]
    Text,
    /// One JSON object an event, and nothing else.
    Json,
}

/// Starts logging, at the level that `RUST_LOG` says: by default warnings beside the console, everything of interest as JSON.
pub fn start(format: LogFormat) {
    match format {
        // The console shows a run's warnings itself.
        LogFormat::Text => begin(format, "warn,warning=off", false),
        LogFormat::Json => begin(format, "info", false),
    }
}

/// The same for a service, whose log is all that it shows: everything of interest but single steps.
pub fn start_service(format: LogFormat) {
    begin(format, "info,coordinator::step=warn", true);
}

fn begin(format: LogFormat, level: &str, times: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Colours are for eyes; files and pipes would keep their escapes.
        .with_ansi(std::io::stderr().is_terminal())
        // A terminal that was closed takes no line; saying so there would be a panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text if times => builder.with_target(false).init(),
        LogFormat::Text => builder.with_target(false).without_time().init(),
        LogFormat::Json => builder.json().init(),
    }
}
