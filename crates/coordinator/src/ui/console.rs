//! Progress while a job runs: a bar on a terminal, plain lines elsewhere, at most one a second.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use protocol::{EvaluationRow, MetricsRow};

use super::{WIDTH, wrap};
use crate::numbers::{counted, duration, grouped, plain, signed};

/// What begins a warning.
const WARNING: &str = "warning: ";
const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// So that time passes visibly when steps are long.
const TICK: Duration = Duration::from_millis(500);

const STEP_BAR: &str = "{spinner:.green} step {pos}/{len} [{bar:24.green/dim}] {prefix}\n  {msg}";
const PHASE_BAR: &str =
    "{spinner:.green} {prefix} {pos}/{len} [{bar:32.cyan/dim}] {elapsed} elapsed";

/// Where progress is shown.
pub struct Console {
    screen: Screen,
    /// Each rank's place in the phase that is shown.
    places: BTreeMap<u32, (u64, u64)>,
    showing: Showing,
    /// Whether the objective has rewards to show.
    rewards: bool,
    /// When this process saw its first step, and which.
    first: Option<(Instant, u64)>,
}

enum Screen {
    Bar(ProgressBar),
    Lines {
        out: Box<dyn Write + Send>,
        /// When the last progress line was written.
        written: Option<Instant>,
        /// The newest line, when it came too early to be written.
        pending: Option<String>,
    },
}

#[derive(PartialEq, Eq)]
enum Showing {
    Nothing,
    Phase(String),
    Steps,
}

