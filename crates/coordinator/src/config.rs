//! A job's configuration: built-in defaults, then a preset, then files, then the environment, then `--set`.
//!
//! The coordinator reads its own sections here. What describes the training itself goes, merged, to [`spec::resolve`], which
//! fills in defaults and refuses what it does not know. Nothing here starts or writes anything.

mod layers;
mod presets;
mod refusal;
mod schema;
mod sections;
mod selection;
mod service;
mod telemetry;

use std::path::Path;

use protocol::{Elastic, JobPolicy, Selection};
use serde::Serialize;
use spec::{JobError, ObjectiveConfig, OptimizerSection, Targets};
use toml::{Table, Value};

use layers::Merged;
use refusal::unknown;
use sections::{Section, refuse};

pub use layers::Sources;
pub use refusal::ConfigError;
pub use schema::schema;
pub use sections::{Backend, CheckpointSection, ClusterSection, JobSection};
pub use service::{SecuritySection, ServiceConfig};
pub use telemetry::{TelemetrySection, TrackerKind};

/// Sections of the coordinator.
const OWN: [&str; 5] = ["job", "checkpoint", "cluster", "security", "telemetry"];

/// A configuration that can be run.
#[derive(Clone, Debug)]
pub struct Config {
    /// `[job]`.
    pub job: JobSection,
    /// `[checkpoint]`.
    pub checkpoint: CheckpointSection,
    /// `[cluster]`.
    pub cluster: ClusterSection,
    /// `[security]`.
    pub security: SecuritySection,
    /// `[telemetry]`.
    pub telemetry: TelemetrySection,
    /// `train.skipped_steps_max`: consecutive skipped steps that end the job.
    pub skipped_steps_max: u64,
    /// `job.seed` and the training sections, resolved: what workers are given.
    pub training: Table,
    /// `[objective]` of these.
    pub objective_config: ObjectiveConfig,
    /// `[optimizer]` of these.
    pub optimizer: OptimizerSection,
    /// What makes a run this run and no other.
    pub identity: serde_json::Value,
}

impl Sources {
    /// These files and `--set` arguments with this process's environment.
    pub fn from_process(files: Vec<std::path::PathBuf>, set: Vec<String>) -> Self {
        // A variable that is not Unicode cannot be one of ours.
        let variables = std::env::vars_os();
        let environment = variables
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self {
            texts: Vec::new(),
            files,
            environment,
            set,
        }
    }

    /// Whether neither a file nor an argument says anything: a preset and a few `--set` are a configuration, too.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.set.is_empty() && self.texts.is_empty()
    }

    /// The same without environment variables that are keys of a service.
    #[must_use]
    pub fn without_service_variables(mut self) -> Self {
        self.environment
            .retain(|(name, _)| !service::is_service_variable(name));
        self
    }
}

impl Config {
    /// Merges and checks all sources.
    ///
    /// # Errors
    /// The first key that is unknown, of the wrong type, or impossible, with the origin of its value.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let merged = layers::merge(sources)?;
        let mut all = merged.table();
        check_sections(&all, &merged)?;

        let job = job_section(Section::take(&mut all, "job", &merged)?, sources, &merged)?;
        let checkpoint = Section::take(&mut all, "checkpoint", &merged)?;
        let (mut checkpoint, keep_best) = checkpoint_section(checkpoint, &job.output, &merged)?;
        if merged.origin("cluster.state").is_some() {
            let reason =
                "belongs to `coordinator --cluster`; one job keeps everything in job.output";
            return Err(refuse(&merged, "cluster.state", reason));
        }
        let cluster = ClusterSection::parse(Section::take(&mut all, "cluster", &merged)?)?;
        let security = SecuritySection::parse(Section::take(&mut all, "security", &merged)?)?;
        service::check_listener(&merged, "cluster.listen", cluster.listen, &security)?;
        let telemetry = Section::take(&mut all, "telemetry", &merged)?;
        let telemetry = TelemetrySection::parse(telemetry, &job.output)?;
        service::check_metrics(&merged, telemetry.metrics_listen, &security)?;
        let mut train = Section::take(&mut all, "train", &merged)?;
        let skipped_steps_max = train.required("skipped_steps_max")?;
        if skipped_steps_max == 0 {
            let reason =
                "must be at least 1: the number of skipped steps in a row that ends the job";
            return Err(refuse(&merged, "train.skipped_steps_max", reason));
        }

