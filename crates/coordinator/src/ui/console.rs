//! Progress while a job runs: a bar on a terminal, plain lines elsewhere, at most one a second.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use protocol::{EvaluationRow, MetricsRow};

use crate::numbers::{grouped, plain, signed};

const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// So that time passes visibly when steps are long.
const TICK: Duration = Duration::from_millis(500);

const STEP_BAR: &str =
    "{spinner:.green} step {pos}/{len} [{bar:20.green/dim}] {eta} left · {prefix}\n  {wide_msg}";
const PHASE_BAR: &str =
    "{spinner:.green} {prefix} {pos}/{len} [{bar:32.cyan/dim}] {elapsed} elapsed";

/// Where progress is shown.
pub struct Console {
    screen: Screen,
    /// Each rank's place in the phase that is shown.
    places: BTreeMap<u32, (u64, u64)>,
    showing: Showing,
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
            let target = ProgressDrawTarget::stderr();
            return Self::on(Screen::Bar(ProgressBar::with_draw_target(None, target)));
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
        }
    }

    /// Shows text that stays: the banner, the data report, notes. Above the bar, where there is one.
    pub fn say(&mut self, text: &str) {
        match &mut self.screen {
            Screen::Bar(bar) => bar.suspend(|| drop(writeln!(std::io::stderr(), "{text}"))),
            Screen::Lines { out, .. } => drop(writeln!(out, "{text}")),
        }
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
        let step = row.report.step;
        let begins = self.showing != Showing::Steps;
        if begins {
            self.flush(now);
            self.begin(Showing::Steps, STEP_BAR);
        }
        match &self.screen {
            Screen::Bar(bar) => {
                if begins {
                    // A resumed run did not just do all earlier steps at once.
                    bar.set_length(steps_total);
                    bar.set_position(step.saturating_sub(1));
                    bar.reset_eta();
                }
                bar.set_position(step);
                bar.set_prefix(rates(row));
                bar.set_message(terms(row));
            }
            Screen::Lines { .. } => {
                let line = format!("step {step}/{steps_total}: {} · {}", terms(row), rates(row));
                self.progress_line(now, line);
                if step == steps_total {
                    self.flush(now);
                }
            }
        }
    }

    /// Held-out pairs were evaluated.
    pub fn evaluation(&mut self, row: &EvaluationRow) {
        let statistics = &row.statistics;
        self.say(&format!(
            "step {} held-out ({} pairs): chosen {}, rejected {}, accuracy {:.2}, loss {}",
            row.step,
            grouped(row.pairs),
            signed(statistics.log_ratios_chosen),
            signed(statistics.log_ratios_rejected),
            statistics.rewards_accuracies,
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
    }

    fn begin(&mut self, showing: Showing, template: &str) {
        self.showing = showing;
        if let Screen::Bar(bar) = &self.screen {
            let style = ProgressStyle::with_template(template).expect("the template is fixed");
            bar.reset();
            bar.set_style(style.progress_chars("━━╌"));
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

/// Loss, log-ratios, accuracy and gradient norm of a step.
fn terms(row: &MetricsRow) -> String {
    let report = &row.report;
    if !report.finite {
        return "skipped, the gradient is not finite".into();
    }
    let statistics = &report.statistics;
    let parts = if statistics.loss_calibration == 0.0 {
        String::new()
    } else {
        let pairwise = plain(statistics.loss_pairwise);
        format!(
            " ({pairwise} pairwise + {} calibration)",
            plain(statistics.loss_calibration)
        )
    };
    format!(
        "loss {}{parts} · chosen {} · rejected {} · accuracy {:.2} · grad norm {}",
        plain(statistics.loss),
        signed(statistics.log_ratios_chosen),
        signed(statistics.log_ratios_rejected),
        statistics.rewards_accuracies,
        plain(report.grad_norm),
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
