//! `plots/rewards`: how chosen and rejected log-ratios move over the steps, against the targets ±1/(2β).
//!
//! The upper panel is the story; two small ones below show accuracy and the loss terms. Nothing here writes files.

mod render;
mod scale;

use plotters::{
    coord::Shift,
    prelude::{
        ChartBuilder, Circle, DashedLineSeries, DrawingArea, DrawingBackend, EmptyElement,
        IntoFont, IntoLogRange, LineSeries, PathElement, Text,
    },
    style::{
        Color, RGBColor, ShapeStyle, TextStyle, WHITE,
        text_anchor::{HPos, Pos, VPos},
    },
};
use protocol::{EvaluationRow, MetricsRow, Statistics};

use crate::numbers::{plain, signed};
use render::{FONT, Picture, render};
use scale::{log_range, reward_range, target_fits};

pub use render::Drawing;

const SIZE: (u32, u32) = (1800, 1300);
const CHOSEN: RGBColor = RGBColor(0, 128, 96);
const REJECTED: RGBColor = RGBColor(200, 60, 48);
const PAIRWISE: RGBColor = RGBColor(58, 96, 176);
const CALIBRATION: RGBColor = RGBColor(214, 138, 24);
const ACCURACY: RGBColor = RGBColor(96, 72, 160);
const INK: RGBColor = RGBColor(38, 42, 48);
const SOFT: RGBColor = RGBColor(110, 116, 124);
const GRID: RGBColor = RGBColor(232, 234, 237);
/// Training curves are noisy; they stay behind the held-out ones.
const FAINT: f64 = 0.38;

/// What is drawn.
pub struct RewardPlot<'a> {
    /// Such as the run's name and objective.
    pub title: &'a str,
    /// Training rows.
    pub metrics: &'a [MetricsRow],
    /// Held-out rows.
    pub evaluations: &'a [EvaluationRow],
    /// t, where the objective has targets ±t.
    pub target: Option<f64>,
}

/// A picture that could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("draw the reward plot: {0}")]
pub struct PlotError(String);

impl PlotError {
    fn drawing(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Draws the plot as PNG and SVG.
pub fn draw(plot: &RewardPlot) -> Result<Drawing, PlotError> {
    render(plot, SIZE)
}

/// A legend's entry.
struct Key {
    text: String,
    style: ShapeStyle,
    dashed: bool,
}

impl Picture for RewardPlot<'_> {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<(), PlotError> {
        area.fill(&WHITE).map_err(PlotError::drawing)?;
        let (head, body) = area.split_vertically(148);
        let (rewards, below) = body.split_vertically(730);
        let (left, right) = below.split_horizontally(SIZE.0 as i32 / 2);
        let title = text_style(44.0, INK, HPos::Left, VPos::Top);
        head.draw_text(self.title, &title, (60, 28))
            .map_err(PlotError::drawing)?;
        self.reward_panel(&head, &rewards)?;
        self.accuracy_panel(&left)?;
        self.loss_panel(&right)
    }
}

