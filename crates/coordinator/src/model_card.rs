//! `export/README.md`: what was done to the model, in Hugging Face's model card format. Facts of the run only.
//!
//! A card travels to other machines and readers: files and folders are named without their paths.

use std::{fmt, path::Path};

use protocol::{EvaluationRow, Statistics};
use spec::{ObjectiveConfig, OptimizerKind};
use toml::Value;

use crate::{
    config::Config,
    numbers::{counted, grouped, plain, signed},
    objective::{both, symmetric},
    summary::{Summary, Totals},
};

/// How the export is used.
const USAGE: &str = r#"## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```
"#;

/// A completed run's card. Displays as Markdown with YAML front matter.
pub struct ModelCard<'a> {
    /// The run's configuration.
    pub config: &'a Config,
    /// How it ended.
    pub summary: &'a Summary,
    /// The step whose weights the card describes.
    pub step: u64,
    /// Sums over the steps up to it.
    pub seen: Totals,
    /// Rows of the evaluations, the oldest first.
    pub evaluations: &'a [EvaluationRow],
}

/// A table's row.
type Row = (&'static str, String);

impl fmt::Display for ModelCard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.front_matter(f)?;
        self.opening(f)?;
        self.data(f)?;
        self.objective(f)?;
        self.training(f)?;
        if self.has_rewards() {
            self.reward_dynamics(f)?;
        } else {
            self.losses(f)?;
        }
        self.versions(f)?;
        f.write_str(USAGE)
    }
}