impl Console {
    /// On standard error: a bar when that is a terminal, else lines.
    pub fn stderr() -> Self {
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            return Self::on(Screen::Bar(bar.with_style(style("{msg}"))));
        }
        Self::lines(Box::new(std::io::stderr()))
    }

    /// Plain lines to `out`. A reader that went away does not stop the run.
    pub fn lines(out: Box<dyn Write + Send>) -> Self {
        Self::on(Screen::Lines {
            out,
            written: None,
            pending: None,
        })
    }

    fn on(screen: Screen) -> Self {
        Self {
            screen,
            places: BTreeMap::new(),
            showing: Showing::Nothing,
            rewards: true,
            first: None,
        }
    }

    /// Whether the objective has rewards to show; `sft` has none.
    pub fn with_rewards(&mut self, rewards: bool) {
        self.rewards = rewards;
    }

    /// Shows text that stays: the banner, the data report, notes. Above the bar, where there is one.
    pub fn say(&mut self, text: &str) {
        match &mut self.screen {
            // A bar that shows nothing yet would leave an empty line.
            Screen::Bar(_) if self.showing == Showing::Nothing => {
                drop(writeln!(std::io::stderr(), "{text}"));
            }
            Screen::Bar(bar) => bar.suspend(|| drop(writeln!(std::io::stderr(), "{text}"))),
            Screen::Lines { out, .. } => drop(writeln!(out, "{text}")),
        }
    }

    /// Shows a warning, which stays.
    pub fn warn(&mut self, text: &str) {
        let lines = wrap(text, WIDTH - WARNING.len());
        let indent = format!("\n{}", " ".repeat(WARNING.len()));
        self.say(&format!("{WARNING}{}", lines.join(&indent)));
    }

    /// A rank moved in a long phase, such as `reference pass`.
    pub fn phase(&mut self, now: Instant, rank: u32, phase: &str, done: u64, total: u64) {
        let showing = Showing::Phase(phase.to_owned());
        if self.showing != showing {
            self.flush(now);
            self.places.clear();
            self.begin(showing, PHASE_BAR);
        }
        self.places.insert(rank, (done, total));
        let done: u64 = self.places.values().map(|(done, _)| done).sum();
        let total: u64 = self.places.values().map(|(_, total)| total).sum();
        match &self.screen {
            Screen::Bar(bar) => {
                bar.set_prefix(phase.to_owned());
                bar.set_length(total);
                bar.set_position(done);
            }
            Screen::Lines { .. } => {
                let line = format!("{phase} {}/{}", grouped(done), grouped(total));
                self.progress_line(now, line);
            }
        }
    }

    /// A step was committed.
    pub fn step(&mut self, now: Instant, row: &MetricsRow, steps_total: u64) {
        if self.showing != Showing::Steps {
            self.flush(now);
            self.begin(Showing::Steps, STEP_BAR);
        }
        let step = row.report.step;
        let left = self.left(now, row, steps_total);
        let rates = if self.rewards {
            format!("{} · {}", rewards(row), rates(row))
        } else {
            rates(row)
        };
        match &self.screen {
            Screen::Bar(bar) => {
                bar.set_length(steps_total);
                bar.set_prefix(left);
                bar.set_message(format!("{}\n  {rates}", loss(row)));
                bar.set_position(step);
            }
            Screen::Lines { .. } => {
                let text = format!("{} · {rates} · {left}", loss(row));
                self.progress_line(now, format!("step {step}/{steps_total}: {text}"));
                if step == steps_total {
                    self.flush(now);
                }
            }
        }
    }

    /// Time until the last step, by the steps that this process saw: a resumed run did not do the earlier ones.
    fn left(&mut self, now: Instant, row: &MetricsRow, steps_total: u64) -> String {
        let step = row.report.step;
        let (since, first) = *self.first.get_or_insert((now, step));
        let seen = step.saturating_sub(first);
        let seconds_per_step = match seen {
            0 => row.seconds,
            _ => now.duration_since(since).as_secs_f64() / seen as f64,
        };
        let seconds = seconds_per_step * steps_total.saturating_sub(step) as f64;
        let left = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        format!("{} left", duration(left))
    }

    /// Held-out pairs were evaluated.
    pub fn evaluation(&mut self, row: &EvaluationRow) {
        let statistics = &row.statistics;
        let rewards = if self.rewards {
            format!(
                "chosen {}, rejected {}, accuracy {:.2}, ",
                signed(statistics.log_ratios_chosen),
                signed(statistics.log_ratios_rejected),
                statistics.rewards_accuracies,
            )
        } else {
            String::new()
        };
        self.say(&format!(
            "step {} held-out ({}): {rewards}loss {}",
            row.step,
            counted(row.pairs, "pair"),
            plain(statistics.loss)
        ));
    }

    /// Takes the bar away, or writes the last line that came too early.
    pub fn finish(&mut self, now: Instant) {
        self.flush(now);
        if let Screen::Bar(bar) = &self.screen {
            bar.disable_steady_tick();
            bar.finish_and_clear();
        }
        self.showing = Showing::Nothing;
    }

    fn begin(&mut self, showing: Showing, template: &str) {
        self.showing = showing;
        if let Screen::Bar(bar) = &self.screen {
            bar.set_prefix("");
            bar.set_message("");
            bar.set_style(style(template));
            bar.reset();
            bar.enable_steady_tick(TICK);
        }
    }

    fn progress_line(&mut self, now: Instant, line: String) {
        let Screen::Lines {
            written, pending, ..
        } = &mut self.screen
        else {
            return;
        };
        let early = written.is_some_and(|written| now.duration_since(written) < LINE_INTERVAL);
        *pending = Some(line);
        if !early {
            self.flush(now);
        }
    }

    fn flush(&mut self, now: Instant) {
        if let Screen::Lines {
            out,
            written,
            pending,
        } = &mut self.screen
            && let Some(line) = pending.take()
        {
            drop(writeln!(out, "{line}"));
            *written = Some(now);
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .expect("the templates are fixed")
        .progress_chars("━━╌")
}

/// Loss with its terms, and the gradient's norm before clipping.
fn loss(row: &MetricsRow) -> String {
    let report = &row.report;
    if !report.finite {
        return "skipped, the gradient is not finite".into();
    }
    let statistics = &report.statistics;
    let mut terms = String::new();
    if statistics.loss_calibration != 0.0 {
        let pairwise = plain(statistics.loss_pairwise);
        let calibration = plain(statistics.loss_calibration);
        terms = format!(" ({pairwise} pairwise + {calibration} calibration)");
    }
    let (loss, norm) = (plain(statistics.loss), plain(report.grad_norm));
    format!("loss {loss}{terms} · grad norm {norm}")
}

/// Log-ratios and accuracy of a step's pairs.
fn rewards(row: &MetricsRow) -> String {
    let statistics = &row.report.statistics;
    format!(
        "chosen {} · rejected {} · accuracy {:.2}",
        signed(statistics.log_ratios_chosen),
        signed(statistics.log_ratios_rejected),
        statistics.rewards_accuracies
    )
}

/// Speed of a step.
fn rates(row: &MetricsRow) -> String {
    let pairs = if row.seconds > 0.0 {
        row.report.pairs as f64 / row.seconds
    } else {
        0.0
    };
    let tokens = grouped(row.tokens_per_second.round() as u64);
    format!("{} pairs/s · {tokens} tokens/s", plain(pairs))
}
