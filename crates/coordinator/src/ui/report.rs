//! The last thing a person sees: held-out pairs before and after, two samples before and after, where everything is, and
//! what to do next.

use std::{fmt, time::Duration};

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use protocol::{EvaluationRow, Sample};

use super::{WIDTH, wrap};
use crate::{
    numbers::{counted, duration, grouped, plain, signed},
    objective::kind_has_rewards,
    phases,
    run_directory::SampleRow,
    summary::Summary,
};

/// Samples that are shown.
const SAMPLES_SHOWN: usize = 2;
/// Characters of a text that are shown.
const TEXT_SHOWN: usize = 320;

/// The end of a run, for a person. Displays as lines, the last one without its end.
pub struct Report<'a> {
    /// How it ended.
    pub summary: &'a Summary,
    /// Steps of the whole run, where the workers got so far as to know.
    pub steps_total: Option<u64>,
    /// Samples, the oldest first.
    pub samples: &'a [SampleRow],
    /// Where the summary is.
    pub summary_path: &'a std::path::Path,
    /// The next command to try.
    pub next: &'a str,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.headline())?;
        let Summary {
            before,
            exported,
            after,
            ..
        } = self.summary;
        if let Some(before) = before {
            let later = [exported.as_ref(), after.as_ref()];
            writeln!(f, "{}\n", table(&self.summary.objective, before, later))?;
        }
        if let Some(text) = self.exported() {
            writeln!(f, "{}\n", wrap(&text, WIDTH).join("\n"))?;
        }
        for warning in &self.summary.warnings {
            whole_paragraph(f, "warning", &warning.text)?;
            writeln!(f)?;
        }
        self.samples(f)?;
        let artifacts = &self.summary.artifacts;
        let paths = [
            ("plot", artifacts.plot.as_deref()),
            ("model", artifacts.export.as_deref()),
            ("checkpoint", artifacts.checkpoint.as_deref()),
            ("summary", Some(self.summary_path)),
        ];
        for (name, path) in paths {
            if let Some(path) = path {
                writeln!(f, "{name:<11} {}", path.display())?;
            }
        }
        write!(f, "{:<11} {}", "next", self.next)
    }
}

impl Report<'_> {
    fn headline(&self) -> String {
        let Summary { name, totals, .. } = self.summary;
        let steps = match self.steps_total {
            Some(total) if total != totals.steps => format!("step {} of {total}", totals.steps),
            _ => format!("step {}", totals.steps),
        };
        let early = self.summary.early_stop.as_ref();
        let mut text = match (self.summary.outcome, &self.summary.reason) {
            ("completed", _) => early.map_or_else(
                || format!("{name} is complete"),
                |early| {
                    let text = format!("{name} ended early, with {steps}: {}", early.reason);
                    wrap(&text, WIDTH).join("\n")
                },
            ),
            (_, Some(reason)) => format!("{name} failed after {steps}: {reason}"),
            _ => format!("{name} was stopped after {steps}; the same command continues it"),
        };
        if totals.steps > 0 {
            text = format!(
                "{text}\n{} in {}, {} pairs/s, {} tokens/s",
                counted(totals.steps, "step"),
                duration(Duration::try_from_secs_f64(totals.seconds).unwrap_or_default()),
                plain(totals.pairs_per_second),
                grouped(totals.tokens_per_second.round() as u64)
            );
        }
        if totals.skipped_steps > 0 {
            text = format!(
                "{text}, {} skipped because the gradient was not finite",
                grouped(totals.skipped_steps)
            );
        }
        if let Some(phases) = phases::text(&totals.phases) {
            let line = wrap(&format!("time by phase: {phases}"), WIDTH).join("\n");
            text = format!("{text}\n{line}");
        }
        text
    }

    /// Which step's weights are exported, where that is a choice.
    fn exported(&self) -> Option<String> {
        let best = self.summary.best.as_ref()?;
        let step = self.summary.artifacts.export_step?;
        let start = best
            .start
            .map_or_else(String::new, |start| format!(", {start:.4} before training"));
        let best_text = format!("{} {:.4}{start}", best.metric, best.value);
        Some(if best.step == step {
            format!("exported: the weights of step {step}, the best evaluated one ({best_text})")
        } else {
            format!(
                "exported: the weights of step {step}; those of step {} were better ({best_text})",
                best.step
            )
        })
    }

    fn samples(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [before, .., last] = self.samples else {
            return Ok(());
        };
        let own = |row: &&SampleRow| Some(row.step) == self.summary.artifacts.export_step;
        let after = self.samples.iter().find(own).unwrap_or(last);
        let pairs = before.samples.iter().zip(&after.samples);
        for (before, after) in pairs.take(SAMPLES_SHOWN) {
            paragraph(f, "prompt", &before.prompt)?;
            paragraph(f, "before", shown(before))?;
            paragraph(f, "after", shown(after))?;
            writeln!(f)?;
        }
        Ok(())
    }
}

fn shown(sample: &Sample) -> &str {
    if sample.text.trim().is_empty() {
        return "(nothing)";
    }
    &sample.text
}

/// How a table's row is read from an evaluation.
type Show = fn(&EvaluationRow) -> String;

/// `kind` is the objective's: without a reference there are no log-ratios, without pairs there is no accuracy.
fn table(kind: &str, before: &EvaluationRow, later: [Option<&EvaluationRow>; 2]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let title = format!("held-out, {}", counted(before.pairs, "pair"));
    let step = |row: &EvaluationRow| format!("step {}", row.step);
    let mut header = vec![title, step(before)];
    header.extend(later.into_iter().flatten().map(step));
    table.set_header(header);
    let rows: [(&str, Show); 5] = [
        ("chosen log-ratio (nats)", |row| {
            signed(row.statistics.log_ratios_chosen)
        }),
        ("rejected log-ratio (nats)", |row| {
            signed(row.statistics.log_ratios_rejected)
        }),
        ("margin (nats)", |row| {
            signed(row.statistics.log_ratios_chosen - row.statistics.log_ratios_rejected)
        }),
        ("accuracy", |row| {
            format!("{:.3}", row.statistics.rewards_accuracies)
        }),
        ("loss", |row| plain(row.statistics.loss)),
    ];
    let first = match kind {
        "sft" => 4,
        _ if !kind_has_rewards(kind) => 3,
        _ => 0,
    };
    for &(name, show) in &rows[first..] {
        let mut cells = vec![name.to_owned(), show(before)];
        cells.extend(later.into_iter().flatten().map(show));
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// `name` and its text beside it, wrapped, long text cut.
fn paragraph(f: &mut fmt::Formatter<'_>, name: &str, text: &str) -> fmt::Result {
    let mut cut: String = text.chars().take(TEXT_SHOWN).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    whole_paragraph(f, name, &cut)
}

/// The same for text that is not cut.
fn whole_paragraph(f: &mut fmt::Formatter<'_>, name: &str, text: &str) -> fmt::Result {
    let mut label = name;
    for line in wrap(text, WIDTH - 12) {
        writeln!(f, "{label:<11} {line}")?;
        label = "";
    }
    Ok(())
}