impl ModelCard<'_> {
    fn trained(&self) -> &ObjectiveConfig {
        &self.config.objective_config
    }

    /// Whether rows have a rejected side.
    fn has_pairs(&self) -> bool {
        self.trained().needs_rejected()
    }

    fn has_rewards(&self) -> bool {
        self.config.has_rewards()
    }

    fn front_matter(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tag = self.trained().kind().replace('_', "-");
        // A JSON string is a YAML string, whatever is in the name.
        let base = serde_json::to_string(&self.base()).expect("a string is JSON");
        writeln!(f, "---\nlibrary_name: transformers")?;
        writeln!(f, "pipeline_tag: text-generation")?;
        writeln!(f, "base_model: {base}\ntags:\n- {tag}\n---\n")
    }

    fn opening(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { name, facts, .. } = self.summary;
        let parameters = facts.as_ref().map_or_else(String::new, |facts| {
            format!(" ({} parameters)", grouped(facts.parameters))
        });
        writeln!(f, "# {name}\n")?;
        writeln!(
            f,
            "`{}`{parameters} after {} of {} with caldpo {}. {}; this card was written from the run's records.\n",
            self.base(),
            counted(self.step, "step"),
            self.trained().about().name,
            self.summary.tool_version,
            self.which_checkpoint()
        )?;
        let Some(early) = &self.summary.early_stop else {
            return Ok(());
        };
        let schedule = facts.as_ref().map_or_else(String::new, |facts| {
            format!(" of {}", grouped(facts.steps_total))
        });
        writeln!(
            f,
            "Training ended early, with step {}{schedule}: {}.\n",
            grouped(early.step),
            early.reason
        )
    }

    fn which_checkpoint(&self) -> String {
        let last = self.summary.totals.steps;
        let which = if self.step == last {
            "The run's last checkpoint".to_owned()
        } else {
            format!(
                "The run's checkpoint of step {}, of {}",
                grouped(self.step),
                grouped(last)
            )
        };
        let best = self.summary.best.as_ref();
        match best.filter(|best| best.step == self.step) {
            Some(best) => format!(
                "{which}, exported: of its evaluations the one with the best `{}`, {:.4}",
                best.metric, best.value
            ),
            None => format!("{which}, exported"),
        }
    }

    /// The evaluation of these weights, or the last one.
    fn evaluation(&self) -> Option<&EvaluationRow> {
        let mut rows = self.evaluations.iter();
        let own = rows.find(|row| row.step == self.step);
        own.or(self.evaluations.last())
    }

    /// A row's step; of several evaluations it says which one is of these weights.
    fn shown_step(&self, row: &EvaluationRow) -> String {
        if row.step == self.step && self.step != self.summary.totals.steps {
            return format!("{} (these weights)", row.step);
        }
        row.step.to_string()
    }

    fn data(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts = self.summary.facts.as_ref();
        let count = |count: Option<u64>| count.map_or_else(|| "–".into(), grouped);
        writeln!(f, "## Data\n")?;
        let unit = if self.has_pairs() { "pairs" } else { "rows" };
        writeln!(f, "| | files | {unit} |\n|---|---|---|")?;
        let training = count(facts.map(|facts| facts.pairs));
        writeln!(f, "| training | {} | {training} |", self.files("train"))?;
        let held_out = count(facts.map(|facts| facts.eval_pairs));
        writeln!(f, "| held out | {} | {held_out} |\n", self.files("eval"))?;
        let mut rows = vec![
            ("longest sequence, tokens", self.value("data", "max_length")),
            (
                "truncation of longer ones",
                self.value("data", "truncation"),
            ),
            ("shuffled", self.value("data", "shuffle")),
        ];
        if let Some(template) = self.path("data", "chat_template") {
            let text = format!("{template}, in place of the base model's");
            rows.push(("chat template", text));
        }
        if let Some(facts) = facts {
            rows.push(("digest of the tokenized data", code(&facts.data_digest)));
            rows.push(("digest of the tokenizer", code(&facts.tokenizer_digest)));
            rows.push(("digest of the starting weights", code(&facts.model_digest)));
        }
        table(f, &rows)
    }

    fn objective(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## Objective\n")?;
        if let ObjectiveConfig::Mix { parts } = self.trained() {
            writeln!(f, "A sum of {}:\n", parts.len())?;
            for part in parts {
                equation(f, &format!("{:?} × ", part.weight), &part.objective)?;
                table(f, &parameters(&part.objective))?;
            }
        } else {
            equation(f, "", self.trained())?;
        }
        let mut rows = parameters(self.trained());
        if self.has_rewards() {
            let reference = self.path("model", "reference");
            let reference =
                reference.map_or_else(|| "the starting weights".into(), |name| format!("`{name}`"));
            writeln!(
                f,
                "r = log π(completion | prompt) − log π_ref(completion | prompt), summed over the completion's tokens, in \
                 nats; r_w of the chosen one, r_l of the rejected one. π_ref: {reference}.\n"
            )?;
        }
        if let Some(targets) = self.config.targets() {
            let name = match symmetric(targets) {
                Some(_) => "targets ±1/(2β)",
                None => "targets (1 − s)/β and −s/β",
            };
            rows.push((name, format!("{} nats", both(targets))));
        }
        table(f, &rows)
    }

    fn training(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workers = self.summary.workers;
        let warmup = [
            ("warmup_steps", " steps"),
            ("warmup_ratio", " of the steps"),
        ];
        let warmup = warmup.into_iter().find_map(|(key, unit)| {
            let value = self.config.training_value("schedule", key)?;
            Some(format!(", warmup over {}{unit}", text(value)))
        });
        let schedule = self.value("schedule", "kind") + &warmup.unwrap_or_default();
        let kind = self.config.optimizer.kind;
        let parameters = match kind {
            OptimizerKind::AdamW {
                betas: [first, second],
                eps,
                weight_decay,
            } => {
                format!("betas ({first:?}, {second:?}), eps {eps:?}, weight decay {weight_decay:?}")
            }
            OptimizerKind::RmsProp { alpha, eps } => format!("alpha {alpha:?}, eps {eps:?}"),
        };
        let optimizer = format!("{}, {parameters}", kind.label());
        let (unit_batch, unit_seen) = if self.has_pairs() {
            ("pairs a step", "pairs seen")
        } else {
            ("rows a step", "rows seen")
        };
        let mut rows = vec![
            ("optimizer", optimizer),
            (
                "peak learning rate",
                self.value("optimizer", "learning_rate"),
            ),
            ("schedule", schedule),
            (
                "gradient clipped to norm",
                self.value("optimizer", "max_grad_norm"),
            ),
            ("steps", self.steps()),
            (unit_batch, self.value("train", "batch_pairs")),
            (unit_seen, grouped(self.seen.pairs)),
            ("tokens seen", grouped(self.seen.tokens)),
            ("arithmetic", self.value("model", "dtype")),
            ("workers", workers.to_string()),
            ("seed", self.config.job.seed.to_string()),
        ];
        if let Some(adapter) = self.adapter() {
            rows.insert(0, ("trained", adapter));
        }
        let skipped = self.seen.skipped_steps;
        if skipped > 0 {
            let text = format!("{skipped}, their gradients were not finite");
            rows.push(("skipped steps", text));
        }
        writeln!(f, "## Training\n")?;
        table(f, &rows)
    }

    /// What was trained in place of the model's own weights.
    fn adapter(&self) -> Option<String> {
        let value = |key| self.config.training_value("adapter", key);
        Some(match value("kind")?.as_str()? {
            "lora" => format!(
                "a low-rank adapter (LoRA) of rank {}, α {}, on {}, merged into these weights",
                self.value("adapter", "rank"),
                self.value("adapter", "alpha"),
                self.value("adapter", "targets"),
            ),
            _ => format!(
                "the adapter `{}`, merged into these weights",
                self.value("adapter", "path")
            ),
        })
    }

    /// Steps of these weights, and where that is another number, of the run.
    fn steps(&self) -> String {
        let (own, run) = (grouped(self.step), self.summary.totals.steps);
        if self.step == run {
            return own;
        }
        format!("{own} (the run went on to {})", grouped(run))
    }

    fn reward_dynamics(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## Reward dynamics\n")?;
        let Some(first) = self.evaluations.first() else {
            writeln!(f, "No pairs were held out.\n")?;
            let Some(last) = self.summary.last_step else {
                return Ok(());
            };
            let of = &last.report.statistics;
            return writeln!(
                f,
                "The last step's batch of {}, before its update: chosen {} nats, rejected {} nats, \
                 accuracy {:.3}, loss {}.\n",
                counted(last.report.pairs, "training pair"),
                signed(of.log_ratios_chosen),
                signed(of.log_ratios_rejected),
                of.rewards_accuracies,
                plain(of.loss)
            );
        };
        writeln!(
            f,
            "Means over {}. Chosen, rejected and margin: log-ratios to the reference, in nats. Accuracy: \
             share of pairs whose chosen completion has the larger one, ties count half.\n",
            counted(first.pairs, "held-out pair")
        )?;
        let after = self.evaluation().filter(|row| row.step > first.step);
        if let Some(after) = after {
            let before = first;
            writeln!(f, "| | before | after |\n|---|---:|---:|")?;
            for ((name, before), (_, after)) in shown(before).into_iter().zip(shown(after)) {
                writeln!(f, "| {name} | {before} | {after} |")?;
            }
            writeln!(f, "\nEvery evaluation:\n")?;
        }
        let names = shown(first).map(|(name, _)| name).join(" | ");
        writeln!(f, "| step | {names} |\n|---:|{}", "---:|".repeat(7))?;
        for row in self.evaluations {
            let cells = shown(row).map(|(_, text)| text).join(" | ");
            writeln!(f, "| {} | {cells} |", self.shown_step(row))?;
        }
        writeln!(f)
    }

    fn losses(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## Loss\n")?;
        if self.evaluations.is_empty() {
            writeln!(f, "No rows were held out.\n")?;
            let Some(last) = self.summary.last_step else {
                return Ok(());
            };
            let loss = plain(last.report.statistics.loss);
            return writeln!(f, "The last step's batch, before its update: {loss}.\n");
        }
        writeln!(f, "| step | held-out loss |\n|---:|---:|")?;
        for row in self.evaluations {
            let step = self.shown_step(row);
            writeln!(f, "| {step} | {} |", plain(row.statistics.loss))?;
        }
        writeln!(f)
    }

    fn versions(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## Versions\n")?;
        let rows = [
            ("caldpo", self.summary.tool_version.to_owned()),
            ("run", code(&self.config.run_digest())),
        ];
        table(f, &rows)?;
        writeln!(
            f,
            "The run's digest is that of the configuration which defines it, and stands as `caldpo_run` in the metadata of \
             the weights' files.\n"
        )
    }

    /// Name of the model that the run began with.
    fn base(&self) -> String {
        self.path("model", "path")
            .unwrap_or_else(|| "unknown".into())
    }

    fn files(&self, key: &str) -> String {
        let listed = self.config.training_value("data", key);
        let listed = listed.and_then(Value::as_array).into_iter().flatten();
        let names: Vec<_> = listed
            .filter_map(Value::as_str)
            .map(|path| cell(&file_name(path)))
            .collect();
        if names.is_empty() {
            return "–".into();
        }
        names.join(", ")
    }

    fn path(&self, section: &str, key: &str) -> Option<String> {
        let value = self.config.training_value(section, key)?;
        value.as_str().map(file_name)
    }

    fn value(&self, section: &str, key: &str) -> String {
        let value = self.config.training_value(section, key);
        value.map_or_else(|| "–".into(), text)
    }
}

