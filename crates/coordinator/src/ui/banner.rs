//! The first thing a person sees: what will run, on what, and where it will be found.

use std::{fmt, fs, path::Path};

use toml::Value;

use crate::{
    config::Config,
    numbers::{counted, signed},
    objective::label,
    trackers,
};

/// The banner of a run. Displays as lines, the last one without its end.
pub struct Banner {
    rows: Vec<(&'static str, String)>,
}

impl Banner {
    /// A banner for `config` on this machine; `resumed` is the step that a continued run goes on from.
    pub fn new(config: &Config, resumed: Option<u64>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = config.cluster.workers;
        let threads = config.cluster.threads_per_worker(cores);
        let mut rows = vec![
            ("run", run(config, resumed)),
            ("objective", objective(config)),
            ("model", text(config, "model", "path")),
            ("data", data(config)),
            (
                "workers",
                format!(
                    "{workers} × {} on {}, backend {}",
                    counted(threads as u64, "thread"),
                    machine(cores),
                    config.cluster.backend.as_str()
                ),
            ),
            ("output", config.job.output.display().to_string()),
            ("checkpoints", checkpoints(config)),
            ("evaluation", evaluation(config)),
        ];
        let look = trackers::commands(&config.telemetry).into_iter();
        rows.extend(look.map(|command| ("look with", command)));
        rows.retain(|(_, text)| !text.is_empty());
        Self { rows }
    }
}

impl fmt::Display for Banner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "coordinator {}", env!("CARGO_PKG_VERSION"))?;
        for (name, text) in &self.rows {
            write!(f, "\n{}", line(name, text))?;
        }
        Ok(())
    }
}

/// The banner's last line: how to ask a run that listens at `url` how it fares. The port is known only when it does.
pub fn status_line(url: &str, token_file: Option<&Path>) -> String {
    let mut command = format!("coordinator status {url}");
    if let Some(file) = token_file {
        command = format!("{command} --token-file {}", file.display());
    }
    line("status", &command)
}

fn line(name: &str, text: &str) -> String {
    format!("  {name:<12} {text}")
}

fn run(config: &Config, resumed: Option<u64>) -> String {
    let name = &config.job.name;
    match resumed {
        Some(step) => format!("{name}, continued after step {step}"),
        None => format!("{name}, seed {}", config.job.seed),
    }
}

fn objective(config: &Config) -> String {
    let text = label(&config.objective_config, " = ");
    let Some(targets) = config.targets() else {
        return text;
    };
    format!(
        "{text}: chosen to {}, rejected to {} nats",
        signed(targets.chosen),
        signed(targets.rejected)
    )
}

fn data(config: &Config) -> String {
    let train = files(config, "train");
    let eval = files(config, "eval");
    match (train.is_empty(), eval.is_empty()) {
        (true, _) => String::new(),
        (false, true) => format!("{train}; none held out"),
        (false, false) => format!("{train}; held out: {eval}"),
    }
}

fn files(config: &Config, key: &str) -> String {
    let listed = config.training_value("data", key).and_then(Value::as_array);
    let names = listed.into_iter().flatten().filter_map(Value::as_str);
    names.collect::<Vec<_>>().join(", ")
}

fn checkpoints(config: &Config) -> String {
    let path = config.checkpoint.path.display();
    let mut text = match config.checkpoint.every_steps {
        0 => format!("{path}, at the end"),
        every => format!("{path}, every {}", counted(every, "step")),
    };
    match config.checkpoint.keep_every_steps {
        0 => {}
        every => text = format!("{text}; those of every {} stay", counted(every, "step")),
    }
    if config.checkpoint.keep_best {
        text = format!("{text}, and at evaluations; the best stays and is exported");
    }
    text
}

/// What evaluations are compared by, and when they end training.
fn evaluation(config: &Config) -> String {
    let Some(selection) = config.selection() else {
        return String::new();
    };
    let every = config
        .training_value("evaluate", "every_steps")
        .and_then(Value::as_integer)
        .unwrap_or(0);
    let better = if selection.higher_is_better {
        "higher"
    } else {
        "lower"
    };
    let text = format!(
        "every {} by {} ({better} is better)",
        counted(every as u64, "step"),
        selection.metric.name()
    );
    let Some(patience) = selection.patience else {
        return text;
    };
    let by = match selection.min_delta {
        0.0 => String::new(),
        delta => format!(" of more than {delta}"),
    };
    format!(
        "{text}; training ends after {} without a gain{by}",
        counted(patience, "evaluation")
    )
}

fn machine(cores: usize) -> String {
    let memory = memory_gib().map_or_else(String::new, |gib| format!(", {gib:.1} GiB memory"));
    format!("{}{memory}", counted(cores as u64, "core"))
}

/// Of the machine; `None` where the kernel does not say.
fn memory_gib() -> Option<f64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / f64::from(1 << 20))
}

fn text(config: &Config, section: &str, key: &str) -> String {
    let value = config.training_value(section, key);
    value.and_then(Value::as_str).unwrap_or_default().to_owned()
}
