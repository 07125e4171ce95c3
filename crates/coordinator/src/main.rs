//! The `coordinator` program.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use coordinator::cache::{self, Cache};
use coordinator::client::{self, Refused, Target};
use coordinator::cluster;
use coordinator::compare::{CompareError, Comparison, compare};
use coordinator::config::{self, Config, ServiceConfig, Sources};
#[cfg(feature = "local")]
use coordinator::init;
use coordinator::log::{self, LogFormat};
use coordinator::run::{AttemptError, EXIT_USAGE, Show, exit_code_of, run};
use coordinator::ui;

/// Aligns a language model to preferences: starts workers on this machine, runs one job to its end, and exits; or, with
/// --cluster, serves job after job to workers that join from anywhere.
///
/// Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 cancelled, 75 try again, 129, 130 and 143 after a signal.
#[derive(Parser)]
#[command(name = "coordinator", version, args_conflicts_with_subcommands = true)]
struct Program {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    sources: SourceArguments,
    /// Serve job after job; the configuration holds cluster.listen, cluster.state, [security] and telemetry.metrics_listen.
    #[arg(long)]
    cluster: bool,
    /// What standard error carries.
    #[arg(long, value_enum, default_value_t)]
    log: LogFormat,
}

#[derive(Subcommand)]
enum Command {
    /// Print the resolved configuration or the schema of all keys, or write a first one for a model and pairs.
    Config {
        /// Print a JSON Schema of configuration files, for editors, instead.
        #[arg(long, conflicts_with_all = ["files", "config", "set", "init"])]
        schema: bool,
        #[command(flatten)]
        sources: SourceArguments,
        #[command(flatten)]
        init: InitArguments,
    },
    /// Read tokenizer and data as training would, and print what becomes of the rows.
    Data {
        #[command(flatten)]
        sources: SourceArguments,
        /// One JSON object with `train` and `eval`.
        #[arg(long)]
        json: bool,
    },
    /// Say what a job will need of this machine, memory, time and disk, before it runs; exit code 2 if it cannot fit.
    Plan {
        #[command(flatten)]
        sources: SourceArguments,
        /// Leave out the time: none of its steps is run.
        #[arg(long)]
        no_probe: bool,
        /// Plan for a GPU of so much memory a worker, here or not.
        #[arg(long, value_name = "GIB")]
        gpu_gib: Option<f64>,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Look into a store of reference log-probs, verify it, or clean it up.
    #[command(subcommand)]
    Cache(Cache),
    /// Print how a running coordinator, its jobs and its workers fare.
    Status {
        /// The same as --coordinator.
        #[arg(value_name = "URL")]
        at: Option<String>,
        #[command(flatten)]
        target: Target,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Submit a job to a coordinator that serves job after job.
    Submit {
        #[command(flatten)]
        sources: SourceArguments,
        #[command(flatten)]
        target: Target,
        /// Submitting again with the same key submits nothing, and prints the first job.
        #[arg(long, value_name = "KEY")]
        key: Option<String>,
        /// Follow the job to its end; the exit code tells how it ended.
        #[arg(long)]
        watch: bool,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Follow a running job live; leaving does not touch it. The exit code tells how it ended.
    Watch {
        /// Its name; without one, the only job that has not ended.
        job: Option<String>,
        #[command(flatten)]
        target: Target,
        /// One JSON object an event.
        #[arg(long)]
        json: bool,
    },
    /// End a job; one that runs commits the step under way and saves first.
    Cancel {
        /// Its name.
        job: String,
        #[command(flatten)]
        target: Target,
        /// For the record.
        #[arg(long, default_value = "by a person")]
        reason: String,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Keep a job from running until it is resumed; one that runs commits the step under way, saves and stops.
    Pause {
        /// Its name.
        job: String,
        #[command(flatten)]
        target: Target,
        /// For the record.
        #[arg(long, default_value = "by a person")]
        reason: String,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Let a paused job run again when its turn comes.
    Resume {
        /// Its name.
        job: String,
        #[command(flatten)]
        target: Target,
        /// For the record.
        #[arg(long, default_value = "by a person")]
        reason: String,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// List a coordinator's jobs.
    Jobs {
        #[command(flatten)]
        target: Target,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// List a coordinator's workers.
    Workers {
        #[command(flatten)]
        target: Target,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Let a worker go; its job saves and goes on with others.
    Drain {
        /// Its name.
        worker: String,
        #[command(flatten)]
        target: Target,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Print runs beside each other as one table, and draw their held-out log-ratios into one plot.
    Compare {
        /// Run directories, such as runs/*.
        #[arg(required = true, value_name = "RUN_DIR")]
        directories: Vec<PathBuf>,
        /// One JSON object.
        #[arg(long)]
        json: bool,
        /// Folder of compare.png and compare.svg.
        #[arg(long, value_name = "FOLDER", default_value = "compare")]
        out: PathBuf,
    },
    /// One of this machine's workers.
    #[cfg(feature = "local")]
    #[command(hide = true)]
    Worker(Box<worker::cli::Arguments>),
}

#[derive(Args)]
struct SourceArguments {
    /// Configuration files (TOML); later ones win.
    files: Vec<PathBuf>,
    /// The same.
    #[arg(long = "config", value_name = "FILE")]
    config: Vec<PathBuf>,
    /// One value, such as `objective.beta=0.05`; wins over files and environment.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Args)]
struct InitArguments {
    /// Write a commented configuration for --model and --data to this new file.
    #[arg(long, value_name = "FILE", requires_all = ["model", "data"], conflicts_with_all = ["files", "config", "set"])]
    init: Option<PathBuf>,
    /// Hugging Face directory of the model to train.
    #[arg(long, value_name = "DIR", requires = "init")]
    model: Option<PathBuf>,
    /// Training pairs: a file (JSON lines, Parquet, Arrow), or a folder with train*.jsonl and test*.jsonl or eval*.jsonl.
    #[arg(long, value_name = "PATH", requires = "init")]
    data: Option<PathBuf>,
    /// Held-out pairs.
    #[arg(long, value_name = "FILE", requires = "init")]
    eval: Option<PathBuf>,
    /// Chat template (Jinja) in place of the model's own; becomes data.chat_template.
    #[arg(long, value_name = "FILE", requires = "init")]
    chat_template: Option<PathBuf>,
}

fn main() -> ExitCode {
    let program = Program::parse();
    match program.command {
        #[cfg(feature = "local")]
        Some(Command::Worker(arguments)) => worker::cli::run(&arguments),
        Some(Command::Config { schema: true, .. }) => report(print_schema().map(|()| 0)),
        Some(Command::Config { sources, init, .. }) => {
            log::start(program.log);
            report(match init {
                InitArguments {
                    init: Some(file),
                    model: Some(model),
                    data: Some(data),
                    eval,
                    chat_template,
                } => initialize(&file, &model, &data, eval.as_deref(), chat_template).map(|()| 0),
                _ => load(sources)
                    .and_then(|config| ui::print(&config.to_toml()))
                    .map(|()| 0),
            })
        }
        Some(Command::Data { sources, json }) => {
            log::start(program.log);
            report(data(sources, json).map(|()| 0))
        }
        Some(Command::Plan {
            sources,
            no_probe,
            gpu_gib,
            json,
        }) => {
            log::start(program.log);
            report(plan(sources, !no_probe, gpu_gib, json).map(|()| 0))
        }
        Some(Command::Cache(command)) => report(cache::run(&command)),
        Some(Command::Status { at, target, json }) => report(client::status(&target.at(at), json)),
        Some(Command::Submit {
            sources,
            target,
            key,
            watch,
            json,
        }) => report(
            load_job(sources).and_then(|config| client::submit(&target, &config, key, json, watch)),
        ),
        Some(Command::Watch { job, target, json }) => {
            report(client::watch(&target, job.as_deref(), json))
        }
        Some(Command::Cancel {
            job,
            target,
            reason,
            json,
        }) => report(client::cancel(&target, &job, &reason, json)),
        Some(Command::Pause {
            job,
            target,
            reason,
            json,
        }) => report(client::pause(&target, &job, &reason, json)),
        Some(Command::Resume {
            job,
            target,
            reason,
            json,
        }) => report(client::resume(&target, &job, &reason, json)),
        Some(Command::Jobs { target, json }) => report(client::jobs(&target, json)),
        Some(Command::Workers { target, json }) => report(client::workers(&target, json)),
        Some(Command::Drain {
            worker,
            target,
            json,
        }) => report(client::drain(&target, &worker, json)),
        Some(Command::Compare {
            directories,
            json,
            out,
        }) => {
            let comparison = Comparison {
                directories,
                json,
                out,
            };
            let compared = compare(&comparison).and_then(|text| ui::print(&text));
            report(compared.map(|()| 0))
        }
        None if program.cluster => {
            log::start_service(program.log);
            let sources = program.sources.sources();
            let config = ServiceConfig::load(&sources);
            let config = config.map_err(|error| Unusable(error.to_string()).into());
            report(config.and_then(|config| cluster::serve(&config)))
        }
        None => {
            log::start(program.log);
            report(load(program.sources).and_then(|config| {
                let show = Show {
                    json: program.log == LogFormat::Json,
                    command: command_line(),
                };
                run(&config, &show)
            }))
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unusable(String);

impl SourceArguments {
    fn sources(self) -> Sources {
        let mut files = self.files;
        files.extend(self.config);
        Sources::from_process(files, self.set)
    }
}

fn load(sources: SourceArguments) -> anyhow::Result<Config> {
    let sources = sources.sources();
    if sources.is_empty() {
        let reason = "no configuration: name a file, such as `coordinator configs/quickstart.toml`";
        return Err(Unusable(reason.into()).into());
    }
    Config::load(&sources).map_err(|error| Unusable(error.to_string()).into())
}

/// A job to submit. The environment of whoever submits may hold keys of a service too, which are not the job's.
fn load_job(sources: SourceArguments) -> anyhow::Result<Config> {
    let sources = sources.sources().without_service_variables();
    if sources.is_empty() {
        let reason =
            "no configuration: name a file, such as `coordinator submit configs/quickstart.toml`";
        return Err(Unusable(reason.into()).into());
    }
    Config::load_job(&sources).map_err(|error| Unusable(error.to_string()).into())
}

fn print_schema() -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(&config::schema())?;
    writeln!(std::io::stdout().lock(), "{text}").context("write the schema")
}

#[cfg(feature = "local")]
fn data(sources: SourceArguments, json: bool) -> anyhow::Result<()> {
    let config = load(sources)?;
    let reports = worker::report::reports(&config.training);
    let reports = reports.map_err(|error| Unusable(error.to_string()))?;
    let mut out = std::io::stdout().lock();
    let written = if json {
        writeln!(out, "{}", serde_json::to_string(&reports)?)
    } else {
        write!(out, "{reports}")
    };
    written.context("write the report")
}

#[cfg(feature = "local")]
fn plan(
    sources: SourceArguments,
    probe: bool,
    gpu_gib: Option<f64>,
    json: bool,
) -> anyhow::Result<()> {
    let config = load(sources)?;
    let card_bytes = match gpu_gib {
        Some(gib) if gib > 0.0 && gib.is_finite() => Some((gib * f64::from(1 << 30)) as u64),
        Some(gib) => return Err(Unusable(format!("--gpu-gib {gib}: must be above 0")).into()),
        None => None,
    };
    // GPUs that are not here may be those of many machines.
    if card_bytes.is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        coordinator::plan::check_cores(&config, cores)?;
    }
    let machine = worker::machine::MachineMemory::here();
    let plan = coordinator::plan::plan(&config, machine, card_bytes, probe);
    let plan = plan.map_err(|error| Unusable(error.to_string()))?;
    let mut out = std::io::stdout().lock();
    let written = if json {
        writeln!(out, "{}", serde_json::to_string(&plan)?)
    } else {
        write!(out, "{plan}")
    };
    written.context("write the plan")?;
    match plan.refusal() {
        Some(reason) => Err(Unusable(reason).into()),
        None => Ok(()),
    }
}

/// Reads the pairs as a job without truncation would, and writes a configuration that fits them.
#[cfg(feature = "local")]
fn initialize(
    file: &Path,
    model: &Path,
    data: &Path,
    eval: Option<&Path>,
    chat_template: Option<PathBuf>,
) -> anyhow::Result<()> {
    let unusable = |error: anyhow::Error| Unusable(sentence(&error));
    let files = init::Files {
        chat_template,
        ..init::Files::find(model, data, eval).map_err(unusable)?
    };
    let reports = worker::report::reports(&files.probe());
    let reports = reports.map_err(|error| Unusable(error.to_string()))?;
    let train = &reports.train;
    // Unpaired rows have one completion each.
    let completions = match train.desirable + train.undesirable {
        0 => 2 * train.pairs,
        rows => rows,
    };
    let found = init::Found {
        pairs: train.pairs,
        longest: train.longest,
        completion_tokens: train.scored_tokens as f64 / completions.max(1) as f64,
    };
    let stem = file
        .file_stem()
        .map_or("run".into(), |stem| stem.to_string_lossy());
    let plain = |c: char| {
        if protocol::is_name(&format!("a{c}")) {
            c
        } else {
            '-'
        }
    };
    let name = stem.trim_start_matches('.').chars().map(plain);
    let name = name.collect::<String>();
    let text = init::configuration(&name, &files, &found).map_err(unusable)?;
    init::write(file, &text).map_err(unusable)?;
    ui::print(&text)?;
    eprintln!(
        "written to {}; train with: coordinator {}",
        file.display(),
        quoted(&file.display().to_string())
    );
    Ok(())
}

#[cfg(not(feature = "local"))]
fn initialize(
    _: &Path,
    _: &Path,
    _: &Path,
    _: Option<&Path>,
    _: Option<PathBuf>,
) -> anyhow::Result<()> {
    let reason =
        "this build carries no worker to read data with; build it with the default feature `local`";
    Err(Unusable(reason.into()).into())
}

#[cfg(not(feature = "local"))]
fn plan(
    _sources: SourceArguments,
    _probe: bool,
    _gpu_gib: Option<f64>,
    _json: bool,
) -> anyhow::Result<()> {
    let reason =
        "this build carries no worker to plan with; build it with the default feature `local`";
    Err(Unusable(reason.into()).into())
}

#[cfg(not(feature = "local"))]
fn data(_sources: SourceArguments, _json: bool) -> anyhow::Result<()> {
    let reason =
        "this build carries no worker to read data with; build it with the default feature `local`";
    Err(Unusable(reason.into()).into())
}

fn report(result: anyhow::Result<u8>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // Nobody reads it where the terminal was closed, and the exit code still tells.
            drop(writeln!(std::io::stderr(), "error: {}", sentence(&error)));
            if let Some(refused) = error.downcast_ref::<Refused>() {
                return ExitCode::from(refused.exit_code());
            }
            if let Some(refused) = error.downcast_ref::<AttemptError>() {
                return ExitCode::from(exit_code_of(refused.cause()));
            }
            let usage = error.is::<Unusable>()
                || is_no_room(&error)
                || error
                    .downcast_ref::<CompareError>()
                    .is_some_and(CompareError::is_usage);
            ExitCode::from(if usage { EXIT_USAGE } else { 1 })
        }
    }
}

#[cfg(feature = "local")]
fn is_no_room(error: &anyhow::Error) -> bool {
    error.is::<coordinator::plan::NoRoom>()
}

/// A build without workers starts none.
#[cfg(not(feature = "local"))]
fn is_no_room(_: &anyhow::Error) -> bool {
    false
}

/// The chain of causes as one sentence. Errors that tell their cause themselves are not told twice.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// What was typed, to be typed again.
fn command_line() -> String {
    let words = std::env::args().map(|word| quoted(&word));
    words.collect::<Vec<_>>().join(" ")
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,".contains(c);
    if word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