/// An objective's name, source and equation, `weight` before them.
fn equation(f: &mut fmt::Formatter<'_>, weight: &str, of: &ObjectiveConfig) -> fmt::Result {
    let about = of.about();
    match about.arxiv {
        Some(paper) => {
            let number = about.number.map(|number| format!(", equation {number}"));
            let number = number.unwrap_or_default();
            writeln!(
                f,
                "{weight}[{}](https://arxiv.org/abs/{paper}){number}:\n",
                about.name
            )?;
        }
        None => writeln!(f, "{weight}{}:\n", about.name)?,
    }
    writeln!(f, "    {}\n", about.equation)
}

fn parameters(of: &ObjectiveConfig) -> Vec<Row> {
    let parameters = of.parameters().into_iter();
    parameters
        .map(|it| (it.symbol, format!("{:?}", it.value)))
        .collect()
}

/// Loss and rewards of an evaluation.
fn shown(row: &EvaluationRow) -> [Row; 7] {
    let of: &Statistics = &row.statistics;
    let margin = of.log_ratios_chosen - of.log_ratios_rejected;
    [
        ("chosen", signed(of.log_ratios_chosen)),
        ("rejected", signed(of.log_ratios_rejected)),
        ("margin", signed(margin)),
        ("accuracy", format!("{:.3}", of.rewards_accuracies)),
        ("loss", plain(of.loss)),
        ("pairwise", plain(of.loss_pairwise)),
        ("calibration", plain(of.loss_calibration)),
    ]
}

fn table(f: &mut fmt::Formatter<'_>, rows: &[Row]) -> fmt::Result {
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(f, "| | |\n|---|---|")?;
    for (name, text) in rows {
        writeln!(f, "| {name} | {text} |")?;
    }
    writeln!(f)
}

/// A configured value as people write it.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => cell(text),
        Value::Float(number) => format!("{number:?}"),
        Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Text that does not end its cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn code(text: &str) -> String {
    format!("`{text}`")
}

fn file_name(path: &str) -> String {
    let name = Path::new(path).file_name();
    name.map_or_else(
        || path.to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}
