//! The command line of a worker. `coordinator` carries it as a hidden subcommand, so that one program is enough on one machine.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use data::DataConfig;
use protocol::{Afterwards, Cause};
use serde_json::{Map, Value, json};
use spec::Dtype;
use tokio::runtime::Runtime;
use trainer::{BenchRequest, Continuation, GenerateRequest, Prompts, ScoreRequest, TrainError};
use wire::{Pass, Token};

use crate::agent::{Ending, Options, serve};
use crate::backend::{Backend, device};
use crate::log::{self, LogFormat};
use crate::presence::{CTRL_C, EXIT_DRAINED, Presence, SIGHUP, SIGTERM, hangup_is_ignored};
use crate::session::{Door, EXIT_TEMPORARY, SessionError};
use crate::transport::{Choice, Transport};
use crate::watched::Watched;

/// How long a worker tries to reach its coordinator before it says so; a serving worker then tries again.
const CONNECT_PATIENCE: Duration = Duration::from_mins(1);

/// Pause of a serving worker after a job that did not end well.
const KNOCK: Duration = Duration::from_secs(1);

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 2;

/// Arguments of the `worker` program.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Write the log-probs of every pair under a model, one JSON object a line.
    Score(Score),
    /// Time training steps on this process alone and print one JSON line.
    Bench(Bench),
    /// Continue prompts with a model, to read what it writes.
    Generate(Generate),
}

#[derive(Args, Debug)]
struct Serve {
    /// URL of the coordinator, such as <http://head:7070>.
    #[arg(long, required = true)]
    coordinator: Option<String>,
    /// Leave with the end of the first job instead of waiting for the next.
    #[arg(long)]
    once: bool,
    /// Address of this machine on which the other workers reach this one; by default the one from which it reaches the coordinator.
    #[arg(long, value_name = "IP")]
    listen: Option<IpAddr>,
    /// What gradients are reduced over between workers.
    #[arg(long, value_enum, default_value_t)]
    collective: Choice,
    /// What people call this worker; by default the host's name and the process id.
    #[arg(long)]
    name: Option<String>,
    /// File with the coordinator's token.
    #[arg(long, value_name = "FILE", env = "CALDPO__SECURITY__TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Serve gRPC health here: SERVING while this worker is connected to its coordinator.
    #[arg(long, value_name = "ADDRESS:PORT")]
    health: Option<String>,
    #[command(flatten)]
    compute: Compute,
    /// How log lines are written.
    #[arg(long, value_enum, default_value_t)]
    log: LogFormat,
    /// Started by a coordinator on this machine: leave when standard input closes, and let Ctrl-C be the coordinator's.
    #[arg(long, hide = true)]
    child: bool,
}

#[derive(Args, Debug)]
struct Compute {
    /// Where to compute.
    #[arg(long, value_enum, default_value_t)]
    backend: Backend,
    /// Number of the GPU, among those that this process sees (`CUDA_VISIBLE_DEVICES`).
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Threads of this process on the CPU; by default one a core.
    #[arg(long)]
    threads: Option<usize>,
}

#[derive(Args, Debug)]
struct Score {
    /// Hugging Face directory.
    #[arg(long)]
    model: PathBuf,
    /// An adapter to put on it, in PEFT's format.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Preference pairs, JSONL.
    #[arg(long)]
    data: PathBuf,
    /// Chat template (Jinja) in place of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Where to write: `index, chosen_logp, rejected_logp, chosen_tokens, rejected_tokens` a pair.
    #[arg(long)]
    out: PathBuf,
    /// Most tokens of prompt + completion.
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    /// Write the token ids too.
    #[arg(long)]
    ids: bool,
    /// Most tokens that go through the model at once.
    #[arg(long, default_value_t = 2048)]
    micro_batch_tokens: usize,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Args, Debug)]