impl RewardPlot<'_> {
    fn reward_panel<B: DrawingBackend>(
        &self,
        head: &DrawingArea<B, Shift>,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), PlotError> {
        let chosen = |row: &Statistics| row.log_ratios_chosen;
        let rejected = |row: &Statistics| row.log_ratios_rejected;
        let curves = [
            ("chosen", CHOSEN, chosen as fn(&Statistics) -> f64),
            ("rejected", REJECTED, rejected),
        ];
        let all = || {
            curves
                .iter()
                .flat_map(|(_, _, of)| self.training(*of).chain(self.held_out(*of)))
        };
        let values = || all().map(|(_, value)| value);
        let range = reward_range(values(), self.target);
        let steps = 0.0..self.last_step();
        let mut chart = ChartBuilder::on(area)
            .margin_left(36)
            .margin_right(130)
            .margin_top(8)
            .x_label_area_size(76)
            .y_label_area_size(104)
            .build_cartesian_2d(steps.clone(), range.clone())
            .map_err(PlotError::drawing)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("log-ratio to the reference (nats)")
            .x_labels(12)
            .y_labels(11)
            .x_label_formatter(&|step| axis_step(*step))
            .y_label_formatter(&|value| axis_number(*value))
            .bold_line_style(GRID)
            .light_line_style(WHITE)
            .axis_style(SOFT)
            .label_style(text_style(26.0, INK, HPos::Center, VPos::Center))
            .axis_desc_style(text_style(28.0, INK, HPos::Center, VPos::Center))
            .draw()
            .map_err(PlotError::drawing)?;

        let zero = [(0.0, 0.0), (steps.end, 0.0)];
        chart
            .draw_series(LineSeries::new(zero, SOFT.stroke_width(2)))
            .map_err(PlotError::drawing)?;
        let mut keys = Vec::new();
        let observed = values().filter(|value| value.is_finite());
        let (low, high) = observed.fold((0.0_f64, 0.0_f64), |(l, h), v| (l.min(v), h.max(v)));
        if let Some(target) = self.target.filter(|target| target_fits(low, high, *target)) {
            for (value, color, above) in [(target, CHOSEN, -24), (-target, REJECTED, 24)] {
                let line = [(0.0, value), (steps.end, value)];
                chart
                    .draw_series(DashedLineSeries::new(line, 14, 10, color.stroke_width(3)))
                    .map_err(PlotError::drawing)?;
                // The curves begin at zero, so the lines' left ends are free.
                let style = text_style(26.0, color, HPos::Left, VPos::Center);
                let text = format!("target {}", signed(value));
                let label = EmptyElement::at((0.0, value)) + Text::new(text, (14, above), style);
                chart
                    .plotting_area()
                    .draw(&label)
                    .map_err(PlotError::drawing)?;
            }
        }
        for (name, color, of) in curves {
            let training = LineSeries::new(self.training(of), color.mix(FAINT).stroke_width(2));
            chart.draw_series(training).map_err(PlotError::drawing)?;
            let held_out: Vec<_> = self.held_out(of).collect();
            let line = LineSeries::new(held_out.clone(), color.stroke_width(5));
            chart.draw_series(line).map_err(PlotError::drawing)?;
            let dots = held_out
                .iter()
                .map(|&at| Circle::new(at, 7, color.filled()));
            chart.draw_series(dots).map_err(PlotError::drawing)?;
            if !held_out.is_empty() {
                keys.push(Key {
                    text: format!("{name}, held-out"),
                    style: color.stroke_width(5),
                    dashed: false,
                });
            }
            if self.training(of).next().is_some() {
                keys.push(Key {
                    text: format!("{name}, training"),
                    style: color.mix(FAINT).stroke_width(3),
                    dashed: false,
                });
            }
        }
        let ends = curves
            .map(|(_, color, of)| (self.held_out(of).last().or(self.training(of).last()), color));
        for (at, color) in ends {
            let Some(at) = at else { continue };
            let style = text_style(30.0, color, HPos::Left, VPos::Center);
            let label = EmptyElement::at(at) + Text::new(signed(at.1), (16, 0), style);
            chart
                .plotting_area()
                .draw(&label)
                .map_err(PlotError::drawing)?;
        }
        if let Some(target) = self.target {
            let shown = plain(target);
            let inside = target_fits(low, high, target);
            let text = if inside {
                format!("targets ±1/(2β) = ±{shown}")
            } else {
                format!("targets ±1/(2β) = ±{shown}, far outside this scale")
            };
            keys.push(Key {
                text,
                style: SOFT.stroke_width(3),
                dashed: true,
            });
        }
        legend(head, &keys, (62, 106), 27.0)
    }

    fn accuracy_panel<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), PlotError> {
        let of = |row: &Statistics| row.rewards_accuracies;
        let (head, body) = area.split_vertically(56);
        let mut chart = ChartBuilder::on(&body)
            .margin_left(36)
            .margin_right(40)
            .margin_bottom(16)
            .x_label_area_size(76)
            .y_label_area_size(104)
            .build_cartesian_2d(0.0..self.last_step(), 0.0..1.04)
            .map_err(PlotError::drawing)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("share of pairs ranked right")
            .x_labels(6)
            .y_labels(6)
            .x_label_formatter(&|step| axis_step(*step))
            .y_label_formatter(&|value| format!("{value:.1}"))
            .bold_line_style(GRID)
            .light_line_style(WHITE)
            .axis_style(SOFT)
            .label_style(text_style(24.0, INK, HPos::Center, VPos::Center))
            .axis_desc_style(text_style(26.0, INK, HPos::Center, VPos::Center))
            .draw()
            .map_err(PlotError::drawing)?;
        let training = LineSeries::new(self.training(of), ACCURACY.mix(FAINT).stroke_width(2));
        chart.draw_series(training).map_err(PlotError::drawing)?;
        let held_out: Vec<_> = self.held_out(of).collect();
        let line = LineSeries::new(held_out.clone(), ACCURACY.stroke_width(4));
        chart.draw_series(line).map_err(PlotError::drawing)?;
        let dots = held_out
            .iter()
            .map(|&at| Circle::new(at, 6, ACCURACY.filled()));
        chart.draw_series(dots).map_err(PlotError::drawing)?;
        let mut keys = Vec::new();
        if !held_out.is_empty() {
            keys.push(Key {
                text: "accuracy, held-out".into(),
                style: ACCURACY.stroke_width(4),
                dashed: false,
            });
        }
        if self.training(of).next().is_some() {
            let style = ACCURACY.mix(FAINT).stroke_width(3);
            keys.push(Key {
                text: "accuracy, training".into(),
                style,
                dashed: false,
            });
        }
        legend(&head, &keys, (140, 34), 25.0)
    }

    fn loss_panel<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<(), PlotError> {
        let terms = [
            (
                "pairwise loss, training",
                PAIRWISE,
                (|row| row.loss_pairwise) as fn(&Statistics) -> f64,
            ),
            ("calibration loss, training", CALIBRATION, |row| {
                row.loss_calibration
            }),
        ];
        let positive =
            |of: fn(&Statistics) -> f64| self.training(of).filter(|(_, value)| *value > 0.0);
        let range = log_range(
            terms
                .iter()
                .flat_map(|(_, _, of)| positive(*of))
                .map(|(_, value)| value),
        );
        let lowest = range.start;
        let (head, body) = area.split_vertically(56);
        let mut chart = ChartBuilder::on(&body)
            .margin_left(10)
            .margin_right(130)
            .margin_bottom(16)
            .x_label_area_size(76)
            .y_label_area_size(104)
            .build_cartesian_2d(0.0..self.last_step(), range.log_scale())
            .map_err(PlotError::drawing)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("loss (log scale)")
            .x_labels(6)
            .y_labels(5)
            .x_label_formatter(&|step| axis_step(*step))
            .y_label_formatter(&|value| axis_number(*value))
            .bold_line_style(GRID)
            .light_line_style(WHITE)
            .axis_style(SOFT)
            .label_style(text_style(24.0, INK, HPos::Center, VPos::Center))
            .axis_desc_style(text_style(26.0, INK, HPos::Center, VPos::Center))
            .draw()
            .map_err(PlotError::drawing)?;
        let mut keys = Vec::new();
        for (name, color, of) in terms {
            if positive(of).next().is_none() {
                continue;
            }
            let floor = |(step, value): (f64, f64)| (step, value.max(lowest));
            let line = LineSeries::new(positive(of).map(floor), color.stroke_width(3));
            chart.draw_series(line).map_err(PlotError::drawing)?;
            keys.push(Key {
                text: name.into(),
                style: color.stroke_width(4),
                dashed: false,
            });
        }
        legend(&head, &keys, (114, 34), 25.0)
    }

    fn training(&self, of: fn(&Statistics) -> f64) -> impl Iterator<Item = (f64, f64)> {
        let points = self
            .metrics
            .iter()
            .map(move |row| (row.report.step as f64, of(&row.report.statistics)));
        points.filter(|(_, value)| value.is_finite())
    }

    fn held_out(&self, of: fn(&Statistics) -> f64) -> impl Iterator<Item = (f64, f64)> {
        let points = self
            .evaluations
            .iter()
            .map(move |row| (row.step as f64, of(&row.statistics)));
        points.filter(|(_, value)| value.is_finite())
    }

    fn last_step(&self) -> f64 {
        let trained = self.metrics.last().map_or(0, |row| row.report.step);
        let evaluated = self.evaluations.last().map_or(0, |row| row.step);
        trained.max(evaluated).max(1) as f64
    }
}

