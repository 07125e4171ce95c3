//! The last thing a person sees: held-out pairs before and after, two samples before and after, where everything is, and
//! what to do next.

use std::{fmt, time::Duration};

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use protocol::{EvaluationRow, Sample};

use super::{WIDTH, wrap};
use crate::{
    numbers::{duration, grouped, plain, signed},
    run_directory::SampleRow,
    summary::Summary,
};

/// Targets farther out than so many times what the log-ratios reached are told.
const TARGET_TIMES_MAX: f64 = 10.0;
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
        if let Some(before) = &self.summary.before {
            let after = self.summary.after.as_ref();
            writeln!(f, "{}\n", table(before, after))?;
        }
        if let Some(advice) = self.advice() {
            writeln!(f, "{advice}\n")?;
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
        let mut text = match (self.summary.outcome, &self.summary.reason) {
            ("completed", _) => format!("{name} is complete"),
            (_, Some(reason)) => format!("{name} failed after {steps}: {reason}"),
            _ => format!("{name} was stopped after {steps}; the same command continues it"),
        };
        if totals.steps > 0 {
            text = format!(
                "{text}\n{} steps in {}, {} pairs/s, {} tokens/s",
                grouped(totals.steps),
                duration(Duration::from_secs_f64(totals.seconds.max(0.0))),
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
        text
    }

    /// What to do about targets that nothing comes near: their gradient is a constant push, and the calibration does not
    /// calibrate.
    fn advice(&self) -> Option<String> {
        let target = self.summary.target?;
        let statistics = self.summary.after?.statistics;
        let reach = statistics
            .log_ratios_chosen
            .abs()
            .max(statistics.log_ratios_rejected.abs());
        let times = target / reach;
        if reach == 0.0 || times.is_nan() || times <= TARGET_TIMES_MAX {
            return None;
        }
        let advice = format!(
            "the targets ±{} are {times:.0} times the largest held-out log-ratio, so that calibration only pushes; \
             --set objective.beta={} would put them within reach",
            plain(target),
            plain(0.5 / reach)
        );
        Some(wrap(&advice, WIDTH).join("\n"))
    }

    fn samples(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [before, .., after] = self.samples else {
            return Ok(());
        };
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

fn table(before: &EvaluationRow, after: Option<&EvaluationRow>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let title = format!("held-out, {} pairs", grouped(before.pairs));
    let step = |row: &EvaluationRow| format!("step {}", row.step);
    let mut header = vec![title, step(before)];
    header.extend(after.map(step));
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
    for (name, show) in rows {
        let mut cells = vec![name.to_owned(), show(before)];
        cells.extend(after.map(show));
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
    let mut label = name;
    for line in wrap(&cut, WIDTH - 12) {
        writeln!(f, "{label:<11} {line}")?;
        label = "";
    }
    Ok(())
}
