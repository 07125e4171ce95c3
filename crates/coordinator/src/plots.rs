//! Pictures of reward dynamics: of one run, and of several beside each other (`comparison`).
//!
//! `plots/rewards`: how chosen and rejected log-ratios move over the steps, against the targets ±1/(2β).
//!
//! The upper panel is the story; two small ones below show accuracy and the loss terms. Nothing here writes files.

mod comparison;
mod panels;
mod parts;
mod render;
mod scale;
mod signed_log;

use plotters::{
    coord::Shift,
    prelude::{DrawingArea, DrawingBackend},
    style::{
        WHITE,
        text_anchor::{HPos, VPos},
    },
};
use protocol::{EvaluationRow, MetricsRow, Statistics};
use spec::Targets;

use parts::{INK, text_style};
use render::{Picture, render};

pub use comparison::{ComparedCurve, draw_comparison};
pub use render::Drawing;

const SIZE: (u32, u32) = (1800, 1300);

/// What is drawn.
pub struct RewardPlot<'a> {
    /// Such as the run's name and objective.
    pub title: &'a str,
    /// Training rows.
    pub metrics: &'a [MetricsRow],
    /// Held-out rows.
    pub evaluations: &'a [EvaluationRow],
    /// Where the objective calibrates to.
    pub targets: Option<Targets>,
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