struct Bench {
    /// Hugging Face directory.
    #[arg(long)]
    model: PathBuf,
    /// Preference pairs, JSONL, taken in file order.
    #[arg(long)]
    data: PathBuf,
    /// Chat template (Jinja) in place of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Pairs of one step.
    #[arg(long, default_value_t = 8)]
    batch_pairs: usize,
    /// Timed steps.
    #[arg(long, default_value_t = 6)]
    steps: u64,
    /// Steps before them.
    #[arg(long, default_value_t = 2)]
    warmup: u64,
    /// Most tokens of prompt + completion.
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    /// Most tokens that go through the model at once.
    #[arg(long, default_value_t = 2048)]
    micro_batch_tokens: usize,
    /// Arithmetic of forward and backward.
    #[arg(long, value_enum, default_value_t)]
    dtype: Arithmetic,
    /// Keep only the inputs of blocks for the backward.
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Add where the time went.
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Args, Debug)]
struct Generate {
    /// Hugging Face directory.
    #[arg(long)]
    model: PathBuf,
    /// An adapter to put on it, in PEFT's format.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// A text to continue.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts")]
    prompt: Option<String>,
    /// Prompts to continue: JSONL with a column `prompt`, text or messages.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// Texts are a user's turns, answered through the model's chat template. Messages always are.
    #[arg(long)]
    chat: bool,
    /// Chat template (Jinja) in place of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Most tokens of a continuation.
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// 0 takes the most likely token, 1 draws as the model predicts.
    #[arg(long, default_value_t = 0.0, value_parser = temperature, allow_negative_numbers = true)]
    temperature: f64,
    /// Draw of the fewest likeliest tokens that together have this probability (nucleus sampling).
    #[arg(long, default_value_t = 1.0, value_parser = share, allow_negative_numbers = true)]
    top_p: f64,
    /// Another seed draws other tokens.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// One JSON object a line: `prompt, text, tokens, ended`.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Arithmetic {
    #[default]
    F32,
    Bf16,
}

/// Runs the program and says how it ended: 0 done, 1 failed, 2 bad usage or configuration, 75 try again.
pub fn run(arguments: &Arguments) -> ExitCode {
    match &arguments.command {
        None => serve_jobs(&arguments.serve),
        Some(Command::Score(score)) => report(run_score(score)),
        Some(Command::Bench(bench)) => report(run_bench(bench)),
        Some(Command::Generate(generate)) => report(run_generate(generate)),
    }
}

