//! A first configuration for a model and pairs that were found on disk: every value is there with the reason for it.
//!
//! Nothing here reads pairs or weights; the caller tells what it found.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::numbers::counted;

/// Nats per completion token that a log-ratio reaches without leaving the reference's neighbourhood: the calibrated runs on
/// stories and letters end between 0.05 and 0.15.
const NATS_PER_TOKEN: f64 = 0.1;

/// Longer than anything that is trained on.
const LENGTH_MAX: i64 = 1 << 20;

/// What is to be trained, and on what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Hugging Face directory.
    pub model: PathBuf,
    /// Training pairs.
    pub train: Vec<PathBuf>,
    /// Held-out pairs.
    pub eval: Vec<PathBuf>,
    /// A chat template in place of the model's own.
    pub chat_template: Option<PathBuf>,
}

/// What the pairs are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found {
    /// Training pairs.
    pub pairs: usize,
    /// Most tokens of prompt + completion.
    pub longest: usize,
    /// Mean tokens of a completion.
    pub completion_tokens: f64,
}

impl Files {
    /// `data` is a file, or a folder with `train*.jsonl` and, for held-out pairs, `test*.jsonl` or `eval*.jsonl`.
    ///
    /// # Errors
    /// Nothing usable there.
    pub fn find(model: &Path, data: &Path, eval: Option<&Path>) -> anyhow::Result<Self> {
        ensure!(
            model.join("config.json").is_file(),
            "--model {}: no config.json there; give a Hugging Face model directory",
            model.display()
        );
        let mut files = Self {
            model: model.to_owned(),
            train: vec![data.to_owned()],
            eval: eval.map(Path::to_owned).into_iter().collect(),
            chat_template: None,
        };
        if !data.is_dir() {
            ensure!(data.is_file(), "--data {}: no such file", data.display());
            return Ok(files);
        }
        let mut names: Vec<PathBuf> = fs::read_dir(data)
            .with_context(|| format!("list {}", data.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "jsonl")
            })
            .collect();
        names.sort();
        let starting = |prefixes: &[&str]| -> Vec<PathBuf> {
            let name = |path: &Path| {
                path.file_name()
                    .map(|name| name.to_string_lossy().into_owned())
            };
            let fits = |name: String| prefixes.iter().any(|prefix| name.starts_with(prefix));
            names
                .iter()
                .filter(|path| name(path).is_some_and(fits))
                .cloned()
                .collect()
        };
        files.train = starting(&["train"]);
        if files.train.is_empty() {
            bail!(
                "--data {}: no train*.jsonl in that folder; name a file instead",
                data.display()
            );
        }
        if files.eval.is_empty() {
            files.eval = starting(&["test", "eval"]);
        }
        Ok(files)
    }

    /// The sections of a job that reads these files and truncates nothing.
    pub fn probe(&self) -> toml::Table {
        let list = |files: &[PathBuf]| -> Vec<String> {
            files
                .iter()
                .map(|file| file.display().to_string())
                .collect()
        };
        let mut data = toml::Table::from_iter([("max_length".to_owned(), LENGTH_MAX.into())]);
        data.insert("train".into(), list(&self.train).into());
        data.insert("eval".into(), list(&self.eval).into());
        if let Some(template) = &self.chat_template {
            let template = template.display().to_string();
            data.insert("chat_template".into(), template.into());
        }
        let model = toml::Table::from_iter([(
            "path".to_owned(),
            toml::Value::from(self.model.display().to_string()),
        )]);
        toml::Table::from_iter([
            ("model".to_owned(), toml::Value::from(model)),
            ("data".to_owned(), toml::Value::from(data)),
        ])
    }
}