        all.insert("train".into(), Value::Table(train.rest()));
        let seed = Value::Integer(job.seed as i64);
        all.insert(
            "job".into(),
            Value::Table(Table::from_iter([("seed".into(), seed)])),
        );
        let resolved = spec::resolve(&all)
            .map_err(|JobError { key, reason }| refuse(&merged, &key, reason))?;
        checkpoint.keep_best = selection::keep_best(keep_best, &resolved.resolved, &merged)?;
        check_offload(&merged, &cluster, &resolved.spec)?;
        if let Some(shared) = &resolved.spec.reference.shared {
            check_location(&merged, "reference.shared", shared)?;
        }
        Ok(Self {
            job,
            checkpoint,
            cluster,
            security,
            telemetry,
            skipped_steps_max,
            training: resolved.resolved,
            objective_config: resolved.spec.objective,
            optimizer: resolved.spec.optimizer,
            identity: resolved.identity,
        })
    }

    /// A job that is submitted to a service: the same without the service's keys, which are refused.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_job(sources: &Sources) -> Result<Self, ConfigError> {
        let merged = layers::merge(sources)?;
        service::check_job(&merged)?;
        if sources.files.is_empty() && merged.origin("job.name").is_none() {
            return Err(refuse(
                &merged,
                "job.name",
                "is missing: jobs go by their names",
            ));
        }
        Self::load(sources)
    }

    /// The training sections as text, for the workers.
    pub fn training_toml(&self) -> String {
        toml::to_string(&self.training).expect("a table of TOML values is TOML")
    }

    /// The whole resolved configuration as text; loaded again, it gives the same configuration.
    pub fn to_toml(&self) -> String {
        let mut text = self.job_toml();
        write_section(&mut text, "cluster", &self.cluster);
        write_section(&mut text, "telemetry", &self.telemetry);
        write_section(&mut text, "security", &self.security);
        text
    }

    /// The same without the service's keys: what is submitted to a service.
    pub fn to_job_toml(&self) -> String {
        let mut text = self.job_toml();
        let mut cluster = Table::try_from(&self.cluster).expect("a section is a TOML table");
        cluster.remove("listen");
        write_section(&mut text, "cluster", &cluster);
        let telemetry = TelemetrySection {
            metrics_listen: None,
            ..self.telemetry.clone()
        };
        write_section(&mut text, "telemetry", &telemetry);
        text
    }

    /// All sections up to `[cluster]`.
    fn job_toml(&self) -> String {
        // Its values are below, so that what ran is told in full and stays so when a later version knows better.
        let preset = match &self.job.preset {
            Some(preset) => format!(" preset {preset},"),
            None => String::new(),
        };
        let mut text = format!(
            "# Resolved: built-in defaults,{preset} configuration files, environment and --set merged.\n"
        );
        write_section(&mut text, "job", &self.job);
        for name in spec::SECTIONS {
            let mut section = self.training.get(name).cloned();
            if name == "train" {
                let train = section.get_or_insert_with(|| Value::Table(Table::new()));
                let limit = Value::Integer(self.skipped_steps_max as i64);
                train
                    .as_table_mut()
                    .expect("[train] resolves to a table")
                    .insert("skipped_steps_max".into(), limit);
            }
            if let Some(section) = section {
                write_section(&mut text, name, &section);
            }
        }
        write_section(&mut text, "checkpoint", &self.checkpoint);
        text
    }

    /// What the protocol needs to know about the job's course.
    pub fn policy(&self) -> JobPolicy {
        let ms = |seconds: f64| (seconds * 1000.0).round() as u64;
        let cadence = |steps: u64| (steps > 0).then_some(steps);
        let evaluate = self.training_value("evaluate", "every_steps");
        let evaluate = evaluate.and_then(Value::as_integer).unwrap_or(0);
        JobPolicy {
            world: self.cluster.workers,
            save_every: cadence(self.checkpoint.every_steps),
            evaluate_every: cadence(u64::try_from(evaluate).unwrap_or(0)),
            selection: self.selection(),
            heartbeat_timeout_ms: ms(self.cluster.heartbeat_timeout_seconds),
            join_timeout_ms: ms(self.cluster.join_timeout_seconds),
            form_timeout_ms: ms(self.cluster.form_timeout_seconds),
            step_timeout_ms: ms(self.cluster.step_timeout_seconds),
            save_timeout_ms: ms(self.cluster.save_timeout_seconds),
            skipped_steps_max: self.skipped_steps_max,
            failed_saves_max: self.checkpoint.failures_max,
            elastic: Elastic {
                workers_min: self.cluster.min_workers,
                workers_max: self.cluster.max_workers,
                mirror: self.cluster.mirror,
                shard_gradients: self.cluster.zero > 1,
                offload: self.cluster.offload,
                failures_max: self.cluster.failures_max,
                abort_timeout_ms: ms(self.cluster.abort_timeout_seconds),
                collective_timeout_ms: ms(self.cluster.collective_timeout_seconds),
                job_timeout_ms: ms(self.cluster.job_timeout_seconds),
                hang_factor: self.cluster.hang_factor,
                slow_factor: self.cluster.slow_factor,
            },
        }
    }

    /// What makes one evaluation better than another, and what follows from it.
    pub fn selection(&self) -> Option<Selection> {
        selection::selection(&self.training, self.checkpoint.keep_best)
    }

    /// Where the objective calibrates log-ratios to, in nats.
    pub fn targets(&self) -> Option<Targets> {
        self.objective_config.targets()
    }

    /// Whether rows carry log-ratios against a reference.
    pub fn has_rewards(&self) -> bool {
        self.objective_config.needs_reference()
    }

    /// Digest of what makes this run this run, hexadecimal; checkpoints and exports carry it.
    pub fn run_digest(&self) -> String {
        let digest = blake3::hash(self.identity.to_string().as_bytes());
        digest.to_hex().to_string()
    }

    /// `objective.kind`.
    pub fn objective(&self) -> &'static str {
        self.objective_config.kind()
    }

    /// A resolved value of a training section.
    pub fn training_value(&self, section: &str, key: &str) -> Option<&Value> {
        self.training.get(section)?.get(key)
    }
}