fn report(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    eprintln!("error: {}", sentence(&error));
    let config = error
        .downcast_ref::<TrainError>()
        .is_some_and(|error| error.cause() == trainer::Cause::Config);
    ExitCode::from(if config { EXIT_USAGE } else { EXIT_FAILED })
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

fn serve_jobs(arguments: &Serve) -> ExitCode {
    log::start(arguments.log);
    let (options, presence, runtime) = match prepare(arguments) {
        Ok(prepared) => prepared,
        Err(error) => {
            eprintln!("error: {}", sentence(&error));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    loop {
        let ending = serve(&options, &presence, runtime.handle());
        let code = tell(&ending);
        if presence.is_leaving() {
            return ExitCode::from(EXIT_DRAINED);
        }
        if !options.device.answers() {
            tracing::error!("this process ends: its GPU answers only a new one");
            return ExitCode::from(EXIT_TEMPORARY);
        }
        let next = Next::of(&ending);
        match next {
            Next::Leave => return ExitCode::from(EXIT_DRAINED),
            Next::Refused => return ExitCode::from(EXIT_USAGE),
            _ if arguments.once => return ExitCode::from(code),
            Next::AtOnce => {}
            // A serving worker outlives its jobs, their failures included; it knocks again after a moment.
            Next::Later => std::thread::sleep(KNOCK),
        }
    }
}

/// Logs how a job ended for this worker; its exit code, if it was the only one.
fn tell(ending: &Ending) -> u8 {
    match ending {
        Ending::Finished => {
            tracing::info!("the job is done");
            0
        }
        Ending::Left(error) => {
            tracing::warn!("{error}");
            EXIT_TEMPORARY
        }
        Ending::Failed { cause, reason } => {
            tracing::error!("{reason}");
            match cause {
                Cause::Config => EXIT_USAGE,
                Cause::Temporary => EXIT_TEMPORARY,
                Cause::Fatal => EXIT_FAILED,
            }
        }
    }
}

/// What a serving worker does after a job.
enum Next {
    AtOnce,
    Later,
    Leave,
    Refused,
}

impl Next {
    fn of(ending: &Ending) -> Self {
        match ending {
            Ending::Finished => Self::AtOnce,
            Ending::Left(SessionError::Stopped { afterwards, .. }) => match afterwards {
                // Whoever comes here was not stuck.
                Afterwards::Rejoin | Afterwards::Return | Afterwards::Restart => Self::Later,
                Afterwards::Leave => Self::Leave,
                Afterwards::Refused => Self::Refused,
            },
            Ending::Left(SessionError::Url { .. } | SessionError::Denied { .. }) => Self::Refused,
            Ending::Left(_) | Ending::Failed { .. } => Self::Later,
        }
    }
}

fn prepare(arguments: &Serve) -> anyhow::Result<(Options, Presence, Runtime)> {
    if let Some(listen) = arguments.listen.filter(IpAddr::is_unspecified) {
        anyhow::bail!(
            "--listen {listen}: name the address of this machine at which the other workers reach it"
        );
    }
    let name = arguments.name.clone().unwrap_or_else(default_name);
    anyhow::ensure!(
        protocol::is_name(&name),
        "--name {name}: must be {}",
        protocol::NAME_RULE
    );
    let token = arguments.token_file.as_deref().map(Token::read);
    let token = token.transpose().context("--token-file")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start the network thread")?;
    let presence = Presence::default();
    if arguments.child {
        follow_parent(&runtime)?;
        // Supervisors and schedulers send it to all processes of a job at once.
        presence.follow_signals(&runtime, &[SIGTERM])?;
    } else if hangup_is_ignored() {
        presence.follow_signals(&runtime, &[SIGTERM, CTRL_C])?;
    } else {
        presence.follow_signals(&runtime, &[SIGTERM, CTRL_C, SIGHUP])?;
    }
    if let Some(address) = &arguments.health {
        presence.serve_health(address, &runtime)?;
    }
    let device = arguments.compute.prepare()?;
    let gpu = Watched::default();
    #[cfg(feature = "cuda")]
    if let Some(device) = device.gpu() {
        crate::watch::start(device, &presence, &gpu);
    }
    let url = arguments.coordinator.clone();
    let url = url.context("--coordinator is missing")?;
    let listen = arguments.listen.unwrap_or_else(|| own_address(&url));
    let options = Options {
        door: Door {
            url,
            pass: Pass::new(token.as_ref()),
            once: arguments.once,
        },
        device_text: Compute::describe(&device),
        transport: Transport::open(arguments.collective, &device)?,
        device,
        listen,
        name,
        patience: CONNECT_PATIENCE,
        gpu,
    };
    Ok((options, presence, runtime))
}

/// The address from which this machine reaches the coordinator at `url`, and at which others that do can be expected to reach it.
fn own_address(url: &str) -> IpAddr {
    let found = tonic::codegen::http::Uri::try_from(url)
        .ok()
        .and_then(|uri| {
            let host = uri.host()?.trim_matches(['[', ']']);
            let remote = (host, uri.port_u16().unwrap_or(80))
                .to_socket_addrs()
                .ok()?
                .next()?;
            let any: IpAddr = match remote {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            // Of a datagram socket this only asks for the route.
            let socket = UdpSocket::bind((any, 0)).ok()?;
            socket.connect(remote).ok()?;
            Some(socket.local_addr().ok()?.ip())
        });
    found.unwrap_or_else(|| {
        tracing::warn!("no way to {url} yet: this worker serves its peers on loopback; name its address with --listen");
        Ipv4Addr::LOCALHOST.into()
    })
}

/// The host's name and the process id, with other characters than names have left out.
fn default_name() -> String {
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let plain = |c: &char| c.is_ascii_alphanumeric() || "-_".contains(*c);
    let host: String = host.chars().filter(plain).collect();
    format!("{host}-{}", std::process::id())
}

/// Ties this process to the coordinator that started it: the pipe on standard input closes when that process ends, however
/// it ends, and a Ctrl-C in the terminal, or its end, is for the coordinator to handle.
fn follow_parent(runtime: &Runtime) -> anyhow::Result<()> {
    let entered = runtime.enter();
    for (kind, _) in [CTRL_C, SIGHUP] {
        let mut signals = tokio::signal::unix::signal(kind).context("listen for signals")?;
        runtime.spawn(async move { while signals.recv().await.is_some() {} });
    }
    drop(entered);
    let follow = || {
        let mut byte = [0];
        while matches!(std::io::stdin().read(&mut byte), Ok(1..)) {}
        std::process::exit(i32::from(EXIT_TEMPORARY));
    };
    std::thread::Builder::new()
        .name("parent".into())
        .spawn(follow)
        .context("start the thread that watches standard input")?;
    Ok(())
}

impl Compute {
    /// Sets the number of threads, once a process, and finds the device.
    fn prepare(&self) -> anyhow::Result<model::Device> {
        if let Some(threads) = self.threads {
            anyhow::ensure!(threads > 0, "--threads must be at least 1");
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build_global()
                .context("start compute threads")?;
        }
        Ok(device(self.backend, self.gpu)?)
    }

    /// The device in words.
    fn describe(device: &model::Device) -> String {
        if *device != model::Device::flex() {
            return "cuda".into();
        }
        let threads = rayon::current_num_threads();
        format!(
            "cpu, {threads} thread{}",
            if threads == 1 { "" } else { "s" }
        )
    }
}

fn run_score(arguments: &Score) -> anyhow::Result<()> {
    let device = arguments.compute.prepare()?;
    let request = ScoreRequest {
        model: arguments.model.clone(),
        adapter: arguments.adapter.clone(),
        data: data_config(
            &arguments.data,
            arguments.max_length,
            arguments.chat_template.as_deref(),
        )?,
        micro_batch_tokens: arguments.micro_batch_tokens,
    };
    // What is there stays until there is something to put in its place.
    let mut out = None;
    let pairs = trainer::score(&request, &device, &mut |scored| -> anyhow::Result<()> {
        let mut line = Map::new();
        line.insert("index".into(), scored.index.into());
        line.insert("chosen_logp".into(), scored.chosen_logp.into());
        line.insert("rejected_logp".into(), scored.rejected_logp.into());
        line.insert("chosen_tokens".into(), scored.pair.chosen.len().into());
        line.insert("rejected_tokens".into(), scored.pair.rejected.len().into());
        if arguments.ids {
            line.insert("prompt_ids".into(), json!(scored.pair.prompt));
            line.insert("chosen_ids".into(), json!(scored.pair.chosen));
            line.insert("rejected_ids".into(), json!(scored.pair.rejected));
        }
        let out = match &mut out {
            Some(out) => out,
            none => {
                let file = File::create(&arguments.out)
                    .with_context(|| format!("create {}", arguments.out.display()))?;
                none.insert(BufWriter::new(file))
            }
        };
        writeln!(out, "{}", Value::Object(line)).context("write a line")
    })?;
    if let Some(mut out) = out {
        out.flush()
            .with_context(|| format!("write {}", arguments.out.display()))?;
    }
    let plural = if pairs == 1 { "" } else { "s" };
    eprintln!("{pairs} pair{plural} scored, {}", arguments.out.display());
    Ok(())
}

fn run_bench(arguments: &Bench) -> anyhow::Result<()> {
    let device = arguments.compute.prepare()?;
    let request = BenchRequest {
        model: arguments.model.clone(),
        data: data_config(
            &arguments.data,
            arguments.max_length,
            arguments.chat_template.as_deref(),
        )?,
        batch_pairs: arguments.batch_pairs,
        micro_batch_tokens: arguments.micro_batch_tokens,
        steps: arguments.steps,
        warmup: arguments.warmup,
        dtype: match arguments.dtype {
            Arithmetic::F32 => Dtype::F32,
            Arithmetic::Bf16 => Dtype::Bf16,
        },
        gradient_checkpointing: arguments.gradient_checkpointing,
    };
    let mut result = trainer::bench(&request, &device)?;
    if !arguments.profile {
        result.profile = None;
    }
    println!("{}", serde_json::to_string(&result).context("write JSON")?);
    Ok(())
}

fn run_generate(arguments: &Generate) -> anyhow::Result<()> {
    log::start(LogFormat::Text);
    let device = arguments.compute.prepare()?;
    let prompts = match (&arguments.prompt, &arguments.prompts) {
        (Some(text), _) => Prompts::Text(text.clone()),
        (None, file) => Prompts::File(file.clone().context("--prompt or --prompts is missing")?),
    };
    // One prompt is known to whoever typed it; of many, each stands before its continuation.
    let echo = matches!(prompts, Prompts::File(_));
    let request = GenerateRequest {
        model: arguments.model.clone(),
        adapter: arguments.adapter.clone(),
        chat_template: arguments.chat_template.clone(),
        prompts,
        chat: arguments.chat,
        max_tokens: arguments.max_tokens,
        temperature: arguments.temperature,
        top_p: arguments.top_p,
        seed: arguments.seed,
    };
    let mut out = std::io::stdout().lock();
    trainer::generate(&request, &device, &mut |continuation| {
        let Continuation {
            prompt,
            text,
            tokens,
            ended,
        } = continuation;
        let written = if arguments.json {
            let line = json!({"prompt": prompt, "text": text, "tokens": tokens, "ended": ended});
            writeln!(out, "{line}")
        } else if echo {
            writeln!(out, "{prompt}\n→{text}\n")
        } else {
            writeln!(out, "{text}")
        };
        written.context("write a continuation")
    })
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if f64::is_finite(value) && value >= 0.0 => Ok(value),
        _ => Err("expected a number that is 0 or more".into()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("expected a number above 0 and at most 1".into()),
    }
}

/// `[data]` with everything that is not given here at its default.
fn data_config(
    file: &Path,
    max_length: usize,
    chat_template: Option<&Path>,
) -> anyhow::Result<DataConfig> {
    let config =
        json!({ "train": [file], "max_length": max_length, "chat_template": chat_template });
    serde_json::from_value(config).context("describe the data")
}