/// The configuration, named `name`.
///
/// # Errors
/// A model directory without a readable config.json.
pub fn configuration(name: &str, files: &Files, found: &Found) -> anyhow::Result<String> {
    let path = files.model.join("config.json");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let model: Value =
        serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))?;
    let family = model["architectures"][0]
        .as_str()
        .unwrap_or("unknown architecture");
    let positions = model["max_position_embeddings"]
        .as_u64()
        .unwrap_or(u64::MAX) as usize;

    let max_length = found.longest.max(16).next_power_of_two().min(positions);
    let (beta, target) = beta(found.completion_tokens);
    let batch_pairs = batch_pairs(found.pairs);
    let steps = found.pairs.div_ceil(batch_pairs);
    let (learning_rate, size) = learning_rate(&files.model, &model)?;
    let every = (steps / 10).max(1);
    let mut lines = vec![
        format!(
            "# {family}, {size} of weights; {}.",
            counted(found.pairs as u64, "training pair")
        ),
        String::new(),
        "[job]".into(),
        format!("name = {}", quoted(name)),
        "seed = 0".into(),
        String::new(),
        "[model]".into(),
        format!("path = {}", quoted(&files.model.display().to_string())),
        String::new(),
        "[data]".into(),
        format!("train = {}", list(&files.train)),
    ];
    if files.eval.is_empty() {
        lines.push(
            "# Held-out pairs would show how rewards develop on what is not trained on.".into(),
        );
    }
    lines.push(format!("eval = {}", list(&files.eval)));
    if let Some(template) = &files.chat_template {
        let template = template.display().to_string();
        lines.push(format!("chat_template = {}", quoted(&template)));
    }
    lines.push(format!(
        "# The longest prompt + completion has {} tokens; nothing is truncated{}.",
        found.longest,
        if max_length < found.longest {
            " that the model could read"
        } else {
            ""
        }
    ));
    lines.push(format!("max_length = {max_length}"));
    lines.extend([
        String::new(),
        "[objective]".into(),
        "kind = \"cal_dpo\"".into(),
        format!(
            "# Completions have {:.0} tokens on average. At {NATS_PER_TOKEN} nats a token a log-ratio reaches about {:.1}; this β puts",
            found.completion_tokens,
            found.completion_tokens * NATS_PER_TOKEN
        ),
        format!("# the targets ±1/(2β) at ±{target}. Much farther out, calibration becomes a constant push; nearer, it holds back."),
        format!("beta = {beta}"),
        "calibration_weight = 1.0".into(),
        String::new(),
        "[optimizer]".into(),
        format!("# Usual for {size} of weights; the paper's 5e-7 is for 7B parameters."),
        format!("learning_rate = {learning_rate:e}"),
        "max_grad_norm = 1.0".into(),
        String::new(),
        "[schedule]".into(),
        "kind = \"cosine\"".into(),
        "warmup_ratio = 0.1".into(),
        String::new(),
        "[train]".into(),
        format!("# {} an epoch.", counted(steps as u64, "step")),
        "epochs = 1".into(),
        format!("batch_pairs = {batch_pairs}"),
        "# Tokens that go through the model at once: what activation memory depends on.".into(),
        "micro_batch_tokens = 2048".into(),
        String::new(),
        "[evaluate]".into(),
        format!("every_steps = {every}"),
        String::new(),
        "[checkpoint]".into(),
        format!("every_steps = {}", every * 2),
        String::new(),
        "[cluster]".into(),
        // Whoever has no pair of a step waits.
        format!("workers = {}", batch_pairs.min(2)),
    ]);
    Ok(lines.join("\n") + "\n")
}

/// Writes `text` to the new file `path`, whole or not at all.
///
/// # Errors
/// A file that is there: it may hold somebody's changes.
pub fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    ensure!(
        !path.exists(),
        "--init {}: that file exists; name a new one",
        path.display()
    );
    Ok(storage::atomic_write(path, text.as_bytes())?)
}

/// β whose target is in reach of completions of `tokens` tokens, rounded to one digit, and that target.
fn beta(tokens: f64) -> (f64, f64) {
    let exact = 0.5 / (tokens.max(1.0) * NATS_PER_TOKEN);
    let unit = 10f64.powf(exact.log10().floor());
    let beta = (exact / unit).round() * unit;
    // The product of two powers of ten has no short decimals; its text has.
    let beta: f64 = format!("{beta:.6}").parse().unwrap_or(exact);
    let target: f64 = format!("{:.1}", 0.5 / beta).parse().unwrap_or(0.0);
    (beta, target)
}

/// At least some thirty steps an epoch, at most the paper's 64 pairs.
fn batch_pairs(pairs: usize) -> usize {
    let most = (pairs / 30).clamp(1, 64);
    1 << most.ilog2()
}

/// A rate by the size of the weights, and that size as text.
fn learning_rate(dir: &Path, model: &Value) -> anyhow::Result<(f64, String)> {
    let files = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    let bytes: u64 = files
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .filter_map(|path| Some(fs::metadata(path).ok()?.len()))
        .sum();
    ensure!(
        bytes > 0,
        "--model {}: no *.safetensors there",
        dir.display()
    );
    let dtype = model["dtype"].as_str().or(model["torch_dtype"].as_str());
    let width = if dtype == Some("float32") { 4 } else { 2 };
    let rate = match bytes / width {
        0..5_000_000 => 1e-3,
        5_000_000..50_000_000 => 1e-4,
        50_000_000..500_000_000 => 1e-5,
        500_000_000..3_000_000_000 => 2e-6,
        _ => 5e-7,
    };
    let size = match bytes {
        0..1_000_000 => format!("{} kB", bytes / 1000),
        1_000_000..1_000_000_000 => format!("{} MB", bytes / 1_000_000),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    };
    Ok((rate, size))
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn list(files: &[PathBuf]) -> String {
    let files: Vec<_> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    toml::Value::from(files).to_string()
}

#[cfg(test)]
mod tests {
    use super::{batch_pairs, beta};

    #[test]
    fn beta_puts_the_targets_within_reach_of_the_completions() {
        assert_eq!(beta(50.0), (0.1, 5.0));
        assert_eq!(beta(100.0), (0.05, 10.0));
        assert_eq!(beta(400.0), (0.01, 50.0));
        for tokens in [1.0, 7.0, 33.0, 250.0, 2000.0] {
            let (_, target) = beta(tokens);
            let reach = tokens * 0.1;
            assert!(
                target < reach * 1.6 && target > reach / 1.6,
                "{tokens}: {target}"
            );
        }
    }

    #[test]
    fn a_batch_leaves_some_thirty_steps_and_is_at_most_the_papers() {
        assert_eq!(
            [10, 100, 512, 1108, 100_000].map(batch_pairs),
            [1, 2, 16, 32, 64]
        );
    }
}