/// What is moved to the host's memory must be something that a forward does without.
fn check_offload(
    merged: &Merged,
    cluster: &ClusterSection,
    spec: &spec::Spec,
) -> Result<(), ConfigError> {
    let reason = if !cluster.offload {
        return Ok(());
    } else if spec.adapter.is_some() {
        "moves the state of a model that is trained to the host, and an adapter's is small; leave it out"
    } else if spec.model.dtype == spec::Dtype::F32 {
        "moves the f32 weights to the host, and with model.dtype = \"f32\" they are what is computed with; set model.dtype = \"bf16\""
    } else {
        return Ok(());
    };
    Err(refuse(merged, "cluster.offload", reason))
}

fn check_sections(all: &Table, merged: &Merged) -> Result<(), ConfigError> {
    let known: Vec<&str> = OWN.into_iter().chain(spec::SECTIONS).collect();
    for (name, value) in all {
        if !known.contains(&name.as_str()) {
            let what = if value.is_table() {
                "section"
            } else {
                "key outside a section"
            };
            return Err(refuse(merged, name, unknown(what, name, &known)));
        }
        if !value.is_table() {
            let reason = format!("expected a section [{name}], got {}", value.type_str());
            return Err(refuse(merged, name, reason));
        }
    }
    Ok(())
}

fn job_section(
    mut section: Section,
    sources: &Sources,
    merged: &Merged,
) -> Result<JobSection, ConfigError> {
    let name = section.optional::<String>("name")?;
    let seed = section.required::<u64>("seed")?;
    let output = section.optional("output")?;
    let preset = section.optional("preset")?;
    let priority = section.required("priority")?;
    let max_hours = section.optional("max_hours")?;
    let max_attempts = section.required("max_attempts")?;
    section.finish()?;
    let name = name.unwrap_or_else(|| default_name(sources));
    if !protocol::is_name(&name) {
        let reason = format!("must be {}, got \"{name}\"", protocol::NAME_RULE);
        return Err(refuse(merged, "job.name", reason));
    }
    let output = output.unwrap_or_else(|| Path::new("runs").join(&name));
    if output.as_os_str().is_empty() {
        return Err(refuse(merged, "job.output", "is empty; name a directory"));
    }
    if storage::is_remote(&output) {
        let reason = "is a URL, and a run directory has a journal, which no object store can hold; name a directory, and give the URL as checkpoint.path";
        return Err(refuse(merged, "job.output", reason));
    }
    let job = JobSection {
        name,
        seed,
        output,
        preset,
        priority,
        max_hours,
        max_attempts,
    };
    job.validate()
        .map_err(|(key, reason)| refuse(merged, key, reason))?;
    Ok(job)
}

fn default_name(sources: &Sources) -> String {
    let stem = sources.files.last().and_then(|path| path.file_stem());
    stem.map_or_else(|| "run".into(), |stem| stem.to_string_lossy().into_owned())
}

fn check_location(merged: &Merged, key: &str, location: &Path) -> Result<(), ConfigError> {
    storage::check_location(location).map_err(|error| {
        let reason = format!(
            "{}; give a folder, or a URL such as s3://bucket/prefix",
            error.source
        );
        refuse(merged, key, &reason)
    })
}

/// The section, and `keep_best` as it was given: what it defaults to depends on the training sections.
fn checkpoint_section(
    mut section: Section,
    output: &Path,
    merged: &Merged,
) -> Result<(CheckpointSection, Option<bool>), ConfigError> {
    let path = section.optional("path")?;
    let keep_best = section.optional("keep_best")?;
    let parsed = CheckpointSection {
        path: path.unwrap_or_else(|| output.join("checkpoints")),
        every_steps: section.required("every_steps")?,
        keep_last: section.required("keep_last")?,
        keep_every_steps: section.required("keep_every_steps")?,
        failures_max: section.required("failures_max")?,
        keep_best: false,
    };
    section.finish()?;
    check_location(merged, "checkpoint.path", &parsed.path)?;
    if parsed.keep_last == 0 {
        let reason = "must be at least 1: a run without a checkpoint cannot go on";
        return Err(refuse(merged, "checkpoint.keep_last", reason));
    }
    if parsed.failures_max == 0 {
        let reason = "must be at least 1: the number of checkpoints in a row that cannot be written and end the job";
        return Err(refuse(merged, "checkpoint.failures_max", reason));
    }
    Ok((parsed, keep_best))
}

fn write_section(text: &mut String, name: &str, section: &impl Serialize) {
    let value = Value::try_from(section).expect("a section is a TOML table");
    let whole = Table::from_iter([(name.to_owned(), value)]);
    let written = toml::to_string(&whole).expect("a table of TOML values is TOML");
    text.push('\n');
    text.push_str(&written);
}