/// Entries side by side, from `(x, y)`, the middle of the first line.
fn legend<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    keys: &[Key],
    (mut x, y): (i32, i32),
    size: f64,
) -> Result<(), PlotError> {
    const SWATCH: i32 = 46;
    /// Letters without descenders sit above the middle of their line.
    const RAISED: i32 = 2;
    let style = text_style(size, INK, HPos::Left, VPos::Center);
    for key in keys {
        let dash = |from: i32, to: i32| {
            area.draw(&PathElement::new(
                vec![(x + from, y - RAISED), (x + to, y - RAISED)],
                key.style,
            ))
            .map_err(PlotError::drawing)
        };
        if key.dashed {
            dash(0, 12)?;
            dash(17, 29)?;
            dash(34, SWATCH)?;
        } else {
            dash(0, SWATCH)?;
        }
        area.draw_text(&key.text, &style, (x + SWATCH + 12, y))
            .map_err(PlotError::drawing)?;
        let (width, _) = area
            .estimate_text_size(&key.text, &style)
            .map_err(PlotError::drawing)?;
        x += SWATCH + 12 + width as i32 + 42;
    }
    Ok(())
}

fn text_style(size: f64, color: RGBColor, across: HPos, down: VPos) -> TextStyle<'static> {
    (FONT, size)
        .into_font()
        .color(&color)
        .pos(Pos::new(across, down))
}

/// A step below its tick; nothing at ticks between steps, which short runs have.
fn axis_step(step: f64) -> String {
    if (step - step.round()).abs() < 1e-6 {
        return format!("{step:.0}");
    }
    String::new()
}

/// An axis label: short, with a real minus.
fn axis_number(value: f64) -> String {
    if value < 0.0 {
        return format!("−{}", plain(-value));
    }
    plain(value)
}
